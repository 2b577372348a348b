"""DESIGN 6: whatever dies, and at whatever moment, ticks settle it, with no instance lost and no second billed twice."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.factories import Client, World
from tests.faults.fuse import Cut, Fuse, Killed, check_all_ended, check_bill, check_instances, drive, heal, rent_from
from tests.simulator import OFFERS, Final, Simulated

from gpubroker.provisioning import Driver

pytestmark = pytest.mark.anyio

MOST_POINTS = 60
LIFE = 40 * 24 * 3600


async def make(world: World, agent: Client) -> str:
    pod = await agent.pod(max_lifetime_seconds=LIFE, max_attempts=5)
    return pod["id"]


async def make_running(world: World, agent: Client) -> str:
    pod_id = await make(world, agent)
    assert await drive(world, pod_id)
    return pod_id


async def make_stopped(world: World, agent: Client) -> str:
    pod_id = await make_running(world, agent)
    await agent.post(f"/v1/pods/{pod_id}/stop", status=202)
    assert await drive(world, pod_id)
    return pod_id


def action(name: str, body: dict[str, Any] | None = None) -> Callable[[World, Client, str], Awaitable[None]]:
    async def want(world: World, agent: Client, pod_id: str) -> None:
        answer = await agent.call("POST", f"/v1/pods/{pod_id}/{name}", json=body)
        assert answer.is_success, answer.text

    return want


async def nothing(world: World, agent: Client, pod_id: str) -> None:
    """What is wanted is wanted already."""


async def delete(world: World, agent: Client, pod_id: str) -> None:
    await agent.delete(f"/v1/pods/{pod_id}")


async def a_rejection(world: World, agent: Client, pod_id: str) -> None:
    world.provider.fail["create"] = ["no_capacity"]


async def an_answer_that_was_lost(world: World, agent: Client, pod_id: str) -> None:
    world.provider.fail["create"] = ["timeout"]


async def a_boot_that_never_ends(world: World, agent: Client, pod_id: str) -> None:
    world.provider.boots_at_once = False
    assert await drive(world, pod_id)
    await world.pass_time(seconds=700)
    world.provider.boots_at_once = True


STEPS: dict[str, tuple[Any, Any, str]] = {
    "create": (make, nothing, "running"),
    "create after a rejection": (make, a_rejection, "running"),
    "create whose answer is lost": (make, an_answer_that_was_lost, "running"),
    "fail over": (make, a_boot_that_never_ends, "running"),
    "stop": (make_running, action("stop"), "stopped"),
    "start": (make_stopped, action("start"), "running"),
    "restart": (make_running, action("restart"), "running"),
    "extend": (make_running, action("extend", {"max_lifetime_seconds": 2 * LIFE}), "running"),
    "terminate": (make_running, delete, "terminated"),
    "terminate what is stopped": (make_stopped, delete, "terminated"),
    "terminate what was never tried": (make, delete, "terminated"),
}


OF_VENDORS = ("create", "create whose answer is lost", "fail over", "stop", "terminate")
"""The steps in which a provider without final answers needs other evidence."""


@pytest.mark.parametrize(
    ("step", "provider"), [(step, Final) for step in STEPS] + [(step, Simulated) for step in OF_VENDORS]
)
async def test_a_driver_may_die_at_every_point_of_every_step(
    world: World, step: str, provider: type[Simulated]
) -> None:
    """One pod for each point: the driver dies there, time passes, and then the ticks settle all of them."""
    prepare, want, state = STEPS[step]
    await rent_from(world, provider())
    pods: list[str] = []
    for at in range(1, MOST_POINTS):
        pod_id = await prepare(world, world.root)
        await want(world, world.root, pod_id)
        fuse = Fuse(at)
        pods.append(pod_id)
        if await drive(world, pod_id, fuse):
            break
        world.provider.fail.clear()
    else:
        raise AssertionError(f"{step} passes more than {MOST_POINTS} points")
    await heal(world, ticks=4)
    states = {row["id"]: row["state"] for row in world.query("SELECT id, state FROM pod")}
    assert {*states.values()} == {state}, {pod_id: s for pod_id, s in states.items() if s != state}
    check_instances(world, {*pods} if state == "running" else None)
    if step == "extend":
        stops = world.query(
            "SELECT DISTINCT i.hard_stop_at = p.hard_stop_at AS told FROM pod p JOIN instance i ON i.pod_id = p.id"
        )
        assert stops == [{"told": True}]
    if step == "restart":
        assert all(world.provider.count("restart", i) >= 1 for i in world.provider.rented)
    for pod_id in pods:
        await world.root.delete(f"/v1/pods/{pod_id}", status=200 if state == "terminated" else 202)
    await heal(world, ticks=6, seconds=240)  # as long as a create that was never answered may still come true
    check_all_ended(world)
    if provider is Final:
        check_bill(world)


async def every_moment(world: World, step: str, then: Callable[[str], Awaitable[Any]]) -> list[str]:
    """One pod for each moment of a step at which something else happens; the driver goes on after it."""
    prepare, want, _ = STEPS[step]
    pods: list[str] = []
    for at in range(1, MOST_POINTS):
        pod_id = await prepare(world, world.root)
        await want(world, world.root, pod_id)
        pods.append(pod_id)
        if await drive(world, pod_id, Fuse(at, lambda pod_id=pod_id: then(pod_id))):
            return pods
        world.provider.fail.clear()
    raise AssertionError(f"{step} has more than {MOST_POINTS} moments")


@pytest.mark.parametrize("step", ["create", "create whose answer is lost", "create after a rejection", "stop", "start"])
async def test_a_delete_at_every_moment_of_a_step_loses_no_instance(world: World, step: str) -> None:
    await rent_from(world, Final())
    pods = await every_moment(world, step, lambda pod_id: world.root.delete(f"/v1/pods/{pod_id}"))
    await world.root.delete(f"/v1/pods/{pods[-1]}")
    await heal(world, ticks=5, seconds=240)
    check_all_ended(world)
    check_bill(world)


@pytest.mark.parametrize("step", ["create", "stop", "restart", "terminate"])
async def test_a_tick_at_every_moment_of_a_step_does_nothing_twice(world: World, step: str) -> None:
    await rent_from(world, Simulated() if step == "create" else Final())
    pods = await every_moment(world, step, lambda pod_id: world.tick())
    await heal(world)
    assert world.provider.count("create") == len(pods)
    for instance in world.provider.rented:
        assert world.provider.count("restart", instance) == (step == "restart")
        assert world.provider.count("stop", instance) == (step == "stop")
    check_instances(world, {*pods} if step in ("create", "restart") else None)
    world.check_money()


@pytest.mark.parametrize("step", ["create", "create after a rejection", "create whose answer is lost", "terminate"])
async def test_a_driver_that_sleeps_at_any_moment_and_wakes_long_after_others_did_its_work_harms_nothing(
    world: World, step: str
) -> None:
    await rent_from(world, Final())
    pods = await every_moment(world, step, lambda pod_id: heal(world, ticks=2, seconds=40))
    await heal(world, ticks=2)
    states = {row["id"]: row["state"] for row in world.query("SELECT id, state FROM pod")}
    assert {*states.values()} == {STEPS[step][2]}, states
    check_instances(world, {*pods} if step != "terminate" else None)
    for pod_id in pods:
        await world.root.delete(f"/v1/pods/{pod_id}", status=200 if step == "terminate" else 202)
    await heal(world, ticks=5, seconds=240)
    check_all_ended(world)
    check_bill(world)


async def test_a_sweep_may_die_at_every_point(world: World) -> None:
    """Every round leaves a duplicate, an instance of an unknown reference and one of a create that was given up."""
    await rent_from(world, Final())
    fuse = Fuse(1)
    for at in range(1, 3 * MOST_POINTS):
        pod_id = await make(world, world.root)
        world.provider.fail["create"] = ["twice"]
        assert await drive(world, pod_id)
        world.provider.bear(f"gb-{world.owner}-01m8unknown{at}-zzzzzz", OFFERS[0])
        fuse = Fuse(at)
        with fuse.lit(world), contextlib.suppress(Killed):
            await world.sweep()
        if not fuse.is_blown:
            break
        await world.pass_time(seconds=130)  # as long as nobody else begins a sweep of this account
        await world.root.delete(f"/v1/pods/{pod_id}")
        if at % 2 == 0:  # more unknown references than three are a database that was restored
            await heal(world, ticks=2, seconds=610)
    assert not fuse.is_blown
    assert len(fuse.passed) > 20
    await heal(world, ticks=3, seconds=700)
    check_instances(world, {pod_id})
    await world.root.delete(f"/v1/pods/{pod_id}")
    await heal(world)
    check_all_ended(world)


@pytest.mark.parametrize("step", ["create", "terminate"])
async def test_a_driver_may_be_cancelled_at_every_await(world: World, step: str) -> None:
    """As a shutdown does it: in the middle of a query, of a connection's turn, of a call."""
    prepare, want, state = STEPS[step]
    await rent_from(world, Final())
    pods: list[str] = []
    for at in range(1, 400, 3):
        pods.append(await prepare(world, world.root))
        await want(world, world.root, pods[-1])
        cut = Cut(Driver(world.adapters).drive(pods[-1]), at)
        with contextlib.suppress(asyncio.CancelledError):
            await cut
        if cut.suspensions < at:
            break
    else:
        raise AssertionError("the step has no end")
    assert len(pods) > 5
    await heal(world, ticks=4)
    assert {row["state"] for row in world.query("SELECT state FROM pod")} == {state}
    check_instances(world, {*pods} if state == "running" else None)
    for pod_id in pods:
        await world.root.delete(f"/v1/pods/{pod_id}", status=200 if state == "terminated" else 202)
    await heal(world, ticks=5, seconds=240)
    check_all_ended(world)
    check_bill(world)


