"""A pod's processes, as its supervisor holds them: one run from its first process to its last."""

import errno
import json
import os
import socket
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, NoReturn

from gpubroker.machine import cgroup, init, jail, processes
from gpubroker.machine.folder import DISK, PodSpec

_PATIENCE_SECONDS: Final = 10.0
_PACKET: Final = 4096
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROGRAM: Final = 0
"""The program's number; commands beside it have others."""


class NotPlanted(Exception):
    """The first process could not be started: the machine is out of something."""


class Birth(NamedTuple):
    """A first process that waits for what it is to start: its number, the channel to it, and what it said of itself."""

    pid: int
    channel: socket.socket
    ready: dict[str, Any]


class Tree:
    """One run. `mode` is how its processes are kept together: `root`, `user` (namespaces) or `none`."""

    oom_killed = False
    """Whether others than our control groups say that it was killed at its memory limit."""
    sign = -1
    """A file that becomes readable when the program has ended, where that is to be known before all else; then `look`."""

    def __init__(self, spec: PodSpec, mode: str, born: Birth) -> None:
        self.pid, self.channel, ready = born
        self.start_time = processes.start_time(self.pid) or 0
        self.reaped = False
        self._spec, self._mode = spec, mode
        self._holding: list[str] = ready["holding"]
        self._joined: list[bool] = ready["joined"]
        self._groups: tuple[str, ...] = ()
        self._limited: set[str] = set()

    def limit(self, groups: Sequence[str], limited: set[str]) -> None:
        """Note the control groups, and what they limit when this pod may join them."""
        self._groups = tuple(groups)
        self._limited = limited if all(self._joined) else set()

    @property
    def limits(self) -> str:
        """Which limits hold, in words."""
        cores = len(self._cores())
        words = [
            "memory by cgroup" if "memory" in self._limited else "memory by rlimit (each process)",
            "cpu by cgroup" if "cpu" in self._limited else f"cpu by affinity ({cores} core{'s' * (cores != 1)})",
            "processes in a namespace" if "processes" in self._holding else "processes by mark, in no namespace",
        ]
        words += ["files of the broker hidden"] if "hidden" in self._holding else ["files of the broker not hidden"]
        return f"limits: {', '.join(words)}"

    def _cores(self) -> list[int]:
        """As many whole cores as the vCPUs need, which ones by the reference."""
        allowed = sorted(os.sched_getaffinity(0))
        count = min(-(-self._spec.vcpus_milli // 1000), len(allowed))
        first = sum(self._spec.ref.encode()) % len(allowed)
        return sorted((allowed * 2)[first : first + count])

    def spawn(self, number: int, command: Sequence[str], env: dict[str, str], files: Sequence[int]) -> None:
        """Start a command with these files as stdin, stdout and stderr, under the pod's limits and in its folder."""
        spec = self._spec
        payload: dict[str, Any] = {
            "command": list(command),
            "env": env,
            "folder": os.path.join(spec.all, spec.ref, DISK),
            "join": list(range(len(self._groups))) if self._limited else [],
            "data_bytes": 0 if "memory" in self._limited else spec.ram_bytes,
            "file_bytes": spec.disk_gb * 10**9,
            "cpus": [] if "cpu" in self._limited else self._cores(),
        }
        self._order_spawn(number, payload, files)

    def look(self) -> None:
        """The sign was given: see what cannot be seen later."""

    def _order_spawn(self, number: int, payload: dict[str, Any], files: Sequence[int]) -> None:
        memory = os.memfd_create("payload", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(memory), "wb") as whole:
                whole.write(json.dumps(payload).encode())
            order = json.dumps({"do": "spawn", "id": number}).encode()
            socket.send_fds(self.channel, [order], [memory, *files])
        finally:
            os.close(memory)

    def signal(self, number: int, which: int) -> None:
        """Send a signal to the process group of what was started under a number."""
        self._order(do="signal", id=number, signal=which)

    def kill(self, number: int) -> None:
        """End what was started under a number, with all that it started and is still below it."""
        self._order(do="kill", id=number)

    def _order(self, **order: object) -> None:
        try:
            self.channel.send(json.dumps(order).encode())
        except OSError:  # it is dead already, and its end will be seen
            return

    def hear(self) -> dict[str, Any] | None:
        """One message of the first process. None: it has ended."""
        try:
            packet = self.channel.recv(_PACKET)
        except OSError:
            return None
        return json.loads(packet) if packet else None

    def destroy(self) -> bool:
        """Kill whatever is left. True when nothing is: the caller repeats it until then, reaping in between."""
        left = cgroup.members(self._groups)
        if self._mode == "none":
            left |= processes.descendants(os.getpid()) | processes.marked(self._spec.ref)
        if not self.reaped:
            left.add(self.pid)
        processes.kill(left)
        return not left


def environment(spec: PodSpec, ports: dict[str, int], gpus: Sequence[str]) -> dict[str, str]:
    """All that the program's environment has: nothing of the broker's is in it."""
    env = {"PATH": _PATH, "HOME": os.path.join(spec.all, spec.ref, DISK), "LANG": "C.UTF-8", **spec.env}
    if spec.machine_has_gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    env |= {f"GPUBROKER_PORT_{port}": str(external) for port, external in ports.items()}
    return env | {"GPUBROKER_POD_ID": spec.pod_id, processes.MARK: spec.ref}


def plant(spec: PodSpec, groups: Sequence[str], limited: set[str]) -> Tree:
    """Start the first process of a run in the best way that works here. Raises NotPlanted."""
    because = "nothing was tried"
    for mode in jail.MODES[spec.isolation]:
        try:
            tree = Tree(spec, mode, give_birth(spec, mode, groups if limited else []))
        except (OSError, ValueError) as error:
            because = str(error)
            continue
        tree.limit(groups if limited else [], limited)
        return tree
    raise NotPlanted(because)


def give_birth(spec: PodSpec, mode: str, groups: Sequence[str]) -> Birth:
    """Start a first process in one way, which may not work here. Raises OSError, ValueError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    disk = os.path.join(spec.all, spec.ref, DISK)
    midwife = os.fork()
    if midwife == 0:
        init.give_birth(spec, disk, mode, theirs, [os.path.join(group, "cgroup.procs") for group in groups])
    theirs.close()
    pid = 0
    try:
        ours.settimeout(_PATIENCE_SECONDS)
        code = os.waitstatus_to_exitcode(os.waitpid(midwife, 0)[1])
        if code != 0:
            _fail(code)
        heard = _hear_of(ours, {}, "born")
        pid = int(heard["born"])
        ours.send(b"go")
        heard = _hear_of(ours, heard, "ready")
    except (OSError, ValueError):
        ours.close()
        if pid:
            processes.kill([pid])
            os.waitpid(pid, 0)
        raise
    ours.settimeout(None)
    return Birth(pid, ours, heard["ready"])


def _hear_of(channel: socket.socket, heard: dict[str, Any], awaited: str) -> dict[str, Any]:
    while awaited not in heard:
        packet = channel.recv(_PACKET)
        heard |= json.loads(packet) if packet else {"unable": errno.ECHILD}
        if "unable" in heard and "born" in heard:
            _fail(heard["unable"])
    return heard


def _fail(number: int) -> NoReturn:
    raise OSError(abs(number), os.strerror(abs(number)))
