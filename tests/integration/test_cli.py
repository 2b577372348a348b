"""The commands for agents and people, against a broker with pods of this machine: what they print, and how they end."""

import contextlib
import io
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.dev import LIB, RUN, Running

from gpubroker import cli, config

FOREVER = ["sh", "-c", "echo hello; exec sleep 600"]
POD = r"pod_[0-9a-z]{26}"


class Ended(NamedTuple):
    """How a command ended: its exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


class Terminal:
    """Someone with a key at a command line. Commands run in this process: a new one each would take half a second."""

    def __init__(self, broker: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url, self.key = broker
        self._patch = monkeypatch

    def variables(self) -> dict[str, str]:
        return {"GPUBROKER_URL": self.url, "GPUBROKER_API_KEY": self.key, "TOKEN": "from here"}

    def __call__(self, *words: str, **changed: str) -> Ended:
        before = config._settings
        config.use(config.read(self.variables() | changed))
        self._patch.setattr(sys, "argv", ["gpubroker", *words])
        self._patch.setattr(sys, "stdin", None)
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                cli.main()
            except SystemExit as leaving:
                code = leaving.code
            finally:
                config._settings = before
        assert isinstance(code, int), err.getvalue()
        assert "Traceback" not in err.getvalue()
        assert self.key not in out.getvalue() + err.getvalue()
        return Ended(code, out.getvalue(), err.getvalue())

    def start(self, *words: str, **pipes: Any) -> "subprocess.Popen[str]":
        """A command in a process of its own."""
        variables = self.variables() | {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(LIB),
            "TERM": "xterm",
            "COLUMNS": "100",
        }
        return subprocess.Popen([sys.executable, "-c", RUN, *words], text=True, env=variables, **pipes)

    def up(self, name: str, *options: str, command: list[str] | None = None) -> str:
        words = ("--name", name, "--lifetime", "5m", "--wait", "--json", *options)
        return self("up", *words, "--", *(command or FOREVER)).document["id"]


@pytest.fixture
def gpubroker(broker: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal of an agent of the test's own."""
    operator = Terminal(broker, monkeypatch)
    made = operator("agents", "create", "of a test", "--budget", "2", "--json").document
    mine = Terminal(Running(broker.url, made["key"]["key"]), monkeypatch)
    try:
        yield mine
    finally:
        assert operator("agents", "revoke", made["id"]).code == 0


def test_a_session(gpubroker: Terminal):
    assert re.search(r"OFFER +GPU +VCPUS +RAM GB +WHERE +USD/H\nofr_\w{26}  - +0.25 +\d", gpubroker("offers").out)
    made = gpubroker(
        "up", "--name", "worker", "--lifetime", "5m", "--budget", "1", "--env", "TOKEN", "--env", "A=b", "--port", "8080/http",
        "--label", "of=session", "--wait", "--", "sh", "-c", "echo $TOKEN $A; exec sleep 600",
    )  # fmt: skip
    assert (made.code, made.err) == (0, "")
    assert re.match(rf"pod +{POD}\nname +worker\nstate +running", made.out)
    assert "port 8080  http://127.0.0.1:" in made.out
    assert "label of   session" in made.out
    assert re.search(rf"{POD}  worker  running  - +0.01 +0\.0+\d* +[0-9]+[ms]$", gpubroker("pods").out, re.MULTILINE)
    assert gpubroker("logs", "worker").out == "from here b\n"
    assert gpubroker("exec", "worker", "--", "sh", "-c", "echo out; echo err >&2; exit 7") == (7, "out\n", "err\n")
    assert gpubroker("exec", "worker", "--timeout", "1s", "--", "sleep", "9").code == 124
    for word, state in (("stop", "stopped"), ("start", "running"), ("restart", "running")):
        assert gpubroker(word, "worker", "--wait", "--json").document["state"] == state
    ended = gpubroker("down", "worker", "--wait").out
    assert "state     terminated" in ended
    assert "ended by  requested" in ended
    assert "ends  " not in ended
    used = gpubroker("usage", "--by", "label:of")
    assert re.search(r"^KEY +TIME +GPU TIME +USD\nsession +0:00:\d\d +0:00:00 +0.0\d+\ntotal +0:00:\d\d", used.out)
    assert re.fullmatch(r"from \d{4}-\d\d-01T00:00:00Z to [-0-9T:]{19}Z\n", used.err)
    assert gpubroker("pods") == (0, "", "No pods.\n")
    assert "worker" in gpubroker("pods", "--all").out


