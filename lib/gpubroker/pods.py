"""What agents want: a pod is asked for, acted on, waited for, and always has an end.

Nothing here calls a provider. A request becomes rows (the pod, its event, its hold last) and `gpubroker.provisioning` makes
them true.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final, Literal

import psycopg
from pydantic import AfterValidator, Field

from gpubroker import budgets, errors, idempotency, inputs, offers, outbox, sealing, store
from gpubroker.events import ActionData, PodData
from gpubroker.ids import new_id
from gpubroker.money import HOUR, InUsd, cost, format_usd
from gpubroker.resources import AttemptView, Endpoint, Input, Name, Pod
from gpubroker.store import events as event_rows
from gpubroker.store import money as money_rows
from gpubroker.store import offers as offer_rows
from gpubroker.store import pods as rows
from gpubroker.store.offers import Candidate

Opener = Callable[[], AbstractAsyncContextManager[store.Transaction]]
"""Opens a transaction of the caller, authenticated anew."""

DEFAULT_LIFE_SECONDS: Final = HOUR
SHORTEST_LIFE_SECONDS: Final = 10
LONGEST_LIFE_SECONDS: Final = 366 * 24 * HOUR
_RESERVED: Final = "GPUBROKER_"
_ACTIONS: Final[Mapping[str, Sequence[str]]] = {
    "awaiting_approval": (),
    "requested": ("extend",),
    "creating": ("extend",),
    "starting": ("extend",),
    "running": ("stop", "restart", "extend", "exec", "logs"),
    "stopping": ("logs",),
    "stopped": ("start", "extend", "logs"),
    "interrupted": ("start", "extend", "logs"),
    "unreachable": ("restart", "logs"),
}
_NEEDS_STOP: Final = frozenset({"stop", "start", "restart"})
_SETTLED: Final = frozenset({"running", "stopped", "terminated", "failed"})


# The request


class PortRequest(Input):
    """A port that the pod's program listens on."""

    port: int = Field(ge=1, le=65535)
    protocol: Literal["tcp", "udp", "http"] = "tcp"


def _check_env(env: dict[str, str]) -> dict[str, str]:
    if any(name.startswith(_RESERVED) for name in env):
        msg = f"names that begin {_RESERVED} are the broker's own"
        raise ValueError(msg)
    return env


def _check_ports(ports: list[PortRequest]) -> list[PortRequest]:
    if len({port.port for port in ports}) < len(ports):
        msg = "names a port twice"
        raise ValueError(msg)
    return ports


EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)]
Labels = Annotated[
    dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$")], Annotated[str, Field(max_length=200)]],
    Field(max_length=32),
]
Life = Annotated[int, Field(ge=SHORTEST_LIFE_SECONDS, le=LONGEST_LIFE_SECONDS)]


class PodRequest(Input):
    """What to run, where, and for how much and how long at the most."""

    name: Name | None = Field(default=None, description="Unique among the agent's live pods.")
    image: Annotated[str, Field(min_length=1, max_length=300, pattern=r"^[^\s]+$")] | None = None
    command: Annotated[list[Annotated[str, Field(max_length=32768)]], Field(min_length=1, max_length=256)] | None = None
    env: Annotated[
        dict[EnvName, Annotated[str, Field(max_length=32768)]], Field(max_length=256), AfterValidator(_check_env)
    ] = Field(default_factory=dict, description="Secrets: sealed at rest, never shown again, erased at the end.")
    ports: Annotated[list[PortRequest], Field(max_length=16), AfterValidator(_check_ports)] = Field(
        default_factory=list
    )
    disk_gb: int | None = Field(default=None, ge=1, le=100_000)
    labels: Labels = Field(default_factory=dict)
    requirements: offers.Requirements | None = None
    offer_id: str | None = None
    budget_usd: InUsd | None = Field(default=None, description="The most that this pod may ever cost.")
    max_lifetime_seconds: Life | None = None
    max_attempts: int = Field(default=3, ge=1, le=10)


class ExtendRequest(Input):
    """New totals, never smaller than the present ones."""

    max_lifetime_seconds: Life | None = None
    budget_usd: InUsd | None = None


