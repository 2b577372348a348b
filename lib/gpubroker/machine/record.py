"""What ran when: a pod's append-only record, the only truth about it that changes.

One JSON object a line, on disk (fsync) before it counts: `event`, `at` (seconds since 1970 by this machine's clock) and
what belongs to the event. `fold` turns a record into the pod's state; `billed_intervals` into its bill.

```
created     the folder was born: hard_stop_at, ports, gpus
starting    a start was granted, and holds its share of the machine: ports, gpus, cgroups
started     the program is about to run: init, boot, limits
restarted   the program runs anew, without a gap: init, boot, limits
stopping    somebody asked for the stop                     exited    the program ended by itself: exit_code, reason
extended    the hard stop moved: hard_stop_at               stopped   all processes ended, as asked
terminating the end was asked for, or was due: reason       lost      they ended unseen: at is the last sign of life
terminated  all processes have ended, for good              cleaned   disk, environment and command are erased
```
"""

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, NamedTuple

FILE: Final = "record.jsonl"
Event = dict[str, Any]
Life = Literal["starting", "running", "stopping", "stopped", "terminating", "gone"]

_ENDS: Final = frozenset({"exited", "stopped", "lost", "terminated"})


class State(NamedTuple):
    """Where a pod stands. Times are seconds since 1970. `on`: between `started` and the end of that run."""

    life: Life = "starting"
    on: bool = False
    started_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None
    reason: str | None = None
    hard_stop_at: float = 0.0
    ports: dict[str, int] = {}  # noqa: RUF012 - never written to
    """From the pod's port to the one on loopback."""
    gpus: tuple[str, ...] = ()
    """The UUIDs it holds while it is not stopped."""
    cgroups: tuple[str, ...] = ()
    init: tuple[int, int] | None = None
    """The first process of the present or last run: its pid and start time."""
    boot: str | None = None
    limits: str | None = None
    cleaned: bool = False

    @property
    def holds_machine(self) -> bool:
        """Whether it has a share of CPU, RAM and GPUs now."""
        return self.life in {"starting", "running", "stopping", "terminating"}


def apply(state: State, event: Event) -> State:  # noqa: PLR0911 - one line for each event
    """The state after one more event. Events that it does not know change nothing."""
    match event["event"]:
        case "created":
            return state._replace(
                hard_stop_at=event["hard_stop_at"], ports=event["ports"], gpus=tuple(event["gpus"]), life="starting"
            )
        case "starting":
            ports, gpus, cgroups = event["ports"], tuple(event["gpus"]), tuple(event["cgroups"])
            return state._replace(life="starting", ports=ports, gpus=gpus, cgroups=cgroups, exit_code=None, reason=None)
        case "started":
            begun = state._replace(life="running", on=True, started_at=event["at"], ended_at=None)
            return begun._replace(init=tuple(event["init"]), boot=event["boot"], limits=event["limits"])
        case "restarted":
            return state._replace(init=tuple(event["init"]), boot=event["boot"], limits=event["limits"])
        case "extended":
            return state._replace(hard_stop_at=event["hard_stop_at"])
        case "stopping" | "terminating" as life:
            return state._replace(life=life, reason=event.get("reason", state.reason))
        case "exited" | "stopped" | "lost" | "terminated":
            return _ended(state, event)
        case "cleaned":
            return state._replace(cleaned=True, reason=event.get("reason", state.reason))
        case _:
            return state


def _ended(state: State, event: Event) -> State:
    gone = event["event"] == "terminated"
    if state.on or not gone:
        state = state._replace(exit_code=event.get("exit_code"))
    at = event["at"] if state.on or state.ended_at is None else state.ended_at
    reason = event.get("reason", state.reason if gone else None)
    return state._replace(life="gone" if gone else "stopped", on=False, ended_at=at, reason=reason)


def fold(record: Iterable[Event]) -> State:
    """The state that a whole record leads to."""
    state = State()
    for event in record:
        state = apply(state, event)
    return state


def billed_intervals(record: Iterable[Event]) -> list[tuple[float, float | None]]:
    """When the pod was on: what a vendor would bill. The last end is None while it is."""
    intervals: list[tuple[float, float | None]] = []
    begun: float | None = None
    for event in record:
        if event["event"] == "started" and begun is None:
            begun = event["at"]
        elif event["event"] in _ENDS and begun is not None:
            intervals.append((begun, event["at"]))
            begun = None
    return intervals if begun is None else [*intervals, (begun, None)]


def read(folder: str) -> list[Event]:
    """Read a pod's record. A line that a crash cut short never counted. Raises FileNotFoundError."""
    with open(os.path.join(folder, FILE), "rb") as file:
        lines = file.read().split(b"\n")
    events: list[Event] = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def append(folder: str, event: str, *, at: float, **more: object) -> Event:
    """Write one event for good, and give it back. Times have whole microseconds."""
    whole: Event = {"event": event, "at": round(at, 6), **more}
    file = os.open(os.path.join(folder, FILE), os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        size = os.lseek(file, 0, os.SEEK_END)
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        write_all(file, b"\n" * torn + json.dumps(whole).encode() + b"\n")
        os.fsync(file)
    finally:
        os.close(file)
    return whole


def write_all(file: int, data: bytes) -> None:
    """Write every byte."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def last_at(record: Sequence[Event]) -> float:
    """The time of the newest event."""
    return max((event["at"] for event in record), default=0.0)
