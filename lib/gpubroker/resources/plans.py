"""Plans, and the one that an organisation is on."""

from typing import Literal

from pydantic import Field

from gpubroker.inputs import Input
from gpubroker.resources import Output
from gpubroker.times import Moment

PlanName = Literal["free", "pro", "enterprise"]


class PlanLimits(Output):
    """What a plan allows all agents of an organisation together."""

    requests_per_second: int


class Plan(Output):
    """What an organisation can be on."""

    name: PlanName
    limits: PlanLimits


class Subscription(Output):
    """The plan of an organisation. One that is ending is the free one from `ends_at` on."""

    org_id: str
    plan: PlanName
    limits: PlanLimits
    state: Literal["active", "ending"]
    since: Moment
    period_end: Moment = Field(description="A period is a calendar month, UTC.")
    ends_at: Moment | None


class SubscriptionRequest(Input):
    """The plan that an organisation shall be on from now on."""

    plan: PlanName
