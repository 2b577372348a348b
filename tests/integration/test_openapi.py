"""The merged document against the broker: schemathesis makes requests of it, by its rules and against them.

The default run is a sample, the same each time. By hand, for about so many requests, other ones each time:

    GPUBROKER_TEST_CASES=100000 pytest --log-cli-level=INFO tests/integration/test_openapi.py

It tells how many it made, and a failure the seed; GPUBROKER_TEST_SEED repeats it.
"""

import asyncio
import itertools
import logging
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import httpx
import hypothesis
import pytest
import requests
import schemathesis
import uvicorn
from schemathesis.core.failures import FailureGroup
from schemathesis.generation.hypothesis.builder import HypothesisTestConfig, HypothesisTestMode, create_test
from tests.factories import Client, World, app_named

from gpubroker import bundle
from gpubroker.local.gateway import Gateway

pytestmark = pytest.mark.anyio
log = logging.getLogger("tests.openapi")

CASES = int(os.environ.get("GPUBROKER_TEST_CASES", "0"))
SEED = int(os.environ.get("GPUBROKER_TEST_SEED", str(random.randrange(10**9) if CASES else 1)))
REFUSED = ["400", "401", "403", "404", "405", "409", "413", "415", "422"]
RIGHTS = ["offers:read", "pods:read", "pods:write", "pods:exec", "usage:read", "budgets:write", "agents:write"]


class _Server(uvicorn.Server):
    def capture_signals(self) -> Any:
        return nullcontext()


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    """One host in front of all functions, on a socket."""
    gateway = Gateway({name: app_named(name) for name in bundle.BY_NAME})
    server = _Server(
        uvicorn.Config(gateway, port=0, log_config=None, lifespan="off", http="httptools", access_log=False)
    )
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


async def things(world: World, child: Client) -> dict[str, list[str]]:
    """What there is of the child, by the path that names it, so that requests are about something."""
    below = [await child.child(name=f"below {n}") for n in range(3)]
    pods = [(await world.run(child, command=["sleep", "1"]))["id"] for _ in range(2)]
    keys = (await child.get("/v1/keys?limit=200"))["items"]
    return {
        "/v1/agents": [agent.agent_id for agent in below],
        "/v1/keys": [key["id"] for key in keys if key["agent_id"] != child.agent_id],  # not its own: it needs that
        "/v1/offers": [row["id"] for row in world.query("SELECT id FROM offer")],
        "/v1/pods": pods,
        "/v1/logs": pods,
        "/v1/exec": pods,
        "/v1/budgets": [agent.agent_id for agent in below],
        "/v1/statements": ["2026-11", "2031-01"],
    }


class Player:
    """Makes the requests of a document, and collects what its answers should not have been."""

    def __init__(
        self, url: str, document: dict[str, Any], key: str | None, real: dict[str, list[str]], every: int
    ) -> None:
        self.url = url
        self.every = every
        """Of schemathesis' systematic cases, which are some 2,800, every so many-th is made; 0: none."""
        self.session = requests.Session()
        self.session.trust_env = False
        if key is not None:
            self.session.headers["Authorization"] = f"Bearer {key}"
        self.real = {path: itertools.cycle(ids) for path, ids in real.items()}
        self.statuses: Counter[int] = Counter()
        self.failures: dict[tuple[str, str], str] = {}
        checks = {
            "negative_data_rejection": {"expected-statuses": REFUSED},
            "positive_data_acceptance": {"enabled": False},  # rules between fields stand in no schema
        }
        self.schema = schemathesis.openapi.from_dict(document, config=schemathesis.Config.from_dict({"checks": checks}))
        self.schema.config.update(base_url=url)

    def play(self, examples: int) -> None:
        modes = [HypothesisTestMode.EXAMPLES, HypothesisTestMode.FUZZING]
        modes += [HypothesisTestMode.COVERAGE] if self.every else []
        settings = hypothesis.settings(
            max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        for result in self.schema.get_all_operations():
            operation = result.ok()
            create_test(
                operation=operation,
                test_func=self._caller(operation),
                config=HypothesisTestConfig(project=self.schema.config, modes=modes, settings=settings, seed=SEED),
            )()

    def _caller(self, operation: Any) -> Callable[[Any], None]:
        count = itertools.count()

        def call(case: Any) -> None:
            if case.meta.phase.name.value == "coverage" and next(count) % self.every:
                return
            self._aim(case)
            response = case.call(session=self.session, base_url=self.url)
            self.statuses[response.status_code] += 1
            try:
                case.validate_response(response)
            except FailureGroup as failed:
                for failure in failed.exceptions:
                    said = f"{failure}\n{case.as_curl_command()}\n{response.text}"[:1500]
                    self.failures.setdefault((operation.label, type(failure).__name__), said)

        return call

    def _aim(self, case: Any) -> None:
        """Let a request that is by the rules be about something that there is, and wait for nothing."""
        if not case.meta.generation.mode.is_positive:
            return
        ids = self.real.get("/".join(case.path.split("/")[:3]))
        if ids is not None and case.path_parameters:
            case.path_parameters = dict.fromkeys(case.path_parameters, next(ids))
        for name in ("wait", "follow"):
            if case.query:
                case.query.pop(name, None)


@pytest.mark.parametrize(("who", "every", "least"), [("a child", 10, 3), ("nobody", 0, 2)])
async def test_every_answer_is_one_that_the_document_names(world: World, who: str, every: int, least: int) -> None:
    child = await world.root.child(scopes=RIGHTS, budget={"limit_usd": "50"})
    real = await things(world, child)
    async with serving() as url:
        async with httpx.AsyncClient(timeout=60) as http:
            document = (await http.get(f"{url}/openapi.json")).json()
        operations = sum(len(methods) for methods in document["paths"].values())
        player = Player(url, document, child.key if who == "a child" else None, real, 1 if CASES else every)
        await asyncio.to_thread(player.play, max(least, CASES // (2 * operations)))
        player.session.close()
    log.info("%s: %d requests, seed %d: %s", who, player.statuses.total(), SEED, dict(player.statuses))
    assert not player.failures, f"seed {SEED}\n" + "\n\n".join(f"{k}: {v}" for k, v in player.failures.items())[:3000]
    assert not any(status >= 500 for status in player.statuses)
    assert player.statuses.total() >= 2 * operations
