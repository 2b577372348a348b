"""Function `intake`: commands that come as CloudEvents."""

import functions_framework.aio
from starlette.requests import Request

from gpubroker import consumer, errors, web
from gpubroker import intake as domain
from gpubroker.inputs import NoQuery, Nothing
from gpubroker.resources.commands import CommandAnswers

api = web.Api("intake")


@api.operation(
    "POST",
    "/v1/intake",
    scope="events:write",
    raw=("application/cloudevents+json", "application/cloudevents-batch+json"),
    answers={202: CommandAnswers},
    problems=(errors.IdempotencyKeyReused, errors.IdempotencyInProgress),
)
async def take_commands(call: web.Call[Nothing, NoQuery]) -> web.Answer:
    """Carry out commands that come as CloudEvents: binary, structured, or a batch."""
    async with call.transaction():
        pass  # who may not call is told nothing of what is wrong with its events
    try:
        taken = await consumer.decode_all(call.request)
    except consumer.MalformedEvent as error:
        raise errors.Invalid(f"This is no CloudEvent as it is taken here: {error}.", more={"errors": []}) from None
    return web.Answer(CommandAnswers(items=[await domain.carry_out(call.transaction, event) for event in taken]), 202)


@functions_framework.aio.http
async def intake(request: Request) -> web.Api:
    """The function."""
    del request
    return api
