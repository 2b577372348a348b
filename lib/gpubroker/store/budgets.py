"""Rows of `budget`; the rules stand in the migrations' functions."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final, NamedTuple

from psycopg.rows import class_row

from gpubroker.resources.budgets import Budget
from gpubroker.store import Connection

_STANDING: Final = """
SELECT b.agent_id, a.parent_id, b.limit_micro, cardinality(a.path) AS depth,
       CASE WHEN b.period_start >= start_of(b.period, instant()) THEN b.committed_micro ELSE 0 END AS committed_micro
  FROM budget b JOIN agent a ON a.id = b.agent_id
 WHERE b.agent_id = ANY (%s) ORDER BY depth DESC"""


class Standing(NamedTuple):
    """What a budget has committed in its present period, in micro-USD. `limit_micro` None: no limit of its own."""

    agent_id: str
    parent_id: str | None
    limit_micro: int | None
    depth: int
    committed_micro: int

    @property
    def available_micro(self) -> int | None:
        """What its own limit still allows; never negative."""
        return None if self.limit_micro is None else max(0, self.limit_micro - self.committed_micro)


async def list_standings(conn: Connection, path: Sequence[str]) -> list[Standing]:
    """The budgets of a path, the leaf first, as they stand now; nothing is locked."""
    cursor = conn.cursor(row_factory=class_row(Standing))
    await cursor.execute(_STANDING, (list(path),))
    return await cursor.fetchall()


_BUDGET: Final = """
WITH standing AS (
    SELECT b.agent_id, a.parent_id, a.path, b.limit_micro, b.period, start_of(b.period, instant()) AS period_start,
           CASE WHEN b.period_start >= start_of(b.period, instant()) THEN b.committed_micro ELSE 0 END AS committed_micro
      FROM budget b JOIN agent a ON a.id = b.agent_id JOIN agent_path p ON p.agent_id = a.id
     WHERE p.ancestor_id = %(above)s AND (%(id)s::text IS NULL OR a.id = %(id)s)
       AND (%(after)s::text IS NULL OR a.id > %(after)s)
     ORDER BY a.id LIMIT %(limit)s
), held AS (
    SELECT s.agent_id, coalesce(sum(h.amount_micro - h.drawn_micro), 0)::bigint AS held_micro
      FROM standing s
      LEFT JOIN (hold h JOIN hold_budget hb ON hb.hold_id = h.id AND h.closed_at IS NULL)
        ON hb.agent_id = s.agent_id AND hb.period_start = s.period_start
     GROUP BY s.agent_id
)
SELECT s.agent_id, s.limit_micro AS limit_usd, s.period, nullif(s.period_start, '-infinity') AS period_start,
       s.committed_micro - h.held_micro AS spent_usd, h.held_micro AS held_usd,
       (SELECT min(greatest(0, u.limit_micro
                     - CASE WHEN u.period_start >= start_of(u.period, instant()) THEN u.committed_micro ELSE 0 END))
          FROM budget u WHERE u.agent_id = ANY (s.path) AND u.limit_micro IS NOT NULL) AS available_usd,
       CASE WHEN s.limit_micro IS NOT NULL THEN greatest(0, s.limit_micro - s.committed_micro) END AS own_available_usd,
       s.parent_id
  FROM standing s JOIN held h USING (agent_id) ORDER BY s.agent_id"""


async def list_budgets(
    conn: Connection, above: str, *, agent_id: str | None = None, after: str | None = None, limit: int = 1
) -> list[Budget]:
    """Budgets of the subtree of `above`, or that of one agent in it."""
    cursor = conn.cursor(row_factory=class_row(Budget))
    await cursor.execute(_BUDGET, {"above": above, "id": agent_id, "after": after, "limit": limit})
    return await cursor.fetchall()


async def set_budget(conn: Connection, agent_id: str, limit_micro: int, period: str) -> None:
    """Set an agent's own limit; what is held or was spent in the period counts against it."""
    await conn.execute("SELECT set_budget(%s, %s, %s)", (agent_id, limit_micro, period))


async def enter_root(conn: Connection, agent_id: str) -> bool:
    """Stand in the organisation of this root agent for the rest of the transaction; for callers with `admin` alone."""
    row = await (await conn.execute("SELECT enter_root(%s)", (agent_id,))).fetchone()
    return row is not None and bool(row[0])


# A budget is exhausted when what is left does not pay the shortest life of the cheapest offer that can be had.
_TAKE_NEWS: Final = """
WITH standing AS (
    SELECT b.agent_id, a.org_id, b.limit_micro, b.period, start_of(b.period, instant()) AS period_start,
           CASE WHEN b.period_start >= start_of(b.period, instant()) THEN b.committed_micro ELSE 0 END AS committed_micro
      FROM budget b JOIN agent a ON a.id = b.agent_id WHERE b.limit_micro > 0 AND a.revoked_at IS NULL
), cheapest AS (
    SELECT coalesce(min(price_micro_h), 0) * %(shortest)s / 3600 AS micro
      FROM offer WHERE gone_at IS NULL AND quarantined IS NULL AND availability <> 'none'
), news AS (
    INSERT INTO budget_news AS n (agent_id, org_id, what, limit_micro, period_start)
    SELECT s.agent_id, s.org_id, w.what, s.limit_micro, s.period_start
      FROM standing s CROSS JOIN cheapest c
     CROSS JOIN LATERAL (VALUES ('threshold', s.committed_micro >= s.limit_micro * %(percent)s / 100),
                                ('exhausted', s.limit_micro - s.committed_micro <= c.micro)) w (what, is_so)
     WHERE w.is_so
        ON CONFLICT (agent_id, what) DO UPDATE
           SET limit_micro = excluded.limit_micro, period_start = excluded.period_start, at = excluded.at
         WHERE (n.limit_micro, n.period_start) IS DISTINCT FROM (excluded.limit_micro, excluded.period_start)
    RETURNING n.agent_id, n.what
)
SELECT n.what, s.org_id, s.agent_id, s.limit_micro, s.period, nullif(s.period_start, '-infinity') AS period_start,
       s.committed_micro
  FROM news n JOIN standing s USING (agent_id) ORDER BY s.agent_id, n.what"""


class News(NamedTuple):
    """Something that has become so of a budget: `threshold` or `exhausted`."""

    what: str
    org_id: str
    agent_id: str
    limit_micro: int
    period: str
    period_start: datetime | None
    committed_micro: int


async def take_news(conn: Connection, percent: int, shortest_seconds: int) -> list[News]:
    """What has become so of budgets and was not told in their period and of their limit yet; it counts as told now."""
    cursor = conn.cursor(row_factory=class_row(News))
    await cursor.execute(_TAKE_NEWS, {"percent": percent, "shortest": shortest_seconds})
    return await cursor.fetchall()
