"""A refresh of five vendors with 20,000 offers each, of which one in twenty has another price; and searches meanwhile."""

import asyncio
import time
from dataclasses import replace
from typing import Final

from tests.bench import market
from tests.bench.figures import Figure, percentile
from tests.bench.ground import Ground, database
from tests.simulator import OFFERS, Simulated

from gpubroker import accounts, catalog, config, gpus, store
from gpubroker.providers.base import ProviderOffer
from gpubroker.store import offers as rows

_VENDORS: Final = 5
_OFFERS: Final = 20_000
_CHANGED: Final = 20
_TARGET_MS, _SEARCH_MS = 5000.0, 1.5


async def measure(ground: Ground) -> list[Figure]:
    """The wall time of all five at once, from the listings in memory to the last COMMIT, and the searches beside it."""
    with database(ground, "refreshing") as url:
        accounts.install(url, ground.variables["GPUBROKER_OWNER"])
        config.use(config.read({**ground.variables, "DATABASE_URL": url}))
        try:
            vendors = [_make_vendor(n) for n in range(_VENDORS)]
            for vendor in vendors:
                assert await catalog.refresh_offers(vendor, 60) is not None
            async with store.worker() as tx:
                await tx.conn.execute("DELETE FROM refresh")
                await tx.conn.execute("ANALYZE offer")
            for vendor in vendors:
                vendor.offers = [_raise_price(offer, n) for n, offer in enumerate(vendor.offers)]
            quiet = await _search(rounds=200)
            began = time.perf_counter()
            gate = asyncio.Semaphore(2)  # as refresh_all has it
            refreshes = asyncio.gather(*(catalog.refresh_offers(vendor, 60, gate) for vendor in vendors))
            busy = await _search(until=refreshes)
            changes = await refreshes
            took = (time.perf_counter() - began) * 1000
            assert [each and each.changed for each in changes] == [_OFFERS // _CHANGED] * _VENDORS
        finally:
            await store.close()
            config.use(config.read(ground.variables))
    return [
        Figure("refresh of 5 x 20,000 offers, 5 % changed", "ms", took, target=_TARGET_MS),
        Figure("search in the store, no refresh", "ms", percentile(quiet, 0.5), p95=percentile(quiet, 0.95)),
        Figure("search in the store, while it runs", "ms", percentile(busy, 0.5), p95=percentile(busy, 0.95), target=_SEARCH_MS),
    ]  # fmt: skip


def _make_vendor(n: int) -> Simulated:
    models = [model for model in gpus.models().values() if model.vram_gb >= 24]
    vendor = Simulated()
    vendor.name, vendor.identity = f"vendor{n}", "bench"  # pyright: ignore[reportAttributeAccessIssue]
    vendor.offers = [_make_offer(number, models[number % len(models)]) for number in range(_OFFERS)]
    return vendor


def _make_offer(number: int, model: gpus.Model) -> ProviderOffer:
    count = (1, 2, 4, 8)[number % 4]
    return replace(
        OFFERS[0], provider_offer_id=f"bench-{number}", gpu=model.name, vram_gb=model.vram_gb, gpu_count=count,
        price_micro_h=count * model.vram_gb * (20_000 + number % 20_000), region=f"eu-{number % 7}",
    )  # fmt: skip


def _raise_price(offer: ProviderOffer, number: int) -> ProviderOffer:
    return replace(offer, price_micro_h=offer.price_micro_h + 1) if number % _CHANGED == 0 else offer


async def _search(rounds: int = 10**6, until: "asyncio.Future[object] | None" = None) -> list[float]:
    """Times of searches in ms, one after another, in a connection of their own."""
    asked, took = market.questions(50), list[float]()
    async with store.worker() as tx:
        for number in range(rounds):
            if until is not None and until.done():
                break
            began = time.perf_counter()
            await rows.search(tx.conn, asked[number % len(asked)].question)
            took.append((time.perf_counter() - began) * 1000)
            await asyncio.sleep(0.005)
    return took
