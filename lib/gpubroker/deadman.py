"""The dead man's switch: what is past its hard stop is destroyed, with the vendors' keys and nothing else.

It runs where the broker does not: no database, no Redis, no event. The hard stop stands in each instance's very name; a
provider that moved it says so itself. Only references of our owner are touched (DESIGN 7).
"""

import asyncio
import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Final, NamedTuple

from gpubroker import errors, times
from gpubroker.ids import read_hard_stop
from gpubroker.providers.base import Instance, Provider

log = logging.getLogger("gpubroker.deadman")

_LIST_SECONDS: Final = 120
_AT_ONCE: Final = 8


class Ended(NamedTuple):
    """An instance past its hard stop. `error` None: the provider took the order to destroy it, or knows it no more."""

    instance_id: str
    ref: str
    hard_stop_at: datetime
    error: str | None


class Report(NamedTuple):
    """What came of one provider. `listed` counts the instances of our owner; `error` says why they are not known."""

    provider: str
    listed: int
    ended: tuple[Ended, ...]
    error: str | None

    @property
    def is_good(self) -> bool:
        """Everything was seen, and nothing that is past its hard stop was left."""
        return self.error is None and all(end.error is None for end in self.ended)


async def switch_off(providers: Sequence[Provider], owner: str) -> list[Report]:
    """Destroy what is past its hard stop at all providers side by side: none waits for another."""
    return list(await asyncio.gather(*(_switch_off(provider, owner) for provider in providers)))


async def _switch_off(provider: Provider, owner: str) -> Report:
    try:
        listed = await asyncio.wait_for(provider.list_managed(owner), _LIST_SECONDS)
    except (errors.ProviderError, TimeoutError, OSError) as error:
        return Report(provider.name, 0, (), f"the listing failed: {errors.describe(error)}")
    ours = [i for i in listed if i.ref is not None and i.ref.startswith(f"gb-{owner}-") and i.life != "gone"]
    now = times.now()
    late = [(instance, stop) for instance in ours if (stop := find_hard_stop(instance)) is not None and stop <= now]
    gate = asyncio.Semaphore(_AT_ONCE)
    ended = await asyncio.gather(*(_end(provider, instance, stop, gate) for instance, stop in late))
    return Report(provider.name, len(ours), tuple(ended), None)


async def _end(provider: Provider, instance: Instance, hard_stop_at: datetime, gate: asyncio.Semaphore) -> Ended:
    error: str | None = None
    async with gate:
        try:
            await asyncio.wait_for(provider.terminate(instance.id), provider.capabilities.call_limit_seconds)
        except errors.InstanceNotFound:
            pass
        except (errors.ProviderError, TimeoutError, OSError) as failure:
            error = errors.describe(failure)
    log.log(
        logging.WARNING if error is None else logging.ERROR,
        "%s at %s was to end at %s: %s", instance.id, provider.name, hard_stop_at.isoformat(), error or "destroyed",
    )  # fmt: skip
    return Ended(instance.id, instance.ref or "", hard_stop_at, error)


def find_hard_stop(instance: Instance) -> datetime | None:
    """The moment after which anyone may destroy an instance: the one in its name, or a later one that its provider has."""
    named = read_hard_stop(instance.ref or "")
    return None if named is None else max(named, instance.hard_stop_at or named)
