"""`local`: the operator's own machine as a provider, for development and one's own workstation. Linux only.

A pod is a process tree under a small supervisor of its own (`gpubroker.machine`), which keeps it, records what ran and
ends it at its hard stop without us. The adapter has no state: any process with the same folder sees the same pods.
"""

import asyncio
import base64
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Final, ParamSpec, Self, TypeVar

from gpubroker.config import Settings
from gpubroker.errors import AmbiguousOutcome, InstanceNotFound, ProviderError, Rejected, SetupError, Throttled
from gpubroker.machine import capacity, control, engine, folder, journal, record, rental
from gpubroker.providers.base import (
    Availability,
    Capabilities,
    Created,
    Endpoint,
    ExecResult,
    Instance,
    LogPage,
    Provider,
    ProviderOffer,
    Spec,
    Support,
)

P = ParamSpec("P")
T = TypeVar("T")

_SUPPORTS: Final = frozenset[Support]({"command", "ports", "exec", "logs", "stop"})
_WITH_IMAGES: Final = _SUPPORTS | frozenset[Support]({"image"})
_CREATE_SECONDS, _CALL_SECONDS, _LOOK_SECONDS = 15.0, 28.0, 10.0
_LOOKS_AT_ONCE: Final = 16
_MAKE_SECONDS: Final = 5.0
_ENGINE_SECONDS, _BELIEVED_SECONDS, _DOUBTED_SECONDS = 15.0, 600.0, 60.0


