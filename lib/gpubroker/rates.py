"""Rate limits per organisation and second, shared by all processes through Redis.

A process takes requests in small lots, so that a busy one asks Redis for every fiftieth alone. Without Redis (not there, not
answering, not connected yet) the limit holds per process; a log line says so, once.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Final, NamedTuple

from gpubroker import cache, errors

PER_SECOND: Final = {"free": 10, "pro": 100, "enterprise": 1000}
"""Requests a second of an organisation, by plan."""
_LOTS: Final = 20


@dataclass(slots=True)
class _Window:
    """What an organisation has left of this second, in this process, and what Redis had last. `is_spent`: no more is to be had."""

    second: int
    limit: int
    left: int = 0
    pool: int = 0
    is_spent: bool = False


class Rate(NamedTuple):
    """How an organisation stands to its limit."""

    limit: int
    remaining: int

    def as_headers(self) -> dict[str, str]:
        """The fields of draft-ietf-httpapi-ratelimit-headers."""
        return {"RateLimit-Policy": f'"plan";q={self.limit};w=1', "RateLimit": f'"plan";r={self.remaining};t=1'}


class Limiter:
    """The windows of this process."""

    def __init__(self) -> None:
        self._windows: dict[str, _Window] = {}

    async def take(self, org_id: str, plan: str) -> Rate:
        """Count one request. Raises RateLimited above the plan's requests a second."""
        limit = PER_SECOND[plan]
        second = int(time.time())
        window = self._windows.get(org_id)
        if window is None or (window.second, window.limit) != (second, limit):
            window = self._windows[org_id] = self._new_window(second, limit)
        if window.left <= 0 and not window.is_spent:
            await self._take_lot(org_id, window)
        if window.left <= 0:
            raise errors.RateLimited(
                f"The organisation's plan allows {limit} requests a second.",
                headers={"Retry-After": "1"} | Rate(limit, 0).as_headers(),
            )
        window.left -= 1
        return Rate(limit, window.left + window.pool)

    def _new_window(self, second: int, limit: int) -> _Window:
        if len(self._windows) > 1000:  # noqa: PLR2004 - forget those that nobody calls for
            self._windows = {org: window for org, window in self._windows.items() if window.second >= second - 1}
        return _Window(second, limit)

    async def _take_lot(self, org_id: str, window: _Window) -> None:
        limit = window.limit
        lot = max(1, limit // _LOTS)
        redis = cache.shared.at_hand()
        if redis is None:
            window.left, window.is_spent = limit, True  # this process alone, until Redis is there
            return
        key = f"gpubroker:rate:{org_id}:{window.second}"
        try:
            async with asyncio.timeout(cache.SECONDS):
                pipeline = redis.pipeline(transaction=False)
                pipeline.incrby(key, lot)
                pipeline.expire(key, 3)
                taken = int((await pipeline.execute())[0])
        except Exception as error:  # noqa: BLE001 - whatever it is, requests go on
            cache.shared.lose(error)
            if not window.is_spent:  # else another request that waited for Redis was told so first
                window.left, window.pool, window.is_spent = window.left + limit, 0, True
            return
        window.left += max(0, lot - max(0, taken - limit))
        window.pool = max(0, limit - taken)
        window.is_spent = window.is_spent or taken >= limit

    async def close(self) -> None:
        """Let go of Redis; the next request begins anew."""
        self._windows.clear()
        await cache.shared.close()


limiter: Final = Limiter()
