"""One-off work for operators, in a process of its own: a sweep, a refresh, the dead man's switch."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn, TypeVar

from gpubroker import adapters, catalog, config, deadman, errors, outbox, reconciling, serving, store, trial
from gpubroker.providers import registry

T = TypeVar("T")


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run the work against the database of the environment. Raises SetupError when that cannot be used."""
    config.settings().need("DATABASE_URL", "GPUBROKER_OWNER", "GPUBROKER_SECRET_KEY")
    serving.set_up_logging()

    async def all_of_it() -> T:
        try:
            await store.pool()
            return await work()
        except errors.Unavailable as error:
            reason = str(error.__cause__ or error).strip().splitlines()
            line = f"the database cannot be reached: {reason[-1] if reason else 'no answer'}"
            raise errors.SetupError(line) from None
        finally:
            await outbox.close()
            await adapters.close()
            await store.close()

    return asyncio.run(all_of_it())


def run_alone(work: Callable[[], Awaitable[T]]) -> T:
    """Run the work with the vendors' keys and our owner alone: no database, no Redis, no Broker."""
    config.settings().need("GPUBROKER_OWNER")
    serving.set_up_logging()

    async def all_of_it() -> T:
        try:
            return await work()
        finally:
            await adapters.close()

    return asyncio.run(all_of_it())


async def switch_off() -> list[deadman.Report]:
    """The dead man's switch, over every provider that can be called: one that is drained too."""
    settings = config.settings()
    names = registry.reachable(settings) or _refuse_none()
    return await deadman.switch_off([adapters.mine().get(name) for name in names], settings.owner or "")


async def check_providers(
    names: Sequence[str] | None, live_micro: int | None
) -> list[tuple[trial.Standing, list[trial.Step]]]:
    """Check these providers, or all that are on, one after the other; with an amount in micro-USD try each out for it."""
    settings = config.settings()
    owner = settings.owner or ""
    tried: list[tuple[trial.Standing, list[trial.Step]]] = []
    for name in names or registry.enabled(settings) or _refuse_none():
        provider = adapters.mine().get(name)
        standing = await trial.check(provider, owner)
        is_tried = live_micro is not None and standing.error is None
        tried.append((standing, await trial.Trial(provider, owner, live_micro or 0).run() if is_tried else []))
    return tried


def _refuse_none() -> NoReturn:
    raise errors.SetupError("no provider is on: set a vendor's credential (docs/providers.md lists them)")


def describe(report: deadman.Report) -> dict[str, object]:
    """A report of the dead man's switch as JSON."""
    return {**report._asdict(), "ended": [end._asdict() for end in report.ended]}


async def reconcile() -> None:
    """One sweep, whatever the time."""
    await reconciling.reconcile(adapters.mine())


async def refresh() -> dict[str, str]:
    """Refresh every provider that is due. Says of each what came of it."""
    return await catalog.refresh_all(adapters.mine())
