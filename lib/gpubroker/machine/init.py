"""The first process of a pod: it starts what runs there, tells its supervisor how that ended, and reaps the rest.

In a PID namespace it is process 1, so its end is the end of all. Without one it stays the parent of whatever is
orphaned below it. It lives exactly as long as its supervisor: the kernel kills it, or it sees the channel close.

Over the channel go packets of JSON. To the supervisor: `{"born"}`, its number as the supervisor counts; `{"ready"}` or
`{"unable"}`; `{"id", "pid", "error"}` when something executes or could not; `{"id", "code"}` when that ended, 128 + N
by signal N. From it: `go`; `{"do": "spawn", "id"}` with four files (payload, stdin, stdout, stderr); `{"do": "signal",
"id", "signal"}`; `{"do": "kill", "id"}`.
"""

import contextlib
import errno
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn

from gpubroker.machine import jail, kernel, processes
from gpubroker.machine.folder import PodSpec

_PACKET: Final = 4096
_FILES: Final = 4
_CANNOT_EXECUTE, _NOT_FOUND = 126, 127


def give_birth(spec: PodSpec, disk: str, mode: str, channel: socket.socket, joins: Sequence[str]) -> NoReturn:
    """In a child of the supervisor: enter the namespaces, leave one process in them, end. Its parent adopts that one.

    Ends with 0, or with the error's number.
    """
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        doors = [os.open(path, os.O_WRONLY | os.O_CLOEXEC) for path in joins]
        processes.close_files(channel.fileno(), *doors)
        jail.enter(mode)
        born = os.fork()
        if born == 0:
            _live(spec, disk, mode, channel, doors)
        channel.send(json.dumps({"born": born}).encode())
    except OSError as error:
        os._exit(error.errno or errno.EIO)
    except BaseException:  # noqa: BLE001 - nothing of the supervisor may run on in its child
        os._exit(errno.EIO)
    os._exit(0)


def _live(spec: PodSpec, disk: str, mode: str, channel: socket.socket, doors: list[int]) -> NoReturn:
    try:
        first = _First(spec, mode, channel, doors)
        first.settle(disk)
        first.serve()
    except OSError as error:
        with contextlib.suppress(OSError):
            channel.send(json.dumps({"unable": error.errno}).encode())
    except BaseException as error:  # noqa: BLE001 - its last words go where the supervisor's do
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit(1)


