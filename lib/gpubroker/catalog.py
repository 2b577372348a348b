"""The catalogue: every provider's offers, refreshed side by side, so that none waits for another."""

import asyncio
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import lru_cache
from statistics import median_low
from struct import Struct
from typing import Final

from gpubroker import config, errors, gpus, outbox, store
from gpubroker.events import OffersData, ProviderData
from gpubroker.money import LARGEST, format_usd
from gpubroker.providers import registry
from gpubroker.providers.base import Provider, ProviderOffer, Support
from gpubroker.providers.registry import Adapters
from gpubroker.store import catalog as rows

log = logging.getLogger("gpubroker.catalog")

_LIST_SECONDS: Final = 60
_MOST_SECONDS: Final = 10**9
_MOST_GB: Final = 10**7
_MOST_UNITS: Final = 4096
_MOST_MICRO: Final = LARGEST // 10_000
_LONGEST_TEXT: Final = 500
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_SINGLE: Final = Struct("f")
_TURN: Final = 25
"""Offers that are read at once; then others of this process, who may be searching, have their turn."""
_FEW: Final = 3
"""Offers of a model that make its median worth something."""
_FAR: Final = 10
"""A price so many times off the median of its model is more likely a mistake than a bargain (skypilot#4904, #3794)."""


class Round:
    """Refreshes that run together: one works at a time, so that searches go on, and all doubt prices by the same medians."""

    def __init__(self) -> None:
        self.gate = asyncio.Lock()
        """Held while a listing is read and written; the vendors are asked outside, all at once."""
        self._medians: Mapping[str, int] | None = None

    async def read_medians(self) -> Mapping[str, int]:
        """The medians of before: what a vendor lists in this round moves none."""
        if self._medians is None:
            async with store.worker() as tx:
                self._medians = await rows.read_medians(tx.conn, _FEW)
        return self._medians


async def refresh_all(adapters: Adapters) -> dict[str, str]:
    """Refresh every provider that is on and due. Says of each what came of it, in a line."""
    names = registry.enabled(config.settings())
    together = Round()
    said = await asyncio.gather(*(_refresh(adapters, name, together) for name in names))
    return dict(zip(names, said, strict=True))


async def _refresh(adapters: Adapters, name: str, together: Round) -> str:
    try:
        changes = await refresh_offers(adapters.get(name), config.settings().tick_seconds, together)
    except (errors.GpubrokerError, TimeoutError, OSError) as error:
        log.warning("the offers of %s were not refreshed: %s %s", name, type(error).__name__, error)
        return f"failed: {type(error).__name__} {error}"
    except Exception as error:
        log.exception("the offers of %s were not refreshed", name)
        return f"failed: {type(error).__name__}"
    return "not due" if changes is None else f"{changes.changed} changed, {changes.gone} gone"


