"""Processes that are measured: started the same way, kept on one core, their CPU time and memory read from the kernel."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from gpubroker.local import processes

HELLO = Path(__file__).with_name("hello") / "serve.py"
_TICKS = os.sysconf("SC_CLK_TCK")
_START_SECONDS = 30


@cache
def cores() -> tuple[set[int], set[int]]:
    """The core of what is measured, and those of all else: clients, PostgreSQL, Valkey. With one core both are that.

    Of those that there were when it was first asked: clients keep to their own after that.
    """
    first, *rest = sorted(os.sched_getaffinity(0))
    return {first}, set(rest) or {first}


class Served:
    """One HTTP server as a process of its own; it dies with us."""

    def __init__(self, command: Sequence[str], port: int, variables: Mapping[str, str]) -> None:
        self.port = port
        environment = {"PATH": os.environ["PATH"], **variables}
        self.began = time.perf_counter()
        self._process = subprocess.Popen(
            [*processes.tied("KILL"), *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    @classmethod
    def hello(cls) -> Self:
        """functions-framework's hello."""
        port = processes.free_port()
        return cls([sys.executable, str(HELLO), str(port)], port, {})

    @classmethod
    def function(cls, name: str, variables: Mapping[str, str]) -> Self:
        """One of our functions, as a container starts it."""
        port = processes.free_port()
        command = [sys.executable, "-m", "gpubroker", "serve", name, "--port", str(port), "--host", "127.0.0.1"]
        return cls(command, port, variables)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def keep_on(self, cores: set[int]) -> Self:
        """Let it run on these cores alone. Right after its start: a thread that is there already stays where it is."""
        os.sched_setaffinity(self._process.pid, cores)
        return self

    def first_answer(self, request: bytes) -> tuple[bytes, float]:
        """Ask until it listens. Returns the status line and the seconds since its start."""
        until = time.monotonic() + _START_SECONDS
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=_START_SECONDS) as connection:
                    connection.sendall(request)
                    answer = connection.recv(4096)
                    return answer.partition(b"\r\n")[0], time.perf_counter() - self.began
            except ConnectionError:
                if self._process.poll() is not None or time.monotonic() > until:
                    raise
                time.sleep(0.002)

    def cpu_seconds(self) -> float:
        """What it has used of CPU so far, in the kernel too."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def peak_mb(self) -> float:
        """The most memory that it had resident, in 10^6 bytes."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
