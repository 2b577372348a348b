"""What holds for many calls at once: waiting by header, traces, formats, suggestions, the next call, one host for all."""

from datetime import timedelta
from typing import Any

import httpx
import pytest
from tests.factories import Client, World, app_named, app_of
from tests.integration.test_web import check_problem

from gpubroker import bundle
from gpubroker.local.gateway import Gateway
from gpubroker.times import format_time, now

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"image": "busybox", "requirements": {"gpu": ["h100"]}, "max_lifetime_seconds": 600}


async def test_a_preference_to_wait_that_is_out_of_range_is_not_obeyed_and_one_that_is_obeyed_is_named(world: World):
    pod = await world.root.post("/v1/pods", BODY, 202)
    path = f"/v1/pods/{pod['id']}"
    for given, applied in (
        ("wait=61", None), ("wait=600", None), ("wait=1, respond-async", "wait=1"), ("respond-async;x=1, wait=0", "wait=0"),
        ('WAIT="0"', "wait=0"), ("await=5", None), ("wait=5s", None), ("wait=-1", None), ("", None),
    ):  # fmt: skip
        answer = await world.root.call("GET", path, headers={"Prefer": given})
        assert (answer.status_code, answer.headers.get("Preference-Applied")) == (200, applied), given
    await world.root.get(f"{path}?wait=61", 422)


async def test_a_trace_context_that_is_none_is_as_if_it_were_not_there(world: World):
    good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    later = good.replace("00-", "cc-", 1) + "-what-comes-later"
    odd = ("x", good.upper(), good + "-", "ff" + good[2:], good.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
           good.replace("00f067aa0ba902b7", "0" * 16), good[:-1], good + "\x7f", "0" * 5000)  # fmt: skip
    for number, given in enumerate((good, later, *odd)):
        await world.root.post("/v1/pods", {**BODY, "name": str(number)}, 202, headers={"traceparent": given})
    rows = world.query("SELECT traceparent FROM event WHERE type = 'io.gpubroker.pod.requested.v1' ORDER BY id")
    assert [row["traceparent"] for row in rows[:2]] == [good, later]
    assert {row["traceparent"] for row in rows[2:]} == {None}


async def test_a_statement_is_csv_for_who_prefers_it(world: World):
    await world.run(world.root)
    await world.pass_time(minutes=5)
    await world.tick()
    path = f"/v1/statements/{now():%Y-%m}"
    for accept, kind in (
        ("text/csv", "csv"), ("text/*", "csv"), ("application/json;q=0.5, text/csv", "csv"), ("text/csv;q=0.1", "csv"),
        ("*/*", "json"), ("", "json"), ("application/json, text/csv", "json"), ("application/json, text/csv;q=0.9", "json"),
        ("text/html, */*;q=0.8", "json"), ("text/csv;q=0, */*", "json"), ("text/csv;q=nonsense", "json"), ("csv,,;", "json"),
    ):  # fmt: skip
        answer = await world.root.call("GET", path, headers={"Accept": accept})
        assert kind in answer.headers["content-type"], accept
        assert answer.headers["Vary"] == "Accept"
    lines = (await world.root.call("GET", path, headers={"Accept": "text/csv"})).text.splitlines()
    assert lines[0] == "agent_id,pod_id,provider,gpu,seconds,amount_usd"
    item = (await world.root.get(path))["items"][0]
    assert lines[1] == ",".join(str(item[name]) for name in lines[0].split(","))


