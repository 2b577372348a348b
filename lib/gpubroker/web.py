"""HTTP for public functions: routes, authentication, validation, problem documents, request ids.

A function's main.py declares operations on an `Api`; the same models validate, answer and describe (OpenAPI). A handler
gets a `Call` and returns an `Answer`; whatever it raises becomes a problem document (RFC 9457).
"""

import base64
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Any, Final, Generic, LiteralString, NamedTuple, TypeVar, cast
from urllib.parse import parse_qsl, unquote_plus

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from gpubroker import bodies, bundle, errors, keys, outbox, rates, signing, store
from gpubroker.ids import is_id, new_id
from gpubroker.inputs import Input, NoQuery, Nothing, Query, invalid
from gpubroker.operations import Operation

log = logging.getLogger("gpubroker.web")

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/=+-]{1,128}")
_TRACE: Final = re.compile(
    r"(?!ff|.{3}0{32}|.{36}0{16}|00.{53}.)[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{0,200})?"
)
_IDEMPOTENCY_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")
_METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")
_WITH_BODY: Final = ("POST", "PUT", "PATCH")
_CHALLENGE: Final = {"WWW-Authenticate": 'Bearer realm="gpubroker"'}
_FAILED: Final = 500
_SLOW_SECONDS: Final = 1.0
_SHORT_QUERY: Final = 512
_KNOWN_QUERIES: Final = 512


B = TypeVar("B", bound=Input)
Q = TypeVar("Q", bound=Query)


class Answer(NamedTuple):
    """What a handler answers with."""

    body: BaseModel | Mapping[str, object] | None = None
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})


Handled = Answer | Response


class Call(Generic[B, Q]):
    """One request, checked: `body` and `query` are what the operation's models made of it."""

    def __init__(self, request: Request, operation: Operation, request_id: str) -> None:
        self.request = request
        self.operation = operation
        self.request_id = request_id
        self.credential = store.Credential()
        self.idempotency_key: str | None = None
        self.raw: object = None
        """The body as parsed, for the MAC of an Idempotency-Key."""
        self.form: dict[str, str] = {}
        self.headers: dict[str, str] = {}
        """Headers for whatever answer there will be."""
        self._is_counted = False
        self._body: Input = Nothing()
        self._query: Query = NoQuery()

    @property
    def body(self) -> B:
        """The validated body."""
        return cast("B", self._body)

    @property
    def query(self) -> Q:
        """The validated query."""
        return cast("Q", self._query)

    @property
    def asked(self) -> bytes:
        """The query as it came."""
        return cast("bytes", self.request.scope["query_string"])

    def path(self, name: str) -> str:
        """A parameter of the path."""
        return cast("str", self.request.path_params[name])

    @asynccontextmanager
    async def transaction(self, settings: LiteralString = "") -> AsyncGenerator[store.Transaction]:
        """A transaction of the caller: authenticated now, so that a revocation is obeyed in the middle of a wait too."""
        async with store.public(self.credential, self.operation.scope, settings) as tx:
            await self.count(tx.known)
            yield tx

    async def glimpse(self) -> str:
        """Authenticate alone, in a round trip that requests share. Returns the version of the offers."""
        from gpubroker.store import entrance  # noqa: PLC0415 - one function alone needs it

        caller, version = await entrance.enter(self.credential, self.operation.scope)
        await self.count(caller)
        return version

    async def count(self, caller: store.Caller) -> None:
        """Count this request, once, for the caller's organisation. Raises RateLimited."""
        if not self._is_counted:
            self._is_counted = True
            self.headers |= (await rates.limiter.take(caller.org_id, caller.plan)).as_headers()

    async def read(self) -> None:
        """Take the request in: credential, key, query, body."""
        if self.operation.form is not None:
            self.form = await _parse_form(self.request)
            return
        if not self.operation.open:
            self.credential = await read_credential(self.request)
        self._query = _parse_query(self.request, self.operation.query)
        self.idempotency_key = _parse_key(self.request) if self.operation.idempotent else None
        if self.operation.method in _WITH_BODY and not self.operation.raw:
            self.raw, self._body = await _parse_body(self.request, self.operation.body)

    async def admit(self) -> None:
        """Authenticate where nothing has yet. Raises Unauthenticated, Forbidden or RateLimited."""
        if not (self.operation.open or self._is_counted):
            async with self.transaction():
                pass


