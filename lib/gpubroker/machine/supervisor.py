"""The keeper of one pod, from its birth to its end: it needs no broker, and ends the pod at its hard stop by itself.

Crash-only: what is not in the record did not happen. When a supervisor dies, the pod's processes die with it, and the
next one, started by whoever looks, closes the record at the last heartbeat. Its own folder is its working directory.
"""

import contextlib
import fcntl
import os
import select
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from gpubroker.machine import capacity, cgroup, folder, kernel, processes, record, tree
from gpubroker.machine.journal import Journal
from gpubroker.machine.run import Refused, Run, why
from gpubroker.machine.server import Client, Loop, Server

if TYPE_CHECKING:
    from gpubroker.machine.container import Keeper

HEARTBEAT_SECONDS: Final = 0.4
TOMB_LOG_BYTES: Final = 1 << 20
"""So much of the log's end stays readable when the pod is gone."""
KILLED_UNSEEN: Final = "its supervisor was killed"
MACHINE_RESTARTED: Final = "the machine was restarted"

_IDLE_SECONDS, _SOON_SECONDS = 1.0, 0.01
_LOCK_SECONDS: Final = 1.0
_GRANT_SECONDS: Final = 10.0
_TRIES: Final = 50
_SETTLED: Final = frozenset({"running", "stopped", "gone"})
_ENDED: Final = frozenset({"terminating", "gone"})


def main(place: str) -> None:
    """Keep the pod whose folder this is. Returns when the pod is gone, or when another supervisor keeps it."""
    try:
        os.chdir(place)
    except FileNotFoundError:
        return
    processes.close_files()
    os.umask(0o077)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    own = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if not _is_ours(own):
        return
    spec, events = folder.read_spec("."), record.read(".")
    if record.fold(events).cleaned:
        folder.entomb(spec.all, spec.ref)
        return
    kernel.adopt_orphans()
    Supervisor(spec, events, own).run()


def _is_ours(own: int) -> bool:
    """Take the folder for life. A dying process may still hold it for a moment."""
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(_SOON_SECONDS)
        else:
            return True


