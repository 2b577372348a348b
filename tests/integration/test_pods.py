"""Pods as agents ask for them, watch them, act on them: what is refused, what it costs, and what stays secret."""

import asyncio
import json
import time
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb
from tests.factories import Client, World
from tests.simulator import OFFERS

from gpubroker import sealing
from gpubroker.money import cost, format_usd
from gpubroker.resources import State

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"image": "busybox", "requirements": {"gpu": ["h100"]}, "max_lifetime_seconds": 600}
ALLOWANCE = 120


def commit(price: int, life: int, minimum: int = 0, allowance: int = ALLOWANCE) -> int:
    """API.md's arithmetic: each part rounded up."""
    return cost(price, life) + cost(price, minimum) + cost(price, allowance)


async def offer_id(world: World, name: str) -> str:
    return world.query("SELECT id FROM offer WHERE provider_offer_id = %s", name)[0]["id"]


async def create(
    client: Client, status: int = 202, query: str = "", headers: dict[str, str] | None = None, **body: Any
) -> Any:
    """A request as it is, nothing added."""
    return await client.post(f"/v1/pods{query}", body, status, headers=headers or {})


# What a request must be


WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"requirements": None}, ""),
    ({"offer_id": "ofr_x"}, ""),
    ({"image": None}, ""),
    ({"image": ""}, "/image"),
    ({"image": "a b"}, "/image"),
    ({"image": 5}, "/image"),
    ({"command": []}, "/command"),
    ({"command": "sleep 1"}, "/command"),
    ({"command": ["a", 5]}, "/command/1"),
    ({"name": ""}, "/name"),
    ({"name": "a\u0007b"}, "/name"),
    ({"env": {"1A": "x"}}, "/env/1A"),
    ({"env": {"A-B": "x"}}, "/env/A-B"),
    ({"env": {"A": 5}}, "/env/A"),
    ({"env": {"GPUBROKER_PORT_1": "x"}}, "/env"),
    ({"env": [["A", "b"]]}, "/env"),
    ({"ports": [{"port": 0}]}, "/ports/0/port"),
    ({"ports": [{"port": 65536}]}, "/ports/0/port"),
    ({"ports": [{"port": 80, "protocol": "sctp"}]}, "/ports/0/protocol"),
    ({"ports": [{"port": 80}, {"port": 80}]}, "/ports"),
    ({"ports": [80]}, "/ports/0"),
    ({"ports": [{"port": 80, "host": 1}]}, "/ports/0/host"),
    ({"disk_gb": 0}, "/disk_gb"),
    ({"disk_gb": 1.5}, "/disk_gb"),
    ({"disk_gb": "10"}, "/disk_gb"),
    ({"labels": {"": "x"}}, "/labels/"),
    ({"labels": {"a b": "x"}}, "/labels/a b"),
    ({"labels": {"a": 5}}, "/labels/a"),
    ({"labels": {"a": "x" * 201}}, "/labels/a"),
    ({"requirements": {"gpus": 1}}, "/requirements/gpus"),
    ({"requirements": {"gpu": ["nonesuch 9000"]}}, "/requirements/gpu"),
    ({"requirements": {"gpu": 5}}, "/requirements/gpu"),
    ({"requirements": {"gpu_count": "1"}}, "/requirements/gpu_count"),
    ({"requirements": {"min_vcpus": "4"}}, "/requirements/min_vcpus"),
    ({"requirements": {"max_price_usd_per_hour": "1.0000001"}}, "/requirements/max_price_usd_per_hour"),
    ({"requirements": {"spot": "true"}}, "/requirements/spot"),
    ({"requirements": {"sort": "price"}}, "/requirements/sort"),
    ({"budget_usd": "-1"}, "/budget_usd"),
    ({"budget_usd": "1e3"}, "/budget_usd"),
    ({"budget_usd": True}, "/budget_usd"),
    ({"budget_usd": "0.0000001"}, "/budget_usd"),
    ({"max_lifetime_seconds": 9}, "/max_lifetime_seconds"),
    ({"max_lifetime_seconds": 366 * 86400 + 1}, "/max_lifetime_seconds"),
    ({"max_lifetime_seconds": 60.0}, "/max_lifetime_seconds"),
    ({"max_lifetime_seconds": "60"}, "/max_lifetime_seconds"),
    ({"max_attempts": 0}, "/max_attempts"),
    ({"max_attempts": 11}, "/max_attempts"),
    ({"offer_id": "ofr_00000000000000000000000000", "requirements": None}, "/offer_id"),
    ({"colour": "red"}, "/colour"),
    ({"restart_policy": "sometimes"}, "/restart_policy"),
    ({"restart_policy": "always", "on_exit": "terminate"}, ""),
    ({"command": ["a"], "image": None, "registry_auth": {"username": "u", "password": "p"}}, ""),
    ({"idle_timeout_seconds": 5}, "/idle_timeout_seconds"),
)


async def test_a_wrong_request_is_422_naming_the_place_and_makes_nothing(world: World, subtests: pytest.Subtests):
    for change, pointer in WRONG:
        with subtests.test(change=change):
            body = {name: value for name, value in {**BODY, **change}.items() if value is not None}
            refused = await create(world.root, 422, **body)
            assert refused["code"] == "invalid"
            assert pointer in [error["pointer"] for error in refused["errors"]], refused["errors"]
            assert refused["errors"][0]["message"]
    assert world.query("SELECT count(*) FROM pod") == world.query("SELECT count(*) FROM hold") == [{"count": 0}]


async def test_a_misspelt_field_is_told_what_was_meant(world: World):
    for field, meant in (
        ("max_lifetime_second", "max_lifetime_seconds"),
        ("images", "image"),
        ("buget_usd", "budget_usd"),
    ):
        refused = await create(world.root, 422, **BODY, **{field: 1})
        (error,) = [e for e in refused["errors"] if e["pointer"] == f"/{field}"]
        assert error["did_you_mean"] == meant


