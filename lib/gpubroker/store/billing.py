"""Phases, the bill and its end; the rules stand in the migrations' functions."""

from datetime import date, datetime
from typing import Final, NamedTuple

from psycopg.rows import class_row

from gpubroker.store import Connection


async def bill(conn: Connection, instance_id: str, until: datetime) -> int:
    """Move an instance's watermark up to `until`. Returns what its agent was charged, micro-USD."""
    row = await (await conn.execute("SELECT bill(%s, %s)", (instance_id, until))).fetchone()
    return int(row[0]) if row else 0


async def change_phase(
    conn: Connection, instance_id: str, at: datetime, billing: str, price_micro_h: int, payer: str
) -> None:
    """From `at` on (truncated to the second, never before what is billed) the instance costs this."""
    await conn.execute("SELECT change_phase(%s, %s, %s, %s, %s)", (instance_id, at, billing, price_micro_h, payer))


async def settle(conn: Connection, pod_id: str) -> None:
    """Bill to the end, top up to the minimum, close the holds: one step. The caller has locked the pod."""
    await conn.execute("SELECT settle(%s)", (pod_id,))


async def close_months(conn: Connection) -> list[date]:
    """Close the month before last or last, from the 3rd on, 00:00 UTC; names what it closed."""
    return [row[0] for row in await (await conn.execute("SELECT close_months()")).fetchall()]


class Billed(NamedTuple):
    """How far a pod's instance is billed, and what its agent has paid for the pod so far, micro-USD."""

    pod_id: str
    org_id: str
    agent_id: str
    billed_until: datetime
    spent_micro: int


_FIND_BILLED: Final = """
SELECT p.id AS pod_id, p.org_id, p.agent_id, i.billed_until,
       (SELECT coalesce(sum(drawn_micro), 0)::bigint FROM hold WHERE pod_id = p.id) AS spent_micro
  FROM instance i JOIN pod p ON p.id = i.pod_id WHERE i.id = %s"""


async def find_billed(conn: Connection, instance_id: str) -> Billed | None:
    """What `usage.recorded` tells of an instance that a pod has."""
    cursor = conn.cursor(row_factory=class_row(Billed))
    await cursor.execute(_FIND_BILLED, (instance_id,))
    return await cursor.fetchone()
