"""Writing events beside their cause, and publishing them after COMMIT.

The event's row is the truth, the message only wakes. A publish that fails, is lost or comes twice changes nothing but the
time: it is tried again within seconds while this process lives, and the tick publishes what the Broker did not take by then,
and what a consumer has not finished.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from gpubroker import config, store
from gpubroker.events import BY_WHAT, Data
from gpubroker.ids import new_id
from gpubroker.store import Event, Transaction
from gpubroker.store import events as rows
from gpubroker.times import format_time, now

if TYPE_CHECKING:
    import httpx

log = logging.getLogger("gpubroker.outbox")

traceparent: ContextVar[str | None] = ContextVar("traceparent", default=None)
"""The W3C trace context of the request or event being worked on; events pass it on."""

_TIMEOUT_SECONDS: Final = 10.0
_AGAIN_AFTER: Final = (1.0, 3.0, 8.0)
"""Seconds after which what the Broker did not take is sent again, before that is left to the tick: a Broker whose pods are
replaced, or whose address is being told to the nodes, takes it then."""
_CLOSING_SECONDS: Final = 0.1
_publishing: set[asyncio.Task[None]] = set()
_pauses: set[asyncio.Future[bool]] = set()
_client: "httpx.AsyncClient | None" = None


async def write(
    tx: Transaction, what: str, subject: str, data: Data, *, tenant: str | None, agent_id: str | None
) -> Event:
    """Write an event, such as `pod.requested`, into this transaction, with a delivery for each declared consumer."""
    declared = BY_WHAT[what]
    if type(data) is not declared.data:
        msg = f"{what} carries {declared.data.__name__}, not {type(data).__name__}"
        raise TypeError(msg)
    event = Event(
        id=new_id("evt"),
        type=declared.type,
        subject=subject,
        tenant=tenant,
        agent_id=agent_id,
        traceparent=traceparent.get(),
        data=data.model_dump(mode="json"),
        at=now(),
    )
    await rows.add_event(tx, event, declared.consumers)
    return event


def publish_soon(events: Sequence[Event]) -> None:
    """Publish beside whatever is going on; nobody waits for it. Without a Broker the ticks do all."""
    if config.settings().sink_url is None:
        return
    task = asyncio.get_running_loop().create_task(publish(events))
    _publishing.add(task)
    task.add_done_callback(_publishing.discard)


store.after_commit = publish_soon


async def publish(events: Sequence[Event]) -> None:
    """Send events to the Broker and remember those that it took. What it does not take is logged, and left to the tick."""
    left = await _publish_once(events)
    for seconds in _AGAIN_AFTER:
        if not left or not await _pause(seconds):
            return
        left = await _publish_once(left)


async def _pause(seconds: float) -> bool:
    """Wait; false when there is no time for it because the process ends."""
    loop = asyncio.get_running_loop()
    pause: asyncio.Future[bool] = loop.create_future()
    timer = loop.call_later(seconds, _end_pause, pause, True)
    _pauses.add(pause)
    try:
        return await pause
    finally:
        timer.cancel()
        _pauses.discard(pause)


def _end_pause(pause: asyncio.Future[bool], go_on: bool) -> None:  # noqa: FBT001 - the loop calls it
    if not pause.done():
        pause.set_result(go_on)


async def _publish_once(events: Sequence[Event]) -> list[Event]:
    """Send each once, and give those that were not taken."""
    results = await asyncio.gather(*(_send(event) for event in events))
    taken = [event.id for event, was_taken in zip(events, results, strict=True) if was_taken]
    left = [event for event, was_taken in zip(events, results, strict=True) if not was_taken]
    if not taken:
        return left
    try:
        async with (await store.pool()).connection() as conn, conn.transaction():
            await conn.execute("SET LOCAL ROLE gpubroker_public")
            await rows.mark_published(conn, taken)
    except Exception as error:  # noqa: BLE001 - published once more is harmless, and nobody waits for an answer
        log.warning("published events could not be marked: %s", type(error).__name__)
    return left


async def _send(event: Event) -> bool:
    # After the answer, so that no cold start pays for it; cloudevents types to_binary in part.
    from cloudevents.conversion import to_binary  # noqa: PLC0415 # pyright: ignore[reportUnknownVariableType]
    from cloudevents.http import CloudEvent  # noqa: PLC0415

    attributes = {
        "id": event.id,
        "type": event.type,
        "source": f"/gpubroker/{config.settings().owner}",
        "subject": event.subject,
        "time": format_time(event.at),
        "tenant": event.tenant,
        "agent": event.agent_id,
        "traceparent": event.traceparent,
        "datacontenttype": "application/json",
    }
    made = CloudEvent({name: value for name, value in attributes.items() if value is not None}, event.data)
    headers, body = to_binary(made)
    try:
        token = config.settings().variable("GPUBROKER_SINK_TOKEN")  # read each time: the kubelet replaces its file
        if token:
            headers = {**headers, "Authorization": f"Bearer {token}"}
        answer = await _http().post(config.settings().sink_url or "", headers=headers, content=body)
    except Exception as error:  # noqa: BLE001 - whatever it was, the row is still there
        log.warning("event %s (%s) was not published: %s", event.id, event.type, type(error).__name__)
        return False
    if not answer.is_success:
        log.warning("event %s (%s) was not taken by the Broker: %d", event.id, event.type, answer.status_code)
    return answer.is_success


def _http() -> "httpx.AsyncClient":
    global _client  # noqa: PLW0603 - one connection pool per process, made at the first publish
    if _client is None:
        import httpx  # noqa: PLC0415 - 100 ms that no cold start shall pay

        _client = httpx.AsyncClient(timeout=_TIMEOUT_SECONDS, trust_env=False)
    return _client


async def close(seconds: float = _TIMEOUT_SECONDS) -> None:
    """Let what is being published end, at most so many seconds, and close the connection to the Broker."""
    global _client
    until = time.monotonic() + seconds
    while _publishing and time.monotonic() < until:
        for pause in [*_pauses]:  # those too that begin meanwhile
            _end_pause(pause, False)
        await asyncio.wait(_publishing, timeout=_CLOSING_SECONDS)
    closing, _client = _client, None
    if closing is not None:
        await closing.aclose()
