"""Rate limits: per organisation and second, shared through Redis, and per process while it is away."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.factories import Client, World
from tests.integration.test_web import check_problem

from gpubroker import accounts, cache, config, errors, rates
from gpubroker.local.servers import Valkey

pytestmark = pytest.mark.anyio


@pytest.fixture
async def shared(world: World, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """The world with Redis, which is connected to at once."""
    monkeypatch.setattr(cache, "_AFTER_FIRST_ANSWER_SECONDS", 0)
    monkeypatch.setattr(cache, "_RETRY_SECONDS", 0.05)
    before = config.settings()
    config.use(config.with_variables(before, REDIS_URL=redis_url))
    yield world
    await rates.limiter.close()
    config.use(before)


async def connected() -> bool:
    """Whether Redis is reached within 5 seconds."""
    until = time.monotonic() + 5
    while await cache.shared.reach() is None and time.monotonic() < until:  # noqa: ASYNC110 - each look tries to connect
        await asyncio.sleep(0.02)
    return cache.shared.at_hand() is not None


async def exhaust(*limiters: rates.Limiter, org_id: str, plan: str) -> int:
    """How many requests of one second are let through in all."""
    taken, spent = 0, set[int]()
    while len(spent) < len(limiters):
        for place, limiter in enumerate(limiters):
            try:
                await limiter.take(org_id, plan)
                taken += 1
            except errors.RateLimited:
                spent.add(place)
    return taken


async def in_one_second(*limiters: rates.Limiter, plan: str) -> int:
    """The same, begun anew while a second passed over it."""
    for attempt in range(50):
        began = int(time.time())
        taken = await exhaust(*limiters, org_id=f"org_{time.monotonic_ns()}_{attempt}", plan=plan)
        if int(time.time()) == began:
            return taken
    raise AssertionError("this machine takes more than a second for a second's requests")


async def test_processes_share_one_limit_through_redis(shared: World):
    first, second = rates.Limiter(), rates.Limiter()
    assert await connected()
    for plan, limit in (("free", 10), ("pro", 100)):
        assert await in_one_second(first, second, plan=plan) == limit
    assert (
        await first.take("org_told", "pro")
    ).remaining == 99  # of the organisation, not of what this process took at once


async def test_without_redis_each_process_has_the_limit(world: World):
    for plan, limit in rates.PER_SECOND.items():
        assert await in_one_second(rates.Limiter(), plan=plan) == limit
    assert await in_one_second(rates.Limiter(), rates.Limiter(), plan="free") == 20


@pytest.mark.parametrize("how", ["dies", "hangs"])
async def test_requests_go_on_while_redis_is_away_and_one_line_says_so(
    shared: World, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "gpubroker.cache")

    def lines(word: str) -> int:
        return sum(word in record.getMessage() for record in caplog.records)

    with Valkey(tmp_path / "valkey") as server:
        config.use(config.with_variables(config.settings(), REDIS_URL=server.url))
        await shared.root.get("/v1/whoami")
        assert await connected()
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP if how == "hangs" else signal.SIGKILL)
        began = int(time.time())
        racing = [rates.limiter.take("org_racing", "free") for _ in range(50)]
        taken = sum(not isinstance(rate, Exception) for rate in await asyncio.gather(*racing, return_exceptions=True))
        assert 0 < taken <= 10 * (int(time.time()) - began + 1)
        assert lines("Redis is away") == 1
        answers = [await shared.root.call("GET", "/v1/whoami") for _ in range(5)]
        assert {answer.status_code for answer in answers} == {200}
        assert all("RateLimit" in answer.headers for answer in answers)
        assert await in_one_second(rates.limiter, plan="free") == 10
        assert lines("Redis is away") == 1
        if how == "hangs":
            os.kill(pid, signal.SIGCONT)
            assert await connected()
            assert (lines("Redis is away"), lines("Redis is back")) == (1, 1)


async def test_above_the_limit_it_is_429_with_retry_after_for_keys_and_tokens_alike(shared: World):
    made = accounts.bootstrap(shared.database_url, "small", 10**6, "total", "free", new_key=False)
    client = Client(made.key.key or "", made.agent_id)
    form = {"grant_type": "client_credentials", "client_id": client.agent_id, "client_secret": client.key}

    async def until_refused(method: str, path: str, **arguments: object) -> None:
        for _ in range(20):
            answers = await asyncio.gather(*(client.call(method, path, **arguments) for _ in range(25)))
            refused = [answer for answer in answers if answer.status_code == 429]
            for answer in answers:
                assert answer.headers["RateLimit-Policy"] == '"plan";q=10;w=1'
            if refused:
                problem = check_problem(refused[0], 429, "rate_limited")
                assert (problem["retryable"], refused[0].headers["Retry-After"]) == (True, "1")
                assert refused[0].headers["RateLimit"] == '"plan";r=0;t=1'
                return
        raise AssertionError(f"{method} {path} is never refused")

    await until_refused("GET", "/v1/whoami")
    await until_refused("GET", "/v1/offers")
    await until_refused("POST", "/v1/token", data=form, headers={"Authorization": ""})
    await until_refused("POST", "/v1/introspect", data={"token": client.key})
    answer = await shared.root.call("GET", "/v1/whoami")
    assert (answer.status_code, answer.headers["RateLimit-Policy"]) == (200, '"plan";q=1000;w=1')
