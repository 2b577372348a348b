"""Function `reconcile`: expiry, due pods, the sweep, the bill, and the events that nobody got."""

import functions_framework.aio
from starlette.requests import Request

from gpubroker import adapters, config, store
from gpubroker import reconciling as domain
from gpubroker.consumer import Consumer, Incoming
from gpubroker.store import events as rows


async def take_tick(event: Incoming) -> None:
    """Work this tick, unless its bucket of time was worked already."""
    del event
    async with store.worker() as tx:
        is_mine = await rows.take_tick(tx, "reconcile", config.settings().tick_seconds)
    if is_mine:
        await domain.reconcile(adapters.mine())


consumer = Consumer("reconcile", take_tick)


@functions_framework.aio.http
async def reconcile(request: Request) -> Consumer:
    """The function."""
    del request
    return consumer
