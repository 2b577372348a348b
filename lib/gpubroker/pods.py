"""Pods as their agents see them: shown, waited for, acted on, ended. `gpubroker.pod_requests` asks for new ones.

Nothing here calls a provider: what is wanted becomes rows, and `gpubroker.provisioning` makes them true.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Annotated, Any, Final, Literal

import psycopg
from pydantic import BeforeValidator, Field

from gpubroker import budgets, errors, holds, inputs, outbox, paging, store
from gpubroker.events import ActionData, PodData
from gpubroker.inputs import Input
from gpubroker.money import HOUR, InUsd, format_usd
from gpubroker.resources import Page, State
from gpubroker.resources.pods import AttemptView, ChosenOffer, Endpoint, Pod, PodEvent
from gpubroker.store import budgets as budgets_rows
from gpubroker.store import events as event_rows
from gpubroker.store import pods as rows
from gpubroker.store import tokens as token_rows
from gpubroker.store.candidates import Candidate, read_candidate
from gpubroker.times import count_micros, parse_time

Opener = Callable[[], AbstractAsyncContextManager[store.Transaction]]
"""Opens a transaction of the caller, authenticated anew."""

LONGEST_WAIT: Final = 60
LONGEST_LIFE_SECONDS: Final = 366 * 24 * HOUR
Life = Annotated[int, Field(ge=holds.SHORTEST_LIFE_SECONDS, le=LONGEST_LIFE_SECONDS)]
"""Seconds from a pod's creation to its end."""
_ACTIONS: Final[Mapping[str, Sequence[str]]] = {
    "requested": ("extend",),
    "creating": ("extend",),
    "starting": ("extend",),
    "running": ("stop", "restart", "extend", "exec", "logs"),
    "stopping": ("logs",),
    "stopped": ("start", "extend", "logs"),
    "interrupted": ("start", "extend", "logs"),
    "unreachable": ("restart", "logs"),
}
_MOST_AT_ONCE: Final = 10_000
_NEEDS_STOP: Final = frozenset({"stop", "start"})
_SETTLED: Final = frozenset({"running", "stopped", "terminated", "failed"})


class ExtendRequest(Input):
    """New totals, never smaller than the present ones."""

    max_lifetime_seconds: Life | None = None
    budget_usd: InUsd | None = None


class WaitQuery(inputs.Query):
    """How long to wait for the pod to change before answering."""

    wait: Annotated[int, Field(ge=0, le=LONGEST_WAIT), inputs.Whole] = 0
    until: Literal["running", "settled", "change"] = "settled"
    after_version: Annotated[int, Field(ge=0), inputs.Whole] | None = None


LabelPair = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}=", max_length=300)]


def read_labels(pairs: Sequence[str] | None) -> dict[str, str] | None:
    """Labels from `key=value` texts. Raises Invalid for a key with two values: no pod has both."""
    if not pairs:
        return None
    labels: dict[str, str] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if labels.setdefault(key, value) != value:
            raise inputs.invalid("?label", f"asks for two values of {key}")
    return labels


# Acting on a pod


async def act(tx: store.Transaction, pod_id: str, action: Literal["start", "stop", "restart"]) -> None:
    """Want a pod started, stopped or restarted. Raises NotFound, Forbidden, NotSupported or ActionNotAllowed."""
    pod = await _lock(tx, pod_id)
    if action != "stop":
        _refuse_ancestor(tx.known, pod, action)
    _refuse_action(pod, action)
    change = {"start": rows.want_running, "stop": rows.want_stopped, "restart": rows.want_restart}[action]
    await change(tx.conn, pod_id)
    await _announce(tx, pod_id, action)


async def extend(tx: store.Transaction, pod_id: str, request: ExtendRequest) -> None:
    """Give a pod a longer life under a further hold. Raises Invalid, NotSupported, BudgetExhausted or ActionNotAllowed."""
    pod = await _lock(tx, pod_id)
    _refuse_ancestor(tx.known, pod, "extend")
    await _refuse_capped(tx, pod_id)
    _refuse_action(pod, "extend")
    if request.max_lifetime_seconds is None and request.budget_usd is None:
        raise inputs.invalid("/max_lifetime_seconds", "max_lifetime_seconds or budget_usd is needed")
    candidate = _read_candidate(pod)
    taken, held = await rows.sum_holds(tx.conn, pod_id)
    possible = [candidate] if pod.running_at else await rows.list_candidates(tx.conn, pod_id)
    life, budget = _new_totals(pod, request, possible)
    present_life = round((pod.ends_at - pod.created_at).total_seconds())
    movable = bool(candidate.capabilities.get("moves_hard_stop")) or not pod.attempts
    latest = round((pod.hard_stop_at - pod.created_at).total_seconds())
    if life > latest and not movable:
        msg = f"{candidate.provider} cannot move the pod's hard stop; the longest lifetime it can have is {latest} seconds."
        raise errors.NotSupported(
            msg, more={"errors": [{"pointer": "/max_lifetime_seconds", "message": f"at most {latest}"}]}
        )
    needed, worst = holds.needed_micro(possible, life), holds.dearest(possible)
    if budget is not None and needed > budget:
        raise budgets.refuse(needed, budget, worst.price_micro_h, holds.fixed_micro(worst), tx.known.agent_id)
    await rows.extend(tx.conn, pod_id, life, request.budget_usd, move_hard_stop=movable)
    if life > present_life:
        await _announce(tx, pod_id, "extend")
    if needed > held:
        await _take_more(tx, pod, taken, needed - held, worst)


