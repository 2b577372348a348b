"""What became of commands that came as events."""

from typing import Literal

from gpubroker.resources import Output


class CommandAnswer(Output):
    """One command: done, or refused for good. `replayed`: it came before, and this is what became of it then."""

    id: str
    source: str
    status: Literal["done", "refused"]
    replayed: bool
    pod_id: str | None = None
    code: str | None = None
    detail: str | None = None


class CommandAnswers(Output):
    """The commands of a request, in its order."""

    items: list[CommandAnswer]
