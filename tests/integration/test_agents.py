"""Agents that change and end, their keys that rotate, what they grant, and their limits."""

import asyncio
from datetime import datetime, timedelta
from typing import Any

import pytest
from tests.factories import Client, World

from gpubroker.times import now

pytestmark = pytest.mark.anyio


async def patch(client: Client, agent_id: str, status: int = 200, **change: Any) -> Any:
    answer = await client.call("PATCH", f"/v1/agents/{agent_id}", json=change)
    assert answer.status_code == status, answer.text
    return answer.json()


# Changing


async def test_what_is_changed_is_changed_and_the_rest_stays(world: World):
    parent = await world.root.child(name="parent")
    made = await parent.post("/v1/agents", {"name": "n", "metadata": {"a": 1}, "scopes": ["pods:read", "offers:read"]})
    child = Client(made["key"]["key"], made["id"])
    before = await parent.get(f"/v1/agents/{child.agent_id}")
    assert await patch(parent, child.agent_id) == before
    renamed = await patch(parent, child.agent_id, name="m", metadata={"b": [2.5, None]})
    assert renamed == before | {"name": "m", "metadata": {"b": [2.5, None]}}
    narrowed = await patch(parent, child.agent_id, scopes=["pods:read"])
    assert narrowed["scopes"] == narrowed["effective_scopes"] == ["pods:read"]
    assert (await child.get("/v1/offers", 403))["scope"] == "offers:read"
    await patch(parent, child.agent_id, scopes=["offers:read", "pods:read"])
    await child.get("/v1/pods")
    ending = await patch(parent, child.agent_id, expires_in=60)
    assert abs(datetime.fromisoformat(ending["expires_at"]) - now() - timedelta(seconds=60)) < timedelta(seconds=20)
    assert (await patch(parent, child.agent_id, expires_in=None))["expires_at"] is None
    limited = await patch(parent, child.agent_id, limits={"max_pods": 3, "max_usd_per_hour": "2.5"})
    assert limited["limits"] == {"max_pods": 3, "max_usd_per_hour": "2.500000", "max_creates_per_minute": None}
    fewer = await patch(parent, child.agent_id, limits={"max_pods": None, "max_creates_per_minute": 9})
    assert fewer["limits"] == {"max_pods": None, "max_usd_per_hour": "2.500000", "max_creates_per_minute": 9}
    assert (await parent.get(f"/v1/agents/{child.agent_id}")) == fewer


async def test_a_change_is_refused_that_gives_more_than_there_is_above(world: World):
    parent = await world.root.child(scopes=["agents:write", "pods:read"], expires_in=3600)
    child = await parent.child(scopes=["pods:read", "agents:write"])
    await patch(
        world.root, parent.agent_id, limits={"max_pods": 5, "max_usd_per_hour": "10", "max_creates_per_minute": 7}
    )
    for change, pointer in (
        ({"scopes": ["pods:read", "usage:read"]}, "/scopes"), ({"expires_in": 3700}, "/expires_in"),
        ({"limits": {"max_pods": 6}}, "/limits/max_pods"), ({"limits": {"max_usd_per_hour": 10.5}}, "/limits/max_usd_per_hour"),
        ({"limits": {"max_creates_per_minute": 8}}, "/limits/max_creates_per_minute"),
    ):  # fmt: skip
        refused = await patch(parent, child.agent_id, 422, **change)
        assert (refused["code"], refused["errors"][0]["pointer"]) == ("exceeds_parent", pointer)
        raised = await patch(parent, parent.agent_id, 403, **change)
        assert raised["code"] == "forbidden"
    for change in ({"limits": {"max_pods": None}}, {"limits": {"max_usd_per_hour": None}}):
        await patch(parent, parent.agent_id, 403, **change)
    await patch(parent, parent.agent_id, limits={"max_pods": 4}, expires_in=3000, scopes=["agents:write", "pods:read"])
    narrow = await parent.post("/v1/keys", {"name": "n", "scopes": ["agents:write"]})
    powerless = await world.root.child(scopes=["pods:read"])
    wide = await world.root.child()
    below = await wide.child(name="below", scopes=["agents:write"])
    assert (await patch(below, below.agent_id, 403, scopes=["agents:write", "pods:read"]))["code"] == "forbidden"
    refused = await patch(Client(narrow["key"]["key"], ""), child.agent_id, 200, scopes=["pods:read"])
    assert refused["scopes"] == ["pods:read"]  # it had that: nothing is given anew
    assert (await patch(powerless, powerless.agent_id, 403, name="m"))["scope"] == "agents:write"


