"""What an adapter is: the port that every provider's file fills.

An adapter translates and nothing else: it keeps no state, retries nothing, decides nothing. It raises the
`ProviderError`s of `gpubroker.errors`, and says `unknown` rather than guess. Every call has a hard limit that the
caller sets; an adapter never catches its cancellation.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import ClassVar, Literal, Self

from gpubroker.config import Settings
from gpubroker.errors import CannotDo

Life = Literal["starting", "running", "stopping", "stopped", "terminating", "gone", "failed", "interrupted", "unknown"]
"""Where an instance stands. `stopped` has an `exit_code` when its program ended by itself. `gone` is terminal."""

Billing = Literal["full", "storage", "none", "unknown"]
Support = Literal["command", "image", "ports", "exec", "logs", "stop", "ssh"]
Availability = Literal["none", "low", "medium", "high"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a provider can do and what that costs: data, never code that asks for a vendor's name.

    Times are seconds. `supports` is what its offers say; `stopped_billing` is what a stopped instance costs.
    """

    kind: Literal["process", "container", "vm"]
    supports: frozenset[Support]
    stopped_billing: Billing
    boot_seconds: int
    """Typical time from create to running: `eta_seconds` comes from it."""
    boot_limit_seconds: int
    """An instance that is not running by then is given up, and the next offer is tried."""
    bills_boot: bool
    termination_allowance_seconds: int
    """The longest a customer pays after asking for the end."""
    visibility_lag_seconds: int
    """A created instance may be missing from listings this long."""
    create_limit_seconds: int = 120
    call_limit_seconds: int = 30
    refresh_seconds: int = 300
    """How often its offers are asked for."""
    lookup_seconds: tuple[int, ...] = (5, 15, 45)
    """When an ambiguous create is looked up, counted from the time that it became ambiguous."""
    terminal_is_final: bool = False
    """One terminal `get` proves the end, with the provider's own end time; no second look is needed."""
    moves_hard_stop: bool = False
    """`extend` reaches the provider's own end of life. Else a pod cannot live past its first hard stop."""
    ttl: bool = False
    """The provider itself ends an instance at its hard stop."""
    spot: bool = False
    restarts: bool = True
    """It can restart the program of a running instance, with its disk: a machine always, another where its offer has `stop`."""
    priced_by_operator: bool = False
    """Its prices are our own settings: none is doubted for being far from the median of its model."""


@dataclass(frozen=True, slots=True)
class Port:
    """A port that the pod's program listens on."""

    port: int
    protocol: Literal["tcp", "udp", "http"] = "tcp"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a port of the pod is reached from outside."""

    name: str
    port: int | None
    protocol: str
    host: str
    external_port: int
    url: str | None = None
    command: str | None = None


@dataclass(frozen=True, slots=True)
class Spec:
    """What shall run. `env` and `registry_auth` are secrets: they are in no repr, log or error."""

    pod_id: str
    command: tuple[str, ...]
    image: str | None
    env: Mapping[str, str] = field(repr=False)
    ports: tuple[Port, ...]
    disk_gb: int
    hard_stop_at: datetime
    ssh_public_key: str | None = None
    registry_auth: Mapping[str, str] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class ProviderOffer:
    """One thing that can be rented now, as the provider names and prices it.

    `price_micro_h` is micro-USD per hour for all of it, the disk of `disk_base_gb` included; each GB more, up to
    `disk_gb`, costs `disk_micro_gb_h` on top. `gpu` is the vendor's spelling. `ram_gb`, `disk_gb` are 10^9 bytes.
    """

    provider_offer_id: str
    gpu: str | None
    gpu_count: int
    vcpus: float
    ram_gb: float
    disk_gb: int
    region: str
    price_micro_h: int
    supports: frozenset[Support]
    availability: Availability
    vram_gb: int | None = None
    country: str | None = None
    spot: bool = False
    stopped_micro_h: int | None = None
    disk_base_gb: int = 0
    disk_micro_gb_h: int = 0
    stopped_disk_micro_gb_h: int = 0
    """What each of these GB more costs while it is stopped, on top of `stopped_micro_h`."""
    min_billing_s: int = 0
    increment_s: int = 1
    reliability: float | None = None
    currency: str = "USD"
    """What is priced in another is set aside, never converted."""


@dataclass(frozen=True, slots=True)
class Instance:
    """What the provider says of one instance, at one moment.

    `ref` is our reference as found in its name or labels, None when it carries none of ours. `started_at` and
    `ended_at` bound its present or last run by the provider's clock. `gpubroker.metering` only lets them refine
    between two observations of our own.
    """

    id: str
    ref: str | None
    status: str
    life: Life
    billing: Billing
    started_at: datetime | None = None
    ended_at: datetime | None = None
    exit_code: int | None = None
    reason: str | None = None
    endpoints: tuple[Endpoint, ...] = ()
    hard_stop_at: datetime | None = None
    price_micro_h: int | None = None
    is_whole: bool = True
    """False: the create or start that makes it run is under way or was cut off; the same, sent again, completes it."""


@dataclass(frozen=True, slots=True)
class Created:
    """A create that succeeded: the provider's id, and what it said of the instance, when it said more."""

    id: str
    instance: Instance | None = None


