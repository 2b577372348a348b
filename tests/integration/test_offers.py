"""What can be rented: every filter and order against a reading of the rows, pages that stay whole, refreshes that write little."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any

import psycopg
import pytest
from tests import plans
from tests.factories import World
from tests.simulator import OFFERS, Broken, Simulated

from gpubroker import catalog, store
from gpubroker.gpus import ask
from gpubroker.money import format_usd, parse_usd
from gpubroker.providers import base
from gpubroker.store import catalog as refreshes
from gpubroker.store import offers as rows

pytestmark = pytest.mark.anyio

GPUS = (
    ("H100 SXM", 80),
    ("H100 PCIe", 80),
    ("H200 SXM", 141),
    ("A100 80GB", 80),
    ("L4", 24),
    ("Strange 1", 24),
    ("Strange 1", 48),
    (None, None),
)
SUPPORTS = ("command", "image", "ports", "exec", "logs", "stop", "ssh")
NEVER = 2**62


def make_offers(count: int, seed: int) -> list[refreshes.NewOffer]:
    dice = random.Random(seed)
    made = []
    for number in range(count):
        gpu, vram = dice.choice(GPUS)
        made.append(
            refreshes.NewOffer(
                provider_offer_id=f"o{number}",
                gpu=gpu,
                gpu_count=dice.choice([1, 2, 4, 8]) if gpu else 0,
                vram_gb=vram,
                vcpus=dice.choice([0.5, 4, 16, 64]),
                ram_gb=dice.choice([1.5, 32, 128]),
                disk_gb=dice.choice([20, 100, 2000]),
                disk_base_gb=dice.choice([0, 20]),
                disk_micro_gb_h=dice.choice([0, 0, 137, 9_000]),
                region=dice.choice(["eu-1", "eu_1", "US-West-2"]),
                country=dice.choice(["FI", "US", None]),
                spot=dice.random() < 0.3,
                price_micro_h=dice.choice([100_000, 2_390_000, dice.randint(1, 10**8)]),
                stopped_micro_h=None,
                stopped_disk_micro_gb_h=0,
                min_billing_s=0,
                increment_s=1,
                supports=",".join(sorted(dice.sample(SUPPORTS, dice.randint(1, 7)))),
                reliability=dice.choice([None, 0.5, 0.9, 0.99]),
                availability=dice.choice(["none", "low", "medium", "high", "high"]),
                quarantined="odd" if dice.random() < 0.08 else None,
            )
        )
    return made


@pytest.fixture
async def market(world: World) -> World:
    """Two accounts with a hundred offers each, fresh, and what the simulator offers."""
    for number in (1, 2):
        async with store.worker() as tx:
            account = await refreshes.ensure_account(tx.conn, f"vendor{number}", "identity", {}, 900)
            await refreshes.merge_offers(tx.conn, account, f"vendor{number}", make_offers(100, number))
    world.query("UPDATE provider_account SET refreshed_at = clock_timestamp()")
    world.query("UPDATE offer SET gone_at = clock_timestamp() WHERE provider_offer_id = 'o7'")
    return world


# A second opinion on each filter, over the rows as they are


def price(row: dict[str, Any], disk: int) -> int:
    return row["price_micro_h"] + row["disk_micro_gb_h"] * max(0, disk - row["disk_base_gb"])


def per_gpu(row: dict[str, Any], disk: int) -> int:
    return price(row, disk) // max(row["gpu_count"], 1)


RULES: dict[str, Any] = {
    "gpu": lambda r, v, _: r["gpu"] in {name for text in v.split(",") for name in ask(text)},
    "gpu_count": lambda r, v, _: r["gpu_count"] == int(v),
    "min_gpu_count": lambda r, v, _: r["gpu_count"] >= int(v),
    "min_vram_gb": lambda r, v, _: (r["vram_gb"] or -1) >= int(v),
    "min_vcpus": lambda r, v, _: float(r["vcpus"]) >= float(v),
    "min_ram_gb": lambda r, v, _: float(r["ram_gb"]) >= float(v),
    "min_disk_gb": lambda r, v, _: r["disk_gb"] >= int(v),
    "provider": lambda r, v, _: r["provider"] in v.split(","),
    "region": lambda r, v, _: fnmatchcase(r["region"].lower(), v.lower()),
    "country": lambda r, v, _: r["country"] == v.upper(),
    "spot": lambda r, v, _: r["spot"] == (v == "true"),
    "max_price_usd_per_hour": lambda r, v, disk: price(r, disk) <= parse_usd(v),
    "max_price_usd_per_gpu_hour": lambda r, v, disk: r["gpu_count"] > 0 and per_gpu(r, disk) <= parse_usd(v),
    "supports": lambda r, v, _: set(v.split(",")) <= set(r["supports"]),
    "min_reliability": lambda r, v, _: r["reliability"] is not None and r["reliability"] >= float(v),
    "available": lambda r, v, _: v == "false" or r["availability"] != "none",
}
VALUES: dict[str, tuple[str, ...]] = {
    "gpu": ("h100", "H100_SXM", "a100 80gb", "L4,H200"),
    "gpu_count": ("1", "8", "0"),
    "min_gpu_count": ("0", "1", "4"),
    "min_vram_gb": ("0", "40", "80", "100"),
    "min_vcpus": ("0", "0.5", "16"),
    "min_ram_gb": ("1.5", "32"),
    "min_disk_gb": ("1", "100", "1500"),
    "provider": ("vendor1", "vendor1,vendor2", "nobody"),
    "region": ("eu-1", "EU*", "us-????-2", "*_1", "*"),
    "country": ("FI", "us"),
    "spot": ("true", "false"),
    "max_price_usd_per_hour": ("0.1", "2.39", "50"),
    "max_price_usd_per_gpu_hour": ("0.1", "10.5"),
    "supports": ("exec", "exec,logs,stop", "ssh"),
    "min_reliability": ("0", "0.5", "0.9", "0.99"),
    "available": ("true", "false"),
}


def per_vram(row: dict[str, Any], disk: int) -> int:
    size = (row["vram_gb"] or 0) * row["gpu_count"]
    return price(row, disk) // size if size else NEVER


def value(row: dict[str, Any], disk: int) -> float:
    return per_vram(row, disk) / max(0.1, row["reliability"] or 0.9) if per_vram(row, disk) != NEVER else NEVER


SORTS: dict[str, Any] = {"price": price, "price_per_gpu": per_gpu, "price_per_vram_gb": per_vram, "value": value}


def expected(world: World, query: dict[str, str]) -> dict[str, dict[str, Any]]:
    disk = int(query.get("min_disk_gb", 0))
    wanted = {"available": "true"} | query
    return {
        row["id"]: row
        for row in world.query("SELECT * FROM offer WHERE gone_at IS NULL AND quarantined IS NULL")
        if all(RULES[name](row, text, disk) for name, text in wanted.items())
    }


async def found(world: World, query: dict[str, str], sort: str = "price", size: int = 200) -> list[dict[str, Any]]:
    """All that a search finds, by pages of this size."""
    items: list[dict[str, Any]] = []
    cursor = None
    while True:
        page = await world.root.get(
            "/v1/offers", params={"limit": str(size), "sort": sort} | query | ({"cursor": cursor} if cursor else {})
        )
        items, cursor = items + page["items"], page["next_cursor"]
        if cursor is None:
            return items


# Filters and orders


async def test_each_filter_alone_finds_exactly_what_satisfies_it(market: World, subtests: pytest.Subtests):
    assert set(RULES) == set(rows.FILTERS) | {"available"}
    for name, texts in VALUES.items():
        for text in texts:
            with subtests.test(**{name: text}):
                items = await found(market, {name: text})
                assert sorted(item["id"] for item in items) == sorted(expected(market, {name: text}))


async def test_filters_together_find_what_satisfies_all_of_them(market: World):
    dice = random.Random(3)
    empty = 0
    for _ in range(120):
        names = dice.sample(sorted(VALUES), dice.randint(2, 4))
        query = {name: dice.choice(VALUES[name]) for name in names}
        items = await found(market, query, dice.choice(sorted(SORTS)), dice.choice((3, 20, 200)))
        wanted = expected(market, query)
        assert sorted(item["id"] for item in items) == sorted(wanted), query
        empty += not wanted
    assert empty < 60, "most combinations find nothing: the test shows little"


async def test_every_sort_goes_up_and_down_with_the_disk_that_is_asked_for(market: World):
    queries = ({}, {"gpu": "h100"}, {"min_disk_gb": "100"}, {"min_disk_gb": "100", "min_vram_gb": "24"})
    for sort, query in itertools.product(SORTS, queries):
        disk = int(query.get("min_disk_gb", 0))
        by_id = expected(market, query)
        up, down = await found(market, query, sort, 11), await found(market, query, f"-{sort}", 11)
        assert [item["id"] for item in down] == [item["id"] for item in reversed(up)], query
        assert sorted(item["id"] for item in up) == sorted(by_id)
        places = [SORTS[sort](by_id[item["id"]], disk) for item in up]
        for one, next_one in itertools.pairwise(places):
            assert one <= next_one + (1 if sort == "value" else 0), query  # values are rounded


async def test_an_offer_says_what_it_costs_with_the_disk_that_is_asked_for(market: World):
    for disk in (0, 50, 1999):
        query = {"min_disk_gb": str(disk)} if disk else {}
        by_id = expected(market, query)
        for item in await found(market, query):
            row = by_id[item["id"]]
            assert item["price_usd_per_hour"] == format_usd(price(row, disk))
            assert item["price_usd_per_gpu_hour"] == (format_usd(per_gpu(row, disk)) if row["gpu_count"] else None)


async def test_an_offer_has_its_fields_and_can_be_read_alone(market: World):
    (row,) = market.query("SELECT * FROM offer WHERE provider_offer_id = 'h100-1'")
    shown = await market.root.get(f"/v1/offers/{row['id']}")
    observed = shown.pop("observed_at")
    assert datetime.fromisoformat(observed).tzinfo is not None
    assert shown == {
        "id": row["id"], "provider": "simulated", "provider_offer_id": "h100-1", "gpu": "H100 SXM", "gpu_count": 1, "vram_gb": 80,
        "vcpus": 16.0, "ram_gb": 128.0, "disk_gb": 500, "region": "eu-1", "country": "FI", "spot": False,
        "price_usd_per_hour": "2.000000", "price_usd_per_gpu_hour": "2.000000", "min_billing_seconds": 0,
        "billing_increment_seconds": 1, "stopped_price_usd_per_hour": "0.100000",
        "supports": ["command", "exec", "image", "logs", "ports", "stop"], "reliability": None, "availability": "high",
        "stale": False,
    }  # fmt: skip
    (listed,) = [item for item in await found(market, {}) if item["id"] == row["id"]]
    assert listed == shown | {"observed_at": observed}


async def test_what_is_gone_quarantined_or_of_nobody_does_not_exist(market: World):
    (gone,) = market.query("SELECT id FROM offer WHERE provider_offer_id = 'o7' AND provider = 'vendor1'")
    for offer_id in (gone["id"], "ofr_00000000000000000000000000", "nothing", "%00", "%F0%9F%98%80"):
        assert (await market.root.get(f"/v1/offers/{offer_id}", 404))["code"] == "not_found"
    hidden = {
        row["id"] for row in market.query("SELECT id FROM offer WHERE gone_at IS NOT NULL OR quarantined IS NOT NULL")
    }
    assert hidden
    assert not hidden & {item["id"] for item in await found(market, {"available": "false"})}


async def test_an_unknown_model_is_refused_with_the_nearest_one(market: World):
    for text, near in (("h10", "H100"), ("A100 90G", None), ("rtx 4091", "RTX 4090"), ("gtx", None), ("x", None)):
        refused = await market.root.get("/v1/offers", 422, params={"gpu": text})
        (error,) = refused["errors"]
        assert (refused["code"], error["pointer"]) == ("invalid", "?gpu"), text
        if near:
            assert near in error["did_you_mean"]


async def test_three_spellings_are_one_thing(market: World):
    answers = [[i["id"] for i in await found(market, {"gpu": text})] for text in ("A100-80G", "a100 80gb", "A100_80GB")]
    assert answers[0]
    assert answers[0] == answers[1] == answers[2]
    repeated = await market.root.get("/v1/offers?gpu=h200&gpu=l4&limit=200")
    assert {i["id"] for i in repeated["items"]} == set(expected(market, {"gpu": "h200,l4"}))


async def test_a_query_is_checked(market: World):
    wrong = [
        "gpu=", "gpu_count=1.5", "gpu_count=-1", "gpu_count=+1", "min_vcpus=many", "min_vcpus=1e3", "min_vcpus=NaN",
        "min_ram_gb=-1", "country=USA",
        "spot=yes", "spot=1", "max_price_usd_per_hour=-1", "max_price_usd_per_hour=1.0000001", "max_price_usd_per_hour=$5",
        "supports=flying", "min_reliability=1.1", "sort=cheap", "limit=0", "limit=201", "limit=x", "available=maybe", "region=",
        "cursor=nonsense", "cursor=W10", "min_vram_gb=99999999999999999999", "gpus=h100", "gpu_count=1&gpu_count=2", "region=%00",
        "cursor=WyJwcmljZSIsMSwiXHUwMDAwIl0", "cursor=WyJwcmljZSIsMSwiXHVkODAwIl0", "cursor=" + "A" * 2000,
    ]  # fmt: skip
    for query in wrong:
        answer = await market.root.call("GET", f"/v1/offers?{query}")
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid"), f"{query}: {answer.text}"
        name = query.partition("=")[0]
        assert any(e["pointer"].startswith(f"?{name}") for e in answer.json()["errors"]), f"{query}: {answer.text}"
    near = (await market.root.get("/v1/offers?gpus=h100&pric=3", 422))["errors"]
    assert near[0]["did_you_mean"] == "gpu"


# Pages


@pytest.mark.parametrize("sort", ["price", "-price_per_gpu", "value"])
async def test_pages_are_complete_and_without_duplicates_while_offers_come_and_change(market: World, sort: str):
    before = set(expected(market, {}))
    changed: set[str] = set()
    seen: list[str] = []
    cursor, number = None, 0
    while True:
        page = await market.root.get(
            "/v1/offers", params={"limit": "7", "sort": sort} | ({"cursor": cursor} if cursor else {})
        )
        seen += [item["id"] for item in page["items"]]
        cursor, number = page["next_cursor"], number + 1
        if cursor is None:
            break
        assert len(page["items"]) == 7
        await add_offers(market, number, changed)
    assert len(seen) == len(set(seen))
    assert before - changed <= set(seen)


async def add_offers(world: World, number: int, gone: set[str]) -> None:
    """New offers of any price, and one that vanishes."""
    async with store.worker() as tx:
        account = await refreshes.ensure_account(tx.conn, f"new{number}", "identity", {}, 900)
        await refreshes.merge_offers(tx.conn, account, f"new{number}", make_offers(5, 100 + number))
    world.query("UPDATE provider_account SET refreshed_at = clock_timestamp() WHERE refreshed_at IS NULL")
    (row,) = world.query(
        "UPDATE offer SET gone_at = clock_timestamp() WHERE id = (SELECT max(id) FROM offer WHERE gone_at IS NULL) RETURNING id"
    )
    gone.add(row["id"])


async def test_a_cursor_of_another_sort_is_refused(market: World):
    cursor = (await market.root.get("/v1/offers?limit=1"))["next_cursor"]
    refused = await market.root.get(f"/v1/offers?limit=1&sort=value&cursor={cursor}", 422)
    assert refused["errors"][0]["pointer"] == "?cursor"


# Staleness


async def test_offers_grow_stale_and_say_so(world: World):
    assert [item["stale"] for item in await found(world, {})] == [False] * 3
    world.query("UPDATE provider_account SET refreshed_at = refreshed_at - stale_after_s * interval '1 second'")
    assert [item["stale"] for item in await found(world, {})] == [True] * 3
    await refresh(world)
    assert [item["stale"] for item in await found(world, {})] == [False] * 3


async def refresh(world: World) -> refreshes.Changes:
    world.query("DELETE FROM refresh")
    changes = await catalog.refresh_offers(world.provider, 60)
    assert changes is not None
    return changes


async def test_a_refresh_that_fails_loses_no_offer_and_is_noted_once(world: World):
    world.provider.fail["list_offers"] = [Broken("unreadable"), Broken("unreadable")]
    for _ in range(2):
        world.query("DELETE FROM refresh")
        with pytest.raises(Broken):
            await catalog.refresh_offers(world.provider, 60)
    assert len(await found(world, {})) == 3
    (account,) = world.query("SELECT last_error, unhealthy_since FROM provider_account")
    assert "unreadable" in account["last_error"]
    assert account["unhealthy_since"] is not None
    assert world.query("SELECT count(*) FROM event WHERE type = 'io.gpubroker.provider.unhealthy.v1'")[0]["count"] == 1
    await refresh(world)
    assert world.query("SELECT last_error, unhealthy_since FROM provider_account") == [
        {"last_error": None, "unhealthy_since": None}
    ]


async def test_a_refresh_comes_once_in_its_time(world: World):
    assert await catalog.refresh_offers(world.provider, 60) is None
    assert sum(operation == "list_offers" for operation, _ in world.provider.calls) == 1


class Overtaken(Simulated):
    """A provider whose first listing is so slow that a later refresh is complete before it."""

    async def list_offers(self) -> Sequence[base.ProviderOffer]:
        before, self.offers = self.offers, self.offers[:1]
        if len(before) > 1:
            assert (await catalog.refresh_offers(self, 60)) == refreshes.Changes(0, 2)
        return before


async def test_a_refresh_that_a_later_one_overtook_writes_nothing(world: World):
    world.query("DELETE FROM refresh")
    overtaken = Overtaken()
    assert await catalog.refresh_offers(overtaken, 60) is None
    assert len(await found(world, {})) == 1
    first, second = world.query("SELECT complete, seen, error FROM refresh ORDER BY began_at")
    assert (first["complete"], first["error"]) == (False, "a later one was faster")
    assert (second["complete"], second["seen"]) == (True, 1)


# What a refresh writes


async def test_a_refresh_without_a_change_writes_no_offer_no_price_and_no_event(world: World):
    def written() -> tuple[object, ...]:
        return (
            world.query("SELECT id, xmin::text, changed_at FROM offer ORDER BY id"),
            world.query("SELECT count(*) FROM offer_price"),
            world.query("SELECT count(*) FROM event"),
        )

    before = written()
    assert await refresh(world) == refreshes.Changes(0, 0)
    assert written() == before


async def test_numbers_finer_than_columns_are_no_change_the_next_time(world: World):
    finer = replace(OFFERS[0], provider_offer_id="finer", vcpus=0.125, ram_gb=1.25, reliability=0.98765432101)
    odd = replace(OFFERS[0], provider_offer_id="odd", reliability=float("nan"))
    world.provider.offers = [*OFFERS, finer, odd]
    assert await refresh(world) == refreshes.Changes(2, 0)
    assert await refresh(world) == refreshes.Changes(0, 0)
    shown = {item["provider_offer_id"]: item for item in await found(world, {"gpu": "h100"})}
    assert shown["odd"]["reliability"] is None
    assert abs(shown["finer"]["reliability"] - finer.reliability) < 1e-6


async def test_many_changes_are_as_many_statements_as_one(world: World, monkeypatch: pytest.MonkeyPatch):
    statements: list[str] = []
    execute = psycopg.AsyncCursor.execute

    async def count(self: Any, query: Any, *arguments: Any, **more: Any) -> Any:
        statements.append(str(query))
        return await execute(self, query, *arguments, **more)

    listed = [replace(OFFERS[0], provider_offer_id=f"many-{n}") for n in range(400)]
    world.provider.offers = listed
    assert await refresh(world) == refreshes.Changes(400, len(OFFERS))
    counted: list[int] = []
    monkeypatch.setattr(psycopg.AsyncCursor, "execute", count)
    for changed in (1, 400):
        statements.clear()
        dearer = [replace(offer, price_micro_h=offer.price_micro_h + changed) for offer in listed[:changed]]
        world.provider.offers = [*dearer, *listed[changed:]]
        assert await refresh(world) == refreshes.Changes(changed, 0)
        counted.append(len(statements))
    assert counted[0] == counted[1] < 20


async def test_a_refresh_writes_the_one_offer_that_changed_and_its_price(world: World):
    before = {row["id"]: row["changed_at"] for row in world.query("SELECT id, changed_at FROM offer")}
    cheaper = replace(OFFERS[0], price_micro_h=1_900_000)
    world.provider.offers = [cheaper, *OFFERS[1:]]
    assert await refresh(world) == refreshes.Changes(1, 0)
    changed = [
        row["id"] for row in world.query("SELECT id, changed_at FROM offer") if row["changed_at"] != before[row["id"]]
    ]
    (row,) = world.query("SELECT id, price_micro_h FROM offer WHERE provider_offer_id = 'h100-1'")
    assert (changed, row["price_micro_h"]) == ([row["id"]], 1_900_000)
    history = world.query("SELECT price_micro_h FROM offer_price WHERE offer_id = %s ORDER BY at", row["id"])
    assert [h["price_micro_h"] for h in history] == [2_000_000, 1_900_000]
    world.provider.offers = [replace(cheaper, availability="low"), *OFFERS[1:]]
    assert await refresh(world) == refreshes.Changes(1, 0)
    assert len(world.query("SELECT at FROM offer_price WHERE offer_id = %s", row["id"])) == 2


async def test_an_offer_that_is_gone_comes_back_as_the_same(world: World):
    (before,) = world.query("SELECT id FROM offer WHERE provider_offer_id = 'h100-1'")
    world.provider.offers = OFFERS[1:]
    assert await refresh(world) == refreshes.Changes(0, 1)
    await world.root.get(f"/v1/offers/{before['id']}", 404)
    assert await refresh(world) == refreshes.Changes(0, 0)
    world.provider.offers = OFFERS
    assert await refresh(world) == refreshes.Changes(1, 0)
    assert (await world.root.get(f"/v1/offers/{before['id']}"))["price_usd_per_hour"] == "2.000000"
    assert len(world.query("SELECT at FROM offer_price WHERE offer_id = %s", before["id"])) == 1


async def test_one_account_never_touches_the_offers_of_another(world: World):
    other = Simulated()
    other.identity = "account-2"
    other.offers = OFFERS[:1]
    await catalog.refresh_offers(other, 60)
    world.provider.offers = []
    assert await refresh(world) == refreshes.Changes(0, 3)
    assert len(await found(world, {})) == 1


ODD: tuple[dict[str, Any], ...] = (
    {"price_micro_h": 0}, {"price_micro_h": -1}, {"price_micro_h": 10**12}, {"gpu_count": -1}, {"increment_s": 0},
    {"vcpus": 1e9}, {"vcpus": float("nan")}, {"ram_gb": 1e12}, {"ram_gb": 10**7}, {"disk_gb": 10**12}, {"min_billing_s": -5},
    {"disk_micro_gb_h": -1}, {"disk_micro_gb_h": 10**18}, {"stopped_micro_h": -7},
    {"region": "eu\0"}, {"gpu": "H100\ud800"}, {"country": "\0"}, {"region": "e" * 3000}, {"currency": "US\0"},
    {"gpu": "Odd", "vram_gb": 10**7, "gpu_count": 4096},
)  # fmt: skip


async def test_an_odd_offer_is_left_out_and_the_others_stay(world: World, subtests: pytest.Subtests):
    for odd in ODD:
        with subtests.test(**odd):
            world.provider.offers = [replace(OFFERS[0], provider_offer_id="odd", **odd), *OFFERS]
            assert await refresh(world) == refreshes.Changes(0, 0)
            noted = world.query("SELECT seen, quarantined, complete FROM refresh")
            assert noted == [{"seen": 4, "quarantined": 1, "complete": True}]
            assert len(await found(world, {})) == 3


async def test_offers_that_cannot_be_written_are_noted_as_a_failure(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalog, "_is_possible", lambda _: True)
    world.provider.offers = [replace(OFFERS[0], provider_offer_id="odd\0")]
    with pytest.raises(psycopg.DataError):
        await refresh(world)
    assert len(await found(world, {})) == 3
    assert world.query("SELECT complete, ended_at IS NULL AS open, error FROM refresh") == [
        {"complete": False, "open": False, "error": "they could not be written: UntranslatableCharacter"}
    ]
    (account,) = world.query("SELECT unhealthy_since FROM provider_account")
    assert account["unhealthy_since"] is not None


async def test_an_offer_listed_twice_is_one_and_the_cheaper_counts(world: World):
    world.provider.offers = [OFFERS[0], *OFFERS, replace(OFFERS[0], price_micro_h=1_500_000)]
    assert await refresh(world) == refreshes.Changes(1, 0)
    assert [item["price_usd_per_hour"] for item in await found(world, {"gpu": "h100"})] == ["1.500000", "2.500000"]


async def test_vendors_spellings_become_models(world: World):
    def offer(number: int, gpu: str, **more: Any) -> base.ProviderOffer:
        return replace(OFFERS[0], provider_offer_id=f"s{number}", gpu=gpu, **more)

    world.provider.offers = [
        offer(1, "NVIDIA H100 80GB HBM3"), offer(2, "h100_sxm5"), offer(3, "NVIDIA A100-SXM4-40GB"), offer(4, "A100", vram_gb=40),
        offer(5, "Quantum Thing 9", vram_gb=7),
    ]  # fmt: skip
    await refresh(world)
    models = world.query("SELECT gpu, vram_gb FROM offer WHERE gone_at IS NULL ORDER BY provider_offer_id")
    assert [tuple(row.values()) for row in models] == [
        ("H100 SXM", 80), ("H100 SXM", 80), ("A100 SXM 40GB", 40), ("A100 40GB", 40), ("Quantum Thing 9", 7),
    ]  # fmt: skip


# Speed


async def test_the_first_twenty_of_twenty_thousand_are_read_by_index(world: World, subtests: pytest.Subtests):
    world.query(
        """INSERT INTO offer (id, account_id, provider, provider_offer_id, gpu, gpu_count, vram_gb, vcpus, ram_gb, disk_gb,
                              region, price_micro_h, min_billing_s, increment_s, supports, reliability, availability, changed_at)
           SELECT new_id('ofr'), (SELECT id FROM provider_account), 'simulated', 'n' || n,
                  (ARRAY['H100 SXM', 'L4', 'A100 80GB'])[n %% 3 + 1], (ARRAY[1, 2, 4, 8])[n %% 4 + 1],
                  (ARRAY[80, 24, 80])[n %% 3 + 1], 8, 64, 500, 'eu-1', 1 + (n * 7919) %% 9000000, 0, 1,
                  '{exec,image}', 0.9, 'high', clock_timestamp() FROM generate_series(1, 20000) n"""
    )
    world.query("INSERT INTO offer_shape SELECT DISTINCT gpu, gpu_count, vram_gb FROM offer ON CONFLICT DO NOTHING")
    world.query("ANALYZE offer")
    world.query("ANALYZE offer_shape")
    cases: list[tuple[dict[str, Any], str]] = [({}, sort) for sort in SORTS]
    cases += [
        ({"gpu": ["H100 SXM"]}, "price"),
        ({"gpu": ["H100 SXM"], "gpu_count": 8}, "price"),
        ({"min_vram_gb": 80}, "price"),
    ]
    cases += [({"supports": ["exec"]}, "price"), ({"max_price_usd_per_hour": 5_000_000}, "price")]
    cases += [({"gpu": ["L4"], "supports": ["exec", "image"], "min_reliability": 0.5}, "price")]
    cases += [({"min_vram_gb": 24, "supports": ["exec"], "max_price_usd_per_gpu_hour": 5_000_000}, "price")]
    cases += [(filters, sort) for filters in ({"gpu": ["L4"]}, {"min_vram_gb": 80, "gpu_count": 2}) for sort in SORTS]
    for filters, sort in cases:
        for descending in (False, True):
            with subtests.test(filters=filters, sort=sort, descending=descending):
                async with store.worker(store.BY_INDEX) as tx:
                    read = await plans.offers_read(tx.conn, rows.Question(filters, sort, descending, limit=20))
                assert read < 1000, f"{read} offers were read for 20"


async def test_search_needs_no_more_than_a_key_that_may_read_offers(market: World):
    reader = await market.root.child(scopes=["offers:read"])
    assert (await reader.get("/v1/offers?limit=1"))["items"]
    nobody = await reader.call("GET", "/v1/offers", headers={"Authorization": ""})
    assert nobody.status_code == 401


def h100s(count: int, price_micro_h: int = 2_000_000) -> list[base.ProviderOffer]:
    return [replace(OFFERS[0], provider_offer_id=f"h100-{n}", price_micro_h=price_micro_h) for n in range(count)]


async def test_a_price_far_off_the_median_of_its_model_is_quarantined_and_counted(world: World):
    cheap, dear, near = (
        replace(OFFERS[0], provider_offer_id=name, price_micro_h=price)
        for name, price in (("cheap", 200_000), ("dear", 20_000_000), ("near", 210_000))
    )
    world.provider.offers = [*h100s(5), cheap, dear, near]
    await refresh(world)
    shown = {item["provider_offer_id"] for item in await found(world, {"gpu": "h100", "limit": 200})}
    assert shown == {"near", *(f"h100-{n}" for n in range(5))}
    assert world.query("SELECT seen, quarantined FROM refresh") == [{"seen": 8, "quarantined": 2}]
    assert (
        "median of H100"
        in world.query("SELECT quarantined FROM offer WHERE provider_offer_id = 'cheap'")[0]["quarantined"]
    )
    world.provider.offers = [*h100s(5), replace(cheap, price_micro_h=1_000_000), dear, near]
    assert await refresh(world) == refreshes.Changes(1, 0)
    assert "cheap" in {item["provider_offer_id"] for item in await found(world, {"gpu": "h100", "limit": 200})}


async def test_a_vendor_that_changes_its_unit_is_not_believed(world: World):
    world.provider.offers = h100s(5)
    await refresh(world)
    world.provider.offers = h100s(5, 2_000_000 // 100)
    await refresh(world)
    assert await found(world, {"gpu": "h100"}) == []
    world.provider.offers = h100s(5)
    await refresh(world)
    assert len(await found(world, {"gpu": "h100"})) == 5


async def test_another_currency_is_quarantined_and_never_converted(world: World):
    world.provider.offers = [*h100s(1), replace(OFFERS[0], provider_offer_id="euro", currency="EUR")]
    await refresh(world)
    assert len(await found(world, {"gpu": "h100"})) == 1
    assert world.query("SELECT quarantined FROM offer WHERE quarantined IS NOT NULL") == [
        {"quarantined": "priced in EUR"}
    ]


async def test_prices_of_a_model_over_time(world: World):
    path = "/v1/gpus/h100/prices"
    world.provider.offers = [
        *h100s(2),
        replace(OFFERS[0], provider_offer_id="pair", gpu_count=2, price_micro_h=5_000_000),
    ]
    await refresh(world)
    world.query("UPDATE offer_price SET at = at - interval '50 hours'")
    world.query("DELETE FROM offer_price WHERE offer_id IN (SELECT id FROM offer WHERE gone_at IS NOT NULL)")
    world.provider.offers = [replace(offer, price_micro_h=offer.price_micro_h // 2) for offer in world.provider.offers]
    await refresh(world)
    world.query("UPDATE offer_price SET at = at - interval '25 hours' WHERE at > clock_timestamp() - interval '1 hour'")
    history = await world.root.get(path)
    assert (len(history["items"]), history["step"]) == (30, "day")
    assert set(history["models"]) == set(ask("h100"))
    told = [
        (step["low_usd_per_gpu_hour"], step["median_usd_per_gpu_hour"], step["high_usd_per_gpu_hour"], step["offers"])
        for step in history["items"]
    ]
    assert told[:27] == [(None, None, None, 0)] * 27
    assert told[27:] == [
        ("2.000000", "2.000000", "2.500000", 3), ("1.000000", "1.250000", "2.500000", 3), ("1.000000", "1.000000", "1.250000", 3)
    ]  # fmt: skip
    hours = await world.root.get(f"{path}?step=hour&from=2026-01-01T00:00:00Z&to=2026-01-01T02:30:00Z")
    assert [step["from"] for step in hours["items"]] == [f"2026-01-01T0{n}:00:00Z" for n in range(3)]
    assert (await world.root.get(f"{path}?provider=other"))["items"][-1]["offers"] == 0
    wrong = (
        "step=year",
        "step=hour&from=2020-01-01T00:00:00Z",
        "to=0001-01-02T00:00:00Z",
        "from=2027-01-01T00:00:00Z",
        "x=1",
    )
    for query in wrong:
        assert (await world.root.get(f"{path}?{query}", 422))["code"] == "invalid"
    assert "H100" in (await world.root.get("/v1/gpus/H1000/prices", 404))["detail"]
