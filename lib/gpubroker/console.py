"""What the commands for agents and people print: one JSON document or a table on stdout, all else on stderr.

Tables are coloured and fold at a terminal; elsewhere they are plain text of whole lines. Exit codes: 0 done, 1 failed, 2 wrong
use, 3 not found, 4 denied, 5 the budget does not cover it.
"""

import contextlib
import io
import json
import re
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import typer

from gpubroker.tables import NUMERIC, Table, suggest

if TYPE_CHECKING:
    from pydantic import BaseModel

    from gpubroker.client import BrokerError, Client
    from gpubroker.resources.pods import Pod

FAILED: Final = 1
WRONG_USE: Final = 2
INTERRUPTED: Final = 130
_BY_STATUS: Final = {401: 4, 402: 5, 403: 4, 404: 3}
_WRONG_USE_CODES: Final = frozenset({"invalid", "malformed_json", "body_too_large"})
_HINTS: Final = {
    "unauthenticated": "Check GPUBROKER_API_KEY: the key is unknown, expired or revoked.",
    "not_running": "'gpubroker start' starts a stopped pod, 'gpubroker pods' shows how they are.",
    "name_in_use": "Use that pod, choose another --name, or end it with 'gpubroker down'.",
    "budget_exhausted": "A shorter --lifetime or a cheaper offer may fit; 'gpubroker budget' shows what there is.",
    "exceeds_parent": "'gpubroker budget' and 'gpubroker agents' show what there is.",
    "action_not_allowed": "'gpubroker pods' shows how they are.",
    "forbidden": "",
    "invalid": "",
}
"""What to do at a command line, where that is something else than what a program does that sends requests."""
_NO_SUCH_THING: Final = (
    "Check the id: 'gpubroker pods --all', 'gpubroker agents' and 'gpubroker keys' list what there is."
)
_COMMANDS: Final = {
    "start": "start",
    "stop": "stop",
    "restart": "restart",
    "exec": "exec",
    "logs": "logs",
    "terminate": "down",
}
_OPTIONS: Final = {
    "budget_usd": "--budget", "country": "--country", "disk_gb": "--disk", "expires_in": "--expires", "gpu_count": "--gpus",
    "grants": "--grant", "group_by": "--by", "labels": "--label", "limit_usd": "the amount", "max_lifetime_seconds": "--lifetime",
    "max_price_usd_per_gpu_hour": "--max-price-per-gpu", "max_price_usd_per_hour": "--max-price", "min_gpu_count": "--min-gpus",
    "name": "the name", "offer_id": "--offer", "overlap_seconds": "--overlap", "ports": "--port", "scopes": "--scope",
    "command": "the command", "timeout_seconds": "--timeout", "stdin": "stdin",
}  # fmt: skip
_GROUPS: Final = frozenset({"requirements", "budget", "limits"})

R = TypeVar("R", bound="BaseModel")


@contextlib.contextmanager
def connect(*, as_json: bool) -> Generator["Client"]:
    """A client of GPUBROKER_URL and GPUBROKER_API_KEY; an error answer ends the command with its lines and exit code."""
    from gpubroker.client import BrokerError, Client

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        with Client() as broker:
            yield broker
    except BrokerError as error:
        if as_json:
            print_json(error.problem)
        raise typer.Exit(tell(error)) from None


def show(result: R, make_table: Callable[[R], Table], *, as_json: bool) -> None:
    """Print a resource as it came, or the table that is made of it."""
    if as_json:
        print_json(result)
        return
    table = make_table(result)
    _print_rich(table) if sys.stdout.isatty() else _print_plain(table)
    for note in table.notes:
        say(note)


def print_json(value: "BaseModel | Mapping[str, Any]") -> None:
    """Print one JSON document: a resource as the broker wrote it, or what was made here."""
    shown = value if isinstance(value, Mapping) else value.model_dump(mode="json", by_alias=True)
    print(json.dumps(shown, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))


def say(text: str) -> None:
    """Print a line to stderr."""
    print(_clean(text), file=sys.stderr)