async def test_a_caller_whose_request_died_at_any_await_retries_and_has_one_pod_and_one_hold(world: World) -> None:
    await rent_from(world, Final())
    body = {"image": "busybox", "requirements": {"gpu": ["h100"]}, "max_lifetime_seconds": 600}
    requests = 0
    for at in range(1, 400, 2):
        requests += 1
        headers = {"Idempotency-Key": f"request-{at}"}
        cut = Cut(world.root.call("POST", "/v1/pods", json=body, headers=headers), at)
        with contextlib.suppress(asyncio.CancelledError):
            await cut
        again = await world.root.post("/v1/pods", body, 202, headers=headers)
        once_more = await world.root.post("/v1/pods", body, 202, headers=headers)
        assert again["id"] == once_more["id"]
        if cut.suspensions < at:
            break
    else:
        raise AssertionError("the request has no end")
    assert requests > 5
    assert world.query("SELECT count(*)::int AS n FROM pod") == [{"n": requests}]
    assert world.query("SELECT count(*)::int AS n, count(DISTINCT pod_id)::int AS pods FROM hold") == [
        {"n": requests, "pods": requests}
    ]
    world.check_money()
    await world.tick()
    assert len(world.provider.alive()) == requests
    check_instances(world)


async def test_what_was_never_published_is_done_by_the_tick(world: World) -> None:
    """There is no Broker in this world at all."""
    await world.use_final()
    pod = await world.root.pod()
    await world.tick()
    assert (await world.root.get(f"/v1/pods/{pod['id']}"))["state"] == "running"
    for action_name, state in (("stop", "stopped"), ("start", "running")):
        await world.root.post(f"/v1/pods/{pod['id']}/{action_name}", status=202)
        await world.tick()
        assert (await world.root.get(f"/v1/pods/{pod['id']}"))["state"] == state
    await world.root.delete(f"/v1/pods/{pod['id']}")
    await world.tick()
    check_all_ended(world)
