"""Who there is and what a credential may do: never more than its parent, checked when it is used."""

import asyncio
import itertools
import logging
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.factories import Client, World

from gpubroker import accounts, keys
from gpubroker.ids import ALPHABET
from gpubroker.resources import SCOPES

pytestmark = pytest.mark.anyio


def without_id(problem: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in problem.items() if name != "request_id"}


def second(world: World) -> Client:
    """The root of another organisation."""
    made = accounts.bootstrap(world.database_url, "second", 10**9, "total", "free", new_key=False)
    return Client(made.key.key or "", made.agent_id)


async def key_of(world: World, client: Client, **request: Any) -> Client:
    """A further key of the same agent."""
    made = await client.post("/v1/keys", {"name": "further"} | request)
    return Client(made["key"]["key"], client.agent_id)


# Bootstrap


async def test_bootstrap_again_changes_nothing_and_shows_no_key(world: World):
    before = (
        world.query("SELECT * FROM org"),
        world.query("SELECT id, limit_micro FROM agent JOIN budget ON agent_id = id"),
    )
    again = accounts.bootstrap(world.database_url, "default", 7, "day", "free", new_key=False)
    assert (again.created, again.key.key, again.agent_id) == (False, None, world.root.agent_id)
    assert (
        world.query("SELECT * FROM org"),
        world.query("SELECT id, limit_micro FROM agent JOIN budget ON agent_id = id"),
    ) == before
    assert world.query("SELECT count(*) FROM key")[0]["count"] == 1


async def test_bootstrap_with_new_key_issues_a_further_one_beside_the_first(world: World):
    made = accounts.bootstrap(world.database_url, "default", 7, "total", "free", new_key=True)
    assert (made.created, made.agent_id) == (False, world.root.agent_id)
    whoami = await Client(made.key.key or "", "").get("/v1/whoami")
    assert whoami["agent"]["id"] == (await world.root.get("/v1/whoami"))["agent"]["id"]
    assert "admin" in whoami["scopes"]


async def test_only_the_first_organisation_has_admin(world: World):
    other = second(world)
    mine, theirs = await world.root.get("/v1/whoami"), await other.get("/v1/whoami")
    assert mine["scopes"] == sorted(SCOPES)
    assert theirs["scopes"] == sorted(set(SCOPES) - {"admin"})
    assert theirs["organisation"]["name"] == "second"
    assert (theirs["budgets"][0]["limit_usd"], theirs["organisation"]["plan"]) == ("1000.000000", "free")


async def test_bootstraps_that_race_make_one_organisation_with_one_key_and_one_admin(world: World):
    with world.connect() as conn:
        conn.execute("TRUNCATE org CASCADE")

    def run(name: str) -> accounts.Bootstrap:
        return accounts.bootstrap(world.database_url, name, 5, "total", "free", new_key=False)

    with ThreadPoolExecutor(6) as threads:
        made = list(threads.map(run, ["one", "two", "one", "two", "one", "two"]))
    assert sorted(m.org_name for m in made if m.created) == ["one", "two"]
    assert sum("admin" in row["scopes"] for row in world.query("SELECT scopes FROM agent")) == 1
    assert world.query("SELECT count(*) FROM key")[0]["count"] == 2
    assert len({m.owner for m in made}) == 1


# Keys


async def test_a_key_has_its_shape_and_a_checksum_that_anyone_can_verify(world: World):
    made = await world.root.post("/v1/keys", {"name": "n"})
    text = made["key"]["key"]
    assert re.fullmatch(r"gbk_[0-9a-hjkmnp-tv-z]{85}", text)
    assert text[4:30] == made["id"].removeprefix("key_") == made["key"]["id"].removeprefix("key_")
    checksum, number = zlib.crc32(text[:-7].encode()), 0
    for character in text[-7:]:
        number = number * 32 + ALPHABET.index(character)
    assert number == checksum
    (row,) = world.query("SELECT * FROM key WHERE id = %s", made["id"])
    assert row["hash"] == keys.hash_key(text)
    assert text.startswith(row["start"])
    assert len(row["start"]) < 20


