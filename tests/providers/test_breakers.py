"""Breakers and buckets over a real Redis, and without one."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator

import pytest
from tests.factories import World

from gpubroker import cache, config
from gpubroker.errors import Throttled
from gpubroker.providers.http import breakers
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
    await one.take("launch", 0)
    await other.take("launch", 0)
    for buckets in (one, other):
        with pytest.raises(Throttled) as throttled:
            await buckets.take("launch", 5)
        assert 10 < throttled.value.wait <= 12


async def test_who_has_patience_gets_the_next_turn(shared: str) -> None:
    buckets = Buckets(shared, {"calls": Limit(interval_seconds=0.1)})
    loop = asyncio.get_running_loop()
    await buckets.take("calls", 0)
    began = loop.time()
    await asyncio.gather(buckets.take("calls", 2), buckets.take("calls", 2))
    assert loop.time() - began >= 0.15


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
        await buckets.take("calls", 0)
        with pytest.raises(Throttled):
            await buckets.take("calls", 1)
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