@dataclass(frozen=True, slots=True)
class LogPage:
    """A part of an instance's log: `data` begins at byte `starts_at` of all that was ever written."""

    starts_at: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What a command left, at most 1 MiB a stream, else `truncated`. `exit_code` is None when its time was over.

    It is None as well where the provider tells no exit codes: `duration_ms` is less than the command's time then.
    """

    exit_code: int | None
    stdout: bytes
    stderr: bytes
    truncated: bool
    duration_ms: int


class Provider(ABC):
    """One account at one provider. Made per process from the settings, closed with `close`."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    credentials: ClassVar[tuple[str, ...]] = ()
    """Names of the variables that must be set for this provider to be on."""

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Make the adapter. Raises SetupError naming every variable that is missing."""

    @abstractmethod
    async def account(self) -> str:
        """The provider's own, lasting name of the account: listings of another account are no evidence."""

    @abstractmethod
    async def list_offers(self) -> Sequence[ProviderOffer]:
        """Everything that may be rented, complete, or an error."""

    @abstractmethod
    async def create(self, spec: Spec, offer: ProviderOffer, ref: str) -> Created:
        """Create one instance that carries `ref`.

        Raises Rejected (nothing was made), Throttled, CredentialRefused, or AmbiguousOutcome for all else.
        """

    @abstractmethod
    async def find_by_ref(self, ref: str) -> Sequence[Instance]:
        """Every instance that carries `ref`, whatever its state; empty is no proof of absence."""

    @abstractmethod
    async def list_managed(self, owner: str) -> Sequence[Instance]:
        """Every instance with a reference of `owner`: all pages, or an error."""

    @abstractmethod
    async def get(self, instance_id: str) -> Instance:
        """One instance now. Raises InstanceNotFound."""

    @abstractmethod
    async def terminate(self, instance_id: str) -> None:
        """Ask for the end, disk and all. Repeating it is harmless. Raises InstanceNotFound."""

    async def stop(self, instance_id: str) -> None:
        """Stop and keep the disk."""
        raise CannotDo(self.name, f"{instance_id} cannot be stopped")

    async def start(self, instance_id: str) -> None:
        """Start what is stopped. Raises Rejected when there is no room for it now."""
        raise CannotDo(self.name, f"{instance_id} cannot be started")

    async def restart(self, instance_id: str) -> None:
        """End the program and start it anew, on the same disk."""
        raise CannotDo(self.name, f"{instance_id} cannot be restarted")

    async def extend(self, instance_id: str, hard_stop_at: datetime) -> None:
        """Move the provider's own end of this instance."""
        raise CannotDo(self.name, f"the end of {instance_id} cannot be moved to {hard_stop_at}")

    async def logs(self, instance_id: str, *, after: int | None, since: datetime | None, limit: int) -> LogPage:
        """At most `limit` bytes of the log: from byte `after` on, or without it the last ones.

        `since` leaves out what was written before it. Raises InstanceNotFound.
        """
        raise CannotDo(self.name, f"{instance_id} has no log (after {after}, since {since}, limit {limit})")

    async def exec(
        self, instance_id: str, command: Sequence[str], *, stdin: bytes | None, timeout_seconds: int
    ) -> ExecResult:
        """Run a command in a running instance and wait for its end, at most `timeout_seconds`."""
        raise CannotDo(
            self.name, f"{instance_id} cannot run {command[:1]} ({timeout_seconds} s, stdin: {stdin is not None})"
        )

    def read_clock(self) -> float | None:
        """Seconds that the provider's clock was ahead of ours at its last answer; None where it does not say."""
        return None

    async def close(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of connections."""
