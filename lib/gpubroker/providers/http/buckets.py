"""A vendor's rate limits, kept by all processes together through Redis, or per process while Redis is away.

A bucket is one moment (GCRA): when all that was taken is paid back. Taking moves it by one interval; whoever comes too early
is told how long to wait, and its turn is kept. A call that counts against several limits takes all its turns for one moment,
and none while another of them makes it wait longer than the last, which other calls need too: none of these waits for it.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from gpubroker import cache
from gpubroker.errors import Throttled


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `burst` calls at once, and one per `interval_seconds` on the average."""

    interval_seconds: float
    burst: int = 1


# KEYS the buckets; ARGV the patience, then interval and burst of each; all in milliseconds but the burst. Returns milliseconds
# to wait, and whether the turns were taken: `_take_alone` says the same in Python.
_TAKE: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local free_at, wait, last = {}, 0, 0
for i, key in ipairs(KEYS) do
  local interval, burst = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
  free_at[i] = math.max(tonumber(redis.call('GET', key) or now), now)
  last = math.max(0, free_at[i] - (burst - 1) * interval - now)
  wait = math.max(wait, last)
end
if wait > tonumber(ARGV[1]) then return {math.ceil(wait), 0} end
if wait > last then return {math.ceil(wait - last), 0} end
for i, key in ipairs(KEYS) do
  local paid_at = math.max(free_at[i], now + wait) + tonumber(ARGV[2 * i])
  redis.call('SET', key, paid_at, 'PX', math.ceil(paid_at - now) + 1000)
end
return {math.ceil(wait), 1}
"""


class Buckets:
    """The limits of one vendor, by name: a call may count against several."""

    def __init__(self, provider: str, limits: dict[str, Limit]) -> None:
        self._provider = provider
        self.limits = limits
        self._free_at: dict[str, float] = {}

    async def take(self, *names: str, patience_seconds: float) -> None:
        """Wait for a turn of each of these. Raises Throttled with the time to wait where that is longer than the patience."""
        limits = {name: self.limits[name] for name in names if name in self.limits}
        if not limits:
            return
        until = time.monotonic() + patience_seconds
        is_taken = False
        while not is_taken:
            patience = max(0.0, until - time.monotonic())
            wait, is_taken = await self._take_shared(limits, patience) or self._take_alone(limits, patience)
            if wait > patience and not is_taken:
                what = "' and '".join(names)
                raise Throttled("own_limit", f"{self._provider} takes no more calls of '{what}' now", wait=wait)
            if wait > 0:
                await asyncio.sleep(wait)

    async def _take_shared(self, limits: Mapping[str, Limit], patience_seconds: float) -> tuple[float, bool] | None:
        redis = await cache.shared.reach()
        if redis is None:
            return None
        keys = [f"gpubroker:bucket:{self._provider}:{name}" for name in limits]
        arguments = [patience_seconds * 1000]
        for limit in limits.values():
            arguments += [limit.interval_seconds * 1000, limit.burst]
        try:
            async with asyncio.timeout(cache.SECONDS):
                answer: Any = await redis.eval(_TAKE, len(keys), *keys, *arguments)  # pyright: ignore[reportGeneralTypeIssues, reportUnknownVariableType, reportArgumentType] - redis types it for both colours
        except Exception as error:  # noqa: BLE001 - whatever it is, calls go on
            cache.shared.lose(error)
            return None
        return int(answer[0]) / 1000, bool(answer[1])

    def _take_alone(self, limits: Mapping[str, Limit], patience_seconds: float) -> tuple[float, bool]:
        now = time.monotonic()
        free_at = {name: max(self._free_at.get(name, now), now) for name in limits}
        waits = [max(0.0, free_at[n] - (limit.burst - 1) * limit.interval_seconds - now) for n, limit in limits.items()]
        wait, last = max(waits), waits[-1]
        if wait > patience_seconds:
            return wait, False
        if wait > last:
            return wait - last, False
        for name, limit in limits.items():
            self._free_at[name] = max(free_at[name], now + wait) + limit.interval_seconds
        return wait, True
