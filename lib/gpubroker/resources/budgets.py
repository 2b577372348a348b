"""Budgets: what may be spent."""

from pydantic import Field

from gpubroker.inputs import Input
from gpubroker.money import InUsd, Usd
from gpubroker.resources import Output, Period
from gpubroker.times import Moment


class BudgetRequest(Input):
    """A limit on what an agent and all below it may commit within a period (UTC)."""

    limit_usd: InUsd
    period: Period = "total"


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
