"""The conventions of every call: problem documents, request ids, what a body may be, and who is told what."""

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tests.factories import Client, World, app_named, app_of

from gpubroker import bundle, config, keys, store
from gpubroker.ids import is_id
from gpubroker.local.processes import free_port

pytestmark = pytest.mark.anyio

PUBLIC = [function.name for function in bundle.FUNCTIONS if function.kind == "public"]
MEMBERS = {"type", "title", "status", "detail", "code", "retryable", "request_id", "hint"}
OBJECT = re.compile(r"\{[a-z_]+\}")


def check_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """It is a problem document of RFC 9457 with all that API.md promises. Returns it."""
    assert answer.status_code == status, (
        f"{answer.request.method} {answer.request.url}: {answer.status_code} {answer.text}"
    )
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert set(problem) >= MEMBERS
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["type"].endswith(f"/docs/errors.md#{code}")
    assert problem["request_id"] == answer.headers["X-Request-Id"]
    assert isinstance(problem["retryable"], bool)
    assert problem["detail"]
    assert problem["hint"].endswith(".")
    assert "\n" not in problem["hint"]
    if status == 422:
        assert isinstance(problem["errors"], list)
        assert all({"pointer", "message"} <= set(error) for error in problem["errors"])
    return problem


async def operations(world: World) -> list[tuple[str, str, dict[str, Any]]]:
    """Every call of every public function, as OpenAPI tells: method, path, description."""
    found = []
    for name in PUBLIC:
        answer = await world_call(name, "GET", f"/openapi/{name}.json")
        assert answer.status_code == 200
        for path, methods in answer.json()["paths"].items():
            found += [(method.upper(), path, described | {"function": name}) for method, described in methods.items()]
    return found


async def world_call(function: str, method: str, path: str, **arguments: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app_named(function))
    async with httpx.AsyncClient(transport=transport, base_url="http://broker", timeout=30) as http:
        return await http.request(method, path, **arguments)


def is_open(described: dict[str, Any]) -> bool:
    return described.get("security") == []


# Every call of every function


async def test_every_call_that_is_not_public_asks_for_a_credential_before_all_else(world: World):
    closed = [(m, p, d) for m, p, d in await operations(world) if not is_open(d)]
    assert len(closed) >= 20
    _, stranger = keys.new_key()
    for method, path, described in closed:
        address = OBJECT.sub("x", path) + "?nonsense=1"
        for headers in ({}, {"Authorization": f"Bearer {stranger}"}, {"X-API-Key": "nonsense"}):
            answer = await world_call(described["function"], method, address, headers=headers, content=b"{nonsense")
            check_problem(answer, 401, "unauthenticated")
            assert answer.headers["WWW-Authenticate"].startswith("Bearer"), path


async def test_every_call_refuses_a_query_parameter_that_it_does_not_know(world: World):
    for method, path, described in await operations(world):
        if is_open(described) and described["function"] == "auth" and method == "POST":
            continue  # /v1/token and its kin answer as their RFCs say
        headers = {"Authorization": f"Bearer {world.root.key}"}
        answer = await world_call(described["function"], method, OBJECT.sub("x", path) + "?nonsense=1", headers=headers)
        problem = check_problem(answer, 422, "invalid")
        assert "?nonsense" in [error["pointer"] for error in problem["errors"]], path


async def test_every_call_with_a_body_refuses_what_is_no_json_and_fields_that_it_does_not_know(world: World):
    bodies = [
        (m, p, d)
        for m, p, d in await operations(world)
        if "application/json" in d.get("requestBody", {}).get("content", {})
    ]
    assert len(bodies) >= 6
    for method, path, described in bodies:

        async def send(
            content: bytes, media_type: str, method: str = method, path: str = path, name: str = described["function"]
        ) -> httpx.Response:
            headers = {"Authorization": f"Bearer {world.root.key}", "Content-Type": media_type}
            return await world_call(name, method, OBJECT.sub("x", path), headers=headers, content=content)

        check_problem(await send(b"{", "application/json"), 400, "malformed_json")
        check_problem(await send(b"{}", "text/plain"), 415, "unsupported_media_type")
        check_problem(await send(b"[]", "application/json"), 422, "invalid")
        problem = check_problem(await send(b'{"nonsense": 1}', "application/json"), 422, "invalid")
        assert "/nonsense" in [error["pointer"] for error in problem["errors"]], path


