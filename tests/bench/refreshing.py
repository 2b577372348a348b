"""A refresh of five vendors with 20,000 offers each, of which one in twenty has another price; and searches meanwhile.

The refresh is a process of its own, as the function `catalog` is, on the core of what is measured. The searches are this process's,
which shares the other cores with PostgreSQL.
"""

import asyncio
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from typing import Any, Final

import uvloop
from tests.bench import market
from tests.bench.figures import Figure, percentile
from tests.bench.ground import Ground, database
from tests.bench.served import cores
from tests.simulator import Simulated

from gpubroker import accounts, catalog, config, serving, store
from gpubroker.local import processes
from gpubroker.providers.base import ProviderOffer
from gpubroker.store import offers as rows

_VENDORS: Final = 5
_OFFERS: Final = 20_000
_CHANGED: Final = 20
_SEARCHES: Final = 400
_ROUNDS: Final = 3
"""Searches without and with a refresh in turn, since the machine's speed moves from one second to the next."""
_TARGET_MS, _SEARCH_MS = 5000.0, 1.5


async def measure(ground: Ground) -> list[Figure]:
    """The wall time of all five at once, from the listings in memory to the last COMMIT, and the searches beside it."""
    with database(ground, "refreshing") as url:
        variables = {**ground.variables, "DATABASE_URL": url}
        accounts.install(url, ground.variables["GPUBROKER_OWNER"])
        config.use(config.read(variables))
        process = await asyncio.create_subprocess_exec(
            *processes.tied("KILL"), sys.executable, "-m", "tests.bench.refreshing",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env={"PATH": os.environ["PATH"], **variables},
        )  # fmt: skip
        os.sched_setaffinity(process.pid, cores()[0])
        assert process.stdin is not None
        assert process.stdout is not None
        quiet, busy, told = list[float](), list[float](), list[dict[str, Any]]()
        try:
            assert await process.stdout.readline() == b"filled\n"
            async with store.worker(store.BY_INDEX) as tx:
                await _search(
                    tx, rounds=_SEARCHES
                )  # as in a process that has served before: each plan is made once a connection
                for _ in range(_ROUNDS):
                    quiet += await _search(tx, rounds=_SEARCHES)
                    process.stdin.write(b"refresh\n")
                    answer = asyncio.ensure_future(process.stdout.readline())
                    busy += await _search(tx, until=answer)
                    told.append(json.loads(await answer))
            await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
            await store.close()
            config.use(config.read(ground.variables))
    assert all(each["changed"] == [_OFFERS // _CHANGED] * _VENDORS for each in told)
    took, used = (statistics.median(each[name] for each in told) for name in ("ms", "cpu_ms"))
    return [
        Figure("refresh of 5 x 20,000 offers, 5 % changed", "ms", took, target=_TARGET_MS),
        Figure("CPU of the refreshing process", "ms", used),
        Figure("search in the store, no refresh", "ms", percentile(quiet, 0.5), p95=percentile(quiet, 0.95)),
        Figure("search in the store, while it runs", "ms", percentile(busy, 0.5), p95=percentile(busy, 0.95), target=_SEARCH_MS),
    ]  # fmt: skip


async def _refresh() -> None:
    """The process that refreshes: fills the catalogue, then at each word refreshes it, and says what that took."""
    vendors = [_make_vendor(n) for n in range(_VENDORS)]
    for vendor in vendors:
        assert await catalog.refresh_offers(vendor, 60) is not None
    market.settle(os.environ["DATABASE_URL"])
    serving.keep_loaded()
    _tell("filled")
    for _ in range(_ROUNDS):
        for vendor in vendors:
            vendor.offers = [_raise_price(offer, n) for n, offer in enumerate(vendor.offers)]
        async with store.worker() as tx:
            await tx.conn.execute("DELETE FROM refresh")
        await asyncio.to_thread(sys.stdin.readline)
        began, used = time.perf_counter(), time.process_time()
        together = catalog.Round()
        changes = await asyncio.gather(*(catalog.refresh_offers(vendor, 60, together) for vendor in vendors))
        told: dict[str, Any] = {
            "ms": (time.perf_counter() - began) * 1000,
            "cpu_ms": (time.process_time() - used) * 1000,
            "changed": [each and each.changed for each in changes],
        }
        _tell(json.dumps(told))
    await store.close()


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _make_vendor(n: int) -> Simulated:
    vendor = Simulated()
    vendor.name, vendor.identity = f"vendor{n}", "bench"  # pyright: ignore[reportAttributeAccessIssue]
    vendor.offers = list(market.make_offers(_OFFERS, seed=n))
    return vendor


def _raise_price(offer: ProviderOffer, number: int) -> ProviderOffer:
    return replace(offer, price_micro_h=offer.price_micro_h + 1) if number % _CHANGED == 0 else offer


async def _search(
    tx: store.Transaction, *, rounds: int = 10**6, until: "asyncio.Future[bytes] | None" = None
) -> list[float]:
    """Times of searches in ms, one after another."""
    asked, took = market.questions(_SEARCHES), list[float]()
    for number in range(rounds):
        if until is not None and until.done():
            break
        began = time.perf_counter()
        await rows.search(tx.conn, asked[number % len(asked)].question)
        took.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(0)
    return took


if __name__ == "__main__":
    uvloop.run(_refresh())
