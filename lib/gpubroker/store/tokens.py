"""Rows of `signing_key` and `token`."""

from datetime import datetime
from typing import Any, Final, NamedTuple

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from gpubroker.store import Connection


class SigningKey(NamedTuple):
    """A key that signs until `signs_until` and is shown in the JWKS until `shown_until`."""

    kid: str
    alg: str
    public_jwk: dict[str, Any]
    private_sealed: bytes | None
    signs_until: datetime
    shown_until: datetime


_LIST_KEYS: Final = """
SELECT kid, alg, public_jwk, private_sealed, signs_until, shown_until FROM signing_key
 WHERE shown_until > clock_timestamp() ORDER BY signs_until"""
_LOCK: Final = "SELECT pg_advisory_xact_lock(7205759403792795)"
_ADD_KEY: Final = """
INSERT INTO signing_key (kid, alg, public_jwk, private_sealed, signs_until, shown_until) VALUES (%s, %s, %s, %s, %s, %s)"""


async def list_signing_keys(conn: Connection) -> list[SigningKey]:
    """The keys that may have signed a token that still lives, the one that signs first."""
    cursor = conn.cursor(row_factory=class_row(SigningKey))
    await cursor.execute(_LIST_KEYS)
    return await cursor.fetchall()


async def lock_signing_keys(conn: Connection) -> None:
    """Let nobody else make a signing key until the end of this transaction."""
    await conn.execute(_LOCK)


async def add_signing_key(conn: Connection, key: SigningKey) -> None:
    """Write a signing key; it is shown at once, and signs when the one before it is over."""
    await conn.execute(
        _ADD_KEY, (key.kid, key.alg, Jsonb(key.public_jwk), key.private_sealed, key.signs_until, key.shown_until)
    )


class TokenRow(NamedTuple):
    """A token as it is remembered: everything of its rights, nothing of its signature."""

    jti: str
    org_id: str
    agent_id: str
    actor_id: str
    actors: list[str]
    key_id: str | None
    parent_jti: str | None
    scopes: list[str]
    limit_micro: int | None
    expires_at: datetime


_ADD: Final = """
INSERT INTO token (jti, org_id, agent_id, actor_id, actors, key_id, parent_jti, scopes, limit_micro, expires_at)
VALUES (%(jti)s, %(org_id)s, %(agent_id)s, %(actor_id)s, %(actors)s, %(key_id)s, %(parent_jti)s, %(scopes)s, %(limit_micro)s,
        %(expires_at)s)"""


async def add_token(conn: Connection, token: TokenRow) -> None:
    """Remember a token before it is given away."""
    await conn.execute(_ADD, {name: getattr(token, name) for name in TokenRow._fields})


_EXPIRY: Final = """
SELECT least((SELECT expires_at FROM token WHERE jti = %(jti)s),
             (SELECT expires_at FROM key WHERE id = %(key)s),
             (SELECT min(expires_at) FROM agent WHERE id = ANY (%(path)s)))"""


async def first_expiry(conn: Connection, jti: str | None, key_id: str | None, path: list[str]) -> datetime | None:
    """When the first of what a new token hangs on expires: the token, the key, or an agent of the path."""
    row = await (await conn.execute(_EXPIRY, {"jti": jti, "key": key_id, "path": path})).fetchone()
    return row[0] if row else None


_ROOM: Final = """
WITH RECURSIVE chain AS (
    SELECT jti, parent_jti, limit_micro, committed_micro FROM token WHERE jti = %s
    UNION ALL
    SELECT t.jti, t.parent_jti, t.limit_micro, t.committed_micro FROM token t JOIN chain c ON t.jti = c.parent_jti
)
SELECT min(limit_micro - committed_micro) FROM chain WHERE limit_micro IS NOT NULL"""


async def find_least_room(conn: Connection, jti: str) -> int | None:
    """The least that a token and those it came from still allow; None: none of them has a budget of its own."""
    row = await (await conn.execute(_ROOM, (jti,))).fetchone()
    return None if row is None or row[0] is None else max(0, int(row[0]))


_COVERS: Final = """
WITH RECURSIVE chain AS (
    SELECT t.jti, t.parent_jti FROM pod p JOIN token t ON t.jti = p.token_jti WHERE p.id = %(pod)s
    UNION ALL
    SELECT t.jti, t.parent_jti FROM token t JOIN chain c ON t.jti = c.parent_jti
)
SELECT EXISTS (SELECT FROM chain WHERE jti = %(jti)s)"""


async def covers(conn: Connection, jti: str, pod_id: str) -> bool:
    """Say whether a pod was made with this token or one that came from it: its holds count against the token's budget."""
    row = await (await conn.execute(_COVERS, {"jti": jti, "pod": pod_id})).fetchone()
    return row is not None and bool(row[0])


_REVOKE: Final = """
UPDATE token t SET revoked_at = clock_timestamp()
 WHERE t.jti = %(jti)s AND t.revoked_at IS NULL
   AND (t.actor_id = %(agent)s OR EXISTS (SELECT FROM agent_path p WHERE p.ancestor_id = %(agent)s AND p.agent_id = t.agent_id))"""


async def revoke_token(conn: Connection, jti: str, agent_id: str) -> None:
    """Revoke a token that this agent holds, or that is of its subtree; anything else is left alone."""
    await conn.execute(_REVOKE, {"jti": jti, "agent": agent_id})


_MAY_ACT: Final = """
SELECT EXISTS (SELECT FROM agent_path WHERE ancestor_id = %(subject)s AND agent_id = %(actor)s)
    OR EXISTS (SELECT FROM agent WHERE id = %(subject)s AND %(actor)s = ANY (may_act))"""


async def may_act(conn: Connection, subject_id: str, actor_id: str) -> bool:
    """Say whether an agent may act for another: itself, one below it, or one that it names in may_act."""
    row = await (await conn.execute(_MAY_ACT, {"subject": subject_id, "actor": actor_id})).fetchone()
    return row is not None and bool(row[0])


_PRUNE: Final = """
DELETE FROM token t WHERE t.expires_at < clock_timestamp() - interval '7 days'
   AND NOT EXISTS (SELECT FROM pod WHERE token_jti = t.jti)
   AND NOT EXISTS (SELECT FROM token c WHERE c.parent_jti = t.jti)"""


async def prune_tokens(conn: Connection) -> None:
    """Forget tokens that expired a week ago, made no pod, and from which none came that is remembered."""
    await conn.execute(_PRUNE)
