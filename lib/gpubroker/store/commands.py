"""Rows of `command`: which event asked for what, and what became of it."""

from typing import Final, NamedTuple

from psycopg.rows import class_row

from gpubroker.store import Transaction

_CLAIM: Final = """
INSERT INTO command (agent_id, source, event_id, org_id, body_mac) VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING"""
_FIND: Final = """
SELECT body_mac, status, pod_id, code, detail FROM command WHERE agent_id = %s AND source = %s AND event_id = %s"""
_SETTLE: Final = """
UPDATE command SET status = %s, pod_id = %s, code = %s, detail = %s
 WHERE agent_id = %s AND source = %s AND event_id = %s AND status IS NULL"""


class Taken(NamedTuple):
    """A command that came before."""

    body_mac: bytes
    status: str | None
    pod_id: str | None
    code: str | None
    detail: str | None


async def claim(tx: Transaction, source: str, event_id: str, body_mac: bytes) -> bool:
    """Take a command for ever, in the transaction of its effect; false when it was taken before.

    Of two at once the second waits for the first to commit.
    """
    caller = tx.known
    done = await tx.conn.execute(_CLAIM, (caller.agent_id, source, event_id, caller.org_id, body_mac))
    return done.rowcount == 1


async def find(tx: Transaction, source: str, event_id: str) -> Taken | None:
    """What became of a command of the caller's."""
    cursor = tx.conn.cursor(row_factory=class_row(Taken))
    await cursor.execute(_FIND, (tx.known.agent_id, source, event_id))
    return await cursor.fetchone()


async def settle(tx: Transaction, source: str, event_id: str, said: Taken) -> bool:
    """Write what became of it, once; false when that was written before."""
    named = (tx.known.agent_id, source, event_id)
    done = await tx.conn.execute(_SETTLE, (said.status, said.pod_id, said.code, said.detail, *named))
    return done.rowcount == 1
