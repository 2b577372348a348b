"""A pod with an image: how its container comes to be, and one run of it as a supervisor holds it.

The supervisor's child is the engine's `start --attach`, so output, exit code and signals go the way that a process's do.
The container's own processes are in a namespace whose first process is ours, where the engine lets them join one: when
that ends, by whatever death, the kernel ends them. Elsewhere the engine is told to kill them, by whoever is left.
"""

import contextlib
import os
import select
import time
from collections.abc import Generator, Sequence
from typing import Any, Final

from gpubroker.machine import cgroup, engine, processes, record, tree
from gpubroker.machine.folder import PodSpec

_ORDERLY_SECONDS: Final = 10.0
"""So long an engine may tidy up after a container that has ended."""
_QUICK_SECONDS: Final = 10.0
_REMOVE_SECONDS: Final = 20.0
_START_SECONDS, _SOON_SECONDS = 10.0, 0.02
_LOOK: Final = -1
"""The number of the question that is asked when the program has ended."""
EXEC: Final = "GPUBROKER_EXEC"
"""The variable that tells the processes of one command from others."""
_ENGINE_FAILED: Final = 125


class Making:
    """From an image's name to a container that was never started. `over` at the end, with the reason when it failed."""

    def __init__(self, spec: PodSpec, state: record.State) -> None:
        self.over = False
        self.failed: str | None = None
        self._spec, self._state = spec, state
        self._steps = self._make()
        self._call: engine.Call | None = None
        self._go_on(None)

    def reaped(self, pid: int, status: int) -> None:
        """A child of the supervisor was reaped."""
        call = self._call
        if call is not None and call.pid == pid:
            call.ended(status)
            self._go_on(call)

    def stop(self) -> None:
        """It is wanted no more."""
        if self._call is not None and not self.over:
            processes.kill([self._call.pid])
            self._call.let_go()
        engine.forget_secrets(self._spec)

    def _go_on(self, ended: engine.Call | None) -> None:
        try:
            self._call = self._steps.send(ended)
        except StopIteration:
            self.over = True
        except (engine.Failed, OSError, ValueError) as error:
            self.over, self.failed = True, str(error)
        if self.over:
            engine.forget_secrets(self._spec)

    def _make(self) -> Generator[engine.Call, engine.Call | None, None]:
        spec, state = self._spec, self._state
        made = yield engine.create(spec, state.ports, state.gpus)
        if made is None or made.code == 0:
            return
        used = engine.of(spec)
        yield engine.Call(used, "rm", "--force", "--volumes", spec.ref)  # a supervisor that died may have made one
        there = yield engine.Call(used, "image", "inspect", "--format", "{{.Id}}", "--", str(spec.image))
        if there is not None and there.code != 0:
            if str(spec.image).startswith("localhost/"):
                self._fail("ImagePullFailed", f"the image {spec.image} is not on this machine")
            pulled = yield engine.pull(spec)
            if pulled is not None and pulled.code != 0:
                self._fail("ImagePullFailed", f"the image {spec.image} cannot be pulled: {pulled.complaint}")
        made = yield engine.create(spec, state.ports, state.gpus)
        if made is not None and made.code != 0:
            self._fail("ContainerNotMade", made.complaint)

    def _fail(self, code: str, detail: str) -> None:
        for secret in self._spec.env.values():
            detail = detail.replace(secret, "…") if secret else detail
        raise engine.Failed(f"{code}: {detail[:300]}")


