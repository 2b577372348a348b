"""The parts of the machine that need no process: records, folders, logs, limits, shares."""

# The machine itself keeps its paths as text.
# ruff: noqa: PTH102, PTH109, PTH116, PTH118, PTH208
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.ids import base36
from gpubroker.machine import capacity, cgroup, engine, folder, journal, record, rental, tree
from gpubroker.machine.capacity import Gpu, Held, Machine, Share

SPEC = folder.PodSpec(
    ref="gb-testtest-a-zz",
    pod_id="pod_x",
    all="/pods",
    hidden="/pods",
    command=["sleep", "1"],
    env={"TOKEN": "secret"},
    ports=[(80, "http")],
    vcpus_milli=250,
    ram_bytes=10**8,
    disk_gb=1,
    gpu_count=0,
    gpu_model=None,
    machine_has_gpus=True,
    price_micro_h=10_000,
    isolation="best",
    stop_grace_seconds=5,
    end_grace_seconds=2,
    log_limit_bytes=1 << 20,
)
MACHINE = Machine(2000, 2 * 10**9, None, 100, ())
NOTHING = Held(0, 0, 0, frozenset(), frozenset())


def an_event(event: str, at: float, **more: object) -> record.Event:
    given = {
        "created": {"hard_stop_at": 99.0, "ports": {}, "gpus": []},
        "starting": {"ports": {"80": 20000}, "gpus": [], "cgroups": ["/c"]},
        "started": {"init": [7, 8], "boot": "b", "limits": "limits: x"},
        "restarted": {"init": [9, 10], "boot": "b", "limits": "limits: y"},
        "extended": {"hard_stop_at": 200.0},
    }
    return {"event": event, "at": at, **given.get(event, {}), **more}


def test_a_record_is_the_state_and_the_bill() -> None:
    names = "created starting started restarted stopping stopped starting started exited terminating terminated cleaned"
    events = [an_event(name, float(at)) for at, name in enumerate(names.split())]
    lives = [record.fold(events[: count + 1]).life for count in range(len(events))]
    assert lives == [
        "starting", "starting", "running", "running", "stopping", "stopped",
        "starting", "running", "stopped", "terminating", "gone", "gone",
    ]  # fmt: skip
    assert record.billed_intervals(events) == [(2.0, 5.0), (7.0, 8.0)]
    assert record.billed_intervals(events[:4]) == [(2.0, None)]
    state = record.fold(events)
    assert (state.started_at, state.ended_at, state.cleaned, state.on) == (7.0, 8.0, True, False)


def test_the_end_says_what_the_program_said() -> None:
    exited = [an_event("created", 0), an_event("started", 1), an_event("exited", 2, exit_code=3, reason="it ended")]
    gone = [*exited, an_event("terminating", 5), an_event("terminated", 6)]
    assert (record.fold(gone).exit_code, record.fold(gone).reason, record.fold(gone).ended_at) == (3, "it ended", 2)
    again = [*exited, an_event("starting", 3), an_event("started", 4)]
    assert (record.fold(again).exit_code, record.fold(again).reason, record.fold(again).ended_at) == (None, None, None)
    never = [an_event("created", 0), an_event("terminating", 5), an_event("terminated", 6)]
    assert (record.fold(never).started_at, record.fold(never).ended_at) == (None, 6)


EVENTS = ("created", "starting", "started", "restarted", "stopping", "exited", "stopped", "lost", "terminated", "other")


@given(st.lists(st.sampled_from(EVENTS), max_size=30))
def test_intervals_never_overlap_whatever_the_record(names: list[str]) -> None:
    events = [an_event(name, float(at)) for at, name in enumerate(names)]
    intervals = record.billed_intervals(events)
    edges = [edge for interval in intervals for edge in interval if edge is not None]
    assert edges == sorted(edges)
    assert all(end is not None for _, end in intervals[:-1])
    assert record.fold(events).on == bool(intervals and intervals[-1][1] is None)


def test_a_line_that_a_crash_cut_short_never_counted(tmp_path: Path) -> None:
    place = str(tmp_path)
    record.append(place, "created", at=1.00000049, hard_stop_at=2.0, ports={}, gpus=[])
    with (tmp_path / record.FILE).open("ab") as file:
        file.write(b'{"event": "started", "at": 3')
    assert [event["event"] for event in record.read(place)] == ["created"]
    record.append(place, "terminated", at=4)
    assert [(event["event"], event["at"]) for event in record.read(place)] == [("created", 1.0), ("terminated", 4)]


