"""The machine's own pods when `gpubroker dev` ends: they stay under their supervisors, or are ended first."""

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from gpubroker import adapters, pods
from gpubroker.config import Settings
from gpubroker.providers.base import Instance
from gpubroker.providers.registry import enabled
from gpubroker.times import format_time

_PROVIDER: Final = "local"
_LIST_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 0.25
_END_SECONDS: Final = 15.0


async def list_pods(settings: Settings) -> Sequence[Instance]:
    """List the instances on this machine that are not over. Raises TimeoutError after 1 s, and ProviderError."""
    if _PROVIDER not in enabled(settings):
        return []
    async with asyncio.timeout(_LIST_SECONDS):
        return await adapters.mine().get(_PROVIDER).list_managed(settings.owner or "")


async def end_pods(settings: Settings, hurry: asyncio.Event) -> Sequence[Instance]:
    """Have every pod on this machine ended, and wait at most 15 s, or until `hurry`. Lists those that are left.

    Whatever waits for them must run meanwhile: the functions, and the clock that drives them.
    """
    until = time.monotonic() + _END_SECONDS
    await pods.end_all("requested", _PROVIDER)
    while (left := await list_pods(settings)) and not hurry.is_set() and time.monotonic() < until:  # noqa: ASYNC110 - the machine sends no events
        await asyncio.sleep(_LOOK_SECONDS)
    return left


def describe(left: Sequence[Instance]) -> str:
    """Say in lines for people which pods go on, and until when at the latest."""
    lines = ["pods that go on under their supervisors, to their hard stop at the latest:"]
    for instance in left:
        until = f", hard stop {format_time(instance.hard_stop_at)}" if instance.hard_stop_at else ""
        lines.append(f"  {instance.ref or instance.id}: {instance.life}{until}")
    return "\n".join(lines)
