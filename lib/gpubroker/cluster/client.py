"""Calls to the API of a cluster. The client library blocks: each call is made in a thread, with a limit of its own."""

import asyncio
import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, cast
from urllib.parse import urlencode

from gpubroker.errors import CredentialRefused, InstanceNotFound, ProviderError, Rejected, SetupError, Throttled
from gpubroker.providers.base import ExecResult

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

Object = dict[str, Any]
"""An object of the API, as JSON."""

_CALL_SECONDS: Final = 10.0
_MOST_BYTES: Final = 1 << 20
_STDIN, _STDOUT, _STDERR, _ERROR = 0, 1, 2, 3
_CHUNK: Final = 32 * 1024


class _Socket(Protocol):
    """What is used of the library's client, which is typed in part."""

    def is_open(self) -> bool: ...
    def update(self, timeout: float) -> None: ...
    def write_channel(self, channel: int, data: bytes) -> None: ...
    def close_channel(self, channel: int) -> None: ...
    def close(self) -> None: ...


class NotThere(InstanceNotFound):
    """There is no such object."""


class Cluster:
    """One cluster, reached as a pod of it or as a kubeconfig says. It connects at the first call."""

    def __init__(self, kubeconfig: str | None) -> None:
        self._kubeconfig = kubeconfig
        self._api: ApiClient | None = None
        self._connecting = threading.Lock()

    def _connect(self) -> "ApiClient":
        with self._connecting:  # the first calls come at once, each from a thread of its own
            if self._api is None:
                self._api = self._make_api()
            return self._api

    def _make_api(self) -> "ApiClient":
        # A second of imports that no function pays which has no pod here.
        from kubernetes import client, config  # noqa: PLC0415

        settings = client.Configuration()
        settings.retries = False  # what may be repeated is for the caller to say
        try:
            if self._kubeconfig is None:
                config.load_incluster_config(client_configuration=settings)
            else:
                config.load_kube_config(self._kubeconfig, client_configuration=settings)
        except (config.ConfigException, OSError) as error:
            msg = f"no cluster can be reached: {error}; set KUBECONFIG, or run in a pod of the cluster"
            raise SetupError(msg) from None
        return client.ApiClient(settings)

    async def call(
        self, method: str, path: str, body: object = None, *, seconds: float = _CALL_SECONDS, **query: object
    ) -> Object:
        """One call, answered with JSON. Raises a ProviderError that says what may be concluded, see `_fail`."""
        return json.loads(await self.read(method, path, body, seconds=seconds, **query))

    async def read(
        self, method: str, path: str, body: object = None, *, seconds: float = _CALL_SECONDS, **query: object
    ) -> bytes:
        """One call, answered with bytes."""
        return await asyncio.to_thread(self._send, method, path, body, seconds, query)

    def _send(self, method: str, path: str, body: object, seconds: float, query: Mapping[str, object]) -> bytes:
        from urllib3.exceptions import HTTPError  # noqa: PLC0415 - comes with the client

        api = self._connect()
        headers = {"Accept": "application/json, */*"}
        api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        if body is not None:
            headers["Content-Type"] = "application/merge-patch+json" if method == "PATCH" else "application/json"
        url = f"{api.configuration.host}{path}{'?' + urlencode(query) if query else ''}"
        try:
            answer = api.rest_client.pool_manager.request(
                method,
                url,
                headers=headers,
                body=None if body is None else json.dumps(body).encode(),
                timeout=seconds,
                redirect=False,
                retries=False,
            )
        except (HTTPError, OSError) as error:
            raise ProviderError("unreachable", type(error).__name__) from None
        if answer.status >= 300:  # noqa: PLR2004 - the first that is no success
            raise _fail(answer.status, answer.data)
        return answer.data

    async def run(
        self, path: str, command: Sequence[str], *, stdin: bytes | None, seconds: int, **query: object
    ) -> ExecResult:
        """Run a command over a WebSocket. A command whose time is over is left to the pod: the API cannot end it."""
        return await asyncio.to_thread(self._run, path, command, stdin, seconds, query)

    def _run(
        self, path: str, command: Sequence[str], stdin: bytes | None, seconds: int, query: Mapping[str, object]
    ) -> ExecResult:
        from kubernetes.stream.ws_client import WSClient  # noqa: PLC0415 - as the client itself
        from websocket import WebSocketBadStatusException, WebSocketException  # noqa: PLC0415 - comes with it

        api, began = self._connect(), time.monotonic()
        headers = {"sec-websocket-protocol": "v5.channel.k8s.io,v4.channel.k8s.io"}
        api.update_params_for_auth(headers, [], ["BearerToken"], path, "GET", None)
        asked = [*query.items(), ("stdin", stdin is not None), ("stdout", True), ("stderr", True)]
        words = urlencode(
            [*((n, str(v).lower() if isinstance(v, bool) else v) for n, v in asked), *(("command", c) for c in command)]
        )
        settings = cast("Any", api.configuration)
        host = str(settings.host).replace("http", "ws", 1)
        try:
            opened = WSClient(settings, f"{host}{path}?{words}", headers, capture_all=False, binary=True)
            socket, received = cast("_Socket", opened), cast("dict[int, bytes]", vars(opened)["_channels"])
            try:
                if stdin is not None:
                    for start in range(0, len(stdin), _CHUNK):
                        socket.write_channel(_STDIN, stdin[start : start + _CHUNK])
                    socket.close_channel(_STDIN)
                out, errors, cut = _collect(socket, received, began + seconds)
                said = received.get(_ERROR, b"") if not socket.is_open() else b""
            finally:
                socket.close()
                cast("Any", opened).sock.shutdown()  # where the server closed first, the library leaves its socket open
        except WebSocketBadStatusException as error:
            raise _fail(error.status_code, error.resp_body or b"") from None
        except (WebSocketException, OSError) as error:
            raise ProviderError("unreachable", type(error).__name__) from None
        code, complaint = _exit_code(said)
        return ExecResult(code, out, errors + complaint, cut, round((time.monotonic() - began) * 1000))

    async def close(self) -> None:
        """Let go of connections."""
        closing, self._api = self._api, None
        if closing is not None:
            await asyncio.to_thread(closing.close)