class Container(tree.Tree):
    """One run of a container."""

    def __init__(self, spec: PodSpec, mode: str, born: tree.Birth) -> None:
        super().__init__(spec, mode, born)
        self._engine = engine.of(spec)
        self._first: int | None = born.ready["holder"]
        self._first_start = processes.start_time(self._first) if self._first else None
        self._give_up_at: float | None = None
        self._code: int | None = None
        self._answer = -1
        self._groups: tuple[str, ...] = ()
        if self._first:
            engine.link(spec, self._first)

    @property
    def limits(self) -> str:
        """Which limits hold, in words."""
        kind = self._engine.kind
        words = [
            f"{name} by {kind}" if name in self._engine.limits else f"{name} not limited" for name in ("memory", "cpu")
        ]
        words += ["processes end with their supervisor" if self._first else f"processes in a container of {kind}"]
        return f"limits: {', '.join(words)}"

    def spawn(self, number: int, command: Sequence[str], env: dict[str, str], files: Sequence[int]) -> None:  # noqa: ARG002
        """Start the program, or a command beside it, which has the program's environment."""
        ref = self._spec.ref
        asked = ["start", "--attach", ref]
        if number != tree.PROGRAM:
            asked = ["exec", "--interactive", "--env", f"{EXEC}={number}", ref, *command]
        self._ask(number, asked, files)

    def _ask(self, number: int, asked: Sequence[str], files: Sequence[int]) -> None:
        payload: dict[str, Any] = {
            "command": [self._engine.program, *asked],
            "env": self._engine.env,
            "folder": os.path.join(self._spec.all, self._spec.ref),
            "join": [],
            "data_bytes": 0,
            "file_bytes": 0,
            "cpus": [],
        }
        self._order_spawn(number, payload, files)
        if number == tree.PROGRAM:
            self._await_start()

    def _await_start(self) -> None:
        """Wait until the container's program executes or cannot, a moment: then it can be used."""
        if not select.select([self.channel], [], [], _START_SECONDS)[0]:
            return
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until and processes.descendants(self.pid) - {self._first}:
            marked = processes.marked(self._spec.ref)
            if marked:
                self._watch(min(marked, key=lambda pid: processes.start_time(pid) or 0))
            if marked or self._is_said_to_run():
                return
            time.sleep(_SOON_SECONDS)

    def _watch(self, program: int) -> None:
        self._groups = cgroup.counting(program)
        with contextlib.suppress(OSError):  # it has ended already
            self.sign = os.pidfd_open(program)

    def look(self) -> None:
        """The program has ended just now: its group still counts what the kernel killed in it, and soon is no more."""
        self.oom_killed = self.oom_killed or cgroup.kills(self._groups) > 0

    def _is_said_to_run(self) -> bool:
        """Where we may not see its processes, the engine is asked."""
        if os.geteuid() == 0:
            return False
        with contextlib.suppress(engine.Failed):
            asked = ("inspect", "--format", "{{.State.Running}}", self._spec.ref)
            return engine.ask(self._engine, *asked, seconds=_QUICK_SECONDS).strip() == "true"
        return False

    def kill(self, number: int) -> None:
        """End a command beside the program: its processes, as far as we may see them, then the engine's own."""
        for _ in range(3):  # what they start meanwhile is marked as they are
            processes.kill(processes.marked(self._spec.ref, f"{EXEC}={number}"))
        super().kill(number)

    def hear(self) -> dict[str, Any] | None:
        """One message of the first process. The program's end is told when the engine has said why it ended."""
        message = super().hear()
        if message is None:
            return None
        unasked = self._code is None and self._give_up_at is None and not self.oom_killed
        if message["id"] == tree.PROGRAM and message.get("code", 0) not in {0, _ENGINE_FAILED} and unasked:
            return self._ask_why(message)
        if message["id"] == _LOOK and "code" in message and self._code is not None:
            self.oom_killed |= os.pread(self._answer, 16, 0).strip() == b"true"
            os.close(self._answer)
            return {"id": tree.PROGRAM, "code": self._code}
        return message

    def _ask_why(self, message: dict[str, Any]) -> dict[str, Any]:
        self._answer = os.memfd_create("answer", os.MFD_CLOEXEC)
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            asked = ["inspect", "--format", "{{.State.OOMKilled}}", self._spec.ref]
            self._ask(_LOOK, asked, (nothing, self._answer, nothing))
        except OSError:
            os.close(self._answer)
            return message
        finally:
            os.close(nothing)
        self._code = message["code"]
        return {"id": _LOOK}

    def destroy(self) -> bool:
        """End the container; the engine has a moment to tidy up. True when nothing is left."""
        now = time.monotonic()
        if self._give_up_at is None:
            self._give_up_at = now + _ORDERLY_SECONDS
            if self._first is None:
                engine.Call(self._engine, "kill", self._spec.ref).let_go()
            elif processes.start_time(self._first) == self._first_start:
                processes.kill([self._first])
        left = processes.descendants(os.getpid()) - {self.pid} | processes.marked(self._spec.ref)
        if now >= self._give_up_at:
            processes.kill(left)
        if left:
            return False
        if not self.reaped:
            processes.kill([self.pid])
        return self.reaped


class Keeper:
    """What a supervisor does about its pod's container between runs."""

    def __init__(self, spec: PodSpec) -> None:
        self.failed: str | None = None
        """Why it could not be made."""
        self._spec = spec
        self._making: Making | None = None

    def is_made(self, state: record.State) -> bool:
        """Whether there is a container, or there will be none. Else one is being made, from now on."""
        if state.started_at is not None:
            return True
        self._making = self._making or Making(self._spec, state)
        if self._making.over:
            self.failed, self._making = self._making.failed, None
            return True
        return False

    def reaped(self, pid: int, status: int) -> None:
        """A child of the supervisor was reaped."""
        if self._making is not None:
            self._making.reaped(pid, status)

    def stop_making(self) -> None:
        """None is wanted any more."""
        if self._making is not None:
            self._making.stop()
            self._making = None

    def plant(self) -> Container:
        """Begin a run of the container. Raises NotPlanted."""
        try:
            mode = "joined" if engine.joins(self._spec) else "engine"
            return Container(self._spec, mode, tree.give_birth(self._spec, mode, []))
        except (OSError, ValueError, engine.Failed) as error:
            raise tree.NotPlanted(str(error)) from None

    def end_leftovers(self) -> None:
        """End what a supervisor that died has left running, where that does not end by itself."""
        with contextlib.suppress(engine.Failed):  # it does not run
            if not engine.joins(self._spec):
                engine.ask(engine.of(self._spec), "kill", self._spec.ref, seconds=_QUICK_SECONDS)

    def remove(self) -> str | None:
        """Delete the container. Gives the reason when it will not go."""
        self.stop_making()
        try:
            engine.remove(engine.of(self._spec), self._spec.ref, seconds=_REMOVE_SECONDS)
        except engine.Failed as error:
            return f"its container could not be removed: {error}"
        return None