async def test_what_is_misspelt_is_told_what_was_meant_by_its_public_name(world: World):
    for path, meant in (
        ("/v1/usage?form=x", "from"), ("/v1/usage?groupby=x", "group_by"), ("/v1/usage/records?too=x", "to"),
        ("/v1/pods?stat=x", "state"),
        ("/v1/offers?gpu_cuont=1", "gpu_count"), ("/v1/gpus?limt=1", "limit"),
    ):  # fmt: skip
        (error,) = check_problem(await world.root.call("GET", path), 422, "invalid")["errors"]
        assert error["did_you_mean"] == meant
    for body, meant in (
        ({"scopes": ["pods:raed"]}, "pods:read"),
        ({"budget": {"limit_usd": 1, "period": "months"}}, "month"),
    ):
        refused = await world.root.post("/v1/agents", {"name": "n", **body}, 422)
        assert [error["did_you_mean"] for error in refused["errors"]] == [meant]
    refused = await world.root.post("/v1/agents", {"name": "n", "budget": {"limit_usdd": 1}}, 422)
    assert "limit_usd" in [error.get("did_you_mean") for error in refused["errors"]]


async def test_of_very_much_that_is_wrong_the_first_is_said(world: World):
    """It is read before anybody is authenticated: what it costs has an end."""
    body = {f"field_{n}": 1 for n in range(500)} | {"nam" * 10_000: 1}
    refused = await world.root.post("/v1/agents", {"name": "n", **body}, 422)
    assert len(refused["errors"]) == 50
    refused = await world.root.post("/v1/agents", {"name": "n", "nam" * 10_000: 1}, 422)
    assert "did_you_mean" not in refused["errors"][0]


async def test_what_is_wrong_with_a_request_is_told_to_nobody_who_may_not_make_it(world: World):
    nobody, limited = Client("gbk_nonsense", ""), await world.root.child(scopes=[])
    for path in ("/v1/pods?cursor=x", "/v1/usage/records?cursor=x", "/v1/offers?limit=0", "/v1/pods?cursor=x&stat=y"):
        check_problem(await nobody.call("GET", path), 401, "unauthenticated")
        check_problem(await limited.call("GET", path), 403, "forbidden")
        answer = await world.root.call("GET", path)
        check_problem(answer, 422, "invalid")
        assert answer.headers["RateLimit"], "it was counted"


async def test_every_422_has_errors_with_pointers_of_rfc_6901(world: World):
    for body, pointer in (
        ([], ""), ({}, ""), ({"command": ["a"]}, ""), ({**BODY, "env": {"A B": "x"}}, "/env/A B"),
        ({**BODY, "labels": {"a~b/c d": "x"}}, "/labels/a~0b~1c d"), ({**BODY, "ports": [{"port": 0}]}, "/ports/0/port"),
    ):  # fmt: skip
        problem = check_problem(await world.root.call("POST", "/v1/pods", json=body), 422, "invalid")
        assert pointer in [error["pointer"] for error in problem["errors"]], problem
    key = {"Idempotency-Key": "k"}
    await world.root.post("/v1/pods", BODY, 202, headers=key)
    reused = await world.root.post("/v1/pods", {**BODY, "name": "n"}, 422, headers=key)
    assert [error["pointer"] for error in reused["errors"]] == ["Idempotency-Key"]


