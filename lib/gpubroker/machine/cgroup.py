"""Limits of memory and CPU by control groups, version 2 or 1, wherever this user may make one; and what limits us.

A pod has one group per hierarchy, `gpubroker-<ref>`, beside or below the group that the supervisor was started in. Its
processes join before they execute anything (`0` written to `cgroup.procs` is the writer); the supervisor stays outside.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Final, NamedTuple

_PERIOD: Final = 100_000
_LEAST_QUOTA: Final = 1_000
_CONTROLLERS: Final = ("memory", "cpu")


class Home(NamedTuple):
    """Where a controller's group for a pod can be made."""

    controller: str
    version: int
    folder: str


class _Hierarchy(NamedTuple):
    version: int
    controllers: frozenset[str]
    mounted_at: str
    own: str
    """The folder of the process's group."""


def _hierarchies(process: int | str = "self") -> Iterator[_Hierarchy]:
    """Every hierarchy that is mounted, with the place of a process in it."""
    paths: dict[frozenset[str], str] = {}
    with open(f"/proc/{process}/cgroup", encoding="utf-8") as file:
        for line in file:
            _, names, path = line.rstrip("\n").split(":", 2)
            paths[frozenset(names.split(",")) if names else frozenset()] = path
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        mounts = [line.split() for line in file]
    for fields in mounts:
        kind, options = fields[fields.index("-") + 1], frozenset(fields[-1].split(","))
        root, target = fields[3], fields[4]
        for names, path in paths.items():
            if kind != ("cgroup" if names else "cgroup2") or not names <= options:
                continue
            below = os.path.relpath(path, root) if path.startswith(root.rstrip("/") + "/") or path == root else "."
            yield _Hierarchy(1 if names else 2, names, target, os.path.normpath(os.path.join(target, below)))


def _upwards(hierarchy: _Hierarchy) -> Iterator[str]:
    folder = hierarchy.own
    while folder.startswith(hierarchy.mounted_at):
        yield folder
        if folder == hierarchy.mounted_at:
            return
        folder = os.path.dirname(folder)


def homes() -> list[Home]:
    """Where groups can be made: at most one place per controller, none where nothing is writable."""
    found: dict[str, Home] = {}
    try:
        hierarchies = list(_hierarchies())
    except OSError:
        return []
    for hierarchy in hierarchies:
        for controller in _CONTROLLERS:
            place = _home(hierarchy, controller)
            if place is not None:
                found.setdefault(controller, Home(controller, hierarchy.version, place))
    return list(found.values())


def _home(hierarchy: _Hierarchy, controller: str) -> str | None:
    """Version 1: in our own group. Version 2: in the nearest one up that hands the controller down to its children."""
    if hierarchy.version == 1:
        return hierarchy.own if controller in hierarchy.controllers and os.access(hierarchy.own, os.W_OK) else None
    for folder in _upwards(hierarchy):
        joinable = os.access(folder, os.W_OK) and os.access(os.path.join(folder, "cgroup.procs"), os.W_OK)
        if joinable and _hands_down(folder, controller):
            return folder
    return None


def _hands_down(folder: str, controller: str) -> bool:
    """Whether children of a version 2 group have the controller; it is switched on where that is possible."""
    path = os.path.join(folder, "cgroup.subtree_control")
    if controller in _read(path).split():
        return True
    if controller not in _read(os.path.join(folder, "cgroup.controllers")).split():
        return False
    try:
        _write(path, f"+{controller}")
    except OSError:  # it has processes of its own, or is not ours to change
        return False
    return True


def paths(ref: str, places: list[Home]) -> list[str]:
    """The folders of a pod's groups. They are noted in its record before they are made."""
    return sorted({os.path.join(home.folder, f"gpubroker-{ref}") for home in places})


def create(ref: str, places: list[Home], *, ram_bytes: int, vcpus_milli: int) -> set[str]:
    """Make a pod's groups and give the controllers whose limit holds. What cannot be limited is left out."""
    holding: set[str] = set()
    for home in places:
        group = os.path.join(home.folder, f"gpubroker-{ref}")
        try:
            os.makedirs(group, exist_ok=True)
            _limit(group, home, ram_bytes, vcpus_milli)
        except OSError:
            continue
        holding.add(home.controller)
    return holding


