"""What of this machine is rented out, in which sizes and for how much: the settings `GPUBROKER_LOCAL_*`."""

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, Literal

from gpubroker.config import Settings
from gpubroker.errors import Rejected, SetupError, Throttled
from gpubroker.machine import capacity, engine, folder, gpus
from gpubroker.machine.capacity import GB, Machine, Share
from gpubroker.money import parse_usd
from gpubroker.providers.base import ProviderOffer, Spec

_MOST_VCPUS, _MOST_GB = 4096, 1_000_000
_LOCK_SECONDS: Final = 10.0
_LEAST_SLICE_MILLI: Final = 10
_DECIMAL: Final = re.compile(r"[0-9]{1,7}(\.[0-9]{1,9})?")


@dataclass(frozen=True, slots=True)
class Terms:
    """vCPUs are in thousandths, prices in micro-USD per hour. A size that is None is found at each look."""

    slice_milli: int = 250
    """The smallest offer; the others are it doubled."""
    slice_micro_h: int = 10_000
    gpu_micro_h: int = 100_000
    """The price of one GPU, on top of the slices that come with it."""
    vcpus_milli: int | None = None
    ram_bytes: int | None = None
    isolation: Literal["best", "user", "none"] = "best"
    """Less than the best is for tests of what happens where the kernel does not let us."""
    stop_grace_seconds: float = 5.0
    end_grace_seconds: float = 2.0
    log_limit_bytes: int = 64 << 20
    engine: Literal["auto", "podman", "docker", "none"] = "none"
    """What runs images; `auto` is the first that answers."""
    engine_env: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)


@dataclass(frozen=True, slots=True)
class Size:
    """One thing to rent."""

    id: str
    share: Share
    price_micro_h: int
    vram_gb: int | None = None


def read_terms(settings: Settings) -> Terms:
    """Read the settings. Raises SetupError, one line that names the variable."""
    default = Terms()
    vcpus = _amount(settings, "GPUBROKER_LOCAL_VCPUS", 1000, _MOST_VCPUS)
    slice_milli = _amount(settings, "GPUBROKER_LOCAL_SLICE_VCPUS", 1000, _MOST_VCPUS) or default.slice_milli
    most = vcpus or capacity.found_vcpus_milli()
    if not _LEAST_SLICE_MILLI <= slice_milli <= most:
        msg = f"GPUBROKER_LOCAL_SLICE_VCPUS must be from 0.01 to the {most / 1000:g} vCPUs that there are"
        raise SetupError(msg)
    return Terms(
        slice_milli=slice_milli,
        slice_micro_h=_price(settings, "GPUBROKER_LOCAL_PRICE_USD_PER_HOUR", default.slice_micro_h),
        gpu_micro_h=_price(settings, "GPUBROKER_LOCAL_GPU_PRICE_USD_PER_HOUR", default.gpu_micro_h),
        vcpus_milli=vcpus,
        ram_bytes=_amount(settings, "GPUBROKER_LOCAL_RAM_GB", GB, _MOST_GB),
        engine=_engine(settings),
        engine_env={n: settings.variables[n] for n in engine.VARIABLES if n in settings.variables},
    )


def _engine(settings: Settings) -> Literal["auto", "podman", "docker", "none"]:
    match settings.variable("GPUBROKER_LOCAL_ENGINE") or "auto":
        case "auto" | "podman" | "docker" | "none" as choice:
            return choice
        case _:
            msg = "GPUBROKER_LOCAL_ENGINE must be auto, podman, docker or none"
            raise SetupError(msg)


def _amount(settings: Settings, name: str, unit: int, most: int) -> int | None:
    text = settings.variable(name)
    if text is None:
        return None
    amount = Decimal(text) if _DECIMAL.fullmatch(text) else Decimal(0)
    if int(amount * unit) <= 0 or amount > most:
        msg = f"{name} must be a decimal number above 0 and at most {most}, such as 0.5"
        raise SetupError(msg)
    return int(amount * unit)


def _price(settings: Settings, name: str, default: int) -> int:
    text = settings.variable(name)
    try:
        return default if text is None else parse_usd(text)
    except ValueError as error:
        msg = f"{name}: {error}"
        raise SetupError(msg) from None


def look(terms: Terms, all_pods: str) -> Machine:
    """What there is for pods now. Memory that was set by hand is taken as it was set, used or not."""
    return Machine(
        vcpus_milli=terms.vcpus_milli or capacity.found_vcpus_milli(),
        ram_bytes=terms.ram_bytes or capacity.found_ram_bytes(),
        unused_ram_bytes=None if terms.ram_bytes else capacity.unused_ram_bytes(),
        disk_gb=capacity.found_disk_gb(all_pods),
        gpus=gpus.found(),
    )


