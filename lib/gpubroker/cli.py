"""The command line: `gpubroker …`. A wrong set-up is one line and an exit code, never a traceback."""

import re
import sys
from typing import Final, Protocol, cast

from gpubroker.errors import SetupError

_INTERRUPTED: Final = 130
_SERVE: Final = re.compile(r"serve [a-z]+( --port [0-9]{1,5}| --host [0-9A-Za-z.:]+)*")


class _Context(Protocol):
    command_path: str


class _Failure(Protocol):
    """A wrong command line: 2 is its exit code, others are 1. Without a message the help was printed."""

    exit_code: int

    def format_message(self) -> str:
        """Say what is wrong."""
        ...


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        code = _run(sys.argv[1:])
    except SetupError as error:
        print(f"gpubroker: {error}", file=sys.stderr)
        code = error.code
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except BrokenPipeError:  # whoever read the output has gone
        code = 0
    sys.exit(code)


def _tell(failure: _Failure) -> int:
    message = failure.format_message().replace("Value error, ", "")
    context: _Context | None = getattr(failure, "ctx", None)
    if message:
        print(f"gpubroker: {message}", file=sys.stderr)
        print(f"see '{context.command_path if context else 'gpubroker'} --help'", file=sys.stderr)
    return failure.exit_code


def _serve(arguments: list[str]) -> int:
    """`serve NAME [--port N] [--host H]` without the 80 ms that a command line with help and completion costs."""
    from gpubroker import serving  # noqa: PLC0415 - see _run

    options = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    port = options.get("--port")
    return serving.serve(arguments[1], None if port is None else int(port), options.get("--host", serving.ANYWHERE))


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["serve"] and _SERVE.fullmatch(" ".join(arguments)):
        return _serve(arguments)
    import typer  # noqa: PLC0415 - everything is imported inside main, so that Ctrl-C ends without a traceback

    from gpubroker.commands import app  # noqa: PLC0415 - as above

    failures = typer.BadParameter.__mro__[2]  # ClickException: Click's, or that of the Click within later Typers
    try:
        returned: object = typer.main.get_command(app).main(arguments, prog_name="gpubroker", standalone_mode=False)
    except typer.Exit as leaving:
        return leaving.exit_code
    except Exception as error:
        if not isinstance(error, failures):
            raise
        return _tell(cast("_Failure", error))
    return returned if isinstance(returned, int) else 0
