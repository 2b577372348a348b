"""One function as a process: `gpubroker serve <name>`, under uvicorn with uvloop and httptools."""

import logging
import sys
from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from gpubroker import bundle, config, errors

if TYPE_CHECKING:
    import uvicorn

_GRACE_SECONDS = 15


def load(name: str) -> ASGIApp:
    """Load a function of the bundle as functions-framework does, as an ASGI application."""
    import functions_framework.aio  # noqa: PLC0415 - only a server needs it

    return functions_framework.aio.create_asgi_app(bundle.function(name).name, str(bundle.source(name)))


def set_up_logging() -> None:
    """Log to stderr, a line each: what happened, never a body or a header."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


def serve(name: str, port: int | None, host: str) -> int:
    """Serve a function until SIGTERM or SIGINT. Raises SetupError when it cannot work as it is set up."""
    bundle.function(name)
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


async def _run(server: "uvicorn.Server") -> None:
    from gpubroker import adapters, outbox, store  # noqa: PLC0415 - psycopg is loaded with the function's own modules

    try:
        await store.pool()
    except errors.Unavailable as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        line = f"the database cannot be reached: {reason[-1] if reason else 'no answer'}"
        raise errors.SetupError(line) from None
    try:
        await server.serve()
    except SystemExit:
        raise errors.SetupError("the port cannot be listened on; is it taken?") from None
    finally:
        await outbox.close()
        await adapters.close()
        await store.close()
