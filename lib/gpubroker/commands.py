"""All commands, and those for operators. Each prints what it did; with `--json` one JSON document, for programs."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from gpubroker import __version__, account_commands, agent_commands, config, provider_commands
from gpubroker.errors import SetupError
from gpubroker.money import format_usd
from gpubroker.options import AsJson, Period, read_usd

app: Final = typer.Typer(
    help="A GPU broker that AI agents call as a tool.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
manifests_app: Final = typer.Typer(help="Manifests that are made from the code.", no_args_is_help=True)
catalog_app: Final = typer.Typer(help="Offers of the providers.", no_args_is_help=True)
app.add_typer(agent_commands.app)
app.add_typer(account_commands.app)
app.add_typer(manifests_app, name="manifests")
app.add_typer(catalog_app, name="catalog")
app.add_typer(provider_commands.app, name="providers")


def _show_version(asked: bool) -> None:
    if asked:
        print(f"gpubroker {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """A GPU broker that AI agents call as a tool."""
    del version


Data = Annotated[Path, typer.Option("--data", help="The folder of `gpubroker dev`.")]
DEFAULT_DATA: Final = Path(".gpubroker")


@app.command()
def bootstrap(
    data: Data = DEFAULT_DATA,
    org: Annotated[str, typer.Option(help="The organisation's name.")] = "default",
    budget_usd: Annotated[str, typer.Option(metavar="USD", help="What it may spend in a period.")] = "100",
    period: Annotated[Period, typer.Option(help="The budget's period.")] = "total",
    plan: Annotated[Literal["free", "pro", "enterprise"], typer.Option(help="Its rate limits.")] = "enterprise",
    new_key: Annotated[bool, typer.Option("--new-key", help="Issue a further key.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make an organisation with its root agent, a budget and a first key; again it changes nothing."""
    from gpubroker import accounts

    limit = read_usd(budget_usd)
    made = accounts.bootstrap(_find_database(data), org, limit, period, plan, new_key=new_key)
    if as_json:
        shown = {
            "created": made.created,
            "owner": made.owner,
            "org": {"id": made.org_id, "name": made.org_name},
            "agent": {"id": made.agent_id},
            "key": {"id": made.key.id or None, "key": made.key.key},
            "scopes": made.scopes,
        }
        print(json.dumps(shown))
        return
    print(f"organisation {made.org_name} ({made.org_id}), root agent {made.agent_id}, owner {made.owner}")
    if made.created:
        print(f"budget: {format_usd(limit)} USD ({period})")
    if made.key.key:
        print(f"key, shown once: {made.key.key}")
    else:
        print("it was there; --new-key issues a further key")


def _find_database(data: Path) -> str:
    """The database of the environment, else of the `dev` that runs in a folder. Raises SetupError without either."""
    given = config.settings().database_url
    if given:
        return given
    try:
        running = json.loads((data / "run.json").read_text(encoding="utf-8"))
        os.kill(int(running["pid"]), 0)
        return str(running["database_url"])
    except (OSError, ValueError, KeyError, TypeError):
        msg = f"nothing runs in {data}; start gpubroker dev (or set DATABASE_URL)"
        raise SetupError(msg) from None


@app.command()
def migrate(as_json: AsJson = False) -> None:
    """Bring the database's schema up to this version; with GPUBROKER_OWNER set, a new database becomes that owner's."""
    from gpubroker import accounts
    from gpubroker.store import migrations

    settings = config.settings()
    settings.need("DATABASE_URL")
    until = time.monotonic() + settings.start_seconds
    while True:
        try:
            applied = migrations.migrate(settings.database_url or "")
            break
        except SetupError as error:
            if time.monotonic() >= until:
                raise
            print(f"gpubroker: {error}; trying again", file=sys.stderr, flush=True)
            time.sleep(1)
    if as_json:
        print(json.dumps({"applied": applied}))
    else:
        print("\n".join(f"applied {name}" for name in applied) or "the schema is up to date")
    if settings.owner and (owner := accounts.install(settings.database_url or "", settings.owner)) != settings.owner:
        raise SetupError(f"GPUBROKER_OWNER is {settings.owner}, the database belongs to {owner}")


@app.command()
def serve(
    name: Annotated[str, typer.Argument(help="A function of the bundle.")],
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default: PORT, else 8080.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "0.0.0.0",  # noqa: S104 - a container's port
) -> int:
    """Serve one function until SIGTERM."""
    from gpubroker import serving

    return serving.serve(name, port, host)


@app.command()
def dev(
    data: Data = DEFAULT_DATA,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8080,
    end_pods: Annotated[bool, typer.Option("--end-pods", help="End this machine's pods at the end.")] = False,
    as_json: AsJson = False,
) -> int:
    """Run the whole broker on this machine: database, broker, schedules, all functions, one port."""
    from gpubroker.local import dev as runtime

    return runtime.run(data, host, port, end_pods, as_json)


@app.command()
def reconcile(as_json: AsJson = False) -> None:
    """Do one sweep now: expiry, due pods, complete listings, the bill."""
    from gpubroker import operating

    operating.run(operating.reconcile)
    if as_json:
        print(json.dumps({"done": True}))


@app.command()
def deadman(as_json: AsJson = False) -> int:
    """Destroy what is past its hard stop at every provider that is on: needs their keys and GPUBROKER_OWNER, nothing else."""
    from gpubroker import operating

    reports = operating.run_alone(operating.switch_off)
    if as_json:
        print(json.dumps([operating.describe(report) for report in reports], default=str))
    for report in reports if not as_json else []:
        print(
            f"{report.provider}: {report.error or f'{report.listed} of ours, {len(report.ended)} past their hard stop'}"
        )
        for end in report.ended:
            print(f"  {end.instance_id} ({end.ref}): {end.error or 'destroyed'}")
    return 0 if all(report.is_good for report in reports) else 1


@app.command()
def doctor(as_json: AsJson = False) -> int:
    """Look at the installation from inside and outside, and say what to do. Exit code 1 when something is bad."""
    import asyncio

    from gpubroker import doctor as checks

    found = asyncio.run(checks.examine())
    if as_json:
        print(json.dumps([finding._asdict() for finding in found]))
    for finding in found if not as_json else []:
        print(f"{finding.status:8} {finding.check}: {finding.said}")
        if finding.what_to_do:
            print(f"         {finding.what_to_do}")
    return 1 if any(finding.status == "bad" for finding in found) else 0


@catalog_app.command("refresh")
def refresh(as_json: AsJson = False) -> None:
    """Refresh the offers of every provider that is on."""
    from gpubroker import operating

    said = operating.run(operating.refresh)
    if as_json:
        print(json.dumps(said))
        return
    for name, line in said.items():
        print(f"{name}: {line}")


@manifests_app.command("render")
def render(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 when a file differs.")] = False,
) -> int:
    """Make eventing/ and knative/ from the code."""
    from gpubroker import bundle, manifests

    home = bundle.home()
    if not check:
        manifests.write(home)
        return 0
    different = manifests.differences(home)
    for line in different:
        print(line, file=sys.stderr)
    return 1 if different else 0
