"""What users of GPU brokers suffer from, by its number in shared/facts/field.md: each a promise that is kept here.

Not yet: 3 (the dead man's switch), 18 (credentials per tenant), 20 (notifications) and 24 (idle streams) belong to later parts.
"""

import asyncio
import contextlib
import time
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from tests.factories import World
from tests.faults.fuse import Fuse, Killed, check_all_ended, check_bill, check_instances, drive, heal, rent_from
from tests.simulator import OFFERS, Broken, Final, Simulated

from gpubroker import catalog, metering, reconciling
from gpubroker.errors import Rejected
from gpubroker.providers import base
from gpubroker.provisioning import Driver

pytestmark = pytest.mark.anyio

LIFE = 36_000
PRICE = 2_000_000


async def start_pod(world: World, **request: Any) -> str:
    pod = await world.run(world.root, **({"max_lifetime_seconds": LIFE, "max_attempts": 5} | request))
    return pod["id"]


async def show(world: World, pod_id: str) -> Any:
    return await world.root.get(f"/v1/pods/{pod_id}")


def posted(world: World, account: str) -> int:
    return world.query("SELECT coalesce(sum(amount_micro), 0)::bigint AS s FROM ledger WHERE account = %s", account)[0][
        "s"
    ]


async def test_01_a_crash_between_the_create_and_its_commit_loses_no_instance(world: World) -> None:
    await rent_from(world, Simulated())
    pod = await world.root.pod(max_lifetime_seconds=LIFE)
    fuse = Fuse()
    await drive(world, pod["id"], fuse)
    at = fuse.passed.index("create is not answered") + 1
    pod = await world.root.pod(max_lifetime_seconds=LIFE)
    assert not await drive(world, pod["id"], Fuse(at))
    assert world.query("SELECT 1 FROM instance WHERE pod_id = %s", pod["id"]) == []
    assert len(world.provider.alive()) == 2
    await heal(world, ticks=2)
    assert world.provider.count("create") == 2
    assert (await show(world, pod["id"]))["state"] == "running"
    check_instances(world)


async def test_02_an_empty_listing_starts_nothing_and_loses_nothing(world: World) -> None:
    await rent_from(world, Simulated())
    pods = {await start_pod(world) for _ in range(3)}
    world.provider.listing = []
    await heal(world, ticks=15, seconds=240)
    assert world.provider.count("create") == 3
    assert world.provider.count("terminate") == 0
    world.provider.listing = None
    await heal(world, ticks=1)
    check_instances(world, pods)


async def test_04_a_delete_and_a_sweep_in_the_middle_of_a_create_lose_no_record(world: World) -> None:
    await rent_from(world, Final())
    pod = await world.root.pod()

    async def race() -> None:
        await world.root.delete(f"/v1/pods/{pod['id']}")
        await world.tick()

    probe = await world.root.pod()
    fuse = Fuse(then=race)
    await drive(world, probe["id"], fuse)
    fuse = Fuse(fuse.passed.index("create is not answered") + 1, race)
    await drive(world, pod["id"], fuse)
    assert len(world.query("SELECT 1 FROM instance WHERE pod_id = %s", pod["id"])) == 1
    await world.root.delete(f"/v1/pods/{probe['id']}")
    await heal(world, ticks=2)
    check_all_ended(world)
    check_bill(world)


async def test_05_a_network_that_is_lost_ends_no_pod_and_bills_nothing_unseen(world: World) -> None:
    await rent_from(world, Simulated())
    pod_id = await start_pod(world)
    await heal(world, ticks=1)
    before = posted(world, "usage")
    broken: list[Exception | str] = [OSError("no route to host")] * 200
    world.provider.fail = {name: list(broken) for name in ("list_managed", "get", "terminate")}
    await heal(world, ticks=30, seconds=120)
    assert (await show(world, pod_id))["state"] == "running"
    assert posted(world, "usage") == before
    await world.root.delete(f"/v1/pods/{pod_id}")
    await heal(world, ticks=10, seconds=120)
    assert (await show(world, pod_id))["state"] == "terminating", "it lives, and is not called terminated"
    world.provider.fail.clear()
    await heal(world, ticks=4)
    check_all_ended(world)


