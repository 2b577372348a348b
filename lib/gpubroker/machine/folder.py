"""A pod's folder: `<all>/<ref>/`, mode 0700, born by one rename, moved to `<all>/gone/<ref>/` when it is a tombstone.

```
spec.json       what shall run, in clear, mode 0600; what is secret in it is erased at the end
record.jsonl    gpubroker.machine.record
disk/           the program's own folder, its home and working directory
container/      of a pod with an image: what its engine is given to make it (gpubroker.machine.engine)
log, log.index  gpubroker.machine.journal
heartbeat       the last sign of life while the program runs
control.sock    where the supervisor answers
supervisor.log  what a supervisor said before it crashed
```
`<all>/engine` is the container engine that made the last pod with an image, where there ever was one.
`<all>/lock` is held (flock) by whoever changes what pods hold of the machine; a supervisor holds its folder itself.
"""

import contextlib
import errno
import fcntl
import json
import os
import pwd
import re
import stat
import sys
import time
from collections.abc import Generator
from typing import Any, Final, NamedTuple

from gpubroker.machine import record

SPEC: Final = "spec.json"
DISK: Final = "disk"
CONTAINER: Final = "container"
GONE: Final = "gone"
HEARTBEAT: Final = "heartbeat"
SOCKET: Final = "control.sock"
COMPLAINTS: Final = "supervisor.log"
KEEP_SECONDS: Final = 7 * 86400
"""How long a tombstone answers for a pod that is gone."""

_LOCK, _IDENTITY, _ENGINE, _UNBORN = "lock", "identity", "engine", ".new-"
_REF: Final = re.compile(r"gb-[a-z0-9]{8}-[a-z0-9]+(-[a-z0-9]+)*")
_REF_LENGTH: Final = 50


class Busy(Exception):
    """Somebody else held the lock for too long."""


class PodSpec(NamedTuple):
    """What a supervisor is told about its pod, once. Its `env` is in no repr."""

    ref: str
    pod_id: str
    all: str
    """The folder of all pods, absolute."""
    hidden: str
    """The folder that the pod must not see: `all`, or the broker's data folder around it."""
    command: list[str]
    env: dict[str, str]
    ports: list[tuple[int, str]]
    """Each with its protocol."""
    vcpus_milli: int
    ram_bytes: int
    disk_gb: int
    gpu_count: int
    gpu_model: str | None
    machine_has_gpus: bool
    price_micro_h: int
    isolation: str
    """`best`, or to do without: `user` (no plain namespaces), `none` (no namespaces, no cgroups)."""
    stop_grace_seconds: float
    end_grace_seconds: float
    log_limit_bytes: int
    image: str | None = None
    """With its registry. None: the pod is a process."""
    engine: dict[str, Any] | None = None
    """The `gpubroker.machine.engine.Engine` that runs the image."""
    login: str = ""
    """A secret: at the image's registry."""

    def __repr__(self) -> str:
        return f"PodSpec({self.ref!r})"


def _random() -> str:
    return os.urandom(8).hex()


def is_ref(text: str) -> bool:
    """Whether this is a reference of ours: it becomes a file name."""
    return len(text) <= _REF_LENGTH and _REF.fullmatch(text) is not None


def prepare(all_pods: str) -> str:
    """Make the folder of all pods when there is none, and give its lasting identity."""
    os.makedirs(os.path.join(all_pods, GONE), mode=0o700, exist_ok=True)
    os.chmod(all_pods, 0o700)
    path = os.path.join(all_pods, _IDENTITY)
    if not os.path.exists(path):
        fresh = f"{path}.{_random()}"
        write_whole(fresh, f"local-{_random()}".encode())
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
        os.unlink(fresh)
    return identity(all_pods)


def identity(all_pods: str) -> str:
    """The name of this folder of pods. Raises FileNotFoundError when the folder is no more."""
    with open(os.path.join(all_pods, _IDENTITY), encoding="ascii") as file:
        return file.read()


def note_engine(all_pods: str, engine: dict[str, Any]) -> None:
    """Remember what makes containers for this folder of pods."""
    if read_engine(all_pods) != engine:
        write_whole(os.path.join(all_pods, _ENGINE), json.dumps(engine).encode())


def read_engine(all_pods: str) -> dict[str, Any] | None:
    """What made the last container for this folder of pods; None when there never was one."""
    try:
        with open(os.path.join(all_pods, _ENGINE), "rb") as file:
            return json.loads(file.read())
    except (FileNotFoundError, ValueError):
        return None


def live(all_pods: str) -> list[str]:
    """The references of every pod that is not a tombstone. Raises OSError rather than leave one out."""
    return sorted(name for name in os.listdir(all_pods) if is_ref(name))


def find(all_pods: str, ref: str) -> str:
    """Where a pod's folder is now. Raises FileNotFoundError."""
    for place in (all_pods, os.path.join(all_pods, GONE)):
        path = os.path.join(place, ref)
        if is_ref(ref) and os.path.isdir(path):
            return path
    raise FileNotFoundError(ref)


def place(all_pods: str, ref: str) -> str | None:
    """Where a pod's folder is now; None when there is, and was, no such pod."""
    try:
        return find(all_pods, ref)
    except FileNotFoundError:
        return None


