"""The sweep: one complete listing of each account, held against what we know.

It lists first and reads attempts then, so that whatever it finds had its attempt committed before. Every instance with a
reference of our owner is one live pod's, or is ended; anything without our owner is never touched (DESIGN 7).
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from gpubroker import config, errors, outbox, provisioning, sightings, store
from gpubroker.catalog import describe
from gpubroker.events import ProviderData
from gpubroker.providers import base
from gpubroker.providers.registry import Adapters
from gpubroker.store import billing as billing_rows
from gpubroker.store import catalog as refreshes
from gpubroker.store import instances as rows
from gpubroker.store.instances import InstanceRow

log = logging.getLogger("gpubroker.sweep")

LIST_SECONDS: Final = 60
_DISTRUST_SECONDS: Final = 30 * 60
_FEW: Final = 3


@dataclass(frozen=True, slots=True)
class Listing:
    """What one provider account listed, complete, and when that was asked for."""

    account_id: str
    provider: base.Provider
    began_at: datetime
    instances: Sequence[base.Instance]

    @property
    def present(self) -> set[str]:
        """The provider's names of those that are there: some list what is terminal, too, for a while."""
        return {instance.id for instance in self.instances if instance.life != "gone"}


async def sweep(adapters: Adapters, name: str) -> None:
    """Sweep one provider's account. What fails is noted and believed to say nothing."""
    provider = adapters.get(name)
    capabilities = provider.capabilities
    identity = await asyncio.wait_for(provider.account(), capabilities.call_limit_seconds)
    async with store.worker() as tx:
        every = max(capabilities.refresh_seconds, config.settings().tick_seconds)
        account_id = await refreshes.ensure_account(tx.conn, name, identity, describe(provider), every * 3)
        began_at = await rows.begin_listing(tx.conn, account_id, LIST_SECONDS * 2)
    if began_at is None:
        return
    listing = await _list(account_id, provider, began_at)
    if listing is not None:
        await _take_in(listing)
        await _end_strays(listing)


async def _list(account_id: str, provider: base.Provider, began_at: datetime) -> Listing | None:
    owner = config.settings().owner or ""
    try:
        listed = await asyncio.wait_for(provider.list_managed(owner), LIST_SECONDS)
    except (errors.ProviderError, TimeoutError, OSError) as error:
        log.warning("the listing of %s failed: %s %s", provider.name, type(error).__name__, error)
        async with store.worker() as tx:
            await rows.end_listing(
                tx.conn, account_id, began_at, complete=False, error=f"{type(error).__name__}: {error}"
            )
        return None
    ours = [instance for instance in listed if instance.ref is not None and instance.ref.startswith(f"gb-{owner}-")]
    async with store.worker() as tx:
        await rows.end_listing(tx.conn, account_id, began_at, complete=True, instances=len(ours))
    return Listing(account_id, provider, began_at, ours)


async def _take_in(listing: Listing) -> None:
    async with store.worker() as tx:
        known = await rows.list_present(tx.conn, listing.account_id)
        lag = listing.provider.capabilities.visibility_lag_seconds
        expected = await rows.list_expected(tx.conn, listing.account_id, listing.began_at, lag)
        trusted = await rows.is_trusted(tx.conn, listing.account_id)
    by_id = {instance.provider_instance_id: instance for instance in known}
    for seen in listing.instances:
        await _meet(listing, by_id.get(seen.id), seen)
    missing = [i for i in known if i.id in expected and i.provider_instance_id not in listing.present]
    live = [i for i in known if i.role == "live" and expected.get(i.id) == "wanted"]
    vanished = [i for i in live if i.provider_instance_id not in listing.present and i.missed_since is None]
    if len(live) >= _FEW and len(vanished) * 2 > len(live):
        await _distrust(listing, f"{len(vanished)} of {len(live)} live instances vanished at once", is_new=trusted)
        trusted = False
    for instance in missing if trusted else vanished:  # what is not believed is looked at all the same
        await _miss(listing, instance, counts=trusted)


async def _meet(listing: Listing, known: InstanceRow | None, seen: base.Instance) -> None:
    """One listed instance: seen again, adopted, or a stray."""
    async with store.worker() as tx:
        if known is not None and known.role == "live":
            await _see(tx, listing, known, seen)
            return
        if known is not None:
            if seen.life != "gone":
                await rows.save_instance(tx.conn, replace(known, seen_at=listing.began_at, misses=0, missed_since=None))
            return
        attempt = await rows.find_attempt(tx.conn, seen.ref or "")
        if attempt is not None:
            await provisioning.adopt(tx, attempt, seen.id, seen, listing.began_at)
            return
        if seen.life == "gone":
            return
        log.warning("%s lists %s with a reference of ours that no attempt has", listing.provider.name, seen.id)
        stray = await rows.add_instance(tx.conn, listing.account_id, seen.id, "stray", listing.began_at, ref=seen.ref)
        if stray.gone_at is not None and stray.gone_at < listing.began_at:
            stray = await sightings.revive(tx, stray, listing.began_at)
        await sightings.charge_installation(tx, stray, None)


async def _see(tx: store.Transaction, listing: Listing, known: InstanceRow, seen: base.Instance) -> None:
    scene = await _lock_scene(tx, known)
    if scene is None:
        return
    after = await sightings.observe(scene, seen, listing.began_at)
    if after.pod.state != scene.pod.state or after.instance.life != scene.instance.life:
        await provisioning.plan_after(after)


