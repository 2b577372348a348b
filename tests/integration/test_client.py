"""The client: every operation that there is, sync and async, and what it does when answers fail or do not come."""

import asyncio
import inspect
import json
import re
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from tests.dev import Running

from gpubroker.client import AsyncClient, BrokerError, Client
from gpubroker.errors import SetupError
from gpubroker.resources.pods import Pod

KEY = "gbk_a-key-that-nobody-shall-see"

pytestmark = pytest.mark.anyio


# Every operation, at a real broker


async def use_accounts(one: AsyncClient) -> None:
    me = await one.whoami()
    made = await one.create_agent({"name": "everything", "budget": {"limit_usd": "1"}})
    assert made.parent_id == me.agent.id
    assert (await one.get_agent(made.id)).name == "everything"
    assert (await one.change_agent(made.id, {"metadata": {"a": "b"}})).metadata == {"a": "b"}
    assert made.id in [agent.id async for agent in one.iterate_agents(limit=1)], "page by page"
    key = await one.create_key({"name": "second", "agent_id": made.id})
    rotated = await one.rotate_key(key.key.id)
    assert (await one.revoke_key(rotated.key.id)).revoked_at
    assert {found.name for found in (await one.list_keys(agent_id=made.id)).items} >= {"second"}

    token = await one.issue_token(made.id, made.key.key or "", scope="pods:read")
    narrower = await one.exchange_token(token.access_token, expires_in=60)
    assert (await one.introspect_token(narrower.access_token)).active
    await one.revoke_token(narrower.access_token)
    assert not (await one.introspect_token(narrower.access_token)).active
    assert (await one.read_jwks()).keys
    assert (await one.describe_server()).token_endpoint.endswith("/v1/token")
    assert (await one.set_budget(made.id, "0.5", "day")).period == "day"
    assert made.id in [budget.agent_id async for budget in one.iterate_budgets()]
    plan = (await one.show_subscription()).plan
    assert plan in [found.name async for found in one.iterate_plans(limit=1)]
    assert (await one.cancel_subscription(at_period_end=True)).state == "ending"
    assert (await one.change_subscription(plan)).state == "active"
    assert (await one.revoke_agent(made.id)).revoked_at
    assert all(found.revoked_at for found in (await one.list_keys(agent_id=made.id)).items), (
        "they died with their agent"
    )


async def use_pods(one: AsyncClient) -> None:
    offers = await one.list_offers(limit=1)
    assert (await one.get_offer(offers.items[0].id)).price_usd_per_hour > 0
    await one.list_gpus(limit=1)
    assert (await one.show_prices("H100 SXM", from_=datetime(2026, 1, 1, tzinfo=UTC), step="week")).models == [
        "H100 SXM"
    ]
    assert "local" in [provider.name async for provider in one.iterate_providers()]
    quote = await one.make_quote({"offer_id": offers.items[0].id, "duration_seconds": 60})

    program = {"command": ["sh", "-c", "echo one; sleep 600"], "labels": {"of": "everything"}}
    assert (await one.dry_run_pod(program | {"requirements": {}})).commit_usd > 0
    pod = await one.create_pod(program | {"quote_id": quote.id}, wait=30, until="running")
    assert pod.state == "running"
    assert (await one.get_pod(pod.id)).id in [found.id async for found in one.iterate_pods(label="of=everything")]
    assert (await one.extend_pod(pod.id, {"max_lifetime_seconds": 120})).expires_at > pod.expires_at
    assert (await one.execute(pod.id, ["cat"], stdin="two")).stdout == "two"
    assert await one.read_log(pod.id) == "one\n"
    assert (await one.restart_pod(pod.id, wait=30)).state == "running"
    assert (await one.stop_pod(pod.id, wait=30)).state == "stopped"
    assert [line async for line in one.follow_log(pod.id)] == ["one", "one"]
    assert (await one.start_pod(pod.id, wait=30)).state == "running"
    assert pod.id in [found.id for found in (await one.terminate_pods(label="of=everything")).items]
    await one.terminate_pod(pod.id, wait=30)
    command = {"specversion": "1.0", "id": pod.id, "source": "/test", "type": "io.gpubroker.command.terminate.v1"}
    commands = [command | {"data": {"pod_id": pod.id}}]
    assert [answer.status for answer in (await one.send_commands(commands)).items] == ["done"]
    *_, last = [seen async for seen in one.watch_pod(pod.id, gone=True)]
    assert last.state == "terminated"
    assert {event.what async for event in one.iterate_events(pod.id)} >= {"pod.running", "pod.terminated"}
    used = await one.usage(group_by="pod")
    assert used.total.seconds >= sum([record.seconds async for record in one.iterate_records(pod_id=pod.id)])
    month = f"{datetime.now(UTC):%Y-%m}"
    assert (await one.get_statement(month)).month == month
    assert (await one.read_statement_csv(month)).startswith("agent_id,")
    assert (await one.show_limits()).agent


