"""Pods of this machine that have an image, on the engine that GPUBROKER_TEST_ENGINE names; without it skipped: it takes a minute.

No registry is asked: the image is made of busybox, under a name that is this machine's own.
"""

# The machine itself keeps its paths as text.
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tarfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.providers.test_local import OWNER, TERMS, Rent, make_ref, make_spec, mentioning, run

from gpubroker.errors import InstanceNotFound, Rejected
from gpubroker.machine import engine, folder, processes, rental
from gpubroker.providers.base import Instance, Port

IMAGE = "localhost/gpubroker-test:1"
BUSYBOX = shutil.which("busybox")
ENV = {name: os.environ[name] for name in engine.VARIABLES if name in os.environ}
CHOSEN = os.environ.get("GPUBROKER_TEST_ENGINE", "none")
ENGINE = engine.find(CHOSEN, ENV, seconds=30)
WITH_ENGINE = replace(TERMS, engine=CHOSEN, engine_env=ENV)
needs_joining = pytest.mark.skipif(
    ENGINE is None or not ENGINE.joins, reason="the engine's containers join no namespace"
)


def ask(*arguments: str) -> str:
    """Ask the engine, beside the provider."""
    assert ENGINE is not None
    return engine.ask(ENGINE, *arguments, seconds=20)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image of busybox: its own command says so, its entry point is a shell's."""
    if ENGINE is None:
        pytest.skip("GPUBROKER_TEST_ENGINE names no Podman or Docker that answers on this machine")
    if BUSYBOX is None:
        pytest.skip("no busybox on this machine to make an image of (busybox-static)")
    place = tmp_path_factory.mktemp("image")
    with tarfile.open(place / "root.tar", "w") as tar:
        tar.add(BUSYBOX, "bin/busybox")
        for name in subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split():
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            if name != "busybox":
                tar.addfile(link)
        for name in ("tmp", "proc", "sys", "dev", "etc"):
            made = tarfile.TarInfo(name)
            made.type, made.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tar.addfile(made)
    own = ["--change", 'ENTRYPOINT ["sh", "-c"]', "--change", 'CMD ["echo the image itself; exec sleep 100"]']
    ask("import", *own, "--change", "ENV OF_IMAGE=kept", str(place / "root.tar"), IMAGE)
    return IMAGE


class Images(Rent):
    """An adapter that may use the engine."""

    def __init__(self, data: Path, terms: rental.Terms = WITH_ENGINE) -> None:
        super().__init__(data, terms)

    def up(self, *command: str, **spec: Any) -> Instance:
        """Start a pod of the image and wait until it runs."""
        instance = self.create(*command, **({"image": IMAGE} | spec))
        return self.await_life(instance.id, "running", "stopped", "failed", seconds=20)

    def container(self, ref: str) -> dict[str, Any]:
        """What the engine says of the pod's container."""
        return json.loads(ask("inspect", ref))[0]

    def await_end(self, ref: str, seconds: float = 20) -> None:
        """Look, beside the provider, until no process of the pod is left."""
        until = time.monotonic() + seconds
        while left := processes.marked(ref):
            assert time.monotonic() < until, left
            time.sleep(0.05)

    def end_everything(self) -> None:
        """No container of these pods stays."""
        super().end_everything()
        with contextlib.suppress(FileNotFoundError, engine.Failed):
            label = f"label={engine.MADE_BY}={folder.identity(str(self.pods))}"
            for name in ask("ps", "--all", "--filter", label, "--format", "{{.Names}}").split():
                ask("rm", "--force", name)


@pytest.fixture
def rent(tmp_path: Path, image: str) -> Iterator[Images]:
    """An adapter whose pods end with the test."""
    made = Images(tmp_path / "data")
    yield made
    made.end_everything()


