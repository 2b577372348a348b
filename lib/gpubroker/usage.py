"""What was used: sums by group, and the intervals that they are made of."""

from datetime import UTC, datetime
from typing import Annotated, Final

from pydantic import BeforeValidator, Field

from gpubroker import inputs, paging, store
from gpubroker.resources import Page, Usage, UsageRecord, UsageRow
from gpubroker.store import money as rows
from gpubroker.store.instances import read_instant
from gpubroker.times import parse_time

_GROUP: Final = r"^(agent|pod|provider|gpu|hour|day|month|label:[A-Za-z0-9][A-Za-z0-9._/-]{0,62})$"

Time = Annotated[datetime, BeforeValidator(parse_time)]


class UsageQuery(inputs.Query):
    """Of when, of what, and in which groups."""

    from_: Time | None = Field(default=None, alias="from", description="Default: the start of this month, UTC.")
    to: Time | None = Field(default=None, description="Default: now.")
    group_by: Annotated[str, Field(pattern=_GROUP)] | None = None
    pod_id: str | None = None
    agent_id: str | None = None


class RecordsQuery(paging.Paged):
    """Of when and of what."""

    from_: Time | None = Field(default=None, alias="from", description="Default: the start of this month, UTC.")
    to: Time | None = Field(default=None, description="Default: now.")
    pod_id: str | None = None
    agent_id: str | None = None


async def sum_usage(tx: store.Transaction, query: UsageQuery) -> Usage:
    """Usage of the caller's subtree in a time, by group, with its total."""
    span = await _read_span(tx, query)
    (total,) = await rows.sum_usage(tx.conn, span, None)
    items: list[UsageRow] = await rows.sum_usage(tx.conn, span, query.group_by) if query.group_by else []
    return Usage(from_=span.from_at, to=span.to_at, items=items, total=total)


async def list_records(tx: store.Transaction, query: RecordsQuery) -> Page[UsageRecord]:
    """A page of the intervals that the caller's subtree was charged for."""
    after = paging.read_cursor(query.cursor, str)
    span = await _read_span(tx, query)
    found = await rows.list_records(tx.conn, span, after[0] if after else None, query.limit + 1)
    items, cursor = paging.cut_page(found, query.limit)
    return Page[UsageRecord](items=items, next_cursor=cursor)


async def _read_span(tx: store.Transaction, query: UsageQuery | RecordsQuery) -> rows.Span:
    to_at = query.to or await read_instant(tx.conn)
    from_at = query.from_ or to_at.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    if from_at >= to_at:
        raise inputs.invalid("?from", "must be before to")
    return rows.Span(tx.known.agent_id, from_at, to_at, query.pod_id, query.agent_id)