class Local(Provider):
    """The pods in one folder of this machine."""

    name: ClassVar[str] = "local"
    capabilities: ClassVar[Capabilities] = Capabilities(
        kind="process",
        supports=_SUPPORTS,
        stopped_billing="none",
        boot_seconds=1,
        boot_limit_seconds=900,
        bills_boot=False,
        termination_allowance_seconds=10,
        visibility_lag_seconds=0,
        create_limit_seconds=20,
        call_limit_seconds=30,
        refresh_seconds=5,
        lookup_seconds=(1, 3, 10),
        terminal_is_final=True,
        moves_hard_stop=True,
        priced_by_operator=True,
        ttl=True,
    )

    def __init__(self, pods: Path, terms: rental.Terms | None = None) -> None:
        self.pods = str(pods.resolve())
        """The folder of all pods, absolute."""
        self.terms = terms or rental.Terms()
        self._account: str | None = None
        self._engine: engine.Engine | None = None
        self._engine_known_until = float("-inf")

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Read `GPUBROKER_LOCAL_DIR` (default `.gpubroker/pods`) and what `gpubroker.machine.rental` reads."""
        if sys.platform != "linux":
            msg = "the provider 'local' needs Linux; GPUBROKER_PROVIDERS must not name it here"
            raise SetupError(msg)
        return cls(Path(settings.variable("GPUBROKER_LOCAL_DIR") or ".gpubroker/pods"), rental.read_terms(settings))

    async def account(self) -> str:
        """The identity of the folder of pods. A folder that was deleted and made anew is another account."""
        self._account = await _on_disk(folder.prepare, self.pods)
        return self._account

    async def list_offers(self) -> Sequence[ProviderOffer]:
        """Every size that the machine has, also those that do not fit now."""
        return await _on_disk(self._offers)

    def _offers(self) -> list[ProviderOffer]:
        folder.prepare(self.pods)
        machine, taken = rental.look(self.terms, self.pods), capacity.held(self.pods)
        sizes = rental.sizes(self.terms, machine)
        supports = _WITH_IMAGES if self._look_for_engine() else _SUPPORTS
        return [_offer(size, capacity.times_it_fits(size.share, machine, taken), supports) for size in sizes]

    def _look_for_engine(self) -> engine.Engine | None:
        """Ask for a container engine now and then: one that answers is believed longer than that there is none."""
        if time.monotonic() >= self._engine_known_until:
            self._engine = engine.find(self.terms.engine, self.terms.engine_env, seconds=_ENGINE_SECONDS)
            self._engine_known_until = time.monotonic() + (_BELIEVED_SECONDS if self._engine else _DOUBTED_SECONDS)
        return self._engine

    async def create(self, spec: Spec, offer: ProviderOffer, ref: str) -> Created:
        """Start a pod, or give the one that has this reference already. It returns when the program executes.

        An image that is slow to come is not waited for: the pod is `starting` then.
        """
        used = None if spec.image is None else await _on_disk(self._look_for_engine)
        rental.refuse_what_cannot_be(spec, offer, ref, used)
        await self._with_room(lambda: _on_disk(rental.rent_out, self.terms, self.pods, spec, offer, ref, used))
        try:
            instance = await self._settle(ref, seconds=_CREATE_SECONDS if spec.image is None else _MAKE_SECONDS)
        except ProviderError as error:
            raise AmbiguousOutcome(error.code, error.detail, maybe_id=ref) from None
        return Created(ref, instance)

    async def _settle(self, ref: str, *, seconds: float) -> Instance:
        try:
            return await self._look(ref, do="settle", limit_seconds=seconds)
        except ProviderError as error:
            if seconds == _CREATE_SECONDS or error.code != "supervisor_silent":
                raise
        return await self.get(ref)

    async def _with_room(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Try; when there is no room, look at every pod, since a dead one may still count, and try once more."""
        try:
            await attempt()
        except Rejected as refused:
            if refused.code != "no_capacity":
                raise
            with contextlib.suppress(ProviderError):
                await self._look_at_all(await _on_disk(folder.live, self.pods))
            await attempt()

    async def find_by_ref(self, ref: str) -> Sequence[Instance]:
        """The pod, also while its tombstone lasts."""
        try:
            return [await self.get(ref)]
        except InstanceNotFound:
            return []

    async def list_managed(self, owner: str) -> Sequence[Instance]:
        """Every pod of the owner that is not gone. An error when one cannot be looked at, or the folder is another."""
        if (self._account or await self.account()) != await _on_disk(folder.identity, self.pods):
            raise ProviderError("account_changed", f"{self.pods} is not the folder that it was")
        refs = [ref for ref in await _on_disk(folder.live, self.pods) if ref.startswith(f"gb-{owner}-")]
        strays = [_stray(ref) for ref in await _on_disk(self._list_strays) if ref.startswith(f"gb-{owner}-")]
        return [instance for instance in await self._look_at_all(refs) if instance.life != "gone"] + strays

    def _list_strays(self) -> list[str]:
        """Containers that lost their folder. What cannot be listed now is found later: no pod is known by it alone."""
        used = folder.read_engine(self.pods)
        try:
            return [] if used is None else engine.strays(engine.Engine(**used), self.pods, seconds=_ENGINE_SECONDS)
        except engine.Failed:
            return []

    async def _look_at_all(self, refs: Sequence[str]) -> list[Instance]:
        turns = asyncio.Semaphore(_LOOKS_AT_ONCE)

        async def look(ref: str) -> Instance:
            async with turns:
                return await self.get(ref)

        return list(await asyncio.gather(*(look(ref) for ref in refs)))

    async def get(self, instance_id: str) -> Instance:
        """The pod now. A pod whose supervisor died is closed by a new one first."""
        return await self._look(instance_id, do="state", limit_seconds=_LOOK_SECONDS)

    async def terminate(self, instance_id: str) -> None:
        """End it; returns when its end is on disk, and its own disk deleted."""
        try:
            await self._look(instance_id, do="terminate", limit_seconds=_CALL_SECONDS)
        except InstanceNotFound:
            if not await _on_disk(self._remove_stray, instance_id):
                raise
        else:
            with contextlib.suppress(ProviderError):  # what is left then is listed as a stray
                await _on_disk(self._remove_stray, instance_id)

    def _remove_stray(self, ref: str) -> bool:
        """False when there is none; an engine that does not answer leaves that open."""
        used = folder.read_engine(self.pods)
        if used is None:
            return False
        try:
            if ref not in engine.strays(engine.Engine(**used), self.pods, seconds=_ENGINE_SECONDS):
                return False
            engine.remove(engine.Engine(**used), ref, seconds=_LOOK_SECONDS)
        except engine.Failed as error:
            raise ProviderError("engine_failed", str(error)) from None
        return True

    async def stop(self, instance_id: str) -> None:
        """End the program and keep the disk; returns when that is on disk."""
        await self._look(instance_id, do="stop", limit_seconds=_CALL_SECONDS)

    async def start(self, instance_id: str) -> None:
        """Start what is stopped, when its share of the machine is free: else Rejected `no_capacity`."""
        if await _on_disk(folder.place, self.pods, instance_id) is None:
            raise InstanceNotFound("not_found", instance_id)

        async def attempt() -> None:
            machine = await _on_disk(rental.look, self.terms, self.pods)
            await self._look(instance_id, do="start", machine=machine._asdict(), limit_seconds=_CALL_SECONDS)

        await self._with_room(attempt)

    async def restart(self, instance_id: str) -> None:
        """End the program and start it anew in one run. Raises Rejected `not_running`."""
        await self._look(instance_id, do="restart", limit_seconds=_CALL_SECONDS)

    async def extend(self, instance_id: str, hard_stop_at: datetime) -> None:
        """Move the hard stop that its supervisor keeps. Raises Rejected `gone`."""
        await self._look(instance_id, do="extend", hard_stop_at=hard_stop_at.timestamp(), limit_seconds=_CALL_SECONDS)

    async def logs(self, instance_id: str, *, after: int | None, since: datetime | None, limit: int) -> LogPage:
        """What the program wrote, of all its runs; of a pod that is gone the last MiB."""
        moment = None if since is None else since.timestamp()

        def read() -> LogPage | None:
            place = folder.place(self.pods, instance_id)
            page = None if place is None else LogPage(*journal.read(place, after=after, since=moment, limit=limit))
            return page if place == folder.place(self.pods, instance_id) else read()  # it has become a tombstone

        page = await _on_disk(read)
        if page is None:
            raise InstanceNotFound("not_found", instance_id)
        return page

    async def exec(
        self, instance_id: str, command: Sequence[str], *, stdin: bytes | None, timeout_seconds: int
    ) -> ExecResult:
        """Run a command with the program's environment, limits and namespaces. Raises Rejected `not_running`."""
        answer = await self._ask(
            instance_id,
            do="exec",
            command=list(command),
            stdin=(stdin or b"").hex(),
            timeout_seconds=timeout_seconds,
            limit_seconds=timeout_seconds + _LOOK_SECONDS,
        )
        out, errors = base64.b64decode(answer["stdout"]), base64.b64decode(answer["stderr"])
        return ExecResult(answer["exit_code"], out, errors, answer["truncated"], answer["duration_ms"])

    async def close(self) -> None:
        """Nothing is held open; pods stay under their supervisors."""
        control.reap()

    async def _look(self, ref: str, *, limit_seconds: float, **request: object) -> Instance:
        answer = await self._ask(ref, limit_seconds=limit_seconds, **request)
        spec, _ = folder.read(self.pods, ref)
        return _instance(spec, record.State(**answer["state"]))

    async def _ask(self, ref: str, *, limit_seconds: float, **request: object) -> dict[str, Any]:
        try:
            return await control.ask(self.pods, ref, limit_seconds=limit_seconds, **request)
        except control.Refused as refused:
            if refused.code in {"busy", "too_many"}:
                raise Throttled(refused.code, refused.detail, wait=1.0) from None
            raise Rejected(refused.code, refused.detail, try_next_offer=refused.code == "no_capacity") from None
        except control.Silent as silent:
            raise ProviderError("supervisor_silent", str(silent)) from None
        except FileNotFoundError:
            raise InstanceNotFound("not_found", ref) from None
        except (OSError, ValueError) as error:
            raise ProviderError("unreadable", f"{ref}: {error}") from None


