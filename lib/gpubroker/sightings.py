"""What a provider says of an instance, and what follows: phases, states, evidence of the end.

Drivers and the sweep bring their sightings here; arrival order decides nothing. A sighting that was asked for before the last
one, or before the last command, says nothing about the present and is dropped. Unknown is never running, silence is never gone.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from gpubroker import outbox, store
from gpubroker.events import BY_WHAT, PodData
from gpubroker.providers import base
from gpubroker.store import billing as billing_rows
from gpubroker.store import instances as rows
from gpubroker.store.instances import AttemptRow, InstanceRow, PodRow

log = logging.getLogger("gpubroker.sightings")

TWO_LOOKS: Final = timedelta(seconds=60)
"""Two answers that an instance is gone must be so far apart."""
LONG_SILENCE: Final = timedelta(minutes=15)
MANY_LISTINGS: Final = 3
AGAIN_AFTER: Final = {"stopped": timedelta(seconds=1), "interrupted": timedelta(seconds=5)}
"""So long after its end by itself a pod is started again, by its state: what ends at once each time shall not spin."""
_AFTER_A_RUN: Final = frozenset({"stopped", "interrupted", "gone"})
_AT_REST: Final = frozenset({"none", "storage"})


@dataclass(frozen=True, slots=True)
class Scene:
    """A pod and its instance, both locked, with the attempt that made it."""

    tx: store.Transaction
    pod: PodRow
    attempt: AttemptRow
    instance: InstanceRow

    @property
    def capabilities(self) -> dict[str, Any]:
        """What the provider of this instance can do and costs."""
        return self.attempt.candidate.capabilities


async def observe(scene: Scene, seen: base.Instance, asked_at: datetime) -> Scene:
    """Take in what the provider said when asked at `asked_at`: phase, state and event in this transaction."""
    instance = scene.instance
    if is_stale(instance, asked_at) or _lags(scene, seen):
        return scene
    if seen.life == "unknown":
        return await _lose_sight(scene, seen)
    if seen.life in _AFTER_A_RUN:
        scene = await _note_unseen_run(scene, seen)
        instance = scene.instance
    moment = find_moment(instance, scene.attempt, seen, scene.pod.now)
    if seen.life == "gone":
        return await _take_terminal(scene, seen, moment)
    await _change_phase(scene, seen, moment)
    started_at = instance.started_at or (moment if seen.life == "running" else None)
    known = replace(
        instance,
        life=seen.life,
        provider_status=seen.status,
        endpoints=[asdict(endpoint) for endpoint in seen.endpoints],
        seen_at=asked_at,
        started_at=started_at,
        misses=0,
        missed_since=None,
        terminal_seen_at=None,
        hard_stop_at=seen.hard_stop_at or instance.hard_stop_at,
    )
    await rows.save_instance(scene.tx.conn, known)
    pod = follow(scene.pod, instance, seen, moment)
    if known.endpoints != instance.endpoints or known.provider_status != instance.provider_status:
        pod = replace(pod, version=scene.pod.version + 1)
    if seen.billing != "unknown":
        pod = replace(pod, billing=seen.billing)
    pod = await save(scene.tx, scene.pod, pod)
    return replace(scene, pod=pod, instance=known)


def is_stale(instance: InstanceRow, asked_at: datetime) -> bool:
    """Whether an answer that was asked for then says nothing of the present: more is known since, or it was told to change."""
    before = (moment for moment in (instance.seen_at, instance.commanded_at) if moment is not None)
    return instance.gone_at is not None or any(asked_at < moment for moment in before)


def _lags(scene: Scene, seen: base.Instance) -> bool:
    """Whether it is still seen as it was before a start that its provider took, and may show later: that is no new end."""
    instance, told = scene.instance, scene.instance.commanded_at
    if instance.life != "starting" or told is None or seen.life not in ("stopped", "interrupted"):
        return False
    if ran_unseen(instance, seen) or (seen.ended_at is not None and seen.ended_at >= told):
        return False
    return scene.pod.now - told < timedelta(seconds=int(scene.capabilities.get("visibility_lag_seconds", 0)))


def find_moment(instance: InstanceRow, attempt: AttemptRow, seen: base.Instance, now: datetime) -> datetime:
    """When what is seen began: the provider's own time, but only between our last observation and now."""
    earliest = instance.seen_at or min(attempt.at, instance.known_at)
    told = seen.started_at if seen.life == "running" else seen.ended_at
    if told is None and seen.life in ("stopped", "interrupted") and instance.life == "starting":
        told = instance.commanded_at  # a run after a start or restart that nobody saw is not paid for
    return now if told is None else max(earliest, min(told, now))


