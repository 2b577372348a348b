"""Asking for a pod: what is asked, how it would be met, and the one transaction that makes it wanted.

Nothing here calls a provider. The request becomes rows (the pod, its event, its hold last) and `gpubroker.provisioning` makes
them true.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

import psycopg
from pydantic import AfterValidator, Field, model_validator

from gpubroker import budgets, errors, holds, idempotency, inputs, offers, outbox, pods, quotes, sealing, store
from gpubroker.events import PodData
from gpubroker.ids import new_id
from gpubroker.inputs import Input
from gpubroker.money import InUsd
from gpubroker.pods import Life, Opener
from gpubroker.resources import Name
from gpubroker.resources.pods import DryRun
from gpubroker.store import budgets as budgets_rows
from gpubroker.store import offers as offer_rows
from gpubroker.store import pods as rows
from gpubroker.store import quotes as quote_rows
from gpubroker.store import tokens as token_rows
from gpubroker.store.candidates import Candidate

_RESERVED: Final = "GPUBROKER_"


class PortRequest(Input):
    """A port that the pod's program listens on."""

    port: int = Field(ge=1, le=65535)
    protocol: Literal["tcp", "udp", "http"] = "tcp"


class RegistryAuth(Input):
    """How to log in to the registry of the image."""

    username: Annotated[str, Field(min_length=1, max_length=256)]
    password: Annotated[str, Field(min_length=1, max_length=8192)]


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
EnvValue = Annotated[str, Field(max_length=32768)]
Env = Annotated[dict[EnvName, EnvValue], Field(max_length=256), AfterValidator(_check_env)]
Ports = Annotated[list[PortRequest], Field(max_length=16), AfterValidator(_check_ports)]
Command = Annotated[list[Annotated[str, Field(max_length=32768)]], Field(min_length=1, max_length=256)]
Image = Annotated[str, Field(min_length=1, max_length=300, pattern=r"^[^\s]+$")]
LabelKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$")]
Labels = Annotated[dict[LabelKey, Annotated[str, Field(max_length=200)]], Field(max_length=32)]