def _limit(group: str, home: Home, ram_bytes: int, vcpus_milli: int) -> None:
    quota = max(vcpus_milli * _PERIOD // 1000, _LEAST_QUOTA)
    match home.controller, home.version:
        case "memory", 1:
            _write(os.path.join(group, "memory.limit_in_bytes"), str(ram_bytes))
            with contextlib.suppress(OSError):  # without swap accounting there is no such file
                _write(os.path.join(group, "memory.memsw.limit_in_bytes"), str(ram_bytes))
        case "memory", _:
            _write(os.path.join(group, "memory.max"), str(ram_bytes))
            with contextlib.suppress(OSError):
                _write(os.path.join(group, "memory.swap.max"), "0")
        case _, 1:
            _write(os.path.join(group, "cpu.cfs_period_us"), str(_PERIOD))
            _write(os.path.join(group, "cpu.cfs_quota_us"), str(quota))
        case _:
            _write(os.path.join(group, "cpu.max"), f"{quota} {_PERIOD}")


def members(groups: tuple[str, ...]) -> set[int]:
    """The processes in a pod's groups, as this process numbers them."""
    return {int(pid) for group in groups for pid in _read(os.path.join(group, "cgroup.procs")).split()} - {0}


def counting(pid: int) -> tuple[str, ...]:
    """The groups that count what the kernel kills at the memory limit of a process. None when it has ended."""
    try:
        return tuple(h.own for h in _hierarchies(pid) if h.version == 2 or "memory" in h.controllers)  # noqa: PLR2004
    except OSError:
        return ()


def kills(groups: tuple[str, ...]) -> int:
    """How many processes the kernel has killed there at the memory limit."""
    counters = ("memory.events", "memory.oom_control")
    pairs = [pair for group in groups for counter in counters for pair in _pairs(group, counter)]
    return sum(int(count) for name, count in pairs if name == "oom_kill")


def _pairs(group: str, file: str) -> list[tuple[str, str]]:
    pairs = [line.split() for line in _read(os.path.join(group, file)).splitlines()]
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]  # noqa: PLR2004 - a name and its count


def remove(groups: tuple[str, ...]) -> bool:
    """Remove a pod's groups. False when one still has processes."""
    removed = True
    for group in groups:
        try:
            os.rmdir(group)
        except FileNotFoundError:
            continue
        except OSError:
            removed = False
    return removed


def sweep(places: list[Home], *, before: float) -> None:
    """Remove empty groups of pods whose hard stop was before a time: nobody keeps those any more."""
    for home in places:
        for name in os.listdir(home.folder):
            tail = name.rpartition("-")[2]
            if name.startswith("gpubroker-gb-") and tail.isalnum() and int(tail, 36) < before:
                remove((os.path.join(home.folder, name),))


def memory_limit() -> int | None:
    """The least memory limit in bytes of this process's own groups. None: there is none."""
    limits: list[int] = []
    for hierarchy in _own("memory"):
        for folder in _upwards(hierarchy):
            name = "memory.max" if hierarchy.version == 2 else "memory.limit_in_bytes"  # noqa: PLR2004 - version 2
            text = _read(os.path.join(folder, name)).strip()
            limits += [int(text)] if text.isdigit() else []
    return min(limits, default=None)


def cpu_limit_milli() -> int | None:
    """The least CPU limit of this process's own groups, in thousandths of a CPU. None: there is none."""
    limits: list[int] = []
    for hierarchy in _own("cpu"):
        for folder in _upwards(hierarchy):
            names = ("cpu.max",) if hierarchy.version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")  # noqa: PLR2004
            quota, period, *_ = [*" ".join(_read(os.path.join(folder, name)) for name in names).split(), "", ""]
            limits += [int(quota) * 1000 // int(period)] if quota.isdigit() and period.isdigit() else []
    return min(limits, default=None)


def _own(controller: str) -> list[_Hierarchy]:
    try:
        return [found for found in _hierarchies() if found.version == 2 or controller in found.controllers]  # noqa: PLR2004
    except OSError:
        return []


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""


def _write(path: str, text: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)
