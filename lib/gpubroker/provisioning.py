"""`drive(pod)`: one step at a time from what there is to what is wanted.

The row is the work: `pod.wanted` and `pod.due_at` say what is due, events only wake. A step is claimed by moving `due_at`
forward; whoever dies leaves a pod that is due again. No provider is ever called inside a transaction, and everything a call
needs to be found again is committed before it is sent (DESIGN 5 and 6).
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

from gpubroker import config, errors, sightings, store
from gpubroker.attempts import (
    abandon,
    make_ambiguous,
    make_ref,
    make_stray,
    may_try_again,
    provider_offer,
    read_spec,
    record_rejection,
    wait_for_births,
)
from gpubroker.ids import new_id
from gpubroker.providers import base
from gpubroker.providers.registry import Adapters
from gpubroker.sightings import Scene
from gpubroker.steps import Step, Work, next_step
from gpubroker.store import billing as billing_rows
from gpubroker.store import events as event_rows
from gpubroker.store import instances as rows
from gpubroker.store import pods as pod_rows
from gpubroker.store.instances import AttemptRow, InstanceRow, PodRow

log = logging.getLogger("gpubroker.provisioning")

T = TypeVar("T")
SEND_SECONDS: Final = 10
"""A create that was not sent by then is not sent at all."""
_LONGEST_TURN_SECONDS: Final = 600
_POLL_SECONDS: Final = 2
_LONGEST_PAUSE_SECONDS: Final = 60
_SLOW_POLL_SECONDS: Final = 15
_LOG_BYTES: Final = 1024 * 1024
_LOG_SECONDS: Final = 10


class Driver:
    """Drives pods with the adapters of this process."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters
        self._steps: dict[Step, Callable[[Work], Awaitable[None]]] = {
            Step.REST: self._rest,
            Step.EXPIRE: self._expire,
            Step.WARN: self._warn,
            Step.WAIT: self._wait,
            Step.DOUBT: self._doubt,
            Step.LOOK_UP: self._look_up,
            Step.ATTEMPT: self._attempt,
            Step.GIVE_UP: self._give_up,
            Step.LOOK: self._look,
            Step.START: self._start,
            Step.STOP: self._stop,
            Step.RESTART: self._restart,
            Step.EXTEND: self._extend,
            Step.TERMINATE: self._terminate,
            Step.CONFIRM: self._confirm,
            Step.FINISH: self._finish,
        }

    async def drive(self, pod_id: str, *, event_id: str | None = None, consumer: str = "provisioning") -> bool:
        """Do the one step that is due; false when none is, or another driver has it.

        With an event, its delivery is finished in the transaction of the claim; one that nobody waits for does nothing.
        """
        async with store.worker() as tx:
            if event_id is not None and not await event_rows.finish_delivery(tx, event_id, consumer, pod_id):
                return False
            pod = await rows.claim_pod(tx.conn, pod_id)
            if pod is None:
                return False
            work = Work(pod, await rows.list_attempts(tx.conn, pod_id), await rows.lock_live(tx.conn, pod_id))
        step = next_step(work)
        log.debug("%s: %s (%s, wanted %s)", pod_id, step.name, pod.state, pod.wanted)
        try:
            await self._steps[step](work)
        except (errors.InstanceNotFound, errors.Rejected) as error:
            await self._doubt_instance(work, error)
        except (errors.ProviderError, errors.SetupError, TimeoutError, OSError) as error:
            await self._put_off(work, error)
        return True

    async def drive_on(self, pod_id: str, *, event_id: str | None = None, seconds: float = 25.0) -> None:
        """Drive a pod as long as its next step is due within moments: what is quick happens at once."""
        deadline = time.monotonic() + seconds
        if not await self.drive(pod_id, event_id=event_id):
            return
        while time.monotonic() < deadline:
            async with store.worker() as tx:
                due_in = await pod_rows.due_in(tx.conn, pod_id)
            if due_in is None or due_in > _POLL_SECONDS:
                return
            await asyncio.sleep(max(0.0, due_in))
            if not await self.drive(pod_id):
                return

    # Steps without a call

    async def _rest(self, work: Work) -> None:
        await _conclude(work, None)

    async def _expire(self, work: Work) -> None:
        await expire(work.pod.id)

    async def _warn(self, work: Work) -> None:
        """Tell that the pod's end comes, once, and go on at once."""
        async with store.worker() as tx:
            pod = await rows.lock_pod(tx.conn, work.pod.id)
            if pod.turn == work.pod.turn and pod.wanted != "gone" and pod.expiring_told_at is None:
                await rows.save_pod(tx.conn, replace(pod, expiring_told_at=pod.now, due_at=pod.now))
                await sightings.announce(tx, pod, "pod.expiring")

    async def _wait(self, work: Work) -> None:
        """Another driver may be in the middle of the create: nothing is known before its time is over."""
        attempt = work.attempt
        await _conclude(work, attempt.over_at if attempt else None)

    async def _doubt(self, work: Work) -> None:
        """Whoever sent the create, if it was sent, is not there any more."""
        if work.attempt is not None:
            await make_ambiguous(work, work.attempt, "no_answer", "the caller of the create was lost")

    async def _give_up(self, work: Work) -> None:
        """No offer is left to try: the pod failed, and goes on to its end."""
        if await self._runs_after_all(work):
            return
        refused = [attempt for attempt in work.attempts if attempt.code == "no_capacity"]
        because = "no_capacity" if refused and len(refused) == len(work.attempts) else "provisioning_failed"
        last = work.attempt
        async with store.worker() as tx:
            pod = await rows.lock_pod(tx.conn, work.pod.id)
            why = last and (last.code or pod.state_reason or "it did not start")
            reason = f"{last.provider}: {why}" if last else "no offer was left to try"
            if pod.wanted != "running" or pod.turn != work.pod.turn:
                await rows.wake_pod(tx.conn, pod.id)
                return
            failed = replace(
                pod, state="failed", state_reason=reason, wanted="gone", wanted_at=pod.now, ends_because=because,
                charge_until=sightings.charge_until(pod),
                due_at=pod.now, failures=0,
            )  # fmt: skip
            await sightings.save(tx, pod, failed)

    # Making an instance

    async def _attempt(self, work: Work) -> None:
        """Commit the attempt with its reference, then ask the provider, then commit the outcome."""
        if await self._runs_after_all(work):
            return
        spec = read_spec(work.pod)
        begun = time.monotonic()
        opened = await self._open_attempt(work)
        if opened is None:
            return
        attempt, adapter = opened
        if time.monotonic() - begun > SEND_SECONDS:  # committed too late to be sent: the sweep may doubt it by now
            await record_rejection(work, attempt, errors.Rejected("not_sent", "the time to send it was over"))
            return
        await self._create(work, attempt, adapter, spec)

    async def _create(self, work: Work, attempt: AttemptRow, adapter: base.Provider, spec: base.Spec) -> None:
        limit = int(attempt.candidate.capabilities["create_limit_seconds"])
        asked_at = attempt.at
        try:
            created = await asyncio.wait_for(adapter.create(spec, provider_offer(attempt), attempt.ref), limit)
        except errors.Rejected as rejection:
            await record_rejection(work, attempt, rejection)
        except (errors.Throttled, errors.CredentialRefused) as refusal:
            if attempt.state == "created":  # what is there already may be completed later
                raise
            await record_rejection(work, attempt, *_as_rejection(refusal))
        except errors.AmbiguousOutcome as ambiguous:
            if ambiguous.maybe_id is not None:
                await self._record_birth(attempt, base.Created(ambiguous.maybe_id), asked_at)
            else:
                await make_ambiguous(work, attempt, ambiguous.code, ambiguous.detail)
        except (errors.ProviderError, TimeoutError, OSError) as error:
            await make_ambiguous(work, attempt, type(error).__name__, str(error))
        else:
            await self._record_birth(attempt, created, asked_at)

    async def _runs_after_all(self, work: Work) -> bool:
        """Before an instance is given up, one more look: nobody may have looked for as long as it took to boot."""
        if work.instance is None:
            return False
        attempt, adapter, instance = self._parts(work)
        asked_at = await _read_instant()
        try:
            seen = await _limited(attempt, adapter.get(instance.provider_instance_id))
        except (errors.ProviderError, TimeoutError, OSError):
            return False
        if seen.life != "running":
            return False
        await self._apply(work, seen, asked_at)
        return True

    async def _open_attempt(self, work: Work) -> tuple[AttemptRow, base.Provider] | None:
        candidate = work.untried[0]
        adapter = self._adapters.get(candidate.provider)
        async with store.worker() as tx:
            pod = await rows.lock_pod(tx.conn, work.pod.id)
            if pod.turn != work.pod.turn or pod.wanted != "running":
                await rows.wake_pod(tx.conn, pod.id)
                return None
            if not await may_try_again(tx, work, candidate):
                return None
            if work.instance is not None:
                await make_stray(tx, pod, work)
            new = rows.NewAttempt(
                id=new_id("att"),
                pod=pod,
                n=len(work.attempts) + 1,
                candidate=candidate,
                offer=candidate._asdict(),
                ref="",
                send_seconds=SEND_SECONDS,
                call_seconds=int(candidate.capabilities["create_limit_seconds"]),
            )
            new = replace(new, ref=make_ref(config.settings().owner or "", new.id, pod.hard_stop_at))
            attempt = await rows.add_attempt(tx.conn, new)
            creating = replace(pod, state="creating", state_reason=None, due_at=attempt.over_at)
            await sightings.save(tx, pod, _note_restart(creating, _pending_restart(pod)))
        return attempt, adapter

    async def _record_birth(self, attempt: AttemptRow, created: base.Created, asked_at: datetime) -> None:
        """The provider's id is recorded whatever became of the pod meanwhile: a DELETE must not lose it."""
        async with store.worker() as tx:
            await adopt(tx, attempt, created.id, created.instance, asked_at)

    async def _look_up(self, work: Work) -> None:
        """Find out whether an ambiguous create made something, three times; then it is abandoned, never absent."""
        attempt = work.attempt
        if attempt is None:
            return
        times = [int(second) for second in attempt.candidate.capabilities["lookup_seconds"]]
        since = attempt.settled_at or attempt.over_at
        if attempt.looked_up < len(times) and work.pod.now < since + timedelta(seconds=times[attempt.looked_up]):
            await _conclude(work, since + timedelta(seconds=times[attempt.looked_up]))
            return
        adapter = self._adapters.get(attempt.provider)
        asked_at = await _read_instant()
        found = await _limited(attempt, adapter.find_by_ref(attempt.ref))
        if found:
            async with store.worker() as tx:
                for instance in found:
                    await adopt(tx, attempt, instance.id, instance, asked_at)
            return
        if attempt.looked_up + 1 >= len(times):
            await abandon(work, attempt)
            return
        async with store.worker() as tx:
            await rows.lock_pod(tx.conn, work.pod.id)
            await rows.count_lookup(tx.conn, attempt.id)
        await _conclude(work, since + timedelta(seconds=times[attempt.looked_up + 1]))

    # Acting on the instance

    async def _look(self, work: Work) -> None:
        await self._get(work)

    async def _confirm(self, work: Work) -> None:
        """Look whether the end that was asked for has come; ask again when it lasts."""
        instance = work.instance
        sent = instance.terminate_sent_at if instance else None
        if sent is not None and work.pod.failures and work.pod.failures % 4 == 0:
            await self._terminate(work)
            return
        await self._get(work)

    async def _get(self, work: Work) -> None:
        attempt, adapter, instance = self._parts(work)
        asked_at = await _read_instant()
        try:
            seen = await _limited(attempt, adapter.get(instance.provider_instance_id))
        except errors.InstanceNotFound:
            await self._apply(work, None, asked_at)
        else:
            await self._apply(work, seen, asked_at)
            if not seen.is_whole and work.pod.now > attempt.over_at and await _keep_turn(work):
                await self._complete(work)

    async def _complete(self, work: Work) -> None:
        """Send a create, or a start, again that was cut off."""
        attempt, adapter, instance = self._parts(work)
        log.info("%s: %s is not whole, and is completed", work.pod.id, attempt.ref)
        if instance.started_at is not None:
            await self._start(work)
            return
        await self._create(work, attempt, adapter, read_spec(work.pod))
        await _conclude(work, await _read_instant() + timedelta(seconds=_POLL_SECONDS))

    async def _start(self, work: Work) -> None:
        """Start it, unless a start whose caller was lost did: the program may even have ended since."""
        attempt, adapter, instance = self._parts(work)
        asked_at = await _read_instant()
        seen = await _limited(attempt, adapter.get(instance.provider_instance_id))
        if seen.life == "running" or sightings.ran_unseen(instance, seen):
            await self._apply(work, seen, asked_at)
            return
        try:
            await _limited(attempt, adapter.start(instance.provider_instance_id))
        except errors.Rejected as rejection:
            await _refuse_start(work, rejection)
            return
        await self._command(work, "starting", restarted=_pending_restart(work.pod))

    async def _stop(self, work: Work) -> None:
        attempt, adapter, instance = self._parts(work)
        await _limited(attempt, adapter.stop(instance.provider_instance_id))
        await self._command(work, "stopping")

    async def _restart(self, work: Work) -> None:
        attempt, adapter, instance = self._parts(work)
        await _limited(attempt, adapter.restart(instance.provider_instance_id))
        await self._command(work, "starting", restarted=_pending_restart(work.pod))

    async def _extend(self, work: Work) -> None:
        attempt, adapter, instance = self._parts(work)
        await _limited(attempt, adapter.extend(instance.provider_instance_id, work.pod.hard_stop_at))
        async with store.worker() as tx:
            await rows.lock_pod(tx.conn, work.pod.id)
            locked = await rows.lock_live(tx.conn, work.pod.id)
            if locked is not None and _is_of(work, locked):
                await rows.save_instance(tx.conn, replace(locked, hard_stop_at=work.pod.hard_stop_at))
        await _conclude(work, work.pod.now)

    async def _terminate(self, work: Work) -> None:
        attempt, adapter, instance = self._parts(work)
        if instance.terminate_sent_at is None:
            await _keep_log(attempt, adapter, instance)
        try:
            await _limited(attempt, adapter.terminate(instance.provider_instance_id))
        except errors.InstanceNotFound:
            log.info("%s: the provider knows no %s any more", work.pod.id, instance.provider_instance_id)
        await self._command(work, "terminating")

    def _parts(self, work: Work) -> tuple[AttemptRow, base.Provider, InstanceRow]:
        if work.instance is None:
            msg = f"{work.pod.id} has no instance"
            raise LookupError(msg)
        return work.maker, self._adapters.get(work.maker.provider), work.instance

    async def _command(self, work: Work, life: str, *, restarted: datetime | None = None) -> None:
        """The provider took a command: what was seen before it says nothing any more. Then look at once."""
        async with store.worker() as tx:
            pod = await rows.lock_pod(tx.conn, work.pod.id)
            instance = await rows.lock_live(tx.conn, pod.id)
            if instance is None or not _is_of(work, instance):
                return
            told = replace(instance, life=life, commanded_at=pod.now)
            if life == "terminating" and instance.terminate_sent_at is None:  # what was missed before is other evidence
                told = replace(
                    told, terminate_sent_at=pod.now, misses=0, missed_since=None, terminal_seen_at=None
                )  # fmt: skip
            await rows.save_instance(tx.conn, told)
            await sightings.save(tx, pod, _note_restart(pod, restarted))
        await self._get(replace(work, instance=told))

    async def _apply(self, work: Work, seen: base.Instance | None, asked_at: datetime) -> None:
        """Take in an answer about the pod's instance; None: the provider knows no such instance."""
        async with store.worker() as tx:
            pod = await rows.lock_pod(tx.conn, work.pod.id)
            instance = await rows.lock_live(tx.conn, pod.id)
            if instance is None or not _is_of(work, instance):
                await rows.wake_pod(tx.conn, pod.id)
                return
            scene = Scene(tx, pod, work.maker, instance)
            if seen is not None:
                scene = await sightings.observe(scene, seen, asked_at)
            elif not sightings.is_stale(instance, asked_at):
                scene = await sightings.take_absence(scene, "not found")
            await _plan_next(scene, work)

    async def _finish(self, work: Work) -> None:
        """Nothing is alive and nothing may be born: bill to the end, close the holds, erase the secrets, in one step."""
        async with store.worker() as tx:
            pod = await rows.lock_pod(tx.conn, work.pod.id)
            attempts = await rows.list_attempts(tx.conn, pod.id)
            if (
                pod.state == "terminated"
                or any(a.state in rows.OPEN for a in attempts)
                or await rows.lock_live(tx.conn, pod.id)
            ):
                await rows.wake_pod(tx.conn, pod.id)
                return
            until = await wait_for_births(tx, pod, attempts)
            if until is not None:
                await rows.save_pod(tx.conn, replace(pod, due_at=until))
                return
            await billing_rows.settle(tx.conn, pod.id)
            await sightings.save(
                tx,
                pod,
                replace(pod, state="terminated", billing="none", due_at=None, env_sealed=None, terminated_at=pod.now,
                        ends_because=pod.ends_because or "requested"),
            )  # fmt: skip

    async def _doubt_instance(self, work: Work, error: errors.ProviderError) -> None:
        """A command found no such instance, or was refused: a look says more, and then it is tried again later."""
        try:
            if work.instance is not None:
                await self._get(work)
        except (errors.ProviderError, errors.SetupError, TimeoutError, OSError):
            log.warning("%s: it cannot be looked at either", work.pod.id)
        await self._put_off(work, error)

    async def _put_off(self, work: Work, error: Exception) -> None:
        """A call failed and changed nothing that we know of: again later, ever more slowly."""
        failures = work.pod.failures + 1
        pause = min(2**failures, _LONGEST_PAUSE_SECONDS)
        if isinstance(error, errors.Throttled):
            pause = max(pause, round(error.wait))
        log.warning("%s: %s, again in %d s", work.pod.id, f"{type(error).__name__} {error}".strip(), pause)
        async with store.worker() as tx:
            pod = await rows.lock_pod(tx.conn, work.pod.id)
            later = replace(pod, failures=failures)
            await rows.save_pod(tx.conn, _due(work, later, pod.now + timedelta(seconds=pause)))


