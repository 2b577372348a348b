"""What was measured: one figure a line, beside what functions-framework's hello takes for the like on the same machine."""

import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Figure:
    """A median, in `unit`. `ratio` is to hello's figure: the median of those of each pair, which the machine's mood spares."""

    name: str
    unit: str
    value: float
    p95: float | None = None
    hello: float | None = None
    ratio: float | None = None
    target: float | None = None
    """At most; at least, where the unit is `/s`."""
    target_ratio: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the target is met; nothing where there is none."""
        if self.target is not None:
            met = self.value >= self.target if self.unit == "/s" else self.value <= self.target
            return f"{'met' if met else 'missed'} ({self.target:g} {self.unit})"
        if self.target_ratio is not None and self.ratio is not None:
            return f"{'met' if self.ratio <= self.target_ratio else 'missed'} (x {self.target_ratio:g})"
        return ""


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of all is not above."""
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


def paired(name: str, unit: str, ours: Sequence[float], hellos: Sequence[float], **more: float | None) -> Figure:
    """A figure of pairs: what was measured of ours and of hello, in turn."""
    ratio = statistics.median(our / hello for our, hello in zip(ours, hellos, strict=True))
    return Figure(name, unit, statistics.median(ours), hello=statistics.median(hellos), ratio=ratio, **more)


def timed(name: str, seconds: Sequence[float], hellos: Sequence[float], target_ms: float | None = None) -> Figure:
    """A figure of single times in seconds, shown in ms, beside hello's of the same minutes."""
    ours, hello = statistics.median(seconds) * 1000, statistics.median(hellos) * 1000
    return Figure(
        name, "ms", ours, p95=percentile(seconds, 0.95) * 1000, hello=hello, ratio=ours / hello, target=target_ms
    )


def write_table(figures: Sequence[Figure]) -> str:
    """All figures as a table for people."""
    lines = [("", "median", "p95", "hello", "to hello", "target")]
    lines += [
        (
            figure.name,
            f"{_short(figure.value)} {figure.unit}",
            _short(figure.p95),
            _short(figure.hello),
            "" if figure.ratio is None else f"x {figure.ratio:.2f}",
            figure.verdict,
        )
        for figure in figures
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 0 < column < 5 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def write_json(path: Path, figures: Sequence[Figure], seconds: float) -> None:
    """All figures for programs, with the machine that they are of."""
    machine = {"system": platform.platform(), "cpus": os.cpu_count(), "cpu": _cpu_model(), "load": os.getloadavg()}
    document = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": machine,
        "seconds": round(seconds, 1),
        "figures": [asdict(figure) | {"verdict": figure.verdict} for figure in figures],
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
