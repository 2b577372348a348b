"""The program's output: a log whose byte offsets stay true for ever, and an index from times to offsets.

The log only grows. When more than the limit is kept, the oldest part is punched out: the disk has it back, the offsets
stay. The index has an entry (time, offset) whenever output follows a pause: what was written from then on begins there.
"""

import contextlib
import os
import struct
import time
from typing import Final

from gpubroker.machine import kernel
from gpubroker.machine.record import write_all

LOG: Final = "log"
INDEX: Final = "log.index"
_ENTRY: Final = struct.Struct("<dQ")
_RESOLUTION_SECONDS: Final = 0.2
_BLOCK: Final = 4096


class Journal:
    """The writing end, in the current folder."""

    def __init__(self, limit_bytes: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._log = os.open(LOG, flags, 0o600)
        self._index = os.open(INDEX, flags, 0o600)
        self._limit = limit_bytes
        self._size = os.fstat(self._log).st_size
        self._punched = first_kept(self._log)
        self._entered = _last_entry(self._index)

    def write(self, data: bytes) -> None:
        """Append what the program wrote."""
        now = max(time.time(), self._entered)
        if now - self._entered >= _RESOLUTION_SECONDS:
            write_all(self._index, _ENTRY.pack(now, self._size))
            self._entered = now
        write_all(self._log, data)
        self._size += len(data)
        if self._size - self._punched > self._limit:
            self.keep(self._limit * 3 // 4)

    def keep(self, newest_bytes: int) -> None:
        """Give back the disk of all but the newest part, where the file system can."""
        until = (self._size - newest_bytes) // _BLOCK * _BLOCK
        if until > self._punched:
            with contextlib.suppress(OSError):
                kernel.punch_hole(self._log, self._punched, until - self._punched)
            self._punched = until


def _last_entry(index: int) -> float:
    whole = os.fstat(index).st_size // _ENTRY.size * _ENTRY.size
    os.ftruncate(index, whole)  # an entry that a crash cut short
    return _ENTRY.unpack(os.pread(index, _ENTRY.size, whole - _ENTRY.size))[0] if whole else 0.0


def first_kept(log: int) -> int:
    """The offset of the first byte that is still there; the size when none is."""
    try:
        return os.lseek(log, 0, os.SEEK_DATA)
    except OSError:
        return os.fstat(log).st_size


def read(folder: str, *, after: int | None, since: float | None, limit: int) -> tuple[int, bytes]:
    """At most `limit` bytes and the offset of the first: from byte `after` on, or without it the last ones.

    `since` (seconds since 1970) leaves out what was written before, to a fifth of a second.
    """
    try:
        log = os.open(os.path.join(folder, LOG), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # nothing ever ran
        return 0, b""
    try:
        size = os.fstat(log).st_size
        begin = max(first_kept(log), 0 if since is None else _offset_at(folder, since, size))
        begin = max(begin, size - limit) if after is None else max(begin, min(after, size))
        data = os.pread(log, limit, begin)
        cut = min(max(first_kept(log) - begin, 0), len(data))  # it may have been punched out meanwhile
        return begin + cut, data[cut:]
    finally:
        os.close(log)


def _offset_at(folder: str, since: float, size: int) -> int:
    with open(os.path.join(folder, INDEX), "rb") as file:
        entries = os.fstat(file.fileno()).st_size // _ENTRY.size
        low, high = 0, entries  # the first entry that is later than `since`
        while low < high:
            middle = (low + high) // 2
            at, _ = _entry(file.fileno(), middle)
            low, high = (middle + 1, high) if at <= since else (low, middle)
        if low > 0:
            at, offset = _entry(file.fileno(), low - 1)
            if since <= at + _RESOLUTION_SECONDS:
                return offset
        return _entry(file.fileno(), low)[1] if low < entries else size


def _entry(index: int, number: int) -> tuple[float, int]:
    at, offset = _ENTRY.unpack(os.pread(index, _ENTRY.size, number * _ENTRY.size))
    return at, offset