def keepers(rent: Rent, ref: str) -> tuple[int, int]:
    """The supervisor of a pod and the first process of its run."""
    init = folder.state_of(str(rent.pods), ref)[1].init
    assert init is not None
    supervisors = mentioning(f"__main__.py\0{rent.pods / ref}")
    (supervisor,) = {pid for pid in supervisors if init[0] in processes.descendants(pid)}
    return supervisor, init[0]


def test_offers_say_image_where_an_engine_answers(rent: Images) -> None:
    assert all("image" in offer.supports for offer in run(rent.local.list_offers()))
    without = Images(rent.data, replace(WITH_ENGINE, engine="none"))
    assert not any("image" in offer.supports for offer in run(without.local.list_offers()))


def test_a_client_without_its_engine_is_none(tmp_path: Path) -> None:
    client = shutil.which("docker")
    if client is None or subprocess.run([client, "info"], capture_output=True, check=False).returncode == 0:
        pytest.skip("no docker client without an engine on this machine")
    assert engine.find("docker", ENV, seconds=10) is None
    rent = Images(tmp_path / "data", replace(TERMS, engine="docker", engine_env=ENV))
    assert not any("image" in offer.supports for offer in run(rent.local.list_offers()))
    with pytest.raises(Rejected) as caught:
        run(rent.local.create(make_spec("true", image=IMAGE), rent.offer(), make_ref()))
    assert (caught.value.code, caught.value.try_next_offer) == ("image_not_supported", True)


def test_what_names_no_image_or_cannot_be_handed_over_is_refused(rent: Images) -> None:
    def refusal(**spec: Any) -> str:
        with pytest.raises(Rejected) as caught:
            run(rent.local.create(make_spec(**{"image": IMAGE} | spec), rent.offer(), make_ref()))
        return caught.value.code

    for image in ("--privileged", "dir:/etc", "oci-archive:/x", "a//b", "../b", "x@sha256:1", "x y"):
        assert refusal(image=image) == "invalid_image", image
    assert refusal(env={"LD_PRELOAD": "/tmp/x.so\n"}) == "invalid_spec"
    assert run(rent.local.list_managed(OWNER)) == []


def test_a_container_is_its_pods_in_name_labels_and_limits(rent: Images) -> None:
    pod = rent.up(ports=(Port(8000),))
    rent.await_log(pod.id, "the image itself")
    assert pod.reason is not None
    told = rent.container(pod.id)
    labels = told["Config"]["Labels"]
    assert told["Name"].strip("/") == pod.id
    assert (labels["gpubroker.ref"], labels["gpubroker.pod"]) == (pod.id, "pod_test")
    host = told["HostConfig"]
    assert ENGINE is not None
    assert host["Memory"] == (250_000_000 if "memory" in ENGINE.limits else 0)
    assert (host["PidsLimit"] or 0) > 0
    assert not host["Privileged"]
    inside = rent.exec(
        pod.id, "sh", "-c", "grep -E 'Cap(Eff|Bnd)|NoNewPrivs' /proc/self/status; find / -xdev -name '*.sock'"
    )
    assert "CapEff:\t0000000000000000" in inside
    assert "CapBnd:\t0000000000000000" in inside
    assert "NoNewPrivs:\t1" in inside
    assert ".sock" not in inside
    assert {path.name for path in (rent.pods / pod.id / "container").iterdir()} <= {"pids"}
    run(rent.local.terminate(pod.id))
    assert rent.get(pod.id).life == "gone"
    assert ask("ps", "--all", "--filter", f"name={pod.id}", "--format", "{{.Names}}") == ""
    assert not (rent.pods / "gone" / pod.id / "container").exists()


def test_the_command_takes_the_place_of_the_images_own(rent: Images) -> None:
    pod = rent.up("sh", "-c", 'echo "$OF_IMAGE $#: $1"; exit 7', "sh", "--two words")
    pod = rent.await_life(pod.id, "stopped")
    assert (pod.exit_code, pod.reason) == (7, "the program ended with exit code 7")
    assert rent.log(pod.id) == "kept 1: --two words\n"
    absent = rent.up("/nothing/here")
    absent = rent.await_life(absent.id, "stopped")
    assert absent.exit_code in {125, 127}
    assert "/nothing/here" in rent.log(absent.id)