class Served(Response):
    """An ASGI application that a function returns: functions-framework awaits it as it does any response."""

    def __init__(self) -> None:
        """It has no content of its own, so nothing of a response is set up."""


class Api(Served):
    """The operations of one function, as an ASGI application."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.operations: list[Operation] = []
        self._fixed: dict[str, Resource] = {}
        """By path, those without a parameter: found without trying every route."""
        self._router: Router | None = None

    def operation(  # noqa: PLR0913 - each is a word of what an operation is
        self,
        method: str,
        path: str,
        *,
        scope: str | None = None,
        open: bool = False,  # noqa: A002 - reads best at its users: an operation open to all
        body: type[B] = Nothing,
        query: type[Q] = NoQuery,
        answers: Mapping[int, Any],
        idempotent: bool = False,
        form: type[BaseModel] | None = None,
        raw: tuple[str, ...] = (),
        headers: Mapping[str, str] = MappingProxyType({}),
        problems: Sequence[type[errors.Problem]] = (),
    ) -> Callable[[Callable[[Call[B, Q]], Awaitable[Handled]]], Callable[[Call[B, Q]], Awaitable[Handled]]]:
        """Declare an operation; its handler's docstring is its summary, `problems` what it may answer beside the usual."""

        def declare(handler: Callable[[Call[B, Q]], Awaitable[Handled]]) -> Callable[[Call[B, Q]], Awaitable[Handled]]:
            summary = (handler.__doc__ or "").strip().splitlines()[0]
            self.operations.append(
                Operation(
                    method, path, handler, summary, scope=scope, open=open, body=body, query=query, answers=dict(answers),
                    idempotent=idempotent, form=form, raw=raw, headers=headers, problems=tuple(problems),
                )
            )  # fmt: skip
            return handler

        return declare

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if self._router is None:
            self._router = self._route()
        fixed = None if scope.get("root_path") else self._fixed.get(scope["path"])
        await (fixed or self._router)(scope, receive, send)

    async def _describe(self, call: "Call[Any, Any]") -> Answer:
        from gpubroker import openapi  # noqa: PLC0415 - who asks for it waits for it

        del call
        return Answer(openapi.describe(self.name, self.operations), headers={"Cache-Control": "public, max-age=300"})

    def _route(self) -> Router:
        served = (
            Operation("GET", "/healthz", _check_health, "Say whether this function works.", open=True),
            Operation("GET", errors.MANUAL, _show_errors, "What each error means.", open=True),
            Operation("GET", f"/openapi/{self.name}.json", self._describe, "Describe this function.", open=True),
        )
        paths: dict[str, dict[str, Operation]] = {}
        for operation in (*self.operations, *served):
            paths.setdefault(operation.path, {})[operation.method] = operation
        resources = {path: Resource(methods) for path, methods in paths.items()}
        self._fixed = {path: resource for path, resource in resources.items() if "{" not in path}
        routes = [Route(path, resource) for path, resource in resources.items()]
        return Router(routes, redirect_slashes=False, default=Resource({}))


