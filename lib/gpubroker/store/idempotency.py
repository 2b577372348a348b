"""Rows of `idempotency`: which request of an agent made which resource."""

from typing import Final, NamedTuple

from psycopg.rows import class_row

from gpubroker.store import Transaction

_LOCK: Final = "SELECT pg_try_advisory_xact_lock(hashtextextended(%s, 0))"
_FIND: Final = "SELECT route, body_mac, resource_id FROM idempotency WHERE agent_id = %s AND key = %s"
_KEEP: Final = """
INSERT INTO idempotency (agent_id, key, org_id, route, body_mac, resource_id) VALUES (%s, %s, %s, %s, %s, %s)"""


class Kept(NamedTuple):
    """What an earlier request with the same key was and made."""

    route: str
    body_mac: bytes
    resource_id: str


async def lock(tx: Transaction, key: str) -> bool:
    """Take the key for this transaction; false when another request of this agent has it."""
    name = f"{tx.known.agent_id} {key}"
    row = await (await tx.conn.execute(_LOCK, (name,))).fetchone()
    return row is not None and bool(row[0])


async def find(tx: Transaction, key: str) -> Kept | None:
    """What this key made before."""
    cursor = tx.conn.cursor(row_factory=class_row(Kept))
    await cursor.execute(_FIND, (tx.known.agent_id, key))
    return await cursor.fetchone()


async def keep(tx: Transaction, key: str, made: Kept) -> None:
    """Remember what this key made, in the transaction that makes it."""
    caller = tx.known
    await tx.conn.execute(_KEEP, (caller.agent_id, key, caller.org_id, made.route, made.body_mac, made.resource_id))
