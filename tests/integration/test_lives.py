"""How pods live and end: warned, idle, exited, taken away, remembered; their history and their logs."""

import asyncio
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from tests.factories import World
from tests.simulator import OFFERS, Final

from gpubroker import terminals

pytestmark = pytest.mark.anyio


async def show(world: World, pod: dict[str, Any]) -> dict[str, Any]:
    return await world.root.get(f"/v1/pods/{pod['id']}")


async def history(world: World, pod: dict[str, Any], limit: int = 200) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    cursor: dict[str, str] | None = {}
    while cursor is not None:
        page = await world.root.get(f"/v1/pods/{pod['id']}/events", params={"limit": limit} | cursor)
        items += page["items"]
        cursor = {"cursor": page["next_cursor"]} if page["next_cursor"] else None
    return items


# Ends


@pytest.mark.parametrize(("life", "before"), [(7200, 300), (3000, 300), (600, 60), (100, 10)])
async def test_the_end_is_told_five_minutes_or_a_tenth_of_the_life_before_it_once(world: World, life: int, before: int):
    await world.use_final()
    pod = await world.run(world.root, max_lifetime_seconds=life)

    def told() -> int:
        return len(world.query("SELECT 1 FROM event WHERE type = 'io.gpubroker.pod.expiring.v1'"))

    await world.pass_time(seconds=life - before - 3)
    await world.tick()
    assert told() == 0
    await world.pass_time(seconds=4)
    await world.tick()
    await world.tick()
    assert told() == 1
    if life == 7200:  # a new end is told anew
        await world.root.post(f"/v1/pods/{pod['id']}/extend", {"max_lifetime_seconds": life + 3600}, 200)
        await world.tick()
        assert told() == 1
        await world.pass_time(hours=1)
        await world.tick()
        assert told() == 2
    await world.pass_time(seconds=before + 4)
    await world.tick()
    ended = await show(world, pod)
    assert (ended["state"], ended["ends_because"]) == ("terminated", "lifetime")
    world.check_money()


async def test_a_pod_ends_for_the_budget_when_that_chose_its_lifetime(world: World):
    await world.use_final()
    agent = await world.root.child(budget={"limit_usd": "0.5"})
    paid, asked, longer = [
        await world.run(agent, max_lifetime_seconds=life, budget_usd="0.1", max_attempts=1) for life in (None, 60, None)
    ]
    for pod in (paid, longer):
        life = datetime.fromisoformat(pod["expires_at"]) - datetime.fromisoformat(pod["created_at"])
        assert timedelta(seconds=100) < life < timedelta(seconds=200)
    extension = {"budget_usd": "0.2", "max_lifetime_seconds": 240}
    await agent.post(f"/v1/pods/{longer['id']}/extend", extension, 200)
    await world.pass_time(seconds=250)
    await world.tick()
    assert [(await show(world, pod))["ends_because"] for pod in (paid, asked, longer)] == [
        "budget",
        "lifetime",
        "lifetime",
    ]


async def test_a_pod_that_its_agent_forgets_ends_after_its_idle_timeout(world: World):
    await world.use_final()
    agent = await world.root.child()
    pod = await world.run(agent, idle_timeout_seconds=60, max_lifetime_seconds=3600)
    other = await world.run(agent, max_lifetime_seconds=3600)
    for call in (
        ("GET", f"/v1/pods/{pod['id']}"), ("GET", f"/v1/logs/{pod['id']}"), ("POST", f"/v1/exec/{pod['id']}"),
    ):  # fmt: skip
        await world.pass_time(seconds=50)
        await world.tick()
        assert (await agent.call(*call, json={"command": ["a"]} if call[0] == "POST" else None)).status_code == 200
    await world.pass_time(seconds=50)
    assert (await show(world, pod))["state"] == "running"  # an agent above looks: that is not its own call
    await world.pass_time(seconds=12)
    await world.tick()
    ended = await show(world, pod)
    assert (ended["state"], ended["ends_because"], ended["state_reason"]) == ("terminated", "lifetime", "idle for 60 s")
    assert (await show(world, other))["state"] == "running"
    seconds = (await agent.get(f"/v1/usage?pod_id={pod['id']}"))["total"]["seconds"]
    assert 209 <= seconds <= 225


