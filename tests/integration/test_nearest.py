"""Why a search found nothing, what GPUs and providers there are, and quotes."""

import random
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from tests.factories import World
from tests.integration.test_offers import RULES, VALUES, market, price
from tests.simulator import OFFERS, Broken

from gpubroker import catalog
from gpubroker.gpus import models
from gpubroker.money import cost, format_usd
from gpubroker.providers import registry
from gpubroker.times import now

pytestmark = pytest.mark.anyio
__all__ = ["market"]


# Why nothing matched


def considered(world: World, query: dict[str, str]) -> list[dict[str, Any]]:
    every = "" if query.get("available") == "false" else " AND availability <> 'none'"
    return world.query("SELECT * FROM offer WHERE gone_at IS NULL AND quarantined IS NULL" + every)


async def test_an_empty_page_says_what_each_filter_left_out_and_what_is_nearest(market: World):
    dice, seen = random.Random(5), 0
    for _ in range(120):
        names = dice.sample(sorted(set(VALUES) - {"available"}), dice.randint(2, 5))
        query = {name: dice.choice(VALUES[name]) for name in names} | dice.choice([{}, {"available": "false"}])
        page = await market.root.get("/v1/offers", params=query)
        if page["items"]:
            assert "no_match" not in page
            continue
        seen += 1
        disk = int(query.get("min_disk_gb", 0))
        rows = considered(market, query)
        failed = {r["id"]: {n for n in names if not RULES[n](r, query[n], disk)} for r in rows}
        told = page["no_match"]
        assert told["considered"] == len(rows)
        left_out = {name: sum(name in missing for missing in failed.values()) for name in names}
        assert told["removed_by"] == {name: count for name, count in left_out.items() if count}
        assert len(told["nearest"]) == min(3, len(rows))
        least = sorted(len(missing) for missing in failed.values())[:3]
        assert [len(near["change"]) for near in told["nearest"]] == least
        for near in told["nearest"]:
            assert set(near["change"]) == failed[near["offer"]["id"]]
            await check_change(market, query, near)
    assert seen > 20


async def check_change(market: World, query: dict[str, str], near: dict[str, Any]) -> None:
    """With what is to be changed changed, the offer is found."""
    changed = dict(query)
    for name, value in near["change"].items():
        changed.pop(name)
        if value not in (None, []):
            texts = (
                value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else str(value)]
            )
            changed[name] = ",".join(texts)
    found: list[str] = []
    cursor: dict[str, str] | None = {}
    while cursor is not None:
        page = await market.root.get("/v1/offers", params=changed | cursor | {"limit": "200"})
        found += [offer["id"] for offer in page["items"]]
        cursor = {"cursor": page["next_cursor"]} if page["next_cursor"] else None
    assert near["offer"]["id"] in found, (query, near["change"])


async def test_a_request_that_nothing_fits_says_the_same(world: World):
    filters = {"gpu": ["h100"], "min_vram_gb": 81, "country": "FI"}
    page = await world.root.get("/v1/offers", params=filters)
    for path, body in (
        ("/v1/pods", {"image": "b", "max_lifetime_seconds": 60}), ("/v1/quotes", {"duration_seconds": 60}),
        ("/v1/pods?dry_run=true", {"image": "b", "max_lifetime_seconds": 60}),
    ):  # fmt: skip
        refused = await world.root.post(path, body | {"requirements": filters}, 422)
        assert refused["code"] == "no_offer"
        assert refused["no_match"]["considered"] == page["no_match"]["considered"] == 3
        assert refused["no_match"]["removed_by"].items() >= page["no_match"]["removed_by"].items()
        assert refused["no_match"]["nearest"][0]["change"]["min_vram_gb"] == 80


