"""What can be rented: filters, search, and the refresh of a provider's offers."""

import asyncio
import logging
import re
from dataclasses import asdict
from decimal import Decimal
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from gpubroker import errors, gpus, inputs, outbox, paging, store
from gpubroker.events import OffersData, ProviderData
from gpubroker.money import LARGEST, InUsd
from gpubroker.providers.base import Provider, ProviderOffer
from gpubroker.resources import Offer, Page, Support
from gpubroker.store import offers as rows

log = logging.getLogger("gpubroker.offers")

_LIST_SECONDS: Final = 60
_MOST_SECONDS: Final = 10**9


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
Count = Annotated[int, inputs.Whole, Field(ge=0, le=4096)]
Size = Annotated[int, inputs.Whole, Field(ge=0, le=10**7)]
Number = Annotated[float, BeforeValidator(_number), Field(ge=0, le=10**7, allow_inf_nan=False)]


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
    min_reliability: Annotated[float, BeforeValidator(_number), Field(ge=0, le=1, allow_inf_nan=False)] | None = None


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


async def search_offers(tx: store.Transaction, search: Search) -> Page[Offer]:
    """A page of offers. Raises Invalid for an unknown GPU model or a cursor of another search."""
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
    shown = found[: search.limit]
    more = len(found) > search.limit
    cursor = paging.write_cursor(search.sort, shown[-1][0], shown[-1][1].id) if more else None
    return Page[Offer](items=[offer for _, offer in shown], next_cursor=cursor)


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


# Refreshing


async def refresh_offers(provider: Provider, tick_seconds: int) -> rows.Changes | None:
    """Make the provider's offers in the database what it says now; None when a refresh is not due yet.

    A provider that fails, or answers in part, loses no offer: they grow stale and say so.
    """
    capabilities = provider.capabilities
    every = max(capabilities.refresh_seconds, tick_seconds)
    identity = await asyncio.wait_for(provider.account(), capabilities.call_limit_seconds)
    async with store.worker() as tx:
        account_id = await rows.ensure_account(tx.conn, provider.name, identity, describe(provider), every * 3)
        begun = await rows.begin_refresh(tx.conn, account_id, max(1, capabilities.refresh_seconds - 1))
    if begun is None:
        return None
    refresh_id, began_at = begun
    try:
        listed = await asyncio.wait_for(provider.list_offers(), _LIST_SECONDS)
    except (errors.ProviderError, TimeoutError, OSError) as error:
        await _give_up(provider.name, account_id, refresh_id, f"{type(error).__name__}: {error}")
        raise
    offers = [offer for offer in map(_read_offer, listed) if offer is not None]
    async with store.worker() as tx:
        changes = await rows.merge_offers(tx.conn, account_id, provider.name, offers)
        await rows.end_refresh(
            tx.conn,
            refresh_id,
            complete=True,
            seen=len(listed),
            changed=changes.changed,
            quarantined=len(listed) - len(offers),
        )
        await rows.trust_account(tx.conn, account_id, began_at)
        if changes.changed or changes.gone:
            data = OffersData(provider=provider.name, seen=len(listed), changed=changes.changed, gone=changes.gone)
            await outbox.write(tx, "offers.refreshed", account_id, data, tenant=None, agent_id=None)
    return changes


async def _give_up(name: str, account_id: str, refresh_id: int, reason: str) -> None:
    async with store.worker() as tx:
        await rows.end_refresh(tx.conn, refresh_id, complete=False, error=reason[:500])
        if await rows.doubt_account(tx.conn, account_id, reason):
            data = ProviderData(provider=name, account_id=account_id, reason="its offers could not be refreshed")
            await outbox.write(tx, "provider.unhealthy", account_id, data, tenant=None, agent_id=None)


def describe(provider: Provider) -> dict[str, object]:
    """A provider's capabilities, as its account's row carries them."""
    described: dict[str, object] = asdict(provider.capabilities)
    described["supports"] = sorted(provider.capabilities.supports)
    return described


def _read_offer(offer: ProviderOffer) -> rows.NewOffer | None:
    if not 0 < offer.price_micro_h <= LARGEST // 10_000:
        return None
    model = gpus.recognise(offer.gpu, offer.vram_gb) if offer.gpu else None
    values: dict[str, Any] = {name: getattr(offer, name, None) for name in rows.NewOffer.__slots__}
    values |= {"supports": sorted(offer.supports), "quarantined": None}
    if model is not None:
        values |= {"gpu": model.name, "vram_gb": model.vram_gb}
    return rows.NewOffer(**values)
