"""functions-framework without Flask.

Its package imports Flask, and with it Werkzeug and Jinja, for functions that are not asynchronous: a third of what its hello
takes to start, and 6 MB. Ours all are asynchronous. So while it is imported, stand-ins are found under these names, with all
that it touches of them. They are gone afterwards: who imports Flask gets Flask.
"""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

from gpubroker.errors import SetupError

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.applications import Starlette


def create_app(target: str, source: "Path") -> "Starlette":
    """Make the application of one function of a file. Raises SetupError for a file or function that is not there."""
    with _without_flask():  # it has no types of its own
        from functions_framework.aio import create_asgi_app  # noqa: PLC0415 # pyright: ignore[reportUnknownVariableType]
        from functions_framework.exceptions import FunctionsFrameworkException  # noqa: PLC0415 - only a server needs it
    try:
        return create_asgi_app(target, str(source))
    except FunctionsFrameworkException as error:
        msg = f"the function {target} cannot be loaded: {' '.join(str(error).split())}"
        raise SetupError(msg) from None


@contextmanager
def _without_flask() -> Generator[None]:
    if "functions_framework" in sys.modules:  # as the stock command loads it: with Flask
        yield
        return
    stand_ins = {name: module for name, module in _make_stand_ins().items() if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _make_stand_ins() -> dict[str, ModuleType]:
    """What the framework touches: types in hints; where its own log goes; that no request of Flask's is being answered."""
    flask, werkzeug, local = ModuleType("flask"), ModuleType("werkzeug"), ModuleType("werkzeug.local")
    vars(flask).update(
        Request=object,
        typing=SimpleNamespace(ResponseReturnValue=object),
        has_request_context=lambda: False,
        logging=SimpleNamespace(wsgi_errors_stream=sys.stderr),
    )
    vars(local).update(LocalProxy=_Proxy)
    return {module.__name__: module for module in (flask, werkzeug, local)}


class _Proxy:
    """Like Werkzeug's LocalProxy, it is what the function that it was made of returns."""

    def __init__(self, find: Callable[[], object]) -> None:
        self._find = find

    def __getattr__(self, name: str) -> object:
        return getattr(self._find(), name)
