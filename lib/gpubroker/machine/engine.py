"""The container engine of this machine, Podman or Docker, through its command line: is there one, and what it is asked.

What is secret reaches it by files of mode 0600 in the pod's folder, deleted when the container is made, and what no
such file can hold by the environment of the one command that makes it: never in a command line.
"""

import base64
import contextlib
import json
import os
import re
import resource
import select
import signal
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from gpubroker.machine import folder, processes
from gpubroker.machine.folder import PodSpec

VARIABLES: Final = (
    "CONTAINERS_CONF",
    "CONTAINERS_STORAGE_CONF",
    "CONTAINER_HOST",
    "DOCKER_HOST",
    "HOME",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "NO_PROXY",
    "PATH",
    "STORAGE_DRIVER",
    "TMPDIR",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_RUNTIME_DIR",
)
"""What the engine's command line may know of the broker's environment."""

PIDS: Final = "pids"
"""In the folder of the container: a link to the namespace that its processes join."""
MADE_BY: Final = "gpubroker.pods"
"""The label that names the folder of pods."""

_LOGIN, _ENV = "config.json", "env"
_PROCESSES: Final = 4096
_MOST_OPEN: Final = 32768
"""Podman lowers its own limits to this."""
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_HUB: Final = "docker.io"
_IMAGE: Final = (
    r"[A-Za-z0-9][A-Za-z0-9._-]*(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
_PLAIN: Final = r"[^\"'\\\0-\x1f]{0,32000}"
"""Values that every engine reads alike from a file of variables."""
_READ_BY_CLIENTS: Final = (
    r"(?i)(_?CONTAINER|ALL_PROXY|BUILD|CNI_|CONMON|CRUN|DBUS|DOCKER|GCONV|GLIBC|GO|HOME|HOSTALIASES|HTTPS?_PROXY|IFS|LANG"
    r"|LC_|LD_|LISTEN_|LOC|MALLOC|NETAVARK|NLS|NOTIFY_|NO_PROXY|OTEL|PATH|PODMAN|REGISTR|RES_|RUNC|SHELL|SSH|SSL_"
    r"|STORAGE|SUDO|TE?MP|TZ|USER|XDG_).*"
)
"""Names that mean something to an engine's command line or to what loads it: they are never in its environment."""


class Failed(Exception):
    """A command of the engine did not succeed: what it said."""


class Engine(NamedTuple):
    """An engine that answers."""

    program: str
    kind: str
    """`podman` or `docker`: whose command line it understands."""
    limits: list[str]
    """Which of `memory`, `cpu`, `pids` it can limit."""
    joins: bool
    """Whether its containers can join a namespace of processes that we hold, and so end when we do."""
    env: dict[str, str]


class Call:
    """One command of the engine on its way. Its parent reaps it."""

    def __init__(self, engine: Engine, *arguments: str, more: Mapping[str, str] | None = None) -> None:
        self.code: int | None = None
        self.said = self.complaint = ""
        self._out, self._errors = os.memfd_create("out", os.MFD_CLOEXEC), os.memfd_create("err", os.MFD_CLOEXEC)
        files = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, self._out, 1),
            (os.POSIX_SPAWN_DUP2, self._errors, 2),
        ]
        try:
            self.pid = os.posix_spawn(
                engine.program,
                [engine.program, *arguments],
                engine.env | dict(more or {}),
                file_actions=files,
                setsid=True,
                setsigdef=[signal.SIGINT, signal.SIGHUP, signal.SIGPIPE],
            )
        except OSError:
            self.let_go()
            raise

    def ended(self, status: int) -> None:
        """It was reaped."""
        self.code = os.waitstatus_to_exitcode(status)
        self.said, errors = (_read_back(file) for file in (self._out, self._errors))
        lines = [line for line in errors.splitlines() if line.strip()]
        self.complaint = lines[-1].removeprefix("Error: ") if lines else f"exit code {self.code}"
        self.let_go()

    def let_go(self) -> None:
        """Forget what it says."""
        os.close(self._out)
        os.close(self._errors)


def _read_back(file: int) -> str:
    return os.pread(file, 1 << 20, 0).decode(errors="replace")


