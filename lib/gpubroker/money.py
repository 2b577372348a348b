"""Money is integer micro-USD everywhere inside; outside it is a decimal string with six places.

Prices are micro-USD per hour for the whole offer. Amounts are never floats.
"""

import re
from decimal import Context, Decimal
from typing import Annotated, Final

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

MICRO: Final = 1_000_000
LARGEST: Final = 10**15  # a billion dollars in micro-USD; its products with seconds fit PostgreSQL's bigint
HOUR: Final = 3600
_TEXT: Final = re.compile(r"-?[0-9]{1,40}(\.[0-9]{1,6})?", re.ASCII)
_EXACT: Final = Context(prec=200)  # the usual 28 digits would round a wrong amount into a right one


def parse_usd(value: object) -> int:
    """Read `"2.39"`, `2.39` (as Decimal) or `2` as micro-USD.

    Raises ValueError for more than six decimals, a negative or non-finite number, or a billion and more.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, Decimal)):
        msg = 'a decimal string or number is needed, such as "2.50"'
        raise ValueError(msg)  # noqa: TRY004 - pydantic turns a ValueError into a 422, a TypeError into a crash
    if isinstance(value, str) and not _TEXT.fullmatch(value):
        msg = 'is not a decimal number such as "2.50", with six decimals at the most'
        raise ValueError(msg)
    micro = _EXACT.multiply(Decimal(value), MICRO)
    if not micro.is_finite() or micro < 0:
        msg = "must be zero or more"
        raise ValueError(msg)
    if micro >= LARGEST:
        msg = "must be less than 1000000000"
        raise ValueError(msg)
    if micro != micro.to_integral_value():
        msg = "has more than six decimals; a micro-USD is the smallest amount"
        raise ValueError(msg)
    return int(micro)


def format_usd(micro: int) -> str:
    """Write micro-USD as the interface does: `2390000` is `"2.390000"`."""
    sign = "-" if micro < 0 else ""
    whole, rest = divmod(abs(micro), MICRO)
    return f"{sign}{whole}.{rest:06d}"


def _read(value: object) -> int:
    """A row holds micro-USD, an integer; an answer that a client reads holds USD, a text."""
    if isinstance(value, str):
        return -parse_usd(value[1:]) if value.startswith("-") else parse_usd(value)
    if isinstance(value, bool) or not isinstance(value, int):
        msg = "micro-USD are integers"
        raise ValueError(msg)  # noqa: TRY004 - as above
    return value


def cost(price_micro_h: int, seconds: int) -> int:
    """Round a price over a time up to the next micro-USD: what must be held, never what is billed."""
    return -(-price_micro_h * seconds // HOUR)


_SCHEMA: Final = {"type": "string", "pattern": r"^-?[0-9]+\.[0-9]{6}$", "examples": ["2.390000"]}
_IN_SCHEMA: Final = {
    "anyOf": [
        {"type": "string", "pattern": r"^[0-9]{1,9}(\.[0-9]{1,6})?$"},
        {"type": "number", "minimum": 0, "exclusiveMaximum": 1_000_000_000, "multipleOf": 0.000001},
    ],
    "examples": ["2.50"],
}

Usd = Annotated[int, BeforeValidator(_read), PlainSerializer(format_usd, return_type=str), WithJsonSchema(_SCHEMA)]
"""An amount in an answer: micro-USD inside, a decimal string with six places outside."""

InUsd = Annotated[int, BeforeValidator(parse_usd), WithJsonSchema(_IN_SCHEMA)]
"""An amount in a request: USD outside, micro-USD inside."""
