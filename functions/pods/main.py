"""Function `pods`: what is wanted. It writes rows and never calls a provider."""

import re
from typing import Annotated, Final, Literal

import functions_framework.aio
from starlette.requests import Request

from gpubroker import errors, idempotency, inputs, paging, pod_requests, web
from gpubroker import pods as domain
from gpubroker.inputs import Nothing
from gpubroker.resources import Page
from gpubroker.resources.pods import DryRun, Pod, PodEvent
from gpubroker.store import pods as rows

api = web.Api("pods")
_WAIT: Final = re.compile(r'(?:^|[,;])\s*wait\s*=\s*"?([0-9]{1,9})"?\s*(?:$|[,;])', re.IGNORECASE)


class CreateQuery(domain.WaitQuery):
    """How to take a request for a pod."""

    duplicate: Literal["allow", "refuse"] = "refuse"
    dry_run: Annotated[bool, inputs.Flag] = False


class ListQuery(domain.Selection, paging.Paged):
    """Which pods to list."""


_WAITS: Final = {"Prefer": "wait=N (RFC 7240) means what the query's wait means, where that is left out."}
Action = web.Call[Nothing, domain.WaitQuery]


@api.operation(
    "POST", "/v1/pods", scope="pods:write", body=pod_requests.PodRequest, query=CreateQuery,
    answers={202: Pod, 201: Pod, 200: DryRun}, idempotent=True, headers=_WAITS,
    problems=(errors.BudgetExhausted, errors.Conflict, errors.QuoteExpired),
)  # fmt: skip
async def create_pod(call: web.Call[pod_requests.PodRequest, CreateQuery]) -> web.Answer:
    """Ask for a pod, under a hold that covers its whole life; with dry_run say what that would be."""
    if call.query.dry_run:
        async with call.transaction() as tx:
            return web.Answer(await pod_requests.dry_run(tx, call.body))
    key = idempotency.Request(call.idempotency_key, "POST /v1/pods", call.raw)
    pod_id, replayed = await pod_requests.request_pod(
        call.transaction, call.body, key, allow_duplicate=call.query.duplicate == "allow"
    )
    pod = await domain.wait(call.transaction, pod_id, wait_query(call))
    headers = {"Location": f"/v1/pods/{pod_id}"} | ({"Idempotency-Replayed": "true"} if replayed else {})
    return web.Answer(domain.present(pod), 201 if domain.is_settled(pod) else 202, headers)


@api.operation("GET", "/v1/pods", scope="pods:read", query=ListQuery, answers={200: Page[Pod]})
async def list_pods(call: web.Call[Nothing, ListQuery]) -> web.Answer:
    """List pods of the calling agent and of all below it, the newest first."""
    before = paging.read_cursor(call.query.cursor, str)
    limit = call.query.limit
    async with call.transaction() as tx:
        found = await rows.list_pods(tx.conn, call.query.of(tx.known), before[0] if before else None, limit + 1)
    shown, cursor = paging.cut_page(found, limit)
    return web.Answer(Page[Pod](items=[domain.present(pod) for pod in shown], next_cursor=cursor))


@api.operation("DELETE", "/v1/pods", scope="pods:write", query=domain.Selection, answers={202: Page[Pod]})
async def terminate_pods(call: web.Call[Nothing, domain.Selection]) -> web.Answer:
    """End all pods of the subtree that match: at least one filter is needed."""
    async with call.transaction() as tx:
        ended = await domain.terminate_all(tx, call.query)
        items = [await domain.show_pod(tx, pod_id) for pod_id in ended]
    return web.Answer(Page[Pod](items=items), 202)


@api.operation("GET", "/v1/pods/{id}", scope="pods:read", query=domain.WaitQuery, headers=_WAITS, answers={200: Pod})
async def show_pod(call: Action) -> web.Answer:
    """Show a pod, at once or when it is what is waited for."""
    pod = await domain.wait(call.transaction, call.path("id"), wait_query(call))
    return web.Answer(domain.present(pod))


