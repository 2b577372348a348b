"""Identifiers: a type prefix and a UUIDv7 (RFC 9562), so that ids sort by the time they were made.

`pod_01jd3k…`: the prefix says what it is, 26 lowercase Crockford base32 characters are the 128 bits.
The database makes the same ids by its function `new_id(prefix)`.
"""

import os
import re
import time
from datetime import UTC, datetime
from typing import Final, Literal

Prefix = Literal["org", "agt", "key", "ofr", "qte", "pod", "att", "ins", "use", "bud", "evt", "acc", "tok", "req"]

ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS: Final = tuple(first + second for first in ALPHABET for second in ALPHABET)
_BASE36: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
_REF: Final = re.compile(r"(?<![a-z0-9-])gb-[a-z0-9]{8}-[a-z0-9]{1,28}-[0-9a-z]{1,9}(?![a-z0-9-])", re.ASCII)
_SHAPE: Final = re.compile(r"[a-z]{3}_[0-7][0-9a-hjkmnp-tv-z]{25}")


def new_id(prefix: Prefix) -> str:
    """Make an id such as `pod_01jd3kq8v0e4vsm2x7x5rmd2p9`."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    bits = (milliseconds & (2**48 - 1)) << 80
    bits |= 0x7 << 76 | (random >> 68 & 0xFFF) << 64  # version 7, rand_a
    bits |= 0b10 << 62 | random & (2**62 - 1)  # variant, rand_b
    return f"{prefix}_{base32(bits, 26)}"


def base32(number: int, length: int) -> str:
    """Write `number` with `length` Crockford characters, most significant first."""
    pairs = [_PAIRS[number >> 5 * place & 1023] for place in range(length - 2, -1, -2)]
    return "".join(pairs) if length % 2 == 0 else "".join(pairs) + ALPHABET[number & 31]


def base36(number: int) -> str:
    """Write a number the way `ref` carries its hard stop: `[0-9a-z]`, no leading zeros."""
    digits = ""
    while number or not digits:
        number, digit = divmod(number, 36)
        digits = _BASE36[digit] + digits
    return digits


def is_id(prefix: Prefix, text: str) -> bool:
    """Say whether `text` has the shape of an id of this type (not whether there is such a thing)."""
    return text.startswith(prefix + "_") and _SHAPE.fullmatch(text) is not None


def find_ref(*texts: str | None) -> str | None:
    """The first reference of an attempt in the names and labels of an instance: `gb-<owner>-<attempt>-<hard stop, base 36>`."""
    found = (_REF.search(text) for text in texts if text)
    return next((match[0] for match in found if match), None)


def read_hard_stop(ref: str) -> datetime | None:
    """The hard stop in a reference; None for a text that has none."""
    try:
        return datetime.fromtimestamp(int(ref.rpartition("-")[2], 36), UTC)
    except (ValueError, OverflowError, OSError):
        return None
