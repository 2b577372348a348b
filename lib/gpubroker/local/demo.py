"""`make demo`: an agent's whole session against a broker of its own, each request with its real answer.

Real PostgreSQL, real Valkey, real HTTP, real CloudEvents through a broker, a real process as the pod, real seconds on the
bill. It needs nothing, leaves nothing behind, and exits with 0 only when everything was as it should be.
"""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import httpx

from gpubroker.client import BrokerError, Client
from gpubroker.errors import SetupError
from gpubroker.local.processes import ENVIRONMENT
from gpubroker.money import format_usd

_END_SECONDS: Final = 25
_WIDTH: Final = 116
_PROGRAM: Final = "echo hello from a pod with $(nproc) cpus; while true; do date -u +%T; sleep 1; done"
_MOST_LINES: Final = 4
_SHOWN: Final = (
    "id", "name", "code", "detail", "state", "vcpus", "ram_gb", "price_usd_per_hour", "spent_usd", "committed_usd", "key",
    "limit_usd", "held_usd", "available_usd", "exit_code", "stdout", "from", "to", "seconds", "amount_usd", "ends_because",
    "running_at", "expires_at", "terminated_at", "affordable_seconds", "hint", "total",
)  # fmt: skip
"""The fields that tell the story; a real answer has more."""


class DemoFailed(AssertionError):
    """Something in the session was not as it should be."""


def main() -> int:
    """Play the session. Returns the exit code."""
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="gpubroker-demo-"))
    try:
        with _broker(folder) as url:
            _say(f"a broker of its own answers at {url}, {time.monotonic() - began:.1f} s after its start")
            started = time.monotonic()
            _play(url, _bootstrap(folder))
            _say(f"the session took {time.monotonic() - started:.1f} s")
        left = _find_left(folder)
        _expect(not left, f"no process is left behind, but {left}")
    except (SetupError, BrokerError, DemoFailed, subprocess.SubprocessError) as error:
        _say(f"FAILED: {error}")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _say("nothing is left behind: no process, no file")
    return 0


def _play(url: str, first: Mapping[str, Any]) -> None:
    _say("1. The operator's first key makes a child agent that may spend two cents")
    _show("gpubroker bootstrap --json", 0, {"id": first["agent"]["id"], "key": first["key"]["key"]})
    with Client(url, first["key"]["key"], on_answer=_print_answer) as operator:
        scopes = ["offers:read", "pods:read", "pods:write", "pods:exec", "usage:read"]
        child = operator.create_agent({"name": "researcher", "scopes": scopes, "budget": {"limit_usd": "0.02"}})
    with Client(url, child.key.key, on_answer=_print_answer) as agent:
        _say("2. The agent finds an offer, asks for a pod under a hold for its whole life, and waits until it runs")
        agent.list_offers(limit=2, supports="exec")
        wanted = {"name": "worker", "command": ["sh", "-c", _PROGRAM], "requirements": {"supports": ["exec"]}}
        pod = agent.create_pod(wanted | {"max_lifetime_seconds": 300}, wait=20, until="running")
        _expect(pod.state == "running", "the pod runs")
        _say("3. It reads the log and runs a command in the pod")
        time.sleep(2)
        agent.read_log(pod.id, tail=3)
        done = agent.execute(pod.id, ["sh", "-c", "echo I run beside pid $PPID, in $HOME"])
        _expect(done.exit_code == 0, "the command ended well")
        _say("4. A second pod is asked for with a life of ten seconds; meanwhile the first is stopped and started")
        second = agent.create_pod(
            {"name": "short", "command": ["sleep", "600"], "requirements": {}, "max_lifetime_seconds": 10},
            wait=20,
            until="running",
        )
        agent.stop_pod(pod.id, wait=20)
        time.sleep(2)
        agent.start_pod(pod.id, wait=20)
        time.sleep(2)
        _say("5. What it used, to the second: the pause is not on the bill")
        agent.list_records(pod_id=pod.id)
        _say("6. The second pod reaches its end, and is ended")
        ended = agent.get_pod(second.id, wait=30, until="settled", after_version=0)
        while ended.state != "terminated":
            ended = agent.get_pod(second.id, wait=10, until="change", after_version=ended.version)
        _expect(ended.ends_because == "lifetime", "the second pod ended by its lifetime")
        _say("7. A third one for a week is refused: the budget does not cover it, and the answer says what would fit")
        try:
            agent.create_pod({"command": ["sleep", "1"], "requirements": {}, "max_lifetime_seconds": 7 * 86400})
        except BrokerError as error:
            _expect(error.code == "budget_exhausted", f"the budget refuses it, not {error.code}")
        else:
            raise DemoFailed("the third pod was not refused")
        _say("8. The first pod is ended; what was spent, and what may be")
        agent.terminate_pod(pod.id, wait=20)
        spent = agent.usage(group_by="pod")
        (budget,) = agent.list_budgets().items
        _expect(budget.held_usd == 0, "nothing is held any more")
        _expect(budget.spent_usd == spent.total.amount_usd, "the budget and the bill agree")
        _say(f"spent {format_usd(budget.spent_usd)} of {format_usd(budget.limit_usd or 0)} USD, to the micro-dollar")