async def test_a_change_is_checked(world: World):
    child = await world.root.child()
    for change, pointer in (
        ({"name": ""}, "/name"), ({"scopes": ["pods"]}, "/scopes/0"), ({"expires_in": 0}, "/expires_in"),
        ({"grants": ["env"]}, "/grants/0"), ({"grants": ["logs", "logs"]}, "/grants"), ({"may_act": "agt_x"}, "/may_act"),
        ({"limits": {"max_pods": -1}}, "/limits/max_pods"), ({"limits": {"pods": 1}}, "/limits/pods"), ({"org_id": "x"}, "/org_id"),
        ({"budget": {"limit_usd": 1}}, "/budget"),
    ):  # fmt: skip
        refused = await patch(child, child.agent_id, 422, **change)
        assert pointer in [error["pointer"] for error in refused["errors"]], change
    assert (await patch(child, child.agent_id, 422, limits={"max_pod": 1}))["errors"][0]["did_you_mean"] == "max_pods"


# Ending


async def test_deleting_an_agent_ends_its_whole_subtree_and_its_pods_at_once(world: World):
    await world.use_final()
    agent, other = await world.root.child(name="agent"), await world.root.child(name="other")
    below = await (await agent.child(name="child")).child(name="grandchild")
    pods = [await world.run(client) for client in (agent, below, other)]
    waiting = asyncio.create_task(below.call("GET", f"/v1/pods/{pods[1]['id']}?wait=30&until=change"))
    await asyncio.sleep(0.1)
    ended = await world.root.delete(f"/v1/agents/{agent.agent_id}", 200)
    assert ended["revoked_at"] is not None
    # A look that was authenticated just before the end may see the end itself: nothing else is told.
    heard = await asyncio.wait_for(waiting, 5)
    assert heard.status_code == 401 or heard.json()["state"] == "terminating"
    for client, status in ((agent, 401), (below, 401), (other, 200)):
        assert (await client.call("GET", "/v1/whoami")).status_code == status
    await world.drive_due()
    states = [await world.root.get(f"/v1/pods/{pod['id']}") for pod in pods]
    assert [(s["state"], s["ends_because"]) for s in states] == [
        ("terminated", "agent_revoked"), ("terminated", "agent_revoked"), ("running", None),
    ]  # fmt: skip
    assert len(world.provider.alive()) == 1
    told = world.query("SELECT subject FROM event WHERE type = 'io.gpubroker.agent.revoked.v1'")
    assert len({row["subject"] for row in told}) == len(told) == 3
    assert (await world.root.delete(f"/v1/agents/{agent.agent_id}", 200))["revoked_at"] == ended["revoked_at"]
    assert len(world.query("SELECT 1 FROM event WHERE type = 'io.gpubroker.agent.revoked.v1'")) == 3


async def test_nobody_deletes_itself_the_root_or_what_is_not_below_it(world: World):
    parent = await world.root.child(name="parent")
    child, sibling = await parent.child(name="child"), await world.root.child(name="sibling")
    for client, target, status in (
        (parent, parent, 403), (world.root, world.root, 403), (child, parent, 404), (child, world.root, 404), (sibling, child, 404),
    ):  # fmt: skip
        await client.delete(f"/v1/agents/{target.agent_id}", status)
    assert {row["revoked_at"] for row in world.query("SELECT revoked_at FROM agent")} == {None}


# Keys


async def test_a_rotated_key_has_the_same_rights_and_the_old_one_lives_for_the_overlap(world: World):
    agent = await world.root.child()
    made = await agent.post("/v1/keys", {"name": "n", "scopes": ["pods:read"], "expires_in": 5000})
    old = Client(made["key"]["key"], agent.agent_id)
    rotated = await agent.post(f"/v1/keys/{made['id']}/rotate", {"overlap_seconds": 60})
    new = Client(rotated["key"]["key"], agent.agent_id)
    assert rotated["id"] == rotated["key"]["id"] != made["id"]
    for name in ("agent_id", "name", "scopes", "expires_at"):
        assert rotated[name] == made[name]
    assert [(await c.call("GET", "/v1/pods")).status_code for c in (old, new)] == [200, 200]
    (listed,) = [key for key in (await agent.get("/v1/keys"))["items"] if key["id"] == made["id"]]
    assert abs(datetime.fromisoformat(listed["expires_at"]) - now() - timedelta(seconds=60)) < timedelta(seconds=20)
    world.query("UPDATE key SET expires_at = clock_timestamp() WHERE id = %s", made["id"])
    assert [(await c.call("GET", "/v1/pods")).status_code for c in (old, new)] == [401, 200]
    at_once = await agent.post(f"/v1/keys/{rotated['id']}/rotate", {})
    assert [(await c.call("GET", "/v1/pods")).status_code for c in (new, Client(at_once["key"]["key"], ""))] == [
        401,
        200,
    ]


