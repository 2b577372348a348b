"""What was used: intervals, sums, statements, and limits."""

from typing import Literal

from pydantic import Field

from gpubroker.money import Usd
from gpubroker.resources import FROM, Output
from gpubroker.times import Moment


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
    from_: Moment = Field(validation_alias=FROM, serialization_alias="from")
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

    from_: Moment = Field(validation_alias=FROM, serialization_alias="from")
    to: Moment
    items: list[UsageRow]
    total: UsageRow
