"""Function `provisioning`: makes what is wanted true, one step at a time."""

import functions_framework.aio
from starlette.requests import Request

from gpubroker import adapters
from gpubroker.consumer import Consumer, Incoming
from gpubroker.provisioning import Driver


async def drive_pod(event: Incoming) -> None:
    """Drive the pod that the event is about; the row says what is due."""
    if event.subject is not None:
        await Driver(adapters.mine()).drive_on(event.subject, event_id=event.id)


consumer = Consumer("provisioning", drive_pod)


@functions_framework.aio.http
async def provisioning(request: Request) -> Consumer:
    """The function."""
    del request
    return consumer
