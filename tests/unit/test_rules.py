"""The pure rules of a pod's life: what step is due, what a sighting changes, and that every pod ends."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.books import bounded

from gpubroker.providers import base
from gpubroker.sightings import find_moment, follow
from gpubroker.steps import Step, Work, next_step
from gpubroker.store.candidates import Candidate
from gpubroker.store.instances import AttemptRow, InstanceRow, PodRow

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
CAPABILITIES = {
    "boot_limit_seconds": 600,
    "termination_allowance_seconds": 120,
    "moves_hard_stop": True,
    "lookup_seconds": [5, 15, 45],
}
LIVES = get_args(base.Life)
STATES = {
    "running": ("creating", "starting", "running", "unreachable"),
    "stopped": ("stopping", "stopped", "interrupted"),
    "gone": ("terminating", "failed"),
}
HOUR = timedelta(hours=1)


def candidate(n: int) -> dict[str, Any]:
    return Candidate(
        offer_id=f"ofr_{n}", account_id="acc_1", provider="simulated", provider_offer_id=f"o{n}", gpu="L4", gpu_count=1, vram_gb=24,
        vcpus=4,
        ram_gb=16, disk_gb=100, region="eu", country=None, spot=False, price_micro_h=10**6, stopped_micro_h=None, min_billing_s=0,
        increment_s=1, supports=["image", "stop"], reliability=None, capabilities=CAPABILITIES,
    )._asdict()  # fmt: skip


def make_pod(**changes: Any) -> PodRow:
    values: dict[str, Any] = dict.fromkeys(PodRow.__dataclass_fields__)
    values |= {
        "id": "pod_1", "org_id": "org_1", "agent_id": "agt_1", "version": 1, "state": "requested", "billing": "none",
        "wanted": "running",
        "wanted_at": NOW - HOUR, "turn": 1, "failures": 0, "created_at": NOW - HOUR, "ends_at": NOW + 4 * HOUR,
        "hard_stop_at": NOW + 4 * HOUR + timedelta(minutes=15), "spec": {}, "candidates": [candidate(1), candidate(2)],
        "touched_at": NOW, "now": NOW,
    }  # fmt: skip
    return PodRow(**values | changes)


def make_attempt(n: int = 1, **changes: Any) -> AttemptRow:
    values: dict[str, Any] = dict.fromkeys(AttemptRow.__dataclass_fields__)
    values |= {
        "id": f"att_{n}", "org_id": "org_1", "pod_id": "pod_1", "n": n, "account_id": "acc_1", "provider": "simulated",
        "offer_id": f"ofr_{n}", "offer": candidate(n), "price_micro_h": 10**6, "ref": f"gb-x-{n}", "send_before": NOW,
        "over_at": NOW + timedelta(seconds=30),
        "state": "created", "looked_up": 0, "at": NOW - timedelta(minutes=1), "settled_at": NOW,
    }  # fmt: skip
    return AttemptRow(**values | changes)


def make_instance(n: int = 1, **changes: Any) -> InstanceRow:
    values: dict[str, Any] = dict.fromkeys(InstanceRow.__dataclass_fields__)
    values |= {
        "id": f"ins_{n}", "org_id": "org_1", "attempt_id": f"att_{n}", "pod_id": "pod_1", "account_id": "acc_1",
        "provider_instance_id": f"i-{n}", "role": "live", "life": "running", "endpoints": [],
        "known_at": NOW - timedelta(minutes=1), "billed_until": NOW, "misses": 0, "hard_stop_at": NOW + 5 * HOUR,
    }  # fmt: skip
    return InstanceRow(**values | changes)


def sighting(life: base.Life, **changes: Any) -> base.Instance:
    billing: base.Billing = {"running": "full", "stopped": "storage"}.get(life, "none")  # type: ignore[assignment]
    return base.Instance(id="i-1", ref="gb-x-1", status=life.upper(), life=life, billing=billing, **changes)


# Which step is due


def works() -> Iterator[Work]:
    """Every combination of what decides."""
    attempts: list[list[AttemptRow]] = [
        [],
        *([make_attempt(state=state)] for state in ("created", "rejected", "ambiguous", "abandoned")),
    ]
    attempts += [
        [make_attempt(state="open")],
        [make_attempt(state="open", over_at=NOW - HOUR)],
        [make_attempt(2, state="rejected"), make_attempt(1)],
    ]
    ends = (NOW + 4 * HOUR, NOW, NOW - HOUR)
    for wanted, tries, end in itertools.product(("running", "stopped", "gone"), attempts, ends):
        states = STATES[wanted] + (("requested",) if wanted == "running" else ())
        for state, restart in itertools.product(states, (None, NOW)):
            for wanted_at in (NOW - HOUR, NOW - timedelta(seconds=1)):
                pod = make_pod(
                    wanted=wanted,
                    state=state,
                    ends_at=end,
                    hard_stop_at=end + HOUR,
                    restart_requested_at=restart,
                    wanted_at=wanted_at,
                )
                yield Work(pod, tries, None)
                if not any(attempt.id == "att_1" for attempt in tries):
                    continue
                for life, sent, started, age in itertools.product(
                    LIVES, (None, NOW), (None, NOW), (timedelta(minutes=1), HOUR)
                ):
                    yield Work(
                        pod,
                        tries,
                        make_instance(life=life, terminate_sent_at=sent, started_at=started, known_at=NOW - age),
                    )


def is_owed(work: Work) -> bool:
    """Something is not as it is wanted."""
    pod, instance = work.pod, work.instance
    if pod.wanted == "gone":
        return True
    if pod.wanted == "stopped":
        return instance is not None and instance.life in ("running", "starting")
    return instance is None or instance.life != "running"


def test_every_combination_has_its_step_and_none_is_against_what_is_wanted():  # noqa: C901 - a table
    counted: dict[Step, int] = dict.fromkeys(Step, 0)
    for work in works():
        step = next_step(work)
        counted[step] += 1
        pod, instance, attempt = work.pod, work.instance, work.attempt
        told = f"{step.name}: {pod.wanted}, {pod.state}, attempt {attempt and attempt.state}, instance {instance and instance.life}"
        is_open = attempt is not None and attempt.state in ("open", "ambiguous")
        over = pod.now >= pod.ends_at
        assert (step is Step.EXPIRE) == (over and pod.wanted != "gone"), told
        if step in (Step.TERMINATE, Step.CONFIRM, Step.FINISH):
            assert pod.wanted == "gone", told
        if step is Step.FINISH:
            assert instance is None, told
        if step in (Step.FINISH, Step.ATTEMPT, Step.GIVE_UP):
            assert not is_open, f"a create may still be under way: {told}"
        if step in (Step.ATTEMPT, Step.GIVE_UP):
            assert pod.wanted == "running", told
            assert bool(work.untried) == (step is Step.ATTEMPT), told
            assert (
                instance is None
                or instance.life == "failed"
                or (instance.started_at is None and instance.life != "running")
            ), told
        if step is Step.STOP:
            assert pod.wanted == "stopped", told
            assert instance is not None
            assert instance.life in ("running", "starting"), told
        if step is Step.START:
            assert pod.wanted == "running", told
            assert instance is not None
            assert instance.life in ("stopped", "interrupted"), told
        if step is Step.RESTART:
            assert pod.wanted == "running", told
            assert pod.is_restart_pending, told
        if step in (Step.LOOK, Step.CONFIRM, Step.TERMINATE, Step.START, Step.STOP, Step.RESTART, Step.EXTEND):
            assert instance is not None, told
        if step is Step.REST:
            assert not is_owed(work), told
        if attempt is not None and attempt.state == "open" and not over:
            assert step in (Step.WARN, Step.WAIT if pod.now < attempt.over_at else Step.DOUBT), told
    missing = {step.name for step, count in counted.items() if not count} - {"EXTEND", "WARN"}
    assert not missing, f"never due in any combination: {missing}"


def test_an_end_that_was_sent_is_confirmed_and_not_sent_again_at_once():
    pod = make_pod(wanted="gone", state="terminating")
    assert next_step(Work(pod, [make_attempt()], make_instance())) is Step.TERMINATE
    assert next_step(Work(pod, [make_attempt()], make_instance(terminate_sent_at=NOW))) is Step.CONFIRM


def test_the_next_offer_is_one_that_was_not_tried_since_running_was_last_wanted():
    tried = [make_attempt(1, state="rejected", at=NOW)]
    work = Work(make_pod(wanted_at=NOW - HOUR), tried, None)
    assert [c.offer_id for c in work.untried] == ["ofr_2"]
    again = Work(make_pod(wanted_at=NOW + timedelta(seconds=1)), tried, None)
    assert [c.offer_id for c in again.untried] == ["ofr_1", "ofr_2"]


def test_a_boot_that_takes_too_long_is_given_up_and_a_running_one_never():
    late = {"known_at": NOW - timedelta(seconds=601)}
    for life in ("starting", "unknown", "stopping"):
        assert (
            next_step(Work(make_pod(state="starting"), [make_attempt()], make_instance(life=life, **late)))
            is Step.ATTEMPT
        )
        fresh = make_instance(life=life, known_at=NOW - timedelta(seconds=600))
        assert next_step(Work(make_pod(state="starting"), [make_attempt()], fresh)) is Step.LOOK
    started = make_instance(life="unknown", started_at=NOW - HOUR, **late)
    assert next_step(Work(make_pod(state="unreachable"), [make_attempt()], started)) is Step.LOOK
    running = make_instance(started_at=NOW - HOUR, **late)
    assert next_step(Work(make_pod(state="running"), [make_attempt()], running)) is Step.REST


def test_a_hard_stop_that_lags_is_moved_where_it_can_be():
    pod, lagging = make_pod(state="running"), make_instance(started_at=NOW, hard_stop_at=NOW + HOUR)
    assert next_step(Work(pod, [make_attempt()], lagging)) is Step.EXTEND
    fixed = {**candidate(1), "capabilities": CAPABILITIES | {"moves_hard_stop": False}}
    assert next_step(Work(pod, [make_attempt(offer=fixed)], lagging)) is Step.REST


# What a sighting changes


def pairs() -> Iterator[tuple[PodRow, InstanceRow, base.Instance]]:
    for wanted, states in STATES.items():
        for state, life, known, restart in itertools.product(states, LIVES, LIVES, (None, NOW)):
            for spec in (
                {},
                {"on_exit": "terminate"},
                {"restart_policy": "always"},
                {"restart_policy": "on_interrupt"},
            ):
                pod = make_pod(wanted=wanted, state=state, restart_requested_at=restart, spec=spec)
                yield pod, make_instance(life=known), sighting(life, exit_code=3 if life == "stopped" else None)


def test_no_sighting_wakes_a_pod_whose_end_is_wanted_nor_follows_a_stray():
    for pod, instance, seen in pairs():
        if pod.wanted == "gone":
            assert follow(pod, instance, seen, NOW) == pod
        assert follow(pod, replace(instance, role="stray"), seen, NOW) == pod


def test_only_what_is_seen_running_is_running_and_only_what_is_seen_stopped_is_stopped():
    for pod, instance, seen in pairs():
        after = follow(pod, instance, seen, NOW)
        if after.state == "running" and pod.state != "running":
            assert seen.life == "running"
        if after.state == "stopped" and pod.state != "stopped":
            assert seen.life == "stopped" or (seen.life == "interrupted" and pod.wanted == "stopped")
            assert after.exit_code == seen.exit_code
        if after.state == "interrupted" and pod.state != "interrupted":
            assert seen.life == "interrupted"
        if after.running_at is not None:
            assert seen.life == "running"
        if seen.life in ("unknown", "gone", "terminating"):
            assert (after.state, after.wanted) == (pod.state, pod.wanted)


def test_a_sighting_never_wants_what_its_agent_does_not():
    for pod, instance, seen in pairs():
        after = follow(pod, instance, seen, NOW)
        if pod.wanted == "stopped":
            assert after.wanted == "stopped"
        if after.wanted == "gone" and pod.wanted != "gone":
            assert pod.spec.get("on_exit") == "terminate"
            assert (seen.life, after.ends_because) in (("stopped", "exited"), ("interrupted", "interrupted"))
            assert after.state == "terminating"
            assert after.charge_until == NOW + timedelta(seconds=120)


def test_a_program_that_ends_by_itself_stops_the_pod_unless_it_is_to_end_or_start_again():
    running = make_instance(life="running", started_at=NOW)
    for spec, state, wanted in (
        ({}, "stopped", "stopped"), ({"on_exit": "keep"}, "stopped", "stopped"), ({"on_exit": "terminate"}, "terminating", "gone"),
        ({"restart_policy": "always"}, "stopped", "running"),
    ):  # fmt: skip
        after = follow(make_pod(state="running", spec=spec), running, sighting("stopped", exit_code=7), NOW)
        assert (after.state, after.wanted, after.exit_code) == (state, wanted, 7), spec
    pending = make_pod(state="starting", restart_requested_at=NOW)
    assert follow(pending, running, sighting("stopped"), NOW).wanted == "running"


def test_what_the_provider_took_away_is_interrupted_and_not_wanted_back_by_default():
    after = follow(
        make_pod(state="running"), make_instance(started_at=NOW), sighting("interrupted", reason="outbid"), NOW
    )
    assert (after.state, after.wanted, after.state_reason) == ("interrupted", "stopped", "outbid")


def test_what_was_taken_away_comes_back_or_ends_where_its_agent_said_so():
    running, taken = make_instance(life="running", started_at=NOW), sighting("interrupted")
    for spec, state, wanted, because in (
        ({"restart_policy": "on_interrupt"}, "interrupted", "running", None),
        ({"restart_policy": "always"}, "interrupted", "running", None),
        ({"restart_policy": "on_interrupt", "on_exit": "terminate"}, "interrupted", "running", None),
        ({"on_exit": "terminate"}, "terminating", "gone", "interrupted"),
    ):  # fmt: skip
        after = follow(make_pod(state="running", spec=spec), running, taken, NOW)
        assert (after.state, after.wanted, after.ends_because) == (state, wanted, because), spec
        if wanted == "running":
            assert (after.wanted_at, after.due_at) == (NOW, NOW + timedelta(seconds=5))
            assert next_step(Work(after, [make_attempt()], make_instance(life="interrupted"))) is Step.START
            assert next_step(Work(after, [make_attempt()], None)) is Step.ATTEMPT
    starting = make_pod(state="starting")  # its agent started it: a look from before that takes nothing back
    assert follow(starting, make_instance(life="interrupted", started_at=NOW), taken, NOW) == starting
    stopping = make_pod(state="stopping", wanted="stopped", spec={"restart_policy": "always"})
    assert follow(stopping, running, taken, NOW).wanted == "stopped"


def test_a_bid_that_was_asked_to_stop_has_stopped_and_one_that_was_lost_stays_interrupted():
    taken = sighting("interrupted")
    stopping = make_pod(wanted="stopped", state="stopping")
    assert follow(stopping, make_instance(started_at=NOW), taken, NOW).state == "stopped"
    lost = make_pod(wanted="stopped", state="interrupted")
    assert follow(lost, make_instance(started_at=NOW, life="interrupted"), taken, NOW).state == "interrupted"


def test_what_ended_by_itself_and_bills_as_if_it_ran_is_stopped_once():
    ended = make_pod(wanted="stopped", state="stopped", billing="full", wanted_at=NOW - timedelta(seconds=1))
    instance = make_instance(life="stopped", started_at=NOW - HOUR, commanded_at=NOW - HOUR)
    assert next_step(Work(ended, [make_attempt()], instance)) is Step.STOP
    assert next_step(Work(ended, [make_attempt()], replace(instance, commanded_at=NOW))) is Step.REST
    assert next_step(Work(replace(ended, billing="storage"), [make_attempt()], instance)) is Step.REST
    dear = {**candidate(1), "capabilities": CAPABILITIES | {"stopped_billing": "full"}}
    assert next_step(Work(ended, [make_attempt(offer=dear)], instance)) is Step.REST


@given(
    told=st.one_of(st.none(), st.integers(-10_000, 10_000)), seen=st.one_of(st.none(), st.integers(-5_000, 0)),
    known=st.integers(-9_000, 0), tried=st.integers(-9_000, 0), life=st.sampled_from(LIVES),
)  # fmt: skip
@bounded(300)
def test_a_vendors_time_only_refines_between_two_of_our_observations(
    told: int | None, seen: int | None, known: int, tried: int, life: base.Life
):
    def at(seconds: int) -> datetime:
        return NOW + timedelta(seconds=seconds)

    instance = make_instance(seen_at=None if seen is None else at(seen), known_at=at(known))
    attempt = make_attempt(at=at(tried))
    said = {"started_at" if life == "running" else "ended_at": None if told is None else at(told)}
    moment = find_moment(instance, attempt, sighting(life, **said), NOW)
    earliest = at(seen) if seen is not None else min(at(tried), at(known))
    assert earliest <= moment <= NOW
    if told is None:
        assert moment == NOW
    elif earliest <= at(told) <= NOW:
        assert moment == at(told)


# Every pod ends


class Universe:
    """A pod, a vendor and a clock, with `choose` for all that may happen; steps have the effects that DESIGN gives them."""

    def __init__(self, choose: Any) -> None:
        self.choose = choose
        self.pod = make_pod(now=NOW, wanted_at=NOW, created_at=NOW, ends_at=NOW + HOUR, hard_stop_at=NOW + 2 * HOUR)
        self.attempts: list[AttemptRow] = []
        self.instance: InstanceRow | None = None
        self.truth: base.Life = "gone"
        """What the vendor has."""
        self.is_over = False

    def pass_time(self, seconds: float) -> None:
        self.pod = replace(self.pod, now=self.pod.now + timedelta(seconds=seconds))

    def work(self) -> Work:
        return Work(self.pod, self.attempts, self.instance)

    def step(self) -> Step:
        step = next_step(self.work())
        {
            Step.REST: self.rest, Step.WAIT: self.wait, Step.DOUBT: self.doubt, Step.LOOK_UP: self.look_up,
            Step.ATTEMPT: self.attempt, Step.GIVE_UP: self.want_end, Step.EXPIRE: self.want_end, Step.LOOK: self.look,
            Step.CONFIRM: self.confirm, Step.TERMINATE: self.terminate, Step.START: self.start, Step.STOP: self.stop,
            Step.RESTART: self.restart, Step.EXTEND: self.extend, Step.WARN: self.warn, Step.FINISH: self.finish,
        }[step]()  # fmt: skip
        self.pass_time(1)
        return step

    def rest(self) -> None:
        what = self.choose(["nothing", "stop", "start", "delete", "exits", "taken", "vanishes", "fails"])
        if what == "delete":
            self.want_end()
        elif what == "stop" and self.pod.state == "running":
            self.pod = replace(self.pod, wanted="stopped", wanted_at=self.pod.now, state="stopping")
        elif what == "start" and self.pod.state in ("stopped", "interrupted"):
            self.pod = replace(self.pod, wanted="running", wanted_at=self.pod.now, state="starting")
        elif what in ("exits", "taken", "vanishes", "fails") and self.instance is not None:
            happened: dict[str, base.Life] = {
                "exits": "stopped",
                "taken": "interrupted",
                "vanishes": "gone",
                "fails": "failed",
            }
            self.truth = happened[what]
            self.look()
        self.pass_time(self.choose([1800, 60, 1]))

    def wait(self) -> None:
        self.pass_time(30)

    def settle(self, **changes: Any) -> None:
        self.attempts[0] = replace(self.attempts[0], settled_at=self.pod.now, **changes)

    def doubt(self) -> None:
        self.settle(state="ambiguous")

    def attempt(self) -> None:
        assert self.instance is not None or self.truth == "gone", "a second instance beside one that nobody knows"
        self.forget_instance()
        offer = self.work().untried[0]
        n = len(self.attempts) + 1
        made = make_attempt(
            n,
            offer_id=offer.offer_id,
            offer=offer._asdict(),
            state="open",
            at=self.pod.now,
            over_at=self.pod.now + timedelta(seconds=30),
        )
        self.attempts.insert(0, made)
        self.pod = replace(self.pod, state="creating")
        outcome = self.choose(
            ["created", "rejected", "lost before", "lost after", "ambiguous before", "ambiguous after"]
        )
        if outcome in ("created", "lost after", "ambiguous after"):
            self.truth = "starting"
        if outcome == "created":
            self.adopt()
        elif outcome == "rejected":
            self.settle(state="rejected")
        elif outcome.startswith("ambiguous"):
            self.settle(state="ambiguous")

    def adopt(self) -> None:
        self.settle(state="created")
        n = self.attempts[0].n
        self.instance = make_instance(
            n, attempt_id=f"att_{n}", life="unknown", known_at=self.pod.now, hard_stop_at=self.pod.hard_stop_at
        )
        if self.pod.wanted != "gone":
            self.pod = replace(self.pod, state="starting")

    def look_up(self) -> None:
        self.pass_time(15)
        if self.truth != "gone":
            self.adopt()
        elif self.attempts[0].looked_up + 1 >= 3:
            self.settle(state="abandoned")
        else:
            self.attempts[0] = replace(self.attempts[0], looked_up=self.attempts[0].looked_up + 1)

    def look(self) -> None:
        assert self.instance is not None
        self.pass_time(self.choose([600, 2]))
        if self.truth == "starting":
            self.truth = self.choose(["running", "starting", "failed", "gone"])
            self.pass_time(120)
        elif self.truth == "stopping":
            self.truth = self.choose(["stopped", "stopping"])
        if self.truth == "gone":
            self.lose()
            return
        self.see(self.choose([self.truth, "unknown"]))

    def see(self, life: base.Life) -> None:
        assert self.instance is not None
        if life != "unknown":
            self.pod = follow(self.pod, self.instance, sighting(life), self.pod.now)
        started = self.instance.started_at or (self.pod.now if life == "running" else None)
        self.instance = replace(self.instance, life=life, started_at=started)

    def lose(self) -> None:
        self.instance = None
        if self.pod.wanted != "gone":
            self.pod = replace(self.pod, state="interrupted", wanted="stopped", wanted_at=self.pod.now)

    def forget_instance(self) -> None:
        """Failed over: it is a stray, and the sweep's."""
        self.instance, self.truth = None, "gone"

    def command(self, life: base.Life, truth: base.Life) -> None:
        assert self.instance is not None
        if self.choose([True, False]):  # else the call failed and changed nothing
            self.instance = replace(self.instance, life=life)
            if self.truth != "gone":
                self.truth = truth
            self.look()
        else:
            self.pass_time(30)

    def start(self) -> None:
        self.command("starting", "running")

    def stop(self) -> None:
        self.command("stopping", "stopping")

    def restart(self) -> None:
        self.pod = replace(self.pod, restart_done_at=self.pod.restart_requested_at)

    def extend(self) -> None:
        self.instance = replace(self.instance, hard_stop_at=self.pod.hard_stop_at)  # type: ignore[type-var]

    def warn(self) -> None:
        self.pod = replace(self.pod, expiring_told_at=self.pod.now)

    def want_end(self) -> None:
        self.pod = replace(self.pod, wanted="gone", wanted_at=self.pod.now, state="terminating")

    def terminate(self) -> None:
        assert self.instance is not None
        if self.choose([True, False]):
            self.instance = replace(self.instance, terminate_sent_at=self.pod.now, life="terminating")
            self.truth = self.choose(["gone", "terminating"])
        self.pass_time(5)

    def confirm(self) -> None:
        if self.truth == "terminating":
            self.truth = self.choose(["gone", "terminating"])
        if self.truth == "gone":
            self.lose()
        self.pass_time(60)

    def finish(self) -> None:
        assert self.truth == "gone", "it was finished while the vendor still has its instance"
        self.is_over = True


@given(st.data())
@bounded(400)
def test_every_pod_ends_whatever_happens_and_never_has_two_instances(data: st.DataObject):
    troubles = data.draw(st.integers(0, 60))
    steps = 0

    def choose(options: list[Any]) -> Any:
        """Anything may happen for a while; then the vendor does what it is asked, which each list names first."""
        return data.draw(st.sampled_from(options)) if steps < troubles else options[0]

    universe = Universe(choose)
    while not universe.is_over:
        step = universe.step()
        steps += 1
        assert steps < troubles + 80, f"it does not end: {step.name}, {universe.pod.state}, {universe.truth}"
    assert universe.instance is None
    assert universe.pod.wanted == "gone"


def test_a_rule_that_rests_too_early_would_be_found(monkeypatch: pytest.MonkeyPatch):
    """The exploration has teeth: a pod whose end is wanted, and that rests, does not end."""
    real = next_step

    def lazy(work: Work) -> Step:
        return Step.REST if work.pod.wanted == "gone" and work.instance is not None else real(work)

    monkeypatch.setitem(globals(), "next_step", lazy)
    with pytest.raises(AssertionError, match="does not end"):
        test_every_pod_ends_whatever_happens_and_never_has_two_instances()
