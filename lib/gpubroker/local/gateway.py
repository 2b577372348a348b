"""All functions of the bundle in one process: one host in front of the public ones, another, internal, for the rest.

The functions are loaded and called as functions-framework does it, so that each runs here as it runs alone.
"""

import asyncio
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, cast

import httpx
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from gpubroker import bundle, errors, serving, web
from gpubroker.inputs import NoQuery, Nothing
from gpubroker.operations import Operation

_OK: Final = 200
_HEALTH_SECONDS: Final = 5.0


def load(sources: Mapping[str, Path]) -> dict[str, ASGIApp]:
    """Load functions by their names and files. Raises SetupError for a file or function that is not there."""
    return {name: serving.load(name, source) for name, source in sources.items()}


class Gateway:
    """The public host: routes by the longest prefix of the bundle, as whole segments.

    An unknown path goes to the first function, which answers it as it answers its own unknown paths.
    """

    def __init__(self, apps: Mapping[str, ASGIApp], functions: Iterable[bundle.Function] = bundle.FUNCTIONS) -> None:
        public = [function for function in functions if function.kind == "public"]
        self._apps = apps
        self._fallback = apps[public[0].name]
        self._public = [function.name for function in public]
        self._routes = {f"/openapi/{function.name}.json": apps[function.name] for function in public}
        self._routes |= {path: apps[function.name] for function in public for path in function.paths}
        own = (
            Operation("GET", "/healthz", self._check_health, "Say whether every function works.", open=True),
            Operation("GET", "/openapi.json", self._merge_openapi, "Describe all functions.", open=True),
        )
        self._own: dict[str, ASGIApp] = {operation.path: web.Resource({"GET": operation}) for operation in own}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand one request to its function."""
        if scope["type"] != "http":
            return
        await (self._own.get(scope["path"]) or self._find(scope["path"]))(scope, receive, send)

    def _find(self, path: str) -> ASGIApp:
        prefix = path
        while prefix:
            if prefix in self._routes:
                return self._routes[prefix]
            prefix = prefix.rpartition("/")[0]
        return self._fallback

    async def unhealthy(self) -> list[str]:
        """Name the functions, also the internal ones, that do not answer 200 at `/healthz` within 5 s."""
        answers = await asyncio.gather(*(_get(app, "/healthz") for app in self._apps.values()))
        return [name for name, answer in zip(self._apps, answers, strict=True) if answer is None]

    async def _check_health(self, call: web.Call[Nothing, NoQuery]) -> web.Answer:
        del call
        failing = await self.unhealthy()
        return (
            web.Answer({"status": "unavailable", "functions": failing}, 503)
            if failing
            else web.Answer({"status": "ok"})
        )

    async def _merge_openapi(self, call: web.Call[Nothing, NoQuery]) -> web.Answer:
        """Make one OpenAPI document of all that are there."""
        del call
        answers = await asyncio.gather(*(_get(self._apps[name], f"/openapi/{name}.json") for name in self._public))
        documents = [cast("dict[str, object]", json.loads(answer.content)) for answer in answers if answer is not None]
        if not documents:
            raise errors.NotFound
        merged: dict[str, object] = {}
        for document in documents:
            _merge(merged, document)
        if isinstance(info := merged.get("info"), dict):
            merged["info"] = {**cast("dict[str, object]", info), "title": "GPUBROKER"}
        return web.Answer(merged, headers={"Cache-Control": "public, max-age=300"})


def _merge(into: dict[str, object], other: Mapping[str, object]) -> None:
    """Add what is not there yet; objects are merged member by member. Functions share models, so names agree."""
    for name, value in other.items():
        present = into.setdefault(name, value)
        if present is not value and isinstance(present, dict) and isinstance(value, dict):
            mine = into[name] = dict(cast("dict[str, object]", present))
            _merge(mine, cast("dict[str, object]", value))


class Internal:
    """The internal host: `/broker` is the broker, `/<function>` any function, at whose own `/` its events arrive."""

    def __init__(self, apps: Mapping[str, ASGIApp], broker: ASGIApp) -> None:
        self._apps = {**apps, "broker": broker}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand one request to its Service."""
        if scope["type"] != "http":
            return
        name, _, rest = str(scope["path"]).removeprefix("/").partition("/")
        app = self._apps.get(name)
        if app is None:
            await PlainTextResponse("there is no such Service\n", 404)(scope, receive, send)
            return
        inner = f"/{rest}"
        await app({**scope, "path": inner, "raw_path": inner.encode()}, receive, send)


async def _get(app: ASGIApp, path: str) -> httpx.Response | None:
    """Ask a function in this process; None for any answer but 200, or none in time."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # pyright: ignore[reportArgumentType] - same shape
    async with httpx.AsyncClient(transport=transport, base_url="http://function", trust_env=False) as client:
        try:
            async with asyncio.timeout(_HEALTH_SECONDS):
                answer = await client.get(path)
        except (httpx.HTTPError, TimeoutError):
            return None
    return answer if answer.status_code == _OK else None