async def test_a_program_that_ends_stops_ends_or_restarts_its_pod_as_it_was_asked_to(world: World):
    await world.use_final()
    kept, ended, again = [
        await world.run(world.root, command=["x"], **more)
        for more in ({}, {"on_exit": "terminate"}, {"restart_policy": "always"})
    ]
    await world.pass_time(seconds=30)
    for number in (1, 2, 3):
        world.provider.halt(f"i-{number}", exit_code=3)
    await world.tick()
    shown = [await show(world, pod) for pod in (kept, ended, again)]
    assert [(p["state"], p["exit_code"], p["ends_because"]) for p in shown[:2]] == [
        ("stopped", 3, None), ("terminated", 3, "exited"),
    ]  # fmt: skip
    await world.pass_time(seconds=5)
    await world.tick()
    assert [(await show(world, pod))["state"] for pod in (kept, again)] == ["stopped", "running"]
    assert [world.provider.count("start", f"i-{number}") for number in (1, 2, 3)] == [0, 0, 1]
    assert (await show(world, again))["exit_code"] is None


async def test_what_was_taken_away_comes_back_where_that_is_wanted(world: World):
    await world.use_final()
    pods = [
        await world.run(world.root, command=["x"], max_lifetime_seconds=3600, **more)
        for more in ({}, {"on_exit": "terminate"}, {"restart_policy": "on_interrupt"}, {"restart_policy": "always"})
    ]
    for number in (1, 2, 3):
        world.provider.halt(f"i-{number}", life="interrupted")
    world.provider.end("i-4")  # nothing is left of it
    await world.tick()
    assert [(await show(world, pod))["state"] for pod in pods[:2]] == ["interrupted", "terminated"]
    assert (await show(world, pods[1]))["ends_because"] == "interrupted"
    for _ in range(3):
        await world.pass_time(seconds=6)
        await world.tick()
    assert [(await show(world, pod))["state"] for pod in pods] == ["interrupted", "terminated", "running", "running"]
    assert world.provider.count("start", "i-3") == 1
    assert (await show(world, pods[3]))["provider_instance_id"] == "i-5"
    for pod in pods:
        await world.root.delete(f"/v1/pods/{pod['id']}", 200 if pod is pods[1] else 202)
    await world.tick()
    assert world.provider.alive() == []
    world.check_money()


# History


async def test_a_history_is_every_state_attempt_and_charge_in_order_with_times_and_causes(world: World):
    world.provider = Final()
    world.provider.offers = [replace(offer, stopped_micro_h=0) for offer in OFFERS]
    await world.use(world.provider)
    world.provider.fail["create"] = ["no_capacity"]
    pod = await world.run(world.root, max_lifetime_seconds=3600)
    await world.pass_time(minutes=5)
    await world.tick()
    await world.root.post(f"/v1/pods/{pod['id']}/stop", status=202)
    await world.drive_due()
    await world.root.delete(f"/v1/pods/{pod['id']}")
    await world.drive_due()
    events = await history(world, pod)
    assert [event["at"] for event in events] == sorted(event["at"] for event in events)
    assert await history(world, pod, limit=1) == events
    what = [event["what"] for event in events]
    states = ["requested", "creating", "running", "action-requested", "stopped", "terminating", "terminated"]
    assert [name for name in what if name.startswith("pod.")] == [f"pod.{state}" for state in states]
    attempts = [event for event in events if event["kind"] == "attempt"]
    assert [(event["what"], event["data"]["code"]) for event in attempts] == [
        ("attempt.rejected", "no_capacity"), ("attempt.created", None),
    ]  # fmt: skip
    charges = [event for event in events if event["kind"] == "charge"]
    assert {event["what"] for event in charges} <= {"charge.usage", "charge.minimum"}
    charged = sum(Decimal(event["data"]["amount_usd"]) for event in charges)
    assert charged == Decimal((await show(world, pod))["spent_usd"]) > 0
    assert next(event for event in events if event["what"] == "pod.terminated")["data"]["ends_because"] == "requested"
    assert all(event["at"].endswith("Z") for event in events)


# Logs


async def test_a_log_is_read_by_its_last_lines_and_stays_after_the_end(world: World):
    await world.use_final()
    pod = await world.run(world.root)
    path = f"/v1/logs/{pod['id']}"
    answer = await world.root.call("GET", path)
    assert (answer.headers["content-type"], answer.text) == ("text/plain; charset=utf-8", "line 1\nline 2\n")
    assert [await world.root.get(f"{path}?tail={n}") for n in (0, 1, 2)] == ["", "line 2\n", "line 1\nline 2\n"]
    await world.root.delete(f"/v1/pods/{pod['id']}")
    await world.drive_due()
    ended = await show(world, pod)
    assert (ended["state"], ended["allowed_actions"]) == ("terminated", ["logs"])
    assert await world.root.get(path) == "line 1\nline 2\n"
    assert await world.root.get(f"{path}?tail=1") == "line 2\n"
    assert await world.root.get(path, params={"since": pod["created_at"]}) == "line 1\nline 2\n"
    assert await world.root.get(path, params={"since": ended["terminated_at"]}) == ""
    for query, pointer in (
        ("tail=-1", "?tail"),
        ("tail=100001", "?tail"),
        ("since=today", "?since"),
        ("follow=1", "?follow"),
    ):
        refused = await world.root.get(f"{path}?{query}", 422)
        assert refused["errors"][0]["pointer"] == pointer


