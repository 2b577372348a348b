"""Circuit breakers: a vendor that fails again and again is left alone for a while, each kind of call for itself.

A process judges by its own calls. What it opened it tells Redis, so that `GET /v1/providers` can show it; while Redis is away
that shows nothing rather than a guess.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from gpubroker import cache

Kind = Literal["offers", "read", "act", "create"]
KINDS: Final[tuple[Kind, ...]] = ("offers", "read", "act", "create")
State = Literal["closed", "open", "half_open"]

FAILURES: Final = 5
"""So many failures after one another open a breaker."""
OPEN_SECONDS: Final = 30.0
_SHOWN_SECONDS: Final = 600


@dataclass(slots=True)
class _Breaker:
    failures: int = 0
    open_until: float = 0.0


class Breakers:
    """The breakers of one vendor."""

    def __init__(self, provider: str) -> None:
        self._provider = provider
        self._breakers: dict[Kind, _Breaker] = {kind: _Breaker() for kind in KINDS}

    def wait(self, kind: Kind) -> float:
        """Seconds until a call of this kind may be made; 0: now. When an open one's time is over, one call tries."""
        breaker, now = self._breakers[kind], time.monotonic()
        if breaker.failures < FAILURES:
            return 0.0
        if breaker.open_until > now:
            return breaker.open_until - now
        breaker.open_until = now + OPEN_SECONDS  # half open: the others wait for what this one finds
        return 0.0

    async def succeed(self, kind: Kind) -> None:
        """The vendor answered."""
        breaker = self._breakers[kind]
        if breaker.failures >= FAILURES:
            await self._tell(kind, None)
        breaker.failures, breaker.open_until = 0, 0.0

    async def fail(self, kind: Kind) -> None:
        """The vendor did not answer, or answered what nobody can read."""
        breaker = self._breakers[kind]
        breaker.failures += 1
        if breaker.failures >= FAILURES:
            breaker.open_until = time.monotonic() + OPEN_SECONDS
            await self._tell(kind, time.time() + OPEN_SECONDS)

    async def _tell(self, kind: Kind, open_until: float | None) -> None:
        redis = await cache.shared.reach()
        if redis is None:
            return
        try:
            async with asyncio.timeout(cache.SECONDS):
                if open_until is None:
                    await redis.delete(_key(self._provider, kind))
                else:
                    await redis.set(_key(self._provider, kind), f"{open_until:.3f}", ex=_SHOWN_SECONDS)
        except Exception as error:  # noqa: BLE001 - whatever it is, calls go on
            cache.shared.lose(error)


def _key(provider: str, kind: Kind) -> str:
    return f"gpubroker:breaker:{provider}:{kind}"


async def read_states(providers: Iterable[str]) -> Mapping[str, dict[Kind, State]] | None:
    """What any process told of these providers' breakers; None when Redis cannot say."""
    asked: list[tuple[str, Kind]] = [(provider, kind) for provider in providers for kind in KINDS]
    redis = await cache.shared.reach()
    if redis is None or not asked:
        return None
    try:
        async with asyncio.timeout(cache.SECONDS):
            told: list[Any] = await redis.mget([_key(*one) for one in asked])  # pyright: ignore[reportGeneralTypeIssues] - redis types it for both colours
    except Exception as error:  # noqa: BLE001 - whatever it is, the answer goes without
        cache.shared.lose(error)
        return None
    states: dict[str, dict[Kind, State]] = {}
    for (provider, kind), until in zip(asked, told, strict=True):
        state: State = "closed" if until is None else "open" if float(until) > time.time() else "half_open"
        states.setdefault(provider, {})[kind] = state
    return states