def ask(engine: Engine, *arguments: str, seconds: float) -> str:
    """Run a command to its end and give what it says. Raises Failed, also when it takes longer; it is killed then."""
    try:
        call = Call(engine, *arguments)
    except OSError as error:
        raise Failed(f"{engine.program}: {error.strerror}") from None
    handle = os.pidfd_open(call.pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        in_time = bool(poll.poll(seconds * 1000))
    finally:
        os.close(handle)
    if not in_time:
        processes.kill([call.pid])
    call.ended(os.waitpid(call.pid, 0)[1])
    if call.code != 0:
        raise Failed(call.complaint if in_time else f"{engine.kind} did not answer within {seconds:g} s")
    return call.said


def of(spec: PodSpec) -> Engine:
    """The engine that runs this pod's image."""
    if spec.engine is None:
        raise Failed("it was made without a container engine")
    return Engine(**spec.engine)


# Whether there is one


def find(choice: str, variables: Mapping[str, str], *, seconds: float) -> Engine | None:
    """The first engine that answers, of those chosen (`auto`: all). A client whose engine is away is none."""
    known = {name: variables[name] for name in VARIABLES if variables.get(name)}
    path = known.setdefault("PATH", _PATH)
    for name in {"auto": ("podman", "docker"), "none": ()}.get(choice, (choice,)):
        program = next((p for p in (os.path.join(f, name) for f in path.split(":")) if os.access(p, os.X_OK)), None)
        if program is None:
            continue
        asked = Engine(program, name, [], joins=False, env=known)
        with contextlib.suppress(Failed, ValueError, KeyError):
            told = json.loads(ask(asked, "info", "--format", "{{json .}}", seconds=seconds))
            return _podman(asked, told) if "host" in told else _docker(asked, told)
    return None


def _podman(asked: Engine, told: dict[str, Any]) -> Engine:
    host = told["host"]
    limits = [name for name in ("memory", "cpu", "pids") if name in (host.get("cgroupControllers") or ())]
    joins = not host["security"]["rootless"] and not host.get("serviceIsRemote") and os.geteuid() == 0
    return asked._replace(kind="podman", limits=limits, joins=joins)


def _docker(asked: Engine, told: dict[str, Any]) -> Engine:
    """Its own home is not lent to it: the logins of the operator are there."""
    if not told["ServerVersion"]:
        raise Failed("there is a client, and no engine")
    words = {"memory": "MemoryLimit", "cpu": "CpuCfsQuota", "pids": "PidsLimit"}
    env = {name: value for name, value in asked.env.items() if name != "HOME"}
    return asked._replace(kind="docker", limits=[limit for limit, word in words.items() if told.get(word)], env=env)


# What it can be asked for


def full_name(image: str) -> str | None:
    """An image's name with its registry, Docker Hub's where it names none. None: this names no image."""
    if not re.fullmatch(_IMAGE, image):
        return None
    first, slash, _ = image.partition("/")
    if not slash:
        return f"{_HUB}/library/{image}"
    return image if "." in first or ":" in first or first == "localhost" else f"{_HUB}/{image}"


def can_hold(env: Mapping[str, str]) -> bool:
    """Whether every variable can be handed to an engine without a risk to it: a line break in its own cannot."""
    return not any("\n" in value and re.fullmatch(_READ_BY_CLIENTS, name) for name, value in env.items())


def pull(spec: PodSpec) -> Call:
    """Fetch the image. The login lies in a file until `forget_secrets`."""
    engine, image = of(spec), str(spec.image)
    place = _place(spec)
    folder.write_whole(os.path.join(place, _LOGIN), (spec.login or '{"auths": {}}').encode())
    if engine.kind == "podman":
        return Call(engine, "pull", "--quiet", "--authfile", os.path.join(place, _LOGIN), f"docker://{image}")
    return Call(engine, "--config", place, "pull", "--quiet", "--", image)


def create(spec: PodSpec, ports: Mapping[str, int], gpus: Sequence[str]) -> Call:
    """Make the container of an image that is there; nothing runs yet."""
    handed, place = _handed(spec), _place(spec)
    lines = "".join(f"{name}={value}\n" for name, value in spec.env.items() if name not in handed)
    folder.write_whole(os.path.join(place, _ENV), lines.encode())
    if joins(spec):
        link(spec, "self")
    more = {name: spec.env[name] for name in handed}
    return Call(of(spec), *described(spec, ports, gpus), more=more)


def _handed(spec: PodSpec) -> set[str]:
    """The variables that no file can hold."""
    unfit = {name for name, value in spec.env.items() if not re.fullmatch(_PLAIN, value)}
    return {name for name in unfit if not re.fullmatch(_READ_BY_CLIENTS, name)}


def described(spec: PodSpec, ports: Mapping[str, int], gpus: Sequence[str]) -> list[str]:
    """The command that makes a container: everyone on the machine may read it, so it has no secret."""
    engine, place = of(spec), os.path.join(spec.all, spec.ref, folder.CONTAINER)
    wanted = [*_names(spec), *_limits(spec, engine), *_guards(spec, engine, place), *_devices(spec, engine, gpus)]
    for port, protocol in spec.ports:
        kind = "udp" if protocol == "udp" else "tcp"
        wanted += ["--publish", f"127.0.0.1:{ports[str(port)]}:{port}/{kind}"]
    wanted += ["--env-file", os.path.join(place, _ENV)]
    wanted += [word for name in sorted(_handed(spec)) for word in ("--env", name)]
    own = {"GPUBROKER_POD_ID": spec.pod_id, processes.MARK: spec.ref}
    own |= {f"GPUBROKER_PORT_{port}": str(port) for port, _ in spec.ports}
    wanted += [word for name, value in own.items() for word in ("--env", f"{name}={value}")]
    if spec.command:
        first = json.dumps(spec.command[:1]) if engine.kind == "podman" else spec.command[0]
        wanted += ["--entrypoint", first]
    return ["create", *wanted, "--", str(spec.image), *spec.command[1:]]


def _names(spec: PodSpec) -> list[str]:
    labels = {"gpubroker.ref": spec.ref, "gpubroker.pod": spec.pod_id, MADE_BY: folder.identity(spec.all)}
    said = [word for name, value in labels.items() for word in ("--label", f"{name}={value}")]
    return ["--pull", "never", "--name", spec.ref, "--hostname", spec.ref, *said]


def _limits(spec: PodSpec, engine: Engine) -> list[str]:
    limits = {
        "memory": ["--memory", f"{spec.ram_bytes}b", "--memory-swap", f"{spec.ram_bytes}b"],
        "cpu": ["--cpus", f"{spec.vcpus_milli / 1000:g}"],
        "pids": ["--pids-limit", str(_PROCESSES)],
    }
    words = [word for name in engine.limits for word in limits[name]]
    words += ["--shm-size", f"{spec.ram_bytes // 2}b", "--ulimit", "core=0:0"]
    if spec.disk_gb:
        words += ["--ulimit", f"fsize={spec.disk_gb * 10**9}:{spec.disk_gb * 10**9}"]
    for name, kind in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
        hard = resource.getrlimit(kind)[1]  # an engine's own default may be more than this machine lets it give
        most = _MOST_OPEN if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN)
        words += ["--ulimit", f"{name}={most}:{most}"]
    return words