def tell(error: "BrokerError") -> int:
    """Print what was wrong and what to do now, a line each, to stderr. Returns the exit code."""
    say(f"gpubroker: {_describe(error.problem) if error.code == 'invalid' else error.detail}")
    known = _HINTS.get(error.code, error.hint)
    if error.code == "not_found" and "request_id" in error.problem:  # the broker's words are for programs
        known = _NO_SUCH_THING
    hint = advise(error.problem) or known
    if hint:
        say(hint)
    if error.code in _WRONG_USE_CODES:
        return WRONG_USE
    return _BY_STATUS.get(error.status, FAILED)


def _describe(problem: Mapping[str, Any]) -> str:
    """All that is wrong with a request, with the options of the command line instead of the places in JSON."""
    wrong = cast("list[dict[str, Any]]", problem.get("errors") or [])
    told = [f"{locate(str(entry.get('pointer') or ''))} {entry.get('message')}".strip() for entry in wrong]
    return f"{'; '.join(told).rstrip('.')}." if told else str(problem.get("detail"))


def locate(pointer: str) -> str:
    """The option that a place in a request comes from: `--lifetime:` for `/max_lifetime_seconds`."""
    words = [word for word in re.split("[?/]", pointer) if word and not word.isdigit() and word not in _GROUPS]
    return f"{_OPTIONS.get(words[0], '--' + words[0].replace('_', '-'))}:" if words else ""


def advise(problem: Mapping[str, Any]) -> str:
    """The hint that is in what an error carries beside its words: the right spelling, the time it pays, the nearest offer."""
    wrong = cast("list[dict[str, Any]]", problem.get("errors") or [])
    meant = [str(entry["did_you_mean"]) for entry in wrong if entry.get("did_you_mean")]
    if meant:
        return f"Did you mean {', '.join(meant)}?"
    if problem.get("affordable_seconds"):
        return f"The budget pays {problem['affordable_seconds']} seconds of it: --lifetime, or a cheaper offer."
    taken = [_COMMANDS[action] for action in problem.get("allowed_actions") or () if action in _COMMANDS]
    if taken:
        return f"What it takes now: gpubroker {', '.join(taken)}."
    nearest = cast("list[dict[str, Any]]", (problem.get("no_match") or {}).get("nearest") or [])
    return suggest(nearest[0]["offer"]["id"], nearest[0]["change"]) if nearest else ""


@contextlib.contextmanager
def waiting() -> Generator[Callable[["Pod"], None]]:
    """Shows how a pod comes along, with the seconds and what is left: only on a terminal, on stderr, and while it is waited."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    texts = ("{task.description}", "{task.elapsed:.0f} s", "{task.fields[left]}")
    columns = [TextColumn(text, markup=False) for text in texts]
    with Progress(SpinnerColumn(), *columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("asking", left="")

        def show_pod(pod: "Pod") -> None:
            left = "" if pod.eta_seconds is None else _Left(time.monotonic() + pod.eta_seconds)
            progress.update(task, description=_clean(f"{pod.name or pod.id} is {pod.state}"), left=left)

        yield show_pod


@dataclass(frozen=True, slots=True)
class _Left:
    """What is left until a moment, as of when it is written."""

    until: float

    def __str__(self) -> str:
        seconds = self.until - time.monotonic()
        return f"about {seconds:.0f} s left" if seconds >= 1 else "any moment now"


def _print_plain(table: Table) -> None:
    rows = [[_clean(cell) for cell in row] for row in table.rows]
    if any(table.columns) and rows:
        rows.insert(0, list(table.columns))
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if name in NUMERIC else cell.ljust(width)
            for cell, width, name in zip(row, widths, table.columns, strict=True)
        ]
        print("  ".join(cells).rstrip())


def _print_rich(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    if not table.rows:
        return
    shown = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(table.columns))
    for place, name in enumerate(table.columns):
        is_numeric = name in NUMERIC
        shown.add_column(
            name,
            justify="right" if is_numeric else "left",
            no_wrap=is_numeric or not place or name == "STATE",
            overflow="fold",
        )
    for row in table.rows:
        shown.add_row(*(Text(_clean(cell)) for cell in row))
    Console().print(shown)


def _clean(text: str) -> str:
    """Nothing that a terminal would obey: names and reasons come from others."""
    return "".join(character if character.isprintable() else "?" for character in text)
