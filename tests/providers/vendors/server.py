"""What every vendor's simulator is made of: machines, a clock, faults, and the server that speaks for it."""

import contextlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from tests.providers.vendors import described

from gpubroker.providers.base import Billing, Life
from gpubroker.providers.http.adapter import HttpProvider


@dataclass(frozen=True)
class Request:
    """A request as the vendor gets it. `json` is None without a body."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body) if self.body else None


@dataclass(frozen=True)
class Answer:
    """An answer; `body` is bytes as they are, or anything that is JSON. `hold` keeps the connection open after it, with signs of
    life.
    """

    status: int
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    hold: bool = False

    @property
    def raw(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


@dataclass(frozen=True)
class Fault:
    """One misbehaviour. `after`: what was asked for happens first. `answer` None: see `how` (hang, reset, cut; pass: none)."""

    how: str = "answer"
    answer: Answer | None = None
    after: bool = False


PASS = Fault("pass", after=True)
HANG, RESET, RESET_AFTER = Fault("hang"), Fault("reset"), Fault("reset", after=True)
HANG_AFTER = Fault("hang", after=True)
CUT = Fault("cut", after=True)
"""The connection ends in the middle of the answer."""
GARBAGE = Fault(answer=Answer(200, b"\x00\xff}{ not JSON"), after=True)
HTML = Fault(
    answer=Answer(200, b"<html><body>Checking your browser</body></html>", content_type="text/html"), after=True
)
EMPTY = Fault(answer=Answer(200), after=True)
NOTHING = Fault(answer=Answer(200, {}), after=True)
NULL = Fault(answer=Answer(200, b"null"), after=True)
HUGE = Fault("huge", after=True)
THROTTLED_TEXT = Fault(answer=Answer(429, b"slow down, please", content_type="text/plain"))


def status(code: int, *, after: bool = False, **headers: str) -> Fault:
    """An error page of a proxy, in front of the vendor."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    page = Answer(code, b"<html>error</html>", fields, "text/html")
    return Fault(answer=page, after=after)


@dataclass
class Machine:
    """One machine at the vendor: what it was asked to be, and when it ran. `status` replaces what it would say of itself."""

    id: str
    name: str
    asked: Any
    offer: str
    born_at: float
    life: Life = "running"
    status: str | None = None
    runs: list[list[float]] = field(default_factory=list)
    gone_at: float | None = None
    shown_at: float = 0.0
    """Until then neither lists nor look-ups show it."""
    log: str = "one\ntwo\nthree\n"

    @property
    def started_at(self) -> float | None:
        return self.runs[-1][0] if self.runs else None

    def seconds(self, now: float) -> float:
        """How long it ran."""
        return sum((run[1] if len(run) > 1 else now) - run[0] for run in self.runs)


Handler = Callable[..., Answer]


def serves(method: str, path: str, operation: str | Callable[[Request], str]) -> Callable[[Handler], Handler]:
    """Mark a method as what answers here. `operation` is one of offers create list get stop start restart terminate logs
    exec account, or says which of them a request is.
    """

    def mark(handler: Handler) -> Handler:
        handler.route = (method, path, operation)  # type: ignore[attr-defined]
        return handler

    return mark