async def test_a_model_that_only_a_vendor_knows_can_be_asked_for(world: World):
    strange = replace(OFFERS[0], gpu="Strange One-X", provider_offer_id="s", vram_gb=40)
    world.provider.offers = (*OFFERS, strange)
    world.query("UPDATE refresh SET began_at = began_at - interval '1 hour'")
    await catalog.refresh_offers(world.provider, 60)
    assert "Strange One-X" in [gpu["model"] for gpu in (await world.root.get("/v1/gpus?limit=200"))["items"]]
    for text in ("Strange One-X", "strange_one_x"):
        (offer,) = (await world.root.get("/v1/offers", params={"gpu": text}))["items"]
        assert (offer["gpu"], offer["vram_gb"]) == ("Strange One-X", 40)
        await world.root.post("/v1/quotes", {"requirements": {"gpu": [text]}, "duration_seconds": 60})
    assert (await world.root.get("/v1/offers", 422, params={"gpu": "Strange Two"}))["code"] == "invalid"


# GPUs and providers


async def test_gpus_are_all_that_are_known_with_who_offers_them_for_how_much_now(market: World):
    found: list[dict[str, Any]] = []
    cursor = ""
    while cursor is not None:
        page = await market.root.get(f"/v1/gpus?limit=30{cursor and '&cursor=' + cursor}")
        found, cursor = found + page["items"], page["next_cursor"]
    assert [gpu["model"] for gpu in found] == sorted({*models(), "Strange 1"})
    rows = market.query("SELECT * FROM offer WHERE gone_at IS NULL AND quarantined IS NULL AND availability <> 'none'")
    for gpu in found:
        mine = [row for row in rows if row["gpu"] == gpu["model"]]
        prices = sorted(price(row, 0) // row["gpu_count"] for row in mine)
        assert gpu["offers"] == len(mine)
        assert gpu["providers"] == sorted({row["provider"] for row in mine})
        assert gpu["lowest_usd_per_gpu_hour"] == (format_usd(prices[0]) if prices else None)
        assert gpu["median_usd_per_gpu_hour"] == (format_usd(prices[(len(prices) - 1) // 2]) if prices else None)
        assert gpu["model"] == "Strange 1" or gpu["vram_gb"] == models()[gpu["model"]].vram_gb


async def test_providers_are_all_that_there_are_and_how_they_do(world: World):
    page = await world.root.get("/v1/providers")
    assert [view["name"] for view in page["items"]] == sorted({*registry.names(), "simulated"})
    assert page["next_cursor"] is None
    (local,) = [view for view in page["items"] if view["name"] == "local"]
    assert (local["configured"], local["healthy"], local["offers"], local["last_refresh"]) == (False, False, 0, None)

    async def view() -> dict[str, Any]:
        return next(view for view in (await world.root.get("/v1/providers"))["items"] if view["name"] == "simulated")

    good = await view()
    assert (good["configured"], good["healthy"], good["stale"], good["offers"], good["last_error"]) == (
        True,
        True,
        False,
        3,
        None,
    )
    assert abs(datetime.fromisoformat(good["last_refresh"]) - now()) < timedelta(seconds=60)
    assert 0 <= good["staleness_seconds"] < 60
    assert set(good["capabilities"]["supports"]) == {"image", "command", "ports", "exec", "logs", "stop"}
    world.query("UPDATE refresh SET began_at = began_at - interval '1 hour'")
    world.provider.fail["list_offers"] = [Broken("unreadable", "the answer was HTML")]
    with pytest.raises(Broken):
        await catalog.refresh_offers(world.provider, 60)
    bad = await view()
    assert (bad["healthy"], bad["offers"], "HTML" in bad["last_error"]) == (False, 3, True)
    names = [view["name"] for view in page["items"]]
    pages = [await world.root.get("/v1/providers?limit=1")]
    while pages[-1]["next_cursor"]:
        pages.append(await world.root.get(f"/v1/providers?limit=1&cursor={pages[-1]['next_cursor']}"))
    assert [view["name"] for page in pages for view in page["items"]] == names


# Quotes


async def test_a_quote_says_what_it_is_for_and_what_would_be_held(world: World):
    before = now()
    quote = await world.root.post("/v1/quotes", {"requirements": {"gpu": ["a100"]}, "duration_seconds": 3600})
    assert set(quote) == {"id", "offer", "price_usd_per_hour", "duration_seconds", "total_usd", "expires_at", "pod_id"}
    total = cost(12_000_000, 3600) + cost(12_000_000, 60) + cost(12_000_000, 120)
    assert (quote["price_usd_per_hour"], quote["total_usd"]) == ("12.000000", format_usd(total))
    assert abs(datetime.fromisoformat(quote["expires_at"]) - before - timedelta(seconds=120)) < timedelta(seconds=20)
    pod = await world.root.post("/v1/pods", {"image": "b", "quote_id": quote["id"]}, 202)
    assert pod["committed_usd"] == quote["total_usd"]
    assert datetime.fromisoformat(pod["expires_at"]) - datetime.fromisoformat(pod["created_at"]) == timedelta(hours=1)
    other = await world.root.post("/v1/quotes", {"offer_id": quote["offer"]["id"], "duration_seconds": 3600})
    shorter = await world.root.post(
        "/v1/pods", {"image": "b", "quote_id": other["id"], "max_lifetime_seconds": 60}, 202
    )
    assert shorter["committed_usd"] < pod["committed_usd"]


async def test_a_quote_is_firm_for_the_disk_that_it_is_for_and_no_more(world: World):
    world.query("UPDATE offer SET disk_base_gb = 20, disk_micro_gb_h = 1000")
    small = await world.root.post("/v1/quotes", {"requirements": {"gpu": ["h100"]}, "duration_seconds": 60})
    large = await world.root.post(
        "/v1/quotes", {"requirements": {"gpu": ["h100"], "min_disk_gb": 120}, "duration_seconds": 60}
    )
    assert (small["price_usd_per_hour"], large["price_usd_per_hour"]) == ("2.000000", "2.100000")
    for quote, disk in ((small, 21), (large, 121)):
        body = {"image": "b", "quote_id": quote["id"], "disk_gb": disk}
        refused = await world.root.post("/v1/pods", body, 422)
        assert (refused["code"], refused["errors"][0]["pointer"]) == ("invalid", "/disk_gb")
        pod = await world.root.post("/v1/pods", body | {"disk_gb": disk - 1}, 202)
        assert pod["price_usd_per_hour"] == quote["price_usd_per_hour"]


async def test_a_request_for_a_quote_is_checked(world: World):
    (offer,) = world.query("SELECT id FROM offer WHERE provider_offer_id = 'h100-1'")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"duration_seconds": 60}, ""), ({"requirements": {}}, "/duration_seconds"),
        ({"requirements": {}, "duration_seconds": 9}, "/duration_seconds"),
        ({"requirements": {}, "duration_seconds": 60, "offer_id": offer["id"]}, ""),
        ({"offer_id": "ofr_nonsense", "duration_seconds": 60}, "/offer_id"),
        ({"requirements": {"gpu": ["h1000"]}, "duration_seconds": 60}, "/requirements/gpu"),
        ({"requirements": {"gpus": ["h100"]}, "duration_seconds": 60}, "/requirements/gpus"),
    ]  # fmt: skip
    for body, pointer in wrong:
        refused = await world.root.post("/v1/quotes", body, 422)
        assert pointer in [error["pointer"] for error in refused["errors"]], body
    assert refused["errors"][0]["did_you_mean"] == "gpu"
    once = {"Idempotency-Key": "k"}
    body = {"offer_id": offer["id"], "duration_seconds": 60}
    first, again = [await world.root.call("POST", "/v1/quotes", json=body, headers=once) for _ in range(2)]
    assert first.json() == again.json()
    assert again.headers["Idempotency-Replayed"] == "true"
    assert len(world.query("SELECT id FROM quote")) == 1
