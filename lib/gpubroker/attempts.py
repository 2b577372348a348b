"""Attempts: what is asked of a provider under which reference, and what becomes of it when no instance comes of it."""

import json
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final

import psycopg

from gpubroker import config, errors, holds, sealing, sightings, store
from gpubroker.ids import base36
from gpubroker.money import cost
from gpubroker.providers import base
from gpubroker.steps import NO_TURN, Work
from gpubroker.store import billing as billing_rows
from gpubroker.store import instances as rows
from gpubroker.store import pods as pod_rows
from gpubroker.store.candidates import Candidate
from gpubroker.store.instances import AttemptRow, PodRow

_LONGEST_PAUSE_SECONDS: Final = 60
_BIRTH_POLL_SECONDS: Final = 15


def make_ref(owner: str, attempt_id: str, hard_stop_at: datetime) -> str:
    """The name of an attempt at its provider: whose, which, and the moment after which anyone may destroy it."""
    return f"gb-{owner}-{attempt_id.removeprefix('att_')}-{base36(int(hard_stop_at.timestamp()))}"


def read_spec(pod: PodRow) -> base.Spec:
    """What a provider needs to run the pod, its secrets opened."""
    secrets: dict[str, Any] = {}
    if pod.env_sealed is not None:
        secrets = json.loads(sealing.unseal("pod", pod.id, pod.env_sealed))
    spec = pod.spec
    return base.Spec(
        pod_id=pod.id,
        command=tuple(spec.get("command") or ()),
        image=spec.get("image"),
        env=secrets.get("env", {}),
        ports=tuple(base.Port(port["port"], port["protocol"]) for port in spec.get("ports") or ()),
        disk_gb=spec.get("disk_gb") or 0,
        hard_stop_at=pod.hard_stop_at,
        ssh_public_key=spec.get("ssh_public_key"),
        registry_auth=secrets.get("registry_auth"),
    )


def provider_offer(attempt: AttemptRow) -> base.ProviderOffer:
    """The offer of an attempt, as its adapter named it."""
    c = attempt.candidate
    return base.ProviderOffer(
        provider_offer_id=c.provider_offer_id, gpu=c.gpu, gpu_count=c.gpu_count, vcpus=c.vcpus, ram_gb=c.ram_gb,
        disk_gb=c.disk_gb, region=c.region, price_micro_h=c.price_micro_h, supports=frozenset(c.supports),  # pyright: ignore[reportArgumentType]
        availability="high", vram_gb=c.vram_gb, country=c.country, spot=c.spot, stopped_micro_h=c.stopped_micro_h,
        min_billing_s=c.min_billing_s, increment_s=c.increment_s,
    )  # fmt: skip


async def record_rejection(work: Work, attempt: AttemptRow, rejection: errors.Rejected, wait: float = 0.0) -> None:
    """On to the next offer; `wait` seconds are waited where only those are left that had no turn."""
    async with store.worker() as tx:
        pod = await rows.lock_pod(tx.conn, work.pod.id)
        is_settled = await rows.settle_attempt(
            tx.conn, attempt.id, "rejected", code=rejection.code, detail=rejection.detail
        )
        if not is_settled and not await _give_up_unseen(tx, pod, attempt):  # too late to say anything of the pod
            await rows.wake_pod(tx.conn, pod.id)
            return
        others = {candidate["offer_id"] for candidate in work.pod.candidates} - {a.offer_id for a in work.tries}
        is_last = rejection.code in NO_TURN and others <= {attempt.offer_id} and pod.wanted == "running"
        pause = max(wait, min(2 ** len(work.throttled), _LONGEST_PAUSE_SECONDS)) if is_last else 0
        due_at = pod.now + timedelta(seconds=pause)
        after = replace(pod, due_at=due_at, state_reason=f"{attempt.provider}: {rejection.code}")
        if not rejection.try_next_offer and pod.wanted == "running":
            after = replace(
                after, state="failed", wanted="gone", wanted_at=pod.now, ends_because="provisioning_failed",
                charge_until=pod.now.replace(microsecond=0),
            )  # fmt: skip
        await sightings.save(tx, pod, after)


