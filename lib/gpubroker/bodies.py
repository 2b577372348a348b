"""Bodies: those of requests read up to their limit, JSON read exactly, and resources within an answer written."""

import json
from decimal import Decimal
from typing import Final, cast

from pydantic import BaseModel
from starlette.requests import Request

from gpubroker import errors
from gpubroker.inputs import LARGEST_BODY, invalid

_DEEPEST: Final = 32


async def read_body(request: Request) -> bytes:
    """Read the whole body. Raises BodyTooLarge above 1 MiB, as soon as that is known."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > LARGEST_BODY:
        raise errors.BodyTooLarge
    read = bytearray()
    async for chunk in request.stream():
        read += chunk
        if len(read) > LARGEST_BODY:
            raise errors.BodyTooLarge
    return bytes(read)


def parse_json(raw: bytes) -> object:
    """Read JSON exactly: numbers with a point as Decimal, no NaN, no name twice, nothing PostgreSQL could not store."""
    try:
        parsed: object = json.loads(
            raw, parse_float=_parse_number, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeated
        )
    except errors.Problem:
        raise
    except (ValueError, RecursionError) as error:
        detail = error.msg if isinstance(error, json.JSONDecodeError) else "it is not UTF-8, or nested too deep"
        place = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise errors.MalformedJson(f"The body is not valid JSON: {detail}{place}.") from None
    _refuse_unstorable(parsed, "", 0)
    return parsed


def _parse_number(text: str) -> Decimal:
    if len(text) > 40:  # noqa: PLR2004 - no amount has so many digits, and an exponent of millions would cost memory
        msg = "a number is too long"
        raise ValueError(msg)
    number = Decimal(text)
    if abs(number.adjusted()) > 40:  # noqa: PLR2004 - as above
        msg = "a number is too large or too small"
        raise ValueError(msg)
    return number


def _refuse_constant(text: str) -> object:
    msg = f"{text} is not JSON"
    raise ValueError(msg)


def _refuse_repeated(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        msg = "an object has the same name twice"
        raise ValueError(msg)
    return made


def _refuse_unstorable(value: object, pointer: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise errors.MalformedJson("The body is nested too deep.")
    if isinstance(value, str):
        if "\x00" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise invalid(pointer or "/", "holds a NUL character or half a surrogate pair")
    elif isinstance(value, dict):
        for name, member in cast("dict[str, object]", value).items():
            _refuse_unstorable(name, pointer, depth + 1)
            _refuse_unstorable(member, f"{pointer}/{name.replace('~', '~0').replace('/', '~1')}", depth + 1)
    elif isinstance(value, list):
        for place, member in enumerate(cast("list[object]", value)):
            _refuse_unstorable(member, f"{pointer}/{place}", depth + 1)
    elif isinstance(value, int) and abs(value) > 2**63:
        raise invalid(pointer or "/", "is too large a number")


def as_json(value: object) -> object:
    """For `json.dumps`: a resource within an answer that is a mapping. Raises TypeError for anything else."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True)
    msg = f"{type(value).__name__} has no place in an answer"
    raise TypeError(msg)