def test_a_spec_shows_no_secret_and_survives_the_disk(tmp_path: Path) -> None:
    assert "secret" not in repr(SPEC)
    assert "secret" not in str(SPEC)
    folder.write_spec(str(tmp_path), SPEC)
    again = folder.read_spec(str(tmp_path))
    assert again._replace(ports=[(80, "http")]) == SPEC
    assert (tmp_path / folder.SPEC).stat().st_mode & 0o777 == 0o600


def test_references_are_file_names() -> None:
    assert folder.is_ref("gb-abcdefgh-01m82ensdfehxagdn54vptp869-tox83k")
    for wrong in ("", "gb-abc-x-1", "gb-abcdefgh-", "gb-abcdefgh-../x-1", "gb-abcdefgh-a/b-1", "gb-ABCDEFGH-a-1"):
        assert not folder.is_ref(wrong)
    assert not folder.is_ref("gb-abcdefgh-" + "a" * 50)


def test_birth_is_whole_or_never_was(tmp_path: Path) -> None:
    everything = str(tmp_path / "pods")
    first = folder.prepare(everything)
    assert folder.prepare(everything) == first
    (tmp_path / "pods" / ".new-dead").mkdir()
    (tmp_path / "pods" / ".new-dead" / "spec.json").write_text("half")
    spec = SPEC._replace(all=everything)
    with folder.locked(everything, 1):
        folder.give_birth(spec, hard_stop_at=9.0, ports={"80": 20000}, gpus=["GPU-1"])
        with pytest.raises(folder.Busy), folder.locked(everything, 0.01):
            pass
    assert sorted(os.listdir(everything)) == [SPEC.ref, "gone", "identity", "lock"]
    assert folder.live(everything) == [SPEC.ref]
    found, state = folder.state_of(everything, SPEC.ref)
    assert (found.command, state.life, state.hard_stop_at, state.gpus) == (["sleep", "1"], "starting", 9.0, ("GPU-1",))
    taken = capacity.held(everything)
    assert taken == Held(250, 10**8, 1, frozenset({"GPU-1"}), frozenset({20000}))
    assert capacity.held(everything, without=SPEC.ref) == NOTHING


def test_tombstones_are_made_and_forgotten(tmp_path: Path) -> None:
    everything = str(tmp_path / "pods")
    folder.prepare(everything)
    folder.give_birth(SPEC._replace(all=everything), hard_stop_at=9.0, ports={}, gpus=[])
    record.append(os.path.join(everything, SPEC.ref), "terminated", at=2.0)
    folder.prune(everything, now=time.time())
    assert folder.live(everything) == [SPEC.ref]
    record.append(os.path.join(everything, SPEC.ref), "cleaned", at=3.0)
    folder.prune(everything, now=time.time())
    assert folder.live(everything) == []
    assert folder.find(everything, SPEC.ref) == os.path.join(everything, "gone", SPEC.ref)
    folder.prune(everything, now=time.time() + folder.KEEP_SECONDS + 60)
    assert folder.place(everything, SPEC.ref) is None


def test_a_tree_of_any_depth_and_mode_is_deleted(tmp_path: Path) -> None:
    top = tmp_path / "disk"
    top.mkdir()
    here = os.getcwd()
    os.chdir(top)
    for _ in range(1500):  # far deeper than a path may be long
        os.mkdir("deeper")
        os.chdir("deeper")
    os.chdir(here)
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "b" / "file").write_text("x")
    (top / "link").symlink_to(tmp_path)
    (top / "a" / "b").chmod(0)
    (top / "a").chmod(0o500)
    (tmp_path / "kept").write_text("x")
    folder.delete_tree(str(top))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_a_pod_must_not_see(tmp_path: Path) -> None:
    (tmp_path / "data" / "pods").mkdir(parents=True)
    assert folder.hidden_around(str(tmp_path / "data" / "pods")) == str(tmp_path / "data")
    (tmp_path / "data").chmod(0o1777)
    assert folder.hidden_around(str(tmp_path / "data" / "pods")) == str(tmp_path / "data" / "pods")
    assert folder.hidden_around("/pods") == "/pods"


