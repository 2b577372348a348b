"""Problem documents (RFC 9457): what was raised, made into what is answered."""

import json
import logging
import re
from collections.abc import Collection
from typing import Final, cast

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from gpubroker import bodies, config, errors

log = logging.getLogger("gpubroker.web")

_WORD: Final = re.compile(r"'([^']*)'")
_MOST_SAID: Final = 50
"""Of what is wrong with one request: nobody reads more, and each takes its time."""
_LONGEST_WORD: Final = 64
_OF_A_KEY: Final = "[key]"
"""Pydantic's last step to the name of a member, which is no place of its own."""
_CLIENT_CHALLENGE: Final = {"WWW-Authenticate": 'Basic realm="gpubroker", Bearer realm="gpubroker"'}


def as_invalid(error: ValidationError, model: type[BaseModel], root: str) -> errors.Invalid:
    """What a model found wrong: places as JSON Pointers below `root`, and what was meant where a name is not known."""
    found: list[dict[str, object]] = []
    for wrong in error.errors(include_url=False)[:_MOST_SAID]:
        message = wrong["msg"].removeprefix("Value error, ")
        entry: dict[str, object] = {"pointer": _point(wrong["loc"], root), "message": message}
        near = None
        if wrong["type"] == "extra_forbidden":
            entry["message"] = "is not known here"
            near = _nearest(str(wrong["loc"][-1]), _fields_at(model, wrong["loc"]))
        elif wrong["type"] == "literal_error" and isinstance(wrong["input"], str):
            near = _nearest(wrong["input"], _WORD.findall(wrong.get("ctx", {}).get("expected", "")))
        if near:
            entry["did_you_mean"] = near
        found.append(entry)
    first = found[0]
    return errors.Invalid(f"{first['pointer'] or 'the body'}: {first['message']}.", more={"errors": found})


def _point(place: tuple[int | str, ...], root: str) -> str:
    """A JSON Pointer (RFC 6901), of which the empty one is the whole body, or the name of a query parameter."""
    steps = [str(part).replace("~", "~0").replace("/", "~1") for part in place if part != _OF_A_KEY]
    return root + "/".join(steps) if steps else root.strip("/")


def _nearest(text: str, known: Collection[str]) -> str | None:
    from difflib import get_close_matches  # noqa: PLC0415 - only needed when something is wrong

    near = get_close_matches(text, list(known), n=1) if len(text) <= _LONGEST_WORD else None
    return near[0] if near else None


def _fields_at(model: type[BaseModel], place: tuple[int | str, ...]) -> Collection[str]:
    """The fields that an object within a body, or the query, may have."""
    fields = _named(model)
    for part in place[:-1]:
        declared = fields.get(str(part))
        inner = _models_in(declared.annotation if declared else None)
        fields = _named(inner[0]) if inner else {}
    return fields


def _named(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields by their public names."""
    return {declared.alias or name: declared for name, declared in model.model_fields.items()}


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    inner: tuple[object, ...] = getattr(cast("object", annotation), "__args__", ())
    return [model for part in inner for model in _models_in(part)]


def answer(error: Exception, request_id: str, *, in_oauth: bool) -> Response:
    """What is answered to whatever was raised; the endpoints of OAuth refuse a caller in the words of their RFCs."""
    problem = _as_problem(error, request_id)
    if in_oauth and isinstance(problem, errors.Unauthenticated):
        problem = errors.OAuthError("invalid_client", problem.detail)
    return _render(problem, request_id)


def _as_problem(error: Exception, request_id: str) -> errors.Problem:
    """Make a problem of whatever was raised. What nobody foresaw is logged whole and shown as nothing."""
    if isinstance(error, errors.Problem):
        return error
    if isinstance(error, ClientDisconnect):
        return errors.MalformedJson("The body ended early.")
    if isinstance(error, errors.SetupError):
        log.error("%s: %s", request_id, error)
        return errors.Unavailable(headers={"Retry-After": "30"})
    log.error("%s: unforeseen error", request_id, exc_info=error)
    return errors.Internal()


def _render(problem: errors.Problem, request_id: str) -> Response:
    """Write a problem document, or for OAuth the error that its RFCs say."""
    if isinstance(problem, errors.OAuthError):
        return _render_oauth(problem)
    body: dict[str, object] = {
        "type": f"{config.settings().public_url}{errors.MANUAL}#{problem.slug}",
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
        "code": problem.slug,
        "retryable": problem.retryable,
        "request_id": request_id,
        "hint": problem.said_hint,
        **problem.more,
    }
    if isinstance(problem, errors.Invalid):
        body.setdefault("errors", [])
    if problem.steps:
        body["next"] = [step.as_json() for step in problem.steps]
    return Response(
        json.dumps(body, default=bodies.as_json).encode(),
        status_code=problem.status,
        headers=problem.headers,
        media_type="application/problem+json",
    )


def _render_oauth(problem: errors.OAuthError) -> Response:
    content = json.dumps({"error": problem.error, "error_description": problem.detail}).encode()
    headers = {"Cache-Control": "no-store"} | (_CLIENT_CHALLENGE if problem.is_client_unknown else {})
    status = 401 if problem.is_client_unknown else problem.status
    return Response(content, status_code=status, headers=headers, media_type="application/json")
