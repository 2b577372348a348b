"""A provider that can be misused: it keeps its instances and its own bill, and misbehaves on command.

It stands for any vendor: creates that time out and still happen, listings that are empty, late or of another account,
states that lag. Its bill is what the vendor would charge; tests hold ours against it.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import ClassVar, Self

from gpubroker.config import Settings
from gpubroker.errors import AmbiguousOutcome, InstanceNotFound, ProviderError, Rejected
from gpubroker.providers import base

OFFERS = (
    base.ProviderOffer(
        provider_offer_id="h100-1", gpu="H100 SXM", gpu_count=1, vcpus=16, ram_gb=128, disk_gb=500, region="eu-1", country="FI",
        price_micro_h=2_000_000, supports=frozenset({"image", "command", "ports", "exec", "logs", "stop"}), availability="high",
        vram_gb=80, stopped_micro_h=100_000,
    ),
    base.ProviderOffer(
        provider_offer_id="h100-2", gpu="H100 SXM", gpu_count=1, vcpus=16, ram_gb=128, disk_gb=500, region="us-1", country="US",
        price_micro_h=2_500_000, supports=frozenset({"image", "command", "ports", "exec", "logs", "stop"}), availability="low",
        vram_gb=80, stopped_micro_h=100_000,
    ),
    base.ProviderOffer(
        provider_offer_id="a100-8", gpu="A100_80GB", gpu_count=8, vcpus=64, ram_gb=1024, disk_gb=2000, region="us-1", country="US",
        price_micro_h=12_000_000, supports=frozenset({"image", "command", "ports", "exec", "logs", "stop"}), availability="high",
        stopped_micro_h=400_000, min_billing_s=60, increment_s=60,
    ),
)  # fmt: skip

Fault = Exception | str


@dataclass
class Rented:
    """An instance at the simulator, and when it ran."""

    id: str
    ref: str
    offer: base.ProviderOffer
    life: base.Life
    born_at: float
    runs: list[list[float]] = field(default_factory=list)
    exit_code: int | None = None
    gone_at: float | None = None
    ends_at: float | None = None
    """Its end was asked for, and comes then."""

    def ran_seconds(self, now: float) -> float:
        """The provider's own bill: seconds that it ran."""
        return sum((run[1] if len(run) > 1 else now) - run[0] for run in self.runs)

    def billed_seconds(self, now: float) -> int:
        """The same on clocks that show whole seconds, as bills do."""
        return sum(math.floor(run[1] if len(run) > 1 else now) - math.floor(run[0]) for run in self.runs)


