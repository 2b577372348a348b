"""Whatever is killed, and whenever: no process of a pod is lost, and its record tells the truth."""

# The machine itself keeps its paths as text.
# ruff: noqa: PTH106, PTH110, PTH112, PTH118, PTH208
# Every function that is made in a loop is called before the loop goes on.
# ruff: noqa: B023
import asyncio
import contextlib
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gpubroker.errors import Rejected
from gpubroker.ids import base36
from gpubroker.machine import control, folder, processes, record, rental
from gpubroker.machine.supervisor import HEARTBEAT_SECONDS, KILLED_UNSEEN, MACHINE_RESTARTED
from gpubroker.providers.base import ProviderOffer, Spec
from gpubroker.providers.local import Local

LIB = str(Path(folder.__file__).parents[2])
TERMS = rental.Terms(vcpus_milli=2000, ram_bytes=2 * 10**9, stop_grace_seconds=0.5, end_grace_seconds=0.3)
OFFER = ProviderOffer("cpu-0.25", None, 0, 0.25, 0.25, 1, "local", 10_000, frozenset(), "high")
SECRET = "a-secret-of-the-pod"

DIES_AT_A_STEP = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from gpubroker.machine import supervisor
me, left = os.getpid(), int(sys.argv[3])
armed = sys.argv[4] == "now"

def watch(event, arguments):
    global left
    if armed and os.getpid() == me:
        left -= 1
        if left == 0:
            os.kill(me, signal.SIGKILL)

def arm(*_):
    global armed
    armed = True

signal.signal(signal.SIGUSR1, arm)
sys.addaudithook(watch)
supervisor.main(sys.argv[2])
"""
"""A supervisor that kills itself at its Nth step: opening, renaming, forking, connecting and so on are steps."""

CREATORS_DIE_AT_A_STEP = """
import asyncio, os, signal, sys
sys.path.insert(0, sys.argv[1])
from datetime import datetime, UTC, timedelta
from pathlib import Path
from gpubroker.machine import rental
from gpubroker.providers.base import ProviderOffer, Spec
from gpubroker.providers.local import Local

terms = rental.Terms(vcpus_milli=2000, ram_bytes=2 * 10**9, end_grace_seconds=0.3)
offer = ProviderOffer("cpu-0.25", None, 0, 0.25, 0.25, 1, "local", 10_000, frozenset(), "high")

def create(ref, step, marker):
    left = step
    async def body():
        spec = Spec("pod_test", ("sleep", marker), None, {}, (), 0, datetime.now(UTC) + timedelta(seconds=60))
        local = Local(Path(sys.argv[2]), terms)
        await local.account()
        def watch(event, arguments):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        await local.create(spec, offer, ref)
    asyncio.run(body())

