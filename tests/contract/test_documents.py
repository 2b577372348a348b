"""The documents say what the code does: every setting, error and event, every path, target and command."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml
from tests import documents
from tests.documents import DOCUMENTS, HOME

from gpubroker import errors, events
from gpubroker.commands import app
from gpubroker.providers import registry

SETTING = re.compile(
    r"\b(?:GPUBROKER_[A-Z][A-Z_]*[A-Z]|DATABASE_URL|REDIS_URL|K_SINK|[A-Z]+_(?:API_KEY|TOKEN|CLIENT_ID|CLIENT_SECRET))\b"
)
GIVEN_TO_PODS = {"GPUBROKER_POD_ID", "GPUBROKER_POD_REF", "GPUBROKER_PORT_N", "GPUBROKER_PORT", "GPUBROKER_EXEC"}


def ids(path: Path) -> str:
    return path.relative_to(HOME).as_posix()


def problems(above: type[errors.Problem] = errors.Problem) -> Iterator[type[errors.Problem]]:
    for problem in above.__subclasses__():
        if problem is not errors.OAuthError:
            yield problem
        yield from problems(problem)


def settings_in_code() -> set[str]:
    """Every name of a setting that stands as a string of its own in the library."""
    found: set[str] = {"PORT"}
    for path in (HOME / "lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and SETTING.fullmatch(node.value):
                found.add(node.value)
    return found - GIVEN_TO_PODS


def table(path: str) -> list[list[str]]:
    """The rows of a document's tables, cell by cell."""
    lines = (HOME / path).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_every_setting_is_described_and_none_that_is_not() -> None:
    described = {row[0].strip("`") for row in table("docs/settings.md")} - {"variable"}
    named = set(SETTING.findall((HOME / "docs/settings.md").read_text(encoding="utf-8"))) - GIVEN_TO_PODS
    in_tests = {f"GPUBROKER_TEST_{what}" for what in ("DATABASE_URL", "REDIS_URL", "ENGINE", "CASES", "SEED")}
    credentials = {variable for name in registry.names() for variable in registry.adapter(name).credentials}
    assert described == settings_in_code() - credentials | in_tests  # a vendor's are in its section of providers.md
    assert named <= described


def test_no_document_names_a_setting_that_is_none() -> None:
    known = settings_in_code() | GIVEN_TO_PODS | {row[0].strip("`") for row in table("docs/settings.md")}
    for path in DOCUMENTS:
        unknown = {name for name in SETTING.findall(path.read_text(encoding="utf-8")) if name not in known}
        assert not {name for name in unknown if not re.fullmatch(r"GPUBROKER_PORT_\d+", name)}, ids(path)


def test_every_error_has_its_section() -> None:
    text = (HOME / "docs/errors.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(sections) == {problem.slug for problem in problems()} | {errors.Problem.slug}
    for problem in problems():
        assert f"{problem.status}. " in sections[problem.slug]
        assert problem.hint in sections[problem.slug]
        assert ("May be sent again." in sections[problem.slug]) is problem.retryable
    listed = {row[1]: (int(row[0]), row[2]) for row in table("docs/errors.md")[1:]}
    assert listed == {f"[{p.slug}](#{p.slug})": (p.status, p.title) for p in problems()}


def test_the_tree_of_errors_is_the_one_that_is_drawn() -> None:
    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__ or ""))
    real = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.GpubrokerError)
    }
    assert drawn | {"GpubrokerError"} == real


def test_every_event_is_described() -> None:
    rows = [row for row in table("docs/events.md") if row[0].startswith("`io.")]
    assert rows == [
        [f"`{e.type}`", ", ".join(e.producers), ", ".join(e.consumers) or "-", e.summary] for e in events.EVENTS
    ]


def test_the_diagram_names_what_each_consumer_gets() -> None:
    ((_, diagram),) = documents.blocks(HOME / "README.md", "")
    for event in events.EVENTS:
        if event.consumers:
            assert event.what.removeprefix("pod.") in diagram, event.what


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(path: Path) -> None:
    for link in documents.links(path):
        if link.startswith(("http://", "https://")):
            continue
        target, _, section = link.partition("#")
        found = (path.parent / target) if target else path
        assert found.exists(), f"{ids(path)} points to {link}"
        if section:
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, link


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_paths_targets_and_commands_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (HOME / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", text)) | set(re.findall(r"^make ([a-z]+)", text, re.MULTILINE)) <= targets
    commands = set(typer.main.get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]
    assert set(re.findall(r"(?:`|^\$ |\$\()gpubroker ([a-z]+)", text, re.MULTILINE)) <= commands
    modules = {file.name for file in (HOME / "lib").rglob("*.py")} | {
        file.name for file in (HOME / "tests").rglob("*.py")
    }
    assert set(re.findall(r"`(\w+\.py)`", text)) <= modules | {"main.py"}
    for named in re.findall(r"`((?:lib|tests|docs|functions|eventing|knative)/[\w./]*)`", text):
        assert (HOME / named).exists(), named


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_code_in_documents_can_be_read(path: Path) -> None:
    for _, block in documents.blocks(path, "python"):
        compile(block, ids(path), "exec")
    for _, block in documents.blocks(path, "yaml"):
        assert list(yaml.safe_load_all(block))
    for _, block in documents.blocks(path, "sh"):
        subprocess.run(["bash", "-n", "-c", block], check=True)


def test_decisions_are_numbered_without_a_gap() -> None:
    found = sorted((HOME / "docs/decisions").glob("*.md"))
    assert [path.name[:4] for path in found] == [f"{n:04}" for n in range(1, len(found) + 1)]
    for number, path in enumerate(found, 1):
        assert path.read_text(encoding="utf-8").startswith(f"# {number}. ")


def test_documents_say_nothing_of_one_machine() -> None:
    for path in DOCUMENTS:
        assert not re.findall(r"(?<![\w.])/(?:work|root|farm)/", path.read_text(encoding="utf-8")), ids(path)
