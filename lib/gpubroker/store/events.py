"""Rows of `event`, `delivery` and `tick`."""

from collections.abc import Sequence
from typing import Final

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from gpubroker.resources.pods import PodEvent
from gpubroker.store import Connection, Event, Transaction

_ADD: Final = """
INSERT INTO event (id, type, subject, tenant, agent_id, traceparent, data, at)
VALUES (%(id)s, %(type)s, %(subject)s, %(tenant)s, %(agent_id)s, %(traceparent)s, %(data)s, %(at)s)"""
_ADD_DELIVERIES: Final = """
INSERT INTO delivery (event_id, consumer, tenant) SELECT %s, unnest(%s::text[]), %s"""


async def add_event(tx: Transaction, event: Event, consumers: Sequence[str]) -> None:
    """Write an event with a delivery row for each consumer; it is published once the transaction is committed."""
    row = {name: getattr(event, name) for name in Event._fields} | {"data": Jsonb(event.data)}
    await tx.conn.execute(_ADD, row)
    if consumers:
        await tx.conn.execute(_ADD_DELIVERIES, (event.id, list(consumers), event.tenant))
    tx.events.append(event)


_MARK_PUBLISHED: Final = "SELECT mark_published(%s)"


async def mark_published(conn: Connection, ids: Sequence[str]) -> None:
    """Remember that the Broker took these events."""
    await conn.execute(_MARK_PUBLISHED, (list(ids),))


_FINISH_DELIVERY: Final = """
UPDATE delivery d SET done_at = clock_timestamp() FROM event e
 WHERE d.event_id = %s AND d.consumer = %s AND d.done_at IS NULL AND e.id = d.event_id AND e.subject = %s"""


async def finish_delivery(tx: Transaction, event_id: str, consumer: str, subject: str) -> bool:
    """The guard of a consumer: true for the one transaction that may have the event's effect, on its own subject."""
    done = await tx.conn.execute(_FINISH_DELIVERY, (event_id, consumer, subject))
    return done.rowcount == 1


_FAIL_DELIVERY: Final = """
UPDATE delivery SET failure = %s WHERE event_id = %s AND done_at IS NULL AND (%s::text IS NULL OR consumer = %s)"""


async def fail_delivery(tx: Transaction, event_id: str, consumer: str | None, failure: str) -> bool:
    """Note why an event could not be delivered; the tick publishes it again. False: nobody waits for this event."""
    noted = await tx.conn.execute(_FAIL_DELIVERY, (failure[:500], event_id, consumer, consumer))
    return noted.rowcount > 0


_TAKE_OVERDUE: Final = """
WITH overdue AS (
    SELECT e.id FROM event e
     WHERE e.published_at IS NULL AND e.next_at <= clock_timestamp() AND e.at > clock_timestamp() - interval '3 days'
    UNION
    SELECT d.event_id FROM delivery d WHERE d.done_at IS NULL AND d.next_at <= clock_timestamp()
     LIMIT %s
), moved AS (
    UPDATE delivery d
       SET tries = tries + 1, next_at = clock_timestamp() + least(interval '60 seconds' * 2 ^ least(tries, 10), interval '6 hours')
     WHERE d.event_id IN (SELECT id FROM overdue) AND d.done_at IS NULL
)
UPDATE event e
   SET tries = tries + 1, next_at = clock_timestamp() + least(interval '10 seconds' * 2 ^ least(tries, 10), interval '1 hour')
 WHERE e.id IN (SELECT id FROM overdue)
RETURNING e.id, e.type, e.subject, e.tenant, e.agent_id, e.traceparent, e.data, e.at"""


async def take_overdue(tx: Transaction, limit: int = 200) -> list[Event]:
    """Events that the Broker did not take, or that a consumer has not finished: to be published again."""
    cursor = tx.conn.cursor(row_factory=class_row(Event))
    await cursor.execute(_TAKE_OVERDUE, (limit,))
    return await cursor.fetchall()


_WAKE: Final = "SELECT id, type, subject, tenant, agent_id, traceparent, data, at FROM wake(%s)"


