"""Lists in parts: `limit`, and a cursor that names the last thing seen, so that it survives inserts."""

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Annotated, Any, Protocol, TypeVar, cast

from pydantic import Field

from gpubroker.inputs import Query, Whole, invalid


class Paged(Query):
    """What every list takes."""

    limit: Annotated[int, Field(ge=1, le=200, description="How many items at the most."), Whole] = 50
    cursor: str | None = Field(default=None, max_length=1024, description="next_cursor of the page before.")


def write_cursor(*place: object) -> str:
    """Name the place after which the next page begins."""
    return base64.urlsafe_b64encode(json.dumps(place, separators=(",", ":")).encode()).decode().rstrip("=")


def read_cursor(cursor: str | None, *kinds: type) -> tuple[Any, ...] | None:
    """Read a cursor that `write_cursor` made of values of these types. Raises Invalid for any other text."""
    if cursor is None:
        return None
    try:
        place = json.loads(base64.urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4)))
    except (ValueError, binascii.Error, UnicodeEncodeError, RecursionError):
        place = None
    if not isinstance(place, list):
        raise invalid("?cursor", "is not a cursor of this list")
    values = cast("list[object]", place)
    is_odd = any(
        isinstance(value, str) and not value.isprintable() for value in values
    )  # PostgreSQL could not store it
    if is_odd or len(values) != len(kinds) or any(type(v) is not kind for v, kind in zip(values, kinds, strict=True)):
        raise invalid("?cursor", "is not a cursor of this list")
    return tuple(values)


class _Named(Protocol):
    @property
    def id(self) -> str: ...


N = TypeVar("N", bound=_Named)


def cut_page(found: Sequence[N], limit: int) -> tuple[list[N], str | None]:
    """At most `limit` of what was found in the order of ids, and the cursor of the rest: one more says that there is one."""
    shown = list(found[:limit])
    return shown, write_cursor(shown[-1].id) if len(found) > limit else None
