"""Every event once: its type, the shape of its data, who produces it and who consumes it.

Broker, Triggers and JSON Schemas in eventing/ are rendered from here, delivery rows are written from here, docs/events.md
is checked against it. An event only wakes: consumers read all but ids from PostgreSQL, so no event ever carries a key, a
value of `env`, or a log.
"""

from typing import Final, NamedTuple

from pydantic import BaseModel, ConfigDict

from gpubroker.money import Usd
from gpubroker.times import Moment

PREFIX: Final = "io.gpubroker."
TICK: Final = "dev.knative.sources.ping"
"""The type of PingSource's own events: ticks have no delivery row and no schema of ours."""


class Data(BaseModel):
    """The data of an event."""

    model_config = ConfigDict(frozen=True, defer_build=True)


class PodData(Data):
    """A pod as it was when the event was written."""

    pod_id: str
    agent_id: str
    state: str
    version: int
    name: str | None = None
    reason: str | None = None
    ends_because: str | None = None
    price_usd_per_hour: Usd | None = None
    expires_at: Moment | None = None


class ActionData(PodData):
    """A pod of which something was asked."""

    action: str


class UsageData(Data):
    """Seconds of an instance that were billed."""

    pod_id: str
    agent_id: str
    instance_id: str
    billed_until: Moment
    spent_usd: Usd


class BudgetData(Data):
    """An agent's budget in its present period. What is committed is held or spent."""

    agent_id: str
    limit_usd: Usd
    committed_usd: Usd
    period: str
    period_start: Moment | None = None


class AgentData(Data):
    """An agent, and the one that acted on it."""

    agent_id: str
    by: str


class CommandData(Data):
    """What became of a command that came as an event: of what it made, or why it was refused."""

    command: str
    command_id: str
    command_source: str
    agent_id: str
    pod_id: str | None = None
    code: str | None = None
    detail: str | None = None


class OffersData(Data):
    """A refresh of one provider's offers."""

    provider: str
    seen: int
    changed: int
    gone: int


class ProviderData(Data):
    """A provider that cannot be trusted or reached for now."""

    provider: str
    account_id: str
    reason: str


class EventType(NamedTuple):
    """One type of event. `consumers` are functions of the bundle; each gets a delivery row of its own."""

    what: str
    data: type[Data]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    summary: str

    @property
    def type(self) -> str:
        """The CloudEvents type, such as `io.gpubroker.pod.running.v1`."""
        return f"{PREFIX}{self.what}.v1"


_DRIVERS: Final = ("provisioning", "reconcile")

EVENTS: Final = (
    EventType("pod.requested", PodData, ("pods",), ("provisioning",), "A pod is wanted and its hold is taken."),
    EventType("pod.action-requested", ActionData, ("pods",), ("provisioning",), "Stop, start, restart or extend is wanted."),
    EventType("pod.creating", PodData, _DRIVERS, (), "An offer was chosen; the provider is being asked."),
    EventType("pod.running", PodData, _DRIVERS, ("metering",), "The pod was seen running; from here its agent pays."),
    EventType("pod.stopped", PodData, _DRIVERS, ("metering",), "The pod was seen stopped, asked for or by its own exit."),
    EventType("pod.interrupted", PodData, _DRIVERS, ("metering",), "The provider took the instance away or outbid it."),
    EventType("pod.failed", PodData, _DRIVERS, ("metering",), "No offer could make it run; it goes on to terminated."),
    EventType("pod.expiring", PodData, _DRIVERS, (), "The pod ends soon: in 5 minutes, or a tenth of its life."),
    EventType("pod.terminating", PodData, ("pods", "reconcile"), ("provisioning",), "The pod's end is wanted."),
    EventType("pod.terminated", PodData, _DRIVERS, (), "The instance is gone by evidence, billed, and the hold is closed."),
    EventType("usage.recorded", UsageData, ("metering", "reconcile"), (), "An instance was billed up to a moment."),
    EventType("budget.threshold", BudgetData, ("reconcile",), (), "Four fifths of a budget are held or spent."),
    EventType("budget.exhausted", BudgetData, ("reconcile",), (), "What is left of a budget pays for no offer any more."),
    EventType("agent.revoked", AgentData, ("auth",), (), "The agent's credentials are refused from now on; its pods end."),
    EventType("command.done", CommandData, ("intake",), (), "A command that came as an event was carried out."),
    EventType("command.refused", CommandData, ("intake",), (), "A command that came as an event was refused, for good."),
    EventType("offers.refreshed", OffersData, ("catalog",), (), "A provider's offers changed."),
    EventType("provider.unhealthy", ProviderData, ("catalog", "reconcile"), (), "A provider fails, or is not believed."),
)  # fmt: skip

COMMANDS: Final = {f"{PREFIX}command.{name}.v1": name for name in ("provision", "terminate")}
"""Types of events that agents send to `intake`, and what each asks for."""

BY_TYPE: Final = {event.type: event for event in EVENTS}
BY_WHAT: Final = {event.what: event for event in EVENTS}


def consumed_by(function: str) -> tuple[EventType, ...]:
    """The events that a function consumes, in the catalogue's order."""
    return tuple(event for event in EVENTS if function in event.consumers)