class PodRequest(Input):
    """What to run, on which offers, and for how much and how long at the most.

    Exactly one of `requirements`, `offer_id` and `quote_id` says where.
    """

    name: Name | None = Field(default=None, description="Unique among the agent's live pods.")
    image: Image | None = None
    command: Command | None = Field(default=None, description="No shell, unless it is one.")
    env: Env = Field(default_factory=dict, description="Secrets: sealed at rest, never shown, erased at the end.")
    ports: Ports = Field(default_factory=list)
    disk_gb: int | None = Field(default=None, ge=1, le=100_000)
    ssh_public_key: Annotated[str, Field(min_length=16, max_length=8192, pattern=r"^[^\r\n]+$")] | None = None
    labels: Labels = Field(default_factory=dict)
    requirements: offers.Requirements | None = None
    offer_id: Annotated[str, Field(max_length=40)] | None = None
    quote_id: Annotated[str, Field(max_length=40)] | None = None
    budget_usd: InUsd | None = Field(default=None, description="The most that this pod may ever cost.")
    max_lifetime_seconds: Life | None = Field(default=None, description="Omitted: what the budget pays, at most 1 h.")
    max_attempts: int = Field(default=3, ge=1, le=10, description="So many offers are tried at the most.")
    restart_policy: Literal["never", "on_interrupt", "always"] = "never"
    on_exit: Literal["keep", "terminate"] = Field(default="keep", description="When the program ends by itself.")
    idle_timeout_seconds: int | None = Field(
        default=None, ge=30, le=30 * 86400, description="Its end when its agent makes no call about it for so long."
    )
    registry_auth: RegistryAuth | None = Field(default=None, description="A secret, as env is.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if sum(where is not None for where in (self.requirements, self.offer_id, self.quote_id)) != 1:
            msg = "exactly one of requirements, offer_id and quote_id is needed"
            raise ValueError(msg)
        if self.image is None and self.command is None:
            msg = "an image or a command is needed"
            raise ValueError(msg)
        if self.registry_auth is not None and self.image is None:
            msg = "registry_auth is for an image, and there is none"
            raise ValueError(msg)
        if self.restart_policy == "always" and self.on_exit == "terminate":
            msg = "restart_policy always and on_exit terminate contradict each other"
            raise ValueError(msg)
        return self

    @property
    def needs(self) -> set[str]:
        """What an offer must support for this, whatever else is required."""
        asked = {"ports": bool(self.ports), "ssh": self.ssh_public_key is not None, "image": self.image is not None}
        return {name for name, is_needed in asked.items() if is_needed} | ({"command"} if self.image is None else set())

    @property
    def least_disk_gb(self) -> int:
        """The disk that it needs; 0 is what the offer comes with."""
        wanted = self.requirements.min_disk_gb if self.requirements else None
        return max(self.disk_gb or 0, wanted or 0)


class Plan(NamedTuple):
    """How a request would be met: the offers in the order in which they are tried, and what must be held for it."""

    candidates: list[Candidate]
    life_seconds: int
    hold_micro: int
    purse: budgets.Purse
    quote_id: str | None = None
    is_life_paid: bool = False
    """The lifetime is what the budget pays: nobody asked for one, and the usual one would cost more."""


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
            _refuse_excess(tx.known, request, plan)
            pod = _make_pod(tx.known, request, plan, key)
            await _write_pod(tx, pod, key)
            return pod.id, False
    except psycopg.Error as error:
        limiting, reached = holds.limiting_agent(error), holds.reached_limit(error)
        if limiting is None and reached is None and not rows.is_name_taken(error):
            raise
    async with open_transaction() as tx:  # another request was faster: say what is so now
        if reached is not None:
            raise _refuse_limit(tx.known, reached)
        await _refuse_repetition(tx, request, key, allow_duplicate=True)
        plan = await plan_pod(tx, request)
        raise holds.refuse(plan.candidates, plan.purse, plan.hold_micro, limiting)


async def _write_pod(tx: store.Transaction, pod: rows.NewPod, key: idempotency.Request) -> None:
    """Everything in one pipeline, the budgets locked last and COMMIT with them."""
    data = PodData(pod_id=pod.id, agent_id=pod.agent_id, state="requested", version=1, name=pod.name)
    async with tx.conn.pipeline():
        await rows.add_pod(tx.conn, pod)
        if pod.quote_id is not None:
            await quote_rows.use_quote(tx.conn, pod.quote_id, pod.id)
        await idempotency.keep(tx, key, pod.id)
        await outbox.write(tx, "pod.requested", pod.id, data, tenant=pod.org_id, agent_id=pod.agent_id)
        await rows.commit_with_hold(tx, pod)


async def dry_run(tx: store.Transaction, request: PodRequest) -> DryRun:
    """What a request would choose and hold, with nothing done. Raises what the request would, but for its budget."""
    if request.name is not None:
        await _refuse_name(tx, request.name)
    plan = await plan_pod(tx, request)
    chosen, *others = plan.candidates
    return DryRun(
        offer=pods.present_offer(chosen),
        alternatives=[pods.present_offer(other) for other in others],
        commit_usd=plan.hold_micro,
        available_usd=plan.purse.available_micro,
        affordable_seconds=holds.affordable_life(plan.candidates, plan.purse.available_micro),
        boot_seconds=int(chosen.capabilities.get("boot_seconds", 0)),
    )


async def plan_pod(tx: store.Transaction, request: PodRequest) -> Plan:
    """Choose offers and a lifetime. Raises NoOffer, NotSupported, or what is wrong with the quote."""
    quote = None if request.quote_id is None else await quotes.take_quote(tx, request.quote_id)
    candidates = [quote.candidate] if quote else await _choose_offers(tx, request)
    if quote is not None:
        _check_offer(request, quote.candidate, "/quote_id")
        priced = quote.candidate.priced_disk_gb
        if priced is not None and request.least_disk_gb > priced:
            raise inputs.invalid("/disk_gb", f"the quote is for {priced}: have one made with requirements.min_disk_gb")
    purse = await read_purse(tx)
    capped = purse.available_micro if request.budget_usd is None else min(purse.available_micro, request.budget_usd)
    life = request.max_lifetime_seconds or (quote.seconds if quote else None)
    is_paid = False
    if life is None:
        paid = holds.affordable_life(candidates, capped)
        is_paid = paid < holds.DEFAULT_LIFE_SECONDS
        life = max(min(holds.DEFAULT_LIFE_SECONDS, paid), holds.SHORTEST_LIFE_SECONDS)
    return Plan(candidates, life, holds.needed_micro(candidates, life), purse, request.quote_id, is_paid)


async def read_purse(tx: store.Transaction) -> budgets.Purse:
    """What the caller's path, and its token, allow now."""
    caller = tx.known
    room = None if caller.jti is None else await token_rows.find_least_room(tx.conn, caller.jti)
    return budgets.Purse(caller, await budgets_rows.list_standings(tx.conn, caller.path), room)


def _refuse_excess(caller: store.Caller, request: PodRequest, plan: Plan) -> None:
    """Raise BudgetExhausted for what the pod's own budget, or one on the path, does not cover."""
    if request.budget_usd is not None and plan.hold_micro > request.budget_usd:
        worst = holds.dearest(plan.candidates)
        fixed = holds.fixed_micro(worst)
        raise budgets.refuse(plan.hold_micro, request.budget_usd, worst.price_micro_h, fixed, caller.agent_id)
    if plan.hold_micro > plan.purse.available_micro:
        raise holds.refuse(plan.candidates, plan.purse, plan.hold_micro)


async def _choose_offers(tx: store.Transaction, request: PodRequest) -> list[Candidate]:
    if request.offer_id is not None:
        return [await _take_offer(tx, request, request.offer_id)]
    wanted = request.requirements or offers.Requirements()
    filters = await offers.read_filters(tx, wanted, "/requirements/")
    filters["supports"] = sorted(request.needs | set(wanted.supports or ()))
    if request.least_disk_gb:
        filters["min_disk_gb"] = request.least_disk_gb
    found = await offer_rows.list_candidates(tx.conn, filters, request.least_disk_gb, request.max_attempts)
    if not found:
        no_match = await offers.explain(tx, filters, request.least_disk_gb)
        msg = "No offer that can be had now satisfies all of the requirements."
        raise errors.NoOffer(msg, more={"errors": [], "no_match": no_match})
    return found


async def _take_offer(tx: store.Transaction, request: PodRequest, offer_id: str) -> Candidate:
    found = await offer_rows.find_candidate(tx.conn, offer_id, request.least_disk_gb)
    if found is None:
        raise inputs.invalid("/offer_id", "is no offer that there is now")
    _check_offer(request, found, "/offer_id")
    return found


def _check_offer(request: PodRequest, candidate: Candidate, pointer: str) -> None:
    lacking = sorted(request.needs - set(candidate.supports))
    if lacking:
        is_process = candidate.capabilities.get("kind") == "process" and "image" in lacking
        why = " (its pods are processes; an offer that supports image is needed)" if is_process else ""
        msg = f"This offer of {candidate.provider} does not support: {', '.join(lacking)}{why}."
        raise errors.NotSupported(
            msg, more={"errors": [{"pointer": pointer, "message": f"lacks {name}"} for name in lacking]}
        )
    if request.least_disk_gb > candidate.disk_gb:
        raise inputs.invalid("/disk_gb", f"this offer has at most {candidate.disk_gb}")


async def _refuse_repetition(
    tx: store.Transaction, request: PodRequest, key: idempotency.Request, *, allow_duplicate: bool
) -> None:
    if request.name is not None:
        await _refuse_name(tx, request.name)
    if key.key is None and not allow_duplicate:
        same = await rows.find_same(tx.conn, tx.known.agent_id, key.body_mac())
        if same is not None:
            raise await _point_to(tx, errors.ProbableDuplicate, f"An equal request made {same} a moment ago.", same)


async def _refuse_name(tx: store.Transaction, name: str) -> None:
    named = await rows.find_named(tx.conn, tx.known.agent_id, name)
    if named is not None:
        raise await _point_to(tx, errors.NameInUse, f"The pod {named} has the name {name!r}.", named)


async def _point_to(tx: store.Transaction, problem: type[errors.Conflict], detail: str, pod_id: str) -> errors.Conflict:
    pod = await pods.show_pod(tx, pod_id)
    return problem(detail, more={"pod": pod}, steps=[errors.Next("GET", f"/v1/pods/{pod_id}")])


def _refuse_limit(caller: store.Caller, reached: holds.ReachedLimit) -> errors.LimitReached:
    whose = reached.agent_id if reached.agent_id == caller.agent_id else None
    detail = f"This would go beyond {reached.limit} of {'this agent' if whose else 'an agent above this one'}."
    return errors.LimitReached(
        detail, more={"limit": reached.limit, "limiting_agent": whose}, steps=[errors.Next("GET", "/v1/limits")]
    )


def _make_pod(caller: store.Caller, request: PodRequest, plan: Plan, key: idempotency.Request) -> rows.NewPod:
    pod_id = new_id("pod")
    secrets: dict[str, Any] = request.model_dump(include={"env", "registry_auth"}, exclude_defaults=True)
    kept = {"image", "command", "ports", "ssh_public_key", "restart_policy", "on_exit", "idle_timeout_seconds"}
    return rows.NewPod(
        id=pod_id,
        org_id=caller.org_id,
        agent_id=caller.agent_id,
        token_jti=caller.jti,
        name=request.name,
        life_seconds=plan.life_seconds,
        spec=request.model_dump(include=kept, mode="json")
        | {"disk_gb": request.least_disk_gb}
        | ({"paid_seconds": plan.life_seconds} if plan.is_life_paid else {}),
        candidates=[candidate._asdict() for candidate in plan.candidates],
        env_sealed=seal_secrets(pod_id, secrets) if secrets else None,
        seal_key=sealing.fingerprint() if secrets else None,
        price_micro_h=holds.dearest(plan.candidates).price_micro_h,
        budget_micro=request.budget_usd,
        quote_id=plan.quote_id,
        body_mac=key.body_mac(),
        labels=request.labels,
        hold_micro=plan.hold_micro,
        idle_seconds=request.idle_timeout_seconds,
    )


def seal_secrets(pod_id: str, secrets: Mapping[str, object]) -> bytes:
    """Seal a pod's env and registry_auth, for this pod alone."""
    return sealing.seal("pod", pod_id, json.dumps(secrets).encode())
