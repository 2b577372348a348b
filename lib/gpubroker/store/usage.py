"""What was billed, as agents ask for it: rows of `usage_interval` and `ledger`, and what is used of limits."""

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Final, LiteralString, NamedTuple

from psycopg.rows import class_row

from gpubroker.resources.usage import StatementItem, UsageRecord, UsageRow
from gpubroker.store import Connection

_RECORDS: Final = """
SELECT u.id, u.pod_id, d.agent_id, i.provider_instance_id AS instance, t.provider, t.gpu, t.gpu_count, f.billing,
       lower(u.during) AS from_, upper(u.during) AS to,
       extract(epoch FROM upper(u.during) - lower(u.during))::bigint AS seconds,
       f.price_micro_h AS price_usd_per_hour, u.charged_micro AS amount_usd
  FROM usage_interval u
  JOIN pod d ON d.id = u.pod_id
  JOIN agent_path p ON p.agent_id = d.agent_id AND p.ancestor_id = %(above)s
  JOIN instance i ON i.id = u.instance_id
  JOIN attempt t ON t.id = i.attempt_id
  JOIN phase f ON f.instance_id = u.instance_id AND f.seq = u.phase_seq
 WHERE u.payer = 'customer' AND u.during && tstzrange(%(from)s, %(to)s)
   AND (%(pod)s::text IS NULL OR u.pod_id = %(pod)s)
   AND (%(agent)s::text IS NULL OR d.agent_id = %(agent)s)
   AND (%(after)s::text IS NULL OR u.id > %(after)s)
 ORDER BY u.id LIMIT %(limit)s"""


class Span(NamedTuple):
    """A question about usage: whose, from when, to when, and of what alone."""

    above: str
    from_at: datetime
    to_at: datetime
    pod_id: str | None = None
    agent_id: str | None = None

    def parameters(self) -> dict[str, object]:
        """The parameters that all queries of usage share. What ran is cut at whole seconds, as it is billed."""
        return {
            "above": self.above, "from": self.from_at, "to": self.to_at, "pod": self.pod_id, "agent": self.agent_id,
            "from_second": self.from_at.replace(microsecond=0), "to_second": self.to_at.replace(microsecond=0),
        }  # fmt: skip


async def list_records(conn: Connection, span: Span, after: str | None, limit: int) -> list[UsageRecord]:
    """The intervals that agents were charged for, in the order in which they were billed."""
    cursor = conn.cursor(row_factory=class_row(UsageRecord))
    await cursor.execute(_RECORDS, span.parameters() | {"after": after, "limit": limit})
    return await cursor.fetchall()


_PIECES: Final = """
WITH span AS (
    SELECT u.pod_id, d.agent_id, t.provider, t.gpu, t.gpu_count, f.billing, lower(u.during) AS from_at,
           extract(epoch FROM upper(u.during) - lower(u.during))::bigint AS whole, u.charged_micro,
           greatest(lower(u.during), %(from_second)s) AS a, least(upper(u.during), %(to_second)s) AS z
      FROM usage_interval u
      JOIN pod d ON d.id = u.pod_id
      JOIN agent_path p ON p.agent_id = d.agent_id AND p.ancestor_id = %(above)s
      JOIN instance i ON i.id = u.instance_id
      JOIN attempt t ON t.id = i.attempt_id
      JOIN phase f ON f.instance_id = u.instance_id AND f.seq = u.phase_seq
     WHERE u.payer = 'customer' AND u.during && tstzrange(%(from_second)s, %(to_second)s)
       AND (%(pod)s::text IS NULL OR u.pod_id = %(pod)s) AND (%(agent)s::text IS NULL OR d.agent_id = %(agent)s)
), cut AS (  -- at full hours, for those who ask by the hour; amounts telescope, so that cutting never changes a sum
    SELECT s.*, greatest(s.a, g.at) AS b, least(s.z, g.at + interval '1 hour') AS e
      FROM span s CROSS JOIN LATERAL
           generate_series(date_trunc('hour', s.a, 'UTC'), s.z - interval '1 second', interval '1 hour') g(at)
), piece AS (
    SELECT pod_id, agent_id, provider, gpu, b AS at,
           CASE billing WHEN 'full' THEN extract(epoch FROM e - b)::bigint ELSE 0 END AS seconds, gpu_count,
           charged_micro * extract(epoch FROM e - from_at)::bigint / whole
             - charged_micro * extract(epoch FROM b - from_at)::bigint / whole AS amount_micro
      FROM cut
    UNION ALL
    SELECT l.pod_id, l.agent_id, t.provider, t.gpu, l.at, 0, t.gpu_count, l.amount_micro
      FROM ledger l
      JOIN agent_path p ON p.agent_id = l.agent_id AND p.ancestor_id = %(above)s
      JOIN instance i ON i.id = l.instance_id JOIN attempt t ON t.id = i.attempt_id
     WHERE l.account = 'minimum' AND l.at >= %(from)s AND l.at < %(to)s
       AND (%(pod)s::text IS NULL OR l.pod_id = %(pod)s) AND (%(agent)s::text IS NULL OR l.agent_id = %(agent)s)
)"""
_SUMS: Final = """, coalesce(sum(seconds), 0)::bigint AS seconds, coalesce(sum(seconds * gpu_count), 0)::bigint AS gpu_seconds,
       coalesce(sum(amount_micro), 0)::bigint AS amount_usd FROM piece"""