async def _take_more(tx: store.Transaction, pod: rows.PodView, taken: int, more: int, candidate: Candidate) -> None:
    purse = budgets.Purse(tx.known, await budgets_rows.list_standings(tx.conn, tx.known.path))
    try:
        async with tx.conn.transaction():
            await rows.take_hold(tx.conn, pod.id, f"extend:{taken}", pod.agent_id, more)
    except psycopg.Error as error:
        limiting = holds.limiting_agent(error)
        if limiting is None:
            raise
        raise purse.refuse(more, candidate.price_micro_h, 0, limiting=limiting) from None


def _new_totals(pod: rows.PodView, request: ExtendRequest, possible: Sequence[Candidate]) -> tuple[int, int | None]:
    present = round((pod.ends_at - pod.created_at).total_seconds())
    budget = pod.budget_micro if request.budget_usd is None else request.budget_usd
    if request.max_lifetime_seconds is not None and request.max_lifetime_seconds < present:
        raise inputs.invalid("/max_lifetime_seconds", f"is less than the present {present}: extend gives new totals")
    if request.budget_usd is not None and pod.budget_micro is not None and request.budget_usd < pod.budget_micro:
        raise inputs.invalid(
            "/budget_usd", f"is less than the present {format_usd(pod.budget_micro)}: extend gives new totals"
        )
    if request.max_lifetime_seconds is not None:
        return request.max_lifetime_seconds, budget
    paid_for = holds.affordable_life(possible, budget or 0)
    return min(max(present, paid_for), LONGEST_LIFE_SECONDS), budget


class Selection(inputs.Query):
    """Which pods: all that is given must hold."""

    state: list[State] | None = None
    agent_id: str | None = None
    label: list[LabelPair] | None = None
    created_after: Annotated[datetime, BeforeValidator(parse_time)] | None = None

    def of(self, caller: store.Caller, *, live: bool = False) -> rows.Selection:
        """The pods of the caller's subtree that are meant; `live` leaves out those whose end is wanted."""
        return rows.Selection(
            caller.agent_id, self.state, self.agent_id, read_labels(self.label), self.created_after, live=live
        )


async def terminate_all(tx: store.Transaction, which: Selection) -> list[str]:
    """Want the end of every pod of the subtree that is meant. Raises Invalid when nothing is said of which."""
    if not which.model_fields_set:
        raise inputs.invalid("?label", "or another filter is needed: state, agent_id or created_after")
    found = await rows.list_pods(tx.conn, which.of(tx.known, live=True), None, _MOST_AT_ONCE)
    for pod_id in sorted(pod.id for pod in found):
        await end_pod(tx, await _lock(tx, pod_id), "requested")
    return [pod.id for pod in found]


async def terminate(tx: store.Transaction, pod_id: str) -> None:
    """Want a pod's end; again is harmless. Raises NotFound."""
    pod = await _lock(tx, pod_id)
    await end_pod(tx, pod, "requested")


async def end_pod(tx: store.Transaction, pod: rows.PodView, because: str) -> bool:
    """Want the end of a pod that is locked; false when it was wanted before."""
    allowance = int(_read_candidate(pod).capabilities.get("termination_allowance_seconds", 0))
    if not await rows.want_gone(tx.conn, pod.id, because, allowance):
        return False
    data = PodData(
        pod_id=pod.id,
        agent_id=pod.agent_id,
        state="terminating",
        version=pod.version + 1,
        name=pod.name,
        ends_because=because,
    )
    await outbox.write(tx, "pod.terminating", pod.id, data, tenant=pod.org_id, agent_id=pod.agent_id)
    return True


async def end_pods_of(tx: store.Transaction, agent_ids: Sequence[str], because: str) -> int:
    """Want the end of every live pod of these agents of the caller's subtree; how many that were."""
    ids = await rows.list_live_of(tx.conn, agent_ids)
    for pod_id in ids:
        await end_pod(tx, await _lock(tx, pod_id), because)
    return len(ids)