# Rules and small parts


async def _limited(attempt: AttemptRow, call: Awaitable[T]) -> T:
    return await asyncio.wait_for(call, int(attempt.candidate.capabilities["call_limit_seconds"]))


async def _read_instant() -> datetime:
    async with store.worker() as tx:
        return await store.read_instant(tx.conn)


def _is_of(work: Work, instance: InstanceRow) -> bool:
    """Whether it is the instance that this turn is about: another driver may have failed over meanwhile."""
    return work.instance is not None and work.instance.id == instance.id


def _pending_restart(pod: PodRow) -> datetime | None:
    """When the restart was asked for that is not done yet: whatever makes its program begin anew does it."""
    return pod.restart_requested_at if pod.is_restart_pending else None


def _note_restart(pod: PodRow, restarted: datetime | None) -> PodRow:
    if restarted is None:
        return pod
    return replace(pod, restart_done_at=max(restarted, pod.restart_done_at or restarted))


def _due(work: Work, pod: PodRow, due_at: datetime | None) -> PodRow:
    """The pod with its next due time, unless somebody claimed it or wanted something since this turn began."""
    if pod.turn != work.pod.turn:
        return pod
    if pod.wanted_at != work.pod.wanted_at or pod.restart_requested_at != work.pod.restart_requested_at:
        return replace(pod, due_at=pod.now)
    if due_at is None and pod.wanted != "gone":  # nothing is to be done before its end
        return replace(pod, due_at=min(at for at in (pod.ends_at, pod.warns_at, pod.idle_at) if at is not None))
    return replace(pod, due_at=due_at)


