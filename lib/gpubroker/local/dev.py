"""`gpubroker dev`: the whole broker on one machine, in one process and its servers, until it is told to stop.

Progress and faults go to stderr; on stdout stands one line, once every function answers. When this process is killed,
by kill -9 too, the kernel ends the servers. A server that dies by itself is started again, at most 4 times a minute.
"""

import ipaddress
import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gpubroker import config
from gpubroker.errors import SetupError

if TYPE_CHECKING:
    from gpubroker.local.installation import Installation


def run(data: Path, host: str, port: int, end_pods: bool, as_json: bool) -> int:  # noqa: FBT001 - the command's options
    """Run until SIGINT, SIGTERM or SIGHUP, then return 0.

    Raises SetupError for whatever is wrong with the machine, the port, the folder, the environment or the database.
    """
    if sys.platform != "linux":
        msg = f"gpubroker dev needs Linux, this is {sys.platform}"
        raise SetupError(msg)
    with _listen(host, port) as listener:
        # After the port, which shall fail at once.
        from gpubroker.local import processes  # noqa: PLC0415

        early: list[int] = []
        for number in processes.ENDING:
            signal.signal(number, lambda signum, _: early.append(signum))

        import uvloop  # noqa: PLC0415

        from gpubroker.local.installation import Installation  # noqa: PLC0415
        from gpubroker.local.runtime import Runtime  # noqa: PLC0415

        logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        url = _url(listener, host)
        installation = Installation(data.resolve(), config.settings())
        installation.lock()
        try:
            running = Runtime(installation, listener, url, end_pods=end_pods, early=early)
            uvloop.run(running.run(lambda: _announce(installation, url, data, as_json=as_json)))
        finally:
            installation.unlock()
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """Listen at once: a port that is only bound could be bound by another too. Raises SetupError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family)  # pyright: ignore[reportArgumentType] - never AF_UNIX
    except OSError as error:
        hint = "choose another with --port, or --port 0 for a free one"
        msg = f"cannot listen on {host}:{port}: {error.strerror or error}; {hint}"
        raise SetupError(msg) from None
    except OverflowError:
        msg = f"{port} is no port: 0 to 65535"
        raise SetupError(msg) from None


def _url(listener: socket.socket, host: str) -> str:
    address, port = listener.getsockname()[:2]
    if ipaddress.ip_address(address).is_unspecified:
        shown = "[::1]" if listener.family == socket.AF_INET6 else "127.0.0.1"
    else:
        shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def _announce(installation: "Installation", url: str, data: Path, *, as_json: bool) -> None:
    settings = installation.settings
    ready: dict[str, object] = {
        "event": "ready",
        "url": url,
        "port": int(url.rpartition(":")[2]),
        "pid": os.getpid(),
        "data": str(installation.folder),
        "owner": settings.owner,
        "database_url": settings.database_url,
        "redis_url": settings.redis_url,
    }
    installation.write_run(ready)
    line = json.dumps(ready) if as_json else f"gpubroker ready at {url} (first key: gpubroker bootstrap --data {data})"
    print(line, flush=True)