def test_every_value_arrives_and_no_secret_is_in_a_command_line(rent: Images) -> None:
    secret = secrets.token_hex(12)
    env = {
        "LINES": f'{secret}\n second="x"\r\n',
        "QUOTED": f"'{secret}' \\ \"$HOME\" #",
        "PLAIN": f" {secret}= # ",
        "EMPTY": "",
        "LD_PRELOAD": "/no such/lib.so",
        "PATH": "/bin",
        "LONG": "x" * 32_768,
        "DOCKER_HOST": "tcp://127.0.0.1:1",
    }
    seen, over = set[str](), threading.Event()

    def spy() -> None:
        while not over.is_set():
            for place in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    seen.add(place.read_text(errors="replace"))

    spying = threading.Thread(target=spy)
    spying.start()
    pod = rent.up("env", "-0", env=env | {"GPUBROKER_POD_REF": "forged"})
    rent.await_life(pod.id, "stopped")
    over.set()
    spying.join()
    assert any("\0create\0" in line and pod.id in line for line in seen)
    assert not any(secret in line for line in seen)
    found = dict(item.split("=", 1) for item in rent.log(pod.id).rstrip("\0").split("\0") if "=" in item)
    assert {name: found[name] for name in env} == env
    assert found["GPUBROKER_POD_REF"] == pod.id
    left = [path for path in rent.pods.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert {path.name for path in left} <= {"spec.json", "log"}
    run(rent.local.terminate(pod.id))
    left = [path for path in rent.pods.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert {path.name for path in left} <= {"log"}


def test_ports_are_the_images_own_inside_and_loopbacks_outside(rent: Images) -> None:
    serve = 'mkdir /tmp/www; echo served > /tmp/www/index.html; exec httpd -f -p "$GPUBROKER_PORT_8000" -h /tmp/www'
    pod = rent.up("sh", "-c", serve, ports=(Port(8000, "http"),))
    (endpoint,) = pod.endpoints
    assert (endpoint.port, endpoint.host) == (8000, "127.0.0.1")
    assert rent.exec(pod.id, "sh", "-c", "echo $GPUBROKER_PORT_8000") == "8000\n"
    assert endpoint.url is not None
    until = time.monotonic() + 10
    while True:
        try:
            with urllib.request.urlopen(f"{endpoint.url}/", timeout=5) as answer:
                assert answer.read() == b"served\n"
                break
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_the_machines_loopback_is_out_of_reach(rent: Images) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        pod = rent.up()
        gateway = rent.exec(pod.id, "sh", "-c", "ip route | grep default | cut -d ' ' -f 3").strip()
        for host in ("127.0.0.1", gateway):
            reached = run(rent.local.exec(pod.id, ["nc", "-w", "2", host, port], stdin=b"", timeout_seconds=8))
            assert reached.exit_code != 0, host


def test_commands_beside_the_program(rent: Images) -> None:
    pod = rent.up(env={"OF_POD": "known"})
    result = run(
        rent.local.exec(pod.id, ["sh", "-c", 'cat; echo "$OF_POD" >&2; exit 3'], stdin=b"in\0put", timeout_seconds=10)
    )
    assert (result.exit_code, result.stdout, result.stderr) == (3, b"in\0put", b"known\n")
    assert run(rent.local.exec(pod.id, ["nothing"], stdin=None, timeout_seconds=10)).exit_code in {126, 127}
    much = run(rent.local.exec(pod.id, ["sh", "-c", "yes | head -c 3000000"], stdin=None, timeout_seconds=20))
    assert (len(much.stdout), much.truncated, much.exit_code) == (1 << 20, True, 0)
    late = run(rent.local.exec(pod.id, ["sh", "-c", "echo begun; sleep 77 & sleep 77"], stdin=None, timeout_seconds=2))
    assert (late.exit_code, late.stdout) == (None, b"begun\n")
    until = time.monotonic() + 5
    while "sleep 77" in (listed := rent.exec(pod.id, "ps")):
        assert time.monotonic() < until, listed
    assert rent.get(pod.id).life == "running"


def test_stop_keeps_the_disk_and_start_and_restart_go_on_with_it(rent: Images) -> None:
    pod = rent.up("sh", "-c", "echo run >> /tmp/runs; trap 'echo told; exit 0' TERM; cat /tmp/runs; sleep 99 & wait")
    rent.await_log(pod.id, "run\n")
    run(rent.local.stop(pod.id))
    assert rent.get(pod.id).life == "stopped"
    assert processes.marked(pod.id) == set()
    assert rent.log(pod.id) == "run\ntold\n"
    at = len("run\ntold\n")
    run(rent.local.start(pod.id))
    rent.await_life(pod.id, "running")
    rent.await_log(pod.id, "told\nrun\nrun\n")
    assert rent.log(pod.id, after=at) == "run\nrun\n"
    run(rent.local.restart(pod.id))
    rent.await_log(pod.id, "run\nrun\nrun\n")
    run(rent.local.terminate(pod.id))
    assert rent.log(pod.id, after=at).startswith("run\nrun\ntold\nrun\nrun\nrun\n")
    first, second = rent.bill(pod.id)
    assert first[1] is not None
    assert second[0] >= first[1]


def test_memory_beyond_the_offer_is_said_in_words(rent: Images) -> None:
    if ENGINE is None or "memory" not in ENGINE.limits:
        pytest.skip("the engine cannot limit memory here")
    pod = rent.up("sh", "-c", "sleep 1; x=0123456789abcdef; while :; do x=$x$x; done")
    pod = rent.await_life(pod.id, "stopped", seconds=30)
    assert pod.exit_code == 137
    assert pod.reason is not None
    assert pod.reason.startswith("OOMKilled")


def test_an_image_that_cannot_be_pulled_has_failed_and_says_why(rent: Images) -> None:
    password = secrets.token_hex(12)
    image = "127.0.0.1:9/nothing:1"
    pod = rent.up(image=image, registry_auth={"username": "someone", "password": password})
    assert (pod.life, pod.billing) == ("failed", "none")
    assert pod.reason is not None
    assert pod.reason.startswith(f"ImagePullFailed: the image {image} cannot be pulled: ")
    assert password not in pod.reason
    assert {path.name for path in (rent.pods / pod.id / "container").iterdir()} <= {"pids"}
    run(rent.local.terminate(pod.id))
    assert rent.get(pod.id).life == "gone"
    assert password not in (rent.pods / "gone" / pod.id / "spec.json").read_text()
    own = rent.up(image="localhost/not-here")
    assert own.reason == "ImagePullFailed: the image localhost/not-here is not on this machine"


def test_a_login_reaches_the_registry_and_is_left_nowhere(rent: Images) -> None:
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as registry:

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = registry.accept()
                    with connection:
                        heard.append(connection.recv(1 << 12))

        threading.Thread(target=listen, daemon=True).start()
        image = f"127.0.0.1:{registry.getsockname()[1]}/private:1"
        login = json.loads(engine.login(image, "someone", "pass"))
        pod = rent.up(image=image, registry_auth={"username": "someone", "password": "pass"})
        assert pod.life == "failed"
    assert heard, "it asked the registry that the image names"
    assert login == {"auths": {image.partition("/")[0]: {"auth": "c29tZW9uZTpwYXNz"}}}


def test_a_pull_can_be_ended(rent: Images) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts, and says nothing
        pod = rent.create("true", image=f"127.0.0.1:{silent.getsockname()[1]}/slow:1")
        assert pod.life == "starting"
        assert [seen.life for seen in run(rent.local.list_managed(OWNER))] == ["starting"]
        run(rent.local.stop(pod.id))
        assert rent.get(pod.id).life == "stopped"
        run(rent.local.start(pod.id))
        run(rent.local.terminate(pod.id))
    assert rent.get(pod.id).life == "gone"
    assert rent.bill(pod.id) == []
    assert mentioning(pod.id) == set()


def test_the_hard_stop_ends_a_container(rent: Images) -> None:
    pod = rent.up(seconds=8)
    assert pod.life == "running"
    rent.await_end(pod.id)
    gone = rent.await_life(pod.id, "gone", seconds=15)
    assert gone.reason == "its hard stop was due"


@needs_joining
@pytest.mark.parametrize("both", [False, True])
def test_a_container_ends_with_its_supervisor_and_starts_again(rent: Images, *, both: bool) -> None:
    pod = rent.up("sh", "-c", "echo run >> /tmp/runs; cat /tmp/runs; exec sleep 1000")
    rent.await_log(pod.id, "run\n")
    supervisor, init = keepers(rent, pod.id)
    for pid in (supervisor, init)[: 1 + both]:
        os.kill(pid, signal.SIGKILL)
    rent.await_end(pod.id)  # nobody has looked meanwhile
    lost = rent.get(pod.id)
    assert (lost.life, lost.reason) == ("stopped", "its supervisor was killed")
    run(rent.local.start(pod.id))
    rent.await_life(pod.id, "running")
    rent.await_log(pod.id, "run\nrun\nrun\n")
    run(rent.local.terminate(pod.id))


@pytest.mark.parametrize("both", [False, True])
def test_where_containers_join_no_namespace_the_engine_is_told_to_end_them(
    tmp_path: Path, image: str, *, both: bool
) -> None:
    rent = Images(tmp_path / "data", replace(WITH_ENGINE, isolation="user"))
    try:
        pod = rent.up(image=image)
        rent.await_log(pod.id, "the image itself")
        late = run(rent.local.exec(pod.id, ["sleep", "77"], stdin=None, timeout_seconds=1))
        assert late.exit_code is None
        supervisor, init = keepers(rent, pod.id)
        for pid in (supervisor, init)[: 1 + both]:
            os.kill(pid, signal.SIGKILL)
        if both:  # the next look settles it
            rent.get(pod.id)
        rent.await_end(pod.id)
        assert rent.get(pod.id).life == "stopped"
        run(rent.local.start(pod.id))
        rent.await_life(pod.id, "running")
        run(rent.local.stop(pod.id))
        run(rent.local.terminate(pod.id))
        assert rent.get(pod.id).life == "gone"
    finally:
        rent.end_everything()


def test_a_container_that_lost_its_folder_is_found_and_ended(rent: Images) -> None:
    pod = rent.up("true")
    rent.await_life(pod.id, "stopped")
    supervisors = mentioning(f"__main__.py\0{rent.pods / pod.id}")
    processes.kill(supervisors)
    shutil.move(rent.pods / pod.id, rent.data / "elsewhere")
    (stray,) = run(rent.local.list_managed(OWNER))
    assert (stray.ref, stray.life) == (pod.id, "unknown")
    assert run(rent.local.list_managed("other123")) == []
    run(rent.local.terminate(pod.id))
    assert run(rent.local.list_managed(OWNER)) == []
    with pytest.raises(InstanceNotFound):
        run(rent.local.terminate(pod.id))


def test_a_folder_that_was_deleted_takes_its_container_with_it(rent: Images) -> None:
    pod = rent.up()
    shutil.rmtree(rent.pods / pod.id)
    rent.await_end(pod.id)
    until = time.monotonic() + 15
    while ask("ps", "--all", "--filter", f"name={pod.id}", "--format", "{{.Names}}"):
        assert time.monotonic() < until
        time.sleep(0.1)
