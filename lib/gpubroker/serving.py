"""One function as a process: `gpubroker serve <name>`, under uvicorn with uvloop and httptools."""

import asyncio
import gc
import logging
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from gpubroker import bundle, config, errors, framework, ids

if TYPE_CHECKING:
    import uvicorn

ANYWHERE = "0.0.0.0"  # noqa: S104 - a container's port
_GRACE_SECONDS = 15
_EXECUTION_ID = b"function-execution-id"
_PAUSE_SECONDS = 1.0
_COLLECT_EVERY = 10_000  # new objects; by default 700

log = logging.getLogger("gpubroker.serving")


def load(name: str, source: Path | None = None) -> ASGIApp:
    """Load a function of the bundle as functions-framework does. Raises SetupError for a file or function that is not there.

    What the framework leaves behind is undone, so that several can be loaded: it loads every file as the module `main`, adds
    its folder to the path, and writes into the environment, where FUNCTION_SIGNATURE_TYPE would decide over the next.
    """
    before, path = sys.modules.get("main"), list(sys.path)
    try:
        return _Plain(framework.create_app(name, source or bundle.source(name)))
    finally:
        sys.path[:] = path
        sys.modules.pop("main", None)
        if before is not None:
            sys.modules["main"] = before
        config.forget_variables("FUNCTION_TARGET", "FUNCTION_SIGNATURE_TYPE")


class _Plain:
    """What the framework is handed.

    A line break in a path matches no route of its, and it would answer for itself: our own 404 is better. A request that
    has no execution id gets the one that shall be its request id: the framework's log and ours say the same, and one is made.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, its path in one line, under an id."""
        if scope["type"] == "http":
            headers = [*scope["headers"], (_EXECUTION_ID, ids.new_id("req").encode())]
            scope = {**scope, "headers": headers, "path": scope["path"].replace("\n", "%0A")}
        await self._app(scope, receive, send)


def set_up_logging() -> None:
    """Log to stderr, a line each: what happened, never a body or a header."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


def serve(name: str, port: int | None, host: str) -> int:
    """Serve a function until SIGTERM or SIGINT. Raises SetupError when it cannot work as it is set up."""
    gc.disable()  # until it listens: what is loaded stays, and looking through it again and again is a tenth of the start
    bundle.function(name)
    config.spare_plugins()
    settings = config.settings()
    settings.need("DATABASE_URL", "GPUBROKER_OWNER", "GPUBROKER_SECRET_KEY")
    import uvicorn  # noqa: PLC0415 - after the settings, so that a wrong set-up is said at once
    import uvloop  # noqa: PLC0415 - as above

    set_up_logging()
    app = load(name)
    chosen = settings.port if port is None else port
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=chosen,
            http="httptools",
            loop="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
    )
    uvloop.run(_run(server))
    return 0


def keep_loaded() -> None:
    """Tell the collector that what is loaded stays, and to look for garbage among what came since, now and then."""
    gc.freeze()
    gc.set_threshold(_COLLECT_EVERY)
    gc.enable()


def _outlive(number: int, frame: object) -> None:
    """The signal that uvicorn obeyed and raises once more at its end: it shall not end us before what is being published."""
    del number, frame


async def _reach_database() -> None:
    """Wait for a database that can be used, so that a restart of it, or its migration, crashes nobody in a loop."""
    from gpubroker import store  # noqa: PLC0415 - as in _run

    until = time.monotonic() + config.settings().start_seconds
    while True:
        try:
            await store.pool()
        except (errors.Unavailable, errors.SetupError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()
            why = f"the database cannot be reached: {reason[-1] if reason else 'no answer'}"
            line = str(error) if isinstance(error, errors.SetupError) else why
            if time.monotonic() >= until:
                raise errors.SetupError(line) from None
            log.warning("%s; trying again", line)
            await asyncio.sleep(_PAUSE_SECONDS)
        else:
            return


async def _run(server: "uvicorn.Server") -> None:
    from gpubroker import adapters, outbox, rates, store  # noqa: PLC0415 - psycopg is loaded with the function's own modules

    await _reach_database()
    keep_loaded()
    signal.signal(signal.SIGTERM, _outlive)
    try:
        await server.serve()
    except SystemExit:
        raise errors.SetupError("the port cannot be listened on; is it taken?") from None
    finally:
        await outbox.close()
        await rates.limiter.close()
        await adapters.close()
        await store.close()