async def test_one_wrong_character_is_refused_without_a_look_at_the_database(world: World):
    for place in (5, 40, 88):
        wrong = "0" if world.root.key[place] != "0" else "1"
        text = world.root.key[:place] + wrong + world.root.key[place + 1 :]
        answer = await Client(text, "").call("GET", "/v1/whoami")
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")


async def test_a_key_comes_by_either_header(world: World):
    for headers in (
        {"Authorization": f"Bearer {world.root.key}"},
        {"Authorization": f"bearer  {world.root.key}"},
        {"X-API-Key": world.root.key},
    ):
        answer = await Client("", "").call("GET", "/v1/whoami", headers={"Authorization": ""} | headers)
        assert answer.status_code == 200, headers
    for headers in (
        {"Authorization": ""},
        {"Authorization": "Basic eDp5"},
        {"Authorization": "Bearer"},
        {"Authorization": "", "X-API-Key": "x"},
    ):
        answer = await Client("", "").call("GET", "/v1/whoami", headers=headers)
        assert answer.status_code == 401, headers
        assert "Bearer" in answer.headers["WWW-Authenticate"]


async def test_a_key_is_in_no_list_no_log_no_repr_and_no_table(world: World, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    made = await world.root.post("/v1/keys", {"name": "n"})
    secret = made["key"]["key"]
    holder = Client(secret, "")
    shown = [
        await holder.get("/v1/keys"), await holder.get("/v1/whoami"), await holder.get("/v1/agents"),
        await holder.delete(f"/v1/keys/{made['id']}", 200), await holder.call("GET", "/v1/whoami"),
    ]  # fmt: skip
    await world.root.get("/v1/keys?agent_id=" + secret)
    rows = []
    for (table,) in [
        tuple(r.values())
        for r in world.query(
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
        )
    ]:
        rows += world.query(f"SELECT t::text FROM {table} t")
    logged = str([record.getMessage() for record in caplog.records if not record.name.startswith("httpx")])
    assert "/v1/whoami" in logged
    for text in (str(shown[:4]), shown[4].text, logged, str(rows), repr(accounts.NewKey(id="k", key=secret))):
        assert secret not in text
        assert secret[30:] not in text
    assert secret[30:].encode().hex() not in str(rows)
    assert made["start"] == secret[: len(made["start"])]


async def test_a_revoked_key_is_refused_by_the_next_request_and_others_live_on(world: World):
    doomed = await key_of(world, world.root)
    (listed,) = [k for k in (await world.root.get("/v1/keys"))["items"] if k["name"] == "further"]
    assert (await doomed.call("GET", "/v1/whoami")).status_code == 200
    revoked = await doomed.delete(f"/v1/keys/{listed['id']}", 200)
    assert revoked["revoked_at"] is not None
    assert (await doomed.call("GET", "/v1/whoami")).status_code == 401
    again = await world.root.delete(f"/v1/keys/{listed['id']}", 200)
    assert again["revoked_at"] == revoked["revoked_at"]
    assert (await world.root.call("GET", "/v1/whoami")).status_code == 200


async def test_a_key_ends_when_it_expires(world: World):
    short = await key_of(world, world.root, expires_in=3600)
    assert (await short.call("GET", "/v1/whoami")).status_code == 200
    world.query("UPDATE key SET expires_at = clock_timestamp() WHERE hash = %s", keys.hash_key(short.key))
    assert (await short.call("GET", "/v1/whoami")).status_code == 401


async def test_a_list_says_when_a_key_was_last_used(world: World):
    fresh = await world.root.post("/v1/keys", {"name": "n"})
    assert fresh["used_at"] is None
    await Client(fresh["key"]["key"], "").get("/v1/whoami")
    used = next(k for k in (await world.root.get("/v1/keys"))["items"] if k["id"] == fresh["id"])
    assert used["used_at"] is not None


async def test_a_wait_ends_when_the_key_is_revoked_in_the_middle(world: World):
    agent = await world.root.child()
    watcher = await key_of(world, agent)
    pod = await agent.pod()
    waiting = asyncio.create_task(watcher.call("GET", f"/v1/pods/{pod['id']}?wait=20"))
    await asyncio.sleep(0.2)
    revoke = "UPDATE key SET revoked_at = clock_timestamp() WHERE hash = %s"
    await asyncio.to_thread(world.query, revoke, keys.hash_key(watcher.key))  # it may wait for the request's own lock
    answer = await asyncio.wait_for(waiting, 5)
    assert answer.status_code == 401


# Never more than the parent


async def test_nobody_makes_an_agent_or_key_with_a_scope_that_it_lacks(world: World):
    parent = await world.root.child(scopes=["agents:write", "pods:read"])
    for path, scope in itertools.product(("/v1/agents", "/v1/keys"), ("admin", "usage:read")):
        refused = await parent.post(path, {"name": "n", "scopes": ["pods:read", scope]}, 422)
        assert (refused["code"], refused["errors"][0]["pointer"]) == ("exceeds_parent", "/scopes")
    assert world.query("SELECT count(*) FROM agent")[0]["count"] == 2


async def test_omitted_scopes_are_the_parents_less_admin(world: World):
    made = await world.root.post("/v1/agents", {"name": "n"})
    assert made["scopes"] == made["effective_scopes"] == [scope for scope in SCOPES if scope != "admin"]
    assert (await world.root.post("/v1/keys", {"name": "n"}))["scopes"] == made["scopes"]
    narrow = await world.root.child(scopes=["agents:write", "pods:read"])
    assert (await narrow.post("/v1/agents", {"name": "n"}))["scopes"] == ["pods:read", "agents:write"]


async def test_a_narrow_key_of_a_wide_agent_makes_nothing_wider_than_itself(world: World):
    agent = await world.root.child()
    narrow = await key_of(world, agent, scopes=["agents:write", "offers:read"])
    for path in ("/v1/keys", "/v1/agents"):
        assert (await narrow.post(path, {"name": "n", "scopes": ["pods:write"]}, 422))["code"] == "exceeds_parent"
        assert set((await narrow.post(path, {"name": "n"}))["scopes"]) == {"agents:write", "offers:read"}
    child = await agent.child(name="child")
    made = await narrow.post("/v1/keys", {"name": "n", "agent_id": child.agent_id})
    assert set(made["scopes"]) == {"agents:write", "offers:read"}
    assert (await narrow.post("/v1/keys", {"name": "n", "agent_id": child.agent_id, "scopes": ["pods:read"]}, 422))[
        "code"
    ] == "exceeds_parent"


async def test_a_key_that_expires_makes_nothing_that_outlives_it(world: World):
    """Else a key for an hour would be a key for ever."""
    agent = await world.root.child()
    hour = await key_of(world, agent, expires_in=3600)
    end = world.query("SELECT expires_at FROM key WHERE hash = %s", keys.hash_key(hour.key))[0]["expires_at"]
    for path in ("/v1/keys", "/v1/agents"):
        refused = await hour.post(path, {"name": "n", "expires_in": 7200}, 422)
        assert (refused["code"], refused["errors"][0]["pointer"]) == ("exceeds_parent", "/expires_in")
        for request in ({}, {"expires_in": 60}):
            made = await hour.post(path, {"name": "n"} | request)
            assert datetime.fromisoformat(made["expires_at"]) <= end, path
    (lasting,) = world.query("SELECT id FROM key WHERE agent_id = %s AND name = 'child'", agent.agent_id)
    rotated = await hour.post(f"/v1/keys/{lasting['id']}/rotate", {"overlap_seconds": 60})
    assert datetime.fromisoformat(rotated["expires_at"]) <= end


async def test_a_child_ends_no_later_than_its_parent(world: World):
    parent = await world.root.child(expires_in=3600)
    refused = await parent.post("/v1/agents", {"name": "n", "expires_in": 3700}, 422)
    assert (refused["code"], refused["errors"][0]["pointer"]) == ("exceeds_parent", "/expires_in")
    ends = (await parent.get("/v1/whoami"))["agent"]["expires_at"]
    assert (await parent.post("/v1/agents", {"name": "n"}))["expires_at"] == ends
    assert (await parent.post("/v1/agents", {"name": "n", "expires_in": 60}))["expires_at"] < ends
    assert (await parent.post("/v1/keys", {"name": "n", "expires_in": 3700}, 422))["code"] == "exceeds_parent"


async def test_a_childs_budget_is_at_most_the_least_above_it(world: World):
    parent = await world.root.child(budget={"limit_usd": "5"})
    bare = await parent.child(name="bare")
    for client in (parent, bare):
        refused = await client.post("/v1/agents", {"name": "n", "budget": {"limit_usd": "5.000001"}}, 422)
        assert (refused["code"], refused["errors"][0]["pointer"]) == ("exceeds_parent", "/budget/limit_usd")
        made = await client.child(budget={"limit_usd": "5", "period": "day"})
        assert (await made.get("/v1/budgets"))["items"][0]["limit_usd"] == "5.000000"


async def test_a_tree_has_a_deepest_level(world: World):
    client, depth = world.root, 1
    while depth < 32:
        client, depth = await client.child(), depth + 1
    assert (await client.post("/v1/agents", {"name": "n"}, 422))["code"] == "exceeds_parent"


async def test_scopes_that_a_parent_loses_are_lost_below_it_at_once(world: World):
    parent = await world.root.child()
    child = await parent.child(name="child")
    assert (await child.call("GET", "/v1/pods")).status_code == 200
    world.query("UPDATE agent SET scopes = '{offers:read,agents:write}' WHERE id = %s", parent.agent_id)
    refused = await child.get("/v1/pods", 403)
    assert (refused["code"], refused["scope"]) == ("forbidden", "pods:read")
    whoami = await child.get("/v1/whoami")
    assert whoami["scopes"] == ["agents:write", "offers:read"]
    assert set(whoami["agent"]["effective_scopes"]) == {"offers:read", "agents:write"}
    assert (await child.post("/v1/agents", {"name": "n", "scopes": ["pods:read"]}, 422))["code"] == "exceeds_parent"
    await child.get("/v1/offers")


async def test_an_agent_that_ends_ends_all_below_it_at_once(world: World):
    for column in ("expires_at", "revoked_at"):
        parent = await world.root.child()
        grandchild = await (await parent.child()).child()
        world.query(f"UPDATE agent SET {column} = clock_timestamp() WHERE id = %s", parent.agent_id)
        for client in (parent, grandchild):
            assert (await client.call("GET", "/v1/whoami")).status_code == 401
    assert (await world.root.call("GET", "/v1/whoami")).status_code == 200


async def test_each_call_needs_its_scope(world: World):
    calls: dict[tuple[str, str], str] = {
        ("POST", "/v1/agents"): "agents:write", ("POST", "/v1/keys"): "agents:write",
        ("DELETE", "/v1/keys/key_x"): "agents:write", ("PATCH", "/v1/agents/agt_x"): "agents:write",
        ("DELETE", "/v1/agents/agt_x"): "agents:write", ("POST", "/v1/keys/key_x/rotate"): "agents:write",
        ("GET", "/v1/offers"): "offers:read", ("GET", "/v1/pods"): "pods:read", ("GET", "/v1/pods/pod_x"): "pods:read",
        ("POST", "/v1/pods"): "pods:write", ("DELETE", "/v1/pods/pod_x"): "pods:write",
        ("POST", "/v1/pods/pod_x/stop"): "pods:write", ("POST", "/v1/pods/pod_x/extend"): "pods:write",
        ("POST", "/v1/exec/pod_x"): "pods:exec", ("GET", "/v1/logs/pod_x"): "pods:read",
        ("GET", "/v1/usage"): "usage:read", ("GET", "/v1/usage/records"): "usage:read",
        ("GET", "/v1/budgets"): "usage:read", ("PUT", "/v1/budgets/agt_x"): "budgets:write",
    }  # fmt: skip
    powerless = await world.root.child(scopes=[])
    for (method, path), scope in calls.items():
        answer = await powerless.call(method, path, json={} if method in ("POST", "PUT", "PATCH") else None)
        assert (answer.status_code, answer.json().get("scope")) == (403, scope), f"{method} {path}"
    everything_else = await world.root.child(scopes=[scope for scope in SCOPES if scope not in ("admin", "pods:write")])
    assert (await everything_else.call("POST", "/v1/pods", json={})).status_code == 403


# Nobody sees another's


async def test_what_is_outside_the_subtree_does_not_exist_in_the_same_words(world: World):
    stranger = second(world)
    first, sibling = await world.root.child(name="first"), await world.root.child(name="sibling")
    below = await first.child(name="below")
    key_ids = {row["agent_id"]: row["id"] for row in world.query("SELECT id, agent_id FROM key")}
    never = without_id(await sibling.get("/v1/agents/agt_00000000000000000000000000", 404))
    for client, hidden in (
        (sibling, first),
        (sibling, below),
        (first, world.root),
        (below, first),
        (stranger, below),
        (world.root, stranger),
    ):
        assert without_id(await client.get(f"/v1/agents/{hidden.agent_id}", 404)) == never
        assert without_id(await client.delete(f"/v1/keys/{key_ids[hidden.agent_id]}", 404)) == never
        assert without_id(await client.post("/v1/keys", {"name": "n", "agent_id": hidden.agent_id}, 404)) == never
        assert (await client.get(f"/v1/keys?agent_id={hidden.agent_id}"))["items"] == []
        assert hidden.agent_id not in [a["id"] for a in (await client.get("/v1/agents"))["items"]]
    assert {a["id"] for a in (await first.get("/v1/agents"))["items"]} == {first.agent_id, below.agent_id}
    assert {k["agent_id"] for k in (await first.get("/v1/keys"))["items"]} == {first.agent_id, below.agent_id}
    assert (await first.get(f"/v1/agents/{below.agent_id}"))["parent_id"] == first.agent_id


async def test_an_ancestors_key_is_not_its_childs_to_revoke(world: World):
    child = await world.root.child()
    (roots,) = world.query("SELECT id FROM key WHERE agent_id = %s", world.root.agent_id)
    await child.delete(f"/v1/keys/{roots['id']}", 404)
    assert (await world.root.call("GET", "/v1/whoami")).status_code == 200


async def test_agents_and_keys_are_listed_page_by_page_while_more_are_made(world: World):
    made = [world.root.agent_id] + [(await world.root.child(name=f"n{n}")).agent_id for n in range(5)]
    for path, name in (("/v1/agents", "id"), ("/v1/keys", "agent_id")):
        found: list[str] = []
        cursor = None
        while True:
            page = await world.root.get(path + "?limit=2" + (f"&cursor={cursor}" if cursor else ""))
            assert len(page["items"]) <= 2
            found += [item[name] for item in page["items"]]
            cursor = page["next_cursor"]
            if len(found) == 2:
                await world.root.child(name="between")
            if cursor is None:
                break
        assert len(found) == len(set(found))
        assert set(made) <= set(found)


# Idempotency


@pytest.mark.parametrize("path", ["/v1/agents", "/v1/keys"])
async def test_a_repeated_create_makes_one_thing_and_shows_no_key_again(world: World, path: str):
    headers = {"Idempotency-Key": "once"}
    first = await world.root.call("POST", path, json={"name": "n", "scopes": ["pods:read"]}, headers=headers)
    again = await world.root.call("POST", path, json={"scopes": ["pods:read"], "name": "n"}, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.headers["Location"] == first.headers["Location"] == f"{path}/{first.json()['id']}"
    assert again.json()["id"] == first.json()["id"]
    assert again.json()["key"] == {"id": first.json()["key"]["id"], "key": None}
    (rotate,) = again.json()["next"]
    assert (rotate["method"], rotate["path"]) == ("POST", f"/v1/keys/{first.json()['key']['id']}/rotate")
    assert (
        world.query(f"SELECT count(*) FROM {path.rpartition('/')[2].removesuffix('s')} WHERE name = 'n'")[0]["count"]
        == 1
    )


async def test_a_replay_shows_the_resource_as_it_is_now(world: World):
    made = await world.root.post("/v1/agents", {"name": "n"}, headers={"Idempotency-Key": "k"})
    world.query("UPDATE agent SET name = 'renamed', scopes = '{pods:read}' WHERE id = %s", made["id"])
    again = await world.root.post("/v1/agents", {"name": "n"}, headers={"Idempotency-Key": "k"})
    assert (again["name"], again["scopes"]) == ("renamed", ["pods:read"])


async def test_a_key_used_for_another_body_or_route_is_refused(world: World):
    headers = {"Idempotency-Key": "k"}
    await world.root.post("/v1/agents", {"name": "n"}, headers=headers)
    for path, body in (
        ("/v1/agents", {"name": "m"}),
        ("/v1/agents", {"name": "n", "metadata": {}}),
        ("/v1/keys", {"name": "n"}),
    ):
        refused = await world.root.post(path, body, 422, headers=headers)
        assert refused["code"] == "idempotency_key_reused"
    child = await world.root.child()
    assert (await child.post("/v1/agents", {"name": "another agent's"}, headers=headers))["name"] == "another agent's"


async def test_one_still_running_is_409_with_retry_after(world: World):
    with world.connect() as conn, conn.transaction():
        conn.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"{world.root.agent_id} k",))
        answer = await world.root.call("POST", "/v1/agents", json={"name": "n"}, headers={"Idempotency-Key": "k"})
    assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (
        409,
        "idempotency_in_progress",
        True,
    )
    assert int(answer.headers["Retry-After"]) >= 1
    assert (
        await world.root.call("POST", "/v1/agents", json={"name": "n"}, headers={"Idempotency-Key": "k"})
    ).status_code == 201


