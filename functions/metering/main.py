"""Function `metering`: bills what ran."""

import functions_framework.aio
from starlette.requests import Request

from gpubroker import metering as domain
from gpubroker import store
from gpubroker.consumer import Consumer, Incoming
from gpubroker.store import events as rows


async def bill_pod(event: Incoming) -> None:
    """Bill the pod that the event is about, in the transaction that finishes the delivery."""
    async with store.worker() as tx:
        if event.subject is not None and await rows.finish_delivery(tx, event.id, "metering", event.subject):
            await domain.bill_pod(tx, event.subject)


consumer = Consumer("metering", bill_pod)


@functions_framework.aio.http
async def metering(request: Request) -> Consumer:
    """The function."""
    del request
    return consumer