async def test_06_a_provider_that_refuses_to_end_within_a_minimum_period_is_asked_until_it_ends(world: World) -> None:
    await rent_from(world, Simulated())
    pod_id = await start_pod(world)
    world.provider.fail["terminate"] = [Rejected("minimum_period", "not before an hour")] * 20
    await world.root.delete(f"/v1/pods/{pod_id}")
    await heal(world, ticks=20, seconds=130)
    assert world.provider.alive() == ["i-1"]
    assert (await show(world, pod_id))["state"] == "terminating"
    world.provider.fail.clear()
    await heal(world, ticks=5)
    check_all_ended(world)
    assert posted(world, "usage") <= PRICE * (120 + 2) // 3600, "the rest is not the agent's"


async def test_07_the_instances_of_a_provider_that_is_off_are_still_managed(world: World) -> None:
    """No provider is on in this world: what has something of ours is swept, driven and billed all the same."""
    await rent_from(world, Simulated())
    world.provider.fail["create"] = ["twice"]
    pod_id = await start_pod(world)
    await world.pass_time(minutes=1)
    await reconciling.reconcile(world.adapters)
    assert world.provider.alive() == ["i-1"]
    assert posted(world, "usage") > 0
    await world.root.delete(f"/v1/pods/{pod_id}")
    for _ in range(3):
        await world.drive_due()
        await world.pass_time(seconds=70)
        await reconciling.sweep_all(world.adapters)
    await world.drive_due()
    check_all_ended(world)


async def test_08_a_pod_that_is_ending_takes_no_work_and_its_name_is_free(world: World) -> None:
    await rent_from(world, Simulated())
    pod_id = await start_pod(world, name="trainer")
    await world.root.delete(f"/v1/pods/{pod_id}")
    for action in ("start", "stop", "restart"):
        answer = await world.root.post(f"/v1/pods/{pod_id}/{action}", status=409)
        assert answer["code"] == "action_not_allowed"
    await world.root.post(f"/v1/pods/{pod_id}/extend", {"max_lifetime_seconds": 2 * LIFE}, status=409)
    second = await start_pod(world, name="trainer")
    await heal(world, ticks=4)
    assert (await show(world, pod_id))["state"] == "terminated"
    check_instances(world, {second})