_TOTAL: Final = _PIECES + " SELECT NULL AS key" + _SUMS
_BY: Final[Mapping[str, LiteralString]] = {
    "agent": _PIECES + " SELECT agent_id AS key" + _SUMS + " GROUP BY 1 ORDER BY 1",
    "pod": _PIECES + " SELECT pod_id AS key" + _SUMS + " GROUP BY 1 ORDER BY 1",
    "provider": _PIECES + " SELECT provider AS key" + _SUMS + " GROUP BY 1 ORDER BY 1",
    "gpu": _PIECES + " SELECT gpu AS key" + _SUMS + " GROUP BY 1 ORDER BY 1 NULLS LAST",
    "hour": _PIECES
    + " SELECT to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:00:00\"Z\"') AS key"
    + _SUMS
    + " GROUP BY 1 ORDER BY 1",
    "day": _PIECES + " SELECT to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD') AS key" + _SUMS + " GROUP BY 1 ORDER BY 1",
    "month": _PIECES + " SELECT to_char(at AT TIME ZONE 'UTC', 'YYYY-MM') AS key" + _SUMS + " GROUP BY 1 ORDER BY 1",
}
_BY_LABEL: Final = (
    _PIECES
    + " SELECT v AS key"
    + _SUMS
    + " LEFT JOIN pod_label n ON n.pod_id = piece.pod_id AND n.k = %(label)s GROUP BY 1 ORDER BY 1 NULLS LAST"
)


async def sum_usage(conn: Connection, span: Span, group: str | None) -> list[UsageRow]:
    """Usage in groups, or without one its total alone. `group` is a key of API.md's `group_by`."""
    cursor = conn.cursor(row_factory=class_row(UsageRow))
    if group is None:
        await cursor.execute(_TOTAL, span.parameters())
    elif group.startswith("label:"):
        await cursor.execute(_BY_LABEL, span.parameters() | {"label": group.removeprefix("label:")})
    else:
        await cursor.execute(_BY[group], span.parameters())
    return await cursor.fetchall()


_STATEMENT: Final = """
WITH seconds AS (
    SELECT u.pod_id, sum(extract(epoch FROM upper(u.during) - lower(u.during)))::bigint AS seconds
      FROM usage_interval u
      JOIN pod d ON d.id = u.pod_id
      JOIN agent_path p ON p.agent_id = d.agent_id AND p.ancestor_id = %(above)s
      JOIN phase f ON f.instance_id = u.instance_id AND f.seq = u.phase_seq
     WHERE u.month = %(month)s AND u.payer = 'customer' AND f.billing = 'full' GROUP BY u.pod_id
), posted AS (
    SELECT l.pod_id, l.agent_id, min(l.instance_id) AS instance_id, sum(l.amount_micro)::bigint AS amount_micro
      FROM ledger l JOIN agent_path p ON p.agent_id = l.agent_id AND p.ancestor_id = %(above)s
     WHERE l.month = %(month)s AND l.account = 'usage' GROUP BY l.pod_id, l.agent_id
)
SELECT d.agent_id, d.id AS pod_id, t.provider, t.gpu, coalesce(s.seconds, 0) AS seconds, coalesce(o.amount_micro, 0) AS amount_usd
  FROM seconds s FULL JOIN posted o ON o.pod_id = s.pod_id
  JOIN pod d ON d.id = coalesce(s.pod_id, o.pod_id)
  JOIN LATERAL (SELECT provider, gpu FROM attempt WHERE pod_id = d.id ORDER BY n DESC LIMIT 1) t ON true
 ORDER BY d.agent_id, d.id"""
_MINIMUM: Final = """
SELECT coalesce(sum(l.amount_micro), 0)::bigint
  FROM ledger l JOIN agent_path p ON p.agent_id = l.agent_id AND p.ancestor_id = %(above)s
 WHERE l.month = %(month)s AND l.account = 'minimum'"""
_IS_CLOSED: Final = "SELECT coalesce(max(month) >= %(month)s, false) FROM month_closed"


async def list_statement(conn: Connection, above: str, month: date) -> list[StatementItem]:
    """What each pod of a subtree cost within a month, its provider's minimum left out."""
    cursor = conn.cursor(row_factory=class_row(StatementItem))
    await cursor.execute(_STATEMENT, {"above": above, "month": month})
    return await cursor.fetchall()


async def sum_minimum(conn: Connection, above: str, month: date) -> int:
    """What topped a subtree's pods up to their providers' minimum within a month, micro-USD."""
    row = await (await conn.execute(_MINIMUM, {"above": above, "month": month})).fetchone()
    return int(row[0]) if row else 0


async def is_closed(conn: Connection, month: date) -> bool:
    """Say whether a month is closed: nothing is posted to it any more."""
    row = await (await conn.execute(_IS_CLOSED, {"month": month})).fetchone()
    return row is not None and bool(row[0])


class UsedLimits(NamedTuple):
    """The limits of an agent, and what its subtree uses of them now."""

    agent_id: str
    max_pods: int | None
    pods: int
    max_micro_h: int | None
    micro_h: int
    max_creates_min: int | None
    creates: int


_USED: Final = "SELECT agent_id, max_pods, pods, max_micro_h, micro_h, max_creates_min, creates FROM limits_used(%s)"


async def list_limits(conn: Connection, agent_ids: Sequence[str]) -> list[UsedLimits]:
    """The limits of these agents and what is used of them."""
    cursor = conn.cursor(row_factory=class_row(UsedLimits))
    await cursor.execute(_USED, (list(agent_ids),))
    return await cursor.fetchall()
