"""DESIGN 7 and 8: what vendors do, what counts as evidence, and who pays for it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from tests.factories import Client, World
from tests.faults.fuse import check_all_ended, check_bill, check_instances, drive, heal, rent_from
from tests.simulator import OFFERS, Broken, Final, Rented, Simulated

from gpubroker import reconciling, store
from gpubroker.errors import CredentialRefused, Rejected, Throttled
from gpubroker.providers import base
from gpubroker.store import instances as rows

pytestmark = pytest.mark.anyio

LIFE = 36_000
PRICE = 2_000_000
ALLOWANCE = 120


async def at_vendor(world: World, **request: Any) -> str:
    """A pod that runs at a vendor whose answers prove little."""
    await rent_from(world, Simulated())
    return await start_pod(world, **request)


async def start_pod(world: World, **request: Any) -> str:
    pod = await world.run(world.root, **({"max_lifetime_seconds": LIFE, "max_attempts": 5} | request))
    return pod["id"]


async def show(world: World, pod_id: str, client: Client | None = None) -> Any:
    return await (client or world.root).get(f"/v1/pods/{pod_id}")


def micro(world: World, account: str) -> int:
    """What was posted to an account of the ledger, micro-USD."""
    found = world.query("SELECT coalesce(sum(amount_micro), 0)::bigint AS sum FROM ledger WHERE account = %s", account)
    return found[0]["sum"]


def cost(seconds: float, price: int = PRICE) -> int:
    return int(price * seconds / 3600)


def open_holds(world: World) -> int:
    return len(world.query("SELECT 1 FROM hold WHERE closed_at IS NULL"))


def instance(world: World, provider_id: str = "i-1") -> dict[str, Any]:
    return world.query("SELECT * FROM instance WHERE provider_instance_id = %s", provider_id)[0]


async def minutes(world: World, number: int, every: int = 1) -> None:
    """Minutes pass, with a tick in each."""
    for _ in range(0, number, every):
        await world.pass_time(minutes=every)
        await world.tick()


# Creates


@pytest.mark.parametrize("fault", ["timeout", "after", "with id"])
async def test_a_create_that_failed_and_happened_is_found_and_used(world: World, fault: str) -> None:
    await rent_from(world, Simulated())
    world.provider.fail["create"] = [fault]
    pod_id = await start_pod(world)
    await heal(world, ticks=2, seconds=20)
    assert world.provider.count("create") == 1
    check_instances(world, {pod_id})
    (attempt,) = (await show(world, pod_id))["attempts"]
    assert attempt["outcome"] == "created"


class Piecemeal(Final):
    """A provider whose creates are cut off: the same reference completes them. `refuses` says that it then will not."""

    refuses = False

    async def create(self, spec: base.Spec, offer: base.ProviderOffer, ref: str) -> base.Created:
        await self._begin("create", ref)
        refuses = self.refuses
        known = next((rented for rented in self.rented.values() if rented.ref == ref), None)
        if known is None:
            self.boots_at_once = False
            known = self.bear(ref, offer)
            await self._end("create", None if refuses else "timeout")
        if refuses:
            self.end(known.id)
            self.denied.add(known.id)
            raise Rejected("quota_exceeded")
        self.run(known.id)
        return base.Created(known.id, self.see(known))

    async def start(self, instance_id: str) -> None:
        await self._begin("start", instance_id)
        rented = self._find(instance_id)
        if rented.life == "starting":
            self.run(instance_id)
            return
        rented.life = "starting"
        raise TimeoutError

    async def restart(self, instance_id: str) -> None:
        await super().restart(instance_id)
        self.halt(instance_id)
        await self.start(instance_id)

    def see(self, rented: Rented) -> base.Instance:
        return replace(super().see(rented), is_whole=rented.life != "starting")


@pytest.mark.parametrize("sweeps", [False, True])
@pytest.mark.parametrize("command", ["start", "restart"])
async def test_a_start_that_was_cut_off_is_completed(world: World, command: str, *, sweeps: bool) -> None:
    await rent_from(world, Piecemeal())
    pod_id = await start_pod(world)
    await heal(world, ticks=4, seconds=10)
    if command == "start":
        await world.root.post(f"/v1/pods/{pod_id}/stop", status=202)
        await world.drive_due()
    await world.root.post(f"/v1/pods/{pod_id}/{command}", status=202)
    await world.drive(pod_id)
    if sweeps:
        await world.sweep()
    await heal(world, ticks=4, seconds=10)
    assert (await show(world, pod_id))["state"] == "running"
    assert world.provider.count("start") == 2
    assert (await show(world, pod_id))["billing"] == "full"
    check_instances(world, {pod_id})


async def test_a_create_that_was_cut_off_is_completed_by_the_same_reference(world: World) -> None:
    await rent_from(world, Piecemeal())
    pod_id = await start_pod(world)
    await heal(world, ticks=4, seconds=10)
    pod = await show(world, pod_id)
    assert (pod["state"], [a["outcome"] for a in pod["attempts"]]) == ("running", ["created"])
    assert world.provider.count("create") == 2
    assert world.provider.alive() == ["i-1"]
    check_instances(world, {pod_id})


async def test_a_create_that_was_cut_off_waits_for_a_provider_that_has_no_turn(world: World) -> None:
    await rent_from(world, Piecemeal())
    pod_id = await start_pod(world)
    world.provider.fail["create"] = [Throttled("throttled", wait=5), CredentialRefused("unauthorized")]
    await heal(world, ticks=8, seconds=10)
    pod = await show(world, pod_id)
    assert (pod["state"], [a["outcome"] for a in pod["attempts"]]) == ("running", ["created"])
    assert world.provider.count("create") == 4
    assert world.provider.alive() == ["i-1"]


async def test_a_create_that_was_cut_off_and_is_not_wanted_any_more_is_ended(world: World) -> None:
    await rent_from(world, Piecemeal())
    pod_id = await start_pod(world)
    await world.root.delete(f"/v1/pods/{pod_id}")
    await heal(world, ticks=4, seconds=10)
    assert world.provider.count("create") == 1
    check_all_ended(world)


async def test_a_create_that_is_refused_after_a_listing_saw_its_beginning_tries_the_next_offer(world: World) -> None:
    vendor = Piecemeal()
    vendor.refuses = True
    await rent_from(world, vendor)

    async def list_it(point: str) -> None:
        if point == "create is not answered":
            vendor.on_point = None
            await world.sweep()
            vendor.refuses = False

    vendor.on_point = list_it
    pod_id = await start_pod(world)
    await heal(world, ticks=6, seconds=20)
    pod = await show(world, pod_id)
    assert (pod["state"], len({attempt["offer_id"] for attempt in pod["attempts"]})) == ("running", 2)
    check_instances(world, {pod_id})


async def test_a_create_that_hangs_is_given_up_at_its_limit_and_looked_up(world: World) -> None:
    class Impatient(Simulated):
        capabilities: ClassVar[base.Capabilities] = replace(Simulated.capabilities, create_limit_seconds=1)

    await rent_from(world, Impatient())
    world.provider.fail["create"] = ["hang"]
    pod_id = await start_pod(world)
    assert (await show(world, pod_id))["attempts"][0]["outcome"] == "ambiguous"
    await heal(world, ticks=1, seconds=10)
    check_instances(world, {pod_id})


async def test_a_create_that_failed_and_did_not_happen_is_given_up_and_the_next_offer_has_a_hold_of_its_own(
    world: World,
) -> None:
    await rent_from(world, Simulated())
    world.provider.fail["create"] = [TimeoutError()]
    pod_id = await start_pod(world)
    assert world.provider.count("create") == 1, "nothing else is tried while it may come true"
    await heal(world, ticks=3, seconds=30)
    pod = await show(world, pod_id)
    assert [a["outcome"] for a in pod["attempts"]] == ["abandoned", "created"]
    assert pod["state"] == "running"
    assert open_holds(world) == 2
    await world.root.delete(f"/v1/pods/{pod_id}")
    await minutes(world, 20)
    check_all_ended(world)
    assert micro(world, "loss") == 0


async def test_a_create_that_may_still_come_true_keeps_others_waiting_when_the_budget_is_for_one(world: World) -> None:
    await rent_from(world, Simulated())
    agent = await world.root.child(budget={"limit_usd": "30"})
    world.provider.fail["create"] = [TimeoutError()]
    pod = await world.run(agent, max_lifetime_seconds=LIFE, max_attempts=5)
    await minutes(world, 8)
    seen = await show(world, pod["id"], agent)
    assert (seen["state"], seen["state_reason"]) == ("creating", "waiting: an earlier create may still come true")
    assert world.provider.count("create") == 1
    await minutes(world, 12)
    assert (await show(world, pod["id"], agent))["state"] == "running"
    assert open_holds(world) == 1
    world.check_money()


async def test_a_birth_after_its_create_was_given_up_is_ended_on_sight_and_nobodys_but_ours_to_pay(
    world: World,
) -> None:
    await rent_from(world, Simulated(), offers=1)
    world.provider.fail["create"] = ["late 180"]
    pod_id = await start_pod(world)
    await minutes(world, 2)
    pod = await show(world, pod_id)
    assert (pod["attempts"][0]["outcome"], pod["state"]) == ("abandoned", "failed")
    (hold,) = world.query("SELECT amount_micro, drawn_micro, closed_at FROM hold")
    await minutes(world, 2)
    assert world.provider.alive() == [], "born and ended within the sweep that saw it first"
    assert instance(world)["role"] == "stray"
    await minutes(world, 2)
    assert instance(world)["gone_at"] is not None
    assert 0 <= micro(world, "loss") <= cost(240)
    assert world.query("SELECT amount_micro, drawn_micro, closed_at FROM hold") == [hold], "the hold stays as it is"

    (attempt,) = world.query("SELECT hold_until - over_at AS spare, hold_until - instant() AS left FROM attempt")
    assert attempt["spare"].total_seconds() == 600 + 60, "ten minutes, and the time that it may be hidden"
    await world.pass_time(seconds=attempt["left"].total_seconds() - 60)
    await world.tick()
    assert open_holds(world) == 1
    await world.pass_time(seconds=61)
    for listings in range(1, 4):
        await world.tick()
        assert open_holds(world) == 1, f"{listings - 1} complete listings since"
        await world.pass_time(seconds=20)
    await world.tick()
    check_all_ended(world)
    assert micro(world, "usage") == micro(world, "minimum") == 0


async def test_a_listing_that_fails_does_not_count_among_the_three_that_release_a_hold(world: World) -> None:
    await rent_from(world, Simulated(), offers=1)
    world.provider.fail["create"] = [TimeoutError()]
    await start_pod(world)
    await minutes(world, 2)
    world.provider.listing = Broken("http_500")
    await minutes(world, 20)
    assert open_holds(world) == 1
    world.provider.listing = None
    await minutes(world, 4)
    check_all_ended(world)


async def test_a_rejected_offer_makes_way_for_the_next(world: World) -> None:
    await rent_from(world, Simulated())
    world.provider.fail["create"] = ["no_capacity", Throttled("http_429", wait=1), CredentialRefused("http_401")]
    pod_id = await start_pod(world)
    pod = await show(world, pod_id)
    assert [(a["outcome"], a["code"]) for a in pod["attempts"]] == [
        ("rejected", "no_capacity"), ("rejected", "http_429"), ("rejected", "credential_refused"), ("created", None),
    ]  # fmt: skip
    check_instances(world, {pod_id})
    assert len({ref for operation, ref in world.provider.calls if operation == "create"}) == 4, (
        "a reference is new each time"
    )


async def test_an_offer_that_had_no_turn_is_tried_again_when_it_has_one(world: World) -> None:
    await rent_from(world, Simulated(), offers=1)
    world.provider.fail["create"] = [Throttled("own_limit", wait=24), Throttled("throttled", wait=1)]
    pod_id = await start_pod(world)
    assert (await show(world, pod_id))["state_reason"].endswith(": own_limit")
    for seconds, creates in ((20, 1), (5, 2), (1, 2), (2, 3)):
        await world.pass_time(seconds=seconds)
        await world.drive_due()
        assert world.provider.count("create") == creates
    pod = await show(world, pod_id)
    assert ([a["outcome"] for a in pod["attempts"]], pod["state"]) == (["rejected", "rejected", "created"], "running")
    check_instances(world, {pod_id})


async def test_a_provider_that_has_no_turn_for_long_or_ever_is_given_up(world: World) -> None:
    await rent_from(world, Simulated(), offers=1)
    world.provider.fail["create"] = [Throttled("throttled", wait=3600)]
    (attempt,) = (await show(world, await start_pod(world)))["attempts"]
    assert (attempt["outcome"], attempt["code"]) == ("rejected", "quota_exceeded")
    world.provider.fail["create"] = [Throttled("throttled", wait=1)] * 30
    pod_id = await start_pod(world)
    await minutes(world, 25)
    assert (world.provider.count("create"), (await show(world, pod_id))["state"]) == (1 + 20, "terminated")


async def test_what_was_taken_away_where_nothing_can_be_started_is_rented_anew(world: World) -> None:
    await rent_from(world, Simulated())
    world.query("UPDATE offer SET supports = '{image,command}'")
    pod_id = await start_pod(world, restart_policy="on_interrupt")
    world.provider.halt("i-1", life="interrupted")
    await minutes(world, 2)
    assert world.provider.count("start") == 0
    assert ((await show(world, pod_id))["state"], world.provider.alive()) == ("running", ["i-2"])


async def test_a_rejection_that_no_other_offer_would_change_ends_the_pod(world: World) -> None:
    await rent_from(world, Simulated())
    world.provider.fail["create"] = [Rejected("bad_image", "no such image", try_next_offer=False)]
    pod_id = await start_pod(world)
    pod = await show(world, pod_id)
    assert (pod["state"], pod["ends_because"], pod["spent_usd"]) == ("terminated", "provisioning_failed", "0.000000")
    assert pod["state_reason"] == "simulated: bad_image"
    assert world.provider.count("create") == 1
    check_all_ended(world)


async def test_when_no_offer_is_to_be_had_the_pod_ends_and_costs_nothing(world: World) -> None:
    await rent_from(world, Simulated(), offers=3)
    world.provider.fail["create"] = ["no_capacity"] * 9
    pod_id = await start_pod(world)
    pod = await show(world, pod_id)
    assert (pod["state"], pod["ends_because"], pod["committed_usd"]) == ("terminated", "no_capacity", "0.000000")
    assert world.provider.count("create") == 3
    check_all_ended(world)
    assert micro(world, "loss") == 0


async def test_a_boot_that_never_ends_is_given_up_and_is_the_installations_loss(world: World) -> None:
    await rent_from(world, Simulated())
    world.provider.boots_at_once = False
    pod_id = await start_pod(world)
    await minutes(world, 9)
    assert world.provider.alive() == ["i-1"]
    world.provider.boots_at_once = True
    await minutes(world, 3)
    assert world.provider.alive() == ["i-2"], "the sweep ended the first"
    assert (await show(world, pod_id))["state"] == "running"
    assert instance(world)["role"] == "stray"
    assert instance(world)["gone_at"] is not None
    await minutes(world, 10)
    charged = micro(world, "usage")
    assert cost(9 * 60) <= charged <= cost(13 * 60), "the agent pays for the one that runs"
    assert cost(9 * 60) <= micro(world, "loss") <= cost(12 * 60)
    world.check_money()


class Imageless(Simulated):
    """A provider at which nothing starts, and that says why."""

    def see(self, rented: Rented) -> base.Instance:
        seen = super().see(rented)
        return seen if seen.life == "gone" else replace(seen, life="failed", reason="ImagePullFailed: no such image")


async def test_why_nothing_started_is_told_in_the_providers_words(world: World) -> None:
    await rent_from(world, Imageless(), offers=1)
    pod_id = (await world.root.pod())["id"]
    await drive(world, pod_id)
    pod = await show(world, pod_id)
    assert pod["ends_because"] == "provisioning_failed"
    assert pod["state_reason"] == "simulated: ImagePullFailed: no such image"


async def test_a_boot_that_never_ends_anywhere_ends_the_pod(world: World) -> None:
    await rent_from(world, Simulated(), offers=2)
    world.provider.boots_at_once = False
    pod_id = await start_pod(world)
    await minutes(world, 26)
    pod = await show(world, pod_id)
    assert (pod["state"], pod["ends_because"], pod["spent_usd"]) == ("terminated", "provisioning_failed", "0.000000")
    check_all_ended(world)


async def test_what_began_to_run_while_nobody_looked_is_not_given_up(world: World) -> None:
    await rent_from(world, Simulated())
    world.provider.boots_at_once = False
    pod_id = await start_pod(world)
    world.provider.run("i-1")
    await world.pass_time(hours=1)
    await drive(world, pod_id)
    assert world.provider.count("create") == 1
    assert (await show(world, pod_id))["state"] == "running"


# Duplicates, strays, others


async def test_of_two_instances_with_one_reference_one_is_used_and_one_ended(world: World) -> None:
    await rent_from(world, Simulated())
    world.provider.fail["create"] = ["twice"]
    pod_id = await start_pod(world)
    assert world.provider.alive() == ["i-1", "i-2"]
    await world.tick()
    assert world.provider.alive() == ["i-1"]
    check_instances(world, {pod_id})
    await heal(world)
    assert instance(world, "i-2")["gone_at"] is not None
    assert micro(world, "usage") <= cost(4 * 70), "nobody pays twice"


async def test_of_two_instances_that_a_look_up_finds_one_is_used_and_one_ended(world: World) -> None:
    await rent_from(world, Simulated())

    class Twice(Broken):
        pass

    world.provider.fail["create"] = [Twice("http_500")]
    pod_id = await start_pod(world)
    (attempt,) = world.query("SELECT ref FROM attempt")
    world.provider.bear(attempt["ref"], OFFERS[0])
    world.provider.bear(attempt["ref"], OFFERS[0])
    await heal(world, ticks=2, seconds=10)
    check_instances(world, {pod_id})
    assert len(world.provider.alive()) == 1


async def test_a_stray_that_no_listing_shows_is_told_to_end_as_well(world: World) -> None:
    await rent_from(world, Simulated())
    world.provider.boots_at_once = False
    await start_pod(world)
    await minutes(world, 9)
    world.provider.hidden.add("i-1")
    world.provider.boots_at_once = True
    await minutes(world, 3)
    assert world.provider.alive() == ["i-2"]


async def test_an_unknown_reference_of_ours_is_ended_at_the_second_sweep_and_not_before_the_grace(world: World) -> None:
    await at_vendor(world)
    stray = world.provider.bear(f"gb-{world.owner}-01m8nobodyknows-zzzzzz", OFFERS[0])
    for _ in range(10):
        await world.tick()
        assert stray.id in world.provider.alive()
        await world.pass_time(seconds=59)
    await minutes(world, 1)
    assert stray.id not in world.provider.alive()
    await minutes(world, 1)
    assert instance(world, stray.id)["gone_at"] is not None


async def test_too_many_unknown_references_are_a_restored_database_and_none_is_ended(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    pod_id = await at_vendor(world)
    for number in range(4):
        world.provider.bear(f"gb-{world.owner}-01m8nobodyknows{number}-zzzzzz", OFFERS[0])
    with caplog.at_level(logging.ERROR):
        await minutes(world, 30, every=5)
    assert "was the database restored? None is ended" in caplog.text
    assert len(world.provider.alive()) == 5
    assert (await show(world, pod_id))["state"] == "running"
    world.provider.end("i-2")
    await minutes(world, 30, every=5)
    assert world.provider.alive() == ["i-1"], "three are few enough"


async def test_what_is_not_ours_is_never_touched(world: World) -> None:
    await at_vendor(world)
    for number, ref in enumerate(
        [None, "gb-otherone-01m8-zzzzzz", f"gb-{world.owner}", f"xgb-{world.owner}-1-2", "production"]
    ):
        other = world.provider.bear(ref or "", OFFERS[0])
        world.provider.others.append(replace(world.provider.see(other), ref=ref))
        world.provider.hidden.add(other.id)
        assert other.id == f"i-{number + 2}"
    await minutes(world, 40, every=4)
    touched = {subject for operation, subject in world.provider.calls if operation in ("get", "terminate", "stop")}
    assert touched <= {"i-1"}
    assert len(world.provider.alive()) == 6
    assert len(world.query("SELECT 1 FROM instance")) == 1


# Listings


@pytest.mark.parametrize(
    "lie", [[], Broken("http_500", "half of the pages"), TimeoutError(), OSError("reset")], ids=repr
)
async def test_a_listing_that_lacks_an_instance_is_no_proof(world: World, lie: Any) -> None:
    """Nor are many of them over hours, while the provider answers that it is there."""
    pod_id = await at_vendor(world)
    world.provider.listing = lie
    await minutes(world, 60, every=5)
    world.provider.listing = None
    await minutes(world, 1)
    assert (await show(world, pod_id))["state"] == "running"
    assert world.provider.count("create") == 1
    check_instances(world, {pod_id})
    world.check_money()


async def test_listings_of_another_account_are_no_evidence(world: World) -> None:
    pod_id = await at_vendor(world)
    world.provider.identity = "account-2"
    world.provider.listing = []
    world.provider.denied.add("i-1")
    await minutes(world, 60, every=5)
    assert instance(world)["gone_at"] is None
    world.provider.identity, world.provider.listing = "account-1", None
    world.provider.denied.clear()
    await minutes(world, 1)
    assert (await show(world, pod_id))["state"] == "running"
    check_instances(world, {pod_id})


async def test_failing_listings_never_prove_what_a_look_does_not_find(world: World) -> None:
    pod_id = await at_vendor(world)
    world.provider.denied.add("i-1")
    world.provider.listing = Broken("http_503")
    await minutes(world, 60, every=5)
    assert instance(world)["gone_at"] is None
    await world.root.delete(f"/v1/pods/{pod_id}")
    await minutes(world, 60, every=5)
    assert instance(world)["gone_at"] is None
    assert open_holds(world) == 1
    world.provider.denied.clear()
    world.provider.listing = None
    await minutes(world, 6)
    check_all_ended(world)


async def test_when_most_vanish_at_once_nothing_is_believed_for_half_an_hour(world: World) -> None:
    await rent_from(world, Simulated())
    pods = [await start_pod(world) for _ in range(4)]
    await minutes(world, 2)
    hidden = {"i-1", "i-2", "i-3"}
    world.provider.hidden |= hidden
    world.provider.denied |= hidden
    await minutes(world, 28)
    assert [row["misses"] for row in world.query("SELECT misses FROM instance")] == [0] * 4
    assert {row["gone_at"] for row in world.query("SELECT gone_at FROM instance")} == {None}
    told = world.query("SELECT data FROM event WHERE type = 'io.gpubroker.provider.unhealthy.v1'")
    assert [row["data"]["reason"] for row in told] == ["3 of 4 live instances vanished at once"]
    world.provider.hidden.clear()
    world.provider.denied.clear()
    await minutes(world, 2)
    check_instances(world, set(pods))
    assert {(await show(world, pod_id))["state"] for pod_id in pods} == {"running"}
    assert world.provider.count("create") == 4


async def test_what_stays_away_after_the_distrust_is_proved_gone_and_billed_to_when_it_was_seen_last(
    world: World,
) -> None:
    await rent_from(world, Simulated())
    pods = [await start_pod(world) for _ in range(3)]
    await minutes(world, 5)
    for name in world.provider.alive():
        world.provider.end(name)
    await minutes(world, 40)
    assert {(await show(world, pod_id))["state"] for pod_id in pods} == {"unreachable"}
    await minutes(world, 10)
    assert {(await show(world, pod_id))["state"] for pod_id in pods} == {"interrupted"}
    for pod_id in pods:
        await world.root.delete(f"/v1/pods/{pod_id}")
    await minutes(world, 1)
    check_all_ended(world)
    assert micro(world, "usage") <= 3 * cost(310)  # 300 s, and what this test takes


async def test_many_ends_at_once_are_no_vanishing(world: World) -> None:
    """The panic button: what was asked to end may well be away from the next listing."""
    await rent_from(world, Simulated())
    pods = [await start_pod(world) for _ in range(5)]
    await minutes(world, 2)
    for pod_id in pods:
        await world.root.delete(f"/v1/pods/{pod_id}")
    await minutes(world, 4)
    check_all_ended(world)
    assert world.query("SELECT distrust_until FROM provider_account") == [{"distrust_until": None}]


async def test_ends_that_are_under_way_are_no_vanishing(world: World) -> None:
    """Between the provider's end of them and our note of it a listing lacks them all."""
    await rent_from(world, Final())
    pods = [await start_pod(world) for _ in range(4)]
    await minutes(world, 2)
    for pod_id in pods:
        await world.root.delete(f"/v1/pods/{pod_id}")
    for name in world.provider.alive():
        world.provider.end(name)
    await world.sweep()
    assert world.query("SELECT distrust_until FROM provider_account") == [{"distrust_until": None}]
    await minutes(world, 1)
    check_all_ended(world)