async def test_nothing_that_fits_is_422_no_offer_and_says_why(world: World):
    refused = await create(
        world.root, 422, **BODY | {"requirements": {"gpu": ["h100"], "max_price_usd_per_hour": "1.99"}}
    )
    assert (refused["code"], refused["no_match"]["considered"]) == ("no_offer", 3)
    assert refused["no_match"]["removed_by"]["max_price_usd_per_hour"] == 3
    nearest = refused["no_match"]["nearest"][0]
    assert (nearest["offer"]["provider_offer_id"], nearest["change"]) == (
        "h100-1",
        {"max_price_usd_per_hour": "2.000000"},
    )


async def test_what_the_request_needs_filters_offers_by_itself(world: World):
    world.provider.offers = [replace(OFFERS[0], supports=frozenset({"command", "exec"})), OFFERS[1]]
    world.query("DELETE FROM refresh")
    await world.use(world.provider)
    bare = await offer_id(world, "h100-1")
    assert (await create(world.root, **BODY))["offer"]["provider_offer_id"] == "h100-2"
    chosen = await create(world.root, command=["true"], requirements={"gpu": ["h100"]})
    assert chosen["offer"]["provider_offer_id"] == "h100-1"
    for body, lacking in (({"image": "busybox"}, "image"), ({"command": ["a"], "ports": [{"port": 80}]}, "ports")):
        refused = await create(world.root, 422, offer_id=bare, **body)
        assert refused["code"] == "not_supported"
        assert [(e["pointer"], e["message"]) for e in refused["errors"]] == [("/offer_id", f"lacks {lacking}")]
    assert (await create(world.root, 422, offer_id=await offer_id(world, "h100-2"), image="b", disk_gb=501))["errors"][
        0
    ]["pointer"] == "/disk_gb"


# The order of checks


async def test_checks_come_in_the_order_replay_name_duplicate_offer_budget(world: World):
    agent = await world.root.child(budget={"limit_usd": "2"})
    first = await create(agent, headers={"Idempotency-Key": "k"}, name="n", **BODY)
    twin = await create(agent, **BODY)
    impossible = {**BODY, "requirements": {"gpu": ["h100"], "country": "AQ"}}
    costly = {**BODY, "max_lifetime_seconds": 86400}
    again = await create(agent, headers={"Idempotency-Key": "k"}, name="n", **BODY)
    assert again["id"] == first["id"]
    named = await create(agent, 409, headers={"Idempotency-Key": "other"}, name="n", **impossible)
    assert (named["code"], named["pod"]["id"]) == ("name_in_use", first["id"])
    world.query("UPDATE offer SET availability = 'none'")
    duplicate = await create(agent, 409, **BODY)
    assert (duplicate["code"], duplicate["pod"]["id"]) == ("probable_duplicate", twin["id"])
    world.query("UPDATE offer SET availability = 'high'")
    assert (await create(agent, 422, **impossible, budget_usd="0"))["code"] == "no_offer"
    assert (await create(agent, 402, **costly))["code"] == "budget_exhausted"


async def test_a_problem_that_names_a_pod_says_how_to_read_it(world: World):
    first = await create(world.root, name="n", **BODY)
    refused = await create(world.root, 409, name="n", **BODY)
    assert refused["next"] == [{"method": "GET", "path": f"/v1/pods/{first['id']}"}]
    assert refused["pod"] == await world.root.get(f"/v1/pods/{first['id']}")


async def test_a_name_is_unique_among_an_agents_live_pods_and_free_once_the_end_is_wanted(world: World):
    child = await world.root.child()
    first = await create(world.root, name="n", **BODY)
    await create(child, name="n", **BODY)
    await create(world.root, 409, name="n", **BODY, max_attempts=2)
    await world.root.delete(f"/v1/pods/{first['id']}")
    second = await create(world.root, name="n", **BODY, max_attempts=2)
    assert second["id"] != first["id"]


async def test_ten_at_once_with_one_name_make_one_pod(world: World):
    bodies = [{**BODY, "name": "n", "max_attempts": number + 1} for number in range(10)]
    answers = await asyncio.gather(*(world.root.call("POST", "/v1/pods", json=body) for body in bodies))
    assert sorted(answer.status_code for answer in answers) == [202] + [409] * 9
    assert {answer.json()["code"] for answer in answers if answer.status_code == 409} == {"name_in_use"}
    world.check_money()
    assert world.query("SELECT count(*) FROM hold")[0]["count"] == 1


async def test_an_equal_request_within_two_minutes_is_a_probable_duplicate(world: World):
    first = await create(world.root, **BODY)
    refused = await create(world.root, 409, **dict(reversed(BODY.items())))
    assert (refused["code"], refused["pod"]["id"]) == ("probable_duplicate", first["id"])
    await create(world.root, query="?duplicate=allow", **BODY)
    await create(world.root, headers={"Idempotency-Key": "k"}, **BODY)
    await create(await world.root.child(), **BODY)
    await world.pass_time(seconds=121)
    await create(world.root, **BODY)


async def test_an_equal_request_whose_pod_is_to_end_is_no_duplicate(world: World):
    first = await create(world.root, **BODY)
    await world.root.delete(f"/v1/pods/{first['id']}")
    await create(world.root, **BODY)


async def test_ten_equal_requests_at_once_make_one_pod(world: World):
    """An agent whose first request has not answered yet sends it again: that is what the check is for."""
    answers = await asyncio.gather(*(world.root.call("POST", "/v1/pods", json=BODY) for _ in range(10)))
    assert sorted(answer.status_code for answer in answers) == [202] + [409] * 9
    assert world.query("SELECT count(*) FROM pod")[0]["count"] == 1


# Idempotency


