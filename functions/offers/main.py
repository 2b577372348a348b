"""Function `offers`: search of what can be rented, its prices, and quotes."""

import functions_framework.aio
from starlette.requests import Request

from gpubroker import idempotency, paging, prices, quotes, store, web
from gpubroker import offers as domain
from gpubroker.inputs import NoQuery, Nothing
from gpubroker.resources import Page
from gpubroker.resources.offers import Gpu, Offer, OfferPage, PriceHistory, ProviderView
from gpubroker.resources.pods import Quote
from gpubroker.shelf import Shelf

api = web.Api("offers")
shelf = Shelf()


@api.operation("GET", "/v1/offers", scope="offers:read", query=domain.Search, answers={200: OfferPage})
async def search_offers(call: web.Call[Nothing, domain.Search]) -> web.Handled:
    """Search what can be rented now."""

    async def read() -> bytes:
        async with call.transaction(store.BY_INDEX) as tx:
            return (await domain.search_offers(tx, call.query)).model_dump_json().encode()

    version = await call.glimpse()
    content = await shelf.show(call.asked, version, read)
    return web.show_json(content)


@api.operation("GET", "/v1/offers/{id}", scope="offers:read", answers={200: Offer})
async def show_offer(call: web.Call[Nothing, NoQuery]) -> web.Answer:
    """Show one offer."""
    async with call.transaction() as tx:
        return web.Answer(await domain.show_offer(tx, call.path("id")))


@api.operation("GET", "/v1/gpus", scope="offers:read", query=paging.Paged, answers={200: Page[Gpu]})
async def list_gpus(call: web.Call[Nothing, paging.Paged]) -> web.Answer:
    """List the GPU models, with who offers them and for how much now."""
    after = paging.read_cursor(call.query.cursor, str)
    async with call.transaction() as tx:
        return web.Answer(await domain.list_gpus(tx, after[0] if after else None, call.query.limit))


@api.operation(
    "GET", "/v1/gpus/{model}/prices", scope="offers:read", query=prices.HistoryQuery, answers={200: PriceHistory}
)
async def show_prices(call: web.Call[Nothing, prices.HistoryQuery]) -> web.Answer:
    """Show what a GPU model cost over time, per GPU and hour."""
    async with call.transaction() as tx:
        return web.Answer(await prices.show_history(tx, call.path("model"), call.query))


@api.operation("GET", "/v1/providers", scope="offers:read", query=paging.Paged, answers={200: Page[ProviderView]})
async def list_providers(call: web.Call[Nothing, paging.Paged]) -> web.Answer:
    """List the providers: configured, healthy, how old their offers are, what they can do."""
    after = paging.read_cursor(call.query.cursor, str)
    async with call.transaction() as tx:
        return web.Answer(await domain.list_providers(tx, after[0] if after else None, call.query.limit))


@api.operation(
    "POST", "/v1/quotes", scope="offers:read", body=quotes.QuoteRequest, answers={201: Quote}, idempotent=True
)
async def make_quote(call: web.Call[quotes.QuoteRequest, NoQuery]) -> web.Answer:
    """Quote a price, firm for two minutes and one pod."""
    key = idempotency.Request(call.idempotency_key, "POST /v1/quotes", call.raw)
    async with call.transaction() as tx:
        quote, replayed = await quotes.make_quote(tx, call.body, key)
    return web.Answer(quote, 201, {"Idempotency-Replayed": "true"} if replayed else {})


@functions_framework.aio.http
async def offers(request: Request) -> web.Api:
    """The function."""
    del request
    return api
