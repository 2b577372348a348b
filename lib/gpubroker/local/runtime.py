"""One running installation: everything that `gpubroker dev` starts, watches and stops, in this order and back again."""

import asyncio
import contextlib
import logging
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

import uvicorn
from starlette.types import ASGIApp

from gpubroker import adapters, bundle, config, outbox, rates, store
from gpubroker.errors import SetupError
from gpubroker.local import ending, gateway, processes, triggers
from gpubroker.local.broker import Broker
from gpubroker.local.installation import Installation
from gpubroker.local.schedule import Schedule
from gpubroker.local.servers import Server
from gpubroker.local.triggers import Destination
from gpubroker.providers.base import Instance
from gpubroker.providers.registry import enabled

_HEALTHY_SECONDS: Final = 30.0
_FIRST_TICK_SECONDS: Final = 10.0
_REQUEST_SECONDS: Final = 1
_CLOSE_SECONDS: Final = 1.0
_WATCH_SECONDS: Final = 0.5
_DEATHS: Final = 5
_DEATHS_WITHIN_SECONDS: Final = 60.0

T = TypeVar("T")


class _Told(Exception):
    """A signal came before everything ran."""


class Runtime:
    """Everything of one `gpubroker dev`. `listener` listens already, at `url`; `early` are signals that came before."""

    def __init__(
        self, installation: Installation, listener: socket.socket, url: str, *, end_pods: bool, early: Sequence[int]
    ) -> None:
        self._installation = installation
        self._listener = listener
        self._url = url
        self._end_pods = end_pods
        self._early = early
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._working: asyncio.Future[Any] | None = None
        self._is_ready = False
        self._broker: Broker | None = None
        self._schedule: Schedule | None = None
        self._serving: dict[str, tuple[_HttpServer, asyncio.Task[None]]] = {}
        self._deaths: deque[float] = deque(maxlen=_DEATHS)

    async def run(self, announce: Callable[[], None]) -> None:
        """Start everything, `announce` when every function answers, and end at a signal.

        Raises SetupError for what cannot be started, and for what died too often.
        """
        for number in processes.ENDING:
            asyncio.get_running_loop().add_signal_handler(number, self._tell)
        if self._early:
            self._tell()
        try:
            await self._set_up()
            await self._open()
            self._is_ready = True
            announce()
            await self._watch()
        except _Told:
            pass
        finally:
            await self._close()

    def _tell(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _set_up(self) -> None:
        made = self._installation
        await self._do("PostgreSQL", made.start_postgres)
        await self._do("Valkey", made.start_valkey)
        applied = await self._do("schema", made.migrate)
        if applied:
            say(f"applied {len(applied)} migrations, up to {applied[-1]}")

    async def _do(self, what: str, work: Callable[[], T]) -> T:
        began = time.monotonic()
        result = await self._unless_told(_in_thread(work))
        say(f"{what}: {time.monotonic() - began:.1f} s")
        return result

    async def _unless_told(self, work: Awaitable[T]) -> T:
        task = self._working = asyncio.ensure_future(work)
        told = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((task, told), return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if self._stop.is_set():
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            if asyncio.iscoroutine(work):  # a thread's work cannot be cancelled: the end waits for it
                task.cancel()
            raise _Told
        return task.result()

    async def _open(self) -> None:
        internal = socket.create_server(("127.0.0.1", 0))
        internal_url = f"http://127.0.0.1:{internal.getsockname()[1]}"
        settings = self._installation.compose(self._url, f"{internal_url}/broker")
        config.use(settings)
        for name in enabled(settings):
            adapters.mine().get(name)  # a setting that is wrong shall be said now
        began = time.monotonic()
        apps = gateway.load({function.name: bundle.source(function.name) for function in bundle.FUNCTIONS})
        say(f"{len(apps)} functions: {time.monotonic() - began:.1f} s")
        resources = triggers.read(bundle.home() / "eventing")
        address = _addresses(internal_url, resources)
        self._broker = Broker(resources.triggers, address, url=f"{internal_url}/broker")
        self._schedule = Schedule(resources.sources, address, every=settings.tick_seconds)
        front = gateway.Gateway(apps)
        await self._serve(internal_url, gateway.Internal(apps, self._broker), internal)
        await self._serve(self._url, front, self._listener)
        await self._unless_told(_wait_until_healthy(front))
        began = time.monotonic()
        late = await self._unless_told(self._schedule.tick(_FIRST_TICK_SECONDS))
        said = f"not done yet: {', '.join(late)}" if late else f"{time.monotonic() - began:.1f} s"
        say(f"first ticks: {said}")
        self._schedule.start()

    async def _serve(self, url: str, app: ASGIApp, listener: socket.socket) -> None:
        server = _HttpServer(
            uvicorn.Config(
                app, http="httptools", ws="none", lifespan="off", log_config=None, access_log=False,
                proxy_headers=False, server_header=False, timeout_graceful_shutdown=_REQUEST_SECONDS,
            )
        )  # fmt: skip
        task = asyncio.get_running_loop().create_task(server.serve([listener]))
        self._serving[url] = server, task
        while not server.started and not task.done():  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)

    async def _watch(self) -> None:
        """Wait for a signal; meanwhile bring back servers that died."""
        while not self._stop.is_set():
            for server in self._installation.servers:
                if not server.is_alive():
                    await self._revive(server)
            if any(task.done() for _, task in self._serving.values()):
                msg = f"the HTTP server at {self._url} ended by itself"
                raise SetupError(msg)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), _WATCH_SECONDS)

    async def _revive(self, server: Server) -> None:
        say(f"{server.title} (process {server.pid}) died; starting it again")
        self._deaths.append(time.monotonic())
        if len(self._deaths) == _DEATHS and self._deaths[-1] - self._deaths[0] < _DEATHS_WITHIN_SECONDS:
            msg = f"{server.title} dies again and again; what it said is in {server.folder / 'log'}"
            raise SetupError(msg)
        await self._do(server.title, server.start)

    async def _close(self) -> None:
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # requests that are cut off now are no faults
        if self._is_ready and self._end_pods and self._stop.is_set():
            await self._end_serving(self._url)  # nobody asks for new pods while the others end
            await self._see_to_pods(ending.end_pods(self._installation.settings, self._hurry))
        elif self._is_ready:
            await self._see_to_pods(ending.list_pods(self._installation.settings))
        if self._schedule is not None:
            await self._schedule.close()
        await self._end_serving(*self._serving)
        await _quietly(outbox.close(_CLOSE_SECONDS / 2))
        await _quietly(rates.limiter.close())
        if self._broker is not None:
            await _quietly(self._broker.close())
        await _quietly(adapters.close())
        await _quietly(store.close())
        await _in_thread(self._installation.stop)
        if self._working is not None and not self._working.done():
            await asyncio.wait((self._working,), timeout=2 * _CLOSE_SECONDS)
            await _in_thread(self._installation.stop)
        self._installation.forget_run()

    async def _end_serving(self, *urls: str) -> None:
        serving = [self._serving[url] for url in urls]
        for server, _ in serving:
            server.should_exit = True
        if serving:
            await asyncio.wait([task for _, task in serving], timeout=_REQUEST_SECONDS + _CLOSE_SECONDS)

    async def _see_to_pods(self, work: Coroutine[Any, Any, Sequence[Instance]]) -> None:
        try:
            left = await work
        except Exception as error:  # noqa: BLE001 - whatever fails here, the end goes on
            say(f"pods of this machine cannot be listed: {error or type(error).__name__}")
            return
        if left:
            say(ending.describe(left))


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the runtime has its own, for all of its servers."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return contextlib.nullcontext()


