"""Pods, what they cost before they are, what happened to them, and what ran in them."""

from typing import Any, Literal

from pydantic import Field

from gpubroker.money import Usd
from gpubroker.resources import Output, State
from gpubroker.times import Moment


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


class ChosenOffer(Output):
    """An offer as it was when it was chosen: its price is for the disk asked for, and stays."""

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
    observed_at: Moment | None
    stale: bool | None


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
    offer: ChosenOffer
    price_usd_per_hour: Usd
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

    offer: ChosenOffer
    alternatives: list[ChosenOffer]
    commit_usd: Usd
    available_usd: Usd
    affordable_seconds: int
    boot_seconds: int


class Quote(Output):
    """A price that is firm until `expires_at`, for one pod of the agent that asked."""

    id: str
    offer: ChosenOffer
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
    """What a command in a pod left. `exit_code` is null when its time was over, or the provider tells none."""

    exit_code: int | None
    stdout: str
    stderr: str
    truncated: bool
    duration_ms: int