async def test_09_nothing_is_lost_track_of_and_the_price_is_that_of_the_request(world: World) -> None:
    await rent_from(world, Final())
    pod_id = await start_pod(world)
    world.provider.offers = [replace(offer, price_micro_h=2 * PRICE) for offer in world.provider.offers]
    world.query("UPDATE refresh SET began_at = began_at - interval '1 day'")
    await catalog.refresh_offers(world.provider, 60)
    await heal(world, ticks=5, seconds=600)
    check_instances(world, {pod_id})
    await world.root.delete(f"/v1/pods/{pod_id}")
    await world.tick()
    check_all_ended(world)
    check_bill(world)
    assert abs(posted(world, "usage") - PRICE * 3000 // 3600) <= PRICE // 1800


async def test_10_two_controllers_after_a_recovery_create_one_instance(world: World) -> None:
    await rent_from(world, Final())
    pods = {(await world.root.pod(max_lifetime_seconds=LIFE))["id"] for _ in range(4)}
    drivers = [Driver(world.adapters) for _ in range(3)]
    await asyncio.gather(
        *(reconciling.drive_due(driver, reconciling.make_gates()) for driver in drivers), world.sweep(), world.sweep()
    )
    await heal(world, ticks=1)
    assert world.provider.count("create") == 4
    check_instances(world, pods)


async def test_11_what_is_ended_together_leaves_nothing_that_is_billed(world: World) -> None:
    await rent_from(world, Simulated())
    for _ in range(4):
        await start_pod(world, labels={"job": "sweep"})
    other = await start_pod(world, labels={"job": "other"})
    await world.root.delete("/v1/pods?label=job=sweep")
    await heal(world, ticks=4)
    check_instances(world, {other})
    assert len(world.query("SELECT 1 FROM hold WHERE closed_at IS NULL")) == 1


async def test_12_what_is_shown_charged_and_recorded_is_one_price(world: World) -> None:
    await rent_from(world, Final())
    offered = (await world.root.get("/v1/offers?gpu=h100&limit=1"))["items"][0]
    pod_id = await start_pod(world, requirements=None, offer_id=offered["id"])
    await world.pass_time(hours=1)
    await world.root.delete(f"/v1/pods/{pod_id}")
    await world.tick()
    pod = await show(world, pod_id)
    records = (await world.root.get("/v1/usage/records"))["items"]
    prices = {offered["price_usd_per_hour"], pod["price_usd_per_hour"], *(r["price_usd_per_hour"] for r in records)}
    assert prices == {"2.000000"}
    seconds = sum(record["seconds"] for record in records)
    assert seconds in (3600, 3601)
    total = (await world.root.get("/v1/usage"))["total"]["amount_usd"]
    assert total == pod["spent_usd"] == f"{posted(world, 'usage') / 1e6:.6f}" == f"{PRICE * seconds // 3600 / 1e6:.6f}"


async def test_13_a_price_of_zero_is_no_offer_and_an_old_one_says_that_it_is_old(world: World) -> None:
    await rent_from(world, Simulated())
    world.provider.offers = [
        replace(OFFERS[0], provider_offer_id=f"odd-{p}", price_micro_h=p) for p in (0, -5, 10**13, 7, 1_900_000)
    ]
    world.query("UPDATE refresh SET began_at = began_at - interval '1 day'")
    await catalog.refresh_offers(world.provider, 60)
    found = (await world.root.get("/v1/offers?gpu=h100"))["items"]
    assert [offer["price_usd_per_hour"] for offer in found] == ["1.900000"]
    assert not found[0]["stale"]
    world.provider.fail["list_offers"] = [Broken("http_500")]
    world.query("UPDATE refresh SET began_at = began_at - interval '1 day'")
    with pytest.raises(Broken):
        await catalog.refresh_offers(world.provider, 60)
    world.query("UPDATE provider_account SET refreshed_at = refreshed_at - interval '1 hour'")
    (old,) = (await world.root.get("/v1/offers?gpu=h100"))["items"]
    assert old["stale"]


async def test_14_an_offer_that_cannot_be_had_makes_way_for_one_that_can(world: World) -> None:
    await rent_from(world, Simulated())
    world.provider.offers = [replace(OFFERS[0], availability="none"), *world.provider.offers[1:]]
    world.query("UPDATE refresh SET began_at = began_at - interval '1 day'")
    await catalog.refresh_offers(world.provider, 60)
    world.provider.fail["create"] = ["no_capacity", "no_capacity"]
    pod_id = await start_pod(world)
    pod = await show(world, pod_id)
    assert [attempt["code"] for attempt in pod["attempts"]] == ["no_capacity", "no_capacity", None]
    assert pod["state"] == "running"
    check_instances(world, {pod_id})


async def test_15_an_agent_has_a_budget_of_its_own_that_begins_anew_each_month(world: World) -> None:
    await rent_from(world, Final())
    agent = await world.root.child(budget={"limit_usd": "1", "period": "month"})
    pod = await world.run(agent, max_lifetime_seconds=1200)
    refused = await agent.pod(402, max_lifetime_seconds=1200)
    assert refused["code"] == "budget_exhausted"
    await heal(world, ticks=3, seconds=500)
    assert (await agent.get(f"/v1/pods/{pod['id']}"))["state"] == "terminated"
    await agent.pod(402, max_lifetime_seconds=1200)
    (budget,) = (await agent.get("/v1/budgets"))["items"]
    assert 0.66 < float(budget["spent_usd"]) < 0.68
    await world.pass_time(days=31)
    await world.run(agent, max_lifetime_seconds=1200)
    world.check_money()


async def test_16_launches_that_failed_cost_their_agent_nothing(world: World) -> None:
    await rent_from(world, Simulated(), offers=2)
    world.provider.boots_at_once = False
    world.provider.fail["create"] = ["after", "no_capacity"]
    pod_id = await start_pod(world)
    await heal(world, ticks=12, seconds=120)
    pod = await show(world, pod_id)
    assert (pod["state"], pod["spent_usd"], pod["committed_usd"]) == ("terminated", "0.000000", "0.000000")
    assert (await world.root.get("/v1/usage"))["total"]["amount_usd"] == "0.000000"
    assert posted(world, "loss") > 0
    check_all_ended(world)


async def test_17_a_launch_that_hangs_holds_no_status_call_up(world: World) -> None:
    class Impatient(Simulated):
        capabilities: ClassVar[base.Capabilities] = replace(Simulated.capabilities, create_limit_seconds=1)

    await rent_from(world, Impatient())
    pods = [await world.root.pod() for _ in range(6)]
    world.provider.fail["create"] = ["hang"] * 6
    launching = asyncio.gather(*(Driver(world.adapters).drive(pod["id"]) for pod in pods))
    while world.provider.count("create") < 6:  # noqa: ASYNC110 - the simulator has no events
        await asyncio.sleep(0.01)
    began = time.monotonic()
    for pod in pods:
        assert (await show(world, pod["id"]))["state"] == "creating"
    await world.root.delete(f"/v1/pods/{pods[0]['id']}")
    assert time.monotonic() - began < 0.9
    assert not launching.done()
    await launching


async def test_19_whoever_waits_for_an_interrupted_launch_comes_to_an_end(world: World) -> None:
    await rent_from(world, Simulated(), offers=1)
    fuse = Fuse()
    pod = await world.root.pod()
    await drive(world, pod["id"], fuse)
    at = fuse.passed.index("create is not sent") + 1
    pod = await world.root.pod()
    await drive(world, pod["id"], Fuse(at))
    await heal(world, ticks=3)
    seen = await world.root.get(f"/v1/pods/{pod['id']}?wait=20&until=running")
    assert (seen["state"], seen["settled"], seen["poll_after_seconds"]) == ("failed", True, None)
    assert seen["state_reason"] == "simulated: no_answer"


async def test_21_one_request_has_one_pod_and_two_have_two(world: World) -> None:
    await rent_from(world, Final())
    body = {"image": "busybox", "requirements": {"gpu": ["h100"]}, "max_lifetime_seconds": 600}
    headers = {"Idempotency-Key": "claim-1"}
    answers = await asyncio.gather(
        *(world.root.call("POST", "/v1/pods", json=body, headers=headers) for _ in range(10))
    )
    assert {answer.status_code for answer in answers} <= {202, 409}
    ids = {answer.json()["id"] for answer in answers if answer.status_code == 202}
    assert len(ids) == 1
    second = await world.root.post("/v1/pods", body, 202, headers={"Idempotency-Key": "claim-2"})
    ids.add(second["id"])
    await world.tick()
    assert world.provider.count("create") == 2
    check_instances(world, ids)
    of = world.query("SELECT pod_id FROM instance ORDER BY 1")
    assert [row["pod_id"] for row in of] == sorted(ids)


async def test_22_the_providers_own_name_of_an_instance_says_when_it_must_be_gone(world: World) -> None:
    """Whoever finds it, and however dead we are, may destroy it then."""
    await rent_from(world, Simulated())
    pod_id = await start_pod(world, max_lifetime_seconds=1800)
    (ref,) = [ref for operation, ref in world.provider.calls if operation == "create"]
    (row,) = world.query("SELECT ends_at, hard_stop_at FROM pod WHERE id = %s", pod_id)
    assert ref.startswith(f"gb-{world.owner}-")
    assert len(ref) <= 50
    assert int(ref.rpartition("-")[2], 36) == int(row["hard_stop_at"].timestamp())
    assert (row["hard_stop_at"] - row["ends_at"]).total_seconds() == 900
    await heal(world, ticks=20, seconds=100)
    assert world.provider.alive() == []
    await heal(world, ticks=3)
    assert (await show(world, pod_id))["ends_because"] == "lifetime"
    check_all_ended(world)


async def test_23_metering_that_fails_and_is_tried_again_counts_every_second_once(world: World) -> None:
    await rent_from(world, Final())
    pod_id = await start_pod(world)
    for round_ in range(6):
        await world.pass_time(minutes=7)
        await world.sweep()
        fuse = Fuse(round_ % 5 + 1)
        with fuse.lit(world), contextlib.suppress(Killed):
            await metering.bill_all(1)
        await metering.bill_all(1)
        await metering.bill_all(0)
    await world.root.delete(f"/v1/pods/{pod_id}")
    await world.tick()
    check_all_ended(world)
    check_bill(world)
