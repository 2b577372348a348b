"""An agent's session through all layers: request, drive, act, bill."""

import json
import re
from decimal import Decimal

import pytest
from tests.factories import World

pytestmark = pytest.mark.anyio


async def test_a_pod_runs_and_is_billed_to_the_second(world: World) -> None:
    await world.freeze()
    await world.use_final()
    agent = await world.root.child(budget={"limit_usd": "10"})
    pod = await world.run(agent, max_lifetime_seconds=3600)
    assert pod["state"] == "running"
    assert pod["price_usd_per_hour"] == "2.000000"
    await world.pass_time(minutes=30)
    await world.tick()
    seen = await agent.get(f"/v1/pods/{pod['id']}")
    assert seen["spent_usd"] in ("1.000000", "1.000555")
    await agent.delete(f"/v1/pods/{pod['id']}")
    await world.drive_due()
    ended = await agent.get(f"/v1/pods/{pod['id']}")
    assert (ended["state"], ended["ends_because"]) == ("terminated", "requested")
    assert world.provider.alive() == []
    usage = await agent.get("/v1/usage")
    ran = sum(r.ran_seconds(0) for r in world.provider.rented.values())
    assert abs(usage["total"]["seconds"] - ran) < 1
    budget = (await agent.get("/v1/budgets"))["items"][0]
    assert budget["held_usd"] == "0.000000"
    assert budget["spent_usd"] == usage["total"]["amount_usd"] == ended["spent_usd"]
    world.check_money()


async def test_stop_keeps_the_disk_and_bills_storage(world: World) -> None:
    await world.freeze()
    await world.use_final()
    agent = await world.root.child(budget={"limit_usd": "10"})
    pod = await world.run(agent, max_lifetime_seconds=7200)
    path = f"/v1/pods/{pod['id']}"
    await world.pass_time(minutes=10)
    stopped = await agent.post(f"{path}/stop", status=202)
    assert stopped["state"] == "stopping"
    await world.drive_due()
    assert (await agent.get(path))["state"] == "stopped"
    await world.pass_time(minutes=30)
    await agent.post(f"{path}/start", status=202)
    await world.drive_due()
    assert (await agent.get(path))["state"] == "running"
    await world.pass_time(minutes=10)
    await agent.delete(path)
    await world.drive_due()
    rows = (await agent.get("/v1/usage/records"))["items"]
    by_billing = {
        billing: sum(r["seconds"] for r in rows if r["billing"] == billing) for billing in ("full", "storage")
    }
    assert by_billing["full"] in (1199, 1200, 1201)
    assert by_billing["storage"] in (1799, 1800, 1801)
    world.check_money()


async def test_a_vendor_needs_more_evidence_that_an_instance_is_gone(world: World) -> None:
    pod = await world.run(world.root)
    await world.root.delete(f"/v1/pods/{pod['id']}")
    await world.drive_due()
    assert (await world.root.get(f"/v1/pods/{pod['id']}"))["state"] == "terminating"
    await world.end(pod["id"])
    world.check_money()


async def test_the_history_tells_every_state_attempt_and_charge_in_order(world: World) -> None:
    await world.use_final()
    agent = await world.root.child(budget={"limit_usd": "10"})
    pod = await world.run(agent)
    await world.pass_time(minutes=10)
    await agent.delete(f"/v1/pods/{pod['id']}")
    await world.drive_due()
    found = (await agent.get(f"/v1/pods/{pod['id']}/events"))["items"]
    told = [event["what"] for event in found if event["kind"] != "charge"]
    assert told == [
        "pod.requested",
        "attempt.created",
        "pod.creating",
        "pod.running",
        "pod.terminating",
        "pod.terminated",
    ]
    charged = sum(Decimal(event["data"]["amount_usd"]) for event in found if event["kind"] == "charge")
    assert charged == Decimal((await agent.get(f"/v1/pods/{pod['id']}"))["spent_usd"]) > 0
    moments = [value for event in found for value in re.findall(r'"(\d{4}-\d\d-\d\dT[^"]*)"', json.dumps(event))]
    assert all(moment.endswith("Z") for moment in moments)
    assert [event["at"] for event in found] == sorted(event["at"] for event in found)
    paged, cursor = [], ""
    while cursor is not None:
        page = await agent.get(f"/v1/pods/{pod['id']}/events?limit=2" + (f"&cursor={cursor}" if cursor else ""))
        paged, cursor = paged + page["items"], page["next_cursor"]
    assert paged == found


async def test_every_change_that_is_seen_has_a_version_of_its_own(world: World) -> None:
    """Whoever waits for a change waits for the version."""
    await world.use_final()
    pod = await world.root.pod()
    path, seen = f"/v1/pods/{pod['id']}", {pod["version"]: pod["state"]}
    for action in ("", "stop", "start", "restart", "restart"):
        if action:
            asked = await world.root.post(f"{path}/{action}", status=202)
            assert asked["version"] > max(seen), f"{action}: {asked['state']}"
            seen[asked["version"]] = asked["state"]
        await world.drive_due()
        now = await world.root.get(path)
        assert now["version"] > max(seen), f"{action}: {now['state']} after {seen}"
        seen[now["version"]] = now["state"]
    assert list(seen.values()) == [
        "requested", "running", "stopping", "stopped", "starting", "running", "starting", "running", "starting", "running",
    ]  # fmt: skip
    world.provider.obscure.add("i-1")
    await world.tick()
    assert (await world.root.get(path))["version"] > max(seen)
