"""What is kept secret by GPUBROKER_SECRET_KEY: sealed `env`, MACs of request bodies, cursors, sealed signing keys.

Each use has a key of its own, derived by HMAC-SHA-256 with the use as label. Sealing is AES-256-GCM, bound to the thing
it belongs to, so that a sealed text moved to another row does not open.
"""

import hashlib
import hmac
import os
from typing import Final

from gpubroker import config
from gpubroker.errors import SetupError

_NONCE: Final = 12


class SealBroken(SetupError):
    """A sealed text does not open: another key, another owner of the text, or changed bytes."""


def mac(label: str, *parts: bytes) -> bytes:
    """A keyed digest of 32 bytes over parts whose boundaries count."""
    digest = hmac.new(_key(label), digestmod=hashlib.sha256)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


def seal(label: str, bound_to: str, plain: bytes) -> bytes:
    """Encrypt `plain` so that only this installation opens it, and only for the thing named `bound_to`."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - 30 ms that most requests do not need

    nonce = os.urandom(_NONCE)
    return nonce + AESGCM(_key(label)).encrypt(nonce, plain, bound_to.encode())


def unseal(label: str, bound_to: str, sealed: bytes) -> bytes:
    """Open what `seal` made. Raises SealBroken."""
    from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - as above
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - as above

    try:
        return AESGCM(_key(label)).decrypt(sealed[:_NONCE], sealed[_NONCE:], bound_to.encode())
    except (InvalidTag, ValueError):  # ValueError: it is too short to be anything
        msg = f"what was sealed for {bound_to} does not open with this GPUBROKER_SECRET_KEY"
        raise SealBroken(msg) from None


def fingerprint() -> str:
    """Name the present key without telling it, for rows that were sealed with it."""
    return _key("fingerprint").hex()[:16]


def _key(label: str) -> bytes:
    settings = config.settings()
    settings.need("GPUBROKER_SECRET_KEY")
    return hmac.new((settings.secret_key or "").encode(), label.encode(), hashlib.sha256).digest()
