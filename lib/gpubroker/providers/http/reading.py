"""Strict reading of what a vendor answers: what is not there, or is not what it should be, is an error with its place.

Numbers are read as decimals, so that money is never a float. Nothing here guesses.
"""

import json
import re
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Final, NoReturn, TypeVar, cast

from gpubroker.errors import ProviderError
from gpubroker.money import LARGEST, MICRO
from gpubroker.providers.base import LogPage

T = TypeVar("T")

_MOST_PAGES: Final = 1000
_LONGEST_NUMBER: Final = 40
_EVENT_LINE: Final = re.compile(r"(?:^|(?<=[\r\n]))data:([^\r\n]*)")
_SEGMENT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)


def parse_json(body: bytes) -> object:
    """Read JSON, numbers with a point as Decimal. Raises ProviderError `unreadable`."""
    try:
        return json.loads(body, parse_float=_decimal, parse_int=_whole, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ProviderError("unreadable", f"the answer is not JSON ({type(error).__name__})") from None


def _decimal(text: str) -> Decimal:
    return Decimal(text) if len(text) <= _LONGEST_NUMBER else _refuse(text)


def _whole(text: str) -> int:
    return int(text) if len(text) <= _LONGEST_NUMBER else _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(text[:_LONGEST_NUMBER])


def usd(value: object, what: str = "a price") -> int:
    """Micro-USD of an amount in USD, a decimal text or number, rounded to the nearest. Raises ProviderError `unreadable`.

    Vendors show products of prices, and 32-bit floats, with more than six decimals: what is left of a micro-USD is nothing.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, Decimal)) or len(str(value)) > _LONGEST_NUMBER:
        raise ProviderError("unreadable", f"{what} is no amount of money")
    try:
        amount = Decimal(value)
        micro = int((amount * MICRO).to_integral_value(ROUND_HALF_UP))
    except (ArithmeticError, ValueError):
        raise ProviderError("unreadable", f"{what} is no amount of money") from None
    if not 0 <= micro < LARGEST or (isinstance(value, str) and not value.isascii()):
        raise ProviderError("unreadable", f"{what} is out of range")
    return micro


def cents(value: object, what: str = "a price") -> int:
    """Micro-USD of an amount in US cents, whole or not. Raises ProviderError `unreadable`."""
    if isinstance(value, bool) or not isinstance(value, (int, Decimal)):
        raise ProviderError("unreadable", f"{what} is no amount of money")
    return usd(Decimal(value) / 100, what)


@dataclass(frozen=True, slots=True)
class Document:
    """A JSON object and its place in the answer. Every method raises ProviderError `unreadable` that names the place."""

    values: Mapping[str, Any]
    place: str = "the answer"

    @classmethod
    def of(cls, value: object, place: str = "the answer") -> "Document":
        """Take a value that must be an object."""
        if not isinstance(value, dict):
            raise ProviderError("unreadable", f"{place} is no object")
        return cls(cast("dict[str, Any]", value), place)

    def has(self, key: str) -> bool:
        """Say whether there is a value that is not null."""
        return self.values.get(key) is not None

    def get(self, key: str) -> Any:  # noqa: ANN401 - JSON is anything
        """The value as it came. It must be there and not be null."""
        if not self.has(key):
            self._fail(key, "is missing")
        return self.values[key]

    def text(self, key: str, *, among: Collection[str] | None = None) -> str:
        """A text that is not empty."""
        value = self.get(key)
        if not isinstance(value, str) or not value or (among is not None and value not in among):
            self._fail(key, "is no text" if among is None else f"is none of {', '.join(sorted(among))}")
        return value

    def words(self, key: str) -> str | None:
        """What a vendor says in its own words, or leaves out: a text without its margins, None when nothing is left of it."""
        value = self.values.get(key)
        return value.strip() or None if isinstance(value, str) else None

    def whole(self, key: str, *, least: int = 0, most: int = 2**53) -> int:
        """A whole number; `2.0` is one as well."""
        value = self.get(key)
        if isinstance(value, Decimal) and value == value.to_integral_value():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self._fail(key, f"is no whole number from {least} to {most}")
        return value

    def number(self, key: str, *, least: float = 0, most: float = 2.0**53) -> float:
        """A number that is no money."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, Decimal)) or not least <= value <= most:
            self._fail(key, f"is no number from {least} to {most}")
        return float(value)

    def estimate(self, key: str) -> float:
        """A number that nothing is decided by: 0 where it is missing or null, and for -1."""
        return max(0.0, self.number(key, least=-1)) if self.has(key) else 0.0

    def flag(self, key: str) -> bool:
        """A boolean."""
        value = self.get(key)
        if not isinstance(value, bool):
            self._fail(key, "is no boolean")
        return value

    def usd(self, key: str) -> int:
        """Micro-USD of an amount in USD."""
        return usd(self.get(key), f"{self.place}.{key}")

    def cents(self, key: str) -> int:
        """Micro-USD of an amount in US cents."""
        return cents(self.get(key), f"{self.place}.{key}")

    def moment(self, key: str) -> datetime:
        """An instant: RFC 3339 with a zone."""
        try:
            moment = datetime.fromisoformat(self.text(key))
        except ValueError:
            self._fail(key, "is no time")
        if moment.tzinfo is None:
            self._fail(key, "is a time without a zone")
        return moment.astimezone(UTC)

    def child(self, key: str) -> "Document":
        """An object inside this one."""
        return Document.of(self.get(key), f"{self.place}.{key}")

    def find(self, *keys: str) -> "Document | None":
        """An object inside the objects inside this one; None where one of them is missing or null."""
        found: Document | None = self
        for key in keys:
            found = found.child(key) if found is not None and found.has(key) else None
        return found

    def children(self, key: str) -> list["Document"]:
        """A list of objects."""
        return [Document.of(item, f"{self.place}.{key}[{n}]") for n, item in enumerate(self._items(key))]

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        return [
            str(item) if isinstance(item, str) else self._fail(key, "is no list of texts") for item in self._items(key)
        ]

    def _items(self, key: str) -> Iterator[object]:
        value = self.get(key)
        if not isinstance(value, list):
            self._fail(key, "is no list")
        return iter(cast("list[object]", value))

    def _fail(self, key: str, what: str) -> NoReturn:
        raise ProviderError("unreadable", f"{self.place}.{key} {what}")


async def read_pages(read: Callable[[str | None], Awaitable[tuple[list[T], str | None]]]) -> list[T]:
    """All pages, or an error: `read` takes a cursor, None first, and gives a page and the next cursor, None at the end."""
    found: list[T] = []
    cursor: str | None = None
    seen: set[str] = set()
    while len(seen) < _MOST_PAGES:
        page, cursor = await read(cursor)
        found += page
        if cursor is None:
            return found
        if cursor in seen:
            break
        seen.add(cursor)
    raise ProviderError("unreadable", "the listing has no end")


def read_nothing(answer: object) -> None:
    """For calls whose answer says no more than that it is done."""
    del answer


def segment(instance_id: str) -> str:
    """A vendor's id as a part of a path. Raises ProviderError `bad_id` for one that would lead elsewhere."""
    if not _SEGMENT.fullmatch(instance_id):
        raise ProviderError("bad_id", "the id of an instance has letters, digits, points, underscores and hyphens")
    return instance_id


def event_data(stream: bytes) -> Iterator[Document]:
    """The JSON objects of server-sent events, each on a line of its own: a blank line between two, or at the end, may be missing.

    What was cut off, or is no object, is left out.
    """
    for line in _EVENT_LINE.findall(stream.decode(errors="replace")):
        with suppress(ProviderError):
            yield Document.of(parse_json(line.encode()), "an event")


def cut_log(
    lines: Sequence[tuple[datetime | None, bytes]], after: int | None, since: datetime | None, limit: int
) -> LogPage:
    """The page of a log of which all is at hand: `lines` with their times and ends, the first at position 0."""
    skipped, rest = 0, list(lines)
    while since is not None and rest and (rest[0][0] or since) < since:
        skipped += len(rest.pop(0)[1])
    text = b"".join(line for _, line in rest)
    start = max(0, len(text) - limit) if after is None else min(max(0, after - skipped), len(text))
    return LogPage(skipped + start, text[start : start + limit])