async def test_the_same_key_and_body_answer_with_the_pod_as_it_is_now(world: World):
    await world.use_final()
    headers = {"Idempotency-Key": "k"}
    first = await world.root.call("POST", "/v1/pods", json=BODY, headers=headers)
    await world.drive_due()
    again = await world.root.call("POST", "/v1/pods", json=BODY, headers=headers)
    assert (first.status_code, again.status_code) == (202, 201)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.headers["Location"] == f"/v1/pods/{first.json()['id']}"
    assert (again.json()["id"], again.json()["state"]) == (first.json()["id"], "running")
    assert (await create(world.root, 422, headers=headers, **BODY, labels={"a": "b"}))[
        "code"
    ] == "idempotency_key_reused"


async def test_twenty_at_once_with_one_key_make_one_pod(world: World):
    answers = await asyncio.gather(
        *(world.root.call("POST", "/v1/pods", json=BODY, headers={"Idempotency-Key": "k"}) for _ in range(20))
    )
    assert {answer.status_code for answer in answers} <= {202, 409}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 202}) == 1
    assert {answer.json()["code"] for answer in answers if answer.status_code == 409} <= {"idempotency_in_progress"}
    assert world.query("SELECT count(*) FROM hold")[0]["count"] == 1


async def test_a_refused_create_leaves_nothing_and_its_key_may_be_used_again(world: World):
    agent = await world.root.child(budget={"limit_usd": "0.4"})
    assert (await create(agent, 402, headers={"Idempotency-Key": "k"}, **BODY))["code"] == "budget_exhausted"
    for table in ("pod", "hold", "event", "delivery", "idempotency", "pod_label"):
        assert world.query(f"SELECT count(*) FROM {table}")[0]["count"] == (1 if table == "event" else 0), table
    await world.root.put(f"/v1/budgets/{agent.agent_id}", {"limit_usd": "1"})
    await create(agent, headers={"Idempotency-Key": "k"}, **BODY)


# Money


async def test_a_pod_commits_price_life_minimum_and_allowance_each_rounded_up(world: World, subtests: pytest.Subtests):
    for name, price, minimum in (("h100-1", 2_000_000, 0), ("h100-2", 2_500_000, 0), ("a100-8", 12_000_000, 60)):
        for life in (10, 599, 3600, 3601):
            with subtests.test(offer=name, life=life):
                pod = await create(
                    world.root,
                    query="?duplicate=allow",
                    offer_id=await offer_id(world, name),
                    image="b",
                    max_lifetime_seconds=life,
                )
                assert pod["committed_usd"] == format_usd(commit(price, life, minimum))
                assert pod["price_usd_per_hour"] == format_usd(price)
                lasts = datetime.fromisoformat(pod["expires_at"]) - datetime.fromisoformat(pod["created_at"])
                assert lasts == timedelta(seconds=life)
                await world.root.delete(f"/v1/pods/{pod['id']}")


async def test_a_pod_with_several_offers_commits_for_the_dearest_of_them(world: World):
    both, one = await create(world.root, **BODY), await create(world.root, **BODY, max_attempts=1)
    assert both["committed_usd"] == format_usd(commit(2_500_000, 600))
    assert one["committed_usd"] == format_usd(commit(2_000_000, 600))
    assert both["price_usd_per_hour"] == one["price_usd_per_hour"] == "2.000000"


async def test_without_a_lifetime_a_pod_lives_for_what_the_budget_pays_and_an_hour_at_most(world: World):
    body = {"image": "b", "offer_id": await offer_id(world, "h100-1")}
    hour = await create(world.root, **body)
    assert hour["committed_usd"] == format_usd(commit(2_000_000, 3600))
    agent = await world.root.child(budget={"limit_usd": "0.5"})
    pod = await create(agent, **body)
    life = (500_000 - cost(2_000_000, ALLOWANCE)) * 3600 // 2_000_000
    assert datetime.fromisoformat(pod["expires_at"]) - datetime.fromisoformat(pod["created_at"]) == timedelta(
        seconds=life
    )
    assert commit(2_000_000, life) <= 500_000 < commit(2_000_000, life + 1)
    own = await create(world.root, **body, budget_usd="0.3")
    life = (300_000 - cost(2_000_000, ALLOWANCE)) * 3600 // 2_000_000
    assert datetime.fromisoformat(own["expires_at"]) - datetime.fromisoformat(own["created_at"]) == timedelta(
        seconds=life
    )
    assert (own["budget_usd"], own["committed_usd"]) == ("0.300000", format_usd(commit(2_000_000, life)))
    tiny = await world.root.child(budget={"limit_usd": format_usd(commit(2_000_000, 10) - 1)})
    assert (await create(tiny, 402, **body))["code"] == "budget_exhausted"


async def test_a_budget_that_does_not_cover_the_lifetime_is_402_never_a_silent_cut(world: World):
    body = {"image": "b", "offer_id": await offer_id(world, "h100-1"), "max_lifetime_seconds": 600}
    needed = commit(2_000_000, 600)
    refused = await create(world.root, 402, **body, budget_usd=format_usd(needed - 1))
    assert (refused["needed_usd"], refused["available_usd"]) == (format_usd(needed), format_usd(needed - 1))
    assert refused["affordable_seconds"] == 599
    await create(world.root, **body, budget_usd=format_usd(needed))


async def test_a_402_names_the_limiting_agent_only_if_it_is_the_caller(world: World):
    parent = await world.root.child(budget={"limit_usd": "0.4"})
    child = await parent.child(name="child")
    body = {"image": "b", "offer_id": await offer_id(world, "h100-1"), "max_lifetime_seconds": 3600}
    refused = await create(parent, 402, **body)
    assert (refused["limiting_agent"], refused["available_usd"]) == (parent.agent_id, "0.400000")
    assert refused["needed_usd"] == format_usd(commit(2_000_000, 3600))
    assert refused["affordable_seconds"] == (400_000 - cost(2_000_000, ALLOWANCE)) * 3600 // 2_000_000
    refused = await create(child, 402, **body)
    assert (refused["limiting_agent"], refused["available_usd"]) == (None, None)
    assert parent.agent_id not in json.dumps(refused)
    fits = await create(child, **body | {"max_lifetime_seconds": refused["affordable_seconds"]})
    assert fits["state"] == "requested"