def _drain(file: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.read(file, 4096)


def _keeper_of(spec: folder.PodSpec) -> "Keeper | None":
    """Pods that are processes do not load what keeps a container."""
    if spec.image is None:
        return None
    from gpubroker.machine.container import Keeper  # noqa: PLC0415 - see above

    return Keeper(spec)


class Supervisor:
    """One pod and its state. All that outlives it is on disk."""

    def __init__(self, spec: folder.PodSpec, events: list[record.Event], own: int) -> None:
        self._spec, self._own = spec, own
        self._state, self._last_at = record.fold(events), record.last_at(events)
        self._loop = Loop()
        self._run: Run | None = None
        self._keeper = _keeper_of(spec)
        self._waiting: list[Client] = []
        self._asked_start: tuple[Client, capacity.Machine, float] | None = None
        self._told_to_end = self._over = False
        self._beat_at = 0.0
        woken = processes.wake_on_signals()
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._loop.watch(woken, select.EPOLLIN, lambda _events: _drain(woken))
        Server(self._loop, self._on_request)
        self._heartbeat = os.open(folder.HEARTBEAT, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._journal = Journal(spec.log_limit_bytes)

    def _on_sigterm(self, *_: object) -> None:
        self._told_to_end = True

    def run(self) -> None:
        """Settle what the last supervisor left, then serve until the pod is gone."""
        self._recover()
        pause = self._tick()
        while not self._over:
            self._loop.turn(pause)
            pause = self._tick()

    # What happened: on disk first

    def _note(self, event: str, *, at: float | None = None, **more: object) -> None:
        self._last_at = max(self._last_at, time.time() if at is None else at)
        known = {name: value for name, value in more.items() if value is not None}
        self._state = record.apply(self._state, record.append(".", event, at=self._last_at, **known))

    def _recover(self) -> None:
        """Nothing of an earlier supervisor's run may live on; the record says when that was last seen."""
        state = self._state
        if self._keeper is not None and state.on:
            self._keeper.end_leftovers()
        while left := self._leftovers():
            processes.kill(left)
            time.sleep(_SOON_SECONDS)
        cgroup.remove(state.cgroups)
        if state.life == "terminating":
            self._note("terminated", at=self._last_sign() if state.on else None)
        elif state.on:
            rebooted = state.boot != processes.boot_id()
            self._note("lost", at=self._last_sign(), reason=MACHINE_RESTARTED if rebooted else KILLED_UNSEEN)

    def _leftovers(self) -> set[int]:
        state = self._state
        left = processes.marked(self._spec.ref) | cgroup.members(state.cgroups)
        if state.init is not None and state.boot == processes.boot_id():
            pid, started = state.init
            left |= {pid} if processes.start_time(pid) == started else set()
        return left

    def _last_sign(self) -> float:
        text = os.pread(self._heartbeat, 64, 0)
        return min(max(float(text or 0), self._last_at), time.time())

    def _beat(self) -> None:
        os.pwrite(self._heartbeat, b"%017.6f" % time.time(), 0)
        self._beat_at = time.monotonic() + HEARTBEAT_SECONDS

    # What is due

    def _tick(self) -> float:
        """Do everything that is due; give the seconds until something is again."""
        self._reap()
        if self._state.on and time.monotonic() >= self._beat_at:
            self._beat()
        if os.fstat(self._own).st_nlink == 0:  # somebody deleted the folder: end with it, there is no record to keep
            self._over = self._run is None or self._run.tree.destroy()
            if self._over and self._keeper is not None:
                self._keeper.remove()
            self._remove_groups(tries=1 + _TRIES * self._over)
            return _SOON_SECONDS
        if time.time() >= self._state.hard_stop_at and self._state.life not in _ENDED:
            self._end("terminated", reason="its hard stop was due")
        if self._told_to_end:
            self._end_in_order()
        due = [time.monotonic() + _IDLE_SECONDS, *self._tick_run()]
        due += [self._beat_at] if self._state.on else []
        self._answer_waiting()
        return max(min(due) - time.monotonic(), 0.0)

    def _tick_run(self) -> list[float]:
        """Move the pod on by one step; give the times, on the monotonic clock, when to look again."""
        if self._run is not None:
            over, due = self._run.tick()
            if not over:
                return list(due)
            self._end_run(self._run)
        elif self._state.life == "starting":
            if not self._is_made():
                return []
            if self._state.life == "starting":
                self._begin_run("started")
        elif self._state.life == "stopping":
            self._note("stopped")
        elif self._state.life in _ENDED:
            self._bury()
        elif self._asked_start is not None:
            return [time.monotonic() + _SOON_SECONDS * (not self._try_to_start(*self._asked_start))]
        else:
            return []
        return [0.0]

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if self._run is not None:
                    self._run.reaped(ended[0])
                if self._keeper is not None:
                    self._keeper.reaped(*ended)

    def _answer_waiting(self) -> None:
        """Answer those who wait for the pod to settle."""
        ending = self._run is not None and self._run.is_ending
        unburied = self._state.life == "gone" and not self._state.cleaned
        if self._state.life in _SETTLED and not ending and not unburied:
            waiting, self._waiting = self._waiting, []
            for client in waiting:
                self._tell(client)

    def _end_in_order(self) -> None:
        """Stop the pod and then end, as at a shutdown of the machine."""
        if self._run is None:
            self._over = True
            if self._keeper is not None:
                self._keeper.stop_making()
        elif self._run.ending not in {"stopped", "terminated"}:
            self._end("stopped")

    # A run, from start to end

    def _is_made(self) -> bool:
        """Whether it has the container that it needs, or has failed for lack of one. Else one is being made."""
        if self._keeper is None:
            return True
        if not self._keeper.is_made(self._state):
            return False
        if self._keeper.failed is not None:
            self._note("exited", reason=self._keeper.failed)
        return True

    def _begin_run(self, event: str) -> None:
        """Start what was granted. The record has the groups before they are made, the run before the program runs."""
        spec = self._spec
        places = cgroup.homes() if spec.isolation != "none" and spec.image is None else []
        cgroup.sweep(places, before=time.time() - folder.KEEP_SECONDS)
        groups = cgroup.paths(spec.ref, places)
        if event == "started" and groups != list(self._state.cgroups):
            self._note("starting", ports=self._state.ports, gpus=self._state.gpus, cgroups=groups)
        limited = cgroup.create(spec.ref, places, ram_bytes=spec.ram_bytes, vcpus_milli=spec.vcpus_milli)
        made = [group for group in groups if os.path.exists(os.path.join(group, "cgroup.procs"))]
        try:
            planted = tree.plant(spec, made, limited) if self._keeper is None else self._keeper.plant()
        except tree.NotPlanted as error:
            self._note("exited", reason=f"it could not be started: {error}")
            return
        first = (planted.pid, planted.start_time)
        self._note(event, init=first, boot=processes.boot_id(), limits=planted.limits)
        self._beat()
        self._run = Run(self._loop, spec, self._journal, planted)
        self._run.start_program(self._state)

    def _end_run(self, ended: Run) -> None:
        self._run = None
        reason = why(ended.code, self._state, oom_killed=ended.tree.oom_killed)
        self._remove_groups()
        match ended.ending:
            case "restarted":
                self._begin_run("restarted")
            case "terminated":
                self._note("terminated")
            case "stopped":
                self._note("stopped")
            case _:
                self._note("exited", exit_code=ended.code, reason=reason)

    def _remove_groups(self, tries: int = _TRIES) -> None:
        for _ in range(tries):  # the kernel takes a moment to count its dead
            if cgroup.remove(self._state.cgroups):
                return
            time.sleep(_SOON_SECONDS)

    def _end(self, event: str, *, reason: str | None = None) -> None:
        """Write down the wish, and tell the run to end."""
        if self._keeper is not None:
            self._keeper.stop_making()
        if event != "restarted":
            self._note("terminating" if event == "terminated" else "stopping", reason=reason)
        if self._run is not None:
            spec = self._spec
            self._run.end(event, spec.end_grace_seconds if event == "terminated" else spec.stop_grace_seconds)

    def _bury(self) -> None:
        """Erase and delete what a tombstone does not need, move there, answer, and be done."""
        if self._state.life == "terminating":
            self._note("terminated")
        unmade = None if self._keeper is None else self._keeper.remove()
        failed: str | None = None
        for _ in range(3):
            try:
                folder.bury(self._spec)
                failed = unmade
                break
            except OSError as error:
                failed = f"its disk could not be deleted: {error.strerror}"
        self._journal.keep(TOMB_LOG_BYTES)
        self._remove_groups()
        self._note("cleaned", reason=failed)
        folder.entomb(self._spec.all, self._spec.ref)
        self._answer_waiting()
        self._over = True

    # What is asked for

    def _on_request(self, client: Client, request: dict[str, Any]) -> None:
        asked: dict[str, Callable[[Client, dict[str, Any]], None]] = {
            "state": lambda client, _: self._tell(client),
            "settle": lambda client, _: self._waiting.append(client),
            "stop": self._on_stop,
            "start": self._on_start,
            "restart": self._on_restart,
            "terminate": self._on_terminate,
            "extend": self._on_extend,
            "exec": self._on_exec,
        }
        try:
            asked[request["do"]](client, request)
        except (KeyError, TypeError, ValueError) as error:  # a broker of another version: no reason to end a pod
            client.refuse("invalid_request", f"{type(error).__name__}: {error}")

    def _tell(self, client: Client) -> None:
        client.reply(state=self._state._asdict())

    def _on_stop(self, client: Client, _request: dict[str, Any]) -> None:
        if self._state.life in {"starting", "running"}:
            self._end("stopped")
        self._waiting.append(client)

    def _on_start(self, client: Client, request: dict[str, Any]) -> None:
        if self._state.life in _ENDED:
            client.refuse("gone", "it has ended")
        elif self._state.life in {"starting", "running"}:
            self._waiting.append(client)
        elif self._asked_start is not None:
            client.refuse("busy", "it is being started")
        else:
            machine = capacity.Machine.from_json(request["machine"])
            self._asked_start = (client, machine, time.monotonic() + _GRANT_SECONDS)

    def _try_to_start(self, client: Client, machine: capacity.Machine, until: float) -> bool:
        """Take a share of the machine, under the lock that every such step takes. False: not yet, it is held."""
        try:
            with folder.locked(self._spec.all, 0):
                refused = self._grant(machine)
        except folder.Busy:
            if time.monotonic() < until:
                return False
            refused = "busy"
        except (OSError, ValueError) as error:
            refused = f"unreadable: {error}"
        self._asked_start = None
        if refused is None and self._keeper is not None and self._state.started_at is None:
            self._tell(client)  # its image may take long
        elif refused is None:
            self._waiting.append(client)
        else:
            client.refuse(*refused.split(": ", 1))
        return True

    def _grant(self, machine: capacity.Machine) -> str | None:
        spec, state = self._spec, self._state
        taken = capacity.held(spec.all, without=spec.ref)
        share = capacity.Share(spec.vcpus_milli, spec.ram_bytes, 0, spec.gpu_count, spec.gpu_model)
        if not capacity.times_it_fits(share, machine, taken):
            return "no_capacity: the machine has no room for it now"
        gpus = capacity.free_gpus(share, machine, taken)
        ports = capacity.choose_ports([port for port, _ in spec.ports], state.ports, taken.ports)
        if spec.image is None or state.started_at is None:
            gpus = gpus[: spec.gpu_count]
        else:  # a container has for life what it was made with
            if ports != state.ports or not set(state.gpus) <= set(gpus):
                return "no_capacity: its container has ports or GPUs that others use now"
            gpus = list(state.gpus)
        self._note("starting", ports=ports, gpus=gpus, cgroups=state.cgroups)
        return None

    def _on_restart(self, client: Client, _request: dict[str, Any]) -> None:
        if self._state.life != "running" or self._run is None:
            client.refuse("not_running", f"it is {self._state.life}")
            return
        if not self._run.is_ending:
            self._end("restarted")
        self._waiting.append(client)

    def _on_terminate(self, client: Client, _request: dict[str, Any]) -> None:
        if self._state.life not in _ENDED:
            self._end("terminated")
        self._waiting.append(client)

    def _on_extend(self, client: Client, request: dict[str, Any]) -> None:
        if self._state.life in _ENDED:
            client.refuse("gone", "it has ended")
            return
        self._note("extended", hard_stop_at=float(request["hard_stop_at"]))
        self._tell(client)

    def _on_exec(self, client: Client, request: dict[str, Any]) -> None:
        if self._state.life != "running" or self._run is None:
            client.refuse("not_running", f"it is {self._state.life}")
            return
        try:
            self._run.execute(client, request, self._state)
        except Refused as refused:
            client.refuse(refused.code, refused.detail)