async def test_the_last_mebibyte_of_a_log_is_kept(world: World):
    provider = await world.use_final()
    text = b"".join(b"%07d\n" % n for n in range(200_000))

    async def long(instance_id: str, *, after: int | None, since: datetime | None, limit: int) -> Any:
        return terminals.base.LogPage(len(text) - limit, text[-limit:])

    provider.logs = long  # type: ignore[method-assign]
    pod = await world.run(world.root)
    await world.root.delete(f"/v1/pods/{pod['id']}")
    await world.drive_due()
    kept = await world.root.get(f"/v1/logs/{pod['id']}?tail=100000")
    assert kept.encode() == text[-100_000 * 8 :]
    whole = await world.root.call("GET", f"/v1/logs/{pod['id']}?follow=true", headers={"Last-Event-ID": "0"})
    lines = [line for line in whole.text.splitlines() if line.startswith("data: ")]
    assert len(lines) == 1024 * 1024 // 8


async def test_a_followed_log_is_events_whose_ids_go_on_where_another_stream_ended(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    await world.use_final()
    pod = await world.run(world.root)
    path = f"/v1/logs/{pod['id']}?follow=true"
    monkeypatch.setattr(terminals, "_FOLLOW_SECONDS", 0.6)
    monkeypatch.setattr(terminals, "_HEARTBEAT_SECONDS", 0.0)
    running = await world.root.call("GET", path)
    assert running.headers["content-type"].startswith("text/event-stream")
    assert running.headers["Cache-Control"] == "no-store"
    begins = "retry: 1000\n\nid: 7\ndata: line 1\n\nid: 14\ndata: line 2\n\n"
    assert running.text.startswith(begins)
    assert set(running.text.removeprefix(begins).split("\n\n")) == {": alive", ""}
    for resume, text in (("7", "id: 14\ndata: line 2\n\n"), ("14", ""), ("0", begins.removeprefix("retry: 1000\n\n"))):
        answer = await world.root.call("GET", f"{path}&tail=0", headers={"Last-Event-ID": resume})
        assert answer.text.removeprefix("retry: 1000\n\n").replace(": alive\n\n", "") == text
    assert "line 1" not in (await world.root.call("GET", f"{path}&tail=1")).text
    for odd in ("x", "-1", "9" * 19):
        refused = await world.root.call("GET", path, headers={"Last-Event-ID": odd})
        assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "Last-Event-ID")
    await world.root.delete(f"/v1/pods/{pod['id']}")
    await world.drive_due()
    monkeypatch.setattr(terminals, "_FOLLOW_SECONDS", 300)
    monkeypatch.setattr(terminals, "_HEARTBEAT_SECONDS", 15)
    ended = await asyncio.wait_for(world.root.call("GET", path), 10)
    assert ended.text == begins + "event: end\ndata:\n\n"


# Commands


async def test_a_command_runs_in_a_running_pod_alone(world: World):
    await world.use_final()
    pod = await world.run(world.root)
    path = f"/v1/exec/{pod['id']}"
    answer = await world.root.post(path, {"command": ["echo", "a"], "stdin": "b", "timeout_seconds": 300}, 200)
    assert answer == {"exit_code": 0, "stdout": "echo ab", "stderr": "", "truncated": False, "duration_ms": 3}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "/command"), ({"command": []}, "/command"), ({"command": "ls"}, "/command"), ({"command": ["a"], "tty": True}, "/tty"),
        ({"command": ["a"], "timeout_seconds": 301}, "/timeout_seconds"),
        ({"command": ["a"], "timeout_seconds": 0}, "/timeout_seconds"),
        ({"command": ["a"], "stdin": 5}, "/stdin"),
    ]  # fmt: skip
    for body, pointer in wrong:
        refused = await world.root.post(path, body, 422)
        assert refused["errors"][0]["pointer"] == pointer, body
    world.provider.fail["exec"] = [TimeoutError()]
    failed = await world.root.post(path, {"command": ["a"]}, 502)
    assert (failed["code"], failed["retryable"]) == ("provider_failed", True)
    await world.root.post(f"/v1/pods/{pod['id']}/stop", status=202)
    for _ in range(2):
        refused = await world.root.post(path, {"command": ["a"]}, 409)
        assert refused["code"] == "not_running"
        assert refused["next"][0]["method"] == "GET"
        await world.drive_due()
