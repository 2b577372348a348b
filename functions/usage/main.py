"""Function `usage`: what was used, what it cost, and what may still be spent."""

import functions_framework.aio
from starlette.requests import Request

from gpubroker import budgets, paging, plans, web
from gpubroker import usage as domain
from gpubroker.inputs import NoQuery, Nothing
from gpubroker.resources import Page
from gpubroker.resources.budgets import Budget, BudgetRequest
from gpubroker.resources.plans import Plan, Subscription, SubscriptionRequest
from gpubroker.resources.usage import LimitsView, Statement, Usage, UsageRecord
from gpubroker.store import budgets as rows

api = web.Api("usage")


@api.operation("GET", "/v1/usage", scope="usage:read", query=domain.UsageQuery, answers={200: Usage})
async def sum_usage(call: web.Call[Nothing, domain.UsageQuery]) -> web.Answer:
    """Sum what the subtree used, by group."""
    async with call.transaction() as tx:
        return web.Answer(await domain.sum_usage(tx, call.query))


@api.operation(
    "GET", "/v1/usage/records", scope="usage:read", query=domain.RecordsQuery, answers={200: Page[UsageRecord]}
)
async def list_records(call: web.Call[Nothing, domain.RecordsQuery]) -> web.Answer:
    """List the intervals that were charged, in the order in which they were billed."""
    async with call.transaction() as tx:
        return web.Answer(await domain.list_records(tx, call.query))


@api.operation("GET", "/v1/budgets", scope="usage:read", query=paging.Paged, answers={200: Page[Budget]})
async def list_budgets(call: web.Call[Nothing, paging.Paged]) -> web.Answer:
    """List the budgets of the calling agent and of all below it."""
    after = paging.read_cursor(call.query.cursor, str)
    limit = call.query.limit
    async with call.transaction() as tx:
        found = await rows.list_budgets(tx.conn, tx.known.agent_id, after=after[0] if after else None, limit=limit + 1)
    cursor = paging.write_cursor(found[limit - 1].agent_id) if len(found) > limit else None
    return web.Answer(Page[Budget](items=found[:limit], next_cursor=cursor))


@api.operation("PUT", "/v1/budgets/{agent_id}", scope="budgets:write", body=BudgetRequest, answers={200: Budget})
async def set_budget(call: web.Call[BudgetRequest, NoQuery]) -> web.Answer:
    """Set the limit of an agent below the caller, or lower the caller's own."""
    async with call.transaction() as tx:
        return web.Answer(await budgets.set_budget(tx, call.path("agent_id"), call.body))


@api.operation("GET", "/v1/statements/{month}", scope="usage:read", answers={200: Statement})
async def show_statement(call: web.Call[Nothing, NoQuery]) -> web.Handled:
    """Show the statement of a month, as JSON or, where that is accepted, as CSV."""
    async with call.transaction() as tx:
        statement = await domain.make_statement(tx, call.path("month"))
    if web.prefers_csv(call.request):
        return web.show_csv(domain.write_csv(statement), f"statement-{statement.month}.csv")
    return web.Answer(statement, headers={"Vary": "Accept"})


@api.operation("GET", "/v1/limits", scope="usage:read", answers={200: LimitsView})
async def show_limits(call: web.Call[Nothing, NoQuery]) -> web.Answer:
    """Show the limits of the agent and its organisation, and what is used of them."""
    async with call.transaction() as tx:
        return web.Answer(await domain.show_limits(tx))


@api.operation("GET", "/v1/plans", query=paging.Paged, answers={200: Page[Plan]})
async def list_plans(call: web.Call[Nothing, paging.Paged]) -> web.Answer:
    """List the plans, with what each allows."""
    await call.admit()
    return web.Answer(plans.list_plans(call.query))


@api.operation(
    "GET", "/v1/subscription", scope="usage:read", query=plans.SubscriptionQuery, answers={200: Subscription}
)
async def show_subscription(call: web.Call[Nothing, plans.SubscriptionQuery]) -> web.Answer:
    """Show which plan the organisation is on."""
    async with call.transaction() as tx:
        return web.Answer(await plans.show_subscription(tx, call.query))


@api.operation(
    "PUT", "/v1/subscription", scope="budgets:write", body=SubscriptionRequest, query=plans.SubscriptionQuery,
    answers={200: Subscription},
)  # fmt: skip
async def change_subscription(call: web.Call[SubscriptionRequest, plans.SubscriptionQuery]) -> web.Answer:
    """Put the organisation on another plan: an operator on any, its root agent on a lesser one."""
    async with call.transaction() as tx:
        return web.Answer(await plans.change_subscription(tx, call.query, call.body.plan))


@api.operation(
    "DELETE", "/v1/subscription", scope="budgets:write", query=plans.CancelQuery, answers={200: Subscription}
)
async def cancel_subscription(call: web.Call[Nothing, plans.CancelQuery]) -> web.Answer:
    """Cancel: on the free plan now, or at the end of the period."""
    async with call.transaction() as tx:
        return web.Answer(await plans.cancel_subscription(tx, call.query))


@functions_framework.aio.http
async def usage(request: Request) -> web.Api:
    """The function."""
    del request
    return api