for line in sys.stdin:
    ref, step, marker = line.split()
    child = os.fork()
    if child == 0:
        create(ref, int(step), marker)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""One process that forks a creator per line; each dies at its Nth step."""


class Pods:
    """Pods in a folder of the test's own, asked as the adapter asks them."""

    def __init__(self, data: Path, terms: rental.Terms = TERMS) -> None:
        self.all, self.terms = str(data / "pods"), terms
        data.mkdir(exist_ok=True)
        folder.prepare(self.all)

    def bear(self, *command: str, seconds: float = 60) -> str:
        """Make a pod's folder, as a creator that dies right after it."""
        ref = f"gb-testtest-{secrets.token_hex(8)}-{base36(int(time.time() + seconds) + 1)}"
        stop = datetime.now(UTC) + timedelta(seconds=seconds)
        spec = Spec("pod_test", command, None, {"TOKEN": SECRET}, (), 0, stop)
        rental.rent_out(self.terms, self.all, spec, OFFER, ref)
        return ref

    def create(self, *command: str, seconds: float = 60) -> str:
        """Start a pod."""
        ref = self.bear(*command, seconds=seconds)
        assert self.ask(ref, "settle").life == "running"
        return ref

    def ask(self, ref: str, do: str, limit_seconds: float = 15) -> record.State:
        """Put a request to the pod's supervisor."""
        answer = asyncio.run(control.ask(self.all, ref, limit_seconds=limit_seconds, do=do))
        return record.State(**answer["state"])

    def record(self, ref: str) -> list[record.Event]:
        return control.read_record(self.all, ref)

    def init(self, ref: str) -> int:
        """The pod's first process."""
        init = record.fold(self.record(ref)).init
        assert init is not None
        return init[0]

    def supervisor(self, ref: str) -> int:
        """The process that keeps the pod."""
        (pid,) = mentioning(os.path.join(self.all, ref)) - {self.init(ref)}
        return pid

    def kill_supervisor(self, ref: str) -> float:
        """Kill it as nothing can be caught; give the time."""
        os.kill(self.supervisor(ref), signal.SIGKILL)
        return time.time()

    def end_everything(self) -> None:
        """Whatever became of the test: no process and no control group of its pods stays."""
        if not os.path.isdir(self.all):
            return
        refs = [
            name
            for place in (self.all, os.path.join(self.all, "gone"))
            for name in os.listdir(place)
            if folder.is_ref(name)
        ]
        until = time.monotonic() + 5
        while left := mentioning(self.all) | {pid for ref in refs for pid in processes.marked(ref)}:
            processes.kill(left)
            assert time.monotonic() < until, left
            time.sleep(0.005)
        for group in {group for ref in refs for group in record.fold(self.record(ref)).cgroups}:
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


def new_marker() -> str:
    """A number of seconds to sleep that nobody else sleeps: processes are found by it, whatever they call themselves."""
    return f"7{secrets.randbelow(10**12):012d}"