async def _miss(listing: Listing, known: InstanceRow, *, counts: bool = True) -> None:
    """A complete listing without it: one grain of evidence, where listings count. A look at it decides."""
    async with store.worker() as tx:
        if known.role == "stray":
            since = known.missed_since or listing.began_at
            is_told = known.terminate_sent_at is not None and known.terminate_sent_at < listing.began_at
            is_lost = known.misses + 1 >= sightings.MANY_LISTINGS and listing.began_at - since >= sightings.LONG_SILENCE
            if is_told or is_lost:
                ended = known.seen_at or known.known_at
                await rows.mark_gone(
                    tx.conn, known.id, ended, {"kind": "stray", "listing_without": listing.began_at.isoformat()}
                )
                await billing_rows.bill(tx.conn, known.id, ended)
            else:
                await rows.save_instance(tx.conn, replace(known, misses=known.misses + 1, missed_since=since))
            return
        scene = await _lock_scene(tx, known)
        if scene is None:
            return
        fresh = scene.instance
        # A look or a terminate since then knows better: the listing may have been made before or after it.
        if any(at is not None and at > listing.began_at for at in (fresh.seen_at, fresh.terminate_sent_at)):
            return
        since = fresh.missed_since if fresh.missed_since is not None and fresh.misses else listing.began_at
        missed = replace(fresh, misses=fresh.misses + int(counts), missed_since=since)
        await rows.save_instance(tx.conn, missed)
        if scene.pod.wanted != "gone":
            await rows.wake_for_look(tx.conn, scene.pod.id)


async def _lock_scene(tx: store.Transaction, known: InstanceRow) -> sightings.Scene | None:
    pod = await rows.lock_pod(tx.conn, known.pod_id or "")
    attempts = await rows.list_attempts(tx.conn, pod.id)
    maker = next((attempt for attempt in attempts if attempt.id == known.attempt_id), None)
    instance = await rows.lock_instance(tx.conn, known.account_id, known.provider_instance_id)
    if maker is None or instance is None or instance.gone_at is not None or instance.role != "live":
        return None
    return sightings.Scene(tx, pod, maker, instance)


async def _distrust(listing: Listing, reason: str, *, is_new: bool) -> None:
    log.error("%s: %s; no absence is believed for half an hour", listing.provider.name, reason)
    async with store.worker() as tx:
        await rows.distrust_account(tx.conn, listing.account_id, _DISTRUST_SECONDS)
        if not is_new:
            return
        data = ProviderData(provider=listing.provider.name, account_id=listing.account_id, reason=reason)
        await outbox.write(tx, "provider.unhealthy", listing.account_id, data, tenant=None, agent_id=None)


async def _end_strays(listing: Listing) -> None:
    """End what is nobody's: of a known attempt at once, of an unknown reference on a later sweep and after the grace.

    Unless there are so many of these that the database itself must be doubted.
    """
    async with store.worker() as tx:
        present = await rows.list_present(tx.conn, listing.account_id)
    strays = [
        i
        for i in present
        if i.role == "stray"
        and (i.provider_instance_id in listing.present or (i.attempt_id is not None and i.terminate_sent_at is None))
    ]
    unknown = [i for i in strays if i.attempt_id is None]
    if len(unknown) > max(_FEW, len(listing.instances) // 5):
        log.error(
            "%s: %d instances carry references of ours that no attempt has: was the database restored? None is ended",
            listing.provider.name, len(unknown),
        )  # fmt: skip
        strays = [i for i in strays if i.attempt_id is not None]
    grace = timedelta(seconds=config.settings().stray_grace_seconds)
    for stray in strays:
        is_ripe = stray.attempt_id is not None or (
            stray.known_at < listing.began_at and stray.known_at + grace <= listing.began_at
        )
        if is_ripe:
            await _end_stray(listing, stray)


async def _end_stray(listing: Listing, stray: InstanceRow) -> None:
    provider, name = listing.provider, stray.provider_instance_id
    seconds = provider.capabilities.call_limit_seconds
    seen = None
    try:
        with contextlib.suppress(errors.InstanceNotFound):
            await asyncio.wait_for(provider.terminate(name), seconds)
        with contextlib.suppress(errors.InstanceNotFound):
            if provider.capabilities.terminal_is_final:
                seen = await asyncio.wait_for(provider.get(name), seconds)
    except (errors.ProviderError, TimeoutError, OSError) as error:
        log.warning("stray %s of %s was not ended yet: %s", name, provider.name, type(error).__name__)
        return
    log.info("stray %s of %s was told to end", name, provider.name)
    async with store.worker() as tx:
        fresh = await rows.lock_instance(tx.conn, stray.account_id, name)
        if fresh is None or fresh.gone_at is not None:
            return
        now = await store.read_instant(tx.conn)
        if seen is not None and seen.life == "gone":
            ended = min(seen.ended_at or now, now)
            await rows.mark_gone(tx.conn, fresh.id, ended, {"kind": "final", "said": seen.status})
            await billing_rows.bill(tx.conn, fresh.id, ended)
        else:
            await rows.save_instance(
                tx.conn, replace(fresh, terminate_sent_at=fresh.terminate_sent_at or now, commanded_at=now)
            )