async def test_a_402_that_two_racers_meet_is_the_same_problem(world: World):
    agent = await world.root.child(budget={"limit_usd": format_usd(commit(2_500_000, 600) + 5)})
    answers = await asyncio.gather(*(agent.call("POST", "/v1/pods?duplicate=allow", json=BODY) for _ in range(6)))
    assert sorted(answer.status_code for answer in answers) == [202] + [402] * 5
    for answer in answers:
        if answer.status_code == 402:
            assert answer.json()["limiting_agent"] == agent.agent_id
            assert answer.json()["available_usd"] in ("0.000005", format_usd(commit(2_500_000, 600) + 5))


async def test_a_dry_run_says_all_and_does_nothing(world: World):
    agent = await world.root.child(budget={"limit_usd": "1"})
    told = await create(agent, 200, "?dry_run=true", **BODY)
    assert (told["offer"]["provider_offer_id"], [o["provider_offer_id"] for o in told["alternatives"]]) == (
        "h100-1",
        ["h100-2"],
    )
    assert (told["commit_usd"], told["available_usd"]) == (format_usd(commit(2_500_000, 600)), "1.000000")
    assert told["affordable_seconds"] == (1_000_000 - cost(2_500_000, ALLOWANCE)) * 3600 // 2_500_000
    assert told["boot_seconds"] == 30
    costly = await create(agent, 200, "?dry_run=true", **BODY | {"max_lifetime_seconds": 86400})
    assert costly["commit_usd"] == format_usd(commit(2_500_000, 86400))
    for table in ("pod", "hold", "event", "idempotency"):
        assert (
            world.query(f"SELECT count(*) FROM {table} WHERE {'true' if table != 'event' else 'tenant IS NOT NULL'}")[
                0
            ]["count"]
            == 0
        )
    assert (await create(agent, 202, **BODY))["committed_usd"] == told["commit_usd"]


