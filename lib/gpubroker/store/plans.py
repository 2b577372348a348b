"""The plan of an organisation: columns of `org`."""

from datetime import datetime
from typing import Final, NamedTuple

from psycopg.rows import class_row

from gpubroker.resources.plans import PlanName
from gpubroker.store import Connection


class PlanRow(NamedTuple):
    """The plan that an organisation is on."""

    plan: PlanName
    plan_since: datetime
    plan_ends_at: datetime | None


_FIND: Final = "SELECT plan, plan_since, plan_ends_at FROM org WHERE id = %s"


async def find_plan(conn: Connection, org_id: str) -> PlanRow | None:
    """The plan of the organisation in which the transaction stands."""
    cursor = conn.cursor(row_factory=class_row(PlanRow))
    await cursor.execute(_FIND, (org_id,))
    return await cursor.fetchone()


async def enter_org(conn: Connection, org_id: str) -> bool:
    """Stand in this organisation for the rest of the transaction; for callers with `admin` alone."""
    row = await (await conn.execute("SELECT enter_org(%s)", (org_id,))).fetchone()
    return row is not None and bool(row[0])


_LOCK: Final = "SELECT pg_advisory_xact_lock(hashtextextended('plan of ' || %s, 0))"


async def lock_plan(conn: Connection, org_id: str) -> None:
    """Be alone, until the transaction ends, with changes of the organisation's plan: what is allowed depends on the present one."""
    await conn.execute(_LOCK, (org_id,))


async def set_plan(conn: Connection, plan: PlanName, ends_at: datetime | None) -> None:
    """Put the organisation in which the transaction stands on a plan, until it ends."""
    await conn.execute("SELECT set_plan(%s, %s)", (plan, ends_at))


_END: Final = """
UPDATE org SET plan = 'free', plan_since = plan_ends_at, plan_ends_at = NULL WHERE plan_ends_at <= instant() RETURNING id"""


async def end_plans(conn: Connection) -> list[str]:
    """Put every organisation whose plan is over on the free one. Names them."""
    return [str(row[0]) for row in await (await conn.execute(_END)).fetchall()]