def say(line: str) -> None:
    """Tell the person at the terminal how it goes."""
    sys.stderr.write(f"{line}\n")


def _addresses(internal_url: str, resources: triggers.Resources) -> Callable[[Destination], str]:
    """Make what finds a Service here. Raises SetupError when a resource names one that is no function."""
    used = [each for t in resources.triggers for each in (t.subscriber, t.delivery.dead_letter) if each]
    for destination in (*used, *(source.sink for source in resources.sources)):
        if destination.service is not None:
            bundle.function(destination.service)

    def address(destination: Destination) -> str:
        if destination.service is None:
            return destination.uri or ""
        return f"{internal_url}/{destination.service}{destination.uri or ''}"

    return address


async def _wait_until_healthy(front: gateway.Gateway) -> None:
    until = time.monotonic() + _HEALTHY_SECONDS
    while failing := await front.unhealthy():
        if time.monotonic() > until:
            msg = f"these functions do not answer after {_HEALTHY_SECONDS:.0f} s: {', '.join(failing)}"
            raise SetupError(msg)
        await asyncio.sleep(0.1)


async def _quietly(work: Awaitable[object]) -> None:
    """Let something end, but neither long nor loud."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(_CLOSE_SECONDS):
            await work


def _in_thread(work: Callable[[], T]) -> "asyncio.Future[T]":
    """Run something that blocks. The thread holds nothing up: unlike an executor's it is not waited for at the end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # pyright: ignore[reportArgumentType] - a result where there is no error

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - all of it belongs to who waits
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, daemon=True).start()
    return future
