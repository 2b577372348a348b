"""The provider `local` as its callers see it: real processes in a folder of the test's own."""

# The machine itself keeps its paths as text.
# ruff: noqa: PTH106, PTH110, PTH208
import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Coroutine, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.providers.common import ProviderContract

from gpubroker import config
from gpubroker.errors import InstanceNotFound, ProviderError, Rejected, SetupError
from gpubroker.ids import base36
from gpubroker.machine import capacity, control, folder, journal, processes, record, rental
from gpubroker.machine.engine import Engine
from gpubroker.providers import base
from gpubroker.providers.base import Instance, Port, ProviderOffer, Spec
from gpubroker.providers.local import Local

T = TypeVar("T")
OWNER = "testtest"
TERMS = rental.Terms(vcpus_milli=2000, ram_bytes=2 * 10**9, stop_grace_seconds=0.5, end_grace_seconds=0.3)
PYTHON = os.path.realpath(sys.executable)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run one coroutine, at most 30 s."""

    async def limited() -> T:
        async with asyncio.timeout(30):
            return await work

    return asyncio.run(limited())


class Rent:
    """An adapter with the folder `data/pods`, and what a test asks of it."""

    def __init__(self, data: Path, terms: rental.Terms = TERMS) -> None:
        self.data, self.pods = data, data / "pods"
        data.mkdir(exist_ok=True)
        self.local = Local(self.pods, terms)

    def offer(self, name: str = "cpu-0.25") -> ProviderOffer:
        """Find one of the offers."""
        return next(offer for offer in run(self.local.list_offers()) if offer.provider_offer_id == name)

    def create(self, *command: str, offer: str = "cpu-0.25", seconds: float = 60, **spec: Any) -> Instance:
        """Start a pod; its reference is its id."""
        ref = make_ref(seconds)
        created = run(self.local.create(make_spec(*command, seconds=seconds, **spec), self.offer(offer), ref))
        assert created.id == ref
        assert created.instance is not None
        return created.instance

    def get(self, ref: str) -> Instance:
        """Look at a pod."""
        return run(self.local.get(ref))

    def log(self, ref: str, **more: Any) -> str:
        """Read the whole log."""
        return run(self.local.logs(ref, **({"after": 0, "since": None, "limit": 1 << 20} | more))).data.decode()

    def exec(self, ref: str, *command: str, stdin: bytes | None = None, timeout_seconds: int = 10) -> str:
        """Run a command that must end well; give what it said."""
        result = run(self.local.exec(ref, command, stdin=stdin, timeout_seconds=timeout_seconds))
        assert result.exit_code == 0, result
        return result.stdout.decode()

    def await_life(self, ref: str, *lives: str, seconds: float = 8) -> Instance:
        """Look until the pod is in one of these lives."""
        until = time.monotonic() + seconds
        while (instance := self.get(ref)).life not in lives:
            assert time.monotonic() < until, instance
            time.sleep(0.02)
        return instance

    def await_log(self, ref: str, text: str, seconds: float = 8) -> str:
        """Look until the log has this text."""
        until = time.monotonic() + seconds
        while text not in (log := self.log(ref)):
            assert time.monotonic() < until, log
            time.sleep(0.02)
        return log

    def bill(self, ref: str) -> list[tuple[float, float | None]]:
        """What the pod's own record says of when it was on."""
        return record.billed_intervals(control.read_record(str(self.pods), ref))

    def end_everything(self) -> None:
        """Whatever became of the test: no process and no control group of its pods stays."""
        if not self.pods.exists():
            return
        refs = [
            path.name for path in [*self.pods.iterdir(), *(self.pods / "gone").iterdir()] if path.name.startswith("gb-")
        ]
        groups = {group for ref in refs for group in record.fold(control.read_record(str(self.pods), ref)).cgroups}
        until = time.monotonic() + 5
        while left := mentioning(str(self.pods)) | {pid for ref in refs for pid in processes.marked(ref)}:
            processes.kill(left)
            assert time.monotonic() < until, left
            time.sleep(0.005)
        for group in groups:
            while os.path.exists(group) and time.monotonic() < until:
                with contextlib.suppress(OSError):
                    os.rmdir(group)
                time.sleep(0.005)
        control.reap()


