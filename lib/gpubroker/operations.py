"""What an API is made of: one method of one path, with what it takes, needs and answers."""

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import BaseModel

from gpubroker.errors import Problem
from gpubroker.inputs import Input, NoQuery, Nothing, Query


class Operation(NamedTuple):
    """One method of one path: what it takes, needs and answers."""

    method: str
    path: str
    handler: Callable[[Any], Awaitable[Any]]
    summary: str
    scope: str | None = None
    open: bool = False
    body: type[Input] = Nothing
    query: type[Query] = NoQuery
    answers: Mapping[int, Any] = MappingProxyType({})
    idempotent: bool = False
    form: type[BaseModel] | None = None
    """The fields of a form, where it takes one instead of JSON; it describes them and checks nothing."""
    raw: tuple[str, ...] = ()
    """Media types, where the handler reads the body itself; it describes them and checks nothing."""
    headers: Mapping[str, str] = MappingProxyType({})
    """Request headers that it obeys beside those of every operation, and what each does."""
    problems: tuple[type[Problem], ...] = ()
    """What it may answer beside the errors that every operation may."""