async def test_every_path_refuses_other_methods_with_allow(world: World):
    by_path: dict[tuple[str, str], set[str]] = {}
    for method, path, described in await operations(world):
        by_path.setdefault((described["function"], path), set()).add(method)
    for (function, path), methods in by_path.items():
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - methods:
            answer = await world_call(function, method, OBJECT.sub("x", path))
            check_problem(answer, 405, "method_not_allowed")
            allowed = set(answer.headers["Allow"].split(", "))
            assert allowed == methods | ({"HEAD"} if "GET" in methods else set()), path


async def test_paths_that_do_not_exist_are_404(world: World):
    odd = ("/", "/v1", "/v1/nothing", "/v2/pods", "/V1/PODS", "/v1/pods/", "/v1//pods", "/healthz/", "/v1/pods/x/y/z")
    for function, path in itertools.product(PUBLIC, (*odd, "/%00", "/v1/../x", "/é")):
        check_problem(await world_call(function, "GET", path), 404, "not_found")


async def test_every_function_answers_healthz_and_head(world: World):
    for function in bundle.FUNCTIONS:
        answer = await world_call(function.name, "GET", "/healthz")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"}), function.name
        assert (await world_call(function.name, "HEAD", "/healthz")).status_code == 200


async def test_head_is_get_without_its_body(world: World):
    headers = {"Authorization": f"Bearer {world.root.key}"}
    got, head = [await world_call("auth", method, "/v1/whoami", headers=headers) for method in ("GET", "HEAD")]
    assert head.status_code == got.status_code == 200
    assert head.headers["content-type"] == got.headers["content-type"]
    assert (await world_call("auth", "HEAD", "/v1/whoami")).status_code == 401


# Who is told what


async def test_what_is_wrong_with_a_request_is_only_told_to_who_may_make_it(world: World):
    powerless = await world.root.child(scopes=[])
    for arguments in (
        {"content": b"{", "headers": {"Content-Type": "application/json"}},
        {"json": {"nonsense": 1}},
        {"json": {}, "params": {"x": "1"}},
    ):
        check_problem(await powerless.call("POST", "/v1/pods", **arguments), 403, "forbidden")
        check_problem(await world.root.call("POST", "/v1/pods", **arguments), 400 if "content" in arguments else 422,
                      "malformed_json" if "content" in arguments else "invalid")  # fmt: skip


async def test_an_unforeseen_error_shows_nothing_and_is_logged_whole(world: World, caplog: pytest.LogCaptureFixture):
    world.query("ALTER TABLE org RENAME COLUMN plan TO secret_plan")
    answer = await world.root.call("GET", "/v1/whoami")
    problem = check_problem(answer, 500, "internal")
    assert "plan" not in answer.text
    assert problem["detail"] == problem["title"]
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert problem["request_id"] in record.getMessage()
    assert "plan" in (record.exc_text or "") or record.exc_info


# Request ids and traces


async def test_a_sane_request_id_is_the_callers_and_any_other_is_new(world: World):
    for sane in ("a", "req-1", "A.b:c/d=e+f_g", "x" * 128):
        answer = await world.root.call("GET", "/v1/whoami", headers={"X-Request-Id": sane})
        assert answer.headers["X-Request-Id"] == sane
    fresh = set()
    for odd in ("", "x" * 129, "a b", "a\tb", "<script>", "é", "a,b"):
        answer = await world.root.call("GET", "/v1/nothing", headers={"X-Request-Id": odd.encode("latin-1")})
        fresh.add(answer.headers["X-Request-Id"])
        assert answer.json()["request_id"] == answer.headers["X-Request-Id"]
    assert len(fresh) == 7
    assert all(is_id("req", request_id) for request_id in fresh)


async def test_a_trace_is_passed_on_to_the_events_that_a_request_writes(world: World):
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    body = {"image": "b", "requirements": {"gpu": ["h100"]}, "max_lifetime_seconds": 60}
    await world.root.post("/v1/pods", body, 202, headers={"traceparent": trace})
    await world.root.post("/v1/pods?duplicate=allow", body, 202)
    traces = world.query("SELECT traceparent FROM event WHERE type LIKE '%%requested%%' ORDER BY id")
    assert [row["traceparent"] for row in traces] == [trace, None]


