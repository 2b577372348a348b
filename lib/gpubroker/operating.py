"""One-off work for operators, in a process of its own: a sweep, a refresh."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from gpubroker import adapters, catalog, config, errors, outbox, reconciling, serving, store

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


async def reconcile() -> None:
    """One sweep, whatever the time."""
    await reconciling.reconcile(adapters.mine())


async def refresh() -> dict[str, str]:
    """Refresh every provider that is due. Says of each what came of it."""
    return await catalog.refresh_all(adapters.mine())