class WaitQuery(inputs.Query):
    """How long to wait for the pod to change before answering."""

    wait: Annotated[int, inputs.Whole, Field(ge=0, le=60)] = 0
    until: Literal["running", "settled", "change"] = "settled"
    after_version: Annotated[int, inputs.Whole, Field(ge=0)] | None = None


Duplicate = Literal["allow", "refuse"]
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


@dataclass(frozen=True, slots=True)
class Plan:
    """How a request would be met: the offers in the order in which they are tried, and what must be held for it."""

    candidates: list[Candidate]
    life_seconds: int
    hold_micro: int
    purse: budgets.Purse

    @property
    def affordable_seconds(self) -> int:
        """How long the budgets would let it live."""
        return _affordable(self.candidates, self.purse.available_micro)


async def request_pod(
    open_transaction: Opener, request: PodRequest, key: idempotency.Request, *, allow_duplicate: bool
) -> tuple[str, bool]:
    """Want a pod: one transaction writes it, its event, and its hold last. Returns its id and whether this was a replay.

    Checks come in the order replay, name, probable duplicate, offer, budget. Raises the problem of the first that fails.
    """
    try:
        async with open_transaction() as tx:
            made = await idempotency.find_made(tx, key)
            if made is not None:
                return made, True
            await _refuse_repetition(tx, request, key, allow_duplicate=allow_duplicate)
            plan = await plan_pod(tx, request)
            pod = _make_pod(tx.known, request, plan, key)
            async with tx.conn.pipeline():
                await rows.add_pod(tx.conn, pod)
                await idempotency.keep(tx, key, pod.id)
                data = PodData(pod_id=pod.id, agent_id=pod.agent_id, state="requested", version=1, name=pod.name)
                await outbox.write(tx, "pod.requested", pod.id, data, tenant=pod.org_id, agent_id=pod.agent_id)
                await rows.commit_with_hold(tx, pod)
            return pod.id, False
    except psycopg.Error as error:
        limiting = budgets.limiting_agent(error)
        taken = rows.is_name_taken(error)
        if limiting is None and not taken:
            raise
    async with open_transaction() as tx:  # another request was faster: say what is so now
        await _refuse_repetition(tx, request, key, allow_duplicate=True)
        plan = await plan_pod(tx, request)
        raise _refuse_budget(plan.candidates, plan.purse, plan.hold_micro, limiting)


async def plan_pod(tx: store.Transaction, request: PodRequest) -> Plan:
    """Choose offers and a lifetime. Raises NoOffer, NotSupported or BudgetExhausted."""
    candidates = await _choose_offers(tx, request)
    purse = budgets.Purse(tx.known, await money_rows.list_standings(tx.conn, tx.known.path))
    available = purse.available_micro
    capped = available if request.budget_usd is None else min(available, request.budget_usd)
    life = request.max_lifetime_seconds or min(DEFAULT_LIFE_SECONDS, _affordable(candidates, capped))
    needed = _commit(candidates, max(life, SHORTEST_LIFE_SECONDS))
    if request.budget_usd is not None and needed > request.budget_usd:
        price, fixed = _dearest(candidates)
        raise budgets.refuse(needed, request.budget_usd, price, fixed, tx.known.agent_id)
    if needed > available:
        raise _refuse_budget(candidates, purse, needed, None)
    return Plan(candidates, life, needed, purse)


async def _choose_offers(tx: store.Transaction, request: PodRequest) -> list[Candidate]:
    if (request.requirements is None) == (request.offer_id is None):
        raise inputs.invalid("/requirements", "exactly one of requirements and offer_id is needed")
    if request.image is None and request.command is None:
        raise inputs.invalid("/command", "an image or a command is needed")
    needs = _find_needs(request)
    if request.offer_id is not None:
        return [await _take_offer(tx, request, request.offer_id, needs)]
    wanted = request.requirements or offers.Requirements()
    filters = offers.read_filters(wanted, "/requirements/")
    filters["supports"] = sorted(needs | set(wanted.supports or ()))
    disk_gb = max(request.disk_gb or 0, wanted.min_disk_gb or 0)
    if disk_gb:
        filters["min_disk_gb"] = disk_gb
    found = await offer_rows.list_candidates(tx.conn, filters, disk_gb, request.max_attempts)
    if not found:
        raise errors.NoOffer("No offer that can be had now satisfies all of the requirements.", more={"errors": []})
    return found