def _guards(spec: PodSpec, engine: Engine, place: str) -> list[str]:
    words = ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--no-healthcheck", "--log-driver", "none"]
    if engine.kind == "docker":
        return [*words, "--init"]
    words += ["--http-proxy=false"]
    if joins(spec):
        words += ["--pid", f"ns:{os.path.join(place, PIDS)}"]
    return words


def joins(spec: PodSpec) -> bool:
    """Whether the pod's processes are in a namespace that we hold."""
    return of(spec).joins and spec.isolation == "best"


def link(spec: PodSpec, pid: int | str) -> None:
    """Say whose namespace of processes the container joins when it starts: that of this process."""
    path = os.path.join(_place(spec), PIDS)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    os.symlink(f"/proc/{pid}/ns/pid", path)


def _devices(spec: PodSpec, engine: Engine, gpus: Sequence[str]) -> list[str]:
    """The pod's GPUs and no other, whatever its image or its environment asks of NVIDIA's runtime."""
    if gpus and engine.kind == "docker":
        return ["--gpus", f'"device={",".join(gpus)}"']
    words = ["--env", "NVIDIA_VISIBLE_DEVICES=void"] if spec.machine_has_gpus else []
    return words + [word for gpu in gpus for word in ("--device", f"nvidia.com/gpu={gpu}")]


def _place(spec: PodSpec) -> str:
    place = os.path.join(spec.all, spec.ref, folder.CONTAINER)
    os.makedirs(place, mode=0o700, exist_ok=True)
    return place


def forget_secrets(spec: PodSpec) -> None:
    """Delete what only the making of a container needs."""
    for name in (_LOGIN, _ENV, f"{_LOGIN}~", f"{_ENV}~"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(_place(spec), name))


def strays(engine: Engine, all_pods: str, *, seconds: float) -> list[str]:
    """The names of containers that were made for this folder of pods and have no living pod in it. Raises Failed."""
    label = f"label={MADE_BY}={folder.identity(all_pods)}"
    names = ask(engine, "ps", "--all", "--filter", label, "--format", "{{.Names}}", seconds=seconds).split()
    return [name for name in names if folder.is_ref(name) and not os.path.isdir(os.path.join(all_pods, name))]


def remove(engine: Engine, ref: str, *, seconds: float) -> None:
    """End a container and delete it, with its disk; one that is not there is gone already. Raises Failed."""
    try:
        ask(engine, "rm", "--force", "--volumes", ref, seconds=seconds)
    except Failed as error:
        if "no such container" not in str(error).lower() and "no container with" not in str(error).lower():
            raise


def login(image: str, username: str, password: str) -> str:
    """A login at the image's registry, as engines keep it."""
    first = (full_name(image) or image).partition("/")[0]
    registry = "https://index.docker.io/v1/" if first == _HUB else first
    return json.dumps({"auths": {registry: {"auth": base64.b64encode(f"{username}:{password}".encode()).decode()}}})
