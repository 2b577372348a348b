"""Agents, their keys and limits, and who calls."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from gpubroker.inputs import Input
from gpubroker.money import InUsd, Usd
from gpubroker.resources import SCOPES, Name, Output, Scope, check_distinct
from gpubroker.resources.budgets import Budget, BudgetRequest
from gpubroker.times import Moment

Scopes = Annotated[list[Scope], Field(max_length=len(SCOPES)), AfterValidator(check_distinct)]


Metadata = Annotated[dict[Annotated[str, Field(min_length=1, max_length=64)], Any], Field(max_length=64)]


ExpiresIn = Annotated[int, Field(ge=1, le=10 * 365 * 86400, description="Seconds from now.")]


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
    may_act: Annotated[list[Annotated[str, Field(pattern=r"^agt_[0-9a-z]{26}$")]], Field(max_length=64)] | None = Field(
        default=None, description="Agents that may act for this one; only it may name them."
    )
    grants: Annotated[list[Literal["logs", "exec"]], Field(max_length=2), AfterValidator(check_distinct)] | None = (
        Field(default=None, description="What agents above may do with its pods; only it may grant that.")
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


class Organisation(Output):
    """A tenant."""

    id: str
    name: str
    plan: str


class Whoami(Output):
    """Who the caller is and what it may do now."""

    agent: Agent
    organisation: Organisation
    scopes: list[str]
    delegation: list[str]
    budgets: list[Budget]
    limits: Limits
