"""The catalogue: every provider's offers, refreshed side by side, so that none waits for another."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import asdict
from statistics import median_low
from typing import Any, Final

from gpubroker import config, errors, gpus, outbox, store
from gpubroker.events import OffersData, ProviderData
from gpubroker.money import LARGEST, format_usd
from gpubroker.providers import registry
from gpubroker.providers.base import Provider, ProviderOffer
from gpubroker.providers.registry import Adapters
from gpubroker.store import catalog as rows

log = logging.getLogger("gpubroker.catalog")

_LIST_SECONDS: Final = 60
_MOST_SECONDS: Final = 10**9
_MOST_GB: Final = 10**7
_MOST_UNITS: Final = 4096
_FEW: Final = 3
"""Offers of a model that make its median worth something."""
_FAR: Final = 10
"""A price so many times off the median of its model is more likely a mistake than a bargain (skypilot#4904, #3794)."""


async def refresh_all(adapters: Adapters) -> dict[str, str]:
    """Refresh every provider that is on and due. Says of each what came of it, in a line."""
    names = registry.enabled(config.settings())
    gate = asyncio.Semaphore(max(1, config.settings().pool_size // 2))
    said = await asyncio.gather(*(_refresh(adapters, name, gate) for name in names))
    return dict(zip(names, said, strict=True))


async def _refresh(adapters: Adapters, name: str, gate: asyncio.Semaphore) -> str:
    try:
        changes = await refresh_offers(adapters.get(name), config.settings().tick_seconds, gate)
    except (errors.GpubrokerError, TimeoutError, OSError) as error:
        log.warning("the offers of %s were not refreshed: %s %s", name, type(error).__name__, error)
        return f"failed: {type(error).__name__} {error}"
    return "not due" if changes is None else f"{changes.changed} changed, {changes.gone} gone"


async def refresh_offers(
    provider: Provider, tick_seconds: int, gate: AbstractAsyncContextManager[object] | None = None
) -> rows.Changes | None:
    """Make the provider's offers in the database what it says now; None when a refresh is not due yet.

    A provider that fails, or answers in part, loses no offer: they grow stale and say so. Large listings are written through
    `gate`, so that they do not take all connections; asking the vendor needs none.
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
    async with gate or nullcontext(), store.worker() as tx:
        medians = None if capabilities.priced_by_operator else await rows.read_medians(tx.conn, _FEW)
        offers = _read_offers(listed, medians)
        changes = await rows.merge_offers(tx.conn, account_id, provider.name, offers)
        await rows.end_refresh(
            tx.conn,
            refresh_id,
            complete=True,
            seen=len(listed),
            changed=changes.changed,
            quarantined=len(listed) - sum(offer.quarantined is None for offer in offers),
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


def _read_offers(listed: Sequence[ProviderOffer], medians: Mapping[str, int] | None) -> list[rows.NewOffer]:
    """What a provider lists, without what cannot be; of an offer that is listed twice the cheaper.

    What can be but is not to be believed is kept in quarantine, where nobody finds it. Without medians all is believed.
    """
    cheapest: dict[tuple[str, str, bool], ProviderOffer] = {}
    for offer in filter(_is_possible, listed):
        first = cheapest.setdefault((offer.provider_offer_id, offer.region, offer.spot), offer)
        if offer.price_micro_h < first.price_micro_h:
            cheapest[offer.provider_offer_id, offer.region, offer.spot] = offer
    read = [_read_offer(offer) for offer in cheapest.values()]
    if medians is None:
        return read
    known = {**_find_medians(read), **medians}
    return [offer._replace(quarantined=offer.quarantined or _doubt_price(offer, known)) for offer in read]


def _find_medians(offers: Sequence[rows.NewOffer]) -> dict[str, int]:
    """The medians of a listing itself: of models that nobody offered before."""
    prices: dict[str, list[int]] = {}
    for offer in offers:
        if offer.gpu and offer.gpu_count and offer.quarantined is None:
            prices.setdefault(offer.gpu, []).append(offer.price_micro_h // offer.gpu_count)
    return {gpu: median_low(found) for gpu, found in prices.items() if len(found) >= _FEW}


def _doubt_price(offer: rows.NewOffer, medians: Mapping[str, int]) -> str | None:
    median = medians.get(offer.gpu or "")
    if not median or not offer.gpu_count:
        return None
    price = offer.price_micro_h / offer.gpu_count
    if median / _FAR < price < median * _FAR:
        return None
    return f"{format_usd(round(price))} USD per GPU and hour, where the median of {offer.gpu} is {format_usd(median)}"


def _is_possible(offer: ProviderOffer) -> bool:
    return (
        0 < offer.price_micro_h <= LARGEST // 10_000
        and 0 <= offer.disk_micro_gb_h <= LARGEST // _MOST_GB
        and 0 <= offer.stopped_disk_micro_gb_h <= LARGEST // _MOST_GB
        and 0 <= (offer.stopped_micro_h or 0) <= LARGEST // 10_000
        and 0 <= offer.gpu_count <= _MOST_UNITS
        and 0 <= offer.vcpus < _MOST_UNITS
        and all(0 <= size <= _MOST_GB for size in (offer.ram_gb, offer.disk_gb, offer.disk_base_gb, offer.vram_gb or 0))
        and 0 <= offer.min_billing_s <= _MOST_SECONDS
        and 0 < offer.increment_s <= _MOST_SECONDS
    )


def _read_offer(offer: ProviderOffer) -> rows.NewOffer:
    model = gpus.recognise(offer.gpu, offer.vram_gb) if offer.gpu else None
    values: dict[str, Any] = {name: getattr(offer, name, None) for name in rows.NewOffer._fields}
    quarantined = None if offer.currency == "USD" else f"priced in {offer.currency[:16]}"
    values |= {"supports": sorted(offer.supports), "quarantined": quarantined}
    if model is not None:
        values |= {"gpu": model.name, "vram_gb": model.vram_gb}
    return rows.NewOffer(**values)
