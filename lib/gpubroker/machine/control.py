"""From an adapter to a pod's supervisor: one question, one answer. Where no supervisor is, one is started first."""

import asyncio
import contextlib
import json
import os
import sys
import time
from typing import Any, Final

from gpubroker.machine import folder, record

_PROGRAM: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__main__.py")
_POLL_SECONDS: Final = 0.004
_RESPAWN_SECONDS: Final = 3.0
_OF_THE_LIVING: Final = {"start": "gone", "extend": "gone", "restart": "not_running", "exec": "not_running"}
_spawned: Final = set[int]()


class Silent(Exception):
    """A supervisor did not answer in time, or could not be started."""


class Refused(Exception):
    """The supervisor said no: a code and what to say."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code)
        self.code, self.detail = code, detail


async def ask(all_pods: str, ref: str, *, limit_seconds: float, **request: object) -> dict[str, Any]:
    """Put one request to the pod's supervisor; of a pod that is gone the tombstone answers `{"state"}`.

    Raises FileNotFoundError (no such pod), Refused, Silent.
    """
    try:
        async with asyncio.timeout(limit_seconds):
            answer = await _ask(all_pods, ref, request)
    except TimeoutError:
        msg = f"the supervisor of {ref} did not answer within {limit_seconds:g} s"
        raise Silent(msg) from None
    if "refused" in answer:
        raise Refused(answer["refused"], answer["detail"])
    return answer


async def _ask(all_pods: str, ref: str, request: dict[str, object]) -> dict[str, Any]:
    line = json.dumps(request).encode() + b"\n"
    spawn_at = 0.0
    while True:
        _, state = folder.state_of(all_pods, ref)
        if state.cleaned:
            if request["do"] in _OF_THE_LIVING:
                raise Refused(_OF_THE_LIVING[str(request["do"])], f"{ref} has ended")
            return {"state": state._asdict()}
        path = folder.find(all_pods, ref)
        try:
            answer = await _exchange(path, line)
        except (ConnectionRefusedError, FileNotFoundError):
            if time.monotonic() >= spawn_at:
                spawn(path)
                spawn_at = time.monotonic() + _RESPAWN_SECONDS
        except ConnectionError:
            if request["do"] == "exec":
                msg = f"the supervisor of {ref} ended during the command"
                raise Silent(msg) from None
        else:
            return answer
        await asyncio.sleep(_POLL_SECONDS)


async def _exchange(path: str, line: bytes) -> dict[str, Any]:
    place = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:  # a socket's path may have 107 bytes; through the descriptor it is always short
        reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{place}/{folder.SOCKET}")
    finally:
        os.close(place)
    try:
        writer.write(line)
        await writer.drain()
        answer = await reader.read(-1)
    finally:
        writer.close()
    if not answer.endswith(b"\n"):
        raise ConnectionResetError
    return json.loads(answer)


def spawn(path: str) -> None:
    """Start a supervisor for the pod in this folder: in a session of its own, with no environment, outliving us.

    One too many does no harm: it finds the folder held and ends.
    """
    reap()
    nowhere = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    complaints = os.path.join(path, folder.COMPLAINTS)
    said = [(os.POSIX_SPAWN_OPEN, n, complaints, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for n in (1, 2)]
    command = [sys.executable, "-I", "-S", _PROGRAM, path]
    with contextlib.suppress(FileNotFoundError):  # it moved to the tombstones just now
        _spawned.add(os.posix_spawn(sys.executable, command, {}, file_actions=[nowhere, *said], setsid=True))


def reap() -> None:
    """Take note of supervisors that we started and that have ended since."""
    for pid in list(_spawned):
        try:
            ended = os.waitpid(pid, os.WNOHANG)[0] != 0
        except ChildProcessError:
            ended = True
        if ended:
            _spawned.discard(pid)


def read_record(all_pods: str, ref: str) -> list[record.Event]:
    """The whole record of a pod, also of one that is gone. Raises FileNotFoundError."""
    return folder.read(all_pods, ref)[1]
