"""Cold starts: from the start of the process to its first real answer, of each public function and of hello in turn."""

import asyncio
from typing import Final

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
_ROUNDS = 10
_SETTLED_SECONDS = 1.5
"""After its first answer a function connects to Redis; its memory is taken after that."""
_TARGET_RATIO, _TARGET_MB = 1.8, 75.0


async def measure(ground: Ground) -> list[Figure]:
    """Wall and CPU time of each; the last round takes the memory.

    The first one warms up, Redis too: a module that has no bytecode yet is compiled, which takes 18 MB that no image pays.
    """
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    for number in range(_ROUNDS + 1):
        for name in ("hello", *_CALLS):
            path, status = _CALLS.get(name, ("/", b"200"))
            request = load.write_request(path, ground.keys[0], close=True)
            with Served.hello() if name == "hello" else Served.function(name, ground.variables) as served:
                said, seconds = served.first_answer(request)
                assert said.split()[1] == status, f"{name}: {said!r}"
                if number in (0, _ROUNDS):
                    await asyncio.sleep(_SETTLED_SECONDS)
                    memory[name] = [served.peak_mb()]
                elif number:
                    wall.setdefault(name, []).append(seconds * 1000)
                    cpu.setdefault(name, []).append(served.cpu_seconds() * 1000)
    figures: list[Figure] = []
    for name in _CALLS:
        figures += [
            paired(f"cold start of {name}", "ms", wall[name], wall["hello"], target_ratio=_TARGET_RATIO),
            paired("  its CPU time", "ms", cpu[name], cpu["hello"]),
            paired("  its memory", "MB", memory[name], memory["hello"], target=_TARGET_MB),
        ]
    return figures
