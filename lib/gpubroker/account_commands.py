"""The commands for what was used, budgets, agents and keys."""

import re
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from gpubroker import console, tables
from gpubroker.options import AsJson, Cursor, Limit, Period, read_duration, read_group, read_moment, read_usd, write_usd

if TYPE_CHECKING:
    from gpubroker.client import Client

app: Final = typer.Typer()
budget_app: Final = typer.Typer(help="Show budgets, or set one.", invoke_without_command=True)
agents_app: Final = typer.Typer(help="List agents, or make, change and revoke them.", invoke_without_command=True)
keys_app: Final = typer.Typer(help="List keys, or make, rotate and revoke them.", invoke_without_command=True)
app.add_typer(budget_app, name="budget", rich_help_panel="Agents")
app.add_typer(agents_app, name="agents", rich_help_panel="Agents")
app.add_typer(keys_app, name="keys", rich_help_panel="Agents")

_AGENT_ID: Final = re.compile(r"agt_[0-9a-hjkmnp-tv-z]{26}")

AgentName = Annotated[str, typer.Argument(metavar="AGENT", help="Its id or name.")]
KeyId = Annotated[str, typer.Argument(metavar="KEY", help="Its id, key_...")]
Scopes = Annotated[list[str] | None, typer.Option("--scope", help="May be repeated; default: all that you may give.")]
ExpiresIn = Annotated[
    int | None, typer.Option("--expires", parser=read_duration, metavar="TIME", help="90s, 15m, 1h, 2d after now.")
]


