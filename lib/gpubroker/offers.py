"""What can be rented: filters, search, and the refresh of a provider's offers."""

import logging
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from gpubroker import errors, inputs, paging, store
from gpubroker.money import InUsd, format_usd
from gpubroker.resources import Page, Support
from gpubroker.resources.offers import Gpu, Near, NoMatch, Offer, OfferPage, ProviderView
from gpubroker.store import offers as rows

log = logging.getLogger("gpubroker.offers")

_LIST_SECONDS: Final = 60
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

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)


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
        filters=await read_filters(tx, search, "?"),
        sort=search.sort.removeprefix("-"),
        descending=search.sort.startswith("-"),
        available=search.available,
        disk_gb=search.min_disk_gb or 0,
        after=(after[1], after[2]) if after else None,
        limit=search.limit + 1,
    )
    found = await rows.search(tx.conn, question)
    if not found and after is None:
        no_match = await explain(tx, question.filters, question.disk_gb, available=question.available)
        return OfferPage(items=[], no_match=no_match)
    shown = found[: search.limit]
    more = len(found) > search.limit
    cursor = paging.write_cursor(search.sort, shown[-1][0], shown[-1][1].id) if more else None
    return OfferPage(items=[offer for _, offer in shown], next_cursor=cursor)


async def explain(
    tx: store.Transaction, filters: Mapping[str, Any], disk_gb: int, *, available: bool = True
) -> NoMatch:
    """Why nothing matched: how many offers each filter leaves out, and the three that need the least change."""
    told = await rows.explain(tx.conn, filters, disk_gb, _NEAREST, available=available)
    nearest: list[Near] = []
    for near in told.nearest:
        offer = await rows.find_offer(tx.conn, near.offer_id, disk_gb)
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


async def read_filters(tx: store.Transaction, filters: Filters, root: str) -> dict[str, Any]:
    """The filters that were given, as the store takes them. `root` begins the pointers of what is wrong."""
    given = {name: value for name in rows.FILTERS if (value := getattr(filters, name)) is not None}
    if "gpu" in given:
        given["gpu"] = await _ask_models(tx, given["gpu"], root)
    if "region" in given:
        escaped = re.sub(r"([\\%_])", r"\\\1", given["region"])
        given["region"] = escaped.replace("*", "%").replace("?", "_")
    return given


async def _ask_models(tx: store.Transaction, texts: list[str], root: str) -> list[str]:
    from gpubroker import gpus  # noqa: PLC0415 - many searches name no model

    wanted: dict[str, None] = {}
    for text in texts:
        names = gpus.ask(text) or await rows.list_called(tx.conn, gpus.compact(text))
        if not names:
            raise inputs.invalid(f"{root}gpu", f"{text!r} is no GPU model known here", did_you_mean=gpus.nearest(text))
        wanted |= dict.fromkeys(names)
    return list(wanted)


async def list_gpus(tx: store.Transaction, after: str | None, limit: int) -> Page[Gpu]:
    """Every GPU model that is known or offered, by name, with who offers it and for how much now."""
    from gpubroker import gpus  # noqa: PLC0415 - as below

    offered = {gpu.model: gpu for gpu in await rows.list_gpus(tx.conn)}
    known = {
        name: Gpu(model=name, vram_gb=model.vram_gb, providers=[], offers=0, lowest_usd_per_gpu_hour=None,
                  median_usd_per_gpu_hour=None)
        for name, model in gpus.models().items()
    }  # fmt: skip
    found = [gpu for _, gpu in sorted((known | offered).items()) if after is None or gpu.model > after]
    cursor = paging.write_cursor(found[limit - 1].model) if len(found) > limit else None
    return Page[Gpu](items=found[:limit], next_cursor=cursor)


async def list_providers(tx: store.Transaction, after: str | None, limit: int) -> Page[ProviderView]:
    """Every provider there is: whether it is configured, how it does, and what it can do."""
    from gpubroker.providers import registry  # noqa: PLC0415 - few ask for this
    from gpubroker.providers.http import breakers  # noqa: PLC0415 - as above

    seen = {view.name: view for view in await rows.list_providers(tx.conn)}
    states = await breakers.read_states(seen) or {}
    views = [view.model_copy(update={"breakers": states.get(name)}) for name, view in seen.items()]
    views += [ProviderView.unconfigured(name) for name in registry.names() if name not in seen]
    found = sorted((view for view in views if after is None or view.name > after), key=lambda view: view.name)
    cursor = paging.write_cursor(found[limit - 1].name) if len(found) > limit else None
    return Page[ProviderView](items=found[:limit], next_cursor=cursor)