async def test_the_price_that_was_quoted_is_the_price_that_is_billed(world: World):
    await world.use_final()
    pod = await create(world.root, **BODY, max_attempts=1)
    world.query("UPDATE offer SET price_micro_h = 9000000")
    await world.drive_due()
    await world.pass_time(seconds=180)
    await world.tick()
    shown = await world.root.get(f"/v1/pods/{pod['id']}")
    assert shown["price_usd_per_hour"] == "2.000000"
    assert shown["spent_usd"] in [format_usd(2_000_000 * seconds // 3600) for seconds in (179, 180, 181)]


async def test_the_disk_that_is_asked_for_is_paid_for(world: World):
    world.provider.offers = [replace(OFFERS[0], disk_base_gb=100, disk_micro_gb_h=1_000)]
    world.query("DELETE FROM refresh")
    await world.use(world.provider)
    plain, large = await create(world.root, **BODY, disk_gb=100), await create(world.root, **BODY, disk_gb=400)
    assert (plain["price_usd_per_hour"], large["price_usd_per_hour"]) == ("2.000000", "2.300000")
    assert large["committed_usd"] == format_usd(commit(2_300_000, 600))
    required = await create(world.root, **BODY | {"requirements": {"gpu": ["h100"], "min_disk_gb": 400}})
    assert required["price_usd_per_hour"] == "2.300000"


async def test_the_disk_of_a_stopped_pod_is_paid_for(world: World):
    world.provider.offers = [replace(OFFERS[0], disk_base_gb=100, stopped_disk_micro_gb_h=500)]
    world.query("DELETE FROM refresh")
    await world.use(world.provider)
    (offer,) = (await world.root.get("/v1/offers?gpu=h100&min_disk_gb=400"))["items"]
    assert offer["stopped_price_usd_per_hour"] == "0.250000"
    assert (await world.root.get("/v1/offers?gpu=h100"))["items"][0]["stopped_price_usd_per_hour"] == "0.100000"
    pod = await world.run(world.root, disk_gb=400)
    await world.root.post(f"/v1/pods/{pod['id']}/stop", status=202)
    await world.drive_due()
    await world.pass_time(hours=1)
    await world.tick()
    (phase,) = world.query("SELECT price_micro_h FROM phase WHERE billing = 'storage'")
    assert phase["price_micro_h"] == 250_000


# Waiting


async def test_a_create_that_waits_answers_201_as_soon_as_the_pod_is_settled(world: World):
    moving = asyncio.create_task(move_soon(world, 0.3))
    began = time.monotonic()
    answer = await world.root.call("POST", "/v1/pods?wait=20", json=BODY)
    assert (answer.status_code, answer.json()["state"]) == (201, "running")
    assert time.monotonic() - began < 5
    await moving


async def move_soon(world: World, seconds: float) -> None:
    await asyncio.sleep(seconds)
    await world.drive_due()


async def test_a_wait_that_is_over_answers_with_what_there_is(world: World):
    began = time.monotonic()
    answer = await world.root.call("POST", "/v1/pods?wait=1", json=BODY)
    assert (answer.status_code, answer.json()["state"]) == (202, "requested")
    assert 0.9 < time.monotonic() - began < 3
    assert (answer.json()["settled"], answer.json()["poll_after_seconds"]) == (False, 2)
    assert 0 <= answer.json()["eta_seconds"] <= 30


async def test_prefer_wait_means_the_same_and_the_query_is_stronger(world: World):
    moving = asyncio.create_task(move_soon(world, 0.2))
    answer = await world.root.call("POST", "/v1/pods", json=BODY, headers={"Prefer": "respond-async, wait=20"})
    assert (answer.status_code, answer.json()["state"]) == (201, "running")
    await moving
    pod = await create(world.root, name="n", **BODY)
    began = time.monotonic()
    await world.root.get(f"/v1/pods/{pod['id']}?wait=0", headers={"Prefer": "wait=10"})
    assert time.monotonic() - began < 2


async def test_until_change_waits_for_a_version_after_the_one_that_is_named(world: World):
    pod = await create(world.root, **BODY)
    path = f"/v1/pods/{pod['id']}"
    began = time.monotonic()
    assert (await world.root.get(f"{path}?wait=20&until=change&after_version=0"))["version"] == pod["version"]
    moving = asyncio.create_task(move_soon(world, 0.2))
    changed = await world.root.get(f"{path}?wait=20&until=change&after_version={pod['version']}")
    assert changed["version"] > pod["version"]
    await moving
    moving = asyncio.create_task(stop_soon(world, path))
    present = (await world.root.get(path))["version"]
    changed = await world.root.get(f"{path}?wait=20&until=change")
    assert (changed["version"], changed["state"]) == (present + 1, "stopping")
    await moving
    assert time.monotonic() - began < 6


async def stop_soon(world: World, path: str) -> None:
    await asyncio.sleep(0.3)
    await world.root.post(f"{path}/stop", status=202)


async def test_until_running_does_not_wait_for_what_will_not_run(world: World):
    await world.use_final()
    world.provider.fail["create"] = ["no_capacity"] * 3
    pod = await create(world.root, **BODY)
    await world.drive_due()
    began = time.monotonic()
    ended = await world.root.get(f"/v1/pods/{pod['id']}?wait=20&until=running")
    assert (ended["state"], ended["ends_because"], ended["settled"]) == ("terminated", "no_capacity", True)
    running = await create(world.root, **BODY)
    await world.root.delete(f"/v1/pods/{running['id']}")
    assert (await world.root.get(f"/v1/pods/{running['id']}?wait=20&until=running"))["state"] == "terminating"
    assert time.monotonic() - began < 3


async def test_a_delete_waits_for_the_very_end(world: World):
    await world.use_final()
    pod = await world.run(world.root)
    path = f"/v1/pods/{pod['id']}"
    first = await world.root.call("DELETE", path)
    again = await world.root.call("DELETE", path)
    assert [(a.status_code, a.json()["state"]) for a in (first, again)] == [(202, "terminating")] * 2
    moving = asyncio.create_task(move_soon(world, 0.2))
    gone = await world.root.call("DELETE", f"{path}?wait=20")
    assert (gone.status_code, gone.json()["state"], gone.json()["settled"]) == (200, "terminated", True)
    await moving
    assert (await world.root.delete(path, 200))["ends_because"] == "requested"


async def test_a_delete_of_a_failed_pod_is_202_until_it_is_gone(world: World):
    pod = await create(world.root, **BODY)
    world.query(
        "UPDATE pod SET state = 'failed', wanted = 'gone', ends_because = 'no_capacity' WHERE id = %s", pod["id"]
    )
    answer = await world.root.delete(f"/v1/pods/{pod['id']}", 202)
    assert (answer["state"], answer["ends_because"]) == ("failed", "no_capacity")


async def test_waiting_is_bounded_and_checked(world: World):
    pod = await create(world.root, **BODY)
    for query in (
        "wait=61",
        "wait=-1",
        "wait=1.5",
        "until=dead",
        "after_version=-1",
        "after_version=x",
        "waits=1",
        "wait=1&wait=2",
    ):
        assert (await world.root.get(f"/v1/pods/{pod['id']}?{query}", 422))["code"] == "invalid", query


# Actions


TABLE: dict[State, set[str]] = {
    "awaiting_approval": {"logs"},
    "requested": {"extend"},
    "creating": {"extend"},
    "starting": {"extend"},
    "running": {"stop", "restart", "extend", "exec", "logs"},
    "stopping": {"logs"},
    "stopped": {"start", "extend", "logs"},
    "interrupted": {"start", "extend", "logs"},
    "unreachable": {"restart", "logs"},
    "terminating": {"logs"},
    "terminated": {"logs"},
    "failed": {"logs"},
}
OVER = ("terminating", "terminated", "failed")


async def test_each_state_allows_what_the_table_says_and_refuses_all_else(world: World, subtests: pytest.Subtests):
    assert set(TABLE) == set(State.__args__)
    pod = await create(world.root, **BODY)
    path = f"/v1/pods/{pod['id']}"
    for state, actions in TABLE.items():
        with subtests.test(state=state):
            wanted = (
                "gone" if state in OVER else "stopped" if state in ("stopping", "stopped", "interrupted") else "running"
            )

            def put(state: str = state, wanted: str = wanted) -> None:
                world.query("UPDATE pod SET state = %s, wanted = %s WHERE id = %s", state, wanted, pod["id"])

            put()
            shown = await world.root.get(path)
            listed = actions | (set() if state in OVER else {"terminate"})
            assert set(shown["allowed_actions"]) == listed
            for action in ("start", "stop", "restart", "extend"):
                put()
                body = {"max_lifetime_seconds": 600} if action == "extend" else None
                answer = await world.root.call("POST", f"{path}/{action}", json=body)
                if action in actions:
                    assert answer.status_code in (200, 202), f"{action}: {answer.text}"
                else:
                    assert (answer.status_code, answer.json()["code"]) == (409, "action_not_allowed"), action
                    assert set(answer.json()["allowed_actions"]) == listed
                    assert answer.json()["next"]
            put()
            executed = await world.root.call("POST", f"/v1/exec/{pod['id']}", json={"command": ["true"]})
            assert executed.json()["code"] == "not_running"
            assert executed.status_code == 409
            put()
            assert (await world.root.call("DELETE", path)).status_code == (200 if state == "terminated" else 202)


async def test_what_the_provider_cannot_is_422_not_supported_in_any_state(world: World):
    world.provider.offers = [replace(OFFERS[0], supports=frozenset({"image", "command"}))]
    world.query("DELETE FROM refresh")
    await world.use(world.provider)
    pod = await world.run(world.root)
    assert pod["allowed_actions"] == ["extend", "terminate"]
    for action in ("start", "stop", "restart"):
        assert (await world.root.post(f"/v1/pods/{pod['id']}/{action}", status=422))["code"] == "not_supported"
    assert (await world.root.post(f"/v1/exec/{pod['id']}", {"command": ["a"]}, 422))["code"] == "not_supported"
    assert (await world.root.get(f"/v1/logs/{pod['id']}", 422))["code"] == "not_supported"


async def test_a_restart_needs_a_provider_that_can_and_a_disk_that_stays(world: World, monkeypatch: pytest.MonkeyPatch):
    cases = (
        ("vm", True, {"image"}, True),
        ("vm", False, {"image", "stop"}, False),
        ("container", True, {"image"}, False),
    )
    for kind, restarts, supports, allowed in cases:
        can = replace(world.provider.capabilities, kind=kind, restarts=restarts)
        monkeypatch.setattr(type(world.provider), "capabilities", can)
        world.provider.offers = [replace(OFFERS[0], supports=frozenset({*supports, "command"}))]
        world.query("DELETE FROM refresh")
        await world.use(world.provider)
        pod = await world.run(world.root)
        assert ("restart" in pod["allowed_actions"]) == allowed, kind
        await world.root.post(f"/v1/pods/{pod['id']}/restart", status=202 if allowed else 422)


async def test_pods_and_quotes_of_another_release_are_read(world: World):
    """A release that is replaced, or comes back, writes other fields of an offer than this one."""
    quote = await world.root.post("/v1/quotes", {"requirements": {"gpu": ["h100"]}, "duration_seconds": 600})
    later, earlier = await world.root.pod(), await world.root.pod()
    more, less = {"invented_later": [1]}, ["availability", "observed_at", "stale", "priced_disk_gb"]
    world.query("UPDATE quote SET offer = offer || %s", Jsonb(more))
    for pod, change, value in ((later, "c || %s", Jsonb(more)), (earlier, "c - %s::text[]", less)):
        world.query(
            "UPDATE pod SET candidates = (SELECT jsonb_agg(" + change + ") FROM jsonb_array_elements(candidates) c)"
            " WHERE id = %s", value, pod["id"],
        )  # fmt: skip
    assert (await world.root.get(f"/v1/pods/{earlier['id']}"))["offer"]["stale"] is None
    quoted = await world.root.post("/v1/pods", {"image": "busybox", "quote_id": quote["id"]}, 202)
    await world.drive_due()
    for pod in (later, earlier, quoted):
        assert (await world.root.get(f"/v1/pods/{pod['id']}"))["state"] == "running"


async def test_agents_above_may_list_stop_and_terminate_and_nothing_else(world: World):
    parent = await world.root.child(name="parent")
    child = await parent.child(name="child")
    pod = await world.run(child)
    path = f"/v1/pods/{pod['id']}"
    assert (await parent.get(path))["id"] == (await parent.get("/v1/pods"))["items"][0]["id"] == pod["id"]
    for action, body in (("start", None), ("restart", None), ("extend", {"max_lifetime_seconds": 900})):
        assert (await parent.post(f"{path}/{action}", body, 403))["code"] == "forbidden"
    assert (await parent.post(f"/v1/exec/{pod['id']}", {"command": ["a"]}, 403))["code"] == "forbidden"
    assert (await parent.get(f"/v1/logs/{pod['id']}", 403))["code"] == "forbidden"
    assert (await parent.post(f"{path}/stop", status=202))["state"] == "stopping"
    assert (await parent.delete(path))["state"] == "terminating"


async def test_pods_of_others_do_not_exist_for_any_call(world: World):
    parent, sibling = await world.root.child(name="parent"), await world.root.child(name="sibling")
    child = await parent.child(name="child")
    pod = await create(parent, name="n", labels={"a": "b"}, **BODY)
    never = "pod_00000000000000000000000000"
    for stranger in (sibling, child):
        for method, path, body in (
            ("GET", "/v1/pods/{}", None), ("DELETE", "/v1/pods/{}", None), ("POST", "/v1/pods/{}/stop", None),
            ("POST", "/v1/pods/{}/start", None), ("POST", "/v1/pods/{}/extend", {"max_lifetime_seconds": 900}),
            ("GET", "/v1/pods/{}/events", None), ("GET", "/v1/logs/{}", None), ("POST", "/v1/exec/{}", {"command": ["a"]}),
        ):  # fmt: skip
            hidden = await stranger.call(method, path.format(pod["id"]), json=body)
            unknown = await stranger.call(method, path.format(never), json=body)
            assert hidden.status_code == unknown.status_code == 404, path
            assert {**hidden.json(), "request_id": ""} == {**unknown.json(), "request_id": ""}
        for query in ("", "?label=a%3Db", f"?agent_id={parent.agent_id}"):
            assert (await stranger.get(f"/v1/pods{query}"))["items"] == []
    assert world.query("SELECT wanted FROM pod") == [{"wanted": "running"}]


# Extending


async def test_extend_gives_new_totals_and_takes_what_is_missing(world: World):
    pod = await create(world.root, **BODY, max_attempts=1)
    path = f"/v1/pods/{pod['id']}/extend"
    longer = await world.root.post(path, {"max_lifetime_seconds": 1200}, 202)
    assert longer["committed_usd"] == format_usd(commit(2_000_000, 1200))
    assert datetime.fromisoformat(longer["expires_at"]) - datetime.fromisoformat(pod["created_at"]) == timedelta(
        seconds=1200
    )
    assert [h["cause"] for h in world.query("SELECT cause FROM hold ORDER BY id")] == ["create", "extend:1"]
    same = await world.root.post(path, {"max_lifetime_seconds": 1200}, 202)
    assert same["committed_usd"] == longer["committed_usd"]
    refused = await world.root.post(path, {"max_lifetime_seconds": 1199}, 422)
    assert (refused["code"], refused["errors"][0]["pointer"]) == ("invalid", "/max_lifetime_seconds")
    world.check_money()


async def test_extend_before_an_offer_is_chosen_holds_for_the_dearest(world: World):
    pod = await create(world.root, **BODY)
    longer = await world.root.post(f"/v1/pods/{pod['id']}/extend", {"max_lifetime_seconds": 700}, 202)
    assert longer["committed_usd"] == format_usd(commit(2_500_000, 700))


async def test_extend_is_402_when_a_budget_lacks_the_rest_and_nothing_moves(world: World):
    agent = await world.root.child(budget={"limit_usd": format_usd(commit(2_000_000, 700))})
    pod = await create(agent, **BODY, max_attempts=1)
    path = f"/v1/pods/{pod['id']}"
    refused = await agent.post(f"{path}/extend", {"max_lifetime_seconds": 701}, 402)
    assert (refused["code"], refused["limiting_agent"]) == ("budget_exhausted", agent.agent_id)
    assert refused["needed_usd"] == format_usd(commit(2_000_000, 701) - commit(2_000_000, 600))
    assert refused["available_usd"] == format_usd(commit(2_000_000, 700) - commit(2_000_000, 600))
    assert await agent.get(path) == pod
    assert (await agent.post(f"{path}/extend", {"max_lifetime_seconds": 700}, 202))["version"] > pod["version"]


async def test_extend_obeys_the_pods_own_budget_and_can_raise_it(world: World):
    pod = await create(world.root, **BODY, max_attempts=1, budget_usd="0.5")
    path = f"/v1/pods/{pod['id']}/extend"
    refused = await world.root.post(path, {"max_lifetime_seconds": 3600}, 402)
    assert refused["available_usd"] == "0.500000"
    assert (await world.root.post(path, {"budget_usd": "0.49"}, 422))["errors"][0]["pointer"] == "/budget_usd"
    assert (await world.root.post(path, {}, 422))["code"] == "invalid"
    both = await world.root.post(path, {"max_lifetime_seconds": 3600, "budget_usd": "3"}, 202)
    assert (both["budget_usd"], both["committed_usd"]) == ("3.000000", format_usd(commit(2_000_000, 3600)))
    money = await world.root.post(path, {"budget_usd": "4"}, 202)
    life = (4_000_000 - cost(2_000_000, ALLOWANCE)) * 3600 // 2_000_000
    assert datetime.fromisoformat(money["expires_at"]) - datetime.fromisoformat(pod["created_at"]) == timedelta(
        seconds=life
    )
    assert money["committed_usd"] == format_usd(commit(2_000_000, life))


async def test_extend_past_the_hard_stop_needs_a_provider_that_can_move_it(world: World):
    pod = await world.run(world.root, max_attempts=1)
    path = f"/v1/pods/{pod['id']}/extend"
    (row,) = world.query("SELECT hard_stop_at FROM pod")
    refused = await world.root.post(path, {"max_lifetime_seconds": 600 + 901}, 422)
    assert (refused["code"], refused["errors"][0]["pointer"]) == ("not_supported", "/max_lifetime_seconds")
    assert (await world.root.get(f"/v1/pods/{pod['id']}"))["committed_usd"] == pod["committed_usd"]
    await world.root.post(path, {"max_lifetime_seconds": 600 + 900}, 200)
    assert world.query("SELECT hard_stop_at, ends_at FROM pod") == [
        {"hard_stop_at": row["hard_stop_at"], "ends_at": row["hard_stop_at"]}
    ]


async def test_extend_moves_the_hard_stop_where_the_provider_can(world: World):
    await world.use_final()
    movable = await world.run(world.root, max_attempts=1)
    longer = await world.root.post(f"/v1/pods/{movable['id']}/extend", {"max_lifetime_seconds": 7200}, 200)
    assert datetime.fromisoformat(longer["expires_at"]) > datetime.fromisoformat(movable["expires_at"])
    (row,) = world.query("SELECT hard_stop_at - ends_at AS after FROM pod WHERE id = %s", movable["id"])
    assert row["after"] == timedelta(minutes=15)
    await world.drive_due()
    assert [subject for operation, subject in world.provider.calls if operation == "extend"] == [
        movable["provider_instance_id"]
    ]


# Lists


async def test_lists_filter_by_state_agent_label_and_time(world: World):
    parent = await world.root.child(name="parent")
    child = await parent.child(name="child")
    made = {
        "a": await create(parent, labels={"team": "x", "run": "1"}, **BODY),
        "b": await create(child, labels={"team": "x", "run": "2"}, **BODY),
        "c": await create(child, labels={"team": "y", "odd": "a=b"}, **BODY),
    }
    world.query("UPDATE pod SET state = 'running' WHERE id = %s", made["b"]["id"])
    names = {pod["id"]: name for name, pod in made.items()}
    queries = {
        "": "cba", "?state=requested": "ca", "?state=running&state=requested": "cba", "?state=stopped": "",
        f"?agent_id={child.agent_id}": "cb", f"?agent_id={parent.agent_id}": "a", "?label=team%3Dx": "ba",
        "?label=team%3Dx&label=run%3D2": "b", "?label=odd%3Da%3Db": "c", "?label=team%3D": "", "?label=none%3Dx": "",
        f"?created_after={made['a']['created_at']}": "cb", f"?created_after={made['c']['created_at']}": "",
        "?state=requested&label=team%3Dx": "a", "?agent_id=agt_nobody": "",
    }  # fmt: skip
    for query, wanted in queries.items():
        found = await parent.get(f"/v1/pods{query}")
        assert "".join(names[pod["id"]] for pod in found["items"]) == wanted, query
    wrong = [
        "?state=alive", "?label=noequals", "?label=%3Dx", "?created_after=yesterday", "?created_after=2026-01-01", "?limit=0",
        "?label=a%3D1&label=a%3D2", "?cursor=WzFd", "?page=2",
    ]  # fmt: skip
    for query in wrong:
        assert (await parent.get(f"/v1/pods{query}", 422))["code"] == "invalid", query


async def test_pages_of_pods_are_whole_while_pods_are_made(world: World):
    made = [(await world.root.pod())["id"] for _ in range(7)]
    seen, cursor = [], ""
    while cursor is not None:
        page = await world.root.get(f"/v1/pods?limit=3{cursor and '&cursor=' + cursor}")
        seen += [pod["id"] for pod in page["items"]]
        cursor = page["next_cursor"]
        await world.root.pod()
    assert seen == made[::-1]


async def test_bulk_delete_needs_a_filter_and_ends_what_matches_in_the_subtree(world: World):
    parent = await world.root.child(name="parent")
    child = await parent.child(name="child")
    mine, theirs = await create(parent, labels={"run": "1"}, **BODY), await create(child, labels={"run": "1"}, **BODY)
    other, above = (
        await create(child, labels={"run": "2"}, **BODY),
        await create(world.root, labels={"run": "1"}, **BODY),
    )
    assert (await parent.delete("/v1/pods", 422))["code"] == "invalid"
    ended = await parent.delete("/v1/pods?label=run%3D1")
    assert {pod["id"] for pod in ended["items"]} == {mine["id"], theirs["id"]}
    assert {pod["state"] for pod in ended["items"]} == {"terminating"}
    assert (await parent.delete("/v1/pods?label=run%3D1"))["items"] == []
    wanted = {row["id"]: row["wanted"] for row in world.query("SELECT id, wanted FROM pod")}
    assert (wanted[other["id"]], wanted[above["id"]]) == ("running", "running")


# Secrets


async def test_env_is_sealed_at_rest_never_shown_and_erased_at_the_end(world: World, caplog: pytest.LogCaptureFixture):
    caplog.set_level("DEBUG")
    await world.use_final()
    secret, password = "hunter2-the-very-secret", "pass-word-of-the-registry"
    body = {**BODY, "env": {"TOKEN": secret}, "registry_auth": {"username": "u", "password": password}}
    pod = await create(world.root, headers={"Idempotency-Key": "k"}, **body)
    refused = await world.root.call(
        "POST", "/v1/pods", json=body | {"requirements": {"gpu": ["h100"], "country": "AQ"}}
    )
    await world.drive_due()
    shown = [pod, await world.root.get(f"/v1/pods/{pod['id']}"), await world.root.get("/v1/pods"), refused.json()]
    shown += [await world.root.get(f"/v1/pods/{pod['id']}/events"), await create(world.root, 409, **body)]
    (row,) = world.query("SELECT env_sealed FROM pod")
    assert json.loads(sealing.unseal("pod", pod["id"], bytes(row["env_sealed"])))["env"] == {"TOKEN": secret}
    for text in (json.dumps(shown), everything(world), " ".join(r.getMessage() for r in caplog.records)):
        for word in (secret, password, secret.encode().hex()):
            assert word not in text
    with pytest.raises(sealing.SealBroken):
        sealing.unseal("pod", "pod_of_another", bytes(row["env_sealed"]))
    await world.root.delete(f"/v1/pods/{pod['id']}")
    await world.drive_due()
    assert world.query("SELECT state, env_sealed FROM pod") == [{"state": "terminated", "env_sealed": None}]


def everything(world: World) -> str:
    """All rows of all tables, as text."""
    tables = world.query("SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace")
    return str([world.query(f"SELECT t::text FROM {table['relname']} t") for table in tables])


async def test_the_provider_gets_the_env_that_was_sealed(world: World):
    seen: list[Any] = []
    provider, real = world.provider, world.provider.create

    async def create_and_see(spec: Any, offer: Any, ref: str) -> Any:
        seen.append(spec)
        return await real(spec, offer, ref)

    provider.create = create_and_see  # type: ignore[method-assign]
    await world.run(
        world.root, env={"A": "1", "B": "é\n"}, ports=[{"port": 80, "protocol": "http"}], command=["x", "y"], disk_gb=7
    )
    assert (seen[0].env, seen[0].command, seen[0].image, seen[0].disk_gb) == (
        {"A": "1", "B": "é\n"},
        ("x", "y"),
        "busybox",
        7,
    )
    assert [(port.port, port.protocol) for port in seen[0].ports] == [(80, "http")]
    assert "é" not in repr(seen[0])


# Quotes


async def test_a_quote_is_firm_in_price_for_its_time_its_agent_and_one_pod(world: World):
    quote = await world.root.post("/v1/quotes", {"offer_id": await offer_id(world, "h100-1"), "duration_seconds": 900})
    assert (quote["price_usd_per_hour"], quote["duration_seconds"], quote["pod_id"]) == ("2.000000", 900, None)
    world.query("UPDATE offer SET price_micro_h = 9000000")
    stranger = await world.root.child()
    assert (await create(stranger, 404, image="b", quote_id=quote["id"]))["code"] == "not_found"
    pod = await create(world.root, image="b", quote_id=quote["id"])
    assert pod["price_usd_per_hour"] == "2.000000"
    assert pod["committed_usd"] == quote["total_usd"] == format_usd(commit(2_000_000, 900))
    used = await create(world.root, 409, query="?duplicate=allow", image="b", quote_id=quote["id"])
    assert (used["code"], used["pod_id"]) == ("quote_used", pod["id"])
    late = await world.root.post("/v1/quotes", {"requirements": {"gpu": ["h100"]}, "duration_seconds": 900})
    world.query("UPDATE quote SET expires_at = instant() WHERE id = %s", late["id"])
    assert (await create(world.root, 410, image="b", quote_id=late["id"]))["code"] == "quote_expired"


async def test_one_quote_that_many_use_at_once_makes_one_pod(world: World):
    quote = await world.root.post("/v1/quotes", {"offer_id": await offer_id(world, "h100-1"), "duration_seconds": 900})
    body = {"image": "b", "quote_id": quote["id"]}
    answers = await asyncio.gather(*(world.root.call("POST", "/v1/pods?duplicate=allow", json=body) for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [202] + [409] * 7
    assert world.query("SELECT count(*) FROM hold")[0]["count"] == 1


# What the database itself refuses


async def test_no_pod_lives_past_its_hard_stop_whoever_writes(world: World):
    pod = await create(world.root, **BODY)
    with pytest.raises(psycopg.errors.CheckViolation):
        world.query("UPDATE pod SET ends_at = hard_stop_at + interval '1 second' WHERE id = %s", pod["id"])