def test_every_command_has_a_json_document(gpubroker: Terminal):
    pod_id = gpubroker.up("one")
    assert gpubroker("offers", "--json", "--limit", "1").document["items"][0]["provider"] == "local"
    assert gpubroker("up", "--dry-run", "--json", "--", "true").document["commit_usd"]
    assert gpubroker("pods", "--json").document["items"][0]["id"] == pod_id
    assert gpubroker("pods", "one", "--json").document["id"] == pod_id
    assert gpubroker("logs", "one", "--json").document == {"pod_id": pod_id, "log": "hello\n"}
    assert gpubroker("exec", "one", "--json", "--", "true").document["exit_code"] == 0
    assert gpubroker("usage", "--json").document["total"]
    assert gpubroker("budget", "--json").document["items"][0]["limit_usd"] == "2.000000"
    assert gpubroker("agents", "--json").document["items"][0]["name"] == "of a test"
    assert gpubroker("keys", "--json").document["items"][0]["name"] == "of a test"
    assert gpubroker("down", "one", "--json").document["state"] == "terminating"
    failed = gpubroker("pods", "nobody", "--json")
    assert (failed.code, json.loads(failed.out)["code"]) == (3, "not_found")


def test_pods_have_ids_and_names(gpubroker: Terminal):
    first = gpubroker.up("one", command=["true"])
    gpubroker("down", "one", "--wait")
    second = gpubroker.up("one", "--label", "of=both")
    other = gpubroker.up("two", "--label", "of=both")
    assert gpubroker("pods", "one", "--json").document["id"] == second, "the live one"
    assert gpubroker("pods", first, "--json").document["id"] == first
    kid = gpubroker("agents", "create", "kid", "--json").document["key"]["key"]
    twin = gpubroker("up", "--name", "one", "--json", "--", *FOREVER, GPUBROKER_API_KEY=kid).document["id"]
    told = gpubroker("logs", "one")
    assert told.code == 1
    assert {second, twin} == set(re.findall(POD, told.err))
    assert gpubroker("down", twin).code == 0
    both = gpubroker("down", "two", "nobody", "one", "--wait")
    assert (both.code, set(re.findall(POD, both.out))) == (3, {second, other})
    assert "'nobody'" in both.err
    assert gpubroker("pods", "two", "--json").document["id"] == other, "one that has ended"
    gpubroker.up("three", "--label", "of=both")
    assert gpubroker("down", "--label", "of=both", "--wait").out.count("terminated") == 1


WRONG: dict[str, tuple[int, str]] = {
    "offers --bogus": (2, "No such option: --bogus"),
    "offers --gpu h1000": (2, "'h1000' is no GPU model known here. Did you mean H100?"),
    "offers --limit 0": (2, "--limit: Input should be greater than or equal to 1"),
    "offers --max-price much": (2, "'much' is not a decimal number"),
    "offers --sort beauty": (2, "--sort: Input should be 'price'"),
    "offers --min-reliability 2": (2, "--min-reliability: Input should be less than or equal to 1"),
    "offers --cursor x": (2, "--cursor:"),
    "offer": (2, "No such command 'offer'. Did you mean 'offers'?"),
    "up": (2, "an image or a command is needed"),
    "up --lifetime 5s -- true": (2, "--lifetime: Input should be greater than or equal to 10"),
    "up --lifetime soon -- true": (2, "'soon' is no duration such as"),
    "up --budget 0.0000001 -- true": (2, "'0.0000001' is not a decimal number"),
    "up --budget 3 --lifetime 1000h -- true": (5, "seconds of it: --lifetime, or a cheaper offer"),
    "up --lifetime 1000h -- true": (5, "--lifetime"),
    "up --port 99999 -- true": (2, "--port: Input should be less than or equal to 65535"),
    "up --port http -- true": (2, "'http' is no port such as"),
    "up --env NOT_SET -- true": (2, "NOT_SET is not set here"),
    "up --env =x -- true": (2, "K=V is needed"),
    "up --label x=1 --label x=2 -- true": (2, "x is given twice"),
    "up --gpu h100 -- true": (1, "would match without gpu"),
    "up --max-price 0.001 -- true": (1, "would match with max_price_usd_per_hour 0.010000"),
    "up --image busybox -- true": (1, "would match if it has to support nothing"),
    "up --offer ofr_x -- true": (2, "--offer: is no offer that there is now"),
    "up --name here -- true": (1, "has the name 'here'. Use that pod, choose another --name"),
    "pods --state asleep": (2, "--state: Input should be"),
    "pods nobody": (3, "There is no pod 'nobody'. 'gpubroker pods --all' lists"),
    "pods pod_00000000000000000000000000": (3, "Check the id: 'gpubroker pods --all'"),
    "logs here --tail -1": (2, "--tail: Input should be greater than or equal to 0"),
    "logs here --since yesterday": (2, "'yesterday' is no duration"),
    "logs here -f --json": (2, "no JSON document"),
    "exec here": (2, "Missing argument '-- CMD...'"),
    "exec here -- no-such-program": (127, "cannot run no-such-program"),
    "exec here --timeout 1h -- true": (2, "--timeout: Input should be less than or equal to 300"),
    "exec done -- true": (1, "The pod is stopped. 'gpubroker start'"),
    "start here": (1, "cannot be told to start. What it takes now: gpubroker"),
    "stop done": (1, "What it takes now: gpubroker start, logs, down."),
    "down": (2, "either pods or --label"),
    "down here --label a=b": (2, "either pods or --label"),
    "usage --by phase": (2, "'phase' is none of agent, pod"),
    "usage --from 2026-11-02T00:00:00Z --to 2026-11-01T00:00:00Z": (2, "--from: must be before to"),
    "budget set nobody 1": (3, "There is no agent 'nobody'. 'gpubroker agents' lists"),
    "budget set kid ten": (2, "'ten' is not a decimal number"),
    "budget set kid 1 --period week": (2, "'week' is not one of 'total', 'day', 'month'"),
    "budget set kid 50": (1, "cannot be more than its parent's"),
    "agents create kid3 --budget 50": (1, "'gpubroker budget' and 'gpubroker agents' show what there is"),
    "agents create kid3 --scope everything": (2, "--scope: Input should be 'offers:read'"),
    "agents create kid3 --scope admin": (1, "admin"),
    "agents revoke 'of a test'": (4, "cannot be deleted by itself"),
    "keys rotate key_x": (3, "Check the id"),
    "keys --agent nobody": (3, "There is no agent 'nobody'"),
}
"""Each with its exit code, and words of the one or two lines on stderr."""