async def test_a_listing_during_a_terminate_does_not_keep_it_from_its_end(world: World) -> None:
    """What the listing lacks since the end that was asked for meanwhile is no miss of before it."""

    class Slow(Simulated):
        meanwhile: Callable[[], Awaitable[None]] | None = None

        async def list_managed(self, owner: str) -> Sequence[base.Instance]:
            then, self.meanwhile = self.meanwhile, None
            if then is not None:
                await then()
            return await super().list_managed(owner)

    vendor = Slow()
    await rent_from(world, vendor)
    pod_id = await start_pod(world)
    await minutes(world, 3)
    await world.root.delete(f"/v1/pods/{pod_id}")
    vendor.meanwhile = world.drive_due
    await world.sweep()
    assert vendor.count("terminate") == 1
    await minutes(world, 4)
    check_all_ended(world)


async def test_births_during_a_listing_are_no_vanishing(world: World) -> None:
    asked, listed, known = asyncio.Barrier(5), asyncio.Event(), asyncio.Event()

    class Late(Final):
        async def list_managed(self, owner: str) -> Sequence[base.Instance]:
            seen = await super().list_managed(owner)
            listed.set()
            await known.wait()
            return seen

        async def create(self, spec: base.Spec, offer: base.ProviderOffer, ref: str) -> base.Created:
            await asked.wait()
            await listed.wait()
            return await super().create(spec, offer, ref)

    await rent_from(world, Late())
    pods = [(await world.root.pod(max_lifetime_seconds=LIFE))["id"] for _ in range(4)]
    births = [asyncio.create_task(world.drive(pod_id)) for pod_id in pods]
    await asked.wait()
    sweep = asyncio.create_task(world.sweep())
    await asyncio.gather(*births)
    known.set()
    await sweep
    assert world.query("SELECT distrust_until FROM provider_account") == [{"distrust_until": None}]
    assert [row["misses"] for row in world.query("SELECT misses FROM instance")] == [0] * 4


