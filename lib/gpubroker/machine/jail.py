"""The namespaces of a pod: its processes, its view of the machine's files, its shared memory.

`enter` is done by a process that only gives birth to the pod's first one; `furnish` by that first one.
"""

import contextlib
import errno
import os
import signal
import stat
from collections.abc import Iterator
from typing import Final, NoReturn

from gpubroker.machine import kernel, processes

MODES: Final = {"best": ("root", "user", "none"), "user": ("user", "none"), "none": ("none",)}
"""By a spec's `isolation`: what is tried, the best first."""

WITHOUT: Final = frozenset({"none", "engine", "joined"})
"""Modes of a first process that is in no namespace. It starts a container in `engine`, and in `joined` one whose
processes join a namespace that it holds."""

_READ_ONLY: Final = ("/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus", "/proc/fs")
"""Where a pod of root could reconfigure the machine."""

_FLAGS: Final = {
    "nosuid": kernel.NO_SETUID,
    "nodev": kernel.NO_DEVICES,
    "noexec": kernel.NO_EXEC,
    "noatime": 1024,
    "nodiratime": 2048,
    "relatime": 1 << 21,
}


def enter(mode: str) -> None:
    """Leave for new namespaces, which the next child begins. Raises OSError where the kernel does not let us."""
    if mode in WITHOUT:
        return
    spaces = kernel.NEW_PIDS | kernel.NEW_MOUNTS | kernel.NEW_IPC
    if mode == "root":
        kernel.unshare(spaces)
        return
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(spaces | kernel.NEW_USER)
    with contextlib.suppress(FileNotFoundError):
        _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{user} {user} 1")
    _write("/proc/self/gid_map", f"{group} {group} 1")


def hold_processes() -> int:
    """Start the first process of a new PID namespace that others may join. It does nothing, and ends with its parent.

    Nothing in that namespace can outlive it. Raises OSError where this user may make none.
    """
    home = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    told, tell = os.pipe2(os.O_CLOEXEC)
    kernel.unshare(kernel.NEW_PIDS)
    try:
        holder = os.fork()
        if holder == 0:
            _hold(tell)
    finally:
        kernel.join(home)
        os.close(home)
        os.close(tell)
    held = os.read(told, 1)
    os.close(told)
    if not held:
        raise ChildProcessError(errno.ECHILD, os.strerror(errno.ECHILD))
    return holder


def _hold(tell: int) -> NoReturn:
    try:
        processes.close_files(tell)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps what ends below it
        kernel.die_with_parent()
        kernel.forbid_tracing()
        os.write(tell, b"1")  # it fails when the parent has ended already
        os.close(tell)
        while True:
            signal.pause()
    finally:
        os._exit(1)


def furnish(hidden: str, disk: str) -> list[str]:
    """Give the pod a /proc of its own, hide the broker's files, close what reaches the machine. Gives what holds.

    Raises OSError when this namespace of mounts cannot even be made private.
    """
    holding: list[str] = []
    kernel.mount(None, "/", None, kernel.RECURSIVE | kernel.PRIVATE)
    with contextlib.suppress(OSError):
        _hide(hidden, disk)
        holding.append("hidden")
    with contextlib.suppress(OSError):
        kernel.mount("proc", "/proc", "proc", kernel.NO_SETUID | kernel.NO_DEVICES | kernel.NO_EXEC)
        holding.append("proc")
    with contextlib.suppress(OSError):
        kernel.mount("shm", "/dev/shm", "tmpfs", kernel.NO_SETUID | kernel.NO_DEVICES, "mode=1777")  # noqa: S108
    _protect_machine()
    return holding


def _hide(hidden: str, disk: str) -> None:
    """Cover a folder by an empty one in which only the pod's own disk is, at its own path."""
    kept = os.open(disk, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        kernel.mount("hidden", hidden, "tmpfs", kernel.NO_SETUID | kernel.NO_DEVICES, "mode=755,size=64k")
        try:
            os.makedirs(disk)
            kernel.mount(f"/proc/self/fd/{kept}", disk, None, kernel.BIND)
        except OSError:
            kernel.unmount(hidden)
            raise
        flags = kernel.REMOUNT | kernel.BIND | kernel.READ_ONLY | kernel.NO_SETUID | kernel.NO_DEVICES
        kernel.mount(None, hidden, None, flags)
    finally:
        os.close(kept)


def _protect_machine() -> None:
    """Make the kernel's settings and this pod's limits read-only, and raw disks empty, as far as one may."""
    for target, flags in list(_group_mounts()):
        with contextlib.suppress(OSError):
            kernel.mount(None, target, None, kernel.REMOUNT | kernel.BIND | kernel.READ_ONLY | flags)
    for path in _READ_ONLY:
        with contextlib.suppress(OSError):
            kernel.mount(path, path, None, kernel.BIND | kernel.RECURSIVE)
            flags = kernel.NO_SETUID | kernel.NO_DEVICES | kernel.NO_EXEC
            kernel.mount(None, path, None, kernel.REMOUNT | kernel.BIND | kernel.READ_ONLY | flags)
    if os.geteuid() == 0:
        for name in os.listdir("/dev"):
            path = f"/dev/{name}"
            with contextlib.suppress(OSError):
                if stat.S_ISBLK(os.lstat(path).st_mode):
                    kernel.mount("/dev/null", path, None, kernel.BIND)


def _group_mounts() -> Iterator[tuple[str, int]]:
    """Where control groups are mounted, with the flags that a remount must keep."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        for line in file:
            fields = line.split()
            kind = fields[fields.index("-") + 1]
            if kind in {"cgroup", "cgroup2"} or fields[4] in {"/sys", "/sys/fs/cgroup"}:
                options = fields[5].split(",")
                yield fields[4], sum(flag for name, flag in _FLAGS.items() if name in options)


def _write(path: str, text: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)
