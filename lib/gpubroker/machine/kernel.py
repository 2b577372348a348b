"""The system calls of Linux that Python's standard library lacks, through libc. All raise OSError."""

import ctypes
import os
import signal
from typing import Final

NEW_MOUNTS: Final = 0x00020000
NEW_IPC: Final = 0x08000000
NEW_USER: Final = 0x10000000
NEW_PIDS: Final = 0x20000000

READ_ONLY: Final = 1
NO_SETUID: Final = 2
NO_DEVICES: Final = 4
NO_EXEC: Final = 8
REMOUNT: Final = 32
BIND: Final = 4096
RECURSIVE: Final = 16384
PRIVATE: Final = 1 << 18

_PDEATHSIG, _DUMPABLE, _CAPBSET_DROP, _SUBREAPER, _NO_NEW_PRIVS = 1, 4, 24, 36, 38
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_DETACH: Final = 2
_LAST_CAPABILITY: Final = 63
_KEPT_CAPABILITIES: Final = frozenset({0, 1, 3, 4, 5, 6, 7, 10})
"""chown, dac_override, fowner, fsetid, kill, setgid, setuid, net_bind_service: what root in a container needs."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _check(outcome: int) -> None:
    if outcome != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def unshare(flags: int) -> None:
    """Leave namespaces for new ones; a new PID namespace begins with the next child."""
    _check(_libc.unshare(flags))


def join(file: int) -> None:
    """Enter the namespace that a file is of; of a PID namespace the next child is the first there."""
    _check(_libc.setns(file, 0))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """Mount, remount or bind, by the flags."""
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    _check(_libc.mount(*texts, flags, None if options is None else options.encode()))


def unmount(target: str) -> None:
    """Take a mount away, at once, also where it is in use."""
    _check(_libc.umount2(os.fsencode(target), _DETACH))


def die_with_parent() -> None:
    """Have the kernel send SIGKILL to this process when its parent ends. A change of user clears this."""
    _check(_libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    _check(_libc.prctl(_SUBREAPER, 1, 0, 0, 0))


def forbid_tracing() -> None:
    """Keep other processes of this user from tracing this one and from taking its file descriptors."""
    _check(_libc.prctl(_DUMPABLE, 0, 0, 0, 0))


def forbid_new_rights() -> None:
    """Make setuid programs and file capabilities give nothing to this process and its descendants, for good."""
    _check(_libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))


def drop_capabilities() -> None:
    """Keep all but a few harmless capabilities out of everything that this process executes. No right: no need."""
    for number in range(_LAST_CAPABILITY + 1):
        if number not in _KEPT_CAPABILITIES:
            _libc.prctl(_CAPBSET_DROP, number, 0, 0, 0)


def punch_hole(file: int, start: int, length: int) -> None:
    """Give a part of a file back to the disk; the file keeps its size and reads as zeros there."""
    _check(_libc.fallocate(file, _KEEP_SIZE | _PUNCH_HOLE, start, length))