async def test_what_ends_while_absences_are_not_believed_is_looked_at(world: World) -> None:
    await rent_from(world, Final())
    pods = [await start_pod(world) for _ in range(4)]
    await minutes(world, 2)
    hidden = {"i-1", "i-2", "i-3"}
    world.provider.hidden |= hidden
    await minutes(world, 1)
    world.provider.hidden -= hidden
    world.provider.end("i-4")
    await minutes(world, 1)
    assert [(await show(world, pod_id))["state"] for pod_id in pods] == ["running"] * 3 + ["interrupted"]
    await minutes(world, 5)
    assert [row["misses"] for row in world.query("SELECT misses FROM instance WHERE gone_at IS NULL")] == [0] * 3


async def test_an_empty_listing_of_instances_that_answer_ends_and_creates_nothing(world: World) -> None:
    await rent_from(world, Simulated())
    pods = [await start_pod(world) for _ in range(3)]
    await minutes(world, 2)
    world.provider.listing = []
    await minutes(world, 90, every=3)
    world.provider.listing = None
    await minutes(world, 1)
    check_instances(world, set(pods))
    assert world.provider.count("create") == 3
    assert {(await show(world, pod_id))["state"] for pod_id in pods} == {"running"}


# Gone, or not


async def test_an_instance_that_vanishes_is_gone_after_three_listings_a_quarter_of_an_hour_and_a_look(
    world: World,
) -> None:
    pod_id = await at_vendor(world)
    await minutes(world, 5)
    world.provider.end("i-1")
    await minutes(world, 14)
    assert instance(world)["gone_at"] is None
    seen = await show(world, pod_id)
    assert (seen["state"], seen["billing"]) == ("unreachable", "unknown")
    await minutes(world, 3)
    assert instance(world)["gone_evidence"]["listings_without"] >= 3
    seen = await show(world, pod_id)
    assert (seen["state"], seen["billing"], seen["allowed_actions"][0]) == ("interrupted", "none", "start")
    await minutes(world, 60, every=10)
    assert world.provider.count("create") == 1, "nothing comes back by itself"
    await world.root.post(f"/v1/pods/{pod_id}/start", status=202)
    await minutes(world, 1)
    check_instances(world, {pod_id})
    await world.root.delete(f"/v1/pods/{pod_id}")
    await minutes(world, 4)
    check_all_ended(world)
    assert micro(world, "usage") <= cost(302 + 62), "silence costs nothing"


