"""The public resources, as API.md names them: what answers carry and OpenAPI describes.

A resource is read straight from its row (`psycopg.rows.class_row`), so that a field stands in one place. Money is
micro-USD inside and a decimal string outside; times are aware UTC.
"""

from typing import Annotated, Any, Final, Generic, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from gpubroker.inputs import Input
from gpubroker.money import InUsd, Usd
from gpubroker.times import Moment

T = TypeVar("T")

Scope = Literal[
    "offers:read", "pods:read", "pods:write", "pods:exec", "usage:read", "budgets:write", "agents:write",
    "activity:read", "events:read", "events:write", "admin",
]  # fmt: skip
SCOPES: Final[tuple[str, ...]] = Scope.__args__
Period = Literal["total", "day", "month"]
State = Literal[
    "awaiting_approval", "requested", "creating", "starting", "running", "stopping", "stopped", "terminating",
    "terminated", "failed", "interrupted", "unreachable",
]  # fmt: skip
Support = Literal["command", "image", "ports", "exec", "logs", "stop", "ssh"]


class Output(BaseModel):
    """A resource in an answer."""

    model_config = ConfigDict(frozen=True, defer_build=True)


class Page(Output, Generic[T]):
    """A part of a list. `next_cursor` is null on the last one."""

    items: list[T]
    next_cursor: str | None = None


def _is_none(value: object) -> bool:
    return value is None


