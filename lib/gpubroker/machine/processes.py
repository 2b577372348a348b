"""Finding and ending processes without a namespace: by parent, by the pod's mark in their environment."""

import contextlib
import os
import signal
from collections.abc import Iterable
from typing import Final

MARK: Final = "GPUBROKER_POD_REF"
"""The variable that every process of a pod was started with."""


def start_time(pid: int) -> int | None:
    """When a process was started, in the kernel's ticks since boot. None when it has ended (a zombie has)."""
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def _stat(pid: int) -> list[bytes] | None:
    """The fields of /proc/PID/stat from the state on; the name before them may hold anything."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in {b"Z", b"X"} else fields


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def descendants(ancestor: int) -> set[int]:
    """Every living process below this one, now."""
    children: dict[int, list[int]] = {}
    alive: set[int] = set()
    for pid in _pids():
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(fields[1]), []).append(pid)
        if fields[0] not in {b"Z", b"X"}:
            alive.add(pid)
    found: set[int] = set()
    todo = [ancestor]
    while todo:
        for child in children.get(todo.pop(), []):
            found.add(child)
            todo.append(child)
    return found & alive


def marked(ref: str, *more: str) -> set[int]:
    """Every living process whose environment names this pod (and has these variables), as far as this user may look."""
    marks = {text.encode() for text in (f"{MARK}={ref}", *more)}
    return {pid for pid in _pids() if _has(pid, marks) and start_time(pid) is not None}


def _has(pid: int, marks: set[bytes]) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            variables = file.read().split(b"\0")
    except OSError:
        return False
    return marks.issubset(variables)


def kill(pids: Iterable[int]) -> None:
    """Send SIGKILL to those that are still there."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def close_files(*kept: int) -> None:
    """Close every file that this process has open, but stdin, stdout, stderr and these."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:  # noqa: PLR2004 - stderr
            with contextlib.suppress(OSError):
                os.close(int(name))


def wake_on_signals() -> int:
    """Give a file that becomes readable when a child has ended, or another signal with a handler comes."""
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, _do_nothing)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    return woken


def _do_nothing(*_: object) -> None:
    """A signal without a handler wakes nobody."""


def boot_id() -> str:
    """The name of the machine's present boot."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
