"""Child processes that never outlive this one, and the folders that they work in."""

import contextlib
import fcntl
import os
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Final

from gpubroker.errors import SetupError

ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C",
    "TZ": "UTC",
}
"""All that a server is told by its environment: nothing of ours leaks into it."""

ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask `gpubroker dev` to end."""

_NOBODY: Final = 65534

# The kernel sends a death signal when the THREAD that started the child ends, so one thread that lasts starts them all.
_STARTER: Final = ThreadPoolExecutor(1, thread_name_prefix="starter")


def tied(signal_name: str) -> tuple[str, ...]:
    """Make a command's prefix by which the kernel sends it this signal when we die, by kill -9 too.

    `signal_name` is without SIG. Raises SetupError where util-linux is missing.
    """
    return (_tool("setpriv"), "--pdeathsig", signal_name, "--")


def unprivileged(signal_name: str) -> tuple[tuple[str, ...], int]:
    """Make a prefix like `tied` for programs that refuse to be root, and tell the uid that must own their files.

    Root becomes another user in a user namespace and stays itself on disk. Where there are no user namespaces, as in
    most containers, it becomes nobody, who keeps the right to pass through folders that are closed to others.
    """
    if os.geteuid() != 0:
        return tied(signal_name), os.geteuid()
    namespace = (_tool("unshare"), "--user", "--map-user=1000", "--map-group=1000", "--")
    if _works((*namespace, *tied(signal_name))):
        return (*namespace, *tied(signal_name)), 0
    nobody = (
        _tool("setpriv"), f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups",
        "--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--pdeathsig", signal_name, "--",
    )  # fmt: skip
    if _works(nobody):
        return nobody, _NOBODY
    msg = "PostgreSQL refuses to be root, and root may not become another user here: run as a normal user"
    raise SetupError(msg)


def _tool(name: str) -> str:
    found = shutil.which(name, path=ENVIRONMENT["PATH"])
    if found is None:
        msg = f"the program '{name}' is missing: install the package util-linux"
        raise SetupError(msg)
    return found


def _works(prefix: Sequence[str]) -> bool:
    tried = subprocess.run((*prefix, _tool("true")), env=ENVIRONMENT, capture_output=True, check=False)
    return tried.returncode == 0


def start(command: Sequence[str], *, folder: Path, log: IO[bytes], stdin: bytes = b"") -> subprocess.Popen[bytes]:
    """Start a server in a folder, and in a session of its own so that a terminal's Ctrl-C reaches only us."""

    def begin() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, cwd=folder, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )

    process = _STARTER.submit(begin).result()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # ended already: the caller will see that
            process.stdin.write(stdin)
            process.stdin.close()
    return process


def stop(process: subprocess.Popen[bytes], *signals: tuple[signal.Signals, float]) -> None:
    """Send each signal and wait its seconds until the process is gone; what outlives all of them is killed."""
    for number, seconds in signals:
        if process.poll() is not None:
            return
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    if process.poll() is None:
        process.kill()
        process.wait()


def end_orphan(pid: int, program: str, folder: Path, number: signal.Signals, seconds: float) -> None:
    """End what an earlier process of ours left running in this folder. Any other program by this pid is let be.

    Raises SetupError when it has not ended after `seconds`.
    """
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if not _runs_in(Path("/proc", str(pid)), program, folder):
            return
        signal.pidfd_send_signal(handle, number)
        ended = select.poll()
        ended.register(handle, select.POLLIN)
        if not ended.poll(seconds * 1000):
            msg = f"{program} (process {pid}) still runs in {folder}: end it, then start again"
            raise SetupError(msg)
    finally:
        os.close(handle)


def _runs_in(process: Path, program: str, folder: Path) -> bool:
    try:
        return process.joinpath("comm").read_text().strip() == program and process.joinpath("cwd").samefile(folder)
    except OSError:
        return False


def make_folder(folder: Path) -> None:
    """Make a folder that only we may read, unless it is there. Raises SetupError saying why it cannot be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        msg = f"cannot make the folder {folder}: {error.strerror}; choose another with --data"
        raise SetupError(msg) from None


def lock(path: Path) -> IO[str]:
    """Lock a folder by a file in it, until the file is closed. Raises SetupError when another process holds it."""
    make_folder(path.parent)
    try:
        path.touch(0o600)
        held = path.open("a+")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.seek(0)
            msg = f"{path.parent} is in use by process {held.read().strip() or 'unknown'}"
            held.close()
            raise SetupError(msg) from None
        held.truncate(0)
        held.write(f"{os.getpid()}\n")
        held.flush()
    except OSError as error:
        msg = f"cannot write in {path.parent}: {error.strerror}; choose another folder with --data"
        raise SetupError(msg) from None
    return held


def free_port() -> int:
    """Find a TCP port of the loopback that is free now. Another may take it before its user does: try again then."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
