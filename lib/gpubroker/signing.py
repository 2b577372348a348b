"""JWTs: EdDSA signatures, checked in every function by the public keys in the database, and the keys' rotation.

A key signs for 30 days. The next one is made and shown a day before it signs, and an old one is shown as long as a token
of it can live: a verifier that fetches the JWKS once a day never meets an unknown key.
"""

import base64
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from gpubroker import config, errors, sealing, store
from gpubroker.ids import new_id
from gpubroker.store import tokens as rows
from gpubroker.times import now

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

ALGORITHM: Final = "EdDSA"
LONGEST_SECONDS: Final = 3600
"""A token lives no longer."""
_SIGNS: Final = timedelta(days=30)
_SHOWN_BEFORE: Final = timedelta(days=1)
_SHOWN_AFTER: Final = timedelta(seconds=LONGEST_SECONDS + 600)
_FRESH_SECONDS: Final = 60.0
_LEEWAY_SECONDS: Final = 5
_LABEL: Final = "signing key"


@dataclass
class _Ring:
    """The public keys as this process last read them."""

    keys: dict[str, "Ed25519PublicKey"] = field(default_factory=dict[str, "Ed25519PublicKey"])
    read_at: float = 0.0


_ring = _Ring()


def forget_keys() -> None:
    """Read the keys anew at the next look: for a process that changes its database."""
    _ring.keys, _ring.read_at = {}, 0.0


async def sign(conn: store.Connection, claims: Mapping[str, object]) -> str:
    """Sign claims with the present key; the first caller of a day that needs one makes the next."""
    import jwt  # noqa: PLC0415 - 80 ms that only those who issue tokens pay

    key = await _present_key(conn)
    private = sealing.unseal(_LABEL, key.kid, key.private_sealed or b"")
    return jwt.encode(
        dict(claims), _load_private(private), algorithm=ALGORITHM, headers={"kid": key.kid, "typ": "at+jwt"}
    )


async def verify(text: str, *, for_us: bool = True) -> dict[str, Any]:
    """The claims of a token of ours: signature, issuer and time are right, and it is `for_us`. Raises Unauthenticated.

    Whether it was revoked, and what it may do now, the database says.
    """
    import jwt  # noqa: PLC0415 - as above

    refusal = errors.Unauthenticated(headers={"WWW-Authenticate": 'Bearer realm="gpubroker", error="invalid_token"'})
    try:
        kid = str(jwt.get_unverified_header(text).get("kid", ""))
        key = await _find_public(kid)
        if key is None:
            raise refusal
        url = config.settings().public_url
        return jwt.decode(
            text, key, algorithms=[ALGORITHM], audience=url, issuer=url, leeway=_LEEWAY_SECONDS,
            options={"require": ["exp", "iat", "sub", "jti", "aud", "iss"], "verify_aud": for_us},
        )  # fmt: skip
    except jwt.PyJWTError:
        raise refusal from None


async def list_public(conn: store.Connection) -> list[dict[str, Any]]:
    """The JWKS: every key of which a token may still live, or that will sign soon."""
    return [key.public_jwk for key in await rows.list_signing_keys(conn)]


async def ensure_keys(conn: store.Connection) -> list[rows.SigningKey]:
    """See to it that a key signs now, and that the next is shown in time. Returns all that are shown."""
    shown = await rows.list_signing_keys(conn)
    if _lasts(shown):
        return shown
    await rows.lock_signing_keys(conn)
    shown = await rows.list_signing_keys(conn)
    while not _lasts(shown):
        begins = max((key.signs_until for key in shown), default=now())
        made = _make_key(max(begins, now()) + _SIGNS)
        await rows.add_signing_key(conn, made)
        shown = await rows.list_signing_keys(conn)
    return shown


def _lasts(shown: list[rows.SigningKey]) -> bool:
    return any(key.signs_until > now() + _SHOWN_BEFORE for key in shown)


async def _present_key(conn: store.Connection) -> rows.SigningKey:
    shown = await ensure_keys(conn)
    return next(key for key in shown if key.signs_until > now())


def _make_key(signs_until: datetime) -> rows.SigningKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415 - as above

    private = Ed25519PrivateKey.generate()
    kid = new_id("key").removeprefix("key_")
    public = base64.urlsafe_b64encode(private.public_key().public_bytes_raw()).decode().rstrip("=")
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": public, "kid": kid, "use": "sig", "alg": ALGORITHM}
    sealed = sealing.seal(_LABEL, kid, private.private_bytes_raw())
    return rows.SigningKey(kid, ALGORITHM, jwk, sealed, signs_until, signs_until + _SHOWN_AFTER)


def _load_private(raw: bytes) -> "Ed25519PrivateKey":
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415 - as above

    return Ed25519PrivateKey.from_private_bytes(raw)


async def _find_public(kid: str) -> "Ed25519PublicKey | None":
    """The public key of this id; an unknown one has the keys read anew, at most once a second."""
    import jwt  # noqa: PLC0415 - as above

    age = time.monotonic() - _ring.read_at
    if age > _FRESH_SECONDS or (kid not in _ring.keys and age > 1.0) or not _ring.keys:
        async with store.anonymous() as tx:
            shown = await list_public(tx.conn)
        _ring.keys = {str(jwk["kid"]): jwt.PyJWK(jwk).key for jwk in shown}
        _ring.read_at = time.monotonic()
    return _ring.keys.get(kid)
