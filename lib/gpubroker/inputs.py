"""What requests carry: exact bodies, exact queries, and the way to say what is wrong with them."""

import re
from datetime import datetime
from typing import Annotated, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict

from gpubroker import errors
from gpubroker.times import parse_time

LARGEST_BODY: Final = 1024 * 1024
"""Bytes of a request's body at the most."""


class Input(BaseModel):
    """A request body: exact types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)


class Query(BaseModel):
    """Query parameters: no unknown ones; a list field may be repeated, others not."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Nothing(Input):
    """An empty body."""


class NoQuery(Query):
    """No query parameters."""


def _whole(text: object) -> object:
    if isinstance(text, str) and not re.fullmatch(r"-?[0-9]{1,18}", text):
        msg = "must be a whole number"
        raise ValueError(msg)
    return text


def _flag(text: object) -> object:
    if isinstance(text, str) and text not in ("true", "false"):
        msg = "must be true or false"
        raise ValueError(msg)
    return text


Whole = BeforeValidator(_whole)
"""Marks a whole number in a query: `5`, not `5.0` or ` 5`."""
Flag = BeforeValidator(_flag)
"""Marks a boolean in a query: `true` or `false`, nothing else."""
Time = Annotated[datetime, BeforeValidator(parse_time)]
"""A moment in a query, RFC 3339 with an offset."""


def invalid(pointer: str, message: str, *, did_you_mean: str | None = None) -> errors.Invalid:
    """An `invalid` problem about one place: `/name` in the body, `?limit` in the query."""
    found: dict[str, object] = {"pointer": pointer, "message": message}
    if did_you_mean:
        found["did_you_mean"] = did_you_mean
    return errors.Invalid(f"{pointer} {message}.", more={"errors": [found]})