async def end_all(because: str, provider: str) -> int:
    """Want the end of every live pod whose first choice is an offer of this provider; how many that were."""
    async with store.worker() as tx:
        ids = await rows.list_of_provider(tx.conn, provider)
        for pod_id in ids:
            pod = await rows.find_any_pod(tx.conn, pod_id)
            if pod is not None:
                await end_pod(tx, pod, because)
    return len(ids)


async def _lock(tx: store.Transaction, pod_id: str) -> rows.PodView:
    if not await rows.lock_pod(tx.conn, tx.known.agent_id, pod_id):
        raise errors.NotFound
    return await find_view(tx, pod_id)


def _refuse_ancestor(caller: store.Caller, pod: rows.PodView, action: str) -> None:
    if pod.agent_id != caller.agent_id:
        msg = f"Only the pod's own agent may {action} it; agents above may list, stop and terminate it."
        raise errors.Forbidden(msg, hint="Have the pod's agent do it, or terminate the pod.")


async def _refuse_capped(tx: store.Transaction, pod_id: str) -> None:
    """Raise Forbidden for a token with a budget against which this pod's holds would not count."""
    jti = tx.known.jti
    if (
        jti is None
        or await token_rows.find_least_room(tx.conn, jti) is None
        or await token_rows.covers(tx.conn, jti, pod_id)
    ):
        return
    raise errors.Forbidden(
        "A token with a budget of its own extends only pods that were made with it: others would spend beyond it.",
        hint="Use an API key, or a token without budget_usd.",
    )


def _refuse_action(pod: rows.PodView, action: str) -> None:
    candidate = _read_candidate(pod)
    if not _is_able(candidate, action):
        raise errors.NotSupported(f"{candidate.provider} cannot {action} a pod.", more={"errors": []})
    allowed = allow_actions(pod)
    if action not in allowed:
        raise errors.ActionNotAllowed(
            f"A pod that is {pod.state} cannot be told to {action}.",
            more={"allowed_actions": allowed, "state": pod.state},
            steps=[errors.Next("GET", f"/v1/pods/{pod.id}?wait=30")],
        )


async def _announce(tx: store.Transaction, pod_id: str, action: str) -> None:
    pod = await find_view(tx, pod_id)
    data = ActionData(
        pod_id=pod.id, agent_id=pod.agent_id, state=pod.state, version=pod.version, name=pod.name, action=action,
        expires_at=pod.ends_at,
    )  # fmt: skip
    await outbox.write(tx, "pod.action-requested", pod.id, data, tenant=pod.org_id, agent_id=pod.agent_id)


# Showing pods


async def find_view(tx: store.Transaction, pod_id: str) -> rows.PodView:
    """A pod of the caller's subtree. Raises NotFound."""
    pod = await rows.find_pod(tx.conn, tx.known.agent_id, pod_id)
    if pod is None:
        raise errors.NotFound
    return pod


async def show_pod(tx: store.Transaction, pod_id: str) -> Pod:
    """A pod of the caller's subtree in its public form. Raises NotFound."""
    return present(await find_view(tx, pod_id))


def is_settled(pod: rows.PodView) -> bool:
    """Say whether the pod stays as it is until somebody wants something else or its time is over."""
    if pod.wanted == "gone":
        return pod.state in ("terminated", "failed")
    return pod.state in _SETTLED


def _is_able(candidate: Candidate, action: str) -> bool:
    """Whether its provider has this action. A machine keeps its disk when it is restarted, a container where it can be stopped."""
    can, stops = candidate.capabilities, "stop" in candidate.supports
    if action == "restart":
        return bool(can.get("restarts", True)) and (stops or can.get("kind") == "vm")
    return stops or action not in _NEEDS_STOP


def allow_actions(pod: rows.PodView) -> list[str]:
    """What may be done with the pod now."""
    candidate = _read_candidate(pod)
    able = [
        action
        for action in _ACTIONS.get(pod.state, ("logs",))
        if _is_able(candidate, action) and (action not in ("exec", "logs") or action in candidate.supports)
    ]
    return able if pod.wanted == "gone" else [*able, "terminate"]