def mentioning(text: str) -> set[int]:
    """The processes whose command line has this text: by it we know what this test has started."""
    found: set[int] = set()
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()):
        with contextlib.suppress(OSError):
            if text.encode() in Path(f"/proc/{pid}/cmdline").read_bytes() and processes.start_time(pid) is not None:
                found.add(pid)
    return found


def make_ref(seconds: float = 60) -> str:
    """Make a reference whose hard stop is in so many seconds."""
    return f"gb-{OWNER}-{secrets.token_hex(8)}-{base36(int(time.time() + seconds) + 1)}"


def make_spec(*command: str, seconds: float = 60, **more: Any) -> Spec:
    """Say what shall run."""
    stop = datetime.now(UTC) + timedelta(seconds=seconds)
    fields = {"pod_id": "pod_test", "image": None, "env": {}, "ports": (), "disk_gb": 0} | more
    return Spec(command=command, hard_stop_at=stop, **fields)


@pytest.fixture
def rent(tmp_path: Path) -> Iterator[Rent]:
    """An adapter whose pods end with the test."""
    made = Rent(tmp_path / "data")
    yield made
    made.end_everything()


class TestLocal(ProviderContract):
    disk_gb = 0

    @classmethod
    def provider(cls) -> type[base.Provider]:
        return Local

    @pytest.fixture
    def adapter(self, rent: Rent) -> base.Provider:
        return rent.local


def test_offers_are_slices_doubled_up_to_the_machine(rent: Rent) -> None:
    offers = run(rent.local.list_offers())
    cpu = [offer for offer in offers if offer.gpu is None]
    assert [(offer.provider_offer_id, offer.vcpus, offer.ram_gb, offer.price_micro_h) for offer in cpu] == [
        ("cpu-0.25", 0.25, 0.25, 10_000),
        ("cpu-0.5", 0.5, 0.5, 20_000),
        ("cpu-1", 1.0, 1.0, 40_000),
        ("cpu-2", 2.0, 2.0, 80_000),
    ]
    assert {offer.availability for offer in cpu} <= {"low", "medium", "high"}
    assert {(o.region, o.country, o.stopped_micro_h, o.min_billing_s, o.increment_s) for o in offers} == {
        ("local", None, 0, 0, 1)
    }


def test_sizes_that_do_not_fit_now_are_listed_as_such(rent: Rent) -> None:
    rent.create("sleep", "100", offer="cpu-1")
    now = {offer.provider_offer_id: offer.availability for offer in run(rent.local.list_offers())}
    assert (now["cpu-2"], now["cpu-1"], now["cpu-0.25"]) == ("none", "low", "high")


