"""CloudEvents in: the strict decoding, the delivery guard, and the answers that a Broker understands.

A consumer answers 204 with no body when the event is done, was done before, or is none of ours (any body would be taken for
a bad gateway and delivered again); 422 for what is malformed (dead letter); 503 for "again later". Never 404 or 409:
Knative retries those.
"""

import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from gpubroker import errors, outbox, store
from gpubroker.bodies import parse_json, read_body
from gpubroker.events import BY_TYPE, TICK
from gpubroker.times import parse_time
from gpubroker.web import Served

log = logging.getLogger("gpubroker.consumer")

_NAME: Final = re.compile(r"[a-z0-9]{1,20}")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_STRUCTURED: Final = "application/cloudevents+json"
_BATCH: Final = "application/cloudevents-batch+json"
_MOST_IN_A_BATCH: Final = 100
_CORE: Final = frozenset({"specversion", "id", "source", "type", "subject", "time", "datacontenttype", "dataschema"})


class MalformedEvent(errors.GpubrokerError):
    """This is no CloudEvent 1.0, or not one that belongs here."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """An event as it came. Only its ids are believed; all else is read from PostgreSQL."""

    id: str
    type: str
    source: str
    subject: str | None
    data: object
    extensions: dict[str, str]


class Consumer(Served):
    """One event-driven function, as an ASGI application."""

    def __init__(self, name: str, handler: Callable[[Incoming], Awaitable[None]], *, any_type: bool = False) -> None:
        super().__init__()
        self.name = name
        self._handler = handler
        self._any_type = any_type

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take one event."""
        request = Request(scope, receive)
        response = await self._answer(request)
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        if request.method in ("GET", "HEAD"):
            return await _check_health(request)
        if request.method != "POST":
            return _refuse(405, "events come by POST")
        try:
            event = await decode(request)
            self._check_type(event)
        except (MalformedEvent, errors.Problem) as error:
            log.warning("%s: malformed event: %s", self.name, error)
            return _refuse(422, str(error))
        outbox.traceparent.set(event.extensions.get("traceparent"))
        try:
            await self._handler(event)
        except errors.Unavailable as error:
            log.warning("%s: event %s later: %s", self.name, event.id, error.__cause__ or error)
            return _refuse(503, "try again later")
        except Exception:
            log.exception("%s: event %s (%s) failed", self.name, event.id, event.type)
            return _refuse(503, "try again later")
        return Response(status_code=204)

    def _check_type(self, event: Incoming) -> None:
        if self._any_type:
            return
        declared = BY_TYPE.get(event.type)
        if event.type != TICK and (declared is None or self.name not in declared.consumers):
            msg = f"{self.name} does not consume {event.type}"
            raise MalformedEvent(msg)


def _refuse(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status_code=status)


async def _check_health(request: Request) -> Response:
    if request.url.path != "/healthz":
        return _refuse(405, "events come by POST")
    try:
        await store.check()
    except Exception as error:  # noqa: BLE001 - whatever it is, this function does not work now
        log.warning("not healthy: %s", error)
        return _refuse(503, "not healthy")
    return JSONResponse({"status": "ok"})


async def decode(request: Request) -> Incoming:
    """Read a CloudEvent 1.0 in binary or structured mode. Raises MalformedEvent, or BodyTooLarge."""
    raw = await read_body(request)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == _STRUCTURED:
        return _decode_structured(raw)
    if media_type.startswith("application/cloudevents"):
        msg = f"{media_type} is not taken here, send one event"
        raise MalformedEvent(msg)
    attributes = {name.removeprefix("ce-"): value for name, value in request.headers.items() if name.startswith("ce-")}
    if raw and media_type not in ("application/json", ""):
        msg = f"data of {media_type} is not JSON"
        raise MalformedEvent(msg)
    return _check(cast("dict[str, object]", attributes), _load(raw) if raw else None)


async def decode_all(request: Request) -> list[Incoming]:
    """Read one CloudEvent in any mode, or a batch of up to 100. Raises MalformedEvent for any that is none, or BodyTooLarge."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _BATCH:
        return [await decode(request)]
    whole = _load(await read_body(request))
    if not isinstance(whole, list) or len(cast("list[object]", whole)) > _MOST_IN_A_BATCH:
        msg = f"a batch is a JSON array of up to {_MOST_IN_A_BATCH} events"
        raise MalformedEvent(msg)
    return [_decode_members(each) for each in cast("list[object]", whole)]


def _decode_structured(raw: bytes) -> Incoming:
    return _decode_members(_load(raw))


def _decode_members(whole: object) -> Incoming:
    if not isinstance(whole, dict):
        msg = "a structured event is a JSON object"
        raise MalformedEvent(msg)
    members = dict(cast("dict[str, object]", whole))
    if "data_base64" in members:
        msg = "data_base64 is not JSON"
        raise MalformedEvent(msg)
    data = members.pop("data", None)
    return _check({name: value for name, value in members.items() if value is not None}, data)


def _load(raw: bytes) -> object:
    try:
        return parse_json(raw)
    except errors.Problem as error:
        msg = f"the data is not JSON as it is taken here: {error}"
        raise MalformedEvent(msg) from None


def _check(attributes: dict[str, object], data: object) -> Incoming:
    if attributes.get("specversion") != "1.0":
        msg = f"specversion is {attributes.get('specversion')!r}, not '1.0'"
        raise MalformedEvent(msg)
    for name in ("id", "source", "type"):
        value = attributes.get(name)
        if not isinstance(value, str) or not value.strip():
            msg = f"{name} must be a text that is not empty"
            raise MalformedEvent(msg)
    for name in ("subject", "time", "datacontenttype", "dataschema"):
        if name in attributes and (not isinstance(attributes[name], str) or not attributes[name]):
            msg = f"{name} must be a text that is not empty"
            raise MalformedEvent(msg)
    if "time" in attributes:
        try:
            parse_time(cast("str", attributes["time"]))
        except ValueError as error:
            msg = f"time {error}"
            raise MalformedEvent(msg) from None
    for name, value in attributes.items():
        if not _NAME.fullmatch(name) or (isinstance(value, str) and _CONTROL.search(value)):
            msg = f"{name!r} is no attribute name, or holds a control character"
            raise MalformedEvent(msg)
    return Incoming(
        id=cast("str", attributes["id"]),
        type=cast("str", attributes["type"]),
        source=cast("str", attributes["source"]),
        subject=cast("str | None", attributes.get("subject")),
        data=data,
        extensions={name: str(value) for name, value in attributes.items() if name not in _CORE},
    )
