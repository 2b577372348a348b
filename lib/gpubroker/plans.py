"""Plans: how many requests a second an organisation may make, and which plan it is on.

An operator puts an organisation on any plan. Its root agent may take a lesser one, or cancel; nobody raises a limit of itself.
"""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Final, get_args

from pydantic import Field

from gpubroker import errors, inputs, paging, rates, store
from gpubroker.inputs import Query
from gpubroker.resources import Page
from gpubroker.resources.plans import Plan, PlanLimits, PlanName, Subscription
from gpubroker.store import plans as rows

_FREE: Final = "free"
_LONGER_THAN_A_MONTH: Final = timedelta(days=32)


class SubscriptionQuery(Query):
    """Whose subscription."""

    org_id: Annotated[str, Field(max_length=40)] | None = Field(
        default=None, description="Of another organisation: for operators."
    )


class CancelQuery(SubscriptionQuery):
    """Whose subscription ends, and when."""

    at_period_end: Annotated[bool, inputs.Flag] = False


def list_plans(query: paging.Paged) -> Page[Plan]:
    """A page of the plans, the least first. Raises Invalid for a cursor that is none."""
    after = paging.read_cursor(query.cursor, int)
    begin = max(0, after[0]) if after else 0
    names: list[PlanName] = list(get_args(PlanName))
    shown = [Plan(name=name, limits=_limits(name)) for name in names[begin : begin + query.limit]]
    end = begin + query.limit
    return Page[Plan](items=shown, next_cursor=paging.write_cursor(end) if end < len(names) else None)


async def show_subscription(tx: store.Transaction, query: SubscriptionQuery) -> Subscription:
    """The plan of the caller's organisation; for an operator that of any. Raises NotFound."""
    return await _show(tx, await _enter(tx, query))


async def change_subscription(tx: store.Transaction, query: SubscriptionQuery, plan: PlanName) -> Subscription:
    """Put an organisation on a plan now. Raises Forbidden for a greater one, but for an operator, and NotFound."""
    org_id = await _enter(tx, query)
    _refuse_change(tx.known)
    await rows.lock_plan(tx.conn, org_id)
    present = await _show(tx, org_id)
    if "admin" not in tx.known.scopes and _rank(plan) > _rank(present.plan):
        raise errors.Forbidden(
            "Nobody may raise a limit of itself, and a plan's is its organisation's.", hint="Have the operator do it."
        )
    await rows.set_plan(tx.conn, plan, None)
    return await _show(tx, org_id)


async def cancel_subscription(tx: store.Transaction, query: CancelQuery) -> Subscription:
    """Put an organisation on the free plan, now or at the end of the period. Raises Forbidden and NotFound."""
    org_id = await _enter(tx, query)
    _refuse_change(tx.known)
    await rows.lock_plan(tx.conn, org_id)
    present = await _show(tx, org_id)
    if query.at_period_end and present.plan != _FREE:
        await rows.set_plan(tx.conn, present.plan, present.period_end)
    else:
        await rows.set_plan(tx.conn, _FREE, None)
    return await _show(tx, org_id)


async def _enter(tx: store.Transaction, query: SubscriptionQuery) -> str:
    org_id = query.org_id or tx.known.org_id
    if org_id != tx.known.org_id and not ("admin" in tx.known.scopes and await rows.enter_org(tx.conn, org_id)):
        raise errors.NotFound
    return org_id


def _refuse_change(caller: store.Caller) -> None:
    if len(caller.path) > 1 and "admin" not in caller.scopes:
        raise errors.Forbidden(
            "The plan is the organisation's: its root agent or the operator changes it.",
            hint="Have the root agent do it.",
        )


async def _show(tx: store.Transaction, org_id: str) -> Subscription:
    found = await rows.find_plan(tx.conn, org_id)
    if found is None:
        raise errors.NotFound
    return Subscription(
        org_id=org_id,
        plan=found.plan,
        limits=_limits(found.plan),
        state="active" if found.plan_ends_at is None else "ending",
        since=found.plan_since,
        period_end=_next_month(await store.read_instant(tx.conn)),
        ends_at=found.plan_ends_at,
    )


def _limits(plan: PlanName) -> PlanLimits:
    return PlanLimits(requests_per_second=rates.PER_SECOND[plan])


def _rank(plan: PlanName) -> int:
    return get_args(PlanName).index(plan)


def _next_month(moment: datetime) -> datetime:
    start = moment.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (start + _LONGER_THAN_A_MONTH).replace(day=1)
