"""Cold starts: from the start of the process to its first real answer, of each public function and of hello in turn."""

import asyncio
from typing import Final, NamedTuple

from tests.bench import load
from tests.bench.figures import Figure, paired
from tests.bench.ground import Ground
from tests.bench.served import Served

_CALLS: Final = {
    "auth": ("/v1/whoami", b"200"),
    "offers": ("/v1/offers?limit=5", b"200"),
    "pods": ("/v1/pods", b"200"),
    "exec": ("/v1/logs/pod_00000000000000000000000000", b"404"),
    "usage": ("/v1/budgets", b"200"),
}
"""What each is asked first: it authenticates and reads rows."""
_ROUNDS = 12
_SETTLED_SECONDS = 1.5
"""After its first answer a function connects to Redis; its memory is taken after that."""
_TARGET_RATIO, _TARGET_MB = 1.8, 75.0


async def measure(ground: Ground) -> list[Figure]:
    """Wall and CPU time of each, in pairs: hello right before it; the last round takes the memory.

    The first one warms up, Redis too: a module that has no bytecode yet is compiled, which takes 18 MB that no image pays.
    """
    figures: list[Figure] = []
    runs: dict[str, list[tuple[_Start, _Start]]] = {name: [] for name in _CALLS}
    for number in range(_ROUNDS + 1):
        settle = number in (0, _ROUNDS)
        for name in _CALLS:
            runs[name].append((await _start("hello", ground, settle=settle), await _start(name, ground, settle=settle)))
    for name, (_, *timed, last) in runs.items():
        hellos, ours = zip(*timed, strict=True)
        wall, cpu = (
            [[getattr(run, what) for run in each] for each in (ours, hellos)] for what in ("wall_ms", "cpu_ms")
        )
        figures += [
            paired(f"cold start of {name}", "ms", *wall, target_ratio=_TARGET_RATIO),
            paired("  its CPU time", "ms", *cpu),
            paired("  its memory", "MB", [last[1].peak_mb], [last[0].peak_mb], target=_TARGET_MB),
        ]
    return figures


class _Start(NamedTuple):
    """One start, to the first answer."""

    wall_ms: float
    cpu_ms: float
    peak_mb: float


async def _start(name: str, ground: Ground, *, settle: bool) -> _Start:
    path, status = _CALLS.get(name, ("/", b"200"))
    request = load.write_request(path, ground.keys[0], close=True)
    with Served.hello() if name == "hello" else Served.function(name, ground.variables) as served:
        said, seconds = served.first_answer(request)
        assert said.split()[1] == status, f"{name}: {said!r}"
        cpu = served.cpu_seconds()
        if settle:
            await asyncio.sleep(_SETTLED_SECONDS)
        return _Start(seconds * 1000, cpu * 1000, served.peak_mb())