async def _take_offer(tx: store.Transaction, request: PodRequest, offer_id: str, needs: set[str]) -> Candidate:
    found = await offer_rows.list_candidates(tx.conn, {}, request.disk_gb or 0, 1, offer_id=offer_id)
    if not found:
        raise inputs.invalid("/offer_id", "is no offer that there is now")
    lacking = sorted(needs - set(found[0].supports))
    if lacking:
        why = " (containers come with the cluster)" if found[0].provider == "local" and "image" in lacking else ""
        msg = f"This offer of {found[0].provider} does not support: {', '.join(lacking)}{why}."
        raise errors.NotSupported(
            msg, more={"errors": [{"pointer": "/offer_id", "message": f"lacks {name}"} for name in lacking]}
        )
    if (request.disk_gb or 0) > found[0].disk_gb:
        raise inputs.invalid("/disk_gb", f"this offer has at most {found[0].disk_gb}")
    return found[0]


def _find_needs(request: PodRequest) -> set[str]:
    needs = {"image" if request.image is not None else "command"}
    if request.ports:
        needs.add("ports")
    return needs


async def _refuse_repetition(
    tx: store.Transaction, request: PodRequest, key: idempotency.Request, *, allow_duplicate: bool
) -> None:
    agent_id = tx.known.agent_id
    if request.name is not None:
        named = await rows.find_named(tx.conn, agent_id, request.name)
        if named is not None:
            raise await _point_to(tx, errors.NameInUse, f"The pod {named} has the name {request.name!r}.", named)
    if key.key is None and not allow_duplicate:
        same = await rows.find_same(tx.conn, agent_id, key.body_mac())
        if same is not None:
            raise await _point_to(tx, errors.ProbableDuplicate, f"An equal request made {same} a moment ago.", same)


async def _point_to(tx: store.Transaction, problem: type[errors.Conflict], detail: str, pod_id: str) -> errors.Conflict:
    pod = await show_pod(tx, pod_id)
    return problem(detail, more={"pod": pod}, steps=[errors.Next("GET", f"/v1/pods/{pod_id}")])


def _make_pod(caller: store.Caller, request: PodRequest, plan: Plan, key: idempotency.Request) -> rows.NewPod:
    pod_id = new_id("pod")
    secrets = {"env": request.env} if request.env else None
    spec = request.model_dump(include={"image", "command", "ports"}, mode="json")
    return rows.NewPod(
        id=pod_id,
        org_id=caller.org_id,
        agent_id=caller.agent_id,
        token_jti=caller.jti,
        name=request.name,
        life_seconds=plan.life_seconds,
        spec=spec
        | {"disk_gb": max(request.disk_gb or 0, (request.requirements and request.requirements.min_disk_gb) or 0)},
        candidates=[asdict(candidate) for candidate in plan.candidates],
        env_sealed=seal_secrets(pod_id, secrets) if secrets else None,
        seal_key=sealing.fingerprint() if secrets else None,
        budget_micro=request.budget_usd,
        quote_id=None,
        body_mac=key.body_mac(),
        labels=request.labels,
        hold_micro=plan.hold_micro,
    )


def seal_secrets(pod_id: str, secrets: Mapping[str, object]) -> bytes:
    """Seal a pod's env and registry_auth for this pod alone."""
    import json  # noqa: PLC0415 - most requests have none

    return sealing.seal("pod", pod_id, json.dumps(secrets).encode())


# Money of a request


def _fixed(candidate: Candidate) -> int:
    allowance = int(candidate.capabilities.get("termination_allowance_seconds", 0))
    return cost(candidate.price_micro_h, candidate.min_billing_s) + cost(candidate.price_micro_h, allowance)


def _commit(candidates: Sequence[Candidate], life_seconds: int) -> int:
    return max(cost(c.price_micro_h, life_seconds) + _fixed(c) for c in candidates)


def _dearest(candidates: Sequence[Candidate]) -> tuple[int, int]:
    dearest = max(candidates, key=lambda c: (c.price_micro_h, _fixed(c)))
    return dearest.price_micro_h, _fixed(dearest)


def _affordable(candidates: Sequence[Candidate], available_micro: int) -> int:
    return min(budgets.affordable_seconds(available_micro, c.price_micro_h, _fixed(c)) for c in candidates)