# Bodies


async def post(world: World, content: Any, media_type: str = "application/json", **headers: str) -> httpx.Response:
    return await world.root.call("POST", "/v1/agents", content=content, headers={"Content-Type": media_type} | headers)


async def test_what_is_no_json_is_400_and_says_where(world: World):
    malformed = [
        b"", b" ", b"{", b'{"name": "n",}', b"{'name': 'n'}", b'{"name": NaN}', b'{"name": Infinity}', b'{"name": -Infinity}',
        b'{"name": "n"} {"name": "m"}', b'{"name": "n", "name": "m"}', b'{"a": {"b": 1, "b": 2}}', b'{"name": "\xff"}',
        b'{"name": 01}',
        b'{"name": 1e999999999}', b'{"name": ' + b"9" * 5000 + b"}", b'{"name": 0.' + b"1" * 60 + b"}",
        b'{"name": ' + b"[" * 33 + b"]" * 33 + b"}", b'{"name": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", b'{"name": "a\nb"}',
    ]  # fmt: skip
    for content in malformed:
        check_problem(await post(world, content), 400, "malformed_json")
    problem = check_problem(await post(world, b'{\n  "name": x}'), 400, "malformed_json")
    assert "line 2" in problem["detail"]


async def test_what_postgresql_could_not_store_is_422_and_says_where(world: World):
    for content, pointer in (
        (rb'{"name": "a\u0000b"}', "/name"), (rb'{"name": "n", "metadata": {"k": ["x", "\ud800"]}}', "/metadata/k/1"),
        (rb'{"name": "n", "metadata": {"a\u0000": 1}}', "/metadata"),
        (b'{"name": "n", "metadata": {"k": 9223372036854775809}}', "/metadata/k"),
        (b'{"name": "n", "metadata": {"a/b": {"c~d": "\\u0000"}}}', "/metadata/a~1b/c~0d"),
    ):  # fmt: skip
        problem = check_problem(await post(world, content), 422, "invalid")
        assert [error["pointer"] for error in problem["errors"]] == [pointer]
    for content in (
        b'{"name": "n", "metadata": {"k": 1e40}}',
        b'{"name": "n", "metadata": {"k": -0.0}}',
        rb'{"name": "\ud83d\ude00"}',
    ):
        assert (await post(world, content)).status_code == 201, content
    for content in (b"5", b'"x"', b"null", b"[]", b"true"):
        check_problem(await post(world, content), 422, "invalid")


async def test_only_json_is_taken_whatever_its_parameters(world: World):
    for media_type in ("application/json", "application/json; charset=utf-8", "Application/JSON"):
        assert (await post(world, b'{"name": "n"}', media_type)).status_code == 201
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", "text/json", ""):
        check_problem(await post(world, b'{"name": "n"}', media_type), 415, "unsupported_media_type")


async def test_a_body_above_one_mebibyte_is_413_however_it_is_sent(world: World):
    def body(size: int) -> bytes:
        return b'{"name": "n", "metadata": {"k": "' + b"x" * (size - 36) + b'"}}'

    assert len(body(1024 * 1024)) == 1024 * 1024
    assert (await post(world, body(1024 * 1024))).status_code == 201
    check_problem(await post(world, body(1024 * 1024 + 1)), 413, "body_too_large")

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 65536

    check_problem(await post(world, chunks()), 413, "body_too_large")