async def _on_disk(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do what reads or writes more than a little in a thread."""
    try:
        return await asyncio.to_thread(work, *args, **kwargs)
    except (OSError, ValueError) as error:
        raise ProviderError("unreadable", str(error)) from None


def _offer(size: rental.Size, times: int, supports: frozenset[Support]) -> ProviderOffer:
    share = size.share
    availability: tuple[Availability, ...] = ("none", "low", "medium", "medium", "high")
    return ProviderOffer(
        provider_offer_id=size.id,
        gpu=share.gpu_model,
        gpu_count=share.gpu_count,
        vcpus=share.vcpus_milli / 1000,
        ram_gb=share.ram_bytes / capacity.GB,
        disk_gb=share.disk_gb,
        disk_base_gb=share.disk_gb,
        region="local",
        price_micro_h=size.price_micro_h,
        stopped_micro_h=0,
        supports=supports,
        availability=availability[min(times, len(availability) - 1)],
        vram_gb=size.vram_gb,
        reliability=None,
    )


def _stray(ref: str) -> Instance:
    return Instance(ref, ref, "container without its folder", "unknown", "unknown")


def _instance(spec: folder.PodSpec, state: record.State) -> Instance:
    is_failed = spec.image is not None and state.life == "stopped" and state.started_at is None and bool(state.reason)
    return Instance(
        id=spec.ref,
        ref=spec.ref,
        status=state.life,
        life="failed" if is_failed else state.life,
        billing="full" if state.on else "none",
        started_at=_time(state.started_at),
        ended_at=_time(state.ended_at),
        exit_code=state.exit_code,
        reason=state.reason if state.life not in {"starting", "running"} else state.limits,
        endpoints=tuple(_endpoints(spec, state)) if state.life == "running" else (),
        hard_stop_at=_time(state.hard_stop_at),
        price_micro_h=spec.price_micro_h,
    )


def _endpoints(spec: folder.PodSpec, state: record.State) -> Iterator[Endpoint]:
    for port, protocol in spec.ports:
        external = state.ports[str(port)]
        url = f"http://127.0.0.1:{external}" if protocol == "http" else None
        yield Endpoint(f"{protocol}-{port}", port, protocol, "127.0.0.1", external, url)


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