async def test_two_rare_listings_are_too_few_however_far_apart(world: World) -> None:
    await at_vendor(world)
    await minutes(world, 2)
    world.provider.end("i-1")
    await minutes(world, 40, every=20)
    assert instance(world)["gone_at"] is None
    await minutes(world, 20, every=20)
    await minutes(world, 1)
    assert instance(world)["gone_at"] is not None


async def test_a_provider_whose_word_is_final_needs_one_look(world: World) -> None:
    await rent_from(world, Final())
    pod_id = await start_pod(world)
    await world.pass_time(minutes=5)
    world.provider.end("i-1")
    await world.pass_time(minutes=5)
    await world.tick()
    assert (await show(world, pod_id))["state"] == "interrupted"
    await world.root.delete(f"/v1/pods/{pod_id}")
    await world.tick()
    check_all_ended(world)
    check_bill(world)
    assert micro(world, "usage") in (cost(300), cost(301))


async def test_a_look_that_finds_nothing_is_no_proof_while_listings_have_it(world: World) -> None:
    pod_id = await at_vendor(world)
    world.provider.denied.add("i-1")
    await world.root.post(f"/v1/pods/{pod_id}/restart", status=202)
    await minutes(world, 40, every=4)
    assert instance(world)["gone_at"] is None
    world.provider.denied.clear()
    await minutes(world, 3)
    assert (await show(world, pod_id))["state"] == "running"
    assert world.provider.count("create") == 1


