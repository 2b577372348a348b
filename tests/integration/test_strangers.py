"""Two tenants over HTTP: whatever call there is, with another organisation's ids it finds nothing and tells nothing.

The calls come from the merged document, so that a new one is called here too; one with a parameter that nobody says how to
fill fails until somebody does.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import httpx
import pytest
from tests.factories import Client, World, app_named

from gpubroker import accounts, bundle, ids, tokens
from gpubroker.local.gateway import Gateway

pytestmark = pytest.mark.anyio

MARK = "zebra"
"""Stands in everything that the first organisation writes."""
PREFIXES = {
    "/v1/agents": "agt", "/v1/keys": "key", "/v1/pods": "pod", "/v1/logs": "pod", "/v1/exec": "pod", "/v1/budgets": "agt",
    "/v1/offers": None, "/v1/statements": None,
}  # fmt: skip
"""What a path's parameter is the id of, by the path's beginning. None: not an id of anybody's."""
FIELDS = {"agent_id": "agt", "pod_id": "pod", "quote_id": "qte", "org_id": "org", "offer_id": None}
"""What a field of a query or body is the id of."""
BODIES: Mapping[str, dict[str, Any]] = {"POST /v1/pods": {"image": "busybox"}}
"""What a body needs beside what its schema says is required."""
EVENTS: Mapping[str, str] = {"POST /v1/intake": "io.gpubroker.command.terminate.v1"}
"""What an operation that takes CloudEvents is told to do, with another's pod as its subject."""
NOBODYS = {"GET /v1/offers/{id}", "GET /v1/gpus/{model}/prices"}
"""Offers and their prices belong to no organisation: everyone sees the same."""


class Tenant(NamedTuple):
    """An organisation with something of everything: its root, an agent below it, an id of each kind, its JWT."""

    root: Client
    child: Client
    ids: dict[str, str]
    token: str


async def settle(world: World, root: Client, mark: str) -> Tenant:
    child = await root.child(name=mark, metadata={mark: mark}, budget={"limit_usd": "20"})
    more = {"labels": {"tenant": mark}, "env": {"SECRET": mark}, "command": ["echo", mark]}
    pod = await world.run(child, name=mark, **more)
    await world.pass_time(minutes=5)
    await world.tick()
    quote = await child.post("/v1/quotes", {"requirements": {"gpu": ["h100"]}, "duration_seconds": 60})
    key = await root.post("/v1/keys", {"name": mark, "agent_id": child.agent_id})
    form = {"grant_type": "client_credentials", "client_id": child.agent_id, "client_secret": child.key}
    token = (await root.call("POST", "/v1/token", data=form)).json()["access_token"]
    org_id = (await root.get("/v1/whoami"))["organisation"]["id"]
    owned = {"agt": child.agent_id, "pod": pod["id"], "qte": quote["id"], "key": key["id"], "org": org_id}
    return Tenant(root, child, owned, token)


class Request(NamedTuple):
    """A call with ids put in; `about` are the kinds of those in its path."""

    label: str
    method: str
    path: str
    query: dict[str, str]
    body: dict[str, Any] | None
    form: dict[str, str] | None
    is_named_in_path: bool
    media_type: str = "application/json"


def requests_with(document: dict[str, Any], owned: Mapping[str, str], form: Mapping[str, str]) -> Iterator[Request]:
    """Every call of the document: as plain as it can be, and again with each field that is an id."""
    for path, methods in document["paths"].items():
        for method, described in methods.items():
            yield from _requests(document, method.upper(), path, described, owned, form)


def _requests(
    document: dict[str, Any], method: str, path: str, described: dict[str, Any], owned: Mapping[str, str], form: Mapping[str, str]
) -> Iterator[Request]:  # fmt: skip
    label = f"{method} {path}"
    begins = "/".join(path.split("/")[:3])
    named = re.findall(r"\{([a-z_]+)\}", path)
    assert not named or begins in PREFIXES or label in NOBODYS, f"{label}: say in PREFIXES what its {named} is"
    kind = PREFIXES.get(begins)
    address = re.sub(r"\{[a-z_]+\}", owned.get(kind or "", "2026-11"), path)
    content = described.get("requestBody", {}).get("content", {})
    if "application/x-www-form-urlencoded" in content:
        fields = resolve(document, content["application/x-www-form-urlencoded"]["schema"])["properties"]
        unknown = [name for name in fields if name not in form]
        assert not unknown, f"{label}: say in `form` what its {unknown} is"
        given = {name: form[name] for name in fields if form[name]}
        yield Request(label, method, address, {}, None, given, False)
        bare = {name: value for name, value in given.items() if not name.startswith("client_")}
        exchange = {"grant_type": tokens.EXCHANGE} if "grant_type" in bare else {}
        yield Request(label, method, address, {}, None, bare | exchange, False)
        return
    if "application/cloudevents+json" in content:
        assert label in EVENTS, f"{label}: say in EVENTS what it is told to do"
        pod_id = owned["pod"]
        event = {"specversion": "1.0", "id": f"of {pod_id}", "source": "/x", "type": EVENTS[label], "subject": pod_id}
        yield Request(label, method, address, {}, event, None, False, "application/cloudevents+json")
        return
    schema = resolve(document, content["application/json"]["schema"]) if content else {"properties": {}}
    body = least(document, schema) | BODIES.get(label, {}) if content else None
    is_named = bool(named) and kind is not None
    yield Request(label, method, address, {}, body, None, is_named)
    for parameter in described["parameters"]:
        if parameter["in"] == "query" and parameter["name"].endswith("_id"):
            value = owned.get(FIELDS[parameter["name"]] or "", "ofr_x")
            yield Request(label, method, address, {parameter["name"]: value}, body, None, is_named)
    for name in schema["properties"]:
        if name.endswith("_id"):
            value = owned.get(FIELDS[name] or "", "ofr_x")
            yield Request(label, method, address, {}, (body or {}) | {name: value}, None, is_named)


def resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    return document["components"]["schemas"][name] if name else schema


def least(document: dict[str, Any], schema: dict[str, Any]) -> Any:
    """The smallest value that a schema takes."""
    schema = resolve(document, schema)
    if "anyOf" in schema and "examples" not in schema:
        return least(document, schema["anyOf"][0])
    if schema.get("type") == "object":
        return {name: least(document, schema["properties"][name]) for name in schema.get("required", ())}
    if schema.get("type") == "array":
        return [least(document, schema["items"])] * schema.get("minItems", 0)
    plain = {"integer": schema.get("minimum", 1), "number": schema.get("minimum", 1), "boolean": False}
    chosen = schema.get("examples", schema.get("enum", [plain.get(schema.get("type", ""), "x")]))
    return chosen[0]


def anonymised(answer: httpx.Response, owned: Mapping[str, str]) -> str:
    text = re.sub(r"\d{4}-\d\d-\d\dT[0-9:.]+Z", "", answer.text.replace(answer.headers["X-Request-Id"], ""))
    for given in owned.values():
        text = text.replace(given, "")
    return f"{answer.status_code} {text}"


async def test_with_anothers_ids_every_call_finds_nothing_and_tells_nothing(world: World):
    made = accounts.bootstrap(world.database_url, "other", 100_000_000, "total", "enterprise", new_key=False)
    theirs = await settle(world, world.root, MARK)
    ours = await settle(world, Client(made.key.key or "", made.agent_id), "lion")
    theirs_before = rows_of(world, theirs)
    secrets = {MARK, *(row["id"] for row in world.query("SELECT jti AS id FROM token"))} | {
        value for row in theirs_before.values() for columns in row for value in columns if ids_shaped(value)
    }
    secrets -= set(world.query("SELECT array_agg(id) AS ids FROM offer")[0]["ids"])
    gateway = Gateway({name: app_named(name) for name in bundle.BY_NAME})
    never = {kind: ids.new_id(kind) for kind in theirs.ids}
    form = {
        "token": theirs.token, "token_type_hint": "", "grant_type": "client_credentials", "client_id": theirs.child.agent_id,
        "client_secret": ours.child.key, "subject_token": ours.child.key, "subject_token_type": "", "actor_token": theirs.token,
        "actor_token_type": "", "scope": "", "audience": "", "expires_in": "", "budget_usd": "",
    }  # fmt: skip
    transport = httpx.ASGITransport(gateway)
    async with httpx.AsyncClient(transport=transport, base_url="http://broker", timeout=30) as http:
        document = (await http.get("/openapi.json")).json()

        async def send(asked: Request, credential: str) -> httpx.Response:
            headers = {} if "client_id" in (asked.form or ()) else {"Authorization": f"Bearer {credential}"}
            content = None if asked.body is None else json.dumps(asked.body)
            headers |= {"Content-Type": asked.media_type} if content is not None else {}
            return await http.request(
                asked.method, asked.path, params=asked.query, headers=headers, content=content, data=asked.form
            )

        calls = list(zip(requests_with(document, theirs.ids, form), requests_with(document, never, form), strict=True))
        labels = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
        assert {hidden.label for hidden, _ in calls} == labels
        for credential in (ours.root.key, ours.child.key, ours.token):
            for hidden, unknown in calls:
                answer, other = await send(hidden, credential), await send(unknown, credential)
                world.query("UPDATE org SET plan = 'enterprise'")  # who is on a lesser plan is soon told to wait
                said = f"{hidden}: {answer.status_code} {answer.text}"
                assert answer.status_code < 500, said
                if hidden.is_named_in_path:
                    assert answer.status_code == 404, said
                if hidden.is_named_in_path or hidden.query or hidden.label in EVENTS or answer.status_code >= 400:
                    assert anonymised(answer, theirs.ids) == anonymised(other, never), said
                told = [secret for secret in secrets if secret in answer.text + str(answer.headers)]
                echoed = {*hidden.query.values(), *([theirs.ids["pod"]] if hidden.label in EVENTS else [])}
                assert not set(told) - echoed, said
    assert rows_of(world, theirs) == theirs_before


def ids_shaped(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[a-z]{3}_[0-9a-hjkmnp-tv-z]{26}", value) is not None


def rows_of(world: World, tenant: Tenant) -> dict[str, list[tuple[object, ...]]]:
    """Every row of an organisation, in every table that has organisations."""
    (org,) = world.query("SELECT org_id FROM agent WHERE id = %s", tenant.root.agent_id)
    columns = world.query(
        """SELECT table_name AS name, max(column_name) AS owner FROM information_schema.columns
            WHERE table_schema = 'public' AND column_name IN ('org_id', 'tenant') GROUP BY table_name"""
    )
    found = {}
    for table in columns:
        sql = f"SELECT to_jsonb(t) AS row FROM {table['name']} t WHERE {table['owner']} = %s ORDER BY 1"
        found[table["name"]] = [
            tuple(str(v) if isinstance(v, (dict, list)) else v for k, v in row["row"].items() if k != "used_at")
            for row in world.query(sql, org["org_id"])
        ]
    return found
