"""Function `deadletter`: records what could not be delivered; the tick publishes again what somebody waits for."""

import logging

import functions_framework.aio
from starlette.requests import Request

from gpubroker import store
from gpubroker.consumer import Consumer, Incoming
from gpubroker.store import events as rows

log = logging.getLogger("gpubroker.deadletter")


async def record_failure(event: Incoming) -> None:
    """Note why the event was not delivered, on the delivery that is still open."""
    code = event.extensions.get("knativeerrorcode", "no answer")
    destination = event.extensions.get("knativeerrordest", "")
    async with store.worker() as tx:
        is_awaited = await rows.fail_delivery(tx, event.id, None, f"{code} from {destination}")
    log.error(
        "event %s (%s) was not delivered: %s from %s; awaited: %s", event.id, event.type, code, destination, is_awaited
    )


consumer = Consumer("deadletter", record_failure, any_type=True)


@functions_framework.aio.http
async def deadletter(request: Request) -> Consumer:
    """The function."""
    del request
    return consumer