def test_the_journal_finds_output_by_time_and_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    log = journal.Journal(1 << 20)
    for moment, text in ((1000.0, b"aaaa"), (1000.1, b"bbbb"), (1005.0, b"cccc")):
        clock[0] = moment
        log.write(text)
    again = journal.Journal(1 << 20)
    clock[0] = 1010.0
    again.write(b"dddd")

    def since(moment: float) -> bytes:
        return journal.read(".", after=0, since=moment, limit=100)[1]

    assert since(0) == b"aaaabbbbccccdddd"
    assert since(1000.1) == b"aaaabbbbccccdddd"
    assert since(1001) == b"ccccdddd"
    assert since(1005.1) == b"ccccdddd"
    assert since(1006) == b"dddd"
    assert since(1011) == b""
    assert journal.read(".", after=None, since=None, limit=6) == (10, b"ccdddd"[-6:])
    assert journal.read(".", after=14, since=1001, limit=6) == (14, b"dd")


def test_the_oldest_part_of_a_log_goes_and_offsets_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = journal.Journal(1 << 16)
    for number in range(40):
        log.write(bytes([65 + number % 26]) * 4096)
    assert os.stat(journal.LOG).st_size == 40 * 4096
    if os.stat(journal.LOG).st_blocks * 512 == 40 * 4096:
        pytest.skip("this file system punches no holes")
    assert os.stat(journal.LOG).st_blocks * 512 <= (1 << 16) + 4096
    starts_at, data = journal.read(".", after=0, since=None, limit=10)
    assert starts_at >= 40 * 4096 - (1 << 16)
    assert data == bytes([65 + starts_at // 4096 % 26]) * 10
    assert journal.read(".", after=39 * 4096, since=None, limit=2) == (39 * 4096, b"NN")
    log.keep(5000)
    assert journal.read(".", after=0, since=None, limit=1)[0] == 38 * 4096
    assert journal.Journal(1 << 16)


def test_a_supervisor_loads_little() -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); import gpubroker.machine.supervisor; print(*sys.modules)"
    lib = str(Path(folder.__file__).parents[2])
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program, lib], capture_output=True, text=True, check=True)
    heavy = {
        "asyncio",
        "dataclasses",
        "inspect",
        "pathlib",
        "subprocess",
        "threading",
        "shutil",
        "random",
        "pydantic",
        "pynvml",
        "gpubroker.machine.container",
        "gpubroker.machine.engine",
    }
    assert heavy & set(done.stdout.split()) == set()
    assert len(done.stdout.split()) < 120


def test_no_log_is_an_empty_log(tmp_path: Path) -> None:
    assert journal.read(str(tmp_path), after=None, since=None, limit=10) == (0, b"")


