"""API keys: `gbk_`, the key's id, 256 random bits, and a checksum that a secret scanner can verify.

All in lowercase Crockford base32: 26 characters of the id, 52 of the secret, 7 of the CRC-32 of all that stands before.
Only the SHA-256 of the whole key is stored. It needs no slow hash: nobody guesses 256 bits.
"""

import hashlib
import os
import re
import zlib
from typing import Final

from gpubroker.ids import base32, new_id

PREFIX: Final = "gbk_"
SHOWN: Final = 16
"""So many characters of a key are kept for people to recognise it by."""

_SHAPE: Final = re.compile(r"gbk_[0-9a-hjkmnp-tv-z]{85}")
_CHECKSUM: Final = 7
_SECRET_BYTES: Final = 32
_SECRET: Final = 52


def new_key() -> tuple[str, str]:
    """Make a key: its id (`key_…`) and the key itself, which is shown once and never stored."""
    key_id = new_id("key")
    secret = base32(int.from_bytes(os.urandom(_SECRET_BYTES), "big"), _SECRET)
    body = PREFIX + key_id.removeprefix("key_") + secret
    return key_id, body + _checksum(body)


def hash_key(key: str) -> bytes:
    """What is stored of a key."""
    return hashlib.sha256(key.encode()).digest()


def is_key(text: str) -> bool:
    """Say whether this has the shape and the checksum of a key: it spares the database a look at typing errors."""
    return _SHAPE.fullmatch(text) is not None and _checksum(text[:-_CHECKSUM]) == text[-_CHECKSUM:]


def _checksum(body: str) -> str:
    return base32(zlib.crc32(body.encode()), _CHECKSUM)