def test_what_is_wrong_is_a_line_or_two_and_an_exit_code(gpubroker: Terminal):
    gpubroker.up("here")
    gpubroker.up("done", command=["true"])
    assert gpubroker("exec", "here", "--", "true").code == 0
    assert gpubroker("agents", "create", "kid").code == 0
    wrong: dict[str, Ended] = {}
    for line, (code, words) in WRONG.items():
        ended = gpubroker(*shlex.split(line))
        said = " ".join(ended.err.split())
        lines = ended.err.splitlines()
        if (
            (ended.code, ended.out) != (code, "")
            or words not in said
            or len(lines) > 4
            or not lines[0].startswith("gpubroker: ")
        ):
            wrong[line] = ended
    assert not wrong, "\n".join(f"{line}: {ended}" for line, ended in wrong.items())


def test_keys_addresses_and_rights(gpubroker: Terminal):
    kid = gpubroker("agents", "create", "kid", "--scope", "pods:read", "--json").document["key"]["key"]
    told = gpubroker("usage", GPUBROKER_API_KEY=kid)
    assert told == (4, "", "gpubroker: This needs the scope usage:read.\n")
    for key in ("gbk_bad", kid[:-1] + ("0" if kid[-1] != "0" else "1")):
        told = gpubroker("pods", GPUBROKER_API_KEY=key)
        assert (told.code, told.err.splitlines()[1]) == (
            4, "Check GPUBROKER_API_KEY: the key is unknown, expired or revoked.",
        )  # fmt: skip
        assert key not in told.err
    assert gpubroker("pods", GPUBROKER_URL="", GPUBROKER_API_KEY="").err.count("GPUBROKER_") == 2
    wrong = {
        "x": (2, "no address"),
        "http://127.0.0.1:1": (1, "cannot be reached"),
        "http://u:hidden@x": (2, "no address"),
    }
    for url, (code, words) in wrong.items():
        told = gpubroker("pods", GPUBROKER_URL=url)
        assert (told.code, words in told.err, "hidden" in told.err) == (code, True, False), told.err