async def test_a_status_that_nobody_knows_is_not_running_and_costs_nothing_until_it_is_seen_again(world: World) -> None:
    pod_id = await at_vendor(world)
    await minutes(world, 5)
    world.provider.obscure.add("i-1")
    await minutes(world, 1)
    before = micro(world, "usage")
    await minutes(world, 30, every=2)
    seen = await show(world, pod_id)
    assert (seen["state"], seen["billing"], seen["state_reason"]) == (
        "unreachable", "unknown", "the provider says 'MIGRATING?'",
    )  # fmt: skip
    assert micro(world, "usage") == before
    world.provider.obscure.clear()
    await minutes(world, 1)
    assert (await show(world, pod_id))["state"] == "running"
    assert cost(37 * 60 - 5) <= micro(world, "usage") <= cost(37 * 60 + 5)


async def test_what_is_unreachable_can_be_restarted(world: World) -> None:
    pod_id = await at_vendor(world)
    world.provider.obscure.add("i-1")
    await minutes(world, 1)
    await world.root.post(f"/v1/pods/{pod_id}/restart", status=202)
    await minutes(world, 1)
    assert world.provider.count("restart") == 1
    world.provider.obscure.clear()
    await minutes(world, 1)
    assert (await show(world, pod_id))["state"] == "running"
    assert world.provider.count("restart") == 1


async def test_an_end_that_was_acknowledged_and_does_not_come_is_asked_for_again(world: World) -> None:
    pod_id = await at_vendor(world)
    world.provider.fail["terminate"] = ["deaf", "deaf", "deaf"]
    await world.root.delete(f"/v1/pods/{pod_id}")
    for _ in range(4):
        await minutes(world, 1)
        assert (await show(world, pod_id))["state"] == "terminating"
    await minutes(world, 15)
    assert world.provider.count("terminate") == 4
    check_all_ended(world)


async def test_an_end_is_not_believed_before_a_minute_and_a_listing(world: World) -> None:
    pod_id = await at_vendor(world)
    await minutes(world, 2)
    await world.root.delete(f"/v1/pods/{pod_id}")
    await world.drive_due()
    assert world.provider.alive() == []
    await world.pass_time(seconds=30)
    await world.tick()
    assert (await show(world, pod_id))["state"] == "terminating"
    world.provider.listing = Broken("http_500")
    await minutes(world, 5)
    assert (await show(world, pod_id))["state"] == "terminating" or instance(world)["misses"] >= 1
    world.provider.listing = None
    await minutes(world, 2)
    check_all_ended(world)


async def test_an_end_that_was_asked_for_after_it_vanished_is_proved_as_well(world: World) -> None:
    pod_id = await at_vendor(world)
    await minutes(world, 2)
    world.provider.end("i-1")
    await minutes(world, 3)
    await world.root.delete(f"/v1/pods/{pod_id}")
    await minutes(world, 4)
    check_all_ended(world)


async def test_what_was_proved_gone_and_is_there_again_is_ended_and_is_our_loss(world: World) -> None:
    pod_id = await at_vendor(world)
    await minutes(world, 2)
    world.provider.fail["terminate"] = ["deaf"]
    world.provider.hidden.add("i-1")
    world.provider.denied.add("i-1")
    await world.root.delete(f"/v1/pods/{pod_id}")
    await minutes(world, 4)
    assert (await show(world, pod_id))["state"] == "terminated"
    assert world.provider.alive() == ["i-1"]
    charged = micro(world, "usage")
    world.provider.hidden.clear()
    world.provider.denied.clear()
    await minutes(world, 2)
    assert world.provider.alive() == []
    await minutes(world, 2)
    check_all_ended(world)
    assert micro(world, "usage") == charged
    assert cost(180) <= micro(world, "loss") <= cost(500)


async def test_what_a_listing_shows_as_ended_is_not_there(world: World) -> None:
    """Some list what is terminal for a while: it is neither present, nor ended again and again."""

    class Slow(Simulated):
        async def list_managed(self, owner: str) -> Sequence[base.Instance]:
            await self._begin("list_managed", owner)
            return [self.see(rented) for rented in self.rented.values()]

    await rent_from(world, Slow())
    world.provider.fail["create"] = ["twice"]
    pod_id = await start_pod(world)
    await minutes(world, 3)
    await world.root.delete(f"/v1/pods/{pod_id}")
    await minutes(world, 4)
    check_all_ended(world)
    told = world.provider.count("terminate")
    await minutes(world, 3)
    assert world.provider.count("terminate") == told
    check_all_ended(world)


