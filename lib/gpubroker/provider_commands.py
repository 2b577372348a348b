"""Commands about providers, for operators: `gpubroker providers check`."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Final

import typer

from gpubroker.errors import SetupError
from gpubroker.options import AsJson, read_usd

if TYPE_CHECKING:
    from gpubroker import trial

app: Final = typer.Typer(help="The providers that offers come from.", no_args_is_help=True)
_FAR_SECONDS: Final = 30
"""A clock that is so far off ours makes hard stops and expiries wrong."""


@app.callback()
def providers() -> None:
    """The providers that offers come from."""


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Default: all that are on.")] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Rent the cheapest instance, use it, destroy it. It costs money.")
    ] = False,
    spend_at_most: Annotated[str | None, typer.Option(metavar="USD", help="With --live: what each may cost.")] = None,
    as_json: AsJson = False,
) -> int:
    """Say whether each provider's credential works, what it offers, how far its clock is off, what it cannot do."""
    from gpubroker import operating

    if live != (spend_at_most is not None):
        raise SetupError("--live and --spend-at-most go together", code=2)
    limit = read_usd(spend_at_most) if spend_at_most is not None else None
    tried = operating.run_alone(lambda: operating.check_providers(names, limit))
    if as_json:
        print(
            json.dumps([{**asdict(standing), "steps": [asdict(step) for step in steps]} for standing, steps in tried])
        )
    for standing, steps in tried if not as_json else []:
        _print(standing, steps)
    is_good = all(standing.error is None and not any(step.error for step in steps) for standing, steps in tried)
    return 0 if is_good else 1


def _print(standing: "trial.Standing", steps: "list[trial.Step]") -> None:
    print(standing.provider)
    if standing.error is None:
        print(f"  credential  works (account {standing.account})")
        print(f"  offers      {standing.offers} to be had now, {standing.gpus} GPU models")
        print(f"  instances   {standing.instances} of ours")
    else:
        print(f"  error       {standing.error}")
    if standing.clock_seconds is not None:
        far = ": set this machine's clock" if abs(standing.clock_seconds) > _FAR_SECONDS else ""
        print(f"  clock       {standing.clock_seconds:+.0f} s{far}")
    print(f"  cannot      {', '.join(standing.lacks) or 'nothing is missing'}")
    for step in steps:
        print(f"  {step.what}: {step.error or 'well'}, {step.seconds:.1f} s")