async def _change_phase(scene: Scene, seen: base.Instance, moment: datetime) -> None:
    conn, instance, attempt = scene.tx.conn, scene.instance, scene.attempt
    if instance.role == "stray":
        await charge_installation(scene.tx, instance, attempt)
        return
    if instance.started_at is None:
        if seen.life != "running":
            return  # who pays for the boot is decided by how it ends
        if scene.capabilities.get("bills_boot"):
            await billing_rows.change_phase(
                conn, instance.id, instance.known_at, "full", attempt.price_micro_h, "operator"
            )
    if seen.billing == "unknown":
        return
    candidate = attempt.candidate
    price = {"full": attempt.price_micro_h, "storage": candidate.stopped_micro_h or 0, "none": 0}[seen.billing]
    await billing_rows.change_phase(conn, instance.id, moment, seen.billing, price, "customer")


async def _note_unseen_run(scene: Scene, seen: base.Instance) -> Scene:
    """What ran between two looks was not seen running, but its provider tells from when: its agent pays for that too."""
    instance, attempt, conn = scene.instance, scene.attempt, scene.tx.conn
    if seen.started_at is None:
        return scene
    if instance.started_at is not None:
        if scene.pod.billing in _AT_REST and ran_unseen(instance, seen):
            moment = min(seen.started_at, scene.pod.now)
            await billing_rows.change_phase(conn, instance.id, moment, "full", attempt.price_micro_h, "customer")
        return scene
    began = max(min(attempt.at, instance.known_at), min(seen.started_at, scene.pod.now))
    if scene.capabilities.get("bills_boot"):
        await billing_rows.change_phase(conn, instance.id, instance.known_at, "full", attempt.price_micro_h, "operator")
    await billing_rows.change_phase(conn, instance.id, began, "full", attempt.price_micro_h, "customer")
    known = replace(instance, started_at=began)
    await rows.save_instance(conn, known)
    return replace(scene, instance=known)


def ran_unseen(instance: InstanceRow, seen: base.Instance) -> bool:
    """Whether its provider tells of a run that began after the last look."""
    return seen.started_at is not None and instance.seen_at is not None and seen.started_at > instance.seen_at


async def charge_installation(tx: store.Transaction, instance: InstanceRow, attempt: AttemptRow | None) -> None:
    """What nobody asked for is the installation's loss, from its first second or from now on."""
    price = attempt.price_micro_h if attempt else 0
    await billing_rows.change_phase(tx.conn, instance.id, instance.known_at, "full", price, "operator")


async def _lose_sight(scene: Scene, seen: base.Instance) -> Scene:
    known = replace(scene.instance, life="unknown", provider_status=seen.status)
    return await _doubt(scene, known, seen.reason or f"the provider says {seen.status!r}")


async def _doubt(scene: Scene, known: InstanceRow, reason: str) -> Scene:
    """Nobody knows how the instance is: what ran is unreachable, and costs nothing until it is seen again."""
    await rows.save_instance(scene.tx.conn, known)
    pod = scene.pod
    if pod.state in ("running", "starting") and pod.wanted == "running" and known.started_at is not None:
        pod = replace(pod, state="unreachable", state_reason=reason, billing="unknown")
        pod = await save(scene.tx, scene.pod, pod)
    return replace(scene, pod=pod, instance=known)


def follow(pod: PodRow, instance: InstanceRow, seen: base.Instance, moment: datetime) -> PodRow:  # noqa: PLR0911 - a table
    """The pod after this sighting: where it stands, and what is wanted now. A pure rule."""
    if pod.wanted == "gone" or instance.role == "stray":
        return pod
    if seen.life == "running":
        return _follow_running(pod, seen, moment)
    asked_for = pod.wanted == "stopped" and pod.state != "interrupted"  # a stopped bid may look like a lost one
    if seen.life == "stopped" or (seen.life == "interrupted" and asked_for):
        return _follow_stopped(pod, instance, seen)
    if seen.life == "interrupted":
        return _follow_interrupted(pod, instance, seen)
    if seen.life in ("starting", "stopping") and pod.state in ("creating", "starting", "stopping", "unreachable"):
        state = "stopping" if pod.wanted == "stopped" else "starting"
        return replace(pod, state=state, state_reason=seen.reason)
    if seen.life in ("failed", "starting", "stopping"):
        return replace(pod, state_reason=seen.reason or pod.state_reason, due_at=pod.now)
    return pod


