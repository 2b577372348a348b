"""Function `offers`: search of what can be rented."""

import functions_framework.aio
from starlette.requests import Request

from gpubroker import offers as domain
from gpubroker import web
from gpubroker.inputs import NoQuery, Nothing
from gpubroker.resources import Offer, Page

api = web.Api("offers")


@api.operation("GET", "/v1/offers", scope="offers:read", query=domain.Search, answers={200: Page[Offer]})
async def search_offers(call: web.Call[Nothing, domain.Search]) -> web.Answer:
    """Search what can be rented now."""
    async with call.transaction() as tx:
        return web.Answer(await domain.search_offers(tx, call.query))


@api.operation("GET", "/v1/offers/{id}", scope="offers:read", answers={200: Offer})
async def show_offer(call: web.Call[Nothing, NoQuery]) -> web.Answer:
    """Show one offer."""
    async with call.transaction() as tx:
        return web.Answer(await domain.show_offer(tx, call.path("id")))


@functions_framework.aio.http
async def offers(request: Request) -> web.Api:
    """The function."""
    del request
    return api
