"""Documents as tests read them: links, and sessions that are run again and must answer as they are printed.

A session is the `console` blocks of one document, in one shell and in order: `$ ` begins a command, `> ` goes on with it, the
lines below are what it prints. In these, `…` stands for anything; identifiers, keys, times and numbers may differ.
"""

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from gpubroker import bundle

HOME = bundle.home()
DOCUMENTS = tuple(
    sorted(path for pattern in ("*.md", "docs/**/*.md") for path in HOME.glob(pattern) if path.name != "CHANGELOG.md")
)

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_VOLATILE = re.compile(
    r"\b[a-z]{3}_[0-9a-hjkmnp-tv-z]{26}\b"  # an id
    r"|\bgbk_\w+|\b\d{4}-\d\d-\d\dT[\d:.]+Z|\beyJ[\w.-]+"  # a key, a moment, a token
    r"|\b\d+(?:[.:,]\d+)*[smhd]?\b"  # a number, a duration
)
_END = "--end-of-a-command--"


class Step(NamedTuple):
    """A command of a document and what is printed below it."""

    line: int
    command: str
    printed: str


def blocks(path: Path, language: str) -> Iterator[tuple[int, str]]:
    """Each fenced block of a language, with the number of its first line."""
    text = path.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        if found[1] == language:
            yield text.count("\n", 0, found.start(2)) + 1, found[2]


def links(path: Path) -> list[str]:
    """Where a document points to."""
    return _LINK.findall(path.read_text(encoding="utf-8"))


def steps(path: Path) -> Iterator[Step]:
    """Every command of a document's sessions."""
    for first, block in blocks(path, "console"):
        at, command, printed = 0, "", ""
        for number, line in enumerate(block.splitlines(keepends=True), first):
            if line.startswith("$ "):
                if command:
                    yield Step(at, command, printed)
                at, command, printed = number, line[2:], ""
            elif line.startswith("> ") and not printed:
                command += line[2:]
            else:
                printed += line
        if command:
            yield Step(at, command, printed)


def play(
    path: Path, folder: Path, env: Mapping[str, str], replaced: Mapping[str, str], seconds: int = 240
) -> list[str]:
    """Run a document's session in a folder; say of each step that printed something else what was expected."""
    told = list(steps(path))
    script = ""
    for step in told:
        command = step.command
        for old, new in replaced.items():
            command = command.replace(old, new)
        script += f"{command}\necho; echo {_END}\n"
    done = subprocess.run(
        ["bash", "-c", f"exec 2>&1\n{script}"],
        cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    answers = done.stdout.split(f"\n{_END}\n")
    assert len(answers) == len(told) + 1, done.stdout
    return [
        f"{path.name}:{step.line}: $ {step.command}printed:\n{answer}\nthe document says:\n{step.printed}"
        for step, answer in zip(told, answers, strict=False)
        if not _says(step.printed, answer)
    ]


def _says(printed: str, answer: str) -> bool:
    pattern = ".*".join(re.escape(_flatten(part)) for part in printed.split("…"))
    return re.fullmatch(rf"\s*{pattern}\s*".replace(r"\ ", r"\s+"), _flatten(answer), re.DOTALL) is not None


def _flatten(text: str) -> str:
    return re.sub(r"\s+", " ", _VOLATILE.sub("#", text)).strip()