async def test_the_next_call_that_a_problem_names_can_be_made(world: World):
    agent = await world.root.child(
        budget={"limit_usd": "0.3"}, scopes=["pods:read", "pods:write", "offers:read", "agents:write"]
    )
    pod = await agent.post("/v1/pods", {**BODY, "max_lifetime_seconds": 60, "name": "n"}, 202)
    quote = await agent.post("/v1/quotes", {"requirements": {"gpu": ["h100"]}, "duration_seconds": 60})
    used = await agent.post("/v1/quotes", {"requirements": {"gpu": ["h100"]}, "duration_seconds": 60})
    await agent.post("/v1/pods", {"image": "b", "quote_id": used["id"]}, 202)
    await world.pass_time(seconds=121)
    body = {"image": "b", "requirements": {"gpu": ["h100"]}, "max_lifetime_seconds": 60}
    asked: list[tuple[str, str, dict[str, Any] | None, str]] = [
        ("POST", "/v1/pods", {**body, "max_lifetime_seconds": 36000}, "budget_exhausted"),
        ("POST", "/v1/pods", {**body, "name": "n"}, "name_in_use"),
        ("POST", "/v1/pods", {**body, "requirements": {"gpu": ["h100"], "country": "AQ"}}, "no_offer"),
        ("POST", "/v1/pods", {"image": "b", "quote_id": quote["id"]}, "quote_expired"),
        ("POST", "/v1/pods", {"image": "b", "quote_id": used["id"]}, "quote_used"),
        ("POST", "/v1/agents", {"name": "n", "scopes": ["usage:read"]}, "exceeds_parent"),
        ("GET", "/v1/usage", None, "forbidden"),
        ("POST", f"/v1/pods/{pod['id']}/restart", None, "action_not_allowed"),
        ("POST", f"/v1/exec/{pod['id']}", {"command": ["a"]}, "forbidden"),
    ]
    for method, path, sent, code in asked:
        problem = (await agent.call(method, path, json=sent)).json()
        assert problem["code"] == code, problem
        (step,) = problem["next"]
        address = step["path"].replace("wait=30", "wait=0")
        credential = agent if address != "/v1/budgets" else world.root  # this agent may not read usage
        answer = await credential.call(step["method"], address, json=step.get("body"))
        assert answer.status_code < 300, (code, step, answer.text)


async def test_one_host_in_front_of_all_has_the_same_manners(world: World):
    gateway = Gateway({name: app_named(name) for name in bundle.BY_NAME})
    transport = httpx.ASGITransport(gateway)
    async with httpx.AsyncClient(transport=transport, base_url="http://broker") as http:
        for path in ("/healthz", "/openapi.json"):
            answer = await http.get(path, headers={"X-Request-Id": "mine"})
            assert (answer.status_code, answer.headers["X-Request-Id"]) == (200, "mine")
            assert (await http.head(path)).status_code == 200
            refused = check_problem(await http.post(path), 405, "method_not_allowed")
            assert refused["detail"].endswith("GET, HEAD.")
            check_problem(await http.get(f"{path}?nonsense=1"), 422, "invalid")
        document = (await http.get("/openapi.json")).json()
        assert document["info"]["title"] == "GPUBROKER"
        parts = [(await http.get(f"/openapi/{f.name}.json")).json() for f in bundle.FUNCTIONS if f.kind == "public"]
        assert list(document["paths"]) == [path for part in parts for path in part["paths"]]
        for part in parts:  # what two functions both describe, they describe alike
            for name, schema in part["components"]["schemas"].items():
                assert document["components"]["schemas"][name] == schema, name
        names = [described["operationId"] for methods in document["paths"].values() for described in methods.values()]
        assert len(names) == len(set(names))
        for path in document["paths"]:
            function = next(f for f in bundle.FUNCTIONS if path in [*part_paths(parts, f.name)])
            assert app_of(path.replace("{", "x").replace("}", "")) is app_named(function.name), path
        check_problem(await http.get("/v1/nothing"), 404, "not_found")


def part_paths(parts: list[dict[str, Any]], name: str) -> list[str]:
    return [path for part in parts if part["info"]["title"].endswith(f": {name}") for path in part["paths"]]


async def test_times_are_read_in_any_offset_and_written_in_utc(world: World):
    pod = await world.root.post("/v1/pods", BODY, 202)
    moment = now() - timedelta(minutes=1)
    for text in (format_time(moment), moment.isoformat(), moment.isoformat().replace("+00:00", "-00:00")):
        found = await world.root.get("/v1/pods", params={"created_after": text})
        assert [item["id"] for item in found["items"]] == [pod["id"]], text
    for text in ("now", "2026-11-01", "2026-11-01T00:00:00", "1e9", "2026-13-01T00:00:00Z"):
        refused = await world.root.get("/v1/pods", 422, params={"created_after": text})
        assert refused["errors"][0]["pointer"] == "?created_after"
    nobody = Client("", "")
    assert (await nobody.call("GET", "/v1/pods", headers={"Authorization": "Basic eDp5"})).status_code == 401