def test_the_environment_is_the_pods_own(rent: Rent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_SECRET", "never")
    instance = rent.create(
        "/usr/bin/env", "-0", env={"TOKEN": "t0k\nén", "GPUBROKER_POD_REF": "forged"}, ports=(Port(8000),)
    )
    rent.await_life(instance.id, "stopped")
    found = dict(item.split("=", 1) for item in rent.log(instance.id).rstrip("\0").split("\0"))
    disk = str(rent.pods / instance.id / "disk")
    port = found.pop("GPUBROKER_PORT_8000")
    assert port.isdigit()
    found.pop("CUDA_VISIBLE_DEVICES", None)
    assert found.pop("PATH").startswith("/usr/local/sbin:")
    assert found == {
        "HOME": disk,
        "LANG": "C.UTF-8",
        "TOKEN": "t0k\nén",
        "GPUBROKER_POD_ID": "pod_test",
        "GPUBROKER_POD_REF": instance.id,
    }


def test_secrets_are_in_no_command_line_repr_record_or_open_file(rent: Rent) -> None:
    secret = secrets.token_hex(12)
    instance = rent.create("sleep", "100", env={"TOKEN": secret})
    pids = mentioning(str(rent.pods)) | processes.marked(instance.id)
    assert len(pids) >= 3
    assert not any(secret in Path(f"/proc/{pid}/cmdline").read_text() for pid in pids)
    assert secret not in repr(instance)
    folder = rent.pods / instance.id
    telling = {path.name for path in folder.iterdir() if path.is_file() and secret in path.read_text(errors="replace")}
    assert telling == {"spec.json"}
    assert stat.S_IMODE((folder / "spec.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert rent.exec(instance.id, "ls", "/proc/self/fd").split() == ["0", "1", "2", "3"]  # 3 is its look at the folder


def test_a_program_that_ends_leaves_its_code(rent: Rent) -> None:
    for command, code in ((["sh", "-c", "exit 7"], 7), (["true"], 0), (["sh", "-c", "kill -TERM $$"], 128 + 15)):
        instance = rent.create(*command)
        ended = rent.await_life(instance.id, "stopped")
        assert (ended.exit_code, ended.billing) == (code, "none")
        assert ended.started_at is not None
        assert ended.ended_at is not None
        assert rent.bill(instance.id) == [(ended.started_at.timestamp(), ended.ended_at.timestamp())]
        run(rent.local.terminate(instance.id))
        assert rent.get(instance.id).exit_code == code


def test_a_command_that_cannot_run_is_a_stopped_pod_with_a_reason(rent: Rent, tmp_path: Path) -> None:
    missing = rent.create("/no/such/program")
    assert (missing.life, missing.exit_code) == ("stopped", 127)
    assert "gpubroker: cannot run /no/such/program: No such file or directory" in rent.log(missing.id)
    refused = rent.create("/etc/passwd")
    assert (refused.life, refused.exit_code) == ("stopped", 126)
    assert "Permission denied" in rent.log(refused.id)


def test_exec_runs_beside_the_program(rent: Rent) -> None:
    instance = rent.create("sleep", "100", env={"TOKEN": "secret"})
    script = "cat; echo $TOKEN >&2; pwd; exit 3"
    result = run(rent.local.exec(instance.id, ["sh", "-c", script], stdin=b"given\n", timeout_seconds=10))
    assert (result.exit_code, result.truncated) == (3, False)
    assert result.stdout.decode() == f"given\n{rent.pods / instance.id / 'disk'}\n"
    assert result.stderr == b"secret\n"
    assert result.duration_ms < 5000
    missing = run(rent.local.exec(instance.id, ["/no/such"], stdin=None, timeout_seconds=10))
    assert (missing.exit_code, missing.stderr) == (127, b"gpubroker: cannot run /no/such: No such file or directory\n")
    flood = ["sh", "-c", "head -c 3000000 /dev/zero; head -c 5 /dev/zero >&2"]
    big = run(rent.local.exec(instance.id, flood, stdin=None, timeout_seconds=20))
    assert (len(big.stdout), len(big.stderr), big.truncated, big.exit_code) == (1 << 20, 5, True, 0)
    fed = rent.exec(instance.id, "sh", "-c", "wc -c", stdin=b"x" * (1 << 20))
    assert fed.strip() == str(1 << 20)


def test_exec_ends_at_its_timeout_with_all_that_it_started(rent: Rent) -> None:
    instance = rent.create("sleep", "100")
    token = f"8640{secrets.randbelow(10**9)}"
    script = f"echo begun; setsid sleep {token} & sleep {token}"
    begun = time.monotonic()
    result = run(rent.local.exec(instance.id, ["sh", "-c", script], stdin=None, timeout_seconds=1))
    assert (result.exit_code, result.stdout) == (None, b"begun\n")
    assert 0.9 < time.monotonic() - begun < 3
    assert not mentioning(token)
    assert rent.get(instance.id).life == "running"


def test_an_exec_that_nobody_waits_for_any_more_ends(rent: Rent) -> None:
    instance = rent.create("sleep", "100")
    token = f"8641{secrets.randbelow(10**9)}"

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await rent.local.exec(instance.id, ["sleep", token], stdin=None, timeout_seconds=60)

    run(leave())
    until = time.monotonic() + 3
    while mentioning(token):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_many_execs_run_at_once(rent: Rent) -> None:
    instance = rent.create("sleep", "100", offer="cpu-2")

    async def all_of_them() -> list[str]:
        calls = (
            rent.local.exec(instance.id, ["sh", "-c", f"sleep 0.3; echo {number}"], stdin=None, timeout_seconds=20)
            for number in range(20)
        )
        return [result.stdout.decode().strip() for result in await asyncio.gather(*calls)]

    begun = time.monotonic()
    assert run(all_of_them()) == [str(number) for number in range(20)]
    assert time.monotonic() - begun < 4


def test_exec_needs_a_running_pod(rent: Rent) -> None:
    instance = rent.create("true")
    rent.await_life(instance.id, "stopped")
    with pytest.raises(Rejected, match="not_running"):
        rent.exec(instance.id, "true")
    with pytest.raises(Rejected, match="not_running"):
        run(rent.local.restart(instance.id))
    run(rent.local.terminate(instance.id))
    with pytest.raises(Rejected, match="not_running"):
        rent.exec(instance.id, "true")
    with pytest.raises(InstanceNotFound):
        rent.exec(make_ref(), "true")


def test_stop_keeps_the_disk_and_start_goes_on(rent: Rent) -> None:
    instance = rent.create("sh", "-c", "echo run >> runs; cat runs; sleep 100", ports=(Port(9000),))
    rent.await_log(instance.id, "run\n")
    run(rent.local.stop(instance.id))
    stopped = rent.get(instance.id)
    assert (stopped.life, stopped.billing, stopped.exit_code, stopped.endpoints) == ("stopped", "none", None, ())
    assert not processes.marked(instance.id)
    run(rent.local.stop(instance.id))
    run(rent.local.start(instance.id))
    again = rent.get(instance.id)
    assert (again.life, again.billing, again.endpoints) == ("running", "full", instance.endpoints)
    assert again.started_at is not None
    assert stopped.ended_at is not None
    assert again.started_at >= stopped.ended_at
    assert again.ended_at is None
    rent.await_log(instance.id, "run\nrun\nrun\n")
    assert [end is None for _, end in rent.bill(instance.id)] == [False, True]


def test_a_restart_is_one_run_for_the_bill(rent: Rent) -> None:
    instance = rent.create("sh", "-c", "echo run >> runs; wc -l < runs; sleep 100")
    rent.await_log(instance.id, "1\n")
    run(rent.local.restart(instance.id))
    rent.await_log(instance.id, "1\n2\n")
    again = rent.get(instance.id)
    assert (again.life, again.started_at) == ("running", instance.started_at)
    assert len(rent.bill(instance.id)) == 1


def test_a_program_is_asked_before_it_is_killed(rent: Rent) -> None:
    polite = rent.create("sh", "-c", "trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.1; done")
    rent.await_log(polite.id, "ready")
    begun = time.monotonic()
    run(rent.local.stop(polite.id))
    assert time.monotonic() - begun < 0.45
    assert rent.log(polite.id).endswith("bye\n")
    deaf = rent.create("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done")
    rent.await_log(deaf.id, "ready")
    begun = time.monotonic()
    run(rent.local.stop(deaf.id))
    assert 0.45 < time.monotonic() - begun < 2
    assert not processes.marked(deaf.id)


def test_terminate_leaves_a_tombstone_and_no_secret(rent: Rent) -> None:
    secret = secrets.token_hex(12)
    script = "mkdir -p a/b/c; echo x > a/b/c/x; chmod 000 a/b a; echo last words; sleep 100"
    instance = rent.create("sh", "-c", script, secret, env={"TOKEN": secret})
    rent.await_log(instance.id, "last words")
    run(rent.local.terminate(instance.id))
    gone = rent.get(instance.id)
    assert (gone.life, gone.billing) == ("gone", "none")
    assert gone.ended_at is not None
    (interval,) = rent.bill(instance.id)
    assert interval[1] == gone.ended_at.timestamp()
    tomb = rent.pods / "gone" / instance.id
    assert not (rent.pods / instance.id).exists()
    assert {path.name for path in tomb.iterdir()} == {"spec.json", "record.jsonl", "log", "log.index", "supervisor.log"}
    assert not any(secret in path.read_text(errors="replace") for path in tomb.iterdir())
    assert "last words" in rent.log(instance.id)
    run(rent.local.terminate(instance.id))
    assert run(rent.local.list_managed(OWNER)) == []
    assert [found.life for found in run(rent.local.find_by_ref(instance.id))] == ["gone"]
    again = run(rent.local.create(make_spec("sleep", "100"), rent.offer(), instance.id))
    assert again.instance is not None
    assert again.instance.life == "gone"
    with pytest.raises(Rejected, match="gone"):
        run(rent.local.start(instance.id))
    assert (tomb / "supervisor.log").read_text() == ""


def test_old_tombstones_are_forgotten(rent: Rent) -> None:
    old = rent.create("true")
    run(rent.local.terminate(old.id))
    os.utime(rent.pods / "gone" / old.id, (0, time.time() - 8 * 86400))
    young = rent.create("true")
    with pytest.raises(InstanceNotFound):
        rent.get(old.id)
    assert run(rent.local.find_by_ref(old.id)) == []
    assert rent.get(young.id)


def test_endpoints_are_ports_on_loopback(rent: Rent) -> None:
    serve = (
        "import http.server, os; at = ('127.0.0.1', int(os.environ['GPUBROKER_PORT_80']))\n"
        "http.server.HTTPServer(at, http.server.SimpleHTTPRequestHandler).serve_forever()"
    )
    instance = rent.create(PYTHON, "-c", serve, ports=(Port(80, "http"), Port(53, "udp")), offer="cpu-1")
    web, dns = instance.endpoints
    assert (web.port, web.protocol, web.host, web.url) == (
        80,
        "http",
        "127.0.0.1",
        f"http://127.0.0.1:{web.external_port}",
    )
    assert (dns.port, dns.protocol, dns.url) == (53, "udp", None)
    assert web.external_port != dns.external_port
    rent.exec(instance.id, "sh", "-c", "echo hello > file.txt")
    until = time.monotonic() + 5
    while True:
        try:
            answer = urllib.request.urlopen(f"{web.url}/file.txt", timeout=5).read()
            break
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert answer == b"hello\n"


def test_create_is_once_per_reference(rent: Rent) -> None:
    ref, offer = make_ref(), rent.offer()

    async def twice() -> list[str | None]:
        spec = make_spec("sh", "-c", "echo run >> runs; sleep 100")
        made = await asyncio.gather(*(rent.local.create(spec, offer, ref) for _ in range(5)))
        return [created.instance.life if created.instance else None for created in made]

    assert run(twice()) == ["running"] * 5
    assert rent.exec(ref, "cat", "runs") == "run\n"
    assert [instance.id for instance in run(rent.local.list_managed(OWNER))] == [ref]
    assert run(rent.local.list_managed("others00")) == []


def test_what_cannot_be_is_refused(rent: Rent) -> None:
    offer = rent.offer()

    def refusal(spec: Spec, ref: str | None = None) -> tuple[str, bool]:
        with pytest.raises(Rejected) as caught:
            run(rent.local.create(spec, offer, ref or make_ref()))
        return caught.value.code, caught.value.try_next_offer

    assert refusal(make_spec("true", image="nginx")) == ("image_not_supported", True)
    assert refusal(make_spec()) == ("command_required", True)
    assert refusal(make_spec("true", ssh_public_key="ssh-ed25519 x")) == ("ssh_not_supported", True)
    assert refusal(make_spec("true", seconds=-1)) == ("hard_stop_passed", False)
    assert refusal(make_spec("true"), make_ref(-5)) == ("hard_stop_passed", False)
    assert refusal(make_spec("true"), "gb-../../etc-x") == ("invalid_reference", False)
    assert refusal(make_spec("true", env={"A=B": "x"})) == ("invalid_spec", False)
    assert refusal(make_spec("true", disk_gb=offer.disk_gb + 1)) == ("offer_too_small", True)
    assert run(rent.local.list_managed(OWNER)) == []
    for ref in ("../data", "gone", "", make_ref()):
        with pytest.raises(InstanceNotFound):
            rent.get(ref)


def test_two_adapters_see_one_truth(rent: Rent) -> None:
    other = Local(rent.pods, TERMS)
    instance = rent.create("sleep", "100")
    assert run(other.account()) == run(rent.local.account())
    assert run(other.get(instance.id)) == rent.get(instance.id)
    run(other.stop(instance.id))
    assert rent.get(instance.id).life == "stopped"


def test_a_listing_is_complete_or_an_error(rent: Rent) -> None:
    instance, other = rent.create("sleep", "100"), rent.create("sleep", "100")
    assert {found.id for found in run(rent.local.list_managed(OWNER))} == {instance.id, other.id}
    spec = rent.pods / other.id / "spec.json"
    whole = spec.read_bytes()
    spec.write_bytes(b"{")
    with pytest.raises(ProviderError):
        run(rent.local.list_managed(OWNER))
    with pytest.raises(ProviderError):
        run(rent.local.list_offers())
    spec.write_bytes(whole)
    shutil.move(rent.pods, rent.data / "aside")
    try:
        with pytest.raises(ProviderError):
            run(rent.local.list_managed(OWNER))
        run(Local(rent.pods, TERMS).account())
        with pytest.raises(ProviderError):
            run(rent.local.list_managed(OWNER))
        run(rent.local.account())
        assert run(rent.local.list_managed(OWNER)) == []
    finally:
        shutil.rmtree(rent.pods)
        shutil.move(rent.data / "aside", rent.pods)


def test_capacity_is_never_exceeded(rent: Rent) -> None:
    offer = rent.offer("cpu-0.5")

    async def rush() -> tuple[int, list[str]]:
        calls = (rent.local.create(make_spec("sleep", "100"), offer, make_ref()) for _ in range(20))
        made = await asyncio.gather(*calls, return_exceptions=True)
        refused = [error.code for error in made if isinstance(error, Rejected)]
        return sum(not isinstance(outcome, BaseException) for outcome in made), refused

    assert run(rush()) == (4, ["no_capacity"] * 16)
    first, *_ = run(rent.local.list_managed(OWNER))
    run(rent.local.stop(first.id))
    newcomer = rent.create("sleep", "100", offer="cpu-0.5")
    with pytest.raises(Rejected) as caught:
        run(rent.local.start(first.id))
    assert (caught.value.code, caught.value.try_next_offer) == ("no_capacity", True)
    assert rent.get(first.id).life == "stopped"
    run(rent.local.terminate(newcomer.id))
    run(rent.local.start(first.id))
    assert rent.get(first.id).life == "running"


def test_ports_stay_the_same_while_they_are_free() -> None:
    first = capacity.choose_ports([80, 443], {}, frozenset())
    assert len(set(first.values())) == 2
    assert capacity.choose_ports([80, 443], first, frozenset()) == first
    moved = capacity.choose_ports([80, 443], first, frozenset({first["80"]}))
    assert moved["80"] != first["80"]
    assert moved["443"] == first["443"]


def test_extend_moves_the_hard_stop(rent: Rent) -> None:
    instance = rent.create("sleep", "100", seconds=0.6)
    later = datetime.now(UTC) + timedelta(seconds=1.4)
    run(rent.local.extend(instance.id, later))
    assert rent.get(instance.id).hard_stop_at == later
    time.sleep(0.9)
    assert rent.get(instance.id).life == "running"
    gone = rent.await_life(instance.id, "gone")
    assert gone.ended_at is not None
    assert 0 <= (gone.ended_at - later).total_seconds() < 1
    assert gone.reason == "its hard stop was due"
    with pytest.raises(Rejected, match="gone"):
        run(rent.local.extend(instance.id, later))


def test_the_log_by_offset_and_by_time(rent: Rent) -> None:
    instance = rent.create("sh", "-c", "echo one; echo two > /dev/stdout; echo three > /dev/stderr")
    rent.await_life(instance.id, "stopped")
    assert rent.log(instance.id) == "one\ntwo\nthree\n"
    assert rent.log(instance.id, after=4) == "two\nthree\n"
    assert rent.log(instance.id, after=4, limit=3) == "two"
    assert rent.log(instance.id, after=None, limit=6) == "three\n"
    page = run(rent.local.logs(instance.id, after=10**9, since=None, limit=10))
    assert (page.starts_at, page.data) == (14, b"")
    with pytest.raises(InstanceNotFound):
        rent.log(make_ref())


def test_since_leaves_out_what_was_written_before(rent: Rent) -> None:
    instance = rent.create("sh", "-c", "echo early; sleep 0.6; echo late; sleep 100")
    rent.await_log(instance.id, "early")
    time.sleep(0.3)
    between = datetime.now(UTC)
    rent.await_log(instance.id, "late")
    assert rent.log(instance.id, since=between) == "late\n"
    assert rent.log(instance.id, since=between - timedelta(hours=1)) == "early\nlate\n"
    assert rent.log(instance.id, since=datetime.now(UTC) + timedelta(hours=1)) == ""
    assert rent.log(instance.id, after=8, since=between) == "te\n"


def test_a_long_log_gives_its_oldest_part_back(tmp_path: Path) -> None:
    terms = rental.Terms(vcpus_milli=2000, ram_bytes=2 * 10**9, log_limit_bytes=1 << 20)
    rent = Rent(tmp_path / "data", terms)
    try:
        instance = rent.create("sh", "-c", "yes 0123456 | head -c 4000000", offer="cpu-2")
        rent.await_life(instance.id, "stopped")
        log = rent.pods / instance.id / journal.LOG
        assert log.stat().st_size == 4_000_000
        assert log.stat().st_blocks * 512 <= (1 << 20) + 8192
        page = run(rent.local.logs(instance.id, after=0, since=None, limit=16))
        assert page.starts_at >= 2_900_000
        assert page.data == b"0123456\n" * 2
        assert rent.log(instance.id, after=3_999_992) == "0123456\n"
    finally:
        rent.end_everything()


def test_memory_is_limited(rent: Rent) -> None:
    instance = rent.create("sleep", "100")
    assert instance.reason is not None
    if "memory by cgroup" not in instance.reason:
        pytest.skip(f"no control group can be made here ({instance.reason})")
    hungry = rent.create(PYTHON, "-c", "x = b'x' * 10**9; print(len(x))", offer="cpu-0.5")
    ended = rent.await_life(hungry.id, "stopped")
    assert (ended.exit_code, ended.reason and ended.reason.split(":")[0]) == (137, "OOMKilled")
    fed = rent.create(PYTHON, "-c", "x = b'x' * 10**8; print(len(x))", offer="cpu-0.5")
    assert rent.await_life(fed.id, "stopped").exit_code == 0
    groups = record.fold(control.read_record(str(rent.pods), instance.id)).cgroups
    run(rent.local.terminate(instance.id))
    assert groups
    assert not any(os.path.exists(group) for group in groups)


def test_cpu_is_limited(rent: Rent) -> None:
    instance = rent.create("sleep", "100", offer="cpu-0.25")
    assert instance.reason is not None
    if "cpu by cgroup" not in instance.reason:
        pytest.skip(f"no control group can be made here ({instance.reason})")
    burn = "import time; end = time.time() + 1\nwhile time.time() < end: pass\nprint(time.process_time())"
    assert float(rent.exec(instance.id, PYTHON, "-I", "-S", "-c", burn)) < 0.45


def test_the_brokers_data_is_out_of_sight(rent: Rent) -> None:
    (rent.data / "secret").write_text("the broker's key")
    other = rent.create("sleep", "100", env={"TOKEN": "theirs"})
    instance = rent.create("sleep", "100")
    assert instance.reason is not None
    if "files of the broker hidden" not in instance.reason:
        pytest.skip(f"no namespace of mounts can be made here ({instance.reason})")
    seen = rent.exec(instance.id, "find", str(rent.data)).split()
    assert seen == [str(rent.data), str(rent.pods), str(rent.pods / instance.id), str(rent.pods / instance.id / "disk")]

    def try_it(script: str) -> str:
        return rent.exec(instance.id, "sh", "-c", f"({script}) 2>&1; true")

    assert try_it(f"cat {rent.data}/secret {rent.pods}/{other.id}/spec.json").count("No such file") == 2
    assert try_it(f"touch {rent.pods}/x {rent.data}/x").count("Read-only") == 2
    assert int(try_it("ls -d /proc/[0-9]* | wc -l")) < 8
    assert "TOKEN" not in try_it("cat /proc/*/environ | tr '\\0' '\\n'")
    looks = "cat /proc/1/environ; cat /proc/1/maps; cat /proc/1/fd/4; readlink -v /proc/1/cwd"
    assert try_it(looks).count("denied") == 4
    assert "NoNewPrivs:\t1" in try_it("cat /proc/self/status")
    try_it("umount -l $(dirname $(dirname $HOME)); umount -l /proc; mount -t proc proc /proc")
    assert "No such file" in try_it(f"cat {rent.data}/secret")
    assert (rent.data / "secret").read_text() == "the broker's key"


def test_a_pod_cannot_lift_its_own_limits(rent: Rent) -> None:
    instance = rent.create("sleep", "100")
    groups = record.fold(control.read_record(str(rent.pods), instance.id)).cgroups
    for group in groups:
        files = " ".join(f"{group}/{name}" for name in ("memory.limit_in_bytes", "memory.max", "../cgroup.procs"))
        script = f"for f in {files}; do echo 0 > $f; done 2>&1"
        run(rent.local.exec(instance.id, ["sh", "-c", script], stdin=None, timeout_seconds=5))
        limit = Path(group) / "memory.limit_in_bytes"
        if limit.exists():
            assert abs(int(limit.read_text()) - 250_000_000) < 8192
    assert all(f"gpubroker-{instance.id}" in rent.exec(instance.id, "cat", "/proc/self/cgroup") for _ in groups)


def test_settings_are_read_and_wrong_ones_named(tmp_path: Path) -> None:
    def make(**variables: str) -> Local:
        return Local.from_settings(config.read({"GPUBROKER_LOCAL_DIR": str(tmp_path / "pods"), **variables}))

    local = make(
        GPUBROKER_LOCAL_VCPUS="1.5",
        GPUBROKER_LOCAL_RAM_GB="0.7500001",
        GPUBROKER_LOCAL_SLICE_VCPUS="0.1",
        GPUBROKER_LOCAL_PRICE_USD_PER_HOUR="0.003",
        GPUBROKER_LOCAL_ENGINE="none",
    )
    offers = run(local.list_offers())
    assert [(offer.vcpus, offer.ram_gb, offer.price_micro_h) for offer in offers if offer.gpu is None] == [
        (0.1, 0.05, 3000),
        (0.2, 0.1, 6000),
        (0.4, 0.2, 12000),
        (0.8, 0.4, 24000),
    ]
    for name, wrong in (
        ("GPUBROKER_LOCAL_VCPUS", "many"),
        ("GPUBROKER_LOCAL_VCPUS", "0"),
        ("GPUBROKER_LOCAL_RAM_GB", "-1"),
        ("GPUBROKER_LOCAL_RAM_GB", "nan"),
        ("GPUBROKER_LOCAL_SLICE_VCPUS", "999"),
        ("GPUBROKER_LOCAL_SLICE_VCPUS", "0.001"),
        ("GPUBROKER_LOCAL_PRICE_USD_PER_HOUR", "cheap"),
        ("GPUBROKER_LOCAL_GPU_PRICE_USD_PER_HOUR", "0.00000001"),
        ("GPUBROKER_LOCAL_ENGINE", "/usr/bin/podman"),
    ):
        with pytest.raises(SetupError) as caught:
            make(**{name: wrong})
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_identity_lasts_as_long_as_the_folder(rent: Rent) -> None:
    first = run(rent.local.account())
    assert run(Local(rent.pods).account()) == first
    shutil.rmtree(rent.pods)
    assert run(Local(rent.pods).account()) != first


def test_pods_outlive_the_process_that_made_them(rent: Rent) -> None:
    ref = make_ref()
    program = (
        "import asyncio, sys, json; from pathlib import Path; from datetime import datetime, UTC, timedelta\n"
        "from gpubroker.providers.local import Local; from gpubroker.providers.base import Spec\n"
        "async def main(pods, ref):\n"
        "    local = Local(Path(pods)); offers = await local.list_offers()\n"
        "    spec = Spec('pod_x', ('sleep', '100'), None, {}, (), 0, datetime.now(UTC) + timedelta(seconds=60))\n"
        "    await local.create(spec, offers[0], ref)\n"
        "asyncio.run(main(*sys.argv[1:]))"
    )
    subprocess.run([sys.executable, "-c", program, str(rent.pods), ref], check=True, start_new_session=True)
    instance = rent.get(ref)
    assert instance.life == "running"
    init = record.fold(control.read_record(str(rent.pods), ref)).init
    assert init is not None
    (supervisor,) = mentioning(ref) - {init[0]}
    assert os.getsid(supervisor) == supervisor
    os.kill(supervisor, signal.SIGINT)
    os.kill(supervisor, signal.SIGHUP)
    time.sleep(0.1)
    assert rent.get(ref).life == "running"


def test_the_record_says_what_ran_when(rent: Rent) -> None:
    instance = rent.create("sleep", "100")
    run(rent.local.terminate(instance.id))
    lines = (rent.pods / "gone" / instance.id / record.FILE).read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert [event for event in events if event != "starting"] == [
        "created",
        "started",
        "terminating",
        "terminated",
        "cleaned",
    ]


def test_gpus_hold_nothing_here_unless_nvml_finds_some(rent: Rent) -> None:
    offers: Sequence[ProviderOffer] = run(rent.local.list_offers())
    assert all(offer.gpu is not None for offer in offers if offer.provider_offer_id.startswith("gpu-"))


def test_an_engine_that_does_not_answer_leaves_open_whether_a_container_is_there(rent: Rent) -> None:
    instance = rent.create("true")
    dead = Engine("/bin/false", "podman", [], joins=False, env={})
    folder.note_engine(str(rent.pods), dead._asdict())
    with pytest.raises(ProviderError) as failed:
        run(rent.local.terminate(make_ref()))
    assert failed.value.code == "engine_failed"
    run(rent.local.terminate(instance.id))
    assert rent.get(instance.id).life == "gone"
