"""What can be rented: filters, search, and the refresh of a provider's offers."""

import asyncio
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from decimal import Decimal
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from gpubroker import errors, gpus, inputs, outbox, paging, store
from gpubroker.events import OffersData, ProviderData
from gpubroker.money import LARGEST, InUsd, format_usd
from gpubroker.providers import registry
from gpubroker.providers.base import Provider, ProviderOffer
from gpubroker.resources import Gpu, Near, NoMatch, Offer, OfferPage, Page, ProviderView, Support
from gpubroker.store import catalog as refreshes
from gpubroker.store import offers as rows

log = logging.getLogger("gpubroker.offers")

_LIST_SECONDS: Final = 60
_MOST_SECONDS: Final = 10**9
_MOST_GB: Final = 10**7
_MOST_UNITS: Final = 4096
_NEAREST: Final = 3


def _split(value: object, info: ValidationInfo) -> object:
    """One text is a list of one; in a query, commas part values as well."""
    strict = bool(info.config and info.config.get("strict"))
    if isinstance(value, str):
        return [value] if strict else [part for part in value.split(",") if part]
    if isinstance(value, list) and not strict:
        return [part for text in value for part in (str(text).split(",") if text else [""])]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return value  # pyright: ignore[reportUnknownVariableType]


def _number(value: object, info: ValidationInfo) -> object:
    """A decimal number; in a query it is a text, in a body never."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, str) and not (info.config and info.config.get("strict")):
        if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", value):
            msg = "must be a number"
            raise ValueError(msg)
        return float(value)
    return value


def _upper(text: str) -> str:
    return text.upper()


Texts = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=80)]],
    BeforeValidator(_split),
    Field(min_length=1, max_length=32),
]
Count = Annotated[int, Field(ge=0, le=4096), inputs.Whole]
Size = Annotated[int, Field(ge=0, le=10**7), inputs.Whole]
Number = Annotated[float, Field(ge=0, le=10**7, allow_inf_nan=False), BeforeValidator(_number)]


class Filters(BaseModel):
    """What an offer must be. Sizes are 10^9 bytes, prices USD per hour for the whole offer."""

    gpu: Texts | None = Field(default=None, description="GPU models; h100 finds every H100.")
    gpu_count: Count | None = None
    min_gpu_count: Count | None = None
    min_vram_gb: Size | None = Field(default=None, description="Per GPU.")
    min_vcpus: Number | None = None
    min_ram_gb: Number | None = None
    min_disk_gb: Size | None = None
    provider: Texts | None = None
    region: Annotated[str, Field(min_length=1, max_length=80)] | None = Field(default=None, description="With * and ?.")
    country: Annotated[str, Field(pattern=r"^[A-Za-z]{2}$"), AfterValidator(_upper)] | None = None
    spot: Annotated[bool, inputs.Flag] | None = None
    max_price_usd_per_hour: InUsd | None = None
    max_price_usd_per_gpu_hour: InUsd | None = None
    supports: Annotated[list[Support], BeforeValidator(_split)] | None = None
    min_reliability: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_number)] | None = None


class Requirements(Filters):
    """The offers that a pod may use."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Sort = Literal[
    "price", "price_per_gpu", "price_per_vram_gb", "value", "-price", "-price_per_gpu", "-price_per_vram_gb", "-value"
]  # fmt: skip


class Search(Filters, paging.Paged):
    """A search of offers."""

    available: Annotated[bool, inputs.Flag] = Field(default=True, description="false: those not to be had now as well.")
    sort: Sort = "price"


async def search_offers(tx: store.Transaction, search: Search) -> OfferPage:
    """A page of offers, with the reason when it is empty. Raises Invalid for an unknown GPU model or a cursor of another search."""
    after = paging.read_cursor(search.cursor, str, int, str)
    if after is not None and after[0] != search.sort:
        raise inputs.invalid("?cursor", "belongs to a search with another sort")
    question = rows.Question(
        filters=read_filters(search, "?"),
        sort=search.sort.removeprefix("-"),
        descending=search.sort.startswith("-"),
        available=search.available,
        disk_gb=search.min_disk_gb or 0,
        after=(after[1], after[2]) if after else None,
        limit=search.limit + 1,
    )
    found = await rows.search(tx.conn, question)
    if not found and after is None:
        no_match = await explain(tx, question.filters, question.disk_gb)
        return OfferPage(items=[], no_match=no_match)
    shown = found[: search.limit]
    more = len(found) > search.limit
    cursor = paging.write_cursor(search.sort, shown[-1][0], shown[-1][1].id) if more else None
    return OfferPage(items=[offer for _, offer in shown], next_cursor=cursor)


