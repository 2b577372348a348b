"""Commands that run beside a pod's program, with their streams: each ends with its answer, or at its timeout."""

import base64
import os
import select
import time
from collections.abc import Sequence
from typing import Final

from gpubroker.machine.server import Client, Loop
from gpubroker.machine.tree import Tree

STREAM_LIMIT: Final = 1 << 20
"""At most so many bytes of stdout, and of stderr, are kept."""
MOST: Final = 128
"""At most so many at once."""

_CHUNK: Final = 1 << 16
_LINGER_SECONDS: Final = 0.1
_KILL_SECONDS: Final = 2.0
KILLED: Final = 137


class _Stream:
    """What came out of one pipe."""

    def __init__(self, loop: Loop, file: int) -> None:
        self.kept, self.truncated, self.open = bytearray(), False, True
        self._loop, self._file = loop, file
        os.set_blocking(file, False)
        loop.watch(file, select.EPOLLIN, self.drain)

    def drain(self, _events: int = 0) -> None:
        """Read all that is there now."""
        for _ in range(16):  # then others have their turn
            if not self.open:
                return
            try:
                data = os.read(self._file, _CHUNK)
            except BlockingIOError:
                return
            if not data:
                self.close()
                return
            room = STREAM_LIMIT - len(self.kept)
            self.kept += data[:room]
            self.truncated |= len(data) > room

    def close(self) -> None:
        if self.open:
            self.open = False
            self._loop.forget(self._file)
            os.close(self._file)


class Exec:
    """One command, from its start to its answer."""

    def __init__(
        self, loop: Loop, tree: Tree, number: int, client: Client, stdin: bytes, timeout_seconds: float
    ) -> None:
        self.number, self.done = number, False
        self._loop, self._tree, self._client = loop, tree, client
        self._begun = time.monotonic()
        self._deadline = self._begun + timeout_seconds
        self._timed_out = False
        self._code: int | None = None
        self._stdin, self._feed = stdin, -1
        client.on_leave = self._abandon

    def start(self, command: Sequence[str], env: dict[str, str]) -> None:
        """Start it. Raises OSError when the pod has ended meanwhile."""
        inner_in, self._feed = os.pipe2(os.O_CLOEXEC)
        out, inner_out = os.pipe2(os.O_CLOEXEC)
        errors, inner_errors = os.pipe2(os.O_CLOEXEC)
        self._streams = (_Stream(self._loop, out), _Stream(self._loop, errors))
        os.set_blocking(self._feed, False)
        try:
            self._tree.spawn(self.number, command, env, (inner_in, inner_out, inner_errors))
        except OSError:
            self._let_go()
            raise
        finally:
            for file in (inner_in, inner_out, inner_errors):
                os.close(file)
        self._loop.watch(self._feed, select.EPOLLOUT, self._give)
        self._give()

    def _give(self, _events: int = 0) -> None:
        """Feed its stdin, and close that at the end, or when it does not want more."""
        try:
            while self._stdin:
                self._stdin = self._stdin[os.write(self._feed, self._stdin[:_CHUNK]) :]
        except BlockingIOError:
            return
        except OSError:
            self._stdin = b""
        self._stop_feeding()

    def _stop_feeding(self) -> None:
        if self._feed >= 0:
            self._loop.forget(self._feed)
            os.close(self._feed)
            self._feed = -1

    def ended(self, code: int) -> None:
        """The command has ended; what it left in its pipes is read for a moment more."""
        self._code = code
        self._deadline = min(time.monotonic() + _LINGER_SECONDS, self._deadline if self._timed_out else float("inf"))

    def tick(self) -> float:
        """Do what is due and give the time, on the monotonic clock, when it wants that again."""
        now = time.monotonic()
        if self._code is not None and (now >= self._deadline or not any(stream.open for stream in self._streams)):
            self._answer(None if self._timed_out else self._code)
        elif now >= self._deadline and self._timed_out:
            self._answer(None)
        elif now >= self._deadline:
            self._timed_out = True
            self._tree.kill(self.number)
            self._deadline = now + _KILL_SECONDS
        return self._deadline

    def pod_ended(self) -> None:
        """The pod has ended, and this with it."""
        self._answer(None if self._timed_out else KILLED if self._code is None else self._code)

    def _answer(self, code: int | None) -> None:
        for stream in self._streams:
            stream.drain()
        out, errors = self._streams
        self._let_go()
        self._client.reply(
            exit_code=code,
            stdout=base64.b64encode(out.kept).decode(),
            stderr=base64.b64encode(errors.kept).decode(),
            truncated=out.truncated or errors.truncated,
            duration_ms=int((time.monotonic() - self._begun) * 1000),
        )

    def _abandon(self) -> None:
        """Nobody waits for it any more."""
        self._tree.kill(self.number)
        self._let_go()

    def _let_go(self) -> None:
        self._stop_feeding()
        for stream in self._streams:
            stream.close()
        self.done = True