async def test_twenty_at_once_with_one_key_make_one_agent(world: World):
    calls = [
        world.root.call("POST", "/v1/agents", json={"name": "n"}, headers={"Idempotency-Key": "k"}) for _ in range(20)
    ]
    answers = await asyncio.gather(*calls)
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 201}) == 1
    assert sum(answer.status_code == 201 and answer.json()["key"]["key"] is not None for answer in answers) == 1
    assert world.query("SELECT count(*) FROM agent")[0]["count"] == 2


async def test_a_failed_create_keeps_no_idempotency_key(world: World):
    child = await world.root.child(budget={"limit_usd": "1"})
    headers = {"Idempotency-Key": "k"}
    body = {"name": "n", "budget": {"limit_usd": "2"}}
    assert (await child.post("/v1/agents", body, 422, headers=headers))["code"] == "exceeds_parent"
    await world.root.put(f"/v1/budgets/{child.agent_id}", {"limit_usd": "3"})
    await child.post("/v1/agents", body, headers=headers)


async def test_idempotency_rows_hold_no_body(world: World):
    await world.root.post("/v1/agents", {"name": "a very secret name"}, headers={"Idempotency-Key": "k"})
    (row,) = world.query("SELECT * FROM idempotency")
    assert "secret" not in str({**row, "body_mac": bytes(row["body_mac"])})
    assert len(row["body_mac"]) == 32


