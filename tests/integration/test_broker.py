"""The local broker and its clock, over real HTTP: retries, dead letters, replies, limits."""

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import yaml
from starlette.requests import Request
from starlette.responses import Response

from gpubroker.local import triggers
from gpubroker.local.broker import HOPS, Broker
from gpubroker.local.schedule import Schedule
from gpubroker.local.triggers import Destination, PingSource

EVENT = {
    "ce-specversion": "1.0",
    "ce-id": "evt_1",
    "ce-type": "a",
    "ce-source": "/s",
    "content-type": "application/json",
}
Answers = Callable[[int], Response | Awaitable[Response]]


@dataclass
class Service:
    """A subscriber: remembers what came; `answer` is asked with the number of the request."""

    answer: Answers = lambda _: Response(status_code=204)
    came: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    busy: int = 0
    most_busy: int = 0

    async def __call__(self, request: Request) -> Response:
        self.came.append((dict(request.headers), await request.body()))
        self.busy += 1
        self.most_busy = max(self.busy, self.most_busy)
        try:
            answer = self.answer(len(self.came))
            return answer if isinstance(answer, Response) else await answer
        finally:
            self.busy -= 1

    def ids(self) -> list[str]:
        return [headers["ce-id"] for headers, _ in self.came]


class _Quiet(uvicorn.Server):
    def capture_signals(self) -> Any:
        import contextlib

        return contextlib.nullcontext()


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    server = _Quiet(uvicorn.Config(app, port=0, log_config=None, lifespan="off", http="httptools"))
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        task.cancel()  # without uvicorn's own pauses of a tenth of a second
        for listener in server.servers:
            listener.close()
        for connection in list(server.server_state.connections):
            connection.transport.close()


@dataclass
class World:
    """A broker with its Services on real sockets."""

    broker: Broker
    url: str
    services: dict[str, Service]
    client: httpx.AsyncClient

    async def send(self, *, body: bytes = b"{}", **headers: str) -> httpx.Response:
        changed = {f"ce-{name}": value for name, value in headers.items()}
        return await self.client.post(self.url, headers={**EVENT, **changed}, content=body)

    async def settle(self) -> None:
        async with asyncio.timeout(10):
            await self.broker.settle()


