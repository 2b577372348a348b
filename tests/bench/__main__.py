"""`make bench`: measure, print a table, write JSON. Figures are medians beside those of functions-framework's hello.

make bench [ARGS="[search] [start] [create] [bill] [refresh] [--json FILE]"]
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop
from tests.bench import billing, creating, refreshing, searching, starting
from tests.bench.figures import Figure, write_json, write_table
from tests.bench.ground import prepared
from tests.bench.served import cores

PARTS = ("start", "search", "bill", "refresh", "create")


async def measure(parts: Sequence[str]) -> list[Figure]:
    """What was asked for, in an order in which nothing slows the next down."""
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder, prepared(Path(folder)) as ground:
        if "start" in parts:
            figures += await starting.measure(ground)
        os.sched_setaffinity(0, cores()[1])
        if "search" in parts:
            figures += await searching.measure(ground)
        if "bill" in parts:
            figures += await billing.measure(ground)
        if "refresh" in parts:
            figures += await refreshing.measure(ground)
    return figures


def main() -> None:
    """Measure what the command line names, by default all."""
    parser = argparse.ArgumentParser(prog="make bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=f"of {', '.join(PARTS)}; default all"
    )
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="FILE", help="default: %(default)s")
    given = parser.parse_args()
    parts: Sequence[str] = given.parts or PARTS
    all_cores = os.sched_getaffinity(0)
    began = time.monotonic()
    figures = uvloop.run(measure(parts)) if set(parts) != {"create"} else []
    os.sched_setaffinity(0, all_cores)
    if "create" in parts:
        figures += uvloop.run(creating.measure())
    seconds = time.monotonic() - began
    print(write_table(figures))
    write_json(given.json, figures, seconds)
    print(
        f"\n{seconds:.0f} s, load {os.getloadavg()[0]:.1f} on {len(all_cores)} cores; also in {given.json}",
        file=sys.stderr,
    )


main()