async def explain(tx: store.Transaction, filters: Mapping[str, Any], disk_gb: int) -> NoMatch:
    """Why nothing matched: how many offers each filter leaves out, and the three that need the least change."""
    told = await rows.explain(tx.conn, filters, disk_gb, _NEAREST)
    nearest: list[Near] = []
    for near in told.nearest:
        offer = await rows.find_offer(tx.conn, near.offer_id)
        if offer is not None:
            nearest.append(Near(offer=offer, change={name: _change(name, offer, filters) for name in near.failed}))
    return NoMatch(considered=told.considered, removed_by=told.removed_by, nearest=nearest)


def _change(name: str, offer: Offer, filters: Mapping[str, Any]) -> object:
    """What a filter would have to be for this offer to pass."""
    if name == "supports":
        return [support for support in filters["supports"] if support in offer.supports]
    if name in ("max_price_usd_per_hour", "max_price_usd_per_gpu_hour"):
        price = offer.price_usd_per_hour if name == "max_price_usd_per_hour" else offer.price_usd_per_gpu_hour
        return None if price is None else format_usd(price)
    return getattr(offer, name.removeprefix("min_"))


async def show_offer(tx: store.Transaction, offer_id: str) -> Offer:
    """An offer, to be had now or not. Raises NotFound."""
    offer = await rows.find_offer(tx.conn, offer_id)
    if offer is None:
        raise errors.NotFound
    return offer


def read_filters(filters: Filters, root: str) -> dict[str, Any]:
    """The filters that were given, as the store takes them. `root` begins the pointers of what is wrong."""
    given = {name: value for name in rows.FILTERS if (value := getattr(filters, name)) is not None}
    if "gpu" in given:
        given["gpu"] = _ask_models(given["gpu"], root)
    if "region" in given:
        escaped = re.sub(r"([\\%_])", r"\\\1", given["region"])
        given["region"] = escaped.replace("*", "%").replace("?", "_")
    return given


def _ask_models(texts: list[str], root: str) -> list[str]:
    wanted: dict[str, None] = {}
    for text in texts:
        names = gpus.ask(text)
        if not names:
            raise inputs.invalid(f"{root}gpu", f"{text!r} is no GPU model known here", did_you_mean=gpus.nearest(text))
        wanted |= dict.fromkeys(names)
    return list(wanted)


async def list_gpus(tx: store.Transaction, after: str | None, limit: int) -> Page[Gpu]:
    """Every GPU model that is known or offered, by name, with who offers it and for how much now."""
    offered = {gpu.model: gpu for gpu in await rows.list_gpus(tx.conn)}
    known = {
        name: Gpu(model=name, vram_gb=model.vram_gb, providers=[], offers=0, lowest_usd_per_gpu_hour=None,
                  median_usd_per_gpu_hour=None)
        for name, model in gpus.models().items()
    }  # fmt: skip
    found = [gpu for _, gpu in sorted((known | offered).items()) if after is None or gpu.model > after]
    cursor = paging.write_cursor(found[limit - 1].model) if len(found) > limit else None
    return Page[Gpu](items=found[:limit], next_cursor=cursor)


async def list_providers(tx: store.Transaction) -> Page[ProviderView]:
    """Every provider there is: whether it is configured, how it does, and what it can do."""
    seen = {view.name: view for view in await rows.list_providers(tx.conn)}
    names = sorted({*registry.names(), *seen})
    return Page[ProviderView](items=[seen.get(name) or ProviderView.unconfigured(name) for name in names])


# Refreshing