@asynccontextmanager
async def world(
    folder: Path, spec: dict[str, dict[str, Any]], services: dict[str, Service], **limits: int
) -> AsyncIterator[World]:
    """`spec` are Triggers by name, of a Broker that retries 3 times, at once, and buries in `deadletter`."""
    sink = {"ref": {"kind": "Service", "name": "deadletter"}}
    documents: list[dict[str, Any]] = [
        {"kind": "Broker", "metadata": {"name": "default"}, "spec": {"delivery": {"retry": 3, "deadLetterSink": sink}}}
    ]
    for name, more in spec.items():
        subscriber = {"ref": {"kind": "Service", "name": name}}
        documents.append(
            {
                "kind": "Trigger",
                "metadata": {"name": name},
                "spec": {"broker": "default", "subscriber": subscriber, **more},
            }
        )
    (folder / "eventing.yaml").write_text(yaml.safe_dump_all(documents))
    services.setdefault("deadletter", Service())

    async def route(scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        name = request.url.path.removeprefix("/")
        response = await services[name](request)
        await response(scope, receive, send)

    async with serving(route) as base:
        broker = Broker(
            triggers.read(folder).triggers, lambda to: to.uri or f"{base}/{to.service}", url="http://broker", **limits
        )
        try:
            async with serving(broker) as url, httpx.AsyncClient(trust_env=False) as client:
                yield World(broker, f"{url}/broker", services, client)
        finally:
            await broker.close()


Scenario = Callable[[Path], Coroutine[Any, Any, None]]


def play(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await scenario

    asyncio.run(limited())


def test_an_event_arrives_in_binary_mode_whatever_mode_it_came_in(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, {"it": {}}, {"it": Service()}) as w:
            answer = await w.client.post(
                w.url, headers={**EVENT, "ce-subject": "p%C3%B6d", "ce-tenant": "org_1", "traceparent": "00-1-2-01"},
                content=b'{"x": 1}',
            )  # fmt: skip
            assert (answer.status_code, answer.content) == (202, b"")
            structured = {
                "specversion": "1.0",
                "id": "evt_2",
                "type": "a",
                "source": "/s",
                "subject": "pöd",
                "data": {"x": 1},
            }
            answer = await w.client.post(
                w.url, headers={"content-type": "application/cloudevents+json"}, content=json.dumps(structured)
            )
            assert answer.status_code == 202
            await w.settle()
            first, second = sorted(w.services["it"].came, key=lambda came: came[0]["ce-id"])
            for headers, body in (first, second):
                assert headers["ce-specversion"] == "1.0"
                assert headers["ce-subject"] == "p%C3%B6d"
                assert headers["content-type"] == "application/json"
                assert headers["prefer"] == "reply"
                assert "ce-knativearrivaltime" in headers
                assert "ce-knativebrokerttl" not in headers
                assert json.loads(body) == {"x": 1}
            assert first[0]["ce-tenant"] == "org_1"
            assert first[0]["traceparent"] == "00-1-2-01"

    play(scenario())


def test_what_is_no_event_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, {"it": {}}, {"it": Service()}) as w:
            for name in ("specversion", "id", "type", "source"):
                assert (await w.send(**{name: ""})).status_code == 400
            assert (await w.client.post(w.url, content=b"{}")).status_code == 400
            batch = {"content-type": "application/cloudevents-batch+json"}
            refused = await w.client.post(w.url, headers=batch, content=b"[]")
            assert refused.status_code == 400
            assert "one event" in refused.text
            assert (await w.client.get(w.url)).status_code == 405
            assert (await w.send(body=b"x" * (1024 * 1024 + 1))).status_code == 413
            assert (await w.send(knativebrokerttl="1")).status_code == 400
            await w.settle()
            assert w.services["it"].came == []

    play(scenario())


def test_only_triggers_that_it_passes_and_all_of_them_at_once(tmp_path: Path) -> None:
    async def slow(_: int) -> Response:
        await asyncio.sleep(0.3)
        return Response(status_code=204)

    async def scenario() -> None:
        spec = {
            "one": {},
            "two": {"filters": [{"exact": {"type": "a"}}]},
            "other": {"filters": [{"exact": {"type": "b"}}]},
        }
        services = {"one": Service(slow), "two": Service(slow), "other": Service()}
        async with world(tmp_path, spec, services) as w:
            began = time.monotonic()
            assert (await w.send()).status_code == 202
            assert time.monotonic() - began < 0.25, "the answer waits for no delivery"
            for number in range(9):
                await w.send(id=f"more_{number}")
            await w.settle()
            assert time.monotonic() - began < 1.5, "deliveries wait for no others"
            assert len(services["one"].came) == len(services["two"].came) == 10
            assert services["one"].most_busy > 1
            assert services["other"].came == []

    play(scenario())


@pytest.mark.parametrize("status", [404, 408, 409, 429, 500, 502, 503, 504])
def test_passing_failures_are_retried(tmp_path: Path, status: int) -> None:
    async def scenario() -> None:
        services = {"it": Service(lambda n: Response(status_code=status if n <= 3 else 204))}
        async with world(tmp_path, {"it": {}}, services) as w:
            await w.send()
            await w.settle()
            assert w.services["it"].ids() == ["evt_1"] * 4
            assert w.services["deadletter"].came == []

    play(scenario())


@pytest.mark.parametrize("status", [301, 307, 400, 401, 403, 405, 410, 413, 422])
def test_final_failures_go_straight_to_the_dead_letter_sink(tmp_path: Path, status: int) -> None:
    async def scenario() -> None:
        headers = {"location": "/deadletter"} if status < 400 else {}
        services = {"it": Service(lambda _: Response(b"why it failed", status_code=status, headers=headers))}
        async with world(tmp_path, {"it": {}}, services) as w:
            await w.send(body=b'{"x":1}', subject="pod_1")
            await w.settle()
            assert len(w.services["it"].came) == 1
            ((marked, body),) = w.services["deadletter"].came
            assert marked["ce-id"] == "evt_1"
            assert marked["ce-subject"] == "pod_1"
            assert body == b'{"x":1}'
            assert marked["ce-knativeerrorcode"] == str(status)
            assert marked["ce-knativeerrordest"].endswith("/it")
            assert base64.b64decode(marked["ce-knativeerrordata"]) == b"why it failed"

    play(scenario())


def test_after_the_last_retry_comes_the_dead_letter_with_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        services = {"it": Service(lambda _: Response(b"e" * 5000, status_code=503))}
        async with world(tmp_path, {"it": {}}, services) as w:
            await w.send()
            await w.settle()
            assert len(services["it"].came) == 4
            ((marked, _),) = w.services["deadletter"].came
            assert marked["ce-knativeerrorcode"] == "503"
            assert len(marked["ce-knativeerrordata"]) == 1024

    with caplog.at_level(logging.WARNING, "gpubroker.local.broker"):
        play(scenario())
    (record,) = caplog.records
    assert "dead letter: a evt_1 for it: 503" in record.getMessage()


def test_nobody_there_is_a_failure_like_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        nowhere = {"subscriber": {"uri": "http://127.0.0.1:9"}}
        async with world(tmp_path, {"it": nowhere}, {}) as w:
            await w.send()
            await w.settle()
            ((marked, _),) = w.services["deadletter"].came
            assert marked["ce-knativeerrorcode"] == "500"
            assert b"dispatch error" in base64.b64decode(marked["ce-knativeerrordata"])

    play(scenario())


def test_the_dead_letter_sink_is_tried_as_often(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        services = {
            "it": Service(lambda _: Response(status_code=422)),
            "deadletter": Service(lambda n: Response(status_code=500 if n <= 2 else 204)),
        }
        async with world(tmp_path, {"it": {}}, services) as w:
            await w.send()
            await w.settle()
            assert len(services["deadletter"].came) == 3
            services["deadletter"].answer = lambda _: Response(status_code=422)
            await w.send(id="evt_2")
            await w.settle()

    play(scenario())
    assert "lost: a evt_2 for it" in caplog.text
    assert "lost: a evt_1" not in caplog.text


def test_retries_wait_as_the_policy_says(tmp_path: Path) -> None:
    async def scenario() -> None:
        delivery = {"delivery": {"retry": 2, "backoffPolicy": "exponential", "backoffDelay": "PT0.1S"}}
        async with world(tmp_path, {"it": delivery}, {"it": Service(lambda _: Response(status_code=500))}) as w:
            began = time.monotonic()
            await w.send()
            await w.settle()
            assert 0.3 <= time.monotonic() - began < 1, "0.1 s, then 0.2 s"

    play(scenario())


def test_an_answer_that_takes_too_long_is_a_failure(tmp_path: Path) -> None:
    async def answer(number: int) -> Response:
        await asyncio.sleep(0 if number > 1 else 5)
        return Response(status_code=204)

    async def scenario() -> None:
        delivery = {"delivery": {"retry": 1, "timeout": "PT0.2S"}}
        async with world(tmp_path, {"it": delivery}, {"it": Service(answer)}) as w:
            await w.send()
            await w.settle()
            assert len(w.services["it"].came) == 2
            assert w.services["deadletter"].came == []

    play(scenario())


RUBBISH = {
    "text": (Response("OK"), 4),
    "json": (Response(b"{}", media_type="application/json"), 4),
    "an event without an id": (Response(headers={"ce-specversion": "1.0", "ce-type": "b", "ce-source": "/s"}), 4),
    "no JSON": (Response(b"x", headers={"content-type": "application/cloudevents+json"}), 4),
    "a huge answer": (Response(b"x" * (1024 * 1024 + 1)), 4),
    "nothing": (Response(status_code=200), 1),
    "no content": (Response(status_code=204), 1),
    "accepted": (Response(status_code=202), 1),
}


@pytest.mark.parametrize(("response", "times"), RUBBISH.values(), ids=RUBBISH.keys())
def test_a_good_answer_is_empty_or_an_event(tmp_path: Path, response: Response, times: int) -> None:
    async def scenario() -> None:
        async with world(tmp_path, {"it": {}}, {"it": Service(lambda _: response)}) as w:
            await w.send()
            await w.settle()
            assert len(w.services["it"].came) == times
            codes = [headers["ce-knativeerrorcode"] for headers, _ in w.services["deadletter"].came]
            assert codes == (["502"] if times > 1 else [])

    play(scenario())


def test_a_reply_is_a_new_event(tmp_path: Path) -> None:
    binary = Response(b'{"n":1}', headers={**EVENT, "ce-id": "reply_1", "ce-type": "b"})
    structured = Response(
        json.dumps({"specversion": "1.0", "id": "reply_2", "type": "b", "source": "/r", "data": {"n": 2}}),
        headers={"content-type": "application/cloudevents+json"},
    )

    async def scenario() -> None:
        spec = {"asks": {"filters": [{"exact": {"type": "a"}}]}, "hears": {"filters": [{"exact": {"type": "b"}}]}}
        services = {"asks": Service(lambda n: binary if n == 1 else structured), "hears": Service()}
        async with world(tmp_path, spec, services) as w:
            for number in (1, 2):
                await w.send(id=f"evt_{number}")
                await w.settle()
            assert services["hears"].ids() == ["reply_1", "reply_2"]
            assert [json.loads(body) for _, body in services["hears"].came] == [{"n": 1}, {"n": 2}]
            assert len(services["asks"].came) == 2

    play(scenario())


@pytest.mark.parametrize(("ttl", "rounds"), [("6", 5), (None, HOPS)])
def test_a_loop_of_replies_ends(tmp_path: Path, ttl: str | None, rounds: int) -> None:
    def echo(number: int) -> Response:
        return Response(headers={**EVENT, "ce-id": f"echo_{number}"})

    async def scenario() -> None:
        async with world(tmp_path, {"it": {}}, {"it": Service(echo)}) as w:
            await w.send(**({"knativebrokerttl": ttl} if ttl else {}))
            await w.settle()
            assert len(w.services["it"].came) == rounds
            ((marked, _),) = w.services["deadletter"].came
            assert marked["ce-knativeerrorcode"] == "400"
            assert marked["ce-knativeerrordest"] == "http://broker"
            assert b"too many hops" in base64.b64decode(marked["ce-knativeerrordata"])

    play(scenario())


def test_what_is_in_flight_is_bounded(tmp_path: Path) -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def wait(_: int) -> Response:
            await gate.wait()
            return Response(status_code=204)

        async with world(tmp_path, {"it": {}}, {"it": Service(wait)}, most_events=3) as w:
            codes = [(await w.send(id=str(number))).status_code for number in range(5)]
            assert codes == [202, 202, 202, 429, 429]
            gate.set()
            await w.settle()
            assert (await w.send()).status_code == 202
            await w.settle()
            assert len(w.services["it"].came) == 4

        gate.clear()
        async with world(tmp_path, {"it": {}}, {"it": Service(wait)}, most_bytes=100_000) as w:
            assert (await w.send(body=b"x" * 60_000)).status_code == 202
            assert (await w.send(body=b"x" * 60_000)).status_code == 429
            assert (await w.send(body=b"x" * 10_000)).status_code == 202
            gate.set()
            await w.settle()
            assert (await w.send(body=b"x" * 60_000)).status_code == 202
            await w.settle()

    play(scenario())


def test_many_events_from_many_publishers(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, {"one": {}, "two": {}}, {"one": Service(), "two": Service()}) as w:

            async def publish(first: int) -> list[int]:
                return [(await w.send(id=str(number))).status_code for number in range(first, 100, 10)]

            answers = await asyncio.gather(*(publish(first) for first in range(10)))
            assert {status for statuses in answers for status in statuses} == {202}
            await w.settle()
            for name in ("one", "two"):
                assert sorted(w.services[name].ids(), key=int) == [str(number) for number in range(100)]

    play(scenario())


def test_closing_drops_what_is_in_flight(tmp_path: Path) -> None:
    async def scenario() -> None:
        delivery = {"delivery": {"retry": 9, "backoffPolicy": "linear", "backoffDelay": "PT100S"}}
        async with world(tmp_path, {"it": delivery}, {"it": Service(lambda _: Response(status_code=500))}) as w:
            await w.send()
            while len(w.services["it"].came) < 2:  # noqa: ASYNC110 - short
                await asyncio.sleep(0.01)
            began = time.monotonic()
            await w.broker.close()
            assert time.monotonic() - began < 1

    play(scenario())


# PingSources


@asynccontextmanager
async def clock(service: Service, *, every: float | None, cron: str = "* * * * *") -> AsyncIterator[Schedule]:
    async def route(scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        await (await service(request))(scope, receive, send)

    async with serving(route) as base:
        source = PingSource("reconcile", "default", cron, "UTC", Destination("reconcile"))
        schedule = Schedule([source], lambda to: f"{base}/{to.service}", every=every)
        try:
            yield schedule
        finally:
            await schedule.close()


def test_the_clock_ticks_without_waiting_for_the_tick_before(tmp_path: Path) -> None:
    async def slow(_: int) -> Response:
        await asyncio.sleep(0.5)
        return Response(status_code=204)

    async def scenario() -> None:
        service = Service(slow)
        async with clock(service, every=0.1) as schedule:
            schedule.start()
            await asyncio.sleep(0.75)
        assert 4 <= len(service.came) <= 8
        assert service.most_busy >= 3
        assert {headers["ce-type"] for headers, _ in service.came} == {"dev.knative.sources.ping"}
        assert len(set(service.ids())) == len(service.came)

    play(scenario())


def test_a_cron_line_with_seconds_ticks_once_a_second() -> None:
    async def scenario() -> None:
        service = Service()
        async with clock(service, every=None, cron="* * * * * *") as schedule:
            schedule.start()
            await asyncio.sleep(2.2)
        assert 2 <= len(service.came) <= 3

    play(scenario())


def test_a_tick_that_fails_is_logged_and_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        service = Service(lambda n: Response(status_code=503 if n == 1 else 204))
        async with clock(service, every=0.05) as schedule:
            assert await schedule.tick(5) == ["reconcile"]
            assert await schedule.tick(5) == []
            schedule.start()
            while len(service.came) < 4:  # noqa: ASYNC110 - short
                await asyncio.sleep(0.01)
        nowhere = PingSource("gone", "default", "* * * * *", "UTC", Destination("gone"))
        schedule = Schedule([nowhere], lambda _: "http://127.0.0.1:9")
        assert await schedule.tick(5) == ["gone"]
        await schedule.close()

    with caplog.at_level(logging.WARNING, "gpubroker.local.schedule"):
        play(scenario())
    assert "tick of reconcile was not taken: 503" in caplog.text
    assert "tick of gone was not taken" in caplog.text


def test_a_first_tick_that_takes_too_long_goes_on() -> None:
    async def slow(_: int) -> Response:
        await asyncio.sleep(0.3)
        return Response(status_code=204)

    async def scenario() -> None:
        service = Service(slow)
        async with clock(service, every=60) as schedule:
            assert await schedule.tick(0.1) == ["reconcile"]
            while service.busy:  # noqa: ASYNC110 - short
                await asyncio.sleep(0.01)

    play(scenario())
