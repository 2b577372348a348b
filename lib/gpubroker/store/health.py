"""What the database says of the state of an installation, for `gpubroker doctor`. It reads only."""

from datetime import datetime
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import class_row

from gpubroker.store import migrations


class Schema(NamedTuple):
    """The number of the last migration, the oldest code that works with it, the owner; None where there is none yet."""

    number: int | None
    needs: int | None
    owner: str | None


class Work(NamedTuple):
    """What waits, and since when; `tick_at` is the last that `reconcile` began."""

    now: datetime
    late_pods: int
    latest_late: datetime | None
    unpublished: int
    undelivered: int
    failing: str | None
    tick_at: datetime | None
    distrusted: int
    unhealthy: int
    sick: str | None
    month_is_late: bool


class Present(NamedTuple):
    """An instance that is not proved gone, and what it costs an hour now; `price_micro_h` is None where nobody knows.

    `ends_itself`: its provider has an end of its own, which was set as it was made.
    """

    provider: str
    ends_itself: bool
    ref: str | None
    hard_stop_at: datetime | None
    seen_at: datetime | None
    price_micro_h: int | None


_SCHEMA: Final = "SELECT max(number), max(needs), (SELECT owner FROM installation) FROM migration"
_WORK: Final = """
SELECT clock_timestamp() AS now,
       (SELECT count(*) FROM pod WHERE due_at < instant() - interval '3 minutes')::int AS late_pods,
       (SELECT min(due_at) FROM pod WHERE due_at < instant() - interval '3 minutes') AS latest_late,
       (SELECT count(*) FROM event WHERE published_at IS NULL AND at < clock_timestamp() - interval '5 minutes'
           AND at > clock_timestamp() - interval '3 days')::int AS unpublished,
       (SELECT count(*) FROM delivery d JOIN event e ON e.id = d.event_id
         WHERE d.done_at IS NULL AND e.at < clock_timestamp() - interval '10 minutes')::int AS undelivered,
       (SELECT max(failure) FROM delivery WHERE done_at IS NULL) AS failing,
       (SELECT max(bucket) FROM tick WHERE name = 'reconcile') AS tick_at,
       (SELECT count(*) FROM provider_account WHERE distrust_until > clock_timestamp())::int AS distrusted,
       (SELECT count(*) FROM provider_account WHERE unhealthy_since IS NOT NULL)::int AS unhealthy,
       (SELECT string_agg(provider || ': ' || coalesce(last_error, 'too much vanished at once'), '; ')
          FROM provider_account WHERE unhealthy_since IS NOT NULL OR distrust_until > clock_timestamp()) AS sick,
       (SELECT date_trunc('month', instant(), 'UTC') + interval '3 days' < instant() AND EXISTS (
                SELECT FROM ledger WHERE at < date_trunc('month', instant(), 'UTC'))
           AND NOT EXISTS (SELECT FROM month_closed
                WHERE month >= (date_trunc('month', instant(), 'UTC') - interval '1 month')::date)) AS month_is_late"""


async def read_schema(conn: AsyncConnection[Any]) -> Schema:
    """The schema as it is; all None for a database that was never migrated."""
    try:
        async with conn.transaction():
            await conn.execute("SET LOCAL ROLE gpubroker_worker")
            row = await (await conn.execute(_SCHEMA)).fetchone()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidParameterValue):
        row = None
    return Schema(*(row or (None, None, None)))


def newest() -> int:
    """The last migration that this code knows."""
    return migrations.known()[-1].number


async def read_work(conn: AsyncConnection[Any]) -> Work:
    """What waits, in one look."""
    async with conn.transaction():
        await conn.execute("SET LOCAL ROLE gpubroker_worker")
        cursor = conn.cursor(row_factory=class_row(Work))
        await cursor.execute(_WORK)
        row = await cursor.fetchone()
    if row is None:
        msg = "a SELECT without FROM has a row"
        raise LookupError(msg)
    return row


_PRESENT: Final = """
SELECT c.provider, coalesce((c.capabilities ->> 'ttl')::boolean, false) AS ends_itself, i.ref, i.hard_stop_at, i.seen_at,
       coalesce((SELECT p.price_micro_h FROM phase p WHERE p.instance_id = i.id ORDER BY p.seq DESC LIMIT 1), a.price_micro_h)
           AS price_micro_h
  FROM instance i JOIN provider_account c ON c.id = i.account_id LEFT JOIN attempt a ON a.id = i.attempt_id
 WHERE i.gone_at IS NULL"""


async def list_present(conn: AsyncConnection[Any]) -> list[Present]:
    """Every instance that may still bill, strays too."""
    async with conn.transaction():
        await conn.execute("SET LOCAL ROLE gpubroker_worker")
        cursor = conn.cursor(row_factory=class_row(Present))
        await cursor.execute(_PRESENT)
        return await cursor.fetchall()