def eventually(true: Callable[[], bool], seconds: float = 5) -> None:
    """Wait until something is so."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, true
        time.sleep(0.005)


def check_record(events: list[record.Event], *, is_on: bool) -> None:
    """What every record must be, however it came about."""
    times = [event["at"] for event in events]
    assert times == sorted(times)
    intervals = record.billed_intervals(events)
    starts = sum(event["event"] == "started" for event in events)
    assert len(intervals) == starts
    assert [end is None for _, end in intervals] == [False] * (starts - is_on) + [True] * is_on


@pytest.fixture(params=["best", "user", "none"])
def any_pods(request: pytest.FixtureRequest, tmp_path: Path):
    """Pods with namespaces, with those of an ordinary user, and with none."""
    terms = rental.Terms(
        vcpus_milli=2000, ram_bytes=2 * 10**9, stop_grace_seconds=0.5, end_grace_seconds=0.3, isolation=request.param
    )
    made = Pods(tmp_path / "data", terms)
    yield made
    made.end_everything()


@pytest.fixture
def pods(tmp_path: Path):
    made = Pods(tmp_path / "data")
    yield made
    made.end_everything()


ESCAPE = """
setsid sleep {0} &
(setsid sh -c 'setsid sleep {0} & exec sleep {0}' &)
nohup sleep {0} >/dev/null 2>&1 &
env -i /bin/sh -c 'setsid sleep {0} &' &
(cd / && setsid env -i sh -c '(sleep {0} &) ; (exec sleep {0} >/dev/null 2>&1 </dev/null &)' ) &
"""


@pytest.mark.parametrize("end", ["stop", "terminate", "exit", "kill", "kill first"])
def test_nothing_escapes_its_pod(any_pods: Pods, end: str) -> None:
    marker, pods = new_marker(), any_pods
    last = "read x < gate" if end == "exit" else "sleep 100"
    ref = pods.bear("sh", "-c", f"mkfifo gate; {ESCAPE.format(marker)} {last}")
    assert pods.ask(ref, "settle").life == "running"
    eventually(lambda: len(mentioning(f"sleep\0{marker}")) == 7)
    match end:
        case "exit":
            Path(pods.all, ref, "disk", "gate").write_text("go\n")
            eventually(lambda: pods.ask(ref, "state").life == "stopped")
        case "kill":
            pods.kill_supervisor(ref)
            eventually(lambda: not mentioning(marker), seconds=2)  # at once, before anybody looks
            assert pods.ask(ref, "state").reason == KILLED_UNSEEN
        case "kill first":
            os.kill(pods.init(ref), signal.SIGKILL)
            eventually(lambda: pods.ask(ref, "state").life == "stopped")
        case _:
            pods.ask(ref, end)
    assert not mentioning(marker)
    check_record(pods.record(ref), is_on=False)


def test_both_killed_at_once_leaves_no_process_after_the_next_look(any_pods: Pods) -> None:
    marker = new_marker()
    ref = any_pods.create("sh", "-c", f"setsid sleep {marker} & sleep {marker}")
    eventually(lambda: len(mentioning(f"sleep\0{marker}")) == 2)
    first, supervisor = any_pods.init(ref), any_pods.supervisor(ref)
    for pid in (supervisor, first):
        os.kill(pid, signal.SIGSTOP)
    for pid in (first, supervisor):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert any_pods.ask(ref, "state").life == "stopped"
    assert not mentioning(marker)


def test_the_limits_that_hold_are_said(any_pods: Pods) -> None:
    ref = any_pods.create("sleep", "100")
    limits = any_pods.ask(ref, "state").limits
    assert limits is not None
    assert limits.startswith("limits: memory by ")
    if any_pods.terms.isolation == "none":
        assert "by rlimit" in limits
        assert "processes by mark" in limits
        assert "not hidden" in limits
        held = Path(f"/proc/{min(processes.marked(ref))}/limits").read_text().splitlines()
        assert [line.split()[3:5] for line in held if line.startswith("Max data size")] == [["250000000", "250000000"]]
        assert len(os.sched_getaffinity(min(processes.marked(ref)))) == 1


def test_a_dead_supervisor_is_replaced_and_the_record_closed_at_its_last_sign(pods: Pods) -> None:
    marker = new_marker()
    ref = pods.create("sleep", marker)
    time.sleep(HEARTBEAT_SECONDS)
    killed_at = pods.kill_supervisor(ref)
    time.sleep(HEARTBEAT_SECONDS)
    state = pods.ask(ref, "state")
    assert (state.life, state.exit_code, state.reason) == ("stopped", None, KILLED_UNSEEN)
    assert state.ended_at is not None
    assert killed_at - 2 * HEARTBEAT_SECONDS < state.ended_at <= killed_at
    assert pods.record(ref)[-1]["event"] == "lost"
    check_record(pods.record(ref), is_on=False)
    assert not mentioning(marker)


def test_a_restart_of_the_machine_is_one_more_way_to_die(pods: Pods) -> None:
    ref = pods.create("sleep", "100")
    pods.kill_supervisor(ref)
    path = Path(pods.all, ref, record.FILE)
    path.write_text(path.read_text().replace(processes.boot_id(), "another-boot"))
    state = pods.ask(ref, "state")
    assert (state.life, state.reason) == ("stopped", MACHINE_RESTARTED)


def test_a_hard_stop_needs_nobody(pods: Pods, tmp_path: Path) -> None:
    marker, ref = new_marker(), f"gb-testtest-{secrets.token_hex(8)}-{base36(int(time.time()) + 60)}"
    program = (
        "import asyncio, os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from gpubroker.machine import control, folder, rental\n"
        "from gpubroker.providers.base import ProviderOffer, Spec\n"
        "from datetime import datetime, UTC, timedelta\n"
        "_, lib, pods, ref, marker = sys.argv\n"
        "offer = ProviderOffer('cpu-0.25', None, 0, 0.25, 0.25, 1, 'local', 10_000, frozenset(), 'high')\n"
        "spec = Spec('pod_x', ('sleep', marker), None, {}, (), 0, datetime.now(UTC) + timedelta(seconds=1.2))\n"
        "rental.rent_out(rental.Terms(vcpus_milli=2000, ram_bytes=2 * 10**9), pods, spec, offer, ref)\n"
        "asyncio.run(control.ask(pods, ref, limit_seconds=15, do='settle'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    died = subprocess.run([sys.executable, "-c", program, LIB, pods.all, ref, marker], check=False)
    assert died.returncode == -signal.SIGKILL
    assert len(mentioning(f"sleep\0{marker}")) == 1
    eventually(lambda: record.fold(pods.record(ref)).cleaned)
    assert not mentioning(marker)
    state = record.fold(pods.record(ref))
    assert state.ended_at is not None
    assert 0 <= state.ended_at - state.hard_stop_at < 1
    assert state.reason == "its hard stop was due"
    check_record(pods.record(ref), is_on=False)


def test_a_hard_stop_that_passed_unkept_is_kept_at_the_next_look(pods: Pods) -> None:
    ref = pods.create("sleep", "100", seconds=1)
    killed_at = pods.kill_supervisor(ref)
    unborn = pods.bear("sleep", "100", seconds=0.9)
    time.sleep(1.1)
    for name in (ref, unborn):
        pods.ask(name, "state")
        eventually(lambda name=name: record.fold(pods.record(name)).cleaned)
    state = record.fold(pods.record(ref))
    assert state.ended_at is not None
    assert state.ended_at <= killed_at
    assert record.billed_intervals(pods.record(unborn)) == []


def test_a_supervisor_told_to_end_stops_its_pod_in_order(pods: Pods) -> None:
    ref = pods.create("sh", "-c", "trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.1; done")
    eventually(lambda: b"ready" in Path(folder.find(pods.all, ref), "log").read_bytes())
    supervisor = pods.supervisor(ref)
    os.kill(supervisor, signal.SIGTERM)
    eventually(lambda: processes.start_time(supervisor) is None)
    assert record.fold(pods.record(ref)).life == "stopped"
    assert b"bye" in Path(folder.find(pods.all, ref), "log").read_bytes()
    assert pods.ask(ref, "state").life == "stopped"


def test_a_deleted_folder_takes_its_processes_along(pods: Pods) -> None:
    marker = new_marker()
    ref = pods.create("sleep", marker)
    groups = record.fold(pods.record(ref)).cgroups
    folder.delete_tree(os.path.join(pods.all, ref))
    eventually(lambda: not mentioning(marker) and not mentioning(ref))
    assert not any(os.path.exists(group) for group in groups)


def test_only_one_supervisor_keeps_a_pod(pods: Pods) -> None:
    marker = new_marker()
    ref = pods.bear("sleep", marker)
    for _ in range(6):
        control.spawn(os.path.join(pods.all, ref))
    assert pods.ask(ref, "settle").life == "running"
    eventually(lambda: len(mentioning(os.path.join(pods.all, ref)) - {pods.init(ref)}) == 1)
    assert len(mentioning(f"sleep\0{marker}")) == 1


def test_a_request_that_it_does_not_know_harms_no_pod(pods: Pods) -> None:
    ref = pods.create("sleep", "100")
    for request in (
        {"do": "fly"},
        {"do": "exec", "command": ["true"]},
        {"do": "extend", "hard_stop_at": "later"},
        {"do": "start"},
    ):
        with contextlib.suppress(control.Refused):
            asyncio.run(control.ask(pods.all, ref, limit_seconds=5, **request))
    before = pods.record(ref)
    for data in (b"not json\n", b"{}\n", b"", b"[1]\n"):
        with socket.socket(socket.AF_UNIX) as client:
            place = os.open(os.path.join(pods.all, ref), os.O_PATH)
            client.connect(f"/proc/self/fd/{place}/control.sock")
            os.close(place)
            client.sendall(data)
    assert pods.ask(ref, "state").life == "running"
    assert pods.record(ref) == before


def dies_at(pods: Pods, ref: str, step: int, when: str) -> subprocess.Popen[bytes]:
    """Start a supervisor that dies at a step, counted from now or from SIGUSR1 on."""
    place = os.path.join(pods.all, ref)
    command = [sys.executable, "-I", "-S", "-c", DIES_AT_A_STEP, LIB, place, str(step), when]
    return subprocess.Popen(command, env={}, start_new_session=True, stderr=subprocess.DEVNULL)


def waited(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process ends in this time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_killed_at_any_step_of_a_start(pods: Pods) -> None:
    chance, step, outcomes = random.Random(11), 0, set[str]()
    while True:
        step += chance.randint(1, 4 + step // 6)
        marker = new_marker()
        ref = pods.bear("sleep", marker)
        supervisor = dies_at(pods, ref, step, "now")
        eventually(lambda: supervisor.poll() is not None or record.fold(pods.record(ref)).life == "running")
        if not waited(supervisor, 0.05):
            supervisor.kill()
            supervisor.wait()
            break
        had_started = record.fold(pods.record(ref)).on
        state = pods.ask(ref, "settle")
        outcomes.add(state.life)
        assert state.life == ("stopped" if had_started else "running")
        eventually(lambda: len(mentioning(f"sleep\0{marker}")) == (not had_started), seconds=1)
        check_record(pods.record(ref), is_on=not had_started)
        assert pods.ask(ref, "terminate").life == "gone"
        assert not mentioning(marker)
    assert step > 40
    assert "running" in outcomes


@pytest.mark.parametrize("do", ["stop", "terminate", "restart"])
def test_killed_at_any_step_of_an_end(pods: Pods, do: str) -> None:
    chance, step = random.Random(12), 0
    while True:
        step += chance.randint(1, 3 + step // 4)
        marker = new_marker()
        ref = pods.bear("sleep", marker)
        supervisor = dies_at(pods, ref, step, "later")
        eventually(lambda: record.fold(pods.record(ref)).life == "running" and len(mentioning(f"sleep\0{marker}")) == 1)
        supervisor.send_signal(signal.SIGUSR1)
        try:
            life = pods.ask(ref, do).life
        except control.Refused:  # a restart of what its supervisor's death has stopped
            life = pods.ask(ref, "state").life
        survived = (
            not waited(supervisor, 0.05) if do != "terminate" else waited(supervisor, 1) and supervisor.returncode == 0
        )
        is_on = do == "restart" and life == "running"
        if do == "terminate":
            eventually(lambda: record.fold(pods.record(ref)).cleaned)
            tomb = Path(folder.find(pods.all, ref))
            assert not (tomb / "disk").exists()
            assert not any(SECRET in path.read_text(errors="replace") for path in tomb.iterdir())
        eventually(lambda: len(mentioning(f"sleep\0{marker}")) == is_on, seconds=1)
        if survived:
            supervisor.kill()
            supervisor.wait()
            break
        assert life == ("gone" if do == "terminate" else "stopped")
        check_record(pods.record(ref), is_on=is_on)
        assert not any(os.path.exists(group) for group in record.fold(pods.record(ref)).cgroups)
        pods.ask(ref, "terminate")
    assert step > 4


def test_killed_at_random_moments(any_pods: Pods) -> None:
    chance, pods = random.Random(13), any_pods
    marker = new_marker()
    ref = pods.create("sh", "-c", f"setsid sleep {marker} & sleep {marker}")
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        machine = rental.look(pods.terms, pods.all)._asdict()
        with contextlib.suppress(control.Refused):
            asyncio.run(control.ask(pods.all, ref, limit_seconds=15, do="start", machine=machine))
        time.sleep(chance.random() * 0.15)
        killed = next(iter(mentioning(os.path.join(pods.all, ref)) - {pods.init(ref)}), None)
        if killed is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(killed, signal.SIGKILL)
        state = pods.ask(ref, "settle")
        check_record(pods.record(ref), is_on=state.on)
        if not state.on:
            assert not mentioning(marker)
    pods.ask(ref, "terminate")
    assert not mentioning(marker)
    edges = [edge for interval in record.billed_intervals(pods.record(ref)) for edge in interval if edge is not None]
    assert edges == sorted(edges)


def test_creators_killed_at_any_step(pods: Pods) -> None:
    chance, step = random.Random(14), 0
    command = [sys.executable, "-c", CREATORS_DIE_AT_A_STEP, LIB, pods.all]
    refs: list[tuple[str, str, bool]] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as creators:
        assert creators.stdin is not None
        assert creators.stdout is not None
        while True:
            step += chance.randint(1, 4 + step // 6)
            ref, marker = f"gb-testtest-{secrets.token_hex(8)}-{base36(int(time.time()) + 60)}", new_marker()
            creators.stdin.write(f"{ref} {step} {marker}\n")
            creators.stdin.flush()
            lived = creators.stdout.readline().strip() == "0"
            local = Local(Path(pods.all), TERMS)
            found = asyncio.run(local.find_by_ref(ref))
            refs.append((ref, marker, bool(found)))
            if found:
                assert pods.ask(ref, "settle").life == "running"
                assert len(mentioning(f"sleep\0{marker}")) == 1
                check_record(pods.record(ref), is_on=True)
                asyncio.run(local.terminate(ref))
            assert not mentioning(marker)
            if lived:
                assert found
                break
        creators.stdin.close()
    assert len({born for _, _, born in refs}) == 2
    pods.bear("true")
    assert [name for name in os.listdir(pods.all) if name.startswith(".new")] == []
    taken = os.listdir(os.path.join(pods.all, "gone"))
    assert {ref for ref, _, born in refs if born} <= set(taken)


def test_several_brokers_never_grant_more_than_there_is(pods: Pods) -> None:
    program = (
        "import asyncio, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from datetime import datetime, UTC, timedelta\n"
        "from gpubroker.errors import Rejected\n"
        "from gpubroker.machine import rental; from gpubroker.providers.local import Local\n"
        "from gpubroker.providers.base import Spec, ProviderOffer\n"
        "async def main(lib, pods, *refs):\n"
        "    local = Local(Path(pods), rental.Terms(vcpus_milli=1000, ram_bytes=10**9))\n"
        "    offer = ProviderOffer('cpu-0.25', None, 0, 0.25, 0.25, 1, 'local', 10_000, frozenset(), 'high')\n"
        "    spec = Spec('pod_x', ('sleep', '100'), None, {}, (), 0, datetime.now(UTC) + timedelta(seconds=60))\n"
        "    made = await asyncio.gather(*(local.create(spec, offer, ref) for ref in refs), return_exceptions=True)\n"
        "    print(sum(not isinstance(outcome, BaseException) for outcome in made))\n"
        "    assert all(isinstance(o, Rejected) for o in made if isinstance(o, BaseException)), made\n"
        "asyncio.run(main(*sys.argv[1:]))"
    )
    stop = base36(int(time.time()) + 60)
    brokers = [
        subprocess.Popen(
            [sys.executable, "-c", program, LIB, pods.all, *(f"gb-testtest-{n}{i:03d}-{stop}" for i in range(5))],
            stdout=subprocess.PIPE,
        )
        for n in range(3)
    ]
    made = sum(int(broker.communicate()[0]) for broker in brokers)
    assert [broker.returncode for broker in brokers] == [0, 0, 0]
    assert made == 4
    assert len(folder.live(pods.all)) == 4


def test_a_dead_pod_gives_its_share_back_when_another_wants_it(pods: Pods) -> None:
    local = Local(Path(pods.all), rental.Terms(vcpus_milli=250, ram_bytes=250_000_000))
    ref = pods.bear("sleep", "100")
    pods.ask(ref, "settle")
    pods.kill_supervisor(ref)
    stop = datetime.now(UTC) + timedelta(seconds=60)
    spec = Spec("pod_test", ("sleep", "100"), None, {}, (), 0, stop)
    newcomer = f"gb-testtest-{secrets.token_hex(8)}-{base36(int(time.time()) + 60)}"
    asyncio.run(local.create(spec, OFFER, newcomer))
    with pytest.raises(Rejected, match="no_capacity"):
        asyncio.run(local.start(ref))