def sizes(terms: Terms, machine: Machine) -> Iterator[Size]:
    """Everything that is offered, whether it fits now or not. Identifiers stay the same from look to look."""
    for vcpus in capacity.doubled(terms.slice_milli, machine.vcpus_milli):
        price = terms.slice_micro_h * (vcpus // terms.slice_milli)
        yield Size(f"cpu-{vcpus / 1000:g}", capacity.share_of(machine, vcpus), price)
    for model in sorted({gpu.model for gpu in machine.gpus}):
        same = [gpu for gpu in machine.gpus if gpu.model == model]
        for count in capacity.doubled(1, len(same)):
            slices = max(machine.vcpus_milli // terms.slice_milli * count // len(machine.gpus), 1)
            share = capacity.share_of(machine, slices * terms.slice_milli, gpu_count=count, gpu_model=model)
            price = terms.slice_micro_h * slices + terms.gpu_micro_h * count
            slug = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
            yield Size(f"gpu-{slug}-{count}", share, price, min(gpu.vram_gb for gpu in same))


def refuse_what_cannot_be(spec: Spec, offer: ProviderOffer, ref: str, used: engine.Engine | None) -> None:
    """Raise Rejected for what no look at the machine can change."""
    if spec.image is not None:
        _refuse_image(spec, spec.image, used)
    if spec.ssh_public_key is not None:
        raise Rejected("ssh_not_supported", "pods of this machine are reached by exec", try_next_offer=True)
    if not spec.command and spec.image is None:
        detail = "without an image there is nothing to run but a command"
        raise Rejected("command_required", detail, try_next_offer=True)
    texts = [*spec.command, *spec.env, *spec.env.values()]
    if any("\0" in text for text in texts) or any(not name or "=" in name for name in spec.env):
        raise Rejected("invalid_spec", "no process can have this command or environment", try_next_offer=False)
    if not folder.is_ref(ref):
        raise Rejected("invalid_reference", repr(ref), try_next_offer=False)
    if time.time() >= min(spec.hard_stop_at.timestamp(), int(ref.rpartition("-")[2], 36)):
        raise Rejected("hard_stop_passed", f"the hard stop of {ref} is over", try_next_offer=False)
    if offer.vcpus <= 0 or offer.ram_gb <= 0 or spec.disk_gb > offer.disk_gb:
        raise Rejected("offer_too_small", f"{offer.provider_offer_id} is less than what was asked", try_next_offer=True)


def _refuse_image(spec: Spec, image: str, used: engine.Engine | None) -> None:
    if used is None:
        detail = "no Podman or Docker answers on this machine, so its pods are processes"
        raise Rejected("image_not_supported", detail, try_next_offer=True)
    if engine.full_name(image) is None:
        raise Rejected("invalid_image", "this is no name of an image in a registry", try_next_offer=False)
    if spec.command[:1] == ("",) or not engine.can_hold(spec.env):
        detail = "no container can have this command, or a line break in a variable that the engine itself reads"
        raise Rejected("invalid_spec", detail, try_next_offer=False)


def rent_out(
    terms: Terms, all_pods: str, spec: Spec, offer: ProviderOffer, ref: str, used: engine.Engine | None = None
) -> None:
    """Grant a share of the machine and make the pod's folder, in one step that survives or never was.

    A pod that has this reference already is left as it is. Raises Rejected, Throttled.
    """
    folder.prepare(all_pods)
    machine = look(terms, all_pods)
    ram = round(offer.ram_gb * GB)
    disk = max(spec.disk_gb, offer.disk_base_gb)
    share = Share(round(offer.vcpus * 1000), ram, disk, offer.gpu_count, offer.gpu)
    try:
        with folder.locked(all_pods, _LOCK_SECONDS):
            if folder.place(all_pods, ref):
                return
            folder.prune(all_pods, now=time.time())
            taken = capacity.held(all_pods)
            if not capacity.times_it_fits(share, machine, taken):
                raise Rejected("no_capacity", f"{offer.provider_offer_id} does not fit now", try_next_offer=True)
            ports = capacity.choose_ports([port.port for port in spec.ports], {}, taken.ports)
            chosen = capacity.free_gpus(share, machine, taken)[: share.gpu_count]
            born = _pod_spec(terms, all_pods, spec, share, ref)
            born = born._replace(price_micro_h=offer.price_micro_h, machine_has_gpus=bool(machine.gpus))
            if spec.image is not None and used is not None:
                login = spec.registry_auth and engine.login(spec.image, **spec.registry_auth)
                folder.note_engine(all_pods, used._asdict())
                born = born._replace(image=engine.full_name(spec.image), engine=used._asdict(), login=login or "")
            folder.give_birth(born, hard_stop_at=spec.hard_stop_at.timestamp(), ports=ports, gpus=chosen)
    except folder.Busy:
        raise Throttled("throttled", "another process grants shares of this machine", wait=2.0) from None
    except OSError as error:
        if not folder.place(all_pods, ref):
            raise Rejected("machine_failed", str(error), try_next_offer=True) from None


def _pod_spec(terms: Terms, all_pods: str, spec: Spec, share: Share, ref: str) -> folder.PodSpec:
    return folder.PodSpec(
        ref=ref,
        pod_id=spec.pod_id,
        all=all_pods,
        hidden=folder.hidden_around(all_pods),
        command=list(spec.command),
        env=dict(spec.env),
        ports=[(port.port, port.protocol) for port in spec.ports],
        vcpus_milli=share.vcpus_milli,
        ram_bytes=share.ram_bytes,
        disk_gb=share.disk_gb,
        gpu_count=share.gpu_count,
        gpu_model=share.gpu_model,
        machine_has_gpus=False,
        price_micro_h=0,
        isolation=terms.isolation,
        stop_grace_seconds=terms.stop_grace_seconds,
        end_grace_seconds=terms.end_grace_seconds,
        log_limit_bytes=terms.log_limit_bytes,
    )
