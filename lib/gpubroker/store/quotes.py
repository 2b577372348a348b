"""Rows of `quote`."""

from datetime import datetime
from typing import Any, Final, NamedTuple

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from gpubroker.store import Connection


class NewQuote(NamedTuple):
    """A quote to be written; it is firm for so many seconds."""

    id: str
    org_id: str
    agent_id: str
    offer_id: str
    offer: dict[str, Any]
    price_micro_h: int
    seconds: int
    firm_seconds: int


class QuoteRow(NamedTuple):
    """A quote: the offer as it was, the price that it is firm in, and the pod that it made."""

    id: str
    offer_id: str
    offer: dict[str, Any]
    price_micro_h: int
    seconds: int
    expires_at: datetime
    is_expired: bool
    pod_id: str | None


_ADD: Final = """
INSERT INTO quote (id, org_id, agent_id, offer_id, offer, price_micro_h, seconds, expires_at)
VALUES (%(id)s, %(org_id)s, %(agent_id)s, %(offer_id)s, %(offer)s, %(price_micro_h)s, %(seconds)s,
        instant() + %(firm_seconds)s * interval '1 second')"""


async def add_quote(conn: Connection, quote: NewQuote) -> None:
    """Write a quote."""
    await conn.execute(_ADD, {name: getattr(quote, name) for name in NewQuote._fields} | {"offer": Jsonb(quote.offer)})


_FIND: Final = """
SELECT id, offer_id, offer, price_micro_h, seconds, expires_at, expires_at <= instant() AS is_expired, pod_id
  FROM quote WHERE agent_id = %s AND id = %s"""
_LOCK: Final = _FIND + " FOR UPDATE"


async def find_quote(conn: Connection, agent_id: str, quote_id: str) -> QuoteRow | None:
    """A quote of this agent."""
    cursor = conn.cursor(row_factory=class_row(QuoteRow))
    await cursor.execute(_FIND, (agent_id, quote_id))
    return await cursor.fetchone()


async def lock_quote(conn: Connection, agent_id: str, quote_id: str) -> QuoteRow | None:
    """A quote of this agent, locked until the end of the transaction: it makes one pod."""
    cursor = conn.cursor(row_factory=class_row(QuoteRow))
    await cursor.execute(_LOCK, (agent_id, quote_id))
    return await cursor.fetchone()


_USE: Final = "UPDATE quote SET pod_id = %s WHERE id = %s AND pod_id IS NULL"


async def use_quote(conn: Connection, quote_id: str, pod_id: str) -> None:
    """The quote made this pod."""
    await conn.execute(_USE, (pod_id, quote_id))
