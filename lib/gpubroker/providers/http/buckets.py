"""A vendor's rate limits, kept by all processes together through Redis, or per process while Redis is away.

A bucket is one moment (GCRA): when all that was taken is paid back. Taking moves it by one interval; whoever comes too early
is told how long to wait, and its turn is kept.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Final

from gpubroker import cache
from gpubroker.errors import Throttled


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `burst` calls at once, and one per `interval_seconds` on the average."""

    interval_seconds: float
    burst: int = 1


# KEYS[1] the bucket; ARGV interval, burst, patience, all in milliseconds but the burst. Returns milliseconds to wait; negative:
# that many are too long, and nothing was taken.
_TAKE: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local interval, burst, patience = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local free_at = math.max(tonumber(redis.call('GET', KEYS[1]) or now), now)
local wait = math.max(0, free_at - (burst - 1) * interval - now)
if wait > patience then return -math.ceil(wait) end
redis.call('SET', KEYS[1], free_at + interval, 'PX', math.ceil(free_at + interval - now) + 1000)
return math.ceil(wait)
"""


class Buckets:
    """The limits of one vendor, by name: a call may count against several."""

    def __init__(self, provider: str, limits: dict[str, Limit]) -> None:
        self._provider = provider
        self.limits = limits
        self._free_at: dict[str, float] = {}

    async def take(self, name: str, patience_seconds: float) -> None:
        """Wait for a turn. Raises Throttled with the time to wait where that is longer than the patience."""
        limit = self.limits.get(name)
        if limit is None:
            return
        wait = await self._take_shared(name, limit, patience_seconds)
        if wait is None:
            wait = self._take_alone(name, limit, patience_seconds)
        if wait < 0:
            raise Throttled("own_limit", f"{self._provider} takes no more calls of '{name}' now", wait=-wait)
        if wait > 0:
            await asyncio.sleep(wait)

    async def _take_shared(self, name: str, limit: Limit, patience_seconds: float) -> float | None:
        redis = await cache.shared.reach()
        if redis is None:
            return None
        arguments = (limit.interval_seconds * 1000, limit.burst, patience_seconds * 1000)
        try:
            async with asyncio.timeout(cache.SECONDS):
                wait: Any = await redis.eval(_TAKE, 1, f"gpubroker:bucket:{self._provider}:{name}", *arguments)  # pyright: ignore[reportGeneralTypeIssues, reportUnknownVariableType, reportArgumentType] - redis types it for both colours
        except Exception as error:  # noqa: BLE001 - whatever it is, calls go on
            cache.shared.lose(error)
            return None
        return int(wait) / 1000

    def _take_alone(self, name: str, limit: Limit, patience_seconds: float) -> float:
        now = time.monotonic()
        free_at = max(self._free_at.get(name, now), now)
        wait = max(0.0, free_at - (limit.burst - 1) * limit.interval_seconds - now)
        if wait > patience_seconds:
            return -wait
        self._free_at[name] = free_at + limit.interval_seconds
        return wait