class _First:
    """The first process of one run."""

    def __init__(self, spec: PodSpec, mode: str, channel: socket.socket, doors: list[int]) -> None:
        self._spec, self._mode, self._channel, self._doors = spec, mode, channel, doors
        self._ids: dict[int, int] = {}
        self._pids: dict[int, int] = {}

    def settle(self, disk: str) -> None:
        """Become what the docstring of this module says; `ready` tells the supervisor what holds."""
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        holding: list[str] = []
        holder = None
        if self._mode in jail.WITHOUT:
            kernel.adopt_orphans()
            holder = jail.hold_processes() if self._mode == "joined" else None
        else:
            holding = ["processes", *jail.furnish(self._spec.hidden, disk)]
        os.chdir("/")
        kernel.forbid_tracing()
        if self._channel.recv(_PACKET) != b"go":  # until then the parent is not yet the supervisor
            os._exit(1)
        if self._mode not in jail.WITHOUT:
            kernel.die_with_parent()
        self._say(ready={"holding": holding, "joined": self._try_doors(), "pid": os.getpid(), "holder": holder})

    def _try_doors(self) -> list[bool]:
        """Whether a child of this process may join each control group."""
        child = os.fork()
        if child == 0:
            refused = 0
            for place, door in enumerate(self._doors):
                try:
                    os.write(door, b"0")
                except OSError:
                    refused |= 1 << place
            os._exit(refused)
        refused = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return [not refused >> place & 1 for place in range(len(self._doors))]

    def serve(self) -> None:
        """Do what the supervisor says until it is no more, then end everything."""
        woken = processes.wake_on_signals()
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(woken, select.POLLIN)
        while True:
            ready = {file for file, _ in poll.poll()}
            if woken in ready:
                os.read(woken, _PACKET)
            self._reap()
            if self._channel.fileno() in ready:
                packet, files, _, _ = socket.recv_fds(self._channel, _PACKET, _FILES)
                for file in files:  # recv_fds ignores its flags
                    os.set_inheritable(file, False)
                if not packet:
                    self._end_everything()
                self._obey(json.loads(packet), files)

    def _say(self, **message: object) -> None:
        try:
            self._channel.send(json.dumps(message).encode())
        except OSError:
            self._end_everything()

    def _end_everything(self) -> NoReturn:
        """The supervisor is dead. Process 1, and who holds a namespace, take all with them; else all is looked for.

        A container that is in no namespace of ours is for its engine to end: this process becomes that command.
        """
        if self._mode == "engine":
            from gpubroker.machine import engine  # noqa: PLC0415 - pods that are processes do without it

            used = engine.of(self._spec)
            os.execve(used.program, [used.program, "kill", self._spec.ref], used.env)  # noqa: S606
        if self._mode == "none":
            while found := processes.descendants(os.getpid()) | processes.marked(self._spec.ref):
                processes.kill(found)
                self._reap(silent=True)
        os._exit(0)

    def _reap(self, *, silent: bool = False) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            number = self._ids.pop(pid, None)
            if number is not None and not silent:
                code = os.waitstatus_to_exitcode(status)
                del self._pids[number]
                self._say(id=number, code=code if code >= 0 else 128 - code)

    def _obey(self, order: dict[str, Any], files: list[int]) -> None:
        number = int(order["id"])
        if order["do"] == "spawn":
            self._spawn(number, files)
            return
        leader = self._pids.get(number)
        if leader is None:
            return
        found = processes.descendants(leader) if order["do"] == "kill" else set[int]()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, int(order.get("signal", signal.SIGKILL)))
        processes.kill(found)

    def _spawn(self, number: int, files: list[int]) -> None:
        payload = _read_payload(files.pop(0))
        told, tell = os.pipe2(os.O_CLOEXEC)
        child = os.fork()
        if child == 0:
            _become(payload, files, self._doors, tell, keeps_rights=self._mode in {"engine", "joined"})
        os.close(tell)
        for file in files:
            os.close(file)
        failed = os.read(told, 8)  # executing closes the other end
        os.close(told)
        self._ids[child], self._pids[number] = number, child
        self._say(id=number, pid=child, error=int(failed) if failed else None)


def _read_payload(file: int) -> dict[str, Any]:
    with open(file, "rb") as whole:
        whole.seek(0)
        return json.loads(whole.read())


def _become(payload: dict[str, Any], files: list[int], doors: list[int], tell: int, *, keeps_rights: bool) -> NoReturn:
    """In a child: take on the limits, the folder and the three files, and execute. Its last words go to its stderr."""
    command: list[str] = payload["command"]
    code = _CANNOT_EXECUTE
    try:
        os.setsid()
        for place, file in enumerate(files):
            os.dup2(file, place)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        for place in payload["join"]:
            os.write(doors[int(place)], b"0")
        _limit(payload)
        if not keeps_rights:
            kernel.forbid_new_rights()
            kernel.drop_capabilities()
        os.umask(0o022)
        os.chdir(payload["folder"])
        os.execvpe(command[0], command, payload["env"])  # noqa: S606 - what the pod is for
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None) or errno.EINVAL
        code = _NOT_FOUND if number in {errno.ENOENT, errno.ENOTDIR} else _CANNOT_EXECUTE
        with contextlib.suppress(OSError):
            os.write(2, f"gpubroker: cannot run {command[0]}: {os.strerror(number)}\n".encode(errors="replace"))
            os.write(tell, str(number).encode())
    finally:
        os._exit(code)


def _limit(payload: dict[str, Any]) -> None:
    """Limits per process, for what no control group limits."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for kind, most in ((resource.RLIMIT_DATA, payload["data_bytes"]), (resource.RLIMIT_FSIZE, payload["file_bytes"])):
        if most:
            hard = resource.getrlimit(kind)[1]
            least = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (least, least))
    if payload["cpus"]:
        os.sched_setaffinity(0, payload["cpus"])