async def refresh_offers(provider: Provider, tick_seconds: int) -> refreshes.Changes | None:
    """Make the provider's offers in the database what it says now; None when a refresh is not due yet.

    A provider that fails, or answers in part, loses no offer: they grow stale and say so.
    """
    capabilities = provider.capabilities
    every = max(capabilities.refresh_seconds, tick_seconds)
    identity = await asyncio.wait_for(provider.account(), capabilities.call_limit_seconds)
    async with store.worker() as tx:
        account_id = await refreshes.ensure_account(tx.conn, provider.name, identity, describe(provider), every * 3)
        begun = await refreshes.begin_refresh(tx.conn, account_id, max(1, capabilities.refresh_seconds - 1))
    if begun is None:
        return None
    refresh_id, began_at = begun
    try:
        listed = await asyncio.wait_for(provider.list_offers(), _LIST_SECONDS)
    except (errors.ProviderError, TimeoutError, OSError) as error:
        await _give_up(provider.name, account_id, refresh_id, f"{type(error).__name__}: {error}")
        raise
    offers = _read_offers(listed)
    async with store.worker() as tx:
        changes = await refreshes.merge_offers(tx.conn, account_id, provider.name, offers)
        await refreshes.end_refresh(
            tx.conn,
            refresh_id,
            complete=True,
            seen=len(listed),
            changed=changes.changed,
            quarantined=len(listed) - len(offers),
        )
        await refreshes.trust_account(tx.conn, account_id, began_at)
        if changes.changed or changes.gone:
            data = OffersData(provider=provider.name, seen=len(listed), changed=changes.changed, gone=changes.gone)
            await outbox.write(tx, "offers.refreshed", account_id, data, tenant=None, agent_id=None)
    return changes


async def _give_up(name: str, account_id: str, refresh_id: int, reason: str) -> None:
    async with store.worker() as tx:
        await refreshes.end_refresh(tx.conn, refresh_id, complete=False, error=reason[:500])
        if await refreshes.doubt_account(tx.conn, account_id, reason):
            data = ProviderData(provider=name, account_id=account_id, reason="its offers could not be refreshed")
            await outbox.write(tx, "provider.unhealthy", account_id, data, tenant=None, agent_id=None)


def describe(provider: Provider) -> dict[str, object]:
    """A provider's capabilities, as its account's row carries them."""
    described: dict[str, object] = asdict(provider.capabilities)
    described["supports"] = sorted(provider.capabilities.supports)
    return described


def _read_offers(listed: Sequence[ProviderOffer]) -> list[refreshes.NewOffer]:
    """What a provider lists, without what cannot be; of an offer that is listed twice the cheaper."""
    cheapest: dict[tuple[str, str, bool], ProviderOffer] = {}
    for offer in filter(_is_possible, listed):
        first = cheapest.setdefault((offer.provider_offer_id, offer.region, offer.spot), offer)
        if offer.price_micro_h < first.price_micro_h:
            cheapest[offer.provider_offer_id, offer.region, offer.spot] = offer
    return [_read_offer(offer) for offer in cheapest.values()]


def _is_possible(offer: ProviderOffer) -> bool:
    return (
        0 < offer.price_micro_h <= LARGEST // 10_000
        and 0 <= offer.disk_micro_gb_h <= LARGEST // _MOST_GB
        and 0 <= (offer.stopped_micro_h or 0) <= LARGEST // 10_000
        and 0 <= offer.gpu_count <= _MOST_UNITS
        and 0 <= offer.vcpus < _MOST_UNITS
        and all(0 <= size <= _MOST_GB for size in (offer.ram_gb, offer.disk_gb, offer.disk_base_gb, offer.vram_gb or 0))
        and 0 <= offer.min_billing_s <= _MOST_SECONDS
        and 0 < offer.increment_s <= _MOST_SECONDS
    )


def _read_offer(offer: ProviderOffer) -> refreshes.NewOffer:
    model = gpus.recognise(offer.gpu, offer.vram_gb) if offer.gpu else None
    values: dict[str, Any] = {name: getattr(offer, name, None) for name in refreshes.NewOffer.__slots__}
    values |= {"supports": sorted(offer.supports), "quarantined": None}
    if model is not None:
        values |= {"gpu": model.name, "vram_gb": model.vram_gb}
    return refreshes.NewOffer(**values)