class Resource:
    """One path: chooses the operation by method. Without operations it is the path that does not exist."""

    def __init__(self, operations: Mapping[str, Operation]) -> None:
        self._operations = operations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request to this path."""
        began = time.perf_counter()
        request = Request(scope, receive)
        request_id = _choose_request_id(request)
        outbox.traceparent.set(_read_trace(request))
        method = "GET" if request.method == "HEAD" else request.method
        headers: dict[str, str] = {}
        operation: Operation | None = None
        try:
            operation = self._choose(request, method)
            call: Call[Any, Any] = Call(request, operation, request_id)
            headers = call.headers
            answer = await _handle(call)
            response = answer if isinstance(answer, Response) else render(answer)
        except Exception as error:  # noqa: BLE001 - every error becomes a problem document; an unknown one is logged whole
            from gpubroker import problems  # noqa: PLC0415 - what goes well needs none of it

            response = problems.answer(error, request_id, in_oauth=operation is not None and operation.form is not None)
        headers["X-Request-Id"] = request_id
        response.raw_headers += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await response(scope, receive, send)
        _log_request(request, response.status_code, request_id, time.perf_counter() - began)

    def _choose(self, request: Request, method: str) -> Operation:
        if not self._operations or "\x00" in request.scope["path"]:
            msg = f"There is no path {request.url.path}."
            raise errors.NotFound(msg, hint="See /openapi.json for the paths there are.")
        if method not in self._operations:
            allowed = sorted(self._operations)
            if "GET" in allowed:
                allowed.append("HEAD")
            msg = f"{request.url.path} takes {', '.join(allowed)}."
            raise errors.MethodNotAllowed(msg, headers={"Allow": ", ".join(allowed)})
        return self._operations[method]


async def _handle(call: Call[Any, Any]) -> Handled:
    """Have the operation answer. What is wrong with a request is only said to who may make it."""
    try:
        await call.read()
        return cast("Handled", await call.operation.handler(call))
    except (errors.Unauthenticated, errors.Forbidden, errors.Unavailable):
        raise
    except errors.Problem:
        await call.admit()
        raise


def _choose_request_id(request: Request) -> str:
    given = request.headers.get("x-request-id", "")
    if _REQUEST_ID.fullmatch(given):
        return given
    made = request.headers.get("function-execution-id", "")
    return made if is_id("req", made) else new_id("req")


def _read_trace(request: Request) -> str | None:
    """The trace that the request belongs to; W3C has a context that is none be as if it were not there."""
    given = request.headers.get("traceparent", "")
    return given if _TRACE.fullmatch(given) else None


def _log_request(request: Request, status: int, request_id: str, seconds: float) -> None:
    level = logging.INFO if status >= _FAILED or seconds > _SLOW_SECONDS else logging.DEBUG
    if log.isEnabledFor(level):
        path = request.scope["path"]
        log.log(level, "%s %s %d %.1f ms %s", request.method, path, status, seconds * 1000, request_id)


async def _check_health(call: Call[Any, Any]) -> Answer:
    del call
    await store.check()
    return Answer({"status": "ok"})


async def _show_errors(call: Call[Any, Any]) -> Response:
    del call
    path = bundle.home() / "docs" / "errors.md"
    if not path.is_file():
        raise errors.NotFound
    return Response(path.read_bytes(), media_type="text/markdown")


# Reading a request


async def read_credential(request: Request) -> store.Credential:
    """Find the credential in `Authorization: Bearer` or `X-API-Key`. Raises Unauthenticated when there is none that can be."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme and scheme.lower() != "bearer":
        raise errors.Unauthenticated("The Authorization header is not a Bearer credential.", headers=_CHALLENGE)
    text = given.strip() or request.headers.get("x-api-key")
    if not text:
        raise errors.Unauthenticated(headers=_CHALLENGE)
    if keys.is_key(text):
        return store.Credential(key_hash=keys.hash_key(text))
    if text.count(".") == 2:  # noqa: PLR2004 - a JWT has three parts
        claims = await signing.verify(text)
        return store.Credential(jti=str(claims["jti"]))
    raise errors.Unauthenticated(
        headers={"WWW-Authenticate": _CHALLENGE["WWW-Authenticate"] + ', error="invalid_token"'}
    )