async def test_money_is_taken_as_numbers_and_strings_with_six_decimals_at_the_most(world: World):
    agent = await world.root.child(budget={"limit_usd": "50"})
    path = f"/v1/budgets/{agent.agent_id}"
    for text, shown in (
        ("5", "5.000000"), ('"5"', "5.000000"), ("2.5", "2.500000"), ('"2.50"', "2.500000"), ('"0.000001"', "0.000001"),
        ("0.000001", "0.000001"), ("1e1", "10.000000"), ("1E-6", "0.000001"), ("0", "0.000000"), ('"007"', "7.000000"),
        ("2.390000", "2.390000"), ("0.1", "0.100000"), ("33.333333", "33.333333"),
    ):  # fmt: skip
        answer = await world.root.call(
            "PUT", path, content=f'{{"limit_usd": {text}}}', headers={"Content-Type": "application/json"}
        )
        assert (answer.status_code, answer.json()["limit_usd"]) == (200, shown), text
    for text in (
        "-1", '"-1"', "1e-7", '"0.0000001"', "0.0000001", '"1.0000000"', '"1.0000000000000000000000000000000001"',
        "1.0000000000000000000000000000000001", '"1e3"', '""', '" 1"', '"1 "', '"+1"', '"1,5"', '"1_0"', '"$1"', '".5"', '"5."',
        '"\u0661"', "true",
        "null", "[]", '{"usd": 1}', '"NaN"', '"Infinity"', "1e10", '"1000000001"', '"99999999999999999999"', "1e39",
    ):  # fmt: skip
        answer = await world.root.call(
            "PUT", path, content=f'{{"limit_usd": {text}}}', headers={"Content-Type": "application/json"}
        )
        problem = check_problem(answer, 422, "invalid")
        assert problem["errors"][0]["pointer"].startswith("/limit_usd"), text


async def test_money_in_an_answer_is_always_a_string_with_six_places(world: World):
    await world.run(world.root)
    answers = [
        await world.root.get(path)
        for path in ("/v1/pods", "/v1/offers", "/v1/budgets", "/v1/usage", "/v1/whoami", "/v1/gpus")
    ]

    def look(value: Any, name: str = "") -> int:
        if isinstance(value, dict):
            return sum(look(member, key) for key, member in value.items())
        if isinstance(value, list):
            return sum(look(member, name) for member in value)
        if name.endswith(("_usd", "_usd_per_hour", "_usd_per_gpu_hour")) and value is not None:
            assert isinstance(value, str), name
            assert re.fullmatch(r"-?[0-9]+\.[0-9]{6}", value), name
            return 1
        return 0

    assert look(answers) > 20


# When things are away


async def test_without_the_database_healthz_and_calls_are_503_and_come_back(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store, "_WAIT_SECONDS", 0.2)
    before = config.settings()
    await store.close()
    config.use(config.with_variables(before, DATABASE_URL=f"postgresql://nobody@127.0.0.1:{free_port()}/none"))
    try:
        for name, path in (("auth", "/v1/whoami"), ("pods", "/v1/pods"), ("provisioning", None), ("reconcile", None)):
            health = await world_call(name, "GET", "/healthz")
            assert health.status_code == 503
            if path is not None:
                assert int(health.headers["Retry-After"]) >= 1
                assert check_problem(health, 503, "unavailable")["retryable"] is True
                check_problem(await world.root.call("GET", path), 503, "unavailable")
                check_problem(await world_call(name, "GET", path), 401, "unauthenticated")
    finally:
        await store.close()
        config.use(before)
    assert (await world_call("auth", "GET", "/healthz")).status_code == 200


async def test_a_connection_that_the_server_ended_is_no_error_of_the_next_caller(world: World):
    await world.root.get("/v1/whoami")
    world.query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    answers = [await world.root.call("GET", "/v1/whoami") for _ in range(12)]
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert answers[-1].status_code == 200


async def test_a_client_that_goes_away_leaves_nothing_half_done(world: World):
    body = json.dumps({"name": "n"}).encode()
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not sent:
            sent.append({})
            return {"type": "http.request", "body": body[:5], "more_body": True}
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/v1/agents",
        "raw_path": b"/v1/agents", "query_string": b"",
        "headers": [(b"authorization", f"Bearer {world.root.key}".encode()), (b"content-type", b"application/json")],
        "scheme": "http", "server": ("broker", 80), "client": ("127.0.0.1", 1), "root_path": "",
    }  # fmt: skip
    await asyncio.wait_for(app_of("/v1/agents")(scope, receive, send), 10)
    assert world.query("SELECT count(*) FROM agent")[0]["count"] == 1


async def test_the_manual_of_errors_and_openapi_are_public(world: World):
    for function in PUBLIC:
        described = (await world_call(function, "GET", f"/openapi/{function}.json")).json()
        assert described["openapi"].startswith("3.1")
    nobody = Client("", "")
    assert (await nobody.call("GET", "/v1/whoami", headers={"Authorization": ""})).status_code == 401
