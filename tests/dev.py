"""A `gpubroker dev` in a process of its own, and how to look at processes from outside."""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpubroker import bundle

LIB = Path(bundle.__file__).parents[1]
RUN = "from gpubroker.cli import main; main()"


def started_at(pid: int) -> str | None:
    """Tell a process from a later one by the same pid; None when it is gone, a zombie too."""
    try:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def wait_until(is_so: Callable[[], bool], seconds: float = 8) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def pids_of(folder: Path) -> set[int]:
    """The processes that name a folder among their arguments."""
    found: set[int] = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes() and started_at(int(path.parent.name)):
                found.add(int(path.parent.name))
    return found


class Dev:
    """A `gpubroker dev` in a process of its own."""

    def __init__(self, data: Path, *words: str, port: int = 0, **environment: str) -> None:
        self.data = data
        variables = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "PYTHONPATH": str(LIB), "GPUBROKER_LOCAL_ENGINE": "none"}
        self.log = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, "dev", "--data", str(data), "--port", str(port), *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log, text=True, env=variables | environment,
        )  # fmt: skip

    def first_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ready(self) -> dict[str, Any]:
        line = self.first_line()
        assert line, self.said()
        return json.loads(line)

    def said(self) -> str:
        return Path(self.log.name).read_text()

    def servers(self) -> list[int]:
        """The pids of PostgreSQL and Valkey, as far as they have begun."""
        files = [self.data / "postgres/data/postmaster.pid", self.data / "valkey/pid"]
        begun = [path.read_text().split() for path in files if path.exists()]
        return [int(words[0]) for words in begun if words]

    def tell(self, number: signal.Signals, seconds: float = 5) -> int:
        """Send a signal; the exit code, which must come in time."""
        began = time.monotonic()
        self.process.send_signal(number)
        code = self.process.wait(20)
        assert time.monotonic() - began < seconds
        return code

    def close(self) -> None:
        pids = self.servers()
        self.process.kill()
        self.process.communicate()
        self.log.close()
        wait_until(lambda: not any(started_at(pid) for pid in pids))


@contextlib.contextmanager
def dev(data: Path, *words: str, port: int = 0, **environment: str) -> Iterator[Dev]:
    running = Dev(data, *words, port=port, **environment)
    try:
        yield running
    finally:
        running.close()


def bootstrap(data: Path) -> str:
    """The first key of the installation that runs in this folder."""
    made = subprocess.run(
        [sys.executable, "-c", RUN, "bootstrap", "--data", str(data), "--json"],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": str(LIB)},
    )  # fmt: skip
    return json.loads(made.stdout)["key"]["key"]


class Running(NamedTuple):
    """A broker that runs, and its first key."""

    url: str
    key: str


@contextlib.contextmanager
def broker_of_its_own(data: Path) -> Iterator[Running]:
    """A broker with room for many pods, which end with it."""
    room = {"GPUBROKER_LOCAL_VCPUS": "8", "GPUBROKER_LOCAL_RAM_GB": "8", "GPUBROKER_TICK_SECONDS": "1"}
    with dev(data, "--json", "--end-pods", **room) as it:
        ready = it.ready()
        try:
            yield Running(ready["url"], bootstrap(data))
        finally:
            it.tell(signal.SIGTERM, 20)
