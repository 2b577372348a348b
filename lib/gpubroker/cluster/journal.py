"""A container's log by position. The API has no offsets, only `sinceTime` in whole seconds, and it rotates what is old.

A position is the second of a line and the bytes of that second's log before it, in one number that only grows: reading on
from it costs what was written since that second, not the whole log, and a rotation loses nothing that is younger.
"""

from datetime import UTC, datetime
from typing import Final, NamedTuple

from gpubroker.providers.base import LogPage

_BITS: Final = 29
_MASK: Final = (1 << _BITS) - 1
_EPOCH: Final = 1_735_689_600
"""2025-01-01: seconds since then and a byte count stay below 10^18 for decades."""


class _Line(NamedTuple):
    second: int
    data: bytes


def since(after: int | None) -> str | None:
    """The `sinceTime` from which to read for a position."""
    if not after:
        return None
    return datetime.fromtimestamp(_EPOCH + (after >> _BITS), UTC).isoformat().replace("+00:00", "Z")


def read(raw: bytes, after: int | None, limit: int) -> LogPage:
    """What follows a position in a log that was read from its second on, with timestamps; without one, the last bytes."""
    lines = _parse(raw)
    if not lines:
        return LogPage(after or 0, b"")
    positions = _positions(lines)
    data = b"".join(line.data for line in lines)
    if after is None:
        skipped = max(0, len(data) - limit)
    else:
        own = after >> _BITS
        before = sum(len(line.data) for line in lines if line.second < own)
        known = sum(len(line.data) for line in lines if line.second >= own)
        skipped = before + min(after & _MASK, known) if own else 0
    if skipped >= len(data):
        return LogPage(after or positions[-1], b"")
    start = 0
    for line, position in zip(lines, positions, strict=True):
        if skipped < start + len(line.data):
            return LogPage(position + skipped - start, data[skipped : skipped + limit])
        start += len(line.data)
    return LogPage(after or 0, b"")


def _positions(lines: list[_Line]) -> list[int]:
    found: list[int] = []
    second, count = -1, 0
    for line in lines:
        if line.second > second:
            second, count = line.second, 0
        found.append((second << _BITS) + min(count, _MASK))
        count += len(line.data)
    return found


def _parse(raw: bytes) -> list[_Line]:
    """Lines such as `2026-01-02T03:04:05.678901234Z text`; what has no time of its own goes on from the line before."""
    lines: list[_Line] = []
    for text in raw.splitlines(keepends=True):
        stamp, _, rest = text.partition(b" ")
        try:
            moment = datetime.fromisoformat(stamp.decode()[:19] + "+00:00")
        except ValueError:
            moment, rest = None, text
        second = lines[-1].second if moment is None and lines else int(moment.timestamp()) - _EPOCH if moment else 0
        lines.append(_Line(max(second, lines[-1].second if lines else 0), rest))
    return lines
