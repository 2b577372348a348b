"""Times are aware UTC. Outside they are RFC 3339 with `Z`; billing instants come from PostgreSQL's `instant()` alone."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

from pydantic import PlainSerializer, WithJsonSchema

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def now() -> datetime:
    """This machine's clock, for everything that is not billed."""
    return datetime.now(UTC)


def format_time(moment: datetime) -> str:
    """Write `2026-11-22T18:58:03.120000Z`; whole seconds have no fraction."""
    text = moment.astimezone(UTC).isoformat()
    return text.removesuffix("+00:00") + "Z"


def parse_time(text: str) -> datetime:
    """Read RFC 3339 with an offset. Raises ValueError, also for a time without one."""
    if len(text) < len("2026-01-01T00:00:00Z") or text[10] not in "Tt ":
        msg = "is not an RFC 3339 time such as 2026-11-22T18:58:03Z"
        raise ValueError(msg)
    moment = datetime.fromisoformat(text.upper())
    if moment.tzinfo is None:
        msg = "needs an offset, such as 2026-11-22T18:58:03Z"
        raise ValueError(msg)
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        msg = "is out of range"
        raise ValueError(msg) from None


def count_micros(moment: datetime) -> int:
    """Microseconds from 1970 to a moment, exact."""
    return (moment - _EPOCH) // _MICROSECOND


Moment = Annotated[
    datetime,
    PlainSerializer(format_time, return_type=str, when_used="unless-none"),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
"""A time in an answer."""