def hidden_around(all_pods: str) -> str:
    """What a pod must not see: the folder around all pods, which is the broker's data folder (`gpubroker dev`).

    Only the folder of all pods when the one around it has more in it than a broker: a home, a temporary folder, Python.
    """
    around = os.path.dirname(all_pods)
    used = (pwd.getpwuid(os.getuid()).pw_dir, sys.prefix, sys.base_prefix)
    shared = any(os.path.commonpath([os.path.realpath(path), around]) == around for path in used)
    return all_pods if shared or os.stat(around).st_mode & stat.S_ISVTX else around


def read_spec(folder: str) -> PodSpec:
    """Read what shall run there."""
    with open(os.path.join(folder, SPEC), "rb") as file:
        return PodSpec(**json.loads(file.read()))


def state_of(all_pods: str, ref: str) -> tuple[PodSpec, record.State]:
    """What the disk says of a pod. Raises FileNotFoundError."""
    spec, events = read(all_pods, ref)
    return spec, record.fold(events)


def read(all_pods: str, ref: str) -> tuple[PodSpec, list[record.Event]]:
    """Read all that the disk says of a pod. Raises FileNotFoundError, or another OSError when it makes no sense."""
    try:
        folder = find(all_pods, ref)
        return read_spec(folder), record.read(folder)
    except FileNotFoundError:  # it may have moved to the tombstones meanwhile, which it does only once
        folder = find(all_pods, ref)
        return read_spec(folder), record.read(folder)
    except (ValueError, TypeError) as error:
        raise OSError(errno.EIO, f"{ref} cannot be read: {error}") from None


def write_whole(path: str, data: bytes) -> None:
    """Write a small private file, all of it and for good, or leave what was there."""
    fresh = f"{path}~"
    file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        record.write_all(file, data)
        os.fsync(file)
    finally:
        os.close(file)
    os.replace(fresh, path)


def write_spec(folder: str, spec: PodSpec) -> None:
    """Write what shall run there."""
    write_whole(os.path.join(folder, SPEC), json.dumps(spec._asdict()).encode())


def sync(folder: str) -> None:
    """Make the names in a folder last."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def locked(all_pods: str, patience_seconds: float) -> Generator[None]:
    """Hold the machine: nobody else grants or takes a share of it meanwhile. Raises Busy after the patience."""
    file = os.open(os.path.join(all_pods, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        until = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise Busy(all_pods) from None
                time.sleep(0.002)
        yield
    finally:
        os.close(file)


def give_birth(spec: PodSpec, *, hard_stop_at: float, ports: dict[str, int], gpus: list[str]) -> None:
    """Make a pod's folder in one step. The caller holds the lock, so any half-made one is a dead creator's."""
    for name in os.listdir(spec.all):
        if name.startswith(_UNBORN):
            delete_tree(os.path.join(spec.all, name))
    unborn = os.path.join(spec.all, _UNBORN + _random())
    os.mkdir(unborn, 0o700)
    try:
        os.mkdir(os.path.join(unborn, DISK), 0o700)
        write_spec(unborn, spec)
        granted: dict[str, Any] = {"hard_stop_at": hard_stop_at, "ports": ports, "gpus": gpus}
        record.append(unborn, "created", at=time.time(), **granted)
        sync(unborn)
        os.rename(unborn, os.path.join(spec.all, spec.ref))
    except BaseException:
        with contextlib.suppress(OSError):
            delete_tree(unborn)
        raise
    sync(spec.all)


def prune(all_pods: str, *, now: float) -> None:
    """Forget the tombstones that are older than a week, and entomb what a dead supervisor left to be. Under the lock."""
    for ref in live(all_pods):
        if state_of(all_pods, ref)[1].cleaned:
            entomb(all_pods, ref)
    gone = os.path.join(all_pods, GONE)
    for name in os.listdir(gone):
        path = os.path.join(gone, name)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_mtime < now - KEEP_SECONDS:
                delete_tree(path)


def bury(spec: PodSpec) -> None:
    """Erase what is secret, delete the disk and all that only a living pod needs. The folder is the current one.

    Every step may be repeated. Raises OSError when the disk will not go.
    """
    write_spec(".", spec._replace(command=[], env={}, login=""))
    for name in os.listdir("."):
        if name.partition(".")[0] in {DISK, CONTAINER}:
            delete_tree(name)
    for name in (f"{SPEC}~", HEARTBEAT, SOCKET):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def delete_tree(top: str) -> None:
    """Delete a folder of any depth, whatever its modes: each subfolder is moved up first, so paths stay short."""
    todo, moved = [top], 0
    while todo:
        folder = todo.pop()
        os.chmod(folder, 0o700)
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                os.chmod(entry.path, 0o700)  # to move a folder one needs to write its ".."
                moved += 1
                while os.path.lexists(f"{top}.{moved}"):
                    moved += 1
                os.rename(entry.path, f"{top}.{moved}")
                todo.append(f"{top}.{moved}")
        os.rmdir(folder)


def entomb(all_pods: str, ref: str) -> None:
    """Move a pod's folder to the tombstones, unless it is there. Whoever looks meanwhile finds it here or there."""
    here = os.path.join(all_pods, ref)
    with contextlib.suppress(FileNotFoundError):
        os.utime(here)
        os.rename(here, os.path.join(all_pods, GONE, ref))
        sync(all_pods)
