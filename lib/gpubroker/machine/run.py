"""One run of a pod: its processes, its output on the way to the log, the commands beside it."""

import os
import select
import signal
import time
from collections.abc import Sequence
from typing import Any, Final

from gpubroker.machine import cgroup, record, tree
from gpubroker.machine.execs import MOST, Exec
from gpubroker.machine.folder import PodSpec
from gpubroker.machine.journal import Journal
from gpubroker.machine.server import Client, Loop

_START_SECONDS: Final = 10.0
_CHUNK: Final = 1 << 16
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5


class Refused(Exception):
    """A command cannot be run beside the program now: a code and what to say."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code)
        self.code, self.detail = code, detail


class Run:
    """From the first process to the last. `code` is the program's, once it has ended."""

    def __init__(self, loop: Loop, spec: PodSpec, journal: Journal, planted: tree.Tree) -> None:
        self.code: int | None = None
        self.ending: str | None = None
        """The event that it is being ended for: `stopped`, `terminated`, `restarted`."""
        self.tree = planted
        self._loop, self._spec, self._journal = loop, spec, journal
        self._kill_at, self._killing, self._pause = float("inf"), False, _FIRST_PAUSE
        self._failed = False
        self._execs: dict[int, Exec] = {}
        self._numbers = tree.PROGRAM
        self._output, self._input = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._output, False)
        loop.watch(self._output, select.EPOLLIN, lambda _events: self._write_log())
        loop.watch(planted.channel.fileno(), select.EPOLLIN, lambda _events: self._listen())

    @property
    def is_ending(self) -> bool:
        """Whether somebody asked for its end, or the program has ended."""
        return self._killing or self._failed or self.ending is not None

    def start_program(self, state: record.State) -> None:
        """Start the program and wait until it executes or cannot: a moment."""
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        env = tree.environment(self._spec, state.ports, state.gpus)
        try:
            self.tree.spawn(tree.PROGRAM, self._spec.command, env, (nothing, self._input, self._input))
            answered = select.select([self.tree.channel], [], [], _START_SECONDS)[0]
            if self.tree.sign >= 0:
                self._loop.watch(self.tree.sign, select.EPOLLIN, self._look)
            if answered:
                self._listen()
            else:
                self._killing = True
        except OSError:
            self._killing = True
        finally:
            os.close(nothing)
            os.close(self._input)

    def end(self, event: str, grace_seconds: float) -> None:
        """SIGTERM to the program's group; SIGKILL to all when the grace is over, or when the program has ended."""
        self.ending = event
        self._kill_at = min(time.monotonic() + grace_seconds, self._kill_at)
        self.tree.signal(tree.PROGRAM, signal.SIGTERM)

    def reaped(self, pid: int) -> None:
        """A child of the supervisor was reaped."""
        if pid == self.tree.pid:
            self.tree.reaped = self._killing = True

    def execute(self, client: Client, request: dict[str, Any], state: record.State) -> None:
        """Run a command beside the program; the client gets its answer when it ends. Raises Refused."""
        if self.is_ending:
            raise Refused("not_running", "it is ending")
        if len(self._execs) >= MOST:
            raise Refused("too_many", f"{MOST} commands run in it already")
        self._numbers += 1
        stdin, patience = bytes.fromhex(request["stdin"]), float(request["timeout_seconds"])
        running = Exec(self._loop, self.tree, self._numbers, client, stdin, patience)
        try:
            running.start(request["command"], tree.environment(self._spec, state.ports, state.gpus))
        except OSError:
            raise Refused("not_running", "it has just ended") from None
        self._execs[running.number] = running

    def tick(self) -> tuple[bool, Sequence[float]]:
        """Do what is due: whether all is over, and when to look again (monotonic)."""
        now = time.monotonic()
        self._killing |= now >= self._kill_at
        if self._killing and self.tree.destroy():
            self._close()
            return True, []
        due = [running.tick() for running in self._execs.values()]
        self._execs = {number: running for number, running in self._execs.items() if not running.done}
        if self._killing:
            self._pause = min(self._pause * 1.2, _LONGEST_PAUSE)
            return False, [*due, now + self._pause]
        return False, [*due, self._kill_at]

    def _listen(self) -> bool:
        """Hear one message of the pod's first process. False: there will be no more."""
        message = self.tree.hear()
        if message is None:
            self._loop.forget(self.tree.channel.fileno())
            self._killing = True
            return False
        if message["id"] in self._execs and "code" in message:
            self._execs[message["id"]].ended(message["code"])
        elif message["id"] == tree.PROGRAM and "code" in message:
            self.code, self._killing = message["code"], True
        elif message["id"] == tree.PROGRAM and message["error"]:
            self._failed = True  # its code is the next message
        return True

    def _look(self, _events: int) -> None:
        self.tree.look()
        self._loop.forget(self.tree.sign)

    def _write_log(self) -> bool:
        """Move output to the log, a part at a time. False when there is nothing more for now."""
        try:
            data = os.read(self._output, _CHUNK)
        except BlockingIOError:
            return False
        if data:
            self._journal.write(data)
        else:
            self._loop.forget(self._output)
        return bool(data)

    def _close(self) -> None:
        """All processes are dead: keep their last words and answer who waited for a command."""
        while self._write_log():
            continue
        while self._listen():
            continue
        self._loop.forget(self._output)
        os.close(self._output)
        if self.tree.sign >= 0:
            self._loop.forget(self.tree.sign)
            os.close(self.tree.sign)
        self.tree.channel.close()
        for running in self._execs.values():
            running.pod_ended()


def why(code: int | None, state: record.State, *, oom_killed: bool = False) -> str:
    """Say in words why a program ended by itself."""
    if code != 0 and (oom_killed or cgroup.kills(state.cgroups)):
        return "OOMKilled: its processes needed more memory than the offer has"
    if code is None:
        return "its first process was killed"
    return f"the program ended with exit code {code}"
