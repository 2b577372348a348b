"""The local PingSources: Knative's clock, which posts straight to a Service, past the Broker.

As in Knative a tick waits for none before it: who consumes ticks must not mind two at once.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import httpx
from cronsim import CronSim, CronSimError

from gpubroker.errors import SetupError
from gpubroker.events import TICK
from gpubroker.local.envelope import Envelope
from gpubroker.local.triggers import Destination, PingSource
from gpubroker.times import format_time, now

log = logging.getLogger("gpubroker.local.schedule")

_TIMEOUT_SECONDS: Final = 310.0
_DESCRIPTORS: Final = {
    "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@hourly": "0 * * * *",
}  # fmt: skip


class Schedule:
    """All PingSources. `every` seconds replaces their cron lines; `address` says where a Service is reached."""

    def __init__(
        self, sources: Sequence[PingSource], address: Callable[[Destination], str], *, every: float | None = None
    ) -> None:
        for source in sources:
            next_time(source, now())
        self._sources = sources
        self._address = address
        self._every = every
        self._clocks: list[asyncio.Task[None]] = []
        self._ticks: set[asyncio.Task[bool]] = set()
        self._client = httpx.AsyncClient(trust_env=False, timeout=_TIMEOUT_SECONDS)

    async def tick(self, seconds: float) -> list[str]:
        """Tick every source once, now. Name those whose sink did not take it within so many seconds; they go on."""
        sent = {self._send_soon(source): source.name for source in self._sources}
        if not sent:
            return []
        done, _ = await asyncio.wait(sent, timeout=seconds)
        return [name for task, name in sent.items() if task not in done or not task.result()]

    def start(self) -> None:
        """Let the clocks run."""
        for source in self._sources:
            run = self._run_every(source, self._every) if self._every else self._run_cron(source)
            self._clocks.append(asyncio.get_running_loop().create_task(run))

    async def close(self) -> None:
        """Stop the clocks and give up what is being posted."""
        ending: list[asyncio.Task[Any]] = [*self._clocks, *self._ticks]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        await self._client.aclose()

    async def _run_every(self, source: PingSource, seconds: float) -> None:
        due = time.monotonic()
        while True:
            due = max(due + seconds, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            self._send_soon(source)

    async def _run_cron(self, source: PingSource) -> None:
        last = now()
        while True:
            # A sleep may end a moment early by the wall clock: no time is taken twice.
            last = next_time(source, max(last, now()))
            while (left := (last - now()).total_seconds()) > 0:  # noqa: ASYNC110 - the clock is no event
                await asyncio.sleep(left)
            self._send_soon(source)

    def _send_soon(self, source: PingSource) -> asyncio.Task[bool]:
        task = asyncio.get_running_loop().create_task(self._send(source))
        self._ticks.add(task)
        task.add_done_callback(self._ticks.discard)
        return task

    async def _send(self, source: PingSource) -> bool:
        event = make_event(source)
        try:
            answer = await self._client.post(
                self._address(source.sink), headers=event.headers(), content=event.data or b""
            )
        except httpx.HTTPError as error:
            log.warning("tick of %s was not taken: %s", source.name, error or type(error).__name__)
            return False
        if not answer.is_success:
            log.warning("tick of %s was not taken: %d", source.name, answer.status_code)
        return answer.is_success


def make_event(source: PingSource) -> Envelope:
    """Make the event that Knative's PingSource would send now."""
    attributes = {
        "specversion": "1.0",
        "id": str(uuid.uuid4()),
        "type": TICK,
        "source": f"/apis/v1/namespaces/{source.namespace}/pingsources/{source.name}",
        "time": format_time(now()),
    }
    if source.data is None:
        return Envelope(attributes)
    if source.content_type:
        attributes["datacontenttype"] = source.content_type
    return Envelope(attributes, source.data.encode())


def next_time(source: PingSource, after: datetime) -> datetime:
    """When the source ticks next after a moment. Raises SetupError for a schedule or time zone that is none."""
    line = _DESCRIPTORS.get(source.schedule.strip(), source.schedule).replace("?", "*")
    try:
        zone = ZoneInfo(source.timezone)
        return next(CronSim(line, after.astimezone(zone))).astimezone(after.tzinfo)
    except (CronSimError, ZoneInfoNotFoundError, ValueError, StopIteration) as error:
        msg = f"PingSource {source.name}: schedule '{source.schedule}' in {source.timezone}: {error or 'never comes'}"
        raise SetupError(msg) from None