def _follow_running(pod: PodRow, seen: base.Instance, moment: datetime) -> PodRow:
    if pod.wanted == "stopped":
        return replace(pod, state="stopping", due_at=_sooner(pod.due_at, pod.now + timedelta(seconds=5)))
    if pod.is_restart_pending:
        return pod
    return replace(
        pod, state="running", state_reason=seen.reason, running_at=pod.running_at or moment, exit_code=None, failures=0
    )


def _follow_stopped(pod: PodRow, instance: InstanceRow, seen: base.Instance) -> PodRow:
    if pod.wanted == "stopped":
        known = pod.state_reason if pod.state == "stopped" else None
        return replace(pod, state="stopped", state_reason=seen.reason or known, exit_code=seen.exit_code, failures=0)
    if pod.is_restart_pending or (instance.life == "stopped" and not ran_unseen(instance, seen)):
        return pod  # it was stopped before, and its start is on the way
    ended = replace(pod, state="stopped", state_reason=seen.reason, exit_code=seen.exit_code, failures=0)
    policy = pod.spec.get("restart_policy", "never")
    if pod.spec.get("on_exit") == "terminate":
        return _want_end(ended, "exited")
    if policy == "always":
        return replace(ended, due_at=pod.now + AGAIN_AFTER[ended.state])
    return replace(ended, wanted="stopped", wanted_at=pod.now)


def _follow_interrupted(pod: PodRow, instance: InstanceRow, seen: base.Instance) -> PodRow:
    if pod.wanted == "running" and instance.life == "interrupted" and not ran_unseen(instance, seen):
        return pod  # it was taken away before, and its start is on the way
    return interrupt(pod, seen.reason or "the provider took it away")


def interrupt(pod: PodRow, reason: str) -> PodRow:
    """The pod after its provider took its instance away: wanted back, ended or left, as its agent said. A pure rule."""
    taken = replace(pod, state="interrupted", state_reason=reason, failures=0)
    if pod.wanted == "stopped":
        return taken
    if pod.spec.get("restart_policy", "never") != "never":
        return replace(taken, wanted_at=pod.now, due_at=pod.now + AGAIN_AFTER[taken.state])  # any offer may be tried
    if pod.spec.get("on_exit") == "terminate":
        return _want_end(taken, "interrupted")
    return replace(taken, wanted="stopped")


def _want_end(pod: PodRow, because: str) -> PodRow:
    """The pod with its end wanted by the rules, not by a call: its agent pays up to now."""
    return replace(
        pod,
        wanted="gone",
        wanted_at=pod.now,
        state="terminating",
        ends_because=because,
        charge_until=charge_until(pod),
        due_at=pod.now,
        failures=0,
    )


def allowance(pod: PodRow) -> int:
    """The longest that this pod's agent pays after its end was wanted, seconds."""
    first = pod.candidates[0] if pod.candidates else {}
    return int(first.get("capabilities", {}).get("termination_allowance_seconds", 0))


def charge_until(pod: PodRow) -> datetime:
    """The end of what this pod's agent pays when its end is wanted now: however late that is, its lifetime is the limit."""
    return min(pod.now, pod.ends_at).replace(microsecond=0) + timedelta(seconds=allowance(pod))


def _sooner(first: datetime | None, second: datetime) -> datetime:
    return second if first is None else min(first, second)


async def save(tx: store.Transaction, before: PodRow, after: PodRow) -> PodRow:
    """Write a pod that changed, with the event of its new state."""
    if after == before:
        return after
    visible = (after.state, after.state_reason, after.billing, after.exit_code, after.ends_because)
    if visible != (before.state, before.state_reason, before.billing, before.exit_code, before.ends_because):
        after = replace(after, version=before.version + 1)
    if after.state != before.state and after.due_at is None and after.wanted == "gone" and after.state != "terminated":
        after = replace(after, due_at=after.now)
    await rows.save_pod(tx.conn, after)
    if after.state != before.state:
        await announce(tx, after)
    return after


