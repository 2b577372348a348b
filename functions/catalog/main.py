"""Function `catalog`: refreshes the offers of every provider, all at once."""

import functions_framework.aio
from starlette.requests import Request

from gpubroker import adapters, config, store
from gpubroker import catalog as domain
from gpubroker.consumer import Consumer, Incoming
from gpubroker.store import events as rows


async def take_tick(event: Incoming) -> None:
    """Refresh what is due, unless this bucket of time was worked already."""
    del event
    async with store.worker() as tx:
        is_mine = await rows.take_tick(tx, "catalog", config.settings().tick_seconds)
    if is_mine:
        await domain.refresh_all(adapters.mine())


consumer = Consumer("catalog", take_tick)


@functions_framework.aio.http
async def catalog(request: Request) -> Consumer:
    """The function."""
    del request
    return consumer
