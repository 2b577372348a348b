"""The public resources, as API.md names them: what answers carry and OpenAPI describes.

A resource is read straight from its row (`psycopg.rows.class_row`), so that a field stands in one place. Money is
micro-USD inside and a decimal string outside; times are aware UTC.
"""

from typing import Annotated, Any, Final, Generic, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

T = TypeVar("T")


Scope = Literal[
    "offers:read", "pods:read", "pods:write", "pods:exec", "usage:read", "budgets:write", "agents:write",
    "activity:read", "events:read", "events:write", "admin",
]  # fmt: skip


SCOPES: Final[tuple[str, ...]] = Scope.__args__


Period = Literal["total", "day", "month"]


State = Literal[
    "awaiting_approval", "requested", "creating", "starting", "running", "stopping", "stopped", "terminating",
    "terminated", "failed", "interrupted", "unreachable",
]  # fmt: skip


Support = Literal["command", "image", "ports", "exec", "logs", "stop", "ssh"]


FROM: Final = AliasChoices("from_", "from")
"""A row has the first, an answer the second: `from` is a word of Python."""


class Output(BaseModel):
    """A resource in an answer."""

    model_config = ConfigDict(frozen=True, defer_build=True)


class Page(Output, Generic[T]):
    """A part of a list. `next_cursor` is null on the last one."""

    items: list[T]
    next_cursor: str | None = None


def is_none(value: object) -> bool:
    """Leaves a field out of an answer."""
    return value is None


def check_distinct(values: list[Any]) -> list[Any]:
    """Refuses a list that names something twice."""
    if len(set(values)) < len(values):
        msg = "names something twice"
        raise ValueError(msg)
    return values


Name = Annotated[str, Field(min_length=1, max_length=120, pattern=r"^[^\x00-\x1f\x7f]+$")]
