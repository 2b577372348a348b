"""What this machine has, what its pods hold of it, and the sizes that are offered.

CPU is counted in thousandths of a vCPU, memory in bytes, disk in GB of 10^9 bytes.
"""

import os
import socket
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from gpubroker.machine import cgroup, folder

GB: Final = 10**9
_PORTS: Final = range(20_000, 30_000)
"""Below the ports that the kernel gives to outgoing connections, which might take one meanwhile."""
_KEPT_RAM_SHARE, _LEAST_KEPT_RAM = 10, GB
_KEPT_DISK_SHARE: Final = 10


class Gpu(NamedTuple):
    """One GPU: its name by NVML, its memory in GB of 2^30 bytes, and whether something that is no pod uses it."""

    uuid: str
    model: str
    vram_gb: int
    busy: bool


class Machine(NamedTuple):
    """What there is for pods, and how much memory is unused now (None: do not look at it)."""

    vcpus_milli: int
    ram_bytes: int
    unused_ram_bytes: int | None
    disk_gb: int
    gpus: tuple[Gpu, ...]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Machine":
        """Read what `_asdict` and JSON made of one."""
        made = cls(**fields)
        return made._replace(gpus=tuple(Gpu(*gpu) for gpu in made.gpus))


class Share(NamedTuple):
    """A part of the machine that a pod wants."""

    vcpus_milli: int
    ram_bytes: int
    disk_gb: int
    gpu_count: int = 0
    gpu_model: str | None = None


class Held(NamedTuple):
    """What pods hold now."""

    vcpus_milli: int
    ram_bytes: int
    disk_gb: int
    gpus: frozenset[str]
    ports: frozenset[int]


def found_vcpus_milli() -> int:
    """The CPUs that this process may use, by affinity and control groups."""
    allowed = len(os.sched_getaffinity(0)) * 1000
    return min(allowed, cgroup.cpu_limit_milli() or allowed)


def found_ram_bytes() -> int:
    """The memory that pods may have: what this process may use, less a tenth (at least 1 GB) for the machine itself."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = min(total, cgroup.memory_limit() or total)
    return max(total - max(total // _KEPT_RAM_SHARE, _LEAST_KEPT_RAM), 0)


def unused_ram_bytes() -> int:
    """What could be used now without swapping."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def found_disk_gb(all_pods: str) -> int:
    """The space that pods may have where their folders are, less a tenth of what is free."""
    disk = os.statvfs(all_pods)
    free = disk.f_bavail * disk.f_frsize
    return (free - free // _KEPT_DISK_SHARE) // GB


def held(all_pods: str, *, without: str | None = None) -> Held:
    """Add up what all pods but one hold. To grant by it, hold the lock. Raises OSError when a pod cannot be read."""
    vcpus = ram = disk = 0
    gpus: set[str] = set()
    ports: set[int] = set()
    for ref in folder.live(all_pods):
        if ref == without:
            continue
        spec, state = folder.state_of(all_pods, ref)
        disk += 0 if state.cleaned else spec.disk_gb
        ports |= set(state.ports.values())
        if state.holds_machine:
            vcpus, ram = vcpus + spec.vcpus_milli, ram + spec.ram_bytes
            gpus |= set(state.gpus)
    return Held(vcpus, ram, disk, frozenset(gpus), frozenset(ports))


def times_it_fits(share: Share, machine: Machine, taken: Held) -> int:
    """How many such shares are free now."""
    counts = [(machine.vcpus_milli - taken.vcpus_milli) // share.vcpus_milli]
    counts.append((machine.ram_bytes - taken.ram_bytes) // max(share.ram_bytes, 1))
    if machine.unused_ram_bytes is not None:
        counts.append(machine.unused_ram_bytes // max(share.ram_bytes, 1))
    if share.disk_gb:
        counts.append((machine.disk_gb - taken.disk_gb) // share.disk_gb)
    if share.gpu_count:
        counts.append(len(free_gpus(share, machine, taken)) // share.gpu_count)
    return max(min(counts), 0)


def free_gpus(share: Share, machine: Machine, taken: Held) -> list[str]:
    """The UUIDs of the model's GPUs that nobody uses."""
    wanted = [gpu for gpu in machine.gpus if gpu.model == share.gpu_model]
    return [gpu.uuid for gpu in wanted if gpu.uuid not in taken.gpus and not gpu.busy]


def doubled(least: int, most: int) -> list[int]:
    """`least`, and it doubled as often as `most` allows."""
    found: list[int] = []
    while least <= most:
        found.append(least)
        least *= 2
    return found


def share_of(machine: Machine, vcpus_milli: int, *, gpu_count: int = 0, gpu_model: str | None = None) -> Share:
    """Memory and disk in proportion to the vCPUs; memory in steps of 10 MB, rounded down.

    A fifth of the disk is in no size: what pods have written counts twice, as theirs and as no longer free.
    """
    ram = machine.ram_bytes * vcpus_milli // machine.vcpus_milli // 10**7 * 10**7
    disk = machine.disk_gb * 4 * vcpus_milli // (5 * machine.vcpus_milli)
    return Share(vcpus_milli, ram, disk, gpu_count, gpu_model)


def choose_ports(wanted: Sequence[int], before: dict[str, int], taken: frozenset[int]) -> dict[str, int]:
    """A loopback port for each of the pod's: the one it had before where that is still free. Raises OSError."""
    chosen: dict[str, int] = {}
    for port in wanted:
        candidates = [_PORTS.start + int.from_bytes(os.urandom(4), "big") % len(_PORTS) for _ in range(1000)]
        old = before.get(str(port))
        used = taken | set(chosen.values())
        free = (p for p in ([old] if old else []) + candidates if p not in used and _is_free(p))
        found = next(free, None)
        if found is None:
            msg = f"no loopback port from {_PORTS.start} to {_PORTS.stop - 1} is free"
            raise OSError(msg)
        chosen[str(port)] = found
    return chosen


def _is_free(port: int) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind(("0.0.0.0", port))  # noqa: S104 - only tried, never listened on
            except OSError:
                return False
    return True