def _refuse_budget(
    candidates: Sequence[Candidate], purse: budgets.Purse, needed: int, limiting: str | None
) -> errors.BudgetExhausted:
    price, fixed = _dearest(candidates)
    return purse.refuse(needed, price, fixed, limiting=limiting)


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
    _refuse_action(pod, "extend")
    if request.max_lifetime_seconds is None and request.budget_usd is None:
        raise inputs.invalid("/max_lifetime_seconds", "max_lifetime_seconds or budget_usd is needed")
    candidate = _read_candidate(pod)
    holds, held = await rows.sum_holds(tx.conn, pod_id)
    life, budget = _new_totals(pod, request, candidate)
    present_life = round((pod.ends_at - pod.created_at).total_seconds())
    movable = bool(candidate.capabilities.get("moves_hard_stop")) or not pod.attempts
    latest = round((pod.hard_stop_at - pod.created_at).total_seconds())
    if life > latest and not movable:
        msg = f"{candidate.provider} cannot move the pod's hard stop; the longest lifetime it can have is {latest} seconds."
        raise errors.NotSupported(
            msg, more={"errors": [{"pointer": "/max_lifetime_seconds", "message": f"at most {latest}"}]}
        )
    needed = _commit([candidate], life)
    if budget is not None and needed > budget:
        raise budgets.refuse(needed, budget, candidate.price_micro_h, _fixed(candidate), tx.known.agent_id)
    await rows.extend(tx.conn, pod_id, life, request.budget_usd, move_hard_stop=movable)
    if life > present_life:
        await _announce(tx, pod_id, "extend")
    if needed > held:
        await _take_more(tx, pod, holds, needed - held, candidate)


async def _take_more(tx: store.Transaction, pod: rows.PodView, holds: int, more: int, candidate: Candidate) -> None:
    purse = budgets.Purse(tx.known, await money_rows.list_standings(tx.conn, tx.known.path))
    try:
        async with tx.conn.transaction():
            await rows.take_hold(tx.conn, pod.id, f"extend:{holds}", pod.agent_id, more)
    except psycopg.Error as error:
        limiting = budgets.limiting_agent(error)
        if limiting is None:
            raise
        raise purse.refuse(more, candidate.price_micro_h, 0, limiting=limiting) from None


def _new_totals(pod: rows.PodView, request: ExtendRequest, candidate: Candidate) -> tuple[int, int | None]:
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
    paid_for = _affordable([candidate], budget or 0)
    return min(max(present, paid_for), LONGEST_LIFE_SECONDS), budget


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


def _refuse_action(pod: rows.PodView, action: str) -> None:
    candidate = _read_candidate(pod)
    if action in _NEEDS_STOP and "stop" not in candidate.supports:
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


def allow_actions(pod: rows.PodView) -> list[str]:
    """What may be done with the pod now."""
    supports = _read_candidate(pod).supports
    actions = _ACTIONS.get(pod.state, ("logs",))
    able = [
        action
        for action in actions
        if (action not in _NEEDS_STOP or "stop" in supports) and (action not in ("exec", "logs") or action in supports)
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
        offer=_present_offer(candidate),
        price_usd_per_hour=candidate.price_micro_h,
        spent_usd=pod.spent_micro,
        budget_usd=pod.budget_micro,
        committed_usd=pod.committed_micro,
        endpoints=[Endpoint(**endpoint) for endpoint in pod.endpoints],
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


def _present_offer(candidate: Candidate) -> dict[str, Any]:
    return {
        "id": candidate.offer_id,
        "provider": candidate.provider,
        "provider_offer_id": candidate.provider_offer_id,
        "gpu": candidate.gpu,
        "gpu_count": candidate.gpu_count,
        "vram_gb": candidate.vram_gb,
        "vcpus": candidate.vcpus,
        "ram_gb": candidate.ram_gb,
        "disk_gb": candidate.disk_gb,
        "region": candidate.region,
        "country": candidate.country,
        "spot": candidate.spot,
        "price_usd_per_hour": format_usd(candidate.price_micro_h),
        "supports": candidate.supports,
    }


def _read_candidate(pod: rows.PodView) -> Candidate:
    return Candidate(**(pod.offer or pod.first_offer or {}))


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
