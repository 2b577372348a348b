"""The local broker: takes CloudEvents, answers 202, and delivers each to every Trigger that it passes.

It behaves as Knative's channel-based Broker with `async-handler` does, so that what works here works there: binary mode
over HTTP, retries with backoff on network errors, 404, 408, 409, 429 and 5xx, the dead letter sink for all that failed,
replies as new events, a limit of hops. What it holds is in memory and lost with it: delivery is at most once across its
own restart. That is meant: an event only wakes, and the ticks drive what was lost.
"""

import asyncio
import base64
import logging
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from gpubroker.local.envelope import Envelope, NoCloudEvent, is_cloudevent, parse
from gpubroker.local.triggers import Destination, Trigger
from gpubroker.times import format_time, now

log = logging.getLogger("gpubroker.local.broker")

HOPS: Final = 255
"""How often replies to replies may come back, as in Knative's MAX_TTL."""

_TTL: Final = "knativebrokerttl"
_HOPS: Final = re.compile(r"[0-9]{1,9}")
_ARRIVAL: Final = "knativearrivaltime"
_PASSED_ON: Final = ("traceparent", "tracestate", "x-request-id")
_LARGEST_BODY: Final = 1024 * 1024
_ERROR_DATA: Final = 1024
_DEFAULT_TIMEOUT_SECONDS: Final = 600.0
_AT_ONCE: Final = 32
"""Requests at once for one Trigger: a slow subscriber holds up no other, and httpx is slow with hundreds."""
_RETRIED: Final = frozenset({404, 408, 409, 429})
_BAD_GATEWAY: Final = 502


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why an attempt failed. Without an answer `code` is 500, as Knative writes it."""

    code: int
    data: bytes
    retried: bool


@dataclass(frozen=True, slots=True)
class _Done:
    """The subscriber took it, and answered with an event or without."""

    reply: Envelope | None


class _Full(Exception):
    """So much is in flight that no more is taken."""


class _TooManyHops(Exception):
    """An event came back as the reply to a reply too often."""


class Broker:
    """An ASGI application. `address` says where a Service is reached; `url` is the broker's own, for dead letters."""

    def __init__(
        self,
        triggers: Sequence[Trigger],
        address: Callable[[Destination], str],
        *,
        url: str = "/broker",
        most_events: int = 5_000,
        most_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self._triggers = triggers
        self._address = address
        self._url = url
        self._most_events = most_events
        self._most_bytes = most_bytes
        self._bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._places = {trigger.name: asyncio.Semaphore(_AT_ONCE) for trigger in triggers}
        self._client = httpx.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(_DEFAULT_TIMEOUT_SECONDS, connect=10, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=_AT_ONCE),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take one event: 202, or 400 for what is none, 413, 429 when too much is in flight."""
        request = Request(scope, receive)
        response = await self._answer(request)
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        if request.method != "POST":
            return PlainTextResponse("events come by POST\n", 405, {"Allow": "POST"})
        try:
            body = await _read(request)
            if body is None:
                return PlainTextResponse("an event may have 1 MiB\n", 413)
            self._accept(parse(request.headers, body), {n: v for n in _PASSED_ON if (v := request.headers.get(n))})
        except (NoCloudEvent, _TooManyHops) as error:
            return PlainTextResponse(f"{error}\n", 400)
        except _Full:
            return PlainTextResponse("too many events are in flight\n", 429, {"Retry-After": "1"})
        return Response(status_code=202)

    async def settle(self) -> None:
        """Wait until nothing is in flight: every delivery made, given up, or dead-lettered."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Drop what is in flight and let go of connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    def _accept(self, event: Envelope, headers: Mapping[str, str]) -> None:
        """Begin the deliveries of one event. Raises _Full or _TooManyHops."""
        hops = event.attributes.get(_TTL, "")
        left = max(int(hops) - 1, 0) if _HOPS.fullmatch(hops) else HOPS
        if left == 0:
            msg = "this event has made too many hops"
            raise _TooManyHops(msg)
        received = event.extended(**{_TTL: None, _ARRIVAL: format_time(now())})
        taking = [trigger for trigger in self._triggers if trigger.filter(received.attributes) is not False]
        size = len(event.data or b"") + sum(len(text) for pair in event.attributes.items() for text in pair)
        if len(self._tasks) + len(taking) > self._most_events or self._bytes + size * len(taking) > self._most_bytes:
            raise _Full
        for trigger in taking:
            self._spawn(self._deliver(trigger, received, left, headers), size)

    def _spawn(self, work: Coroutine[Any, Any, None], size: int) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        self._bytes += size

        def done(ended: asyncio.Task[None]) -> None:
            self._tasks.discard(ended)
            self._bytes -= size

        task.add_done_callback(done)

    async def _deliver(self, trigger: Trigger, event: Envelope, hops: int, headers: Mapping[str, str]) -> None:
        target = self._address(trigger.subscriber)
        outcome = await self._send(trigger, target, event, {**headers, "prefer": "reply"})
        if isinstance(outcome, _Done):
            if outcome.reply is None:
                return
            try:
                self._accept(outcome.reply.extended(**{_TTL: str(hops)}), headers)
            except (_Full, _TooManyHops) as error:
                target, outcome = self._url, _Failure(400, str(error).encode(), retried=False)
            else:
                return
        await self._bury(trigger, event.extended(**{_TTL: str(hops)}), target, outcome, headers)

    async def _bury(
        self, trigger: Trigger, event: Envelope, target: str, failure: _Failure, headers: Mapping[str, str]
    ) -> None:
        what = f"{event.attributes['type']} {event.attributes['id']} for {trigger.name}"
        if trigger.delivery.dead_letter is None:
            log.warning("dropped: %s: %d after %d retries", what, failure.code, trigger.delivery.retry)
            return
        log.warning("dead letter: %s: %d from %s", what, failure.code, target)
        marked = event.extended(
            knativeerrordest=target,
            knativeerrorcode=str(failure.code),
            knativeerrordata=base64.b64encode(failure.data).decode()[:_ERROR_DATA],
        )
        outcome = await self._send(trigger, self._address(trigger.delivery.dead_letter), marked, headers)
        if isinstance(outcome, _Failure):
            log.error("lost: %s: the dead letter sink answers %d", what, outcome.code)

    async def _send(
        self, trigger: Trigger, target: str, event: Envelope, headers: Mapping[str, str]
    ) -> _Done | _Failure:
        delivery = trigger.delivery
        seconds = _DEFAULT_TIMEOUT_SECONDS if delivery.timeout is None else delivery.timeout
        attempt = 0
        while True:
            async with self._places[trigger.name]:
                outcome = await self._post(target, event, headers, seconds)
            if isinstance(outcome, _Done) or not outcome.retried or attempt >= delivery.retry:
                return outcome
            await asyncio.sleep(delivery.pause(attempt))
            attempt += 1

    async def _post(self, target: str, event: Envelope, headers: Mapping[str, str], seconds: float) -> _Done | _Failure:
        headers = {**headers, **event.headers()}
        body = bytearray()
        try:
            async with (
                asyncio.timeout(seconds),
                self._client.stream("POST", target, headers=headers, content=event.data or b"") as answer,
            ):
                async for chunk in answer.aiter_bytes():
                    body += chunk
                    if len(body) > _LARGEST_BODY:
                        return _Failure(_BAD_GATEWAY, b"the answer is larger than 1 MiB", retried=True)
        except (httpx.HTTPError, TimeoutError) as error:
            return _Failure(500, f"dispatch error: {error or type(error).__name__}".encode(), retried=True)
        return _judge(answer, bytes(body))


async def _read(request: Request) -> bytes | None:
    """Read a body, None when it is larger than 1 MiB."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > _LARGEST_BODY:
                return None
    except ClientDisconnect:
        msg = "the body ended early"
        raise NoCloudEvent(msg) from None
    return bytes(body)


def _judge(answer: httpx.Response, body: bytes) -> _Done | _Failure:
    if not answer.is_success:
        again = answer.is_server_error or answer.status_code in _RETRIED
        return _Failure(answer.status_code, body, retried=again)
    if not is_cloudevent(answer.headers):
        return _Failure(_BAD_GATEWAY, body, retried=True) if body else _Done(None)
    try:
        return _Done(parse(answer.headers, body))
    except NoCloudEvent as error:
        return _Failure(_BAD_GATEWAY, str(error).encode(), retried=True)
