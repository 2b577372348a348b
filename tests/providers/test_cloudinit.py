"""What a machine does at its first boot: the user data as cloud-init reads it, and its script run by bash against an engine."""

import base64
import http.server
import json
import re
import shutil
import socketserver
import stat
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from tests.providers.contract import COMMAND, ENV

from gpubroker.errors import Rejected
from gpubroker.providers.base import Port, Spec
from gpubroker.providers.http import cloudinit

KEY = "ssh-ed25519 AAAA mé 🦊 'quoted' \"twice\""
AUTH = {"username": "me", "password": "p4ss: 'w' 🦊"}
SPEC = Spec(
    pod_id="pod_1",
    command=COMMAND,
    image="ghcr.io/some/image",
    env=ENV,
    ports=(Port(8000, "http"), Port(22), Port(53, "udp")),
    disk_gb=50,
    hard_stop_at=datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC),
    ssh_public_key=KEY,
    registry_auth=AUTH,
)


def read(user_data: str) -> dict[str, Any]:
    """What cloud-init reads."""
    assert user_data.startswith("#cloud-config\n")
    config: dict[str, Any] = yaml.safe_load(user_data)
    return config | {"files": {file["path"]: file for file in config["write_files"]}}


def test_the_user_data_says_all_and_is_ascii() -> None:
    text = cloudinit.write(SPEC)
    config = read(text)
    assert text.isascii()
    assert config["ssh_authorized_keys"] == [KEY]
    made = json.loads(config["files"]["/etc/gpubroker/container.json"]["content"])
    assert (made["Image"], made["Cmd"]) == ("ghcr.io/some/image:latest", list(COMMAND))
    assert made["Env"] == [f"{name}={value}" for name, value in ENV.items()]
    assert made["HostConfig"]["PortBindings"] == {"8000/tcp": [{"HostPort": "8000"}], "53/udp": [{"HostPort": "53"}]}
    assert made["HostConfig"]["DeviceRequests"] == [{"Count": -1, "Capabilities": [["gpu"]]}]
    assert "systemctl enable --now gpubroker-watchdog.service" in config["runcmd"]


def test_secrets_are_in_files_of_root_alone() -> None:
    config = read(cloudinit.write(SPEC))
    hidden = [ENV["TOKEN"], AUTH["password"], base64.urlsafe_b64encode(json.dumps(AUTH).encode()).decode()]
    holds = {path for path, file in config["files"].items() if any(text in file["content"] for text in hidden)}
    assert holds == {"/etc/gpubroker/container.json", "/etc/gpubroker/registry"}
    assert {config["files"][path]["permissions"] for path in holds} == {"0600"}
    assert not any(secret in line for secret in hidden for line in config["runcmd"])


def test_what_is_not_asked_for_is_not_there() -> None:
    plain = Spec("pod_1", (), "busybox:1@sha256:00", {}, (), 10, SPEC.hard_stop_at)
    text = cloudinit.write(plain, gpus=False)
    made = json.loads(read(text)["files"]["/etc/gpubroker/container.json"]["content"])
    assert made["Image"] == "busybox:1@sha256:00"
    assert "Cmd" not in made
    assert made["HostConfig"]["DeviceRequests"] == []
    assert not re.search("nvidia|registry|ssh_authorized", text)


def test_a_pod_without_an_image_is_refused_everywhere() -> None:
    with pytest.raises(Rejected) as rejected:
        cloudinit.write(Spec("pod_1", ("true",), None, {}, (), 10, SPEC.hard_stop_at))
    assert (rejected.value.code, rejected.value.try_next_offer) == ("image_needed", False)


def test_the_watchdog_ends_at_the_hard_stop_and_not_before(tmp_path: Path) -> None:
    program = read(cloudinit.write(SPEC))["files"]["/usr/local/sbin/gpubroker-watchdog"]["content"]
    assert f"-lt {int(SPEC.hard_stop_at.timestamp())} ]" in program
    commands(tmp_path, systemctl='echo "$@" >> {0}/said', sleep="echo sleep >> {0}/said; exit 1", date="cat {0}/now")
    for now, said in ((-1, "sleep"), (0, "poweroff")):
        (tmp_path / "now").write_text(str(int(SPEC.hard_stop_at.timestamp()) + now))
        (tmp_path / "said").unlink(missing_ok=True)
        run(tmp_path, program.replace("sleep 10", "sleep 10 || exit 1"), shell="sh")
        assert (tmp_path / "said").read_text().strip() == said


