"""How the texts of options are read: durations, money, pairs. What is wrong with one is a line that names the option."""

import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Annotated, Final, Literal

import typer

from gpubroker.money import format_usd, parse_usd
from gpubroker.times import now, parse_time

Period = Literal["total", "day", "month"]  # as resources has it, which costs 40 ms to import
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Cursor = Annotated[str | None, typer.Option(help="Go on where a page ended.")]
Limit = Annotated[int, typer.Option(help="So many at the most, 1 to 200.")]

_PARTS: Final = re.compile(r"(\d{1,9})([dhms])")
_GROUP: Final = re.compile(r"agent|pod|provider|gpu|hour|day|month|label:.+")
_SECONDS: Final = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def read_usd(text: str) -> int:
    """Micro-USD from a text such as `2.50`. Raises BadParameter."""
    try:
        return parse_usd(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} {error}") from None


def write_usd(micro: int | None) -> str | None:
    """The amount as requests carry it."""
    return None if micro is None else format_usd(micro)


def read_group(text: str) -> str:
    """A key that usage is grouped by. Raises BadParameter."""
    if not _GROUP.fullmatch(text):
        raise typer.BadParameter(f"{text!r} is none of agent, pod, provider, gpu, label:<k>, hour, day, month")
    return text


def read_duration(text: str) -> int:
    """Seconds from `90s`, `15m`, `1h`, `2d`, several of them (`1h30m`), or a plain number. Raises BadParameter."""
    if re.fullmatch(r"\d{1,9}", text):
        return int(text)
    if not re.fullmatch(rf"({_PARTS.pattern})+", text):
        raise typer.BadParameter(f"{text!r} is no duration such as 90s, 15m, 1h or 2d")
    return sum(int(number) * _SECONDS[unit] for number, unit in _PARTS.findall(text))


def read_moment(text: str) -> datetime:
    """A time from RFC 3339, or from a duration before now. Raises BadParameter."""
    try:
        return parse_time(text) if "T" in text else now() - timedelta(seconds=read_duration(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def read_pairs(texts: Iterable[str], option: str) -> dict[str, str]:
    """Names and values from `K=V`. Raises BadParameter that shows the name at most: the value may be a secret."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise typer.BadParameter("K=V is needed", param_hint=option)
        if pairs.setdefault(name, value) != value:
            raise typer.BadParameter(f"{name} is given twice", param_hint=option)
    return pairs