class Vendor:
    """A vendor's simulator. A subclass has the vendor's paths, statuses, shapes and bill; the rest is here."""

    provider: ClassVar[type[HttpProvider]]
    description: ClassVar[str | None] = None
    """The file of its API description in the shared folder."""
    described_below: ClassVar[str] = ""
    """What the base URL's path has more than the description's paths."""
    variables: ClassVar[Mapping[str, str]]
    """The credentials, as settings."""
    statuses: ClassVar[Mapping[str, tuple[Life, Billing]]]
    """Every status that it has, and what it means."""

    def __init__(self) -> None:
        self.url = ""
        self.violations: list[str] = []
        self.used: set[str] = set()
        self.routes = [
            (m, re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", p) + "/?"), op, getattr(self, name))
            for name in dir(type(self))
            for m, p, op in [getattr(getattr(type(self), name), "route", (None, "", ""))]
            if m is not None
        ]
        self.released = threading.Event()
        self.lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """As new, for the next test."""
        self.released.set()
        self.released = threading.Event()
        self.machines: dict[str, Machine] = {}
        self.requests: list[tuple[str, Request]] = []
        self.faults: dict[str, list[Fault]] = {}
        self.shift = 0.0
        self.invisible_seconds = 0.0
        self.boots_at_once = True
        self.is_dead = False
        """The credential was revoked."""
        self.has_room = True
        self.has_money = True
        self.is_empty = False
        """Listings say that there is nothing."""
        self.bears_twins = False
        self.dearer = 1.0
        """What prices are multiplied with."""
        self.extras: dict[str, Any] = {}
        """Fields that nobody knows, in every object that the vendor answers with."""
        self.violations.clear()

    # What a subclass says

    def is_authentic(self, request: Request) -> bool:
        """Whether the request carries the credential."""
        raise NotImplementedError

    def refusal(self, code: int, detail: str) -> Answer:
        """An error in the vendor's shape."""
        raise NotImplementedError

    def price(self, offer_id: str, disk_gb: int) -> int:
        """What the vendor charges for this while it runs, micro-USD per hour."""
        raise NotImplementedError

    def bill(self, machine: Machine) -> int:
        """The vendor's own bill of a machine up to now, micro-USD."""
        raise NotImplementedError

    def labels(self, machine: Machine) -> list[str]:
        """Every text by which the machine may be found again."""
        raise NotImplementedError

    def received(self, machine: Machine) -> dict[str, Any]:
        """What the vendor was asked to run: image, args (a list), env, ports (numbers), disk_gb, ssh_key."""
        raise NotImplementedError

    # What a test does

    def plan(self, operation: str, *faults: Fault) -> None:
        """Misbehave at the next calls of this operation."""
        self.faults.setdefault(operation, []).extend(faults)

    def count(self, *operations: str) -> int:
        """How often it was asked for these, or at all."""
        return sum(1 for operation, _ in self.requests if not operations or operation in operations)

    def alive(self) -> list[Machine]:
        return [machine for machine in self.machines.values() if machine.gone_at is None]

    def now(self) -> float:
        return time.time() + self.shift

    def bear(self, name: str, asked: Any, offer: str) -> Machine:
        """A machine comes to be."""
        machine = Machine(
            self.make_id(), name, asked, offer, self.now(), "starting", shown_at=self.now() + self.invisible_seconds
        )
        self.machines[machine.id] = machine
        if self.boots_at_once:
            self.run(machine)
        return machine

    def make_id(self) -> str:
        return f"m{len(self.machines) + 1}x{int(time.time() * 1000) % 100000}"

    def run(self, machine: Machine) -> None:
        if machine.life != "running":
            machine.life = "running"
            machine.runs.append([self.now()])

    def halt(self, machine: Machine, life: Life = "stopped") -> None:
        if machine.life == "running":
            machine.runs[-1].append(self.now())
        machine.life = life

    def end(self, machine: Machine) -> None:
        self.halt(machine, "gone")
        machine.gone_at = self.now()

    def find(self, machine_id: str) -> Machine | None:
        """A machine that the vendor shows."""
        machine = self.machines.get(machine_id)
        return machine if machine and machine.gone_at is None and machine.shown_at <= self.now() else None

    def shown(self) -> list[Machine]:
        """The machines that a listing shows."""
        return [] if self.is_empty else [m for m in self.machines.values() if self.find(m.id)]

    # What the server asks

    def handle(self, request: Request) -> Fault | Answer:
        with self.lock:
            path = request.path.removeprefix(urlsplit(self.url).path.rstrip("/"))
            for method, pattern, operation, handler in self.routes:
                match = pattern.fullmatch(path)
                if method != request.method or match is None:
                    continue
                name = operation(request) if callable(operation) else operation
                self.requests.append((name, request))
                self.used.add(handler.__name__)
                self._check_request(request, path)
                planned = self.faults.get(name) or []
                fault = planned.pop(0) if planned else None
                if fault is not None and not fault.after:
                    return fault
                answer = self._answer(request, handler, match.groupdict())
                self._check_answer(request, path, answer)
                if fault is None or fault.how == "pass":
                    return answer
                return Fault("cut", answer) if fault.how == "cut" else fault
            self.violations.append(f"{request.method} {request.path} is nothing that this vendor serves")
            return Answer(404, b"no such path", content_type="text/plain")

    def _answer(self, request: Request, handler: Handler, parts: dict[str, str]) -> Answer:
        if not self.is_authentic(request) or self.is_dead:
            return self.refusal(401, "the credential is not valid")
        return handler(request, **parts)

    def _check_request(self, request: Request, path: str) -> None:
        known = described.load(self.description) if self.description else None
        if known is not None:
            path = self.described_below + path
            self.violations += known.check_request(request.method, path, request.query, request.json)

    def _check_answer(self, request: Request, path: str, answer: Answer) -> None:
        known = described.load(self.description) if self.description else None
        is_odd = self.extras or any(m.status not in {None, *self.statuses} for m in self.machines.values())
        if known is not None and not is_odd:
            said = known.check_answer(
                request.method, self.described_below + path, answer.status, answer.content_type, answer.raw
            )
            self.violations += [f"the simulator: {one}" for one in said]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    vendor: Vendor

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        split = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(length)
        if len(body) < length:  # the caller gave up in the middle
            self.close_connection = True
            return
        request = Request(self.command, split.path, parse_qs(split.query, keep_blank_values=True), headers, body)
        released = self.vendor.released
        said = self.vendor.handle(request)
        answer = said if isinstance(said, Answer) else said.answer
        how = "answer" if isinstance(said, Answer) else said.how
        if how == "hang":
            released.wait(30)
            self.close_connection = True
        elif how == "reset":
            self._reset()
        elif how == "huge":
            self._pour()
        elif answer is not None:
            self._send(answer, cut=how == "cut", released=released)

    def _send(self, answer: Answer, *, cut: bool, released: threading.Event) -> None:
        body = answer.raw
        lines = [f"HTTP/1.1 {answer.status} said", *(f"{name}: {value}" for name, value in answer.headers.items())]
        if body or answer.status != 204:
            lines.append(f"Content-Type: {answer.content_type}")
        lines.append(f"Date: {formatdate(usegmt=True)}")
        if not answer.hold:
            lines.append(f"Content-Length: {len(body)}")
        self.wfile.write("\r\n".join([*lines, "", ""]).encode() + (body[: len(body) // 2] if cut else body))
        while answer.hold and not released.wait(0.05):
            self.wfile.write(b": alive\n\n")
        self.close_connection = cut or answer.hold

    def _pour(self) -> None:
        """Say far too much."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n[")
        with contextlib.suppress(OSError):
            for _ in range(4):
                self.wfile.write(b'"' + b"x" * (1 << 20) + b'",')
        self.close_connection = True

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.wfile.close()
        self.rfile.close()
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815 - as http.server wants them


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """A connection that was given up is no news."""


@contextlib.contextmanager
def serve(vendor: Vendor, path: str = "") -> Iterator[Vendor]:
    """The vendor on a port of loopback, below `path`."""
    server = _Server(("127.0.0.1", 0), type("_VendorHandler", (_Handler,), {"vendor": vendor}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    vendor.url = f"http://127.0.0.1:{server.server_port}{path}"
    try:
        yield vendor
    finally:
        vendor.released.set()
        server.shutdown()
        thread.join(5)
        server.server_close()