async def test_an_idempotency_key_is_1_to_255_visible_characters(world: World):
    for key in ("", "with space", "x" * 256, "é"):
        headers = {"Idempotency-Key": key.encode("latin-1")}
        answer = await world.root.call("POST", "/v1/agents", json={"name": "n"}, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid")
        assert answer.json()["errors"][0]["pointer"] == "Idempotency-Key"


# What an agent is


async def test_an_agent_shows_what_it_was_made_of(world: World):
    metadata = {"team": "a", "n": 3, "deep": {"list": [1, 2.5, None, True]}}
    made = await world.root.post("/v1/agents", {"name": "n é 東", "metadata": metadata, "expires_in": 3600})
    shown = await world.root.get(f"/v1/agents/{made['id']}")
    assert {k: v for k, v in made.items() if k != "key"} == shown
    assert shown["metadata"] == metadata
    assert (shown["name"], shown["parent_id"], shown["grants"], shown["may_act"]) == (
        "n é 東",
        world.root.agent_id,
        [],
        [],
    )
    assert shown["limits"] == {"max_pods": None, "max_usd_per_hour": None, "max_creates_per_minute": None}
    ends = datetime.fromisoformat(shown["expires_at"])
    assert abs(ends - datetime.now(UTC) - timedelta(hours=1)) < timedelta(seconds=20)
    assert shown["created_at"].endswith("Z")


async def test_an_agents_request_is_checked(world: World):
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "/name"), ({"name": ""}, "/name"), ({"name": "x" * 121}, "/name"), ({"name": "a\nb"}, "/name"), ({"name": 5}, "/name"),
        ({"name": "n", "scopes": ["pods"]}, "/scopes/0"), ({"name": "n", "scopes": ["pods:read", "pods:read"]}, "/scopes"),
        ({"name": "n", "scopes": "pods:read"}, "/scopes"), ({"name": "n", "expires_in": 0}, "/expires_in"),
        ({"name": "n", "expires_in": "60"}, "/expires_in"), ({"name": "n", "expires_in": 10**12}, "/expires_in"),
        ({"name": "n", "budget": {}}, "/budget/limit_usd"), ({"name": "n", "budget": {"limit_usd": -1}}, "/budget/limit_usd"),
        ({"name": "n", "budget": {"limit_usd": "1", "period": "year"}}, "/budget/period"), ({"name": "n", "budget": 5}, "/budget"),
        ({"name": "n", "metadata": []}, "/metadata"), ({"name": "n", "parent_id": "agt_x"}, "/parent_id"),
        ({"name": "n", "metadata": {"": 1}}, "/metadata/"),
        ({"name": "n", "metadata": {str(n): n for n in range(65)}}, "/metadata"),
    ]  # fmt: skip
    for body, pointer in wrong:
        refused = await world.root.post("/v1/agents", body, 422)
        assert refused["code"] == "invalid", body
        assert pointer in [e["pointer"] for e in refused["errors"]], (body, refused["errors"])
    assert world.query("SELECT count(*) FROM agent")[0]["count"] == 1


async def test_whoami_says_what_a_credential_is_worth(world: World):
    agent = await world.root.child(budget={"limit_usd": "5"}, scopes=["pods:read", "agents:write", "usage:read"])
    narrow = await key_of(world, agent, scopes=["pods:read"])
    whoami = await narrow.get("/v1/whoami")
    assert set(whoami) == {"agent", "organisation", "scopes", "delegation", "budgets", "limits"}
    assert (whoami["scopes"], whoami["agent"]["id"], whoami["delegation"]) == (
        ["pods:read"],
        agent.agent_id,
        [agent.agent_id],
    )
    assert whoami["organisation"] == {"id": whoami["agent"]["org_id"], "name": "default", "plan": "enterprise"}
    assert [(b["agent_id"], b["limit_usd"]) for b in whoami["budgets"]] == [(agent.agent_id, "5.000000")]