def test_agents_budgets_and_keys(gpubroker: Terminal):
    made = gpubroker(
        "agents", "create", "kid", "--budget", "0.5", "--period", "day", "--expires", "2h", "--scope", "pods:read"
    )
    assert re.search(r"name +kid\nlife +11\dm left\nscopes +pods:read\nkey id +key_\w+\nkey +gbk_\w+\n", made.out)
    assert re.search(r"agt_\w+ +0\.50 +day +0\.00 +0\.00 +0\.50", gpubroker("budget").out)
    assert "limit      0.25 USD (total)" in gpubroker("budget", "set", "kid", "0.25").out
    changed = gpubroker("agents", "set", "kid", "--name", "grown", "--max-pods", "1", "--json").document
    assert (changed["name"], changed["limits"]["max_pods"]) == ("grown", 1)
    assert gpubroker("agents", "set", "of a test", "--grant", "logs", "--json").document["grants"] == ["logs"]
    assert re.search(r"grown +of a test +11\dm left +1$", gpubroker("agents").out, re.MULTILINE)
    key = gpubroker("keys", "create", "spare", "--agent", "grown", "--json").document["key"]
    assert "revoked" in gpubroker("keys", "revoke", key["id"]).out
    rotated = gpubroker("keys", "create", "other", "--json").document["key"]["id"]
    assert re.search(r"key +gbk_\w+", gpubroker("keys", "rotate", rotated, "--overlap", "1m").out)
    assert re.search(r"other +- +(60|5\d)s left", gpubroker("keys").out)
    assert "life    revoked" in gpubroker("agents", "revoke", "grown").out
    assert gpubroker("keys", "--agent", changed["id"]).out.count("revoked") == 2


# In processes of their own


def test_what_is_piped_in_and_how_a_pipe_ends(gpubroker: Terminal, tmp_path: Path):
    gpubroker.up("worker")
    with gpubroker.start(
        "exec", "worker", "--", "cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as cat:
        assert cat.communicate("zwölf\n" * 1000, timeout=30) == ("zwölf\n" * 1000, "")
    too_much = tmp_path / "too much"
    too_much.write_bytes(b"x" * 2_000_000)
    with (
        too_much.open() as file,
        gpubroker.start(
            "exec", "worker", "--", "cat", stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as cat,
    ):
        out, err = cat.communicate(timeout=30)
    assert (cat.returncode, out) == (2, "")
    assert "stdin is longer than 1 MiB" in err
    with gpubroker.start(
        "exec", "worker", "-n", "--", "seq", "200000", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as many:
        assert many.stdout is not None
        assert many.stdout.readline() == "1\n"
        many.stdout.close()
        assert many.stderr is not None
        assert "Traceback" not in many.stderr.read()


def on_a_terminal(
    gpubroker: Terminal, *words: str, until: str = "", then: str = "", seconds: float = 30
) -> tuple[int, str]:
    """Its exit code and what the terminal showed; once that holds `until`, `then` is typed."""
    ours, theirs = pty.openpty()
    command = gpubroker.start(
        *words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background ignores it
    )  # fmt: skip
    os.close(theirs)
    shown, deadline = b"", time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 0.05)[0]:
                continue
            try:
                read = os.read(ours, 65536)
            except OSError:  # nobody has the terminal any more
                break
            shown += read
            if until and until.encode() in shown:
                until = ""
                command.send_signal(signal.SIGINT) if then == "\x03" else os.write(ours, then.encode())
            if not read:
                break
        return command.wait(10), shown.decode(errors="replace").replace("\r\n", "\n")
    finally:
        command.kill()
        command.wait()
        os.close(ours)


def test_progress_and_ctrl_c_at_a_terminal(gpubroker: Terminal):
    stubborn = ["sh", "-c", "trap '' TERM; while true; do echo tick; sleep 0.2; done"]
    code, shown = on_a_terminal(gpubroker, "up", "--name", "worker", "--lifetime", "5m", "--wait", "--", *stubborn)
    assert code == 0
    assert "worker is" in shown
    assert "state  running" in shown
    assert on_a_terminal(gpubroker, "logs", "worker", "-f", until="tick\r\ntick", then="\x03")[0] == 130
    code, shown = on_a_terminal(gpubroker, "stop", "worker", "--wait", until="is stopping", then="\x03")
    assert code == 130, shown
    assert "worker goes on; end it with: gpubroker down worker" in shown
    assert "Traceback" not in shown


def test_completion_knows_commands_and_pods(gpubroker: Terminal):
    gpubroker.up("worker-one")
    pod_id = gpubroker.up("worker-two")

    def complete(words: str, **changed: str) -> list[str]:
        variables = gpubroker.variables() | changed | {
            "PYTHONPATH": str(LIB), "_GPUBROKER_COMPLETE": "complete_bash", "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        }  # fmt: skip
        done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, env=variables, check=False)
        assert done.stderr == ""
        return done.stdout.split()

    assert complete("gpubroker re") == ["reconcile", "restart"]
    assert sorted(complete("gpubroker logs work")) == ["worker-one", "worker-two"]
    assert complete(f"gpubroker logs {pod_id[:-2]}") == [pod_id]
    assert complete("gpubroker logs work", GPUBROKER_URL="http://127.0.0.1:1") == []