async def expire(pod_id: str) -> bool:
    """Want the end of a pod whose time is over, or that was idle for too long: the database alone decides that.

    False when neither is so, or its end was wanted before.
    """
    async with store.worker() as tx:
        pod = await rows.lock_pod(tx.conn, pod_id)
        is_idle = pod.idle_at is not None and pod.idle_at <= pod.now
        over_at = min(at for at in (pod.ends_at, pod.idle_at) if at is not None)
        if pod.wanted == "gone" or (pod.ends_at > pod.now and not is_idle):
            return False
        reason = f"idle for {pod.idle_seconds} s" if is_idle and pod.ends_at > pod.now else None
        life = round((pod.ends_at - pod.created_at).total_seconds())
        because = "budget" if reason is None and pod.spec.get("paid_seconds") == life else "lifetime"
        await pod_rows.want_gone(tx.conn, pod.id, because, sightings.allowance(pod), over_at, reason)
        await sightings.announce(tx, replace(pod, state="terminating", version=pod.version + 1, ends_because=because))
        return True


def _as_rejection(refusal: errors.Throttled | errors.CredentialRefused) -> tuple[errors.Rejected, float]:
    """A create that its provider would not even look at, and the seconds after which it may."""
    if isinstance(refusal, errors.CredentialRefused):
        return errors.Rejected("credential_refused", refusal.code), 0.0
    code = "quota_exceeded" if refusal.wait > _LONGEST_TURN_SECONDS else refusal.code
    return errors.Rejected(code, refusal.detail), refusal.wait


