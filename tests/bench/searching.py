"""Search of 100,000 offers: in the store and over HTTP, one after another; then as many as one core takes."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from tests import plans
from tests.bench import load, market
from tests.bench.figures import Figure, paired, timed
from tests.bench.ground import Ground
from tests.bench.served import Served, cores

from gpubroker import store
from gpubroker.store import offers as rows

_STORE_SEARCHES, _HTTP_SEARCHES, _HELLOS = 400, 300, 300
_STORE_MS, _HTTP_MS, _PER_SECOND = 1.5, 8.0, 2000.0
_POPULAR = 64
_CONNECTIONS = 32
"""So many keep the core busy while lots of them are at the database."""
_ROUNDS, _ROUND_SECONDS = 5, 2.0


async def measure(ground: Ground) -> list[Figure]:
    """All of it. Fails when a search reads offers otherwise than by index."""
    market.fill(ground.database_url)
    asked = market.questions(_STORE_SEARCHES)
    inside = await _search_store(asked)
    async with _both(ground) as (hello, offers):
        hellos = await load.call(hello.port, [[load.write_request("/")]], most=_HELLOS)
        unheard = [load.write_request(each.path, ground.keys[0]) for each in asked[-_HTTP_SEARCHES:]]
        new = await load.call(offers.port, [unheard], most=len(unheard))
        popular = await load.call(offers.port, [unheard[:1]], most=_HELLOS)
        return [
            timed("search in the store", inside, hellos, _STORE_MS),
            timed("search over HTTP, each another", new, hellos, _HTTP_MS),
            timed("search over HTTP, the same again", popular, hellos, _HTTP_MS),
            *await _fill_core(ground, asked, hello, offers),
        ]


@asynccontextmanager
async def _both(ground: Ground) -> AsyncGenerator[tuple[Served, Served]]:
    """hello and `offers`, on the same core and warm."""
    async with AsyncExitStack() as stack:
        hello, offers = (
            stack.enter_context(served).keep_on(cores()[0])
            for served in (Served.hello(), Served.function("offers", ground.variables))
        )
        for served, path in ((hello, "/"), (offers, "/v1/offers")):
            request = load.write_request(path, ground.keys[0])
            served.first_answer(load.write_request(path, ground.keys[0], close=True))
            await load.call(served.port, [[request]], most=300)
        yield hello, offers


async def _search_store(asked: Sequence[market.Asked]) -> list[float]:
    seconds: list[float] = []
    async with store.worker(store.BY_INDEX) as tx:
        for each in asked:
            await plans.offers_read(tx.conn, each.question)
        for each in asked:
            began = time.perf_counter()
            found = await rows.search(tx.conn, each.question)
            seconds.append(time.perf_counter() - began)
            assert found, f"nothing was found by {each.path}"
    await store.close()
    return seconds


async def _fill_core(ground: Ground, asked: Sequence[market.Asked], hello: Served, offers: Served) -> list[Figure]:
    """Searches a second, many at once, of questions that come again: a page is read anew every 5 seconds."""
    greetings = [[load.write_request("/")]] * _CONNECTIONS
    searches = [
        [load.write_request(each.path, ground.keys[n % len(ground.keys)]) for each in asked[:_POPULAR]]
        for n in range(_CONNECTIONS)
    ]
    rates: dict[int, list[float]] = {hello.port: [], offers.port: []}
    cpu: dict[int, list[float]] = {hello.port: [], offers.port: []}
    for _ in range(_ROUNDS):
        for served, requests in ((hello, greetings), (offers, searches)):
            used, began = served.cpu_seconds(), time.perf_counter()
            done = len(await load.call(served.port, requests, seconds=_ROUND_SECONDS))
            rates[served.port].append(done / (time.perf_counter() - began))
            cpu[served.port].append((served.cpu_seconds() - used) / done * 1e6)
    possible = [1e6 / each for each in cpu[offers.port]], [1e6 / each for each in cpu[hello.port]]
    return [
        paired("searches a second, one core", "/s", rates[offers.port], rates[hello.port], target=_PER_SECOND),
        paired("the same by its CPU time alone", "/s", *possible, target=_PER_SECOND),
        paired("CPU of one search", "us", cpu[offers.port], cpu[hello.port]),
    ]