# Commands


async def test_a_throttled_provider_is_left_alone_for_as_long_as_it_says(world: World) -> None:
    pod_id = await at_vendor(world)
    world.provider.fail["stop"] = [Throttled("http_429", wait=90)]
    await world.root.post(f"/v1/pods/{pod_id}/stop", status=202)
    await world.drive_due()
    await world.pass_time(seconds=80)
    await world.drive_due()
    assert world.provider.count("stop") == 1
    await world.pass_time(seconds=11)
    await world.drive_due()
    assert world.provider.count("stop") == 2
    assert (await show(world, pod_id))["state"] == "stopped"


async def test_a_log_that_cannot_be_kept_puts_no_end_off(world: World) -> None:
    pod_id = await at_vendor(world)
    world.provider.fail["logs"] = [KeyError("text")] * 9
    await world.root.delete(f"/v1/pods/{pod_id}")
    await world.drive_due()
    assert world.provider.alive() == []


async def test_a_credential_that_is_refused_is_tried_again_and_nothing_is_forgotten(world: World) -> None:
    pod_id = await at_vendor(world)
    world.provider.fail = {name: [CredentialRefused("http_401")] * 3 for name in ("terminate", "get", "list_managed")}
    await world.root.delete(f"/v1/pods/{pod_id}")
    await minutes(world, 15)
    check_all_ended(world)


async def test_a_stop_of_what_vanished_is_not_repeated_for_ever(world: World) -> None:
    pod_id = await at_vendor(world)
    await minutes(world, 2)
    world.provider.end("i-1")
    await world.root.post(f"/v1/pods/{pod_id}/stop", status=202)
    await minutes(world, 20)
    assert (await show(world, pod_id))["state"] == "interrupted"
    assert world.provider.count("stop") < 20


async def test_a_start_without_room_leaves_the_pod_stopped_and_says_why(world: World) -> None:
    pod_id = await at_vendor(world)
    await world.root.post(f"/v1/pods/{pod_id}/stop", status=202)
    await world.drive_due()
    world.provider.fail["start"] = [Rejected("no_capacity")]
    await world.root.post(f"/v1/pods/{pod_id}/start", status=202)
    await world.drive_due()
    pod = await show(world, pod_id)
    assert (pod["state"], pod["state_reason"]) == ("stopped", "it could not be started: no_capacity")
    await world.tick()
    assert (await show(world, pod_id))["state_reason"] == pod["state_reason"]
    await world.root.post(f"/v1/pods/{pod_id}/start", status=202)
    await world.drive_due()
    assert (await show(world, pod_id))["state"] == "running"
    check_instances(world, {pod_id})


async def test_a_program_that_ends_before_its_restart_is_started_once(world: World) -> None:
    pod_id = await at_vendor(world)
    world.provider.halt("i-1", exit_code=1)
    await world.root.post(f"/v1/pods/{pod_id}/restart", status=202)
    await minutes(world, 3)
    assert (await show(world, pod_id))["state"] == "running"
    assert [call for call, _ in world.provider.calls if call in ("start", "restart")] == ["restart", "start"]
    check_instances(world, {pod_id})


async def test_a_program_that_ends_at_once_when_restarted_is_not_started_for_ever(world: World) -> None:
    class Brief(Final):
        def run(self, instance_id: str, at: float | None = None) -> None:
            super().run(instance_id, at)
            if len(self.rented[instance_id].runs) > 1:
                self.halt(instance_id, exit_code=1)

    await rent_from(world, Brief())
    pod_id = await start_pod(world)
    world.provider.halt("i-1", exit_code=1)
    await world.root.post(f"/v1/pods/{pod_id}/restart", status=202)
    await minutes(world, 5)
    assert world.provider.count("start") == 1
    assert (await show(world, pod_id))["state"] == "stopped"


@pytest.mark.parametrize("command", ["start", "restart"])
async def test_a_start_that_its_provider_shows_late_is_not_taken_for_an_end(world: World, command: str) -> None:
    class Lagging(Simulated):
        """After a start it says for three looks what it said before."""

        behind = 0

        async def start(self, instance_id: str) -> None:
            await super().start(instance_id)
            self.behind = 3

        async def restart(self, instance_id: str) -> None:
            await super().restart(instance_id)
            self.behind = 3

        async def get(self, instance_id: str) -> base.Instance:
            seen = await super().get(instance_id)
            if not self.behind:
                return seen
            self.behind -= 1
            return base.Instance(seen.id, seen.ref, "EXITED", "stopped", "storage")

    await rent_from(world, Lagging())
    pod_id = await start_pod(world, on_exit="terminate")
    await minutes(world, 1)
    if command == "start":
        await world.root.post(f"/v1/pods/{pod_id}/stop", status=202)
        await minutes(world, 1)
        assert (await show(world, pod_id))["state"] == "stopped"
    await world.root.post(f"/v1/pods/{pod_id}/{command}", status=202)
    for _ in range(6):
        await world.pass_time(seconds=5)
        await world.drive_due()
    assert (await show(world, pod_id))["state"] == "running"
    assert (world.provider.count(command), world.provider.count("terminate")) == (1, 0)
    await world.root.delete(f"/v1/pods/{pod_id}")
    await minutes(world, 4)
    check_all_ended(world)


@pytest.mark.parametrize("tells_times", [True, False])
async def test_a_run_that_ended_right_after_its_start_is_paid_for_as_long_as_it_was(
    world: World, tells_times: bool
) -> None:
    class Short(Simulated):
        """What is started runs for a second; some say when that began, some nothing."""

        async def start(self, instance_id: str) -> None:
            await super().start(instance_id)
            rented = self.rented[instance_id]
            rented.runs[-1].append(rented.runs[-1][0] + 1)
            rented.life = "stopped"

        def see(self, rented: Rented) -> base.Instance:
            seen = super().see(rented)
            return replace(seen, ended_at=None, started_at=seen.started_at if tells_times else None)

    await rent_from(world, Short())
    pod_id = await start_pod(world)
    await minutes(world, 1)
    await world.root.post(f"/v1/pods/{pod_id}/stop", status=202)
    await world.drive_due()
    await minutes(world, 1)
    await world.root.post(f"/v1/pods/{pod_id}/start", status=202)
    for _ in range(20):
        await world.pass_time(seconds=5)
        await world.drive_due()
    assert (await show(world, pod_id))["state"] == "stopped"
    await world.root.delete(f"/v1/pods/{pod_id}")
    await minutes(world, 4)
    check_all_ended(world)
    stored = 100_000 * 180 // 3600  # a stopped disk costs as well
    assert micro(world, "usage") <= cost(60 + 3 + 2) + stored


async def test_a_late_answer_about_an_instance_that_was_given_up_says_nothing_of_the_next(world: World) -> None:
    await rent_from(world, Final())
    pod_id = await start_pod(world)
    await minutes(world, 1)
    failed_over = False

    async def fail_over(point: str) -> None:
        nonlocal failed_over
        if point != "get is not sent" or failed_over:
            return
        failed_over = True
        world.provider.halt("i-1", life="failed")
        world.query("UPDATE instance SET life = 'failed'")
        world.query("UPDATE pod SET due_at = instant()")
        await world.drive(pod_id)
        world.provider.end("i-1")

    world.provider.on_point = fail_over
    world.query("UPDATE instance SET missed_since = instant()")
    world.query("UPDATE pod SET due_at = instant()")
    await world.drive(pod_id)
    world.provider.on_point = None
    await minutes(world, 2)
    assert world.provider.alive() == ["i-2"]
    check_instances(world, {pod_id})
    assert (await show(world, pod_id))["state"] == "running"


