"""Function `exec`: logs of a pod and commands in it."""

import functions_framework.aio
from starlette.requests import Request

from gpubroker import adapters, errors, web
from gpubroker import terminals as domain
from gpubroker.inputs import NoQuery, Nothing
from gpubroker.resources.pods import ExecAnswer

api = web.Api("exec")


@api.operation(
    "GET",
    "/v1/logs/{pod_id}",
    scope="pods:read",
    query=domain.LogQuery,
    answers={200: str},
    headers={"Last-Event-ID": "The id of the last event that came: the stream goes on behind it."},
    problems=(errors.ProviderFailed,),
)
async def read_log(call: web.Call[Nothing, domain.LogQuery]) -> web.Handled:
    """Read a pod's log, or follow it as server-sent events."""
    async with call.transaction() as tx:
        target = await domain.find_target(tx, call.path("pod_id"), "logs")
    resume = call.request.headers.get("last-event-id")
    if call.query.follow:
        return web.stream_events(await domain.follow_log(adapters.mine(), target, call.query, resume))
    return web.show_text(await domain.read_log(adapters.mine(), target, call.query))


@api.operation(
    "POST",
    "/v1/exec/{pod_id}",
    scope="pods:exec",
    body=domain.ExecRequest,
    answers={200: ExecAnswer},
    problems=(errors.NotRunning, errors.ProviderFailed),
)
async def execute(call: web.Call[domain.ExecRequest, NoQuery]) -> web.Answer:
    """Run a command in a running pod and wait for its end."""
    async with call.transaction() as tx:
        target = await domain.find_target(tx, call.path("pod_id"), "exec")
    return web.Answer(await domain.execute(adapters.mine(), target, call.body))


@functions_framework.aio.http
async def exec(request: Request) -> web.Api:  # noqa: A001 - the function's name is its folder's, its Service's and its Trigger's
    """The function."""
    del request
    return api