async def wake(tx: Transaction, pod_id: str) -> None:
    """Publish a due pod's last event again, at most once in 2 seconds; nothing for one that is not due."""
    cursor = tx.conn.cursor(row_factory=class_row(Event))
    await cursor.execute(_WAKE, (pod_id,))
    event = await cursor.fetchone()
    if event is not None:
        tx.events.append(event)


_TAKE_TICK: Final = """
INSERT INTO tick (name, bucket) VALUES (%s, to_timestamp(floor(extract(epoch FROM clock_timestamp()) / %s) * %s))
ON CONFLICT DO NOTHING"""


async def take_tick(tx: Transaction, name: str, seconds: int) -> bool:
    """Claim this schedule's present bucket of `seconds`; false when another tick did."""
    taken = await tx.conn.execute(_TAKE_TICK, (name, seconds, seconds))
    return taken.rowcount == 1


_PRUNE: Final = (
    "DELETE FROM tick WHERE bucket < clock_timestamp() - interval '1 day'",
    "DELETE FROM idempotency WHERE at < clock_timestamp() - interval '48 hours'",
    "DELETE FROM listing l WHERE l.began_at < clock_timestamp() - interval '2 days'",
    """DELETE FROM refresh r WHERE r.began_at < clock_timestamp() - interval '2 days' AND EXISTS (
           SELECT FROM refresh n WHERE n.account_id = r.account_id AND n.complete AND n.began_at > r.began_at)""",
)


async def prune(tx: Transaction) -> None:
    """Delete what only the recent past needed: ticks, idempotency keys, listings."""
    for statement in _PRUNE:
        await tx.conn.execute(statement)


# Charges are the intervals themselves, and what `settle` topped up: the event usage.recorded only tells of sums.
_HISTORY: Final = """
SELECT id, kind, what, at, data FROM (
    SELECT e.id, 'state' AS kind, regexp_replace(e.type, '^io[.]gpubroker[.]|[.]v1$', '', 'g') AS what, e.at, e.data
      FROM event e WHERE e.subject = %(pod)s AND e.type <> 'io.gpubroker.usage.recorded.v1'
    UNION ALL
    SELECT a.id, 'attempt', 'attempt.' || a.state, a.at,
           jsonb_build_object('provider', a.provider, 'offer_id', a.offer_id, 'n', a.n, 'code', a.code, 'settled_at',
                              to_char(a.settled_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'))
      FROM attempt a WHERE a.pod_id = %(pod)s
    UNION ALL
    SELECT u.id, 'charge', 'charge.usage', upper(u.during),
           jsonb_build_object('instance_id', u.instance_id, 'billing', f.billing,
                              'seconds', extract(epoch FROM upper(u.during) - lower(u.during))::bigint,
                              'amount_usd', (u.charged_micro / 1000000.0)::numeric(20, 6)::text)
      FROM usage_interval u JOIN phase f ON (f.instance_id, f.seq) = (u.instance_id, u.phase_seq)
     WHERE u.pod_id = %(pod)s AND u.payer = 'customer'
    UNION ALL
    SELECT l.source, 'charge', 'charge.minimum', l.at,
           jsonb_build_object('instance_id', l.instance_id, 'amount_usd', (l.amount_micro / 1000000.0)::numeric(20, 6)::text)
      FROM ledger l WHERE l.pod_id = %(pod)s AND l.account = 'minimum'
) h
 WHERE %(at)s::numeric IS NULL OR (extract(epoch FROM at) * 1000000, id COLLATE "C") > (%(at)s::numeric, %(id)s::text)
 ORDER BY at, id COLLATE "C" LIMIT %(limit)s"""


async def list_history(conn: Connection, pod_id: str, after: tuple[int, str] | None, limit: int) -> list[PodEvent]:
    """What happened to a pod, in the order of its time. `after` is a moment, in microseconds of the epoch, and an id."""
    at, last = after or (None, None)
    cursor = conn.cursor(row_factory=class_row(PodEvent))
    await cursor.execute(_HISTORY, {"pod": pod_id, "at": at, "id": last, "limit": limit})
    return await cursor.fetchall()
