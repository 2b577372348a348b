"""From `POST /v1/pods` to the provider's create: over HTTP, through the broker of `gpubroker dev`, to the provider `local`."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
from tests.bench import load
from tests.bench.figures import Figure, timed
from tests.bench.served import Served
from tests.bench.watched import CALLS

from gpubroker import accounts
from gpubroker.local import processes

_PODS, _WARM_UP, _HELLOS = 25, 5, 20
_TARGET_MS: Final = 60.0
_END_SECONDS = 30
_POD: Final = {
    "command": ["sleep", "60"],
    "requirements": {"provider": ["local"], "gpu_count": 0},
    "max_lifetime_seconds": 60,
}


async def measure() -> list[Figure]:
    """Pods one after another, some hellos before each."""
    hellos: list[float] = []
    answered: list[float] = []
    with tempfile.TemporaryDirectory() as folder, _dev(Path(folder)) as running, Served.hello() as hello:
        hello.first_answer(load.write_request("/", close=True))
        made = accounts.bootstrap(running["database_url"], "default", 10**9, "total", "enterprise", new_key=False)
        posted: dict[str, float] = {}
        headers = {"Authorization": f"Bearer {made.key.key}"}
        async with httpx.AsyncClient(base_url=running["url"], headers=headers, timeout=30, trust_env=False) as http:
            for _ in range(_WARM_UP + _PODS):
                hellos += await load.call(hello.port, [[load.write_request("/")]], most=_HELLOS)
                began, at = time.perf_counter(), time.time()
                answer = await http.post("/v1/pods?duplicate=allow", json=_POD)
                answered.append(time.perf_counter() - began)
                assert answer.status_code == 202, answer.text
                posted[answer.json()["id"]] = at
                await _end(http, answer.json()["id"])
        lines = [line.split() for line in (Path(folder) / CALLS).read_text().splitlines()]
        called = {pod_id: float(at) for pod_id, at in lines}
    waited = [called[pod_id] - at for pod_id, at in posted.items()]
    return [
        timed("create to the provider", waited[_WARM_UP:], hellos, _TARGET_MS),
        timed("  answer of the create", answered[_WARM_UP:], hellos),
    ]


@contextmanager
def _dev(folder: Path) -> Generator[dict[str, Any]]:
    """A `gpubroker dev`, as its ready line describes it."""
    command = [*processes.tied("TERM"), sys.executable, "-m", "tests.bench.watched", str(folder)]
    home = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(_END_SECONDS)


async def _end(http: httpx.AsyncClient, pod_id: str) -> None:
    """Wait until it runs, then until it is gone, so that nothing of it disturbs the next."""
    wait = {"wait": _END_SECONDS, "until": "settled"}
    pod = (await http.get(f"/v1/pods/{pod_id}", params=wait)).json()
    assert pod["state"] == "running", pod
    pod = (await http.delete(f"/v1/pods/{pod_id}", params=wait)).json()
    assert pod["state"] == "terminated", pod
