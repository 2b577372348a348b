"""Which step of a pod is due: a pure rule over its rows. `gpubroker.provisioning` takes the step."""

from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, auto
from typing import Final

from gpubroker.store.candidates import Candidate, read_candidate
from gpubroker.store.instances import AttemptRow, InstanceRow, PodRow

NO_TURN: Final = frozenset({"throttled", "own_limit"})
"""Rejections that say nothing of the offer: the provider takes no further call just now."""
MOST_THROTTLED: Final = 20
"""After so many creates without a turn its provider is as good as full."""


class Step(Enum):
    """What is due for a pod."""

    REST = auto()
    EXPIRE = auto()
    WARN = auto()
    WAIT = auto()
    DOUBT = auto()
    LOOK_UP = auto()
    ATTEMPT = auto()
    GIVE_UP = auto()
    LOOK = auto()
    START = auto()
    STOP = auto()
    RESTART = auto()
    EXTEND = auto()
    TERMINATE = auto()
    CONFIRM = auto()
    FINISH = auto()


@dataclass(frozen=True, slots=True)
class Work:
    """A claimed pod with all that decides its next step. `instance` is None when it has none that may be alive."""

    pod: PodRow
    attempts: list[AttemptRow]
    instance: InstanceRow | None

    @property
    def attempt(self) -> AttemptRow | None:
        """The latest attempt."""
        return self.attempts[0] if self.attempts else None

    @property
    def maker(self) -> AttemptRow:
        """The attempt that made the instance."""
        made = self.instance.attempt_id if self.instance else None
        return next(attempt for attempt in self.attempts if attempt.id == made)

    @property
    def tries(self) -> list[AttemptRow]:
        """The attempts since running was last wanted."""
        return [a for a in self.attempts if a.at >= self.pod.wanted_at]

    @property
    def throttled(self) -> list[AttemptRow]:
        """Those for which the provider had no turn: they say nothing of their offers."""
        return [a for a in self.tries if a.state == "rejected" and a.code in NO_TURN]

    @property
    def untried(self) -> list[Candidate]:
        """The offers to try next, best first: those that were not, then those that only had no turn."""
        tried, judged = {a.offer_id for a in self.tries}, {a.offer_id for a in self.tries if a not in self.throttled}
        again = judged if len(self.throttled) < MOST_THROTTLED else tried
        left = [read_candidate(c) for c in self.pod.candidates if c["offer_id"] not in again]
        return sorted(left, key=lambda candidate: candidate.offer_id in tried)


def next_step(work: Work) -> Step:  # noqa: PLR0911 - a table: each row is one state of affairs
    """The step that is due. A pure rule over rows: who asked for it, or in which order things came, plays no part."""
    pod, attempt, instance = work.pod, work.attempt, work.instance
    if pod.wanted != "gone" and (pod.now >= pod.ends_at or (pod.idle_at is not None and pod.now >= pod.idle_at)):
        return Step.EXPIRE
    if pod.wanted != "gone" and pod.warns_at is not None and pod.now >= pod.warns_at:
        return Step.WARN
    if attempt is not None and attempt.state == "open":
        return Step.WAIT if pod.now < attempt.over_at else Step.DOUBT
    if attempt is not None and attempt.state == "ambiguous":
        return Step.LOOK_UP
    if instance is None:
        return {"gone": Step.FINISH, "stopped": Step.REST, "running": _next_attempt(work)}[pod.wanted]
    if pod.wanted == "gone":
        return Step.TERMINATE if instance.terminate_sent_at is None else Step.CONFIRM
    if pod.wanted == "stopped":
        if instance.life in ("running", "starting") or _is_kept_for_nothing(work, instance):
            return Step.STOP
        return _next_resting_step(work, instance, rests=instance.life in ("stopped", "interrupted"))
    return _next_running_step(work, instance)


def _next_resting_step(work: Work, instance: InstanceRow, *, rests: bool) -> Step:
    """Nothing is to be changed but the provider's own end of it; what a listing lacked is looked at."""
    hard_stop_at = work.pod.hard_stop_at.replace(microsecond=0)  # providers and references know whole seconds
    if not rests or instance.missed_since is not None:
        return Step.LOOK
    if instance.hard_stop_at is not None and instance.hard_stop_at < hard_stop_at and _can(work, "moves_hard_stop"):
        return Step.EXTEND
    return Step.REST


def _is_kept_for_nothing(work: Work, instance: InstanceRow) -> bool:
    """Its program ended by itself, and the provider bills it as if it ran: a stop that was not sent yet makes it cheaper."""
    capabilities = work.maker.candidate.capabilities
    can = "stop" in work.maker.candidate.supports and capabilities.get("stopped_billing") != "full"
    was_sent = instance.commanded_at is not None and instance.commanded_at >= work.pod.wanted_at
    return can and instance.life == "stopped" and work.pod.billing == "full" and not was_sent


def _next_attempt(work: Work) -> Step:
    return Step.ATTEMPT if work.untried else Step.GIVE_UP


def _next_running_step(work: Work, instance: InstanceRow) -> Step:
    pod = work.pod
    is_lost = instance.life == "interrupted" and "stop" not in work.maker.candidate.supports
    if instance.life in ("stopped", "interrupted") and not is_lost:
        return Step.START
    if is_lost or instance.life == "failed" or _is_boot_over(work, instance):
        return _next_attempt(work)
    is_unreachable = instance.life == "unknown" and instance.started_at is not None
    if pod.is_restart_pending and (instance.life == "running" or is_unreachable):
        return Step.RESTART
    return _next_resting_step(work, instance, rests=instance.life == "running" and pod.state == "running")


def _is_boot_over(work: Work, instance: InstanceRow) -> bool:
    if instance.started_at is not None or instance.life == "running":
        return False
    limit = timedelta(seconds=int(work.maker.candidate.capabilities["boot_limit_seconds"]))
    return work.pod.now - instance.known_at > limit


def _can(work: Work, capability: str) -> bool:
    return bool(work.maker.candidate.capabilities.get(capability))