@api.operation("GET", "/v1/pods/{id}/events", scope="pods:read", query=paging.Paged, answers={200: Page[PodEvent]})
async def list_events(call: web.Call[Nothing, paging.Paged]) -> web.Answer:
    """Show a pod's history: every state, attempt and charge, with times and causes."""
    after = paging.read_cursor(call.query.cursor, int, str)
    async with call.transaction() as tx:
        page = await domain.list_events(tx, call.path("id"), (after[0], after[1]) if after else None, call.query.limit)
    return web.Answer(page)


@api.operation(
    "POST", "/v1/pods/{id}/start", scope="pods:write", query=domain.WaitQuery, headers=_WAITS, answers={202: Pod, 200: Pod},
    problems=(errors.ActionNotAllowed,),
)  # fmt: skip
async def start_pod(call: Action) -> web.Answer:
    """Start a stopped pod."""
    async with call.transaction() as tx:
        await domain.act(tx, call.path("id"), "start")
    return await answer_action(call)


@api.operation(
    "POST", "/v1/pods/{id}/stop", scope="pods:write", query=domain.WaitQuery, headers=_WAITS, answers={202: Pod, 200: Pod},
    problems=(errors.ActionNotAllowed,),
)  # fmt: skip
async def stop_pod(call: Action) -> web.Answer:
    """Stop a pod and keep its disk."""
    async with call.transaction() as tx:
        await domain.act(tx, call.path("id"), "stop")
    return await answer_action(call)


@api.operation(
    "POST", "/v1/pods/{id}/restart", scope="pods:write", query=domain.WaitQuery, headers=_WAITS, answers={202: Pod, 200: Pod},
    problems=(errors.ActionNotAllowed,),
)  # fmt: skip
async def restart_pod(call: Action) -> web.Answer:
    """End a pod's program and start it anew."""
    async with call.transaction() as tx:
        await domain.act(tx, call.path("id"), "restart")
    return await answer_action(call)


@api.operation(
    "POST", "/v1/pods/{id}/extend", scope="pods:write", body=domain.ExtendRequest, query=domain.WaitQuery, headers=_WAITS,
    answers={202: Pod, 200: Pod}, problems=(errors.ActionNotAllowed, errors.BudgetExhausted),
)  # fmt: skip
async def extend_pod(call: web.Call[domain.ExtendRequest, domain.WaitQuery]) -> web.Answer:
    """Give a pod a longer life, under a further hold."""
    async with call.transaction() as tx:
        await domain.extend(tx, call.path("id"), call.body)
    return await answer_action(call)


@api.operation(
    "DELETE", "/v1/pods/{id}", scope="pods:write", query=domain.WaitQuery, headers=_WAITS, answers={202: Pod, 200: Pod}
)
async def terminate_pod(call: Action) -> web.Answer:
    """End a pod, disk and all."""
    async with call.transaction() as tx:
        await domain.terminate(tx, call.path("id"))
    return await answer_action(call, gone=True)


async def answer_action(call: web.Call[web.B, domain.WaitQuery], *, gone: bool = False) -> web.Answer:
    """Answer with the pod: 200 once it is settled, else 202."""
    pod = await domain.wait(call.transaction, call.path("id"), wait_query(call), gone=gone)
    is_done = pod.state == "terminated" if gone else domain.is_settled(pod)
    return web.Answer(domain.present(pod), 200 if is_done else 202)


def wait_query(call: web.Call[web.B, domain.WaitQuery] | web.Call[web.B, CreateQuery]) -> domain.WaitQuery:
    """The query, with `Prefer: wait=N` (RFC 7240) where it says nothing of waiting; one that is out of range is not obeyed."""
    preferred = _WAIT.search(call.request.headers.get("prefer", ""))
    if preferred is None or int(preferred[1]) > domain.LONGEST_WAIT or "wait" in call.query.model_fields_set:
        return call.query
    call.headers["Preference-Applied"] = f"wait={preferred[1]}"
    return call.query.model_copy(update={"wait": int(preferred[1])})


@functions_framework.aio.http
async def pods(request: Request) -> web.Api:
    """The function."""
    del request
    return api