class Simulated(base.Provider):
    """One account at the simulated provider. Set the attributes to make it misbehave."""

    name = "simulated"
    capabilities: ClassVar[base.Capabilities] = base.Capabilities(
        kind="container",
        supports=frozenset({"image", "command", "ports", "exec", "logs", "stop"}),
        stopped_billing="storage",
        boot_seconds=30,
        boot_limit_seconds=600,
        bills_boot=False,
        termination_allowance_seconds=120,
        visibility_lag_seconds=60,
        create_limit_seconds=5,
        call_limit_seconds=5,
    )

    def __init__(self) -> None:
        self.offers: Sequence[base.ProviderOffer] = OFFERS
        self.rented: dict[str, Rented] = {}
        self.identity = "account-1"
        self.shift = timedelta()
        self.frozen: float | None = None
        """The moment at which its clock stands still, but for the shift."""
        self.boots_at_once = True
        self.end_takes = 0.0
        """Seconds from an acknowledged terminate to the end."""
        self.listing: Sequence[base.Instance] | Exception | None = None
        """A listing to answer with instead of the truth."""
        self.hidden: set[str] = set()
        """Instances that listings leave out."""
        self.denied: set[str] = set()
        """Instances that `get` and the commands say they do not know."""
        self.obscure: set[str] = set()
        """Instances of which it says a status that nobody can map."""
        self.others: list[base.Instance] = []
        """Instances of the same account that are not ours; listings show them, and nobody may touch them."""
        self.fail: dict[str, list[Fault]] = {}
        """By operation, what the next calls do. An exception is raised before anything happens. `after`, `timeout` and
        `hang` happen and then fail; `with id` fails with an answer that carries the id; `twice` creates two;
        `late 180` fails and happens 180 s later; `deaf` is acknowledged and does not happen."""
        self.calls: list[tuple[str, str]] = []
        self.births: list[tuple[float, str, base.ProviderOffer]] = []
        """Creates that are still to happen: when, with which reference."""
        self.on_point: Callable[[str], Awaitable[None]] | None = None
        """Told before every call, and again when it has happened and its answer is not there yet."""

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls()

    def now(self) -> float:
        return round((self.frozen or time.time()) + self.shift.total_seconds(), 6)

    async def _begin(self, operation: str, subject: str) -> str | None:
        self.pass_time()
        if self.on_point is not None:
            await self.on_point(f"{operation} is not sent")
        self.calls.append((operation, subject))
        planned = self.fail.get(operation)
        if not planned:
            return None
        what = planned.pop(0)
        if isinstance(what, Exception):
            raise what
        return what

    async def _end(self, operation: str, fault: str | None) -> None:
        if self.on_point is not None:
            await self.on_point(f"{operation} is not answered")
        if fault == "after":
            raise AmbiguousOutcome("http_500", "the answer was a 500")
        if fault == "timeout":
            raise TimeoutError
        if fault == "hang":
            await asyncio.sleep(3600)

    async def account(self) -> str:
        await self._begin("account", "")
        return self.identity

    async def list_offers(self) -> Sequence[base.ProviderOffer]:
        await self._begin("list_offers", "")
        return self.offers

    async def create(self, spec: base.Spec, offer: base.ProviderOffer, ref: str) -> base.Created:
        fault = await self._begin("create", ref)
        if fault == "no_capacity":
            raise Rejected("no_capacity", "there is none")
        if fault is not None and fault.startswith("late "):
            self.births.append((self.now() + float(fault.removeprefix("late ")), ref, offer))
            raise TimeoutError
        made = self.bear(ref, offer)
        if fault == "twice":
            self.bear(ref, offer)
        await self._end("create", fault)
        if fault == "with id":
            raise AmbiguousOutcome("error_with_id", "an error that names the machine", maybe_id=made.id)
        return base.Created(made.id)

    async def find_by_ref(self, ref: str) -> Sequence[base.Instance]:
        await self._begin("find_by_ref", ref)
        return [
            self.see(r) for r in self.rented.values() if r.ref == ref and r.gone_at is None and r.id not in self.hidden
        ]

    async def list_managed(self, owner: str) -> Sequence[base.Instance]:
        await self._begin("list_managed", owner)
        if isinstance(self.listing, Exception):
            raise self.listing
        if self.listing is not None:
            return self.listing
        mine = [self.see(r) for r in self.rented.values() if r.gone_at is None and r.id not in self.hidden]
        return [*mine, *self.others]

    async def get(self, instance_id: str) -> base.Instance:
        await self._begin("get", instance_id)
        return self.see(self._find(instance_id))

    async def terminate(self, instance_id: str) -> None:
        fault = await self._begin("terminate", instance_id)
        rented = self._find(instance_id)
        if fault != "deaf" and self.end_takes:
            rented.ends_at = rented.ends_at or self.now() + self.end_takes
        elif fault != "deaf":
            self.end(instance_id)
        await self._end("terminate", fault)

    async def stop(self, instance_id: str) -> None:
        fault = await self._begin("stop", instance_id)
        self._find(instance_id)
        if fault != "deaf":
            self.halt(instance_id)
        await self._end("stop", fault)

    async def start(self, instance_id: str) -> None:
        fault = await self._begin("start", instance_id)
        self._find(instance_id)
        if fault != "deaf":
            self.run(instance_id)
        await self._end("start", fault)

    async def restart(self, instance_id: str) -> None:
        fault = await self._begin("restart", instance_id)
        if self._find(instance_id).life != "running":
            raise Rejected("not_running", "what does not run cannot be restarted")
        await self._end("restart", fault)

    async def extend(self, instance_id: str, hard_stop_at: datetime) -> None:
        fault = await self._begin("extend", instance_id)
        self._find(instance_id)
        await self._end("extend", fault)

    async def logs(self, instance_id: str, *, after: int | None, since: datetime | None, limit: int) -> base.LogPage:
        await self._begin("logs", instance_id)
        text = b"line 1\nline 2\n"
        return base.LogPage(after or 0, text[after or 0 :])

    async def exec(
        self, instance_id: str, command: Sequence[str], *, stdin: bytes | None, timeout_seconds: int
    ) -> base.ExecResult:
        await self._begin("exec", instance_id)
        return base.ExecResult(0, " ".join(command).encode() + (stdin or b""), b"", False, 3)

    def _find(self, instance_id: str) -> Rented:
        rented = self.rented.get(instance_id)
        if rented is None or rented.gone_at is not None or instance_id in self.denied:
            raise InstanceNotFound("not_found", instance_id)
        return rented

    # What happens at the provider without being asked

    def pass_time(self) -> None:
        """What was on its way, and is due by now."""
        now = self.now()
        due = [birth for birth in self.births if birth[0] <= now]
        self.births = [birth for birth in self.births if birth[0] > now]
        for at, ref, offer in due:
            self.bear(ref, offer, at)
        for rented in self.rented.values():
            if rented.ends_at is not None and rented.ends_at <= now and rented.gone_at is None:
                self.end(rented.id, rented.ends_at)

    def bear(self, ref: str, offer: base.ProviderOffer, at: float | None = None) -> Rented:
        """An instance comes to be."""
        made = Rented(f"i-{len(self.rented) + 1}", ref, offer, "starting", at or self.now())
        self.rented[made.id] = made
        if self.boots_at_once:
            self.run(made.id, at)
        return made

    def run(self, instance_id: str, at: float | None = None) -> None:
        rented = self.rented[instance_id]
        if rented.gone_at is None and rented.life != "running":
            rented.life, rented.exit_code = "running", None
            rented.runs.append([at or self.now()])

    def halt(self, instance_id: str, exit_code: int | None = None, life: base.Life = "stopped") -> None:
        rented = self.rented[instance_id]
        if rented.life == "running":
            rented.runs[-1].append(self.now())
        rented.life, rented.exit_code = life, exit_code

    def end(self, instance_id: str, at: float | None = None) -> None:
        rented = self.rented.get(instance_id)
        if rented is None or rented.gone_at is not None:
            raise InstanceNotFound("not_found", instance_id)
        at = at or self.now()
        if rented.life == "running":
            rented.runs[-1].append(at)
        rented.life, rented.gone_at = "gone", at

    def see(self, rented: Rented) -> base.Instance:
        """What the provider says of an instance; its times are its own."""
        if rented.id in self.obscure:
            return base.Instance(id=rented.id, ref=rented.ref, status="MIGRATING?", life="unknown", billing="unknown")
        billing: base.Billing = {"running": "full", "stopped": "storage"}.get(rented.life, "none")  # type: ignore[assignment]
        started = datetime.fromtimestamp(rented.runs[-1][0], UTC) if rented.runs else None
        ended = datetime.fromtimestamp(rented.runs[-1][1], UTC) if rented.runs and len(rented.runs[-1]) > 1 else None
        return base.Instance(
            id=rented.id, ref=rented.ref, status=rented.life.upper(), life=rented.life, billing=billing, started_at=started,
            ended_at=ended, exit_code=rented.exit_code,
        )  # fmt: skip

    def alive(self) -> list[str]:
        """What the provider still has, and bills."""
        self.pass_time()
        return [r.id for r in self.rented.values() if r.gone_at is None]

    def count(self, operation: str, subject: str | None = None) -> int:
        """How often it was asked for this."""
        return sum(1 for op, of in self.calls if op == operation and (subject is None or of == subject))


class Final(Simulated):
    """A provider whose terminal answer proves the end, as the operator's own machine and cluster are."""

    capabilities: ClassVar[base.Capabilities] = replace(
        Simulated.capabilities, terminal_is_final=True, visibility_lag_seconds=0, termination_allowance_seconds=10,
        moves_hard_stop=True, lookup_seconds=(0, 1),
    )  # fmt: skip

    async def get(self, instance_id: str) -> base.Instance:
        await self._begin("get", instance_id)
        rented = self.rented.get(instance_id)
        if rented is None or instance_id in self.denied:
            raise InstanceNotFound("not_found", instance_id)
        seen = self.see(rented)
        if rented.gone_at is not None:
            ended = seen.ended_at or datetime.fromtimestamp(rented.gone_at, UTC)  # of its last run
            return replace(seen, life="gone", billing="none", ended_at=ended)
        return seen


class Broken(ProviderError):
    """A fault of the simulated provider: nobody can read its answer."""