async def refresh_offers(provider: Provider, tick_seconds: int, together: Round | None = None) -> rows.Changes | None:
    """Make the provider's offers in the database what it says now; None when a refresh is not due, or a later one was faster.

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
    refresh_id, _ = begun
    try:
        listed = await asyncio.wait_for(provider.list_offers(), _LIST_SECONDS)
    except (errors.ProviderError, TimeoutError, OSError) as error:
        await _give_up(provider.name, account_id, refresh_id, f"{type(error).__name__}: {error}")
        raise
    try:
        return await _write_offers(provider, account_id, begun, listed, together or Round())
    except errors.Unavailable:  # our database, of which the provider knows nothing
        raise
    except Exception as error:
        await _give_up(provider.name, account_id, refresh_id, f"they could not be written: {type(error).__name__}")
        raise


async def _write_offers(
    provider: Provider, account_id: str, begun: tuple[int, datetime], listed: Sequence[ProviderOffer], together: Round
) -> rows.Changes | None:
    refresh_id, began_at = begun
    async with together.gate:
        medians = None if provider.capabilities.priced_by_operator else await together.read_medians()
        offers = await _read_offers(listed, medians)
        async with store.worker(store.BY_INDEX) as tx:
            if not await rows.claim_offers(tx.conn, account_id, began_at):
                why = "a later one was faster"
                await rows.end_refresh(tx.conn, refresh_id, complete=False, seen=len(listed), error=why)
                return None
            changes = await rows.merge_offers(tx.conn, account_id, provider.name, offers)
            doubted = len(listed) - sum(offer.quarantined is None for offer in offers)
            await rows.end_refresh(
                tx.conn, refresh_id, complete=True, seen=len(listed), changed=changes.changed, quarantined=doubted
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


async def _read_offers(listed: Sequence[ProviderOffer], medians: Mapping[str, int] | None) -> list[rows.NewOffer]:
    """What a provider lists, without what cannot be; of an offer that is listed twice the cheaper.

    What can be but is not to be believed is kept in quarantine, where nobody finds it. Without medians all is believed.
    """
    cheapest: dict[rows.Key, rows.NewOffer] = {}
    for start in range(0, len(listed), _TURN):
        for offer in map(_read_offer, filter(_is_possible, listed[start : start + _TURN])):
            first = cheapest.setdefault(rows.KEY(offer), offer)
            if offer.price_micro_h < first.price_micro_h:
                cheapest[rows.KEY(offer)] = offer
        await asyncio.sleep(0)
    read = list(cheapest.values())
    if medians is None:
        return read
    known = {**_find_medians([offer for offer in read if offer.gpu not in medians]), **medians}
    for start in range(0, len(read), _TURN):
        read[start : start + _TURN] = [_doubt_offer(offer, known) for offer in read[start : start + _TURN]]
        await asyncio.sleep(0)
    return read


def _find_medians(offers: Sequence[rows.NewOffer]) -> dict[str, int]:
    """The medians of a listing itself: of models that nobody offered before."""
    prices: dict[str, list[int]] = {}
    for offer in offers:
        if offer.gpu and offer.gpu_count and offer.quarantined is None:
            prices.setdefault(offer.gpu, []).append(offer.price_micro_h // offer.gpu_count)
    return {gpu: median_low(found) for gpu, found in prices.items() if len(found) >= _FEW}


def _doubt_offer(offer: rows.NewOffer, medians: Mapping[str, int]) -> rows.NewOffer:
    median = medians.get(offer.gpu or "")
    if not median or not offer.gpu_count or offer.quarantined:
        return offer
    price = offer.price_micro_h / offer.gpu_count
    if median / _FAR < price < median * _FAR:
        return offer
    shown = format_usd(round(price)), offer.gpu, format_usd(median)
    return offer._replace(quarantined="{} USD per GPU and hour, where the median of {} is {}".format(*shown))


def _is_possible(offer: ProviderOffer) -> bool:
    return (
        0 < offer.price_micro_h <= _MOST_MICRO
        and 0 <= offer.disk_micro_gb_h <= LARGEST // _MOST_GB
        and 0 <= offer.stopped_disk_micro_gb_h <= LARGEST // _MOST_GB
        and 0 <= (offer.stopped_micro_h or 0) <= _MOST_MICRO
        and 0 <= offer.gpu_count <= _MOST_UNITS
        and 0 <= offer.vcpus < _MOST_UNITS
        and 0 <= offer.ram_gb <= _MOST_GB - 1
        and 0 <= offer.disk_gb <= _MOST_GB
        and 0 <= offer.disk_base_gb <= _MOST_GB
        and 0 <= (offer.vram_gb or 0) * max(1, offer.gpu_count) <= _MOST_GB
        and 0 <= offer.min_billing_s <= _MOST_SECONDS
        and 0 < offer.increment_s <= _MOST_SECONDS
        and _is_text(f"{offer.provider_offer_id}{offer.region}{offer.gpu}{offer.country}{offer.currency}")
    )


def _is_text(text: str) -> bool:
    """Say whether PostgreSQL takes it: short enough for an index, no NUL, no half of a character."""
    if len(text) > _LONGEST_TEXT or "\0" in text:
        return False
    return text.isascii() or not _SURROGATE.search(text)


@lru_cache(256)
def _write_supports(supports: frozenset[Support]) -> str:
    return ",".join(sorted(supports))


def _read_offer(offer: ProviderOffer) -> rows.NewOffer:
    model = gpus.recognise(offer.gpu, offer.vram_gb) if offer.gpu else None
    is_told = offer.reliability is not None and 0 <= offer.reliability <= 1
    return rows.NewOffer(
        provider_offer_id=offer.provider_offer_id,
        gpu=model.name if model else offer.gpu,
        gpu_count=offer.gpu_count,
        vram_gb=model.vram_gb if model else offer.vram_gb,
        vcpus=round(offer.vcpus, 2),
        ram_gb=round(offer.ram_gb, 1),
        disk_gb=offer.disk_gb,
        disk_base_gb=offer.disk_base_gb,
        disk_micro_gb_h=offer.disk_micro_gb_h,
        region=offer.region,
        country=offer.country,
        spot=offer.spot,
        price_micro_h=offer.price_micro_h,
        stopped_micro_h=offer.stopped_micro_h,
        stopped_disk_micro_gb_h=offer.stopped_disk_micro_gb_h,
        min_billing_s=offer.min_billing_s,
        increment_s=offer.increment_s,
        supports=_write_supports(offer.supports),
        reliability=_SINGLE.unpack(_SINGLE.pack(offer.reliability))[0] if is_told else None,
        availability=offer.availability,
        quarantined=None if offer.currency == "USD" else f"priced in {offer.currency[:16]}",
    )