async def announce(tx: store.Transaction, pod: PodRow, what: str | None = None) -> None:
    """Write an event of the pod: that of its present state, where there is one, or the one named."""
    what = what or f"pod.{pod.state}"
    if what not in BY_WHAT:
        return
    latest = pod.candidates[0] if pod.candidates else {}
    data = PodData(
        pod_id=pod.id, agent_id=pod.agent_id, state=pod.state, version=pod.version, name=pod.name, reason=pod.state_reason,
        ends_because=pod.ends_because, price_usd_per_hour=latest.get("price_micro_h"), expires_at=pod.ends_at,
    )  # fmt: skip
    await outbox.write(tx, what, pod.id, data, tenant=pod.org_id, agent_id=pod.agent_id)


# Evidence of the end


async def _take_terminal(scene: Scene, seen: base.Instance, moment: datetime) -> Scene:
    if scene.capabilities.get("terminal_is_final"):
        evidence = {"kind": "final", "said": seen.status, "ended_at": moment.isoformat()}
        return await finish_instance(scene, moment, evidence)
    return await take_absence(scene, f"status {seen.status}", None if seen.ended_at is None else moment)


async def take_absence(scene: Scene, what: str, ended_at: datetime | None = None) -> Scene:
    """The provider answered that the instance is terminal, or knows none of its name: is that proof by now?

    We asked for the end: twice, a minute apart, and a complete listing without it. Nobody asked: three complete listings
    without it over a quarter of an hour, and this.
    """
    instance, now = scene.instance, scene.pod.now
    first = instance.terminal_seen_at or now
    missed_since = instance.missed_since
    if instance.terminate_sent_at is not None:
        proved = now - first >= TWO_LOOKS and missed_since is not None and missed_since > instance.terminate_sent_at
    else:
        proved = missed_since is not None and instance.misses >= MANY_LISTINGS and now - missed_since >= LONG_SILENCE
    if proved:
        evidence = {"kind": "absent", "said": what, "first": first.isoformat(), "listings_without": instance.misses}
        return await finish_instance(scene, ended_at or instance.seen_at or instance.known_at, evidence)
    known = replace(instance, terminal_seen_at=first)
    if instance.terminate_sent_at is None:
        known = replace(known, life="unknown")
    return await _doubt(scene, known, f"the provider says {what!r}")


async def finish_instance(scene: Scene, ended_at: datetime, evidence: Mapping[str, object]) -> Scene:
    """The instance is gone: close its last phase, and say what that means for its pod."""
    tx, instance, pod = scene.tx, scene.instance, scene.pod
    if instance.role == "live":
        await _close_phases(scene, ended_at)
    await rows.mark_gone(tx.conn, instance.id, ended_at, evidence)
    if instance.role == "stray":
        await billing_rows.bill(tx.conn, instance.id, ended_at)
        return replace(scene, instance=replace(instance, gone_at=pod.now, ended_at=ended_at))
    after = replace(pod, billing="none", due_at=pod.now)
    if pod.wanted != "gone":
        after = interrupt(after, "the provider ended it")
        after = replace(after, due_at=pod.ends_at) if after.wanted == "stopped" else after
    after = await save(tx, pod, after)
    return replace(scene, pod=after, instance=replace(instance, gone_at=pod.now, ended_at=ended_at))


async def revive(tx: store.Transaction, instance: InstanceRow, seen_at: datetime) -> InstanceRow:
    """What was proved gone is there all the same: nobody's any more, to be ended, and from its end on a loss."""
    log.error("instance %s was proved gone, and is there", instance.provider_instance_id)
    if instance.ended_at is not None:
        await billing_rows.bill(tx.conn, instance.id, instance.ended_at)
    await rows.mark_back(tx.conn, instance.id, seen_at)
    return replace(instance, role="stray", gone_at=None, ended_at=None)


async def _close_phases(scene: Scene, ended_at: datetime) -> None:
    conn, instance, attempt = scene.tx.conn, scene.instance, scene.attempt
    if instance.started_at is None and scene.capabilities.get("bills_boot"):
        by_choice = scene.pod.wanted == "gone" and scene.pod.ends_because in ("requested", "agent_revoked")
        payer = "customer" if by_choice else "operator"
        await billing_rows.change_phase(conn, instance.id, instance.known_at, "full", attempt.price_micro_h, payer)
    await billing_rows.change_phase(conn, instance.id, ended_at, "none", 0, "operator")
