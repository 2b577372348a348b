"""Breakers and buckets over a real Redis, and without one."""

import asyncio
import heapq
import itertools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from types import SimpleNamespace

import pytest
from tests.factories import World

from gpubroker import cache, config
from gpubroker.errors import Throttled
from gpubroker.providers.http import breakers
from gpubroker.providers.http import buckets as module
from gpubroker.providers.http.breakers import Breakers, read_states
from gpubroker.providers.http.buckets import Buckets, Limit

pytestmark = pytest.mark.anyio


@pytest.fixture
async def shared(redis_url: str, anyio_backend: str) -> AsyncIterator[str]:
    """A provider's name of the test's own, and Redis."""
    before = config.settings()
    config.use(config.read({"REDIS_URL": redis_url}))
    until = time.monotonic() + 20
    while await cache.shared.reach() is None:
        assert time.monotonic() < until
    yield f"vendor-{secrets.token_hex(4)}"
    await cache.shared.close()
    config.use(before)


async def test_processes_share_a_bucket(shared: str) -> None:
    limits = {"launch": Limit(interval_seconds=12, burst=2)}
    one, other = Buckets(shared, limits), Buckets(shared, limits)
    await one.take("launch", patience_seconds=0)
    await other.take("launch", patience_seconds=0)
    for buckets in (one, other):
        with pytest.raises(Throttled) as throttled:
            await buckets.take("launch", patience_seconds=5)
        assert 10 < throttled.value.wait <= 12


async def test_who_has_patience_gets_the_next_turn(shared: str) -> None:
    buckets = Buckets(shared, {"calls": Limit(interval_seconds=0.1)})
    loop = asyncio.get_running_loop()
    await buckets.take("calls", patience_seconds=0)
    began = loop.time()
    await asyncio.gather(buckets.take("calls", patience_seconds=2), buckets.take("calls", patience_seconds=2))
    assert loop.time() - began >= 0.15


async def test_what_counts_twice_takes_its_turns_for_one_moment(shared: str) -> None:
    buckets = Buckets(shared, {"launch": Limit(interval_seconds=12), "calls": Limit(interval_seconds=5)})
    await buckets.take("launch", "calls", patience_seconds=0)
    for names, least, most in ((("launch", "calls"), 10, 12), (("calls",), 3, 5)):  # what was refused moved neither
        with pytest.raises(Throttled) as throttled:
            await buckets.take(*names, patience_seconds=1)
        assert least < throttled.value.wait <= most
    fast = Buckets(f"{shared}-fast", {"launch": Limit(interval_seconds=0.2), "calls": Limit(interval_seconds=0.1)})
    began = time.monotonic()
    await fast.take("launch", "calls", patience_seconds=0)
    await fast.take("launch", "calls", patience_seconds=5)
    assert time.monotonic() - began >= 0.19


class Clock:
    """Time that stands still while anybody works."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._asleep: list[tuple[float, int, asyncio.Future[None]]] = []
        self._turns = itertools.count()

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._asleep, (self.now + seconds, next(self._turns), over))
        await over

    async def run(self, *work: Coroutine[object, object, None]) -> None:
        together = asyncio.gather(*work)
        while not together.done():
            for _ in range(20):
                await asyncio.sleep(0)
            if self._asleep:
                self.now, _, over = heapq.heappop(self._asleep)
                over.set_result(None)
        await together


async def test_launches_beside_other_calls_keep_both_distances_and_hold_no_call_up(
    anyio_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, buckets = Clock(), Buckets("vendor", {"launch": Limit(12), "calls": Limit(1)})
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=clock.sleep))
    sent: dict[str, list[float]] = {"launch": [], "calls": []}
    waited: list[float] = []

    async def launch() -> None:
        await buckets.take("launch", "calls", patience_seconds=60)
        sent["launch"].append(clock.now)
        sent["calls"].append(clock.now)

    async def call(at: float) -> None:
        await clock.sleep(at)
        began = clock.now
        await buckets.take("calls", patience_seconds=60)
        waited.append(clock.now - began)
        sent["calls"].append(clock.now)

    await clock.run(
        *(launch() for _ in range(4)), *(call(at) for at in (0, 0.5, 0.5, 10, 11.2, 11.3, 11.4, 11.5, 24, 30))
    )
    for name, least in (("launch", 12), ("calls", 1)):
        moments = sorted(sent[name])
        assert min(later - before for before, later in itertools.pairwise(moments)) >= least - 1e-6
    assert (len(sent["launch"]), len(sent["calls"])) == (4, 14)
    assert max(waited) < 6


async def test_a_breaker_shows_from_another_process(shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Breakers(shared)
    for _ in range(breakers.FAILURES):
        await mine.fail("create")
    shown = await read_states([shared])
    assert shown == {shared: {"offers": "closed", "read": "closed", "act": "closed", "create": "open"}}
    later = breakers.time.time() + breakers.OPEN_SECONDS + 1
    with monkeypatch.context() as patch:
        patch.setattr(breakers.time, "time", lambda: later)
        assert ((await read_states([shared])) or {})[shared]["create"] == "half_open"
    await mine.succeed("create")
    assert ((await read_states([shared])) or {})[shared]["create"] == "closed"


async def test_without_redis_limits_hold_per_process_and_a_line_says_so(
    anyio_backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = config.settings()
    config.use(config.read({"REDIS_URL": "redis://127.0.0.1:9/0"}))
    try:
        buckets, mine = Buckets("vendor", {"calls": Limit(interval_seconds=5)}), Breakers("vendor")
        await buckets.take("calls", patience_seconds=0)
        with pytest.raises(Throttled):
            await buckets.take("calls", patience_seconds=1)
        for _ in range(breakers.FAILURES):
            await mine.fail("read")
        assert mine.wait("read") > 0
        assert await read_states(["vendor"]) is None
        assert len([r for r in caplog.records if r.levelno == logging.WARNING and "Redis is away" in r.message]) == 1
    finally:
        await cache.shared.close()
        config.use(before)


async def test_half_open_lets_one_call_try(anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Breakers("vendor")
    for _ in range(breakers.FAILURES):
        await mine.fail("read")
    later = breakers.time.monotonic() + breakers.OPEN_SECONDS + 1
    monkeypatch.setattr(breakers.time, "monotonic", lambda: later)
    assert mine.wait("read") == 0
    assert mine.wait("read") > 0
    await mine.succeed("read")
    assert mine.wait("read") == 0


async def test_the_offers_function_shows_breakers(world: World, redis_url: str) -> None:
    client, name = world.root, world.provider.name
    (shown,) = [p for p in (await client.get("/v1/providers"))["items"] if p["name"] == name]
    assert shown["breakers"] is None
    config.use(config.with_variables(config.settings(), REDIS_URL=redis_url))
    until = time.monotonic() + 20
    while await cache.shared.reach() is None:
        assert time.monotonic() < until
    mine = Breakers(name)
    for _ in range(breakers.FAILURES):
        await mine.fail("offers")
    (shown,) = [p for p in (await client.get("/v1/providers"))["items"] if p["name"] == name]
    assert shown["breakers"] == {"offers": "open", "read": "closed", "act": "closed", "create": "closed"}
    await mine.succeed("offers")