def read_client(request: Request, form: Mapping[str, str]) -> tuple[str, str] | None:
    """The client id and secret of RFC 6749: HTTP Basic, or both in the form. Raises OAuthError for a broken header."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            client_id, _, secret = base64.b64decode(given.strip(), validate=True).decode().partition(":")
        except ValueError:
            raise errors.OAuthError("invalid_client", "the Authorization header is not HTTP Basic") from None
        return unquote_plus(client_id), unquote_plus(secret)
    if form.get("client_id") and form.get("client_secret"):
        return form["client_id"], form["client_secret"]
    return None


async def _parse_form(request: Request) -> dict[str, str]:
    raw = await bodies.read_body(request)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/x-www-form-urlencoded":
        raise errors.OAuthError("invalid_request", "the body must be application/x-www-form-urlencoded")
    try:
        pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, strict_parsing=bool(raw), max_num_fields=64)
    except ValueError:
        raise errors.OAuthError("invalid_request", "the body is not a form") from None
    form = dict(pairs)
    if len(form) < len(pairs) or any("\x00" in value for value in form.values()):
        raise errors.OAuthError("invalid_request", "a parameter comes twice, or holds a NUL character")
    return form


def _parse_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
        raise invalid("Idempotency-Key", "must be 1 to 255 visible ASCII characters")
    return key


@cache
def _list_fields(model: type[Query]) -> frozenset[str]:
    """The parameters that may be repeated."""
    return frozenset(name for name, declared in model.model_fields.items() if "list[" in str(declared.annotation))


def _parse_query(request: Request, model: type[Query]) -> Query:
    text = cast("bytes", request.scope["query_string"])
    return _known_query(text, model) if len(text) <= _SHORT_QUERY else _read_query(text, model)


def _read_query(text: bytes, model: type[Query]) -> Query:
    given: dict[str, list[str]] = {}
    for name, value in parse_qsl(text.decode("latin-1"), keep_blank_values=True):
        given.setdefault(name, []).append(value)
    values: dict[str, object] = {}
    repeated: list[dict[str, object]] = []
    lists = _list_fields(model)
    for name, texts in given.items():
        if name in lists:
            values[name] = texts
        elif len(texts) > 1:
            repeated.append({"pointer": f"?{name}", "message": "may be given once only"})
        else:
            values[name] = texts[0]
        if any("\x00" in text for text in texts):
            repeated.append({"pointer": f"?{name}", "message": "holds a NUL character"})
    if repeated:
        raise errors.Invalid(more={"errors": repeated})
    try:
        return model.model_validate(values)
    except ValidationError as error:
        from gpubroker import problems  # noqa: PLC0415 - as above

        raise problems.as_invalid(error, model, "?") from None


_known_query = lru_cache(maxsize=_KNOWN_QUERIES)(_read_query)
"""What is asked is asked again: a query is frozen, and means the same each time. Errors are not kept."""


async def _parse_body(request: Request, model: type[Input]) -> tuple[object, Input]:
    raw = await bodies.read_body(request)
    if not raw and model is Nothing:
        return None, Nothing()
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise errors.UnsupportedMediaType
    parsed = bodies.parse_json(raw)
    if not isinstance(parsed, dict):
        raise errors.Invalid(more={"errors": [{"pointer": "", "message": "must be a JSON object"}]})
    try:
        return cast("object", parsed), model.model_validate(parsed)
    except ValidationError as error:
        from gpubroker import problems  # noqa: PLC0415 - as above

        raise problems.as_invalid(error, model, "/") from None


# Answers


def render(answer: Answer) -> Response:
    """Write an answer as JSON."""
    if answer.body is None:
        return Response(status_code=answer.status, headers=answer.headers)
    if isinstance(answer.body, BaseModel):
        content = answer.body.model_dump_json(by_alias=True).encode()
    else:
        content = json.dumps(answer.body, default=bodies.as_json).encode()
    return Response(content, status_code=answer.status, headers=answer.headers, media_type="application/json")


def show_json(content: bytes) -> Response:
    """Answer with JSON that is written already."""
    return Response(content, media_type="application/json")


def show_text(content: bytes) -> Response:
    """Answer with plain text."""
    return Response(content, media_type="text/plain; charset=utf-8")


def prefers_csv(request: Request) -> bool:
    """Say whether `Accept` (RFC 9110) ranks CSV above JSON; where it says neither, JSON it is."""
    ranks = {"text/csv": 0.0, "application/json": 0.0}
    told = [_read_range(part) for part in request.headers.get("accept", "*/*").split(",")]
    for kind in ranks:
        matching = [
            (len(name.rstrip("*")), rank) for name, rank in told if kind.startswith(name.rstrip("*")) and "/" in name
        ]
        ranks[kind] = max(matching, default=(0, 0.0))[1]
    return ranks["text/csv"] > ranks["application/json"]


def _read_range(part: str) -> tuple[str, float]:
    name, *parameters = (text.strip().lower() for text in part.split(";"))
    weights = [text.removeprefix("q=") for text in parameters if text.startswith("q=")]
    try:
        return name, float(weights[0]) if weights else 1.0
    except ValueError:
        return name, 0.0


def show_csv(content: bytes, name: str) -> Response:
    """Answer with CSV, which a browser saves under this name."""
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Vary": "Accept"}
    return Response(content, media_type="text/csv; charset=utf-8", headers=headers)


def stream_events(events: AsyncGenerator[bytes]) -> Response:
    """Answer with server-sent events, which no proxy shall keep or collect."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)
