"""What was used: sums by group, and the intervals that they are made of."""

import csv
import io
import re
from datetime import UTC, date
from typing import Annotated, Final

from pydantic import Field

from gpubroker import errors, inputs, paging, store
from gpubroker.resources import Page
from gpubroker.resources.usage import (
    LimitsUse,
    LimitsView,
    LimitUse,
    MoneyLimitUse,
    Statement,
    StatementItem,
    Usage,
    UsageRecord,
    UsageRow,
)
from gpubroker.store import usage as rows

_GROUP: Final = r"^(agent|pod|provider|gpu|hour|day|month|label:[A-Za-z0-9][A-Za-z0-9._/-]{0,62})$"


class UsageQuery(inputs.Query):
    """Of when, of what, and in which groups."""

    from_: inputs.Time | None = Field(default=None, alias="from", description="Default: the start of this month, UTC.")
    to: inputs.Time | None = Field(default=None, description="Default: now.")
    group_by: Annotated[str, Field(pattern=_GROUP)] | None = None
    pod_id: str | None = None
    agent_id: str | None = None


class RecordsQuery(paging.Paged):
    """Of when and of what."""

    from_: inputs.Time | None = Field(default=None, alias="from", description="Default: the start of this month, UTC.")
    to: inputs.Time | None = Field(default=None, description="Default: now.")
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
    to_at = query.to or await store.read_instant(tx.conn)
    from_at = query.from_ or to_at.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    if from_at >= to_at:
        raise inputs.invalid("?from", "must be before to")
    return rows.Span(tx.known.agent_id, from_at, to_at, query.pod_id, query.agent_id)


async def make_statement(tx: store.Transaction, text: str) -> Statement:
    """The statement of a month, such as `2026-11`, for the caller's subtree. Raises NotFound for what is no month."""
    named = re.fullmatch(r"([0-9]{4})-(0[1-9]|1[0-2])", text)
    if named is None or named[1] == "0000":
        raise errors.NotFound("There is no such month; a month is written 2026-11.")
    month = date(int(named[1]), int(named[2]), 1)
    above = tx.known.agent_id
    items = await rows.list_statement(tx.conn, above, month)
    minimum = await rows.sum_minimum(tx.conn, above, month)
    return Statement(
        month=text,
        state="closed" if await rows.is_closed(tx.conn, month) else "open",
        items=items,
        minimum_usd=minimum,
        total_usd=sum(item.amount_usd for item in items) + minimum,
    )


def write_csv(statement: Statement) -> bytes:
    """A statement's items as CSV (RFC 4180)."""
    written = io.StringIO()
    writer = csv.DictWriter(written, fieldnames=list(StatementItem.model_fields))
    writer.writeheader()
    writer.writerows(item.model_dump(mode="json") for item in statement.items)
    return written.getvalue().encode()


async def show_limits(tx: store.Transaction) -> LimitsView:
    """The limits of the caller's agent and of its organisation, and what is used of them."""
    caller = tx.known
    used = {u.agent_id: u for u in await rows.list_limits(tx.conn, [caller.agent_id, caller.path[0]])}
    return LimitsView(agent=_show_limits(used[caller.agent_id]), organisation=_show_limits(used[caller.path[0]]))


def _show_limits(used: rows.UsedLimits) -> LimitsUse:
    return LimitsUse(
        agent_id=used.agent_id,
        pods=LimitUse(limit=used.max_pods, used=used.pods),
        usd_per_hour=MoneyLimitUse(limit=used.max_micro_h, used=used.micro_h),
        creates_per_minute=LimitUse(limit=used.max_creates_min, used=used.creates),
    )
