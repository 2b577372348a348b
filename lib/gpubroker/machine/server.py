"""The supervisor's poll loop, and its end of `control.sock`: one line of JSON in, one line of JSON out, then closed."""

import json
import os
import select
import socket
from collections.abc import Callable
from typing import Any, Final

from gpubroker.machine import folder

_CHUNK: Final = 1 << 16
_LONGEST_REQUEST: Final = 16 << 20

Handler = Callable[[int], object]
"""Called with the poll events of its file."""


class Loop:
    """Waits for many files at once."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._handlers: dict[int, Handler] = {}

    def watch(self, file: int, events: int, handler: Handler) -> None:
        """Call the handler whenever one of the events is there, from now on; it replaces an earlier one."""
        if file in self._handlers:
            self._poll.modify(file, events)
        else:
            self._poll.register(file, events)
        self._handlers[file] = handler

    def forget(self, file: int) -> None:
        """No longer watch a file. It must still be open."""
        if self._handlers.pop(file, None) is not None:
            self._poll.unregister(file)

    def turn(self, timeout_seconds: float) -> None:
        """Wait for events, at most so long, and handle those that came."""
        for file, events in self._poll.poll(timeout_seconds):
            handler = self._handlers.get(file)
            if handler is not None:  # an earlier handler of this turn may have forgotten it
                handler(events)


class Client:
    """One request and its answer. `on_leave` is called when the asker goes away before the answer."""

    def __init__(self, loop: Loop, connection: socket.socket, on_request: "OnRequest") -> None:
        self.on_leave: Callable[[], None] | None = None
        self._loop, self._connection, self._on_request = loop, connection, on_request
        self._in, self._out = bytearray(), b""
        self._heard = False
        connection.setblocking(False)
        loop.watch(connection.fileno(), select.EPOLLIN, self._on_event)

    def reply(self, **answer: object) -> None:
        """Send the answer and close, as fast as the asker reads."""
        if self._connection.fileno() >= 0:
            self.on_leave = None
            self._out = json.dumps(answer).encode() + b"\n"
            self._send()

    def refuse(self, code: str, detail: str = "") -> None:
        """Answer that it was not done."""
        self.reply(refused=code, detail=detail)

    def _on_event(self, _events: int) -> None:
        try:
            if self._out:
                self._send()
            elif self._heard:
                if not self._connection.recv(_CHUNK):
                    self._close()
            else:
                self._receive()
        except BlockingIOError:
            return
        except OSError:
            self._close()

    def _receive(self) -> None:
        data = self._connection.recv(_CHUNK)
        self._in += data
        if not data or len(self._in) > _LONGEST_REQUEST:
            self._close()
        elif data.endswith(b"\n"):
            self._heard = True
            try:
                request = json.loads(bytes(self._in))
            except ValueError:
                self._close()
                return
            self._in.clear()
            self._on_request(self, request)

    def _send(self) -> None:
        try:
            self._out = self._out[self._connection.send(self._out) :]
        except BlockingIOError:
            pass
        except OSError:
            self._out = b""
        if self._out:
            self._loop.watch(self._connection.fileno(), select.EPOLLOUT, self._on_event)
        else:
            self._close()

    def _close(self) -> None:
        if self._connection.fileno() >= 0:
            self._loop.forget(self._connection.fileno())
            self._connection.close()
        if self.on_leave is not None:
            leave, self.on_leave = self.on_leave, None
            leave()


OnRequest = Callable[[Client, dict[str, Any]], None]


class Server:
    """Listens at `control.sock` in the current folder."""

    def __init__(self, loop: Loop, on_request: OnRequest) -> None:
        self._loop, self._on_request = loop, on_request
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        fresh = f"{folder.SOCKET}~"
        if os.path.lexists(fresh):
            os.unlink(fresh)
        self._listener.bind(fresh)
        self._listener.listen(1024)
        os.rename(fresh, folder.SOCKET)
        loop.watch(self._listener.fileno(), select.EPOLLIN, self._on_event)

    def _on_event(self, _events: int) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        Client(self._loop, connection, self._on_request)