async def test_a_stop_that_was_acknowledged_and_did_not_happen_is_asked_for_again(world: World) -> None:
    pod_id = await at_vendor(world)
    world.provider.fail["stop"] = ["deaf"]
    await world.root.post(f"/v1/pods/{pod_id}/stop", status=202)
    await minutes(world, 2)
    assert (await show(world, pod_id))["state"] == "stopped"
    assert world.provider.count("stop") == 2


async def test_a_pod_that_its_provider_takes_away_can_be_started_again(world: World) -> None:
    await rent_from(world, Final())
    pod_id = await start_pod(world)
    await world.pass_time(minutes=5)
    world.provider.halt("i-1", life="interrupted")
    await minutes(world, 1)
    pod = await show(world, pod_id)
    assert (pod["state"], pod["billing"]) == ("interrupted", "none")
    await minutes(world, 30, every=5)
    await world.root.post(f"/v1/pods/{pod_id}/start", status=202)
    await minutes(world, 1)
    assert (await show(world, pod_id))["state"] == "running"
    await world.root.delete(f"/v1/pods/{pod_id}")
    await world.tick()
    check_all_ended(world)
    check_bill(world)


async def test_a_stopped_pod_that_is_extended_has_its_hard_stop_moved_at_its_provider(world: World) -> None:
    await rent_from(world, Final())
    pod_id = await start_pod(world)
    assert world.provider.count("extend") == 0, "a create tells the end by itself"
    await world.root.post(f"/v1/pods/{pod_id}/stop", status=202)
    await world.drive_due()
    await world.root.call("POST", f"/v1/pods/{pod_id}/extend", json={"max_lifetime_seconds": 2 * LIFE})
    await world.drive_due()
    assert world.provider.count("extend") == 1
    told = world.query("SELECT i.hard_stop_at = p.hard_stop_at AS told FROM pod p JOIN instance i ON i.pod_id = p.id")
    assert told == [{"told": True}]


# Providers that go


