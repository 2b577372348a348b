"""Rate limits per organisation and second, shared by all processes through Redis.

A process takes requests in small lots, so that a busy one asks Redis for every fiftieth alone. Without Redis (not there, not
answering, not connected yet) the limit holds per process; a log line says so, once. Redis is connected to after the first
answer: a cold start does not pay for it.
"""

import asyncio
import importlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from gpubroker import config, errors

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger("gpubroker.rates")

PER_SECOND: Final = {"free": 10, "pro": 100, "enterprise": 1000}
"""Requests a second of an organisation, by plan."""
_LOTS: Final = 20
_REDIS_SECONDS: Final = 0.25
_RETRY_SECONDS: Final = 2.0
_AFTER_FIRST_ANSWER_SECONDS: Final = 0.3


@dataclass(slots=True)
class _Window:
    """What an organisation has left of this second, in this process. `is_spent`: nothing more is to be had of Redis."""

    second: int
    left: int = 0
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
        self._redis: Redis | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._retry_at = 0.0
        self._is_alone = False

    async def take(self, org_id: str, plan: str) -> Rate:
        """Count one request. Raises RateLimited above the plan's requests a second."""
        limit = PER_SECOND[plan]
        second = int(time.time())
        window = self._windows.get(org_id)
        if window is None or window.second != second:
            window = self._windows[org_id] = self._new_window(second)
        if window.left <= 0 and not window.is_spent:
            await self._take_lot(org_id, limit, window)
        if window.left <= 0:
            raise errors.RateLimited(
                f"The organisation's plan allows {limit} requests a second.",
                headers={"Retry-After": "1"} | Rate(limit, 0).as_headers(),
            )
        window.left -= 1
        return Rate(limit, window.left)

    def _new_window(self, second: int) -> _Window:
        if len(self._windows) > 1000:  # noqa: PLR2004 - forget those that nobody calls for
            self._windows = {org: window for org, window in self._windows.items() if window.second >= second - 1}
        return _Window(second)

    async def _take_lot(self, org_id: str, limit: int, window: _Window) -> None:
        lot = max(1, limit // _LOTS)
        if self._redis is None:
            self._connect_later()
            window.left, window.is_spent = limit, True  # this process alone, until Redis is there
            return
        key = f"gpubroker:rate:{org_id}:{window.second}"
        try:
            async with asyncio.timeout(_REDIS_SECONDS):
                pipeline = self._redis.pipeline(transaction=False)
                pipeline.incrby(key, lot)
                pipeline.expire(key, 3)
                taken = int((await pipeline.execute())[0])
        except Exception as error:  # noqa: BLE001 - whatever it is, requests go on
            self._lose_redis(error)
            window.left, window.is_spent = window.left + limit, True
            return
        window.left += max(0, lot - max(0, taken - limit))
        window.is_spent = taken >= limit

    def _connect_later(self) -> None:
        if config.settings().redis_url is None or self._connecting is not None or time.monotonic() < self._retry_at:
            return
        self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        try:
            await asyncio.sleep(_AFTER_FIRST_ANSWER_SECONDS if not self._is_alone else 0)
            module = await asyncio.to_thread(importlib.import_module, "redis.asyncio")
            client: Redis = module.Redis.from_url(
                config.settings().redis_url or "", socket_timeout=_REDIS_SECONDS, socket_connect_timeout=_REDIS_SECONDS
            )
            await client.ping()  # pyright: ignore[reportUnknownMemberType, reportGeneralTypeIssues] - redis types it for both colours
        except Exception as error:  # noqa: BLE001 - whatever it is, requests go on
            self._lose_redis(error)
        else:
            self._redis = client
            if self._is_alone:
                log.warning("Redis is back: rate limits are shared again")
            self._is_alone = False
        finally:
            self._connecting = None

    def _lose_redis(self, error: Exception) -> None:
        if not self._is_alone:
            log.warning("Redis is away (%s): rate limits hold per process until it is back", type(error).__name__)
        self._is_alone, self._redis = True, None
        self._retry_at = time.monotonic() + _RETRY_SECONDS

    async def close(self) -> None:
        """Let go of Redis; the next request begins anew."""
        if self._connecting is not None:
            self._connecting.cancel()
        client, self._redis, self._connecting = self._redis, None, None
        self._windows.clear()
        self._is_alone, self._retry_at = False, 0.0
        if client is not None:
            await client.aclose()


limiter: Final = Limiter()
