"""The way to Redis, which is a cache: whoever uses it goes on without it.

It is connected to when somebody asks for it, and tried again every two seconds while it is away; one log line says that it is
away, one that it is back.
"""

import asyncio
import contextlib
import importlib
import logging
import time
from typing import TYPE_CHECKING, Final

from gpubroker import config

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger("gpubroker.cache")

SECONDS: Final = 0.25
"""Nothing waits longer for Redis than this."""
_RETRY_SECONDS: Final = 2.0
_AFTER_FIRST_ANSWER_SECONDS: Final = 0.3


class Cache:
    """The connection of this process."""

    def __init__(self) -> None:
        self._redis: Redis | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._dropping: set[asyncio.Task[None]] = set()
        self._retry_at = 0.0
        self._is_away = False

    def at_hand(self) -> "Redis | None":
        """Redis, when it is connected to. Else it will be, after the first answer: a cold start does not pay for it."""
        if self._redis is None:
            self._connect_in(0.0 if self._is_away else _AFTER_FIRST_ANSWER_SECONDS)
        return self._redis

    async def reach(self) -> "Redis | None":
        """Redis, connected to now where that takes no longer than a moment; None when there is none or it is away."""
        if self._redis is None:
            self._connect_in(0.0)
            if self._connecting is not None:
                await asyncio.wait([self._connecting], timeout=SECONDS * 4)
        return self._redis

    def _connect_in(self, seconds: float) -> None:
        if config.settings().redis_url is None or self._connecting is not None or time.monotonic() < self._retry_at:
            return
        self._connecting = asyncio.get_running_loop().create_task(self._connect(seconds))

    async def _connect(self, pause: float) -> None:
        try:
            await asyncio.sleep(pause)
            module = await asyncio.to_thread(importlib.import_module, "redis.asyncio")
            client: Redis = module.Redis.from_url(
                config.settings().redis_url or "", socket_timeout=SECONDS, socket_connect_timeout=SECONDS
            )
            await client.ping()  # pyright: ignore[reportUnknownMemberType, reportGeneralTypeIssues] - redis types it for both colours
        except Exception as error:  # noqa: BLE001 - whatever it is, its users go on
            self.lose(error)
        else:
            self._redis = client
            if self._is_away:
                log.warning("Redis is back: limits are shared again")
            self._is_away = False
        finally:
            self._connecting = None

    def lose(self, error: Exception) -> None:
        """Know that it did not answer."""
        if not self._is_away:
            log.warning("Redis is away (%s): limits hold per process until it is back", type(error).__name__)
        if self._redis is not None:
            task = asyncio.get_running_loop().create_task(_drop(self._redis))
            self._dropping.add(task)
            task.add_done_callback(self._dropping.discard)
        self._is_away, self._redis = True, None
        self._retry_at = time.monotonic() + _RETRY_SECONDS

    async def close(self) -> None:
        """Let go of it; whoever asks next begins anew."""
        if self._connecting is not None:
            self._connecting.cancel()
        client, self._redis, self._connecting = self._redis, None, None
        self._is_away, self._retry_at = False, 0.0
        if client is not None:
            await client.aclose()
        await asyncio.gather(*self._dropping)


async def _drop(client: "Redis") -> None:
    """Close connections that did not answer, those in use too."""
    with contextlib.suppress(Exception):
        await client.aclose()


shared: Final = Cache()
