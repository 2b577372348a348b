"""Trying providers out: does the credential work, what is offered, and, for money, does one instance live and die as it should.

For operators who have a key, before agents depend on it. Nothing of the broker's is needed, no database, no Redis.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, TypeVar

from gpubroker import errors, times
from gpubroker.attempts import make_ref
from gpubroker.ids import new_id
from gpubroker.money import cost, format_usd
from gpubroker.providers.base import Instance, Provider, ProviderOffer, Spec, Support

T = TypeVar("T")

EVERYTHING: Final[tuple[Support, ...]] = ("command", "image", "ports", "exec", "logs", "stop", "ssh")
_LIFE_SECONDS: Final = 900
"""The hard stop of a trial's instance, and the time that it is reckoned to cost at the most."""
_IMAGE: Final = "busybox:stable"
_COMMAND: Final = ("sh", "-c", "echo tried; sleep 3600")
_GONE_SECONDS: Final = 300


@dataclass(frozen=True, slots=True)
class Standing:
    """How a provider stands: `error` None means that its credential works and every call was answered.

    `clock_seconds` is how far its clock is ahead of ours; None where it does not say.
    """

    provider: str
    account: str | None = None
    offers: int = 0
    gpus: int = 0
    """Models among the offers that can be had now."""
    instances: int = 0
    """Those with a reference of our owner."""
    clock_seconds: float | None = None
    lacks: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a live trial, and how long it took. `error` None: it went as it should."""

    what: str
    seconds: float
    error: str | None = None


@dataclass(slots=True)
class Trial:
    """A live trial of one provider, step by step. `micro` is the most that it may cost, in micro-USD."""

    provider: Provider
    owner: str
    micro: int
    look_seconds: float = 2.0
    """Between two looks at what it waits for."""
    steps: list[Step] = field(default_factory=list[Step])

    async def run(self) -> list[Step]:
        """Rent the cheapest, see it run, log, execute, stop and start as far as it can, and destroy it, whatever happens."""
        offer = await self._step("find an offer", self._find_offer)
        if offer is None:
            return self.steps
        ref = make_ref(self.owner, new_id("att"), times.now() + timedelta(seconds=_LIFE_SECONDS))
        async with self._destroyed(ref):
            created = await self._step("create", lambda: self.provider.create(self._spec(), offer, ref))
            if created is not None and await self._step("run", lambda: self._await_life(created.id, "running")):
                await self._use(created.id, offer.supports)
        return self.steps

    async def _use(self, instance_id: str, supports: Collection[Support]) -> None:
        provider = self.provider
        if "logs" in supports:
            await self._step("read its log", lambda: provider.logs(instance_id, after=None, since=None, limit=4096))
        if "exec" in supports:
            await self._step("execute", lambda: provider.exec(instance_id, ("true",), stdin=None, timeout_seconds=20))
        if "stop" in supports:
            await self._step("stop", lambda: provider.stop(instance_id))
            if await self._step("be stopped", lambda: self._await_life(instance_id, "stopped")):
                await self._step("start", lambda: provider.start(instance_id))
                await self._step("run again", lambda: self._await_life(instance_id, "running"))

    @contextlib.asynccontextmanager
    async def _destroyed(self, ref: str) -> AsyncGenerator[None]:
        """Leave nothing that carries the reference, also when the answer of the create was lost."""
        try:
            yield
        finally:
            await self._step("destroy", lambda: self._destroy(ref))

    async def _destroy(self, ref: str) -> None:
        until = time.monotonic() + _GONE_SECONDS
        while time.monotonic() < until:
            alive = [i for i in await self.provider.find_by_ref(ref) if i.life != "gone"]
            if not alive and self._is_visible_by(until):
                return
            for instance in alive:
                with contextlib.suppress(errors.InstanceNotFound, errors.Throttled):
                    await self.provider.terminate(instance.id)
            await asyncio.sleep(self.look_seconds)
        raise errors.ProviderError("not_gone", f"look for {ref} at the provider, and destroy it there")

    def _is_visible_by(self, until: float) -> bool:
        """A create whose answer was lost may show later: look for as long as the provider may take."""
        was_lost = any(step.what == "create" and step.error is not None for step in self.steps)
        waited = time.monotonic() - (until - _GONE_SECONDS)
        return not was_lost or waited >= min(self.provider.capabilities.visibility_lag_seconds, _GONE_SECONDS / 2)

    async def _find_offer(self) -> ProviderOffer:
        listed = await self.provider.list_offers()
        offers = [o for o in listed if o.availability != "none" and o.currency == "USD" and not o.spot]
        if not offers:
            raise errors.Rejected("no_offer", "nothing can be had now")
        cheapest = min(offers, key=_reckon)
        if _reckon(cheapest) > self.micro:
            detail = f"the cheapest costs up to {format_usd(_reckon(cheapest))} USD, more than may be spent"
            raise errors.Rejected("too_dear", detail)
        return cheapest

    def _spec(self) -> Spec:
        has = self.provider.capabilities.supports
        return Spec(
            pod_id="pod_trial",
            command=_COMMAND,
            image=_IMAGE if "image" in has else None,
            env={},
            ports=(),
            disk_gb=0,
            hard_stop_at=times.now() + timedelta(seconds=_LIFE_SECONDS),
        )

    async def _await_life(self, instance_id: str, life: str) -> Instance:
        until = time.monotonic() + self.provider.capabilities.boot_limit_seconds
        seen = None
        while time.monotonic() < until:
            with contextlib.suppress(errors.InstanceNotFound, errors.Throttled):
                seen = await self.provider.get(instance_id)
                if seen.life == life:
                    return seen
                if seen.life in ("gone", "failed"):
                    break
            await asyncio.sleep(self.look_seconds)
        raise errors.ProviderError(f"not_{life}", f"it is {seen.status if seen else 'not to be seen'}")

    async def _step(self, what: str, work: Callable[[], Awaitable[T]]) -> T | None:
        began, error = time.monotonic(), None
        try:
            return await work()
        except (errors.ProviderError, TimeoutError, OSError) as failure:
            error = errors.describe(failure)
            return None
        finally:
            self.steps.append(Step(what, round(time.monotonic() - began, 1), error))


def _reckon(offer: ProviderOffer) -> int:
    """What a trial with an offer costs at the most, in micro-USD."""
    return cost(offer.price_micro_h, max(_LIFE_SECONDS, offer.min_billing_s, offer.increment_s))


async def check(provider: Provider, owner: str) -> Standing:
    """Ask a provider for everything that costs nothing: its account, its offers, what of ours runs there."""
    lacks = _find_lacks(provider.capabilities.supports)
    try:
        account = await asyncio.wait_for(provider.account(), provider.capabilities.call_limit_seconds)
        listed = await provider.list_offers()
        offers = [o for o in listed if o.availability != "none"]
        instances = await provider.list_managed(owner)
    except (errors.ProviderError, TimeoutError, OSError) as error:
        return Standing(provider.name, lacks=lacks, clock_seconds=provider.read_clock(), error=errors.describe(error))
    lacks = _find_lacks({support for offer in listed for support in offer.supports}) if listed else lacks
    return Standing(
        provider.name, account, len(offers), len({o.gpu for o in offers if o.gpu}), len(instances),
        provider.read_clock(), lacks,
    )  # fmt: skip


def _find_lacks(supports: Collection[Support]) -> tuple[str, ...]:
    return tuple(support for support in EVERYTHING if support not in supports)