def _expect(is_so: bool, what: str) -> None:  # noqa: FBT001 - reads as an assertion
    if not is_so:
        raise DemoFailed(f"not so: {what}")


@contextlib.contextmanager
def _broker(folder: Path) -> Generator[str]:
    """`gpubroker dev` on a free port with a folder of its own, ended with its pods."""
    command = [
        sys.executable,
        "-m",
        "gpubroker",
        "dev",
        "--data",
        str(folder / "data"),
        "--port",
        "0",
        "--json",
        "--end-pods",
    ]
    with (folder / "dev.log").open("w+", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=ENVIRONMENT)
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                said.seek(0)
                raise SetupError(f"gpubroker dev did not start: {said.read().strip()}")
            yield str(json.loads(line)["url"])
            process.send_signal(signal.SIGTERM)
            _expect(process.wait(_END_SECONDS) == 0, "gpubroker dev ended well")
        finally:
            process.kill()
            process.communicate()


def _bootstrap(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "gpubroker", "bootstrap", "--data", str(folder / "data"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    return cast("dict[str, Any]", json.loads(done.stdout))


def _find_left(folder: Path) -> list[str]:
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in command:
                found.append(command.strip())
    return found


# Showing


def _say(text: str) -> None:
    print(f"\n{text}" if text[:1].isdigit() else text, flush=True)


async def _print_answer(answer: httpx.Response) -> None:
    await answer.aread()
    request = answer.request
    target = request.url.raw_path.decode()
    body = f" {request.content.decode()}" if request.content else ""
    is_json = answer.headers.get("content-type", "").partition(";")[0].endswith("json")
    _show(f"{request.method} {target}{body}", answer.status_code, answer.json() if is_json else {"text": answer.text})


def _show(request: str, status: int, answer: Mapping[str, Any]) -> None:
    print("\n".join(_fold(f"  > {request}")))
    lead = f"  < {status} " if status else "  < "
    for line in _lines(answer):
        print("\n".join(_fold(lead + line)))
        lead = " " * 8


def _lines(answer: Mapping[str, Any]) -> Generator[str]:
    if set(answer) == {"text"}:
        yield from str(answer["text"]).rstrip().splitlines()
        return
    yield from (f"{_short(item)}" for item in cast("Sequence[Mapping[str, Any]]", answer.get("items", ())))
    rest = {name: value for name, value in answer.items() if name != "items"}
    if "items" not in rest and _pick(rest):
        yield _short(rest)


def _pick(answer: Mapping[str, Any]) -> dict[str, Any]:
    return {name: answer[name] for name in _SHOWN if answer.get(name) not in (None, [], {})}


def _short(answer: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {_value(value)}" for name, value in _pick(answer).items())


def _value(value: object) -> str:
    if isinstance(value, dict):
        return f"({_short(cast('Mapping[str, Any]', value))})"
    return value.strip() if isinstance(value, str) else json.dumps(value)


def _fold(text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, subsequent_indent=" " * 8, max_lines=_MOST_LINES, placeholder=" …", break_on_hyphens=False
    )


if __name__ == "__main__":
    sys.exit(main())