async def test_every_public_operation_has_its_method(broker: Running) -> None:
    """Each is used once; an answer that is not what its type says raises."""
    asked: set[tuple[str, str]] = set()

    async def note(answer: httpx.Response) -> None:
        if answer.is_success:
            asked.add((answer.request.method, answer.request.url.path))

    async with AsyncClient(*broker, on_answer=note) as one, httpx.AsyncClient() as http:
        await use_accounts(one)
        await use_pods(one)
        document = (await http.get(f"{broker.url}/openapi.json")).json()
    operations = {
        (method.upper(), path): re.compile(re.sub(r"\{\w+\}", "[^/]+", path))
        for path, methods in document["paths"].items()
        for method in methods
        if method in ("get", "post", "put", "patch", "delete")
    }
    assert len(operations) > 35
    unused = [
        f"{method} {path}"
        for (method, path), pattern in operations.items()
        if not any(method == used and pattern.fullmatch(at) for used, at in asked)
    ]
    assert not unused, "these have no method of the client, or it is not used above"


def public(kind: type) -> dict[str, Callable[..., Any]]:
    found = inspect.getmembers(kind, inspect.isfunction)
    return {name: method for name, method in found if not name.startswith("_")}


async def test_the_sync_client_is_the_same_client(broker: Running) -> None:
    sync, other = public(Client), public(AsyncClient)
    assert set(sync) - {"run"} == set(other)
    for name in set(other) - {"close"}:
        assert sync[name].__doc__ == other[name].__doc__, name
    lists = {name for name in other if name.startswith("list_")}
    assert {name.replace("iterate_", "list_") for name in other if name.startswith("iterate_")} == lists

    def session() -> None:
        with Client(*broker) as one:
            pod = one.create_pod({"command": ["true"], "requirements": {}, "on_exit": "terminate"})
            *_, last = list(one.watch_pod(pod.id, gone=True))
            assert isinstance(last, Pod)
            assert last.state == "terminated"
            assert next(one.iterate_pods()).id == pod.id
            with pytest.raises(BrokerError, match="409 action_not_allowed"):
                one.start_pod(pod.id)
        with Client(*broker) as abandoned:
            next(abandoned.iterate_pods(limit=1))

    session()  # where an event loop runs already


# What fails