def _distinct(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        msg = "names something twice"
        raise ValueError(msg)
    return values


Name = Annotated[str, Field(min_length=1, max_length=120, pattern=r"^[^\x00-\x1f\x7f]+$")]
Scopes = Annotated[list[Scope], Field(max_length=len(SCOPES)), AfterValidator(_distinct)]
Metadata = Annotated[dict[Annotated[str, Field(min_length=1, max_length=64)], Any], Field(max_length=64)]
ExpiresIn = Annotated[int, Field(ge=1, le=10 * 365 * 86400, description="Seconds from now.")]


# Who there is


class Limits(Output):
    """An agent's own limits beside its budget; null is none of its own."""

    max_pods: int | None = None
    max_usd_per_hour: Usd | None = None
    max_creates_per_minute: int | None = None


class NewKey(Output):
    """A key just made: the only time that it is shown. Null in a replay."""

    id: str
    key: str | None = Field(repr=False)


class Agent(Output):
    """A principal: what acts, owns pods and pays. Its rights are the intersection along its path, at use."""

    id: str
    org_id: str
    parent_id: str | None
    name: str
    scopes: list[str]
    effective_scopes: list[str]
    expires_at: Moment | None
    revoked_at: Moment | None
    metadata: dict[str, Any]
    may_act: list[str]
    grants: list[str]
    limits: Limits
    created_at: Moment


class AgentWithKey(Agent):
    """A new agent with its first key."""

    key: NewKey


class Key(Output):
    """An API key, without the key: `start` is for people to recognise it by."""

    id: str
    agent_id: str
    name: str
    start: str
    scopes: list[str]
    created_at: Moment
    used_at: Moment | None
    expires_at: Moment | None
    revoked_at: Moment | None


class KeyWithSecret(Key):
    """A key just made."""

    key: NewKey


class BudgetRequest(Input):
    """A limit on what an agent and all below it may commit within a period (UTC)."""

    limit_usd: InUsd
    period: Period = "total"


class AgentRequest(Input):
    """A child of the caller's agent."""

    name: Name
    scopes: Scopes | None = Field(default=None, description="Omitted: the parent's, less admin.")
    budget: BudgetRequest | None = None
    expires_in: ExpiresIn | None = Field(default=None, description="Seconds; omitted: the parent's expiry.")
    metadata: Metadata = Field(default_factory=dict)


class LimitsRequest(Input):
    """Limits beside the budget; null takes one away."""

    max_pods: int | None = Field(default=None, ge=0, le=10**6)
    max_usd_per_hour: InUsd | None = None
    max_creates_per_minute: int | None = Field(default=None, ge=0, le=10**6)


class AgentChange(Input):
    """What changes of an agent; what is left out stays. Nobody raises a limit, scope or expiry of itself."""

    name: Name | None = None
    metadata: Metadata | None = None
    scopes: Scopes | None = None
    expires_in: ExpiresIn | None = Field(default=None, description="Seconds from now; null: the parent's expiry.")
    may_act: Annotated[list[Annotated[str, Field(max_length=40)]], Field(max_length=64)] | None = Field(
        default=None, description="Agents that may act for this one; only it may name them."
    )
    grants: Annotated[list[Literal["logs", "exec"]], Field(max_length=2), AfterValidator(_distinct)] | None = Field(
        default=None, description="What agents above may do with its pods; only it may grant that."
    )
    limits: LimitsRequest | None = None


class RotateRequest(Input):
    """How long the old key lives beside the new one."""

    overlap_seconds: int = Field(default=0, ge=0, le=30 * 86400)


class KeyRequest(Input):
    """A further key of the caller's agent or of one below it."""

    agent_id: str | None = None
    name: Name
    scopes: Scopes | None = Field(default=None, description="Omitted: all that the caller may give.")
    expires_in: ExpiresIn | None = None


class TokenForm(BaseModel):
    """The fields of a token request: RFC 6749 client credentials, or RFC 8693 token exchange."""

    grant_type: str
    client_id: str | None = Field(default=None, description="The agent's id; or HTTP Basic.")
    client_secret: str | None = Field(default=None, description="One of the agent's API keys; or HTTP Basic.")
    subject_token: str | None = Field(default=None, description="A token or API key of whoever pays.")
    subject_token_type: str | None = None
    actor_token: str | None = Field(default=None, description="A token or API key of whoever acts; omitted: as before.")
    actor_token_type: str | None = None
    scope: str | None = None
    audience: str | None = None
    expires_in: int | None = Field(default=None, description="At most an hour.")
    budget_usd: str | None = Field(default=None, description="What may be held with this token and all made from it.")


class TokenAnswer(Output):
    """A token."""

    access_token: str
    token_type: Literal["Bearer"]
    expires_in: int
    scope: str
    issued_token_type: str | None = None


class TokenQuestion(BaseModel):
    """A token or API key, and who asks: a bearer credential, HTTP Basic, or both fields here."""

    token: str
    token_type_hint: str | None = None
    client_id: str | None = None
    client_secret: str | None = None


class Introspection(Output):
    """RFC 7662. Only `active` when it is false."""

    active: bool
    scope: str | None = None
    sub: str | None = None
    client_id: str | None = None
    token_type: str | None = None
    org: str | None = None
    exp: int | None = None
    iat: int | None = None
    iss: str | None = None
    aud: str | None = None
    jti: str | None = None
    act: dict[str, Any] | None = None


class Revoked(Output):
    """RFC 7009 says nothing in its answer."""


class Jwks(Output):
    """RFC 7517."""

    keys: list[dict[str, Any]]


class ServerMetadata(Output):
    """RFC 8414."""

    issuer: str
    token_endpoint: str
    jwks_uri: str
    introspection_endpoint: str
    revocation_endpoint: str
    scopes_supported: list[str]
    response_types_supported: list[str]
    grant_types_supported: list[str]
    token_endpoint_auth_methods_supported: list[str]
    introspection_endpoint_auth_methods_supported: list[str]
    revocation_endpoint_auth_methods_supported: list[str]
    service_documentation: str


class Organisation(Output):
    """A tenant."""

    id: str
    name: str
    plan: str


class Budget(Output):
    """What an agent and all below it may commit, and what they have."""

    agent_id: str
    limit_usd: Usd | None
    period: Period
    period_start: Moment | None
    spent_usd: Usd
    held_usd: Usd
    available_usd: Usd | None = Field(description="The least along the path to the root: what can be held now.")
    own_available_usd: Usd | None
    parent_id: str | None


class Whoami(Output):
    """Who the caller is and what it may do now."""

    agent: Agent
    organisation: Organisation
    scopes: list[str]
    delegation: list[str]
    budgets: list[Budget]
    limits: Limits


# What can be rented


class Offer(Output):
    """Something that can be rented now. `price_usd_per_hour` is all that is charged for all of it."""

    id: str
    provider: str
    provider_offer_id: str
    gpu: str | None
    gpu_count: int
    vram_gb: int | None = Field(description="Nominal, per GPU.")
    vcpus: float
    ram_gb: float
    disk_gb: int
    region: str
    country: str | None
    spot: bool
    price_usd_per_hour: Usd
    price_usd_per_gpu_hour: Usd | None
    min_billing_seconds: int
    billing_increment_seconds: int
    stopped_price_usd_per_hour: Usd | None
    supports: list[str]
    reliability: float | None
    availability: str
    observed_at: Moment
    stale: bool


class Near(Output):
    """An offer that almost matched, and what each filter would have to be for it."""

    offer: Offer
    change: dict[str, Any]


class NoMatch(Output):
    """Why nothing matched: of the offers considered, how many each filter alone leaves out."""

    considered: int
    removed_by: dict[str, int]
    nearest: list[Near]


class OfferPage(Page[Offer]):
    """A page of offers; an empty one says why."""

    no_match: NoMatch | None = Field(default=None, exclude_if=_is_none)


class Gpu(Output):
    """A GPU model. Prices are per GPU and hour, of what can be had now."""

    model: str
    vram_gb: int | None
    providers: list[str]
    offers: int
    lowest_usd_per_gpu_hour: Usd | None
    median_usd_per_gpu_hour: Usd | None


class ProviderView(Output):
    """A provider: whether it is configured, how it does, and what it can do."""

    name: str
    configured: bool
    healthy: bool
    last_refresh: Moment | None
    staleness_seconds: int | None
    stale: bool
    offers: int
    capabilities: dict[str, Any]
    last_error: str | None

    @classmethod
    def unconfigured(cls, name: str) -> Self:
        """A provider of which there is nothing but its name."""
        return cls(
            name=name, configured=False, healthy=False, last_refresh=None, staleness_seconds=None, stale=True, offers=0,
            capabilities={}, last_error=None,
        )  # fmt: skip


# What runs


class Endpoint(Output):
    """Where a port of the pod is reached."""

    name: str
    port: int | None
    protocol: str
    host: str
    external_port: int
    url: str | None = None
    command: str | None = None


class AttemptView(Output):
    """One try at one offer."""

    provider: str
    offer_id: str
    outcome: str
    code: str | None
    at: Moment


class Pod(Output):
    """What an agent wanted and what there is of it."""

    id: str
    name: str | None
    state: State
    state_reason: str | None
    billing: str
    provider: str | None
    provider_instance_id: str | None
    provider_status: str | None
    offer: dict[str, Any] | None
    price_usd_per_hour: Usd | None
    spent_usd: Usd
    budget_usd: Usd | None
    committed_usd: Usd
    endpoints: list[Endpoint]
    labels: dict[str, str]
    agent_id: str
    attempts: list[AttemptView]
    allowed_actions: list[str]
    version: int
    settled: bool
    poll_after_seconds: int | None
    eta_seconds: int | None
    ends_because: str | None
    exit_code: int | None
    links: dict[str, str]
    created_at: Moment
    running_at: Moment | None
    expires_at: Moment
    terminated_at: Moment | None


class DryRun(Output):
    """What a request for a pod would choose and hold."""

    offer: dict[str, Any]
    alternatives: list[dict[str, Any]]
    commit_usd: Usd
    available_usd: Usd
    affordable_seconds: int
    boot_seconds: int


class Quote(Output):
    """A price that is firm until `expires_at`, for one pod of the agent that asked."""

    id: str
    offer: dict[str, Any]
    price_usd_per_hour: Usd
    duration_seconds: int
    total_usd: Usd = Field(description="What would be held for it: the minimum and the end included.")
    expires_at: Moment
    pod_id: str | None


class PodEvent(Output):
    """Something that happened to a pod. `data` is what was so then: ids, states, amounts, causes."""

    id: str
    kind: Literal["state", "attempt", "charge"]
    what: str
    at: Moment
    data: dict[str, Any]


class ExecAnswer(Output):
    """What a command in a pod left. `exit_code` is null when its time was over."""

    exit_code: int | None
    stdout: str
    stderr: str
    truncated: bool
    duration_ms: int


# What was used


class UsageRecord(Output):
    """An interval of an instance that its agent was charged for."""

    id: str
    pod_id: str
    agent_id: str
    instance: str
    provider: str
    gpu: str | None
    gpu_count: int
    billing: str
    from_: Moment = Field(serialization_alias="from")
    to: Moment
    seconds: int
    price_usd_per_hour: Usd
    amount_usd: Usd


class UsageRow(Output):
    """What a group used. `seconds` are those in which an instance ran."""

    key: str | None = Field(repr=False)
    seconds: int
    gpu_seconds: int
    amount_usd: Usd


class StatementItem(Output):
    """What a pod of an agent cost within the statement's month."""

    agent_id: str
    pod_id: str
    provider: str
    gpu: str | None
    seconds: int
    amount_usd: Usd


class Statement(Output):
    """A month of a subtree. It sums to the ledger; a closed one never changes."""

    month: str
    state: Literal["open", "closed"]
    items: list[StatementItem]
    minimum_usd: Usd = Field(description="What topped pods up to their providers' minimum; not in the items.")
    total_usd: Usd


class LimitUse(Output):
    """A limit and what is used of it; null is no limit."""

    limit: int | None
    used: int


class MoneyLimitUse(Output):
    """A limit in USD and what is used of it; null is no limit."""

    limit: Usd | None
    used: Usd


class LimitsUse(Output):
    """The limits of an agent with all below it."""

    agent_id: str
    pods: LimitUse
    usd_per_hour: MoneyLimitUse
    creates_per_minute: LimitUse


class LimitsView(Output):
    """The limits of the caller's agent, and of the whole organisation."""

    agent: LimitsUse
    organisation: LimitsUse


class Usage(Output):
    """What was used in a time, grouped."""

    from_: Moment = Field(serialization_alias="from")
    to: Moment
    items: list[UsageRow]
    total: UsageRow