async def test_a_provider_that_is_not_configured_any_more_is_put_off_loudly_and_never_forgotten(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    pod_id = await at_vendor(world)
    made, world.adapters._made = world.adapters._made, {}
    await world.root.delete(f"/v1/pods/{pod_id}")
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            await world.drive_due()
            await reconciling.sweep_all(world.adapters)
            await world.pass_time(minutes=10)
    assert caplog.text.count("there is no provider 'simulated'") >= 10, "each drive and each sweep says so"
    assert (await show(world, pod_id))["state"] == "terminating"
    assert open_holds(world) == 1
    world.adapters._made = made
    await minutes(world, 5)
    check_all_ended(world)


async def test_the_account_of_a_create_that_may_still_come_true_is_swept_though_nobody_rents_there_now(
    world: World,
) -> None:
    await rent_from(world, Simulated(), offers=1)
    world.provider.fail["create"] = ["late 400"]
    await start_pod(world)
    for _ in range(20):
        await world.pass_time(minutes=1)
        await world.drive_due()
        await reconciling.sweep_all(world.adapters)
    assert len(world.provider.rented) == 1
    check_all_ended(world)


# Who pays


async def test_the_agent_pays_from_the_first_running_that_was_seen(world: World) -> None:
    await rent_from(world, Final())
    world.provider.boots_at_once = False
    pod_id = await start_pod(world)
    await minutes(world, 5)
    assert micro(world, "usage") == micro(world, "loss") == 0
    world.provider.run("i-1")
    await world.pass_time(seconds=30)
    await world.tick()
    await minutes(world, 10)
    await world.root.delete(f"/v1/pods/{pod_id}")
    await world.tick()
    check_all_ended(world)
    check_bill(world)
    assert micro(world, "usage") in (cost(630), cost(631))
    assert micro(world, "loss") == 0


async def test_what_ran_between_two_looks_is_paid_for_by_the_times_of_its_provider(world: World) -> None:
    await rent_from(world, Final())
    world.provider.boots_at_once = False
    pods = [await start_pod(world) for _ in range(2)]
    for name in ("i-1", "i-2"):
        world.provider.run(name)
    await world.pass_time(seconds=30)
    world.provider.halt("i-1", exit_code=0)
    world.provider.end("i-2")
    await minutes(world, 10)
    assert {(await show(world, pod_id))["state"] for pod_id in pods} == {"stopped", "interrupted"}
    for pod_id in pods:
        await world.root.delete(f"/v1/pods/{pod_id}")
    await world.tick()
    check_all_ended(world)
    check_bill(world)
    storage = cost(600, 100_000)
    assert 2 * cost(29) + storage - cost(40, 100_000) <= micro(world, "usage") <= 2 * cost(31) + storage
    assert micro(world, "loss") == 0


async def test_a_later_run_between_two_looks_is_paid_for_as_well(world: World) -> None:
    """As after a start whose caller was killed at once."""
    await rent_from(world, Final())
    pods = [await start_pod(world) for _ in range(2)]
    await world.pass_time(seconds=20)
    for pod_id in pods:
        await world.root.post(f"/v1/pods/{pod_id}/stop", status=202)
    await world.tick()
    await world.pass_time(seconds=60)
    for name in ("i-1", "i-2"):
        world.provider.run(name)
    await world.pass_time(seconds=30)
    world.provider.halt("i-1", exit_code=0)
    world.provider.end("i-2")
    await world.pass_time(seconds=60)
    await world.tick()
    await world.pass_time(seconds=60)
    for pod_id in pods:
        await world.root.delete(f"/v1/pods/{pod_id}")
    await world.tick()
    check_all_ended(world)
    check_bill(world)
    storage = 180  # of the one that was there to the end; the other was not seen again
    assert 2 * cost(49) + cost(60, 100_000) <= micro(world, "usage") <= 2 * cost(52) + cost(storage + 60, 100_000)
    assert micro(world, "loss") == 0


@pytest.mark.parametrize("ends", [False, True])
async def test_a_start_whose_caller_was_lost_is_not_sent_again(world: World, ends: bool) -> None:
    await rent_from(world, Final())
    pod_id = await start_pod(world)
    await world.root.post(f"/v1/pods/{pod_id}/stop", status=202)
    await world.tick()
    await world.pass_time(seconds=60)
    await world.root.post(f"/v1/pods/{pod_id}/start", status=202)
    world.provider.run("i-1")
    await world.pass_time(seconds=30)
    if ends:
        world.provider.halt("i-1", exit_code=7)
    await world.pass_time(seconds=5)
    await world.tick()
    assert world.provider.count("start", "i-1") == 0
    shown = await show(world, pod_id)
    assert (shown["state"], shown["exit_code"]) == (("stopped", 7) if ends else ("running", None))
    await world.root.delete(f"/v1/pods/{pod_id}")
    await world.tick()
    check_all_ended(world)
    check_bill(world)


class BillsBoot(Final):
    capabilities: ClassVar[base.Capabilities] = replace(Final.capabilities, bills_boot=True)


async def test_where_the_boot_is_billed_a_boot_that_ends_is_the_installations(world: World) -> None:
    await world.freeze()
    await rent_from(world, BillsBoot())
    world.provider.boots_at_once = False
    pod_id = await start_pod(world)
    await minutes(world, 5)
    world.provider.run("i-1")
    await minutes(world, 10)
    await world.root.delete(f"/v1/pods/{pod_id}")
    await world.tick()
    check_all_ended(world)
    assert micro(world, "usage") in (cost(600), cost(601))
    assert micro(world, "loss") in (cost(300), cost(301))


async def test_where_the_boot_is_billed_an_agent_that_ends_it_pays_from_the_create(world: World) -> None:
    await world.freeze()
    await rent_from(world, BillsBoot())
    world.provider.boots_at_once = False
    pod_id = await start_pod(world)
    await minutes(world, 5)
    await world.root.delete(f"/v1/pods/{pod_id}")
    await world.tick()
    check_all_ended(world)
    assert micro(world, "usage") in (cost(300), cost(301))
    assert micro(world, "loss") == 0


async def test_where_the_boot_is_billed_one_that_fails_or_outlives_the_pod_is_the_installations(world: World) -> None:
    await rent_from(world, BillsBoot(), offers=1)
    world.provider.boots_at_once = False
    await start_pod(world, max_lifetime_seconds=300)
    await minutes(world, 6)
    check_all_ended(world)
    assert micro(world, "usage") == 0
    assert cost(299) <= micro(world, "loss") <= cost(370)


async def test_a_vendor_that_ends_slowly_is_paid_by_the_agent_for_its_allowance_and_then_by_us(world: World) -> None:
    await world.freeze()
    await rent_from(world, Simulated())
    pod_id = await start_pod(world)
    await minutes(world, 10)
    world.provider.end_takes = 900
    await world.root.delete(f"/v1/pods/{pod_id}")
    await minutes(world, 20)
    check_all_ended(world)
    assert cost(600 + ALLOWANCE) <= micro(world, "usage") <= cost(602 + ALLOWANCE)
    assert cost(840 - ALLOWANCE - 2) <= micro(world, "loss") <= cost(900 - ALLOWANCE + 2)


async def test_the_minimum_and_the_increment_are_topped_up_once(world: World) -> None:
    await world.freeze()
    await world.use_final()
    pod_id = await start_pod(world, requirements={"gpu": ["a100"]}, max_lifetime_seconds=600)
    await world.pass_time(seconds=20)
    for action in ("stop", "start"):
        await world.root.post(f"/v1/pods/{pod_id}/{action}", status=202)
        await world.drive_due()
    await world.pass_time(seconds=50)
    await world.root.delete(f"/v1/pods/{pod_id}")
    await world.tick()
    await world.tick()
    check_all_ended(world)
    check_bill(world)
    assert len(world.query("SELECT 1 FROM ledger WHERE account = 'minimum'")) == 1
    assert micro(world, "usage") + micro(world, "minimum") == cost(120, 12_000_000), "70 seconds are two minutes"


async def test_ticks_that_come_an_hour_late_cost_the_agent_nothing_beyond_its_lifetime_and_allowance(
    world: World,
) -> None:
    await rent_from(world, Final())
    agent = await world.root.child(budget={"limit_usd": "1"})
    pod = await world.run(agent, max_lifetime_seconds=600)
    (hold,) = world.query("SELECT amount_micro FROM hold")
    await world.pass_time(seconds=600 + 3600)
    await world.tick()
    check_all_ended(world)
    check_bill(world)
    seen = await show(world, pod["id"], agent)
    assert (seen["state"], seen["ends_because"]) == ("terminated", "lifetime")
    assert micro(world, "usage") in (cost(609), cost(610))
    assert micro(world, "usage") <= hold["amount_micro"]
    assert cost(3585) <= micro(world, "loss") <= cost(3592)


async def test_a_delete_long_after_a_lifetime_that_no_tick_ended_costs_nothing_beyond_it(world: World) -> None:
    await rent_from(world, Final())
    pod_id = await start_pod(world, max_lifetime_seconds=600)
    await world.pass_time(days=3)
    await world.root.delete(f"/v1/pods/{pod_id}")
    await world.tick()
    check_all_ended(world)
    check_bill(world)
    assert micro(world, "usage") in (cost(609), cost(610))


async def test_spend_stays_under_every_cap_whatever_is_late(world: World) -> None:
    await rent_from(world, Simulated())
    world.query("UPDATE budget SET limit_micro = 3000000")
    child = await world.root.child(budget={"limit_usd": "2.5"})
    grandchild = await child.child(budget={"limit_usd": "2"})
    made: list[tuple[Client, str]] = []
    for agent in (grandchild, child, world.root) * 3:
        answer = await agent.call(
            "POST", "/v1/pods?duplicate=allow",
            json={"image": "busybox", "requirements": {"gpu": ["h100"]}, "max_lifetime_seconds": 1200},
        )  # fmt: skip
        if answer.is_success:
            made.append((agent, answer.json()["id"]))
        else:
            assert answer.json()["code"] == "budget_exhausted"
        world.check_money()
    assert len(made) == 4, "0.733333 each: two below the child's, one of the child's, one more of the root's"
    world.provider.end_takes = 1800
    await world.drive_due()
    await minutes(world, 15, every=5)
    await world.pass_time(hours=2)
    await world.tick()
    world.check_money()
    await minutes(world, 40, every=4)
    check_all_ended(world)
    assert micro(world, "usage") <= 4 * cost(1200 + ALLOWANCE)
    for agent, pod_id in made:
        pod = await show(world, pod_id, agent)
        assert float(pod["spent_usd"]) <= cost(1200 + ALLOWANCE) / 1e6


async def test_nothing_is_listed_as_missing_before_it_can_be_seen(world: World) -> None:
    pod_id = await at_vendor(world)
    world.provider.hidden.add("i-1")
    await world.tick()
    await world.pass_time(seconds=50)
    await world.tick()
    assert instance(world)["missed_since"] is None
    await world.pass_time(seconds=20)
    await world.sweep()
    assert instance(world)["misses"] == 1
    async with store.worker() as tx:
        assert await rows.list_due(tx.conn, 0, 10) == [pod_id], "and then it is looked at"


async def test_of_each_provider_as_many_are_driven_whatever_waits_for_another(world: World) -> None:
    await rent_from(world, Final())
    *hung, last = [(await world.root.pod())["id"] for _ in range(3)]
    world.query(
        "UPDATE pod SET candidates = jsonb_set(candidates, '{0,provider}', '\"hangs\"') WHERE id = ANY(%s)", hung
    )
    async with store.worker() as tx:
        assert await rows.list_due_at(tx.conn, 1) == [(hung[0], "hangs"), (last, world.provider.name)]
        assert len(await rows.list_due_at(tx.conn, 2)) == 3
