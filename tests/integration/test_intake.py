"""Commands that come as CloudEvents: every mode, once for ever, answered by events."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from tests.factories import Client, World

pytestmark = pytest.mark.anyio

PROVISION = "io.gpubroker.command.provision.v1"
TERMINATE = "io.gpubroker.command.terminate.v1"
POD = {"image": "busybox", "requirements": {"gpu": ["h100"]}, "max_lifetime_seconds": 600}


def event(event_id: str = "1", kind: str = PROVISION, data: Any = POD, **more: Any) -> dict[str, Any]:
    members = {"specversion": "1.0", "id": event_id, "source": "/ci", "type": kind, "data": data} | more
    return {name: value for name, value in members.items() if value is not None}


async def send(agent: Client, what: Any, mode: str = "structured") -> httpx.Response:
    if mode == "binary":
        headers = {f"ce-{name}": value for name, value in what.items() if name != "data"}
        return await agent.call("POST", "/v1/intake", json=what.get("data"), headers=headers)
    kind = "application/cloudevents-batch+json" if mode == "batch" else "application/cloudevents+json"
    return await agent.call("POST", "/v1/intake", content=json.dumps(what), headers={"Content-Type": kind})


async def taken(agent: Client, what: Any, mode: str = "structured") -> Any:
    answer = await send(agent, what, mode)
    assert answer.status_code == 202, answer.text
    return answer.json()["items"]


def told(world: World) -> list[tuple[str, Any]]:
    found = world.query("SELECT type, data FROM event WHERE type LIKE %s ORDER BY id", "%command%")
    return [(row["type"].split(".")[3], row["data"]) for row in found]


@pytest.mark.parametrize("mode", ["structured", "binary", "batch"])
async def test_a_command_is_carried_out_and_answered_by_an_event(world: World, mode: str) -> None:
    (answer,) = await taken(world.root, [event()] if mode == "batch" else event(), mode)
    assert (answer["id"], answer["source"], answer["status"], answer["replayed"]) == ("1", "/ci", "done", False)
    pod = await world.root.get(f"/v1/pods/{answer['pod_id']}")
    assert pod["state"] == "requested"
    ((kind, data),) = told(world)
    assert (kind, data["pod_id"], data["command_id"], data["command"]) == ("done", pod["id"], "1", "provision")
    await world.drive_due()
    assert (await world.root.get(f"/v1/pods/{pod['id']}"))["state"] == "running"
    for data_of_end in (None, {"pod_id": pod["id"]}):
        ending = (
            event("2", TERMINATE, data_of_end, subject=pod["id"])
            if data_of_end is None
            else event("3", TERMINATE, data_of_end)
        )
        (ended,) = await taken(world.root, ending)
        assert (ended["status"], ended["pod_id"]) == ("done", pod["id"])
    assert (await world.root.get(f"/v1/pods/{pod['id']}"))["state"] == "terminating"


async def test_a_command_is_carried_out_once_for_ever(world: World) -> None:
    first = (await taken(world.root, event()))[0]
    world.query("DELETE FROM idempotency")  # as after 48 hours
    again = (await taken(world.root, event(), "binary"))[0]
    assert again == first | {"replayed": True}
    assert len(world.query("SELECT id FROM pod")) == 1
    assert len(told(world)) == 1
    other = (await taken(world.root, event(source="/elsewhere")))[0]
    assert other["pod_id"] != first["pod_id"]
    changed = await send(world.root, event(data=POD | {"name": "x"}))
    assert (changed.status_code, changed.json()["code"]) == (422, "idempotency_key_reused")


async def test_of_many_at_once_one_is_carried_out(world: World) -> None:
    answers = await asyncio.gather(*(send(world.root, event()) for _ in range(8)))
    assert {answer.status_code for answer in answers} <= {202, 409}
    assert len(world.query("SELECT id FROM pod")) == 1
    assert (await taken(world.root, event()))[0]["replayed"]
    assert len(told(world)) == 1
    world.check_money()


async def test_a_death_between_effect_and_answer_makes_no_second_pod(world: World) -> None:
    (first,) = await taken(world.root, event())
    world.query("UPDATE command SET status = NULL, pod_id = NULL")
    (again,) = await taken(world.root, event())
    assert (again["pod_id"], again["status"]) == (first["pod_id"], "done")
    world.query("UPDATE command SET status = NULL, pod_id = NULL")
    world.query("DELETE FROM idempotency")
    (late,) = await taken(world.root, event())
    assert (late["pod_id"], late["status"]) == (None, "done")
    assert len(world.query("SELECT id FROM pod")) == 1


async def test_what_is_refused_for_good_is_refused_once(world: World) -> None:
    agent = await world.root.child(budget={"limit_usd": "0.01"})
    (poor,) = await taken(agent, event())
    assert (poor["status"], poor["code"], poor["pod_id"]) == ("refused", "budget_exhausted", None)
    await world.root.put(f"/v1/budgets/{agent.agent_id}", {"limit_usd": "10", "period": "total"})
    assert (await taken(agent, event()))[0] == poor | {"replayed": True}, (
        "what was refused does not happen later by surprise"
    )
    items = await taken(
        agent, [event("2", data={"image": "x"}), event("3", TERMINATE, {"pod_id": "pod_none"}), event("4")], "batch"
    )
    assert [(item["status"], item["code"]) for item in items] == [
        ("refused", "invalid"),
        ("refused", "not_found"),
        ("done", None),
    ]
    assert [kind for kind, _ in told(world)] == ["refused", "refused", "refused", "done"]


async def test_who_may_not_is_told_nothing(world: World) -> None:
    nobody = await Client("gbk_nothing", "").call("POST", "/v1/intake", content=b"{")
    assert nobody.status_code == 401
    reader = await world.root.child(scopes=["pods:read", "pods:write"])
    assert (await send(reader, event())).status_code == 403
    sender = await world.root.child(scopes=["events:write"])
    refused = await send(sender, event())
    assert (refused.status_code, refused.json()["scope"]) == (403, "pods:write")
    mine = (await taken(world.root, event()))[0]
    stranger = await world.root.child(scopes=["events:write", "pods:write", "pods:read"], budget={"limit_usd": "5"})
    (other,) = await taken(stranger, event("9", TERMINATE, {"pod_id": mine["pod_id"]}))
    assert other["code"] == "not_found", "of a pod that is none of its own it learns nothing"


@pytest.mark.parametrize(
    ("what", "mode"),
    [
        (event(specversion="0.3"), "structured"), (event(id=""), "structured"), ({}, "structured"), ([], "structured"),
        ({}, "batch"), ([{}], "batch"), ([event()] * 101, "batch"), (event(kind="io.gpubroker.pod.requested.v1"), "structured"),
    ],
)  # fmt: skip
async def test_what_is_no_command_is_said(world: World, what: Any, mode: str) -> None:
    answer = await send(world.root, what, mode)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid")
    assert world.query("SELECT id FROM pod") == []