def write(status: int, document: object, **headers: str) -> bytes:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    kind = {"content-type": "text/html" if isinstance(document, bytes) else "application/json"} | headers
    lines = [
        f"HTTP/1.1 {status} x",
        f"content-length: {len(body)}",
        *(f"{name.replace('_', '-')}: {kind[name]}" for name in kind),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def problem(status: int, code: str, **more: str) -> bytes:
    return write(status, {"status": status, "code": code, "detail": "Words.", "hint": "What to do."}, **more)


MADE = {
    "id": "key_1", "agent_id": "agt_1", "name": "n", "start": "gbk_", "scopes": [], "created_at": "2026-11-22T00:00:00Z",
    "used_at": None, "expires_at": None, "revoked_at": None, "key": {"id": "key_1", "key": None},
}  # fmt: skip
DONE = {"exit_code": 0, "stdout": "", "stderr": "", "truncated": False, "duration_ms": 1}
LOST = b""
"""No answer: the connection is closed once the request was read."""


class Asked:
    """The requests that came, as (method, path), and their headers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.headers: list[dict[str, str]] = []


@asynccontextmanager
async def answering(*answers: bytes) -> AsyncIterator[tuple[str, Asked]]:
    """A server with these answers, one after the other, the last for ever."""
    left, asked = list(answers), Asked()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines)
                await reader.readexactly(int(headers.get("content-length", "0")))
                asked.lines.append(first.removesuffix(" HTTP/1.1"))
                asked.headers.append(headers)
                answer = left.pop(0) if len(left) > 1 else left[0]
                if answer == LOST:
                    return
                writer.write(answer)
                if b"event-stream" in answer:
                    return
        except asyncio.IncompleteReadError:
            return
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked


@asynccontextmanager
async def at(*answers: bytes) -> AsyncGenerator[tuple[AsyncClient, Asked]]:
    async with answering(*answers) as (url, asked), AsyncClient(url, KEY) as one:
        yield one, asked


async def test_a_create_whose_answer_was_lost_is_sent_again_with_its_key() -> None:
    async with at(LOST, problem(409, "idempotency_in_progress", retry_after="0"), write(201, MADE)) as (one, asked):
        assert (await one.create_key({"name": "n"})).id == "key_1"
    assert len({headers["idempotency-key"] for headers in asked.headers}) == 1
    assert len(asked.lines) == 3
    async with at(write(201, MADE)) as (one, asked):
        await one.create_key({}, idempotency_key="mine")
    assert asked.headers[0]["idempotency-key"] == "mine"


async def test_an_action_whose_answer_was_lost_is_not_sent_again_and_says_so() -> None:
    async with at(LOST, write(200, DONE)) as (one, asked):
        with pytest.raises(BrokerError) as raised:
            await one.execute("pod_1", ["true"])
    assert (raised.value.status, raised.value.code, len(asked.lines)) == (0, "no_answer", 1)
    assert "look before" in raised.value.hint


async def test_what_was_not_done_is_sent_again_whatever_it_is() -> None:
    refusals = (problem(429, "rate_limited", retry_after="0"), problem(503, "unavailable", retry_after="0"))
    async with at(*refusals, write(200, DONE)) as (one, asked):
        await one.execute("pod_1", ["true"])
    assert asked.lines == ["POST /v1/exec/pod_1"] * 3


async def test_a_read_is_tried_four_times_and_a_long_wait_is_told_instead() -> None:
    async with at(problem(503, "unavailable")) as (one, asked):
        with pytest.raises(BrokerError, match="503 unavailable: Words"):
            await one.get_pod("pod_1")
    assert len(asked.lines) == 4
    async with at(problem(429, "rate_limited", retry_after="3600")) as (one, asked):
        with pytest.raises(BrokerError) as raised:
            await one.get_pod("pod_1")
    assert (raised.value.retry_after, len(asked.lines)) == (3600, 1)


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 409, 422])
async def test_a_refusal_is_final(status: int) -> None:
    async with at(problem(status, "some_code")) as (one, asked):
        with pytest.raises(BrokerError) as raised:
            await one.create_pod({})
    error = raised.value
    assert (error.status, error.code, error.detail, error.hint, len(asked.lines)) == (
        status, "some_code", "Words.", "What to do.", 1,
    )  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [
        write(200, b"<html>"), write(200, {"id": 1}), write(200, [1]), write(502, b"<html>bad gateway"), write(404, b"<html>"),
        write(302, b"", location="https://login.example.org/"),
    ],
)  # fmt: skip
async def test_another_server_is_told_from_the_broker(answer: bytes) -> None:
    async with at(answer) as (one, _):
        with pytest.raises(BrokerError) as raised:
            await one.terminate_pod("pod_1") if b" 502 " not in answer else await one.restart_pod("pod_1")
    assert raised.value.code == "not_the_broker"
    assert "GPUBROKER_URL" in raised.value.hint


async def test_nobody_there_is_tried_and_told() -> None:
    async with answering(LOST) as (url, _):
        pass
    async with AsyncClient(url, KEY) as one:
        with pytest.raises(BrokerError) as raised:
            await one.restart_pod("pod_1")
    assert (raised.value.code, raised.value.nothing_done) == ("unreachable", True)


def stream(*lines: str) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    return head + "".join(f"{line}\n" for line in lines).encode()


async def test_a_log_that_breaks_off_goes_on_where_it_was() -> None:
    first = stream("id: 4", "data: one", "", ": heartbeat", "", "id: 8", "data: two", "", "data: cut off")
    async with at(
        first, LOST, stream("id: 12", "data: three", "data: of two lines", "", "event: end", "data:", "")
    ) as (one, asked):
        lines = [line async for line in one.follow_log("pod_1", tail=5)]
    assert lines == ["one", "two", "three\nof two lines"]
    assert [headers.get("last-event-id") for headers in asked.headers] == [None, "8", "8"]
    assert asked.lines[0] == "GET /v1/logs/pod_1?follow=true&tail=5"


async def test_the_key_is_shown_nowhere() -> None:
    async with at(problem(401, "unauthenticated")) as (one, asked):
        with pytest.raises(BrokerError) as raised:
            await one.whoami()
        told = "".join(traceback.TracebackException.from_exception(raised.value, capture_locals=True).format())
    assert KEY not in told + repr(one) + str(raised.value.problem)
    assert asked.headers[0]["authorization"] == f"bearer {KEY}"


@pytest.mark.parametrize(
    ("url", "key", "told"),
    [
        ("", "k", "GPUBROKER_URL"), ("http://x", "", "GPUBROKER_API_KEY"), ("ftp://x", "k", "no address"),
        ("x:80", "k", "no address"),
        ("http://u:p@x", "k", "no address"), ("http://x?a=1", "k", "no address"), ("http://x", "a b", "characters"),
        ("http://x", "ä", "characters"),
    ],
)  # fmt: skip
async def test_an_address_or_a_key_that_cannot_be_is_told_at_once(url: str, key: str, told: str) -> None:
    with pytest.raises(SetupError, match=told):
        AsyncClient(url, key)


async def test_a_host_for_each_function() -> None:
    async with answering(write(200, DONE)) as (url, asked), AsyncClient(f"{url}/{{function}}", KEY) as one:
        await one.execute("pod_1/../..", ["true"])
    assert asked.lines == ["POST /exec/v1/exec/pod_1%2F..%2F.."]