@app.command(rich_help_panel="Agents")
def usage(
    by: Annotated[
        str | None, typer.Option(parser=read_group, metavar="KEY", help="agent, pod, provider, gpu, label:<k>, hour, day or month.")
    ] = None,
    begin: Annotated[
        datetime | None, typer.Option("--from", parser=read_moment, metavar="TIME", help="Default: this month's start.")
    ] = None,
    end: Annotated[datetime | None, typer.Option("--to", parser=read_moment, metavar="TIME", help="Default: now.")] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Sum what was used, and what it cost."""
    with console.connect(as_json=as_json) as broker:
        console.show(broker.usage(group_by=by, from_=begin, to=end), tables.of_usage, as_json=as_json)


# Budgets


@budget_app.callback()
def list_budgets(context: typer.Context, limit: Limit = 50, cursor: Cursor = None, as_json: AsJson = False) -> None:
    """Show budgets, or set one."""
    if context.invoked_subcommand is None:
        with console.connect(as_json=as_json) as broker:
            console.show(broker.list_budgets(limit=limit, cursor=cursor), tables.of_budgets, as_json=as_json)


@budget_app.command("set")
def set_budget(
    agent: AgentName,
    limit: Annotated[int, typer.Argument(parser=read_usd, metavar="USD", help="What it may spend in a period.")],
    period: Annotated[Period, typer.Option(help="Of the limit.")] = "total",
    as_json: AsJson = False,
) -> None:
    """Set what an agent and all below it may spend."""
    with console.connect(as_json=as_json) as broker:
        budget = broker.set_budget(_find_agent(broker, agent), write_usd(limit) or "", period)
        console.show(budget, tables.of_budget, as_json=as_json)


# Agents


@agents_app.callback()
def list_agents(context: typer.Context, limit: Limit = 50, cursor: Cursor = None, as_json: AsJson = False) -> None:
    """List agents, or make, change and revoke them."""
    if context.invoked_subcommand is None:
        with console.connect(as_json=as_json) as broker:
            console.show(broker.list_agents(limit=limit, cursor=cursor), tables.of_agents, as_json=as_json)


@agents_app.command("create")
def create_agent(
    name: str,
    budget: Annotated[int | None, typer.Option(parser=read_usd, metavar="USD", help="What it may spend.")] = None,
    period: Annotated[Period, typer.Option(help="Of the budget.")] = "total",
    scope: Scopes = None,
    expires: ExpiresIn = None,
    as_json: AsJson = False,
) -> None:
    """Make an agent below yours; its first key is shown once."""
    request: dict[str, Any] = {"name": name}
    if budget is not None:
        request["budget"] = {"limit_usd": write_usd(budget), "period": period}
    with console.connect(as_json=as_json) as broker:
        made = broker.create_agent(request | _given(scopes=scope, expires_in=expires))
        console.show(made, tables.of_new_agent, as_json=as_json)


@agents_app.command("set")
def change_agent(
    agent: AgentName,
    name: Annotated[str | None, typer.Option(help="A new name.")] = None,
    scope: Annotated[list[str] | None, typer.Option(help="All that it shall have; may be repeated.")] = None,
    expires: ExpiresIn = None,
    max_pods: Annotated[int | None, typer.Option(help="Live at once.")] = None,
    max_usd_per_hour: Annotated[int | None, typer.Option(parser=read_usd, metavar="USD")] = None,
    max_creates_per_minute: int | None = None,
    grant: Annotated[list[str] | None, typer.Option(help="logs or exec, to those above; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Change an agent; what is left out stays."""
    limits = _given(
        max_pods=max_pods, max_usd_per_hour=write_usd(max_usd_per_hour), max_creates_per_minute=max_creates_per_minute
    )
    change = _given(name=name, scopes=scope, expires_in=expires, grants=grant, limits=limits or None)
    with console.connect(as_json=as_json) as broker:
        changed = broker.change_agent(_find_agent(broker, agent), change)
        console.show(changed, tables.of_agent, as_json=as_json)


@agents_app.command("revoke")
def revoke_agent(agent: AgentName, as_json: AsJson = False) -> None:
    """Revoke an agent with all below it, and end their pods."""
    with console.connect(as_json=as_json) as broker:
        console.show(broker.revoke_agent(_find_agent(broker, agent)), tables.of_agent, as_json=as_json)


# Keys


@keys_app.callback()
def list_keys(
    context: typer.Context,
    agent: Annotated[str | None, typer.Option(help="Of this agent, by id or name.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
    as_json: AsJson = False,
) -> None:
    """List keys, or make, rotate and revoke them."""
    if context.invoked_subcommand is None:
        with console.connect(as_json=as_json) as broker:
            agent_id = None if agent is None else _find_agent(broker, agent)
            page = broker.list_keys(agent_id=agent_id, limit=limit, cursor=cursor)
            console.show(page, tables.of_keys, as_json=as_json)


@keys_app.command("create")
def create_key(
    name: str,
    agent: Annotated[str | None, typer.Option(help="For this agent, by id or name; default: yours.")] = None,
    scope: Scopes = None,
    expires: ExpiresIn = None,
    as_json: AsJson = False,
) -> None:
    """Make a further key, shown once."""
    with console.connect(as_json=as_json) as broker:
        agent_id = None if agent is None else _find_agent(broker, agent)
        made = broker.create_key({"name": name} | _given(agent_id=agent_id, scopes=scope, expires_in=expires))
        console.show(made, tables.of_new_key, as_json=as_json)


@keys_app.command("rotate")
def rotate_key(
    key: KeyId,
    overlap: Annotated[
        int | None,
        typer.Option(parser=read_duration, metavar="TIME", help="So long the old one lives on; default: not."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replace a key by a new one, shown once."""
    with console.connect(as_json=as_json) as broker:
        console.show(broker.rotate_key(key, overlap_seconds=overlap or 0), tables.of_new_key, as_json=as_json)


@keys_app.command("revoke")
def revoke_key(key: KeyId, as_json: AsJson = False) -> None:
    """Revoke a key at once."""
    with console.connect(as_json=as_json) as broker:
        console.show(broker.revoke_key(key), tables.of_key, as_json=as_json)


def _find_agent(broker: "Client", word: str) -> str:
    """The id of an agent by its id or name. Raises BrokerError."""
    from gpubroker.client import BrokerError

    if _AGENT_ID.fullmatch(word):
        return word
    named = [agent.id for agent in broker.iterate_agents() if agent.name == word and agent.revoked_at is None]
    if len(named) > 1:
        detail, hint = f"{word!r} is {', '.join(named)}.", "Give the id."
        raise BrokerError({"code": "ambiguous_name", "detail": detail, "hint": hint})
    if not named:
        detail, hint = f"There is no agent {word!r}.", "'gpubroker agents' lists those there are."
        raise BrokerError({"status": 404, "code": "not_found", "detail": detail, "hint": hint})
    return named[0]


def _given(**fields: object) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