def _collect(socket: _Socket, received: dict[int, bytes], until: float) -> tuple[bytes, bytes, bool]:
    """Both streams, each up to a MiB, until the command ends or its time is over. The library's own reading would wait."""
    streams, cut = {_STDOUT: bytearray(), _STDERR: bytearray()}, False
    while True:
        is_open = socket.is_open()
        if is_open:
            socket.update(timeout=max(0.0, min(1.0, until - time.monotonic())))
        for channel, kept in streams.items():
            data = received.pop(channel, b"")
            cut = cut or len(kept) + len(data) > _MOST_BYTES
            kept.extend(data[: _MOST_BYTES - len(kept)])
        if not is_open or time.monotonic() >= until:
            return bytes(streams[_STDOUT]), bytes(streams[_STDERR]), cut


def _exit_code(said: bytes) -> tuple[int | None, bytes]:
    """The code in a `Status` such as `{"status":"Failure","reason":"NonZeroExitCode","details":{"causes":[…]}}`.

    A command that is not there has none: it is told as a shell would, by 127 and a complaint.
    """
    if not said:
        return None, b""
    status: Object = json.loads(said)
    if status.get("status") == "Success":
        return 0, b""
    causes = status.get("details", {}).get("causes", [])
    codes = [cause["message"] for cause in causes if cause.get("reason") == "ExitCode"]
    if codes:
        return int(codes[0]), b""
    return 127, str(status.get("message", "")).encode() + b"\n"


def _fail(status: int, body: bytes | str) -> ProviderError:
    try:
        said: Object = json.loads(body)
    except ValueError:
        said = {}
    reason, message = str(said.get("reason", status)), str(said.get("message", ""))[:300]
    if status == 404:  # noqa: PLR2004 - HTTP
        return NotThere("not_found", message)
    if status == 401 or (status == 403 and " cannot " in message and "quota" not in message):  # noqa: PLR2004 - as above
        return CredentialRefused("forbidden", message)
    if status == 403:  # noqa: PLR2004 - a quota, or the namespace's Pod Security
        return Rejected("quota_exceeded" if "quota" in message else "refused", message)
    if status == 429:  # noqa: PLR2004 - as above
        return Throttled("throttled", message)
    if status in (400, 409, 413, 422):
        return Rejected(reason.lower(), message, try_next_offer=False)
    return ProviderError(reason.lower(), message)