async def _keep_turn(work: Work) -> bool:
    """Keep the pod for as long as a create takes; false when somebody else has it, or nothing of it is wanted any more."""
    async with store.worker() as tx:
        pod = await rows.lock_pod(tx.conn, work.pod.id)
        instance = await rows.lock_live(tx.conn, pod.id)
        is_ours = instance is not None and _is_of(work, instance)
        if pod.turn != work.pod.turn or pod.wanted != "running" or not is_ours:
            return False
        limit = int(work.maker.candidate.capabilities["create_limit_seconds"])
        await rows.save_pod(tx.conn, replace(pod, due_at=pod.now + timedelta(seconds=limit)))
        return True


async def _conclude(work: Work, due_at: datetime | None) -> None:
    async with store.worker() as tx:
        pod = await rows.lock_pod(tx.conn, work.pod.id)
        if due_at is None and pod.hard_stop_at != work.pod.hard_stop_at:
            due_at = pod.now
        await rows.save_pod(tx.conn, _due(work, pod, due_at))


async def _plan_next(scene: Scene, work: Work) -> None:
    """When to look again: at once when something is to be done, soon while something is on its way, else never."""
    pod, instance = scene.pod, scene.instance
    gone = instance.gone_at is not None
    step = next_step(Work(pod, work.attempts, None if gone else instance))
    if step in (Step.REST, Step.WAIT):
        due_at, failures = None, 0
    elif step in (Step.LOOK, Step.CONFIRM):
        pause = min(_POLL_SECONDS * (1 + pod.failures // 10), _SLOW_POLL_SECONDS)
        due_at, failures = pod.now + timedelta(seconds=pause), pod.failures + 1
    else:
        again = sightings.AGAIN_AFTER.get(pod.state) if step in (Step.START, Step.ATTEMPT) else None
        due_at, failures = pod.now + (again or timedelta()), pod.failures
    await rows.save_pod(scene.tx.conn, _due(work, replace(pod, failures=failures), due_at))


async def adopt(
    tx: store.Transaction,
    attempt: AttemptRow,
    provider_instance_id: str,
    seen: base.Instance | None,
    asked_at: datetime,
) -> None:
    """Know an instance with the reference of this attempt: the pod's own, or a stray when it cannot be that any more."""
    pod = await rows.lock_pod(tx.conn, attempt.pod_id)
    attempt = await rows.lock_attempt(tx.conn, attempt.id)
    present = await rows.lock_live(tx.conn, pod.id)
    is_same = present is not None and present.provider_instance_id == provider_instance_id
    fits = attempt.state in rows.OPEN and present is None
    instance = await rows.add_instance(
        tx.conn, attempt.account_id, provider_instance_id, "live" if fits else "stray", attempt.at,
        attempt=attempt, hard_stop_at=_hard_stop(attempt, seen),
    )  # fmt: skip
    if not fits:
        if seen is not None and seen.life != "gone" and instance.gone_at is not None and asked_at > instance.gone_at:
            instance = await sightings.revive(tx, instance, asked_at)
        if not is_same and instance.role == "stray":
            await sightings.charge_installation(tx, instance, attempt)
        return
    await rows.settle_attempt(tx.conn, attempt.id, "created")
    starting = replace(pod, due_at=pod.now)
    if pod.wanted != "gone":
        starting = replace(starting, state="starting", state_reason=None)
    pod = await sightings.save(tx, pod, starting)
    if seen is not None:
        attempts = await rows.list_attempts(tx.conn, pod.id)
        scene = await sightings.observe(Scene(tx, pod, attempt, instance), seen, max(asked_at, instance.known_at))
        await _plan_next(scene, Work(pod, attempts, instance))


def _hard_stop(attempt: AttemptRow, seen: base.Instance | None) -> datetime:
    if seen is not None and seen.hard_stop_at is not None:
        return seen.hard_stop_at
    return datetime.fromtimestamp(int(attempt.ref.rpartition("-")[2], 36), UTC)


async def _keep_log(attempt: AttemptRow, adapter: base.Provider, instance: InstanceRow) -> None:
    """Keep the last of the log before the provider forgets it. Whatever fails here, the end is not put off."""
    if "logs" not in attempt.candidate.supports:
        return
    try:
        call = adapter.logs(instance.provider_instance_id, after=None, since=None, limit=_LOG_BYTES)
        page = await asyncio.wait_for(call, _LOG_SECONDS)
        tail = page.data[-_LOG_BYTES:]
        async with store.worker() as tx:
            starts_at = page.starts_at + len(page.data) - len(tail)
            await pod_rows.keep_log(tx.conn, attempt.pod_id, attempt.org_id, starts_at, tail)
    except Exception as error:  # noqa: BLE001 - a log is worth no second of an instance that shall end
        log.warning("%s: its log was not kept: %s", attempt.pod_id, type(error).__name__)


async def _refuse_start(work: Work, rejection: errors.Rejected) -> None:
    """There is no room for a stopped pod now: it stays stopped, and says why."""
    async with store.worker() as tx:
        pod = await rows.lock_pod(tx.conn, work.pod.id)
        if pod.wanted != "running":
            await rows.wake_pod(tx.conn, pod.id)
            return
        instance = await rows.lock_live(tx.conn, pod.id)
        if instance is not None and _is_of(work, instance):  # a look meanwhile may have seen it starting
            await rows.save_instance(tx.conn, replace(instance, life="stopped", commanded_at=pod.now))
        reason = f"it could not be started: {rejection.code}"
        stopped = replace(
            pod, state="stopped", state_reason=reason, wanted="stopped", wanted_at=pod.now, due_at=pod.ends_at
        )
        await sightings.save(tx, pod, stopped)


async def plan_after(scene: Scene) -> None:
    """After the sweep saw a change: make the pod due when that calls for a step."""
    attempts = await rows.list_attempts(scene.tx.conn, scene.pod.id)
    await _plan_next(scene, Work(scene.pod, attempts, scene.instance))