async def _give_up_unseen(tx: store.Transaction, pod: PodRow, attempt: AttemptRow) -> bool:
    """What the sweep saw of a create that is refused in the end never ran, and never will; false when it is not of that."""
    seen = await rows.lock_live(tx.conn, pod.id)
    if seen is None or seen.attempt_id != attempt.id or seen.started_at is not None:
        return False
    await rows.save_instance(tx.conn, replace(seen, life="failed"))
    return True


async def make_ambiguous(work: Work, attempt: AttemptRow, code: str, detail: str) -> None:
    """Nobody knows whether the create made something: look the reference up, and try nothing else meanwhile."""
    async with store.worker() as tx:
        pod = await rows.lock_pod(tx.conn, work.pod.id)
        await rows.settle_attempt(tx.conn, attempt.id, "ambiguous", code=code, detail=detail, leaving=("open",))
        await rows.wake_pod(tx.conn, pod.id)


async def abandon(work: Work, attempt: AttemptRow) -> None:
    """The reference was not found. A birth later is ended on sight; until it cannot come any more its hold stays."""
    lag = int(attempt.candidate.capabilities["visibility_lag_seconds"])
    until = attempt.over_at + timedelta(seconds=config.settings().stray_grace_seconds + lag)
    async with store.worker() as tx:
        pod = await rows.lock_pod(tx.conn, work.pod.id)
        await rows.settle_attempt(tx.conn, attempt.id, "abandoned", hold_until=until, leaving=("ambiguous",))
        await rows.wake_pod(tx.conn, pod.id)


async def wait_for_births(tx: store.Transaction, pod: PodRow, attempts: list[AttemptRow]) -> datetime | None:
    """Until when an abandoned attempt of this pod may still bear something; None when none may."""
    soon = pod.now + timedelta(seconds=_BIRTH_POLL_SECONDS)
    for attempt in attempts:
        if attempt.state != "abandoned" or attempt.hold_until is None:
            continue
        if pod.now < attempt.hold_until:
            return max(soon, attempt.hold_until) if attempt.hold_until > soon else attempt.hold_until
        if attempt.candidate.capabilities.get("terminal_is_final"):
            continue
        if await rows.count_listings(tx.conn, attempt.account_id, attempt.hold_until) < sightings.MANY_LISTINGS:
            return soon
    return None


async def may_try_again(tx: store.Transaction, work: Work, candidate: Candidate) -> bool:
    """While an abandoned create may still come true, a further one needs a hold of its own, or waits."""
    until = await wait_for_births(tx, work.pod, work.attempts)
    if until is None:
        return True
    pod = work.pod
    left = max(0, round((pod.ends_at - pod.now).total_seconds()))
    fixed = candidate.min_billing_s + int(candidate.capabilities.get("termination_allowance_seconds", 0))
    try:
        async with tx.conn.transaction():
            await pod_rows.take_hold(
                tx.conn,
                pod.id,
                f"attempt:{len(work.attempts) + 1}",
                pod.agent_id,
                max(1, cost(candidate.price_micro_h, left + fixed)),
            )
    except psycopg.Error as error:
        if holds.limiting_agent(error) is None:
            raise
        await rows.save_pod(
            tx.conn, replace(pod, due_at=until, state_reason="waiting: an earlier create may still come true")
        )
        return False
    return True


async def make_stray(tx: store.Transaction, pod: PodRow, work: Work) -> None:
    """Fail over: the sweep ends the old instance, and what it costs from here on is the installation's loss."""
    instance = await rows.lock_live(tx.conn, pod.id)
    if instance is None:
        return
    stray = replace(instance, role="stray")
    await rows.save_instance(tx.conn, stray)
    if instance.started_at is None:
        await sightings.charge_installation(tx, stray, work.maker)
    else:
        await billing_rows.change_phase(tx.conn, stray.id, pod.now, "full", work.maker.price_micro_h, "operator")
