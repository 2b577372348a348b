"""HTTP clients that cost little themselves: requests are bytes made before, answers are only counted."""

import asyncio
import time
from collections.abc import Sequence
from itertools import cycle
from typing import cast

_LENGTH = b"content-length:"


def write_request(path: str, key: str | None = None, *, close: bool = False) -> bytes:
    """A GET as it goes over the wire."""
    lines = [f"GET {path} HTTP/1.1", "Host: bench"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    lines += ["Connection: close"] if close else []
    return "\r\n".join([*lines, "", ""]).encode()


class _Caller(asyncio.Protocol):
    """One connection: the next request goes out when the answer of the last is whole."""

    def __init__(self, requests: Sequence[bytes], most: int, until: float) -> None:
        self.seconds: list[float] = []
        self.done = asyncio.get_running_loop().create_future()
        self._requests = cycle(requests)
        self._most, self._until = most, until
        self._sent_at = 0.0
        self._missing = 0
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one by its methods alone
        self._send()

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        if self._missing == 0:
            self._head += data
            head, end, body = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            if b" 200 " not in head[:16]:
                self._finish(AssertionError(self._head.decode(errors="replace")[:1000]))
                return
            place = head.lower().index(_LENGTH) + len(_LENGTH)
            self._missing = int(head[place:].partition(b"\r\n")[0]) - len(body)
            self._head = b""
        else:
            self._missing -= len(data)
        if self._missing == 0:
            self._count()

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._sent_at)
        if len(self.seconds) >= self._most or now >= self._until:
            self._finish(None)
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(exc or ConnectionResetError("the server closed the connection"))

    def _finish(self, error: Exception | None) -> None:
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)
            self._transport.close()


async def call(
    port: int, connections: Sequence[Sequence[bytes]], *, most: int = 10**9, seconds: float = 60.0
) -> list[float]:
    """Keep as many connections busy as there are lists of requests. Returns the seconds that each request took.

    Each ends after `most` requests, or with the first answer after so many seconds. Any answer but 200 is an error.
    """
    until = time.perf_counter() + seconds
    loop = asyncio.get_running_loop()
    callers = [
        (await loop.create_connection(lambda requests=requests: _Caller(requests, most, until), "127.0.0.1", port))[1]
        for requests in connections
    ]
    await asyncio.gather(*(caller.done for caller in callers))
    return [taken for caller in callers for taken in caller.seconds]