def present(pod: rows.PodView) -> Pod:
    """The public form of a pod."""
    candidate = _read_candidate(pod)
    settled = is_settled(pod)
    boot = int(candidate.capabilities.get("boot_seconds", 0))
    return Pod(
        id=pod.id,
        name=pod.name,
        state=pod.state,  # pyright: ignore[reportArgumentType] - the database's CHECK is this Literal
        state_reason=pod.state_reason,
        billing=pod.billing,
        provider=pod.provider,
        provider_instance_id=pod.provider_instance_id,
        provider_status=pod.provider_status,
        offer=present_offer(candidate),
        price_usd_per_hour=candidate.price_micro_h,
        spent_usd=pod.spent_micro,
        budget_usd=pod.budget_micro,
        committed_usd=pod.committed_micro,
        endpoints=[_present_endpoint(endpoint, pod.spec) for endpoint in pod.endpoints],
        labels=pod.labels,
        agent_id=pod.agent_id,
        attempts=[AttemptView(**attempt) for attempt in pod.attempts],
        allowed_actions=allow_actions(pod),
        version=pod.version,
        settled=settled,
        poll_after_seconds=None if settled else 2,
        eta_seconds=max(0, round(boot - pod.age_seconds)) if not settled and pod.wanted == "running" else None,
        ends_because=pod.ends_because,
        exit_code=pod.exit_code,
        links={
            "self": f"/v1/pods/{pod.id}",
            "logs": f"/v1/logs/{pod.id}",
            "exec": f"/v1/exec/{pod.id}",
            "usage": f"/v1/usage/records?pod_id={pod.id}",
        },
        created_at=pod.created_at,
        running_at=pod.running_at,
        expires_at=pod.ends_at,
        terminated_at=pod.terminated_at,
    )


def _present_endpoint(endpoint: dict[str, Any], spec: dict[str, Any]) -> Endpoint:
    """What is forwarded as TCP is HTTP where that was asked for: not every provider knows."""
    asked = {port["port"] for port in spec.get("ports") or () if port["protocol"] == "http"}
    shown = Endpoint(**endpoint)
    if shown.protocol != "tcp" or shown.port not in asked or shown.command:
        return shown
    url = f"http://{shown.host}:{shown.external_port}"
    return shown.model_copy(update={"name": f"http-{shown.port}", "protocol": "http", "url": url})


def present_offer(candidate: Candidate) -> ChosenOffer:
    """An offer as it was when it was chosen, in its public form."""
    same = {name: getattr(candidate, name) for name in ChosenOffer.model_fields if name in Candidate._fields}
    return ChosenOffer(
        id=candidate.offer_id,
        price_usd_per_hour=candidate.price_micro_h,
        price_usd_per_gpu_hour=candidate.price_micro_h // candidate.gpu_count if candidate.gpu_count else None,
        min_billing_seconds=candidate.min_billing_s,
        billing_increment_seconds=candidate.increment_s,
        stopped_price_usd_per_hour=candidate.stopped_micro_h,
        **same,
    )


def _read_candidate(pod: rows.PodView) -> Candidate:
    return read_candidate(pod.offer or pod.first_offer or {})


async def wait(open_transaction: Opener, pod_id: str, query: WaitQuery, *, gone: bool = False) -> rows.PodView:
    """The pod, as soon as it is what is waited for, or when the time is over. Each look authenticates anew.

    A pod that is due has its event published again: waiting moves things, as far as they can be moved.
    """
    deadline = time.monotonic() + query.wait
    pause = 0.05
    version = query.after_version
    while True:
        async with open_transaction() as tx:
            pod = await find_view(tx, pod_id)
            await touch(tx, pod)
            if pod.due:
                await event_rows.wake(tx, pod_id)
        version = pod.version if version is None else version
        left = deadline - time.monotonic()
        if left <= 0 or _is_reached(pod, query.until, version, gone=gone):
            return pod
        await asyncio.sleep(min(pause, left))
        pause = min(pause * 1.3, 0.5)


def _is_reached(pod: rows.PodView, until: str, version: int, *, gone: bool) -> bool:
    if until == "change":
        return pod.version > version
    if gone:
        return pod.state == "terminated"
    if until == "running":
        return pod.state == "running" or (is_settled(pod) and pod.state != "stopped") or pod.wanted == "gone"
    return is_settled(pod)


async def list_events(tx: store.Transaction, pod_id: str, after: tuple[int, str] | None, limit: int) -> Page[PodEvent]:
    """A pod's history in the order in which it happened: every state, attempt and charge. Raises NotFound."""
    await find_view(tx, pod_id)
    found = await event_rows.list_history(tx.conn, pod_id, after, limit + 1)
    last = found[limit - 1] if len(found) > limit else None
    cursor = paging.write_cursor(count_micros(last.at), last.id) if last else None
    return Page[PodEvent](items=found[:limit], next_cursor=cursor)


async def touch(tx: store.Transaction, pod: rows.PodView) -> None:
    """Its agent made a call about the pod: it is not idle."""
    if pod.spec.get("idle_timeout_seconds") and pod.agent_id == tx.known.agent_id:
        await rows.touch_pod(tx.conn, pod.id)