async def test_a_key_is_rotated_once_and_only_by_who_has_its_rights(world: World):
    agent = await world.root.child()
    made = await agent.post("/v1/keys", {"name": "n", "scopes": ["pods:read"]})
    path = f"/v1/keys/{made['id']}/rotate"
    narrow = Client(
        (await agent.post("/v1/keys", {"name": "n", "scopes": ["agents:write"]}))["key"]["key"], agent.agent_id
    )
    assert "pods:read" in (await narrow.post(path, {}, 403))["detail"]
    assert (await agent.post(path, {"overlap_seconds": 30 * 86400 + 1}, 422))["errors"][0][
        "pointer"
    ] == "/overlap_seconds"
    answers = await asyncio.gather(*(agent.call("POST", path, json={"overlap_seconds": 60}) for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409]
    revoked = await agent.post("/v1/keys", {"name": "n"})
    await agent.delete(f"/v1/keys/{revoked['id']}", 200)
    expired = await agent.post("/v1/keys", {"name": "n"})
    world.query("UPDATE key SET expires_at = clock_timestamp() WHERE id = %s", expired["id"])
    for key in (made, revoked, expired):
        assert (await agent.post(f"/v1/keys/{key['id']}/rotate", {}, 409))["code"] == "conflict"
    once = {"Idempotency-Key": "k"}
    fresh = await agent.post("/v1/keys", {"name": "n"})
    first, again = [
        await agent.post(f"/v1/keys/{fresh['id']}/rotate", {"overlap_seconds": 5}, headers=once) for _ in range(2)
    ]
    assert (again["id"], again["key"]) == (first["id"], {"id": first["id"], "key": None})
    assert again["next"][0]["path"] == f"/v1/keys/{first['id']}/rotate"


# Granting


async def test_logs_and_exec_are_their_owners_unless_it_grants_them(world: World):
    agent = await world.root.child(name="agent")
    below = await agent.child(name="below")
    pod = await world.run(agent)
    logs, run = f"/v1/logs/{pod['id']}", f"/v1/exec/{pod['id']}"

    async def may(client: Client) -> tuple[int, int]:
        read = await client.call("GET", logs)
        ran = await client.call("POST", run, json={"command": ["echo", "hi"]})
        return read.status_code, ran.status_code

    assert (await may(agent), await may(world.root), await may(below)) == ((200, 200), (403, 403), (404, 404))
    assert (await patch(world.root, agent.agent_id, 403, grants=["logs"]))["code"] == "forbidden"
    assert (await patch(agent, agent.agent_id, grants=["logs"]))["grants"] == ["logs"]
    assert (await may(world.root), await may(below)) == ((200, 403), (404, 404))
    await patch(agent, agent.agent_id, grants=["exec", "logs"])
    assert (await may(world.root), await may(below)) == ((200, 200), (404, 404))
    await patch(agent, agent.agent_id, grants=[])
    assert await may(world.root) == (403, 403)


# Limits


async def test_limits_count_the_whole_subtree_and_say_which_is_reached(world: World):
    agent = await world.root.child(name="agent")
    below = await agent.child(name="below")
    for limits, name in (
        ({"max_pods": 2}, "max_pods"), ({"max_usd_per_hour": "5"}, "max_usd_per_hour"),
        ({"max_creates_per_minute": 2}, "max_creates_per_minute"),
    ):  # fmt: skip
        none = {"max_pods": None, "max_usd_per_hour": None, "max_creates_per_minute": None}
        await patch(world.root, agent.agent_id, limits=none | limits)
        pods = [await client.pod(max_attempts=2) for client in (agent, below)]  # each counts as 2.50 an hour
        for client, limiting in ((agent, agent.agent_id), (below, None)):
            refused = await client.pod(409)
            assert (refused["code"], refused["limit"], refused["limiting_agent"]) == ("limit_reached", name, limiting)
            assert refused["next"][0] == {"method": "GET", "path": "/v1/limits"}
        used = (await agent.get("/v1/limits"))["agent"]
        assert used == {
            "agent_id": agent.agent_id, "pods": {"limit": limits.get("max_pods"), "used": 2},
            "usd_per_hour": {"limit": "5.000000" if name == "max_usd_per_hour" else None, "used": "5.000000"},
            "creates_per_minute": {"limit": limits.get("max_creates_per_minute"), "used": 2},
        }  # fmt: skip
        await agent.delete(f"/v1/pods?agent_id={agent.agent_id}")
        await below.delete(f"/v1/pods/{pods[1]['id']}")
        if name == "max_creates_per_minute":
            await agent.pod(409)  # what ended was created all the same
        await world.pass_time(minutes=1.1)
        await agent.delete(f"/v1/pods/{(await agent.pod())['id']}")
        await world.pass_time(minutes=1.1)
    organisation = (await below.get("/v1/limits"))["organisation"]
    assert (organisation["agent_id"], organisation["pods"]) == (world.root.agent_id, {"limit": None, "used": 0})
    world.check_money()


async def test_ten_at_once_under_a_limit_of_three_are_three(world: World):
    agent = await world.root.child()
    await patch(world.root, agent.agent_id, limits={"max_pods": 3})
    body = {"image": "b", "requirements": {"gpu": ["h100"]}, "max_lifetime_seconds": 60}
    answers = await asyncio.gather(*(agent.call("POST", "/v1/pods?duplicate=allow", json=body) for _ in range(10)))
    assert sorted(answer.status_code for answer in answers) == [202] * 3 + [409] * 7
    assert (await agent.get("/v1/limits"))["agent"]["pods"] == {"limit": 3, "used": 3}