def test_shares_never_add_up_to_more_than_there_is() -> None:
    machine = Machine(2000, 3 * 10**9 + 7, None, 101, ())
    for size in capacity.doubled(250, machine.vcpus_milli):
        share = capacity.share_of(machine, size)
        assert share.ram_bytes * (2000 // size) <= machine.ram_bytes
        assert share.disk_gb * (2000 // size) <= machine.disk_gb
        assert capacity.times_it_fits(share, machine, NOTHING) == 2000 // size
    assert capacity.doubled(300, 2000) == [300, 600, 1200]
    assert capacity.doubled(300, 200) == []


def test_what_fits_is_the_scarcest_of_all() -> None:
    share = Share(500, 10**9, 10)
    assert capacity.times_it_fits(share, MACHINE, NOTHING) == 2
    assert capacity.times_it_fits(share, MACHINE._replace(unused_ram_bytes=10**9), NOTHING) == 1
    assert capacity.times_it_fits(share, MACHINE._replace(disk_gb=9), NOTHING) == 0
    assert capacity.times_it_fits(share, MACHINE, NOTHING._replace(vcpus_milli=1501)) == 0
    assert capacity.times_it_fits(share, MACHINE, NOTHING._replace(vcpus_milli=9999)) == 0


def test_gpus_are_given_to_one_at_a_time() -> None:
    gpus = tuple(Gpu(f"GPU-{number}", "NVIDIA H200", 141, busy=number == 3) for number in (1, 2, 3))
    machine = MACHINE._replace(gpus=gpus)
    share = Share(500, 10**8, 0, gpu_count=1, gpu_model="NVIDIA H200")
    assert capacity.free_gpus(share, machine, NOTHING) == ["GPU-1", "GPU-2"]
    taken = NOTHING._replace(gpus=frozenset({"GPU-1"}))
    assert capacity.free_gpus(share, machine, taken) == ["GPU-2"]
    assert capacity.times_it_fits(share._replace(gpu_count=2), machine, taken) == 0
    assert capacity.free_gpus(share._replace(gpu_model="NVIDIA T4"), machine, NOTHING) == []
    assert Machine.from_json(json.loads(json.dumps(machine._asdict()))) == machine
    sizes = {size.id: size for size in rental.sizes(rental.Terms(gpu_micro_h=2_000_000), machine)}
    assert list(sizes) == ["cpu-0.25", "cpu-0.5", "cpu-1", "cpu-2", "gpu-nvidia-h200-1", "gpu-nvidia-h200-2"]
    assert sizes["gpu-nvidia-h200-2"].price_micro_h == 2 * 2_000_000 + 5 * 10_000
    assert sizes["gpu-nvidia-h200-1"].share.vcpus_milli == 500
    assert tree.environment(SPEC, {}, ["GPU-1", "GPU-2"])["CUDA_VISIBLE_DEVICES"] == "GPU-1,GPU-2"
    assert tree.environment(SPEC, {}, [])["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in tree.environment(SPEC._replace(machine_has_gpus=False), {}, [])


def test_what_this_machine_has() -> None:
    assert 0 < capacity.found_vcpus_milli() <= 1000 * (os.cpu_count() or 1)
    assert 0 < capacity.found_ram_bytes() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert capacity.unused_ram_bytes() > 0


@pytest.fixture
def version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of folders that has the files of control groups version 2, and this process in `/user/app`."""
    for group in (tmp_path, tmp_path / "user", tmp_path / "user" / "app"):
        group.mkdir(exist_ok=True)
        for name, text in (
            ("cgroup.procs", ""),
            ("cgroup.controllers", "cpu memory pids"),
            ("cgroup.subtree_control", ""),
        ):
            (group / name).write_text(text)
    own = cgroup._Hierarchy(2, frozenset(), str(tmp_path), str(tmp_path / "user" / "app"))
    monkeypatch.setattr(cgroup, "_hierarchies", lambda: iter([own]))
    return tmp_path


def test_limits_of_version_2_are_made_where_controllers_are_handed_down(version_2: Path) -> None:
    (version_2 / "user" / "cgroup.subtree_control").write_text("cpu memory")
    (version_2 / "user" / "app" / "cgroup.controllers").write_text("")
    places = cgroup.homes()
    assert [(place.controller, place.version, place.folder) for place in places] == [
        ("memory", 2, str(version_2 / "user")),
        ("cpu", 2, str(version_2 / "user")),
    ]
    (made,) = cgroup.paths("gb-x", places)
    assert made == str(version_2 / "user" / "gpubroker-gb-x")
    os.mkdir(made)
    for name in ("memory.max", "memory.swap.max", "cpu.max"):
        Path(made, name).touch()
    assert cgroup.create("gb-x", places, ram_bytes=5000, vcpus_milli=250) == {"memory", "cpu"}
    assert [Path(made, name).read_text() for name in ("memory.max", "memory.swap.max", "cpu.max")] == [
        "5000",
        "0",
        "25000 100000",
    ]
    Path(made, "memory.events").write_text("low 0\nhigh 0\noom_kill 2\n")
    assert cgroup.kills((made,)) == 2
    Path(made, "cgroup.procs").write_text("12\n34\n")
    assert cgroup.members((made, "/no/such")) == {12, 34}


def test_controllers_are_switched_on_where_that_is_possible(version_2: Path) -> None:
    assert {place.folder for place in cgroup.homes()} == {str(version_2 / "user" / "app")}
    assert "+cpu" in (version_2 / "user" / "app" / "cgroup.subtree_control").read_text()


def test_our_own_limits_are_the_least_on_the_way_up(version_2: Path) -> None:
    assert (cgroup.memory_limit(), cgroup.cpu_limit_milli()) == (None, None)
    (version_2 / "user" / "memory.max").write_text("4000000000\n")
    (version_2 / "user" / "app" / "memory.max").write_text("max\n")
    (version_2 / "user" / "cpu.max").write_text("150000 100000\n")
    (version_2 / "user" / "app" / "cpu.max").write_text("max 100000\n")
    assert (cgroup.memory_limit(), cgroup.cpu_limit_milli()) == (4_000_000_000, 1500)
    assert capacity.found_vcpus_milli() == min(1500, 1000 * len(os.sched_getaffinity(0)))


def test_groups_that_nobody_keeps_any_more_are_swept(version_2: Path) -> None:
    (version_2 / "user" / "cgroup.subtree_control").write_text("cpu memory")
    (version_2 / "user" / "app" / "cgroup.controllers").write_text("")
    now = 1_800_000_000
    names = [f"gpubroker-gb-testtest-a-{base36(at)}" for at in (now - 100, now + 100)] + ["gpubroker-gb-", "session-1"]
    for name in names:
        (version_2 / "user" / name).mkdir()
    cgroup.sweep(cgroup.homes(), before=now)
    assert [name for name in names if (version_2 / "user" / name).exists()] == names[1:]


def test_nothing_writable_is_no_group(version_2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cgroup.homes() == []
    assert cgroup.paths("gb-x", []) == []
    assert cgroup.create("gb-x", [], ram_bytes=1, vcpus_milli=1) == set()


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("podman", ["--device nvidia.com/gpu=GPU-1 --device nvidia.com/gpu=GPU-2", "NVIDIA_VISIBLE_DEVICES=void"]),
        ("docker", ['--gpus "device=GPU-1,GPU-2"', "--init"]),
    ],
)
def test_an_engine_is_asked_for_the_pods_share_and_nothing_else(kind: str, asked: list[str], tmp_path: Path) -> None:
    folder.prepare(str(tmp_path))
    used = engine.Engine(f"/usr/bin/{kind}", kind, ["memory"], joins=True, env={})._asdict()
    spec = SPEC._replace(all=str(tmp_path),
        image="docker.io/library/x:1", engine=used, gpu_count=2, machine_has_gpus=True, command=["run", "--it"],
        env={"PLAIN": "secret-1", "LINES": "secret-2\n", "PATH": "secret-3"}, ports=[(80, "http"), (53, "udp")],
    )  # fmt: skip
    words = engine.described(spec, {"80": 20_080, "53": 20_053}, ["GPU-1", "GPU-2"])
    line = " ".join(words)
    assert all(text in line for text in asked), line
    assert "--cap-drop ALL --security-opt no-new-privileges" in line
    assert f"--memory {spec.ram_bytes}b" in line
    assert "--cpus" not in words, "it cannot limit them"
    assert "--publish 127.0.0.1:20080:80/tcp --publish 127.0.0.1:20053:53/udp" in line
    assert line.endswith("-- docker.io/library/x:1 --it")
    assert "--env LINES" in line
    assert "secret" not in line
    assert "privileged" not in line.replace("no-new-privileges", "")
    none = engine.described(spec._replace(gpu_count=0), {"80": 1, "53": 2}, [])
    assert "NVIDIA_VISIBLE_DEVICES=void" in none, "an image may ask for all"
    assert not {"--gpus", "--device"} & set(none)


@pytest.mark.parametrize(
    ("image", "full"),
    [
        ("nginx", "docker.io/library/nginx"),
        ("nginx:1.27-alpine", "docker.io/library/nginx:1.27-alpine"),
        ("my_team/app@sha256:" + "0" * 64, "docker.io/my_team/app@sha256:" + "0" * 64),
        ("registry.example/a/b:1", "registry.example/a/b:1"),
        ("registry:5000/a", "registry:5000/a"),
        ("localhost/a", "localhost/a"),
        ("dir:/etc", None),
        ("-v/:/host", None),
        ("a/../b", None),
        ("a b", None),
        ("", None),
    ],
)
def test_an_image_has_one_full_name(image: str, full: str | None) -> None:
    assert engine.full_name(image) == full


def test_a_line_break_in_what_an_engine_itself_reads_cannot_be_handed_over() -> None:
    assert engine.can_hold({"KEY": "a\nb", "LD_PRELOAD": "/x.so", "docker_host": "x"})
    assert not any(engine.can_hold({name: "a\nb"}) for name in ("LD_PRELOAD", "docker_host", "PATH", "https_proxy"))
