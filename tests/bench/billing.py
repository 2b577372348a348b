"""`bill`: the watermark of an instance moves a second, each call in a transaction of its own."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Final

from tests.bench import load
from tests.bench.figures import Figure, paired
from tests.bench.ground import Ground, database
from tests.bench.served import Served, cores
from tests.books import NOON, PRICE, Books

_INSTANCES, _ROUNDS, _HELLO_SECONDS = 40, 5, 1.0
_CALLS_EACH: Final = 10
_AT_ONCE: Final = 4


async def measure(ground: Ground) -> list[Figure]:
    """Calls a second of one connection, and of several at once, with hello's requests a second in turn."""
    alone: list[float] = []
    together: list[float] = []
    hellos: list[float] = []
    with database(ground, "billing") as url, Served.hello().keep_on(cores()[0]) as hello:
        hello.first_answer(load.write_request("/", close=True))
        books = Books(url)
        books.tree(10**12, 10**12)
        instances = [books.running(seconds=86_400, price=PRICE)[1] for _ in range(_INSTANCES)]
        shares = [instances[n::_AT_ONCE] for n in range(_AT_ONCE)]
        several = [Books(url) for _ in shares]
        billed = 0
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            for _ in range(_ROUNDS):
                greetings = [[load.write_request("/")]] * _AT_ONCE
                hellos.append(len(await load.call(hello.port, greetings, seconds=_HELLO_SECONDS)) / _HELLO_SECONDS)
                began = time.perf_counter()
                _bill(books, instances, billed)
                alone.append(_CALLS_EACH * _INSTANCES / (time.perf_counter() - began))
                billed += _CALLS_EACH
                began = time.perf_counter()
                list(threads.map(_bill, several, shares, [billed] * _AT_ONCE))
                together.append(_CALLS_EACH * _INSTANCES / (time.perf_counter() - began))
                billed += _CALLS_EACH
        books.check()
        for each in (books, *several):
            each.conn.close()
    return [
        paired("bill, calls of one connection", "/s", alone, hellos),
        paired(f"bill, calls of {_AT_ONCE} connections", "/s", together, hellos),
    ]


def _bill(books: Books, instances: list[str], from_second: int) -> None:
    for second in range(from_second + 1, from_second + _CALLS_EACH + 1):
        for instance_id in instances:
            assert books.bill(instance_id, NOON + timedelta(seconds=second)) > 0