def test_the_script_leaves_the_same_files(tmp_path: Path) -> None:
    commands(tmp_path, systemctl="exit 0")
    script = cloudinit.write_script(SPEC)
    assert script.isascii()
    for folder in ("/etc/", "/usr/local/", "/root/"):
        script = script.replace(f" {folder}", f" {tmp_path}{folder}")
    assert run(tmp_path, script).returncode == 0
    for path, file in read(cloudinit.write(SPEC))["files"].items():
        written = Path(f"{tmp_path}{path}")
        assert written.read_text().replace(str(tmp_path), "") == file["content"]
        assert stat.filemode(written.stat().st_mode)[1:] == {"0600": "rw-------", "0700": "rwx------"}.get(
            file["permissions"], "rw-r--r--"
        )
    assert (tmp_path / "root/.ssh/authorized_keys").read_text() == KEY + "\n"


class Engine(socketserver.ThreadingUnixStreamServer):
    """Docker's interface, as far as the script uses it."""

    daemon_threads = True

    def __init__(self, path: str) -> None:
        super().__init__(path, _EngineHandler)
        self.calls: list[tuple[str, str, dict[str, list[str]]]] = []
        self.login: Any = None
        self.container: Any = None
        self.starts = 0
        self.pulls = True


class _EngineHandler(http.server.BaseHTTPRequestHandler):
    server: Engine

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer(200 if self.server.container else 404, b"{}")

    def do_POST(self) -> None:
        split, engine = urlsplit(self.path), self.server
        query = parse_qs(split.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        engine.calls.append(("POST", split.path, query))
        if split.path == "/images/create":
            engine.login = self.headers.get("X-Registry-Auth")
            return self._answer(200, b'{"status":"Pulling"}\n{"status":"Done"}\n')
        if split.path == "/containers/create":
            if not engine.pulls:
                return self._answer(404, b'{"message":"no such image"}')
            engine.container = json.loads(body)
            return self._answer(201, b'{"Id":"1"}')
        engine.starts += 1
        return self._answer(204, b"")

    def _answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with Engine(str(tmp_path / "docker.sock")) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def commands(folder: Path, **programs: str) -> None:
    """Programs of the machine, as it may have them."""
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("base64", "cat", "chmod", "curl", "date", "mkdir", "tail"):
        if not (folder / "bin" / name).exists():
            (folder / "bin" / name).symlink_to(shutil.which(name) or "")
    for name, text in programs.items():
        program = folder / "bin" / name
        program.unlink(missing_ok=True)
        program.write_text(f"#!/bin/sh\n{text.format(folder)}\n")
        program.chmod(0o755)


def run(folder: Path, program: str, shell: str = "bash") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which(shell) or "", "-c", program],
        env={"PATH": f"{folder}/bin"},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def start(folder: Path, spec: Spec = SPEC) -> subprocess.CompletedProcess[str]:
    """A boot: the files are there, and the pod's unit starts."""
    (folder / "etc").mkdir(exist_ok=True)
    files = read(cloudinit.write(spec))["files"]
    for path in [path for path in files if path.startswith("/etc/gpubroker/")]:
        (folder / "etc" / path.rpartition("/")[2]).write_text(files[path]["content"])
    program = files["/usr/local/sbin/gpubroker-pod"]["content"]
    return run(
        folder, program.replace("/run/docker.sock", f"{folder}/docker.sock").replace("/etc/gpubroker", f"{folder}/etc")
    )


def test_the_first_boot_makes_the_container_and_the_next_ones_start_it(tmp_path: Path, engine: Engine) -> None:
    commands(tmp_path, docker="exit 0", **{"nvidia-ctk": "exit 0"}, systemctl="exit 0", **{"apt-get": "exit 1"})
    first = start(tmp_path)
    assert first.returncode == 0, first.stderr
    assert engine.container["Env"] == [f"{name}={value}" for name, value in ENV.items()]
    assert json.loads(base64.urlsafe_b64decode(engine.login)) == AUTH
    assert engine.calls[0] == ("POST", "/images/create", {"fromImage": ["ghcr.io/some/image:latest"]})
    assert engine.calls[1] == ("POST", "/containers/create", {"name": ["pod"]})
    assert start(tmp_path).returncode == 0
    assert (engine.starts, len(engine.calls)) == (2, 4)


def test_an_image_that_cannot_be_had_fails_and_says_why(tmp_path: Path, engine: Engine) -> None:
    commands(tmp_path, docker="exit 0", **{"nvidia-ctk": "exit 0"}, systemctl="exit 0")
    engine.pulls = False
    failed = start(tmp_path)
    assert (failed.returncode != 0, engine.starts) == (True, 0)
    assert "404" in failed.stderr


def test_what_is_missing_is_installed(tmp_path: Path, engine: Engine) -> None:
    apt = (
        'for word; do last=$word; done; echo $last >> {0}/said; [ $last = update ] || echo "#!/bin/sh" > {0}/bin/$last'
    )
    commands(tmp_path, systemctl="exit 0", **{"apt-get": apt})
    assert "nvidia-ctk: command not found" in start(tmp_path).stderr  # what was installed is none
    assert (tmp_path / "said").read_text().split() == ["update", "docker.io", "update", "nvidia-container-toolkit"]
