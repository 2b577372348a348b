"""Resources as tables of texts, for people. Amounts are USD, times what is left of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, cast

from gpubroker.money import format_usd
from gpubroker.times import format_time, now

if TYPE_CHECKING:
    from gpubroker.resources import Page
    from gpubroker.resources.agents import Agent, AgentWithKey, Key, KeyWithSecret
    from gpubroker.resources.budgets import Budget
    from gpubroker.resources.offers import NoMatch, Offer, OfferPage
    from gpubroker.resources.pods import ChosenOffer, DryRun, Endpoint, Pod
    from gpubroker.resources.usage import Usage

NUMERIC: Final = frozenset(
    {"VCPUS", "RAM GB", "USD/H", "SPENT", "HELD", "LIMIT", "AVAILABLE", "TIME", "GPU TIME", "USD"}
)
"""The columns whose cells end at the right."""
_NOTHING: Final = "-"
_OVER: Final = frozenset({"failed", "terminating", "terminated"})
_NO_GPU: Final = f"{_NOTHING}, "


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns, whose names are empty where a table is the fields of one thing; and notes beside it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def of_offers(page: "OfferPage") -> Table:
    """What can be rented, or why there is nothing."""
    rows = [
        (offer.id, _gpu(offer.gpu, offer.gpu_count), f"{offer.vcpus:g}", f"{offer.ram_gb:g}", _place(offer),
         usd(offer.price_usd_per_hour))
        for offer in page.items
    ]  # fmt: skip
    notes = _explain(page.no_match) if page.no_match else _more(page)
    return Table(("OFFER", "GPU", "VCPUS", "RAM GB", "WHERE", "USD/H"), rows, notes)


def _place(offer: "Offer") -> str:
    marks = [mark for mark, is_so in (("spot", offer.spot), ("stale", offer.stale)) if is_so]
    return " ".join([_where(offer.provider, offer.region), *marks])


def _where(provider: str, region: str) -> str:
    return provider if region in (provider, "") else f"{provider} {region}"


def _explain(no_match: "NoMatch") -> list[str]:
    removed = ", ".join(f"{name} leaves out {count}" for name, count in no_match.removed_by.items())
    notes = [f"No offer matches; of {no_match.considered} {removed or 'none can be had now'}."]
    notes += [suggest(near.offer.id, near.change) for near in no_match.nearest]
    return notes


def suggest(offer_id: str, change: Mapping[str, Any]) -> str:
    """What would have to be asked for an offer to match."""
    changes = [_change(name, value) for name, value in change.items()]
    return f"{offer_id} would match {' and '.join(changes)}."


def _change(name: str, value: object) -> str:
    if name == "supports":
        have = ", ".join(map(str, cast("list[object]", value))) if isinstance(value, list) else ""
        return f"if it has to support {have} alone" if have else "if it has to support nothing, an image for instance"
    return f"without {name}" if value is None else f"with {name} {_write(value)}"


def _write(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def of_pods(page: "Page[Pod]") -> Table:
    """Pods, a line each."""
    rows = [
        (pod.id, pod.name or _NOTHING, pod.state, _gpu_of(pod.offer), usd(pod.price_usd_per_hour), usd(pod.spent_usd), _end(pod))
        for pod in page.items
    ]  # fmt: skip
    notes = _more(page) if page.items else ["No pods."]
    return Table(("POD", "NAME", "STATE", "GPU", "USD/H", "SPENT", "ENDS"), rows, notes)


def of_pod(pod: "Pod") -> Table:
    """All that matters of one pod."""
    offer = pod.offer
    machine = f"{_gpu_of(offer)}, {offer.vcpus:g} vCPUs, {offer.ram_gb:g} GB RAM"
    money = f"{usd(pod.price_usd_per_hour)} USD/h, {usd(pod.spent_usd)} spent, {usd(pod.committed_usd)} committed"
    is_over = pod.state in _OVER
    fields = {
        "pod": pod.id,
        "name": pod.name,
        "state": pod.state + (f" ({pod.state_reason})" if pod.state_reason else ""),
        "on": f"{pod.provider or offer.provider}: {machine.removeprefix(_NO_GPU)}",
        "price": money,
        "ends": None if is_over else f"{_to_the_second(pod.expires_at)}, in {_end(pod)}",
        "ended by": pod.ends_because,
        "exit code": None if pod.exit_code is None else str(pod.exit_code),
        **{f"port {endpoint.port or endpoint.name}": _reach(endpoint) for endpoint in pod.endpoints},
        **{f"label {name}": value for name, value in pod.labels.items()},
    }
    return Table(("", ""), [(name, value) for name, value in fields.items() if value])


def _reach(endpoint: "Endpoint") -> str:
    return endpoint.url or endpoint.command or f"{endpoint.host}:{endpoint.external_port}"


def of_dry_run(run: "DryRun") -> Table:
    """What a request for a pod would choose and hold."""
    rows = [
        ("offer", _describe(run.offer)),
        *(("or", _describe(offer)) for offer in run.alternatives),
        ("would hold", f"{usd(run.commit_usd)} USD of {usd(run.available_usd)} available"),
        ("affordable", span(run.affordable_seconds)),
        ("boots in", f"about {span(run.boot_seconds)}"),
    ]
    return Table(("", ""), rows)


def _describe(offer: "ChosenOffer") -> str:
    where = _where(offer.provider, offer.region)
    price = f"{usd(offer.price_usd_per_hour)} USD/h"
    return ", ".join(text for text in (offer.id, _gpu_of(offer), where, price) if text != _NOTHING)


def of_usage(usage: "Usage") -> Table:
    """What was used, by group, and its sum."""
    rows = [
        (row.key or "(none)", clock(row.seconds), clock(row.gpu_seconds), usd(row.amount_usd)) for row in usage.items
    ]
    total = usage.total
    rows.append(("total", clock(total.seconds), clock(total.gpu_seconds), usd(total.amount_usd)))
    note = f"from {_to_the_second(usage.from_)} to {_to_the_second(usage.to)}"
    return Table(("KEY", "TIME", "GPU TIME", "USD"), rows, [note])


def of_budgets(page: "Page[Budget]") -> Table:
    """Budgets, a line each."""
    rows = [
        (budget.agent_id, usd(budget.limit_usd), budget.period, usd(budget.spent_usd), usd(budget.held_usd),
         usd(budget.available_usd))
        for budget in page.items
    ]  # fmt: skip
    return Table(("AGENT", "LIMIT", "PERIOD", "SPENT", "HELD", "AVAILABLE"), rows, _more(page))


def of_budget(budget: "Budget") -> Table:
    """One budget."""
    rows = [
        ("agent", budget.agent_id),
        ("limit", f"{usd(budget.limit_usd)} USD ({budget.period})"),
        ("available", f"{usd(budget.available_usd)} USD"),
    ]
    return Table(("", ""), rows)


def of_agents(page: "Page[Agent]") -> Table:
    """Agents, a line each, with the names of those that they are under."""
    names = {agent.id: agent.name for agent in page.items}
    rows = [
        (agent.id, agent.name, names.get(agent.parent_id or "", _NOTHING), _life(agent), str(len(agent.effective_scopes)))
        for agent in page.items
    ]  # fmt: skip
    return Table(("AGENT", "NAME", "UNDER", "LIFE", "SCOPES"), rows, _more(page))


def of_agent(agent: "Agent") -> Table:
    """One agent."""
    rows = [
        ("agent", agent.id),
        ("name", agent.name),
        ("life", _life(agent)),
        ("scopes", " ".join(agent.effective_scopes) or _NOTHING),
    ]
    return Table(("", ""), rows)


def of_new_agent(agent: "AgentWithKey") -> Table:
    """An agent just made, with its key."""
    return Table(("", ""), [*of_agent(agent).rows, *_show_key(agent.key.id, agent.key.key)])


def of_keys(page: "Page[Key]") -> Table:
    """Keys, a line each, without the keys."""
    rows = [
        (key.id, key.start, key.name, _NOTHING if key.used_at is None else f"{_since(key.used_at)} ago", _life(key))
        for key in page.items
    ]  # fmt: skip
    return Table(("KEY", "STARTS", "NAME", "USED", "LIFE"), rows, _more(page))


def of_key(key: "Key") -> Table:
    """One key, without the key."""
    return Table(("", ""), [("key", key.id), ("name", key.name), ("agent", key.agent_id), ("life", _life(key))])


def of_new_key(key: "KeyWithSecret") -> Table:
    """A key just made."""
    return Table(("", ""), [("name", key.name), ("agent", key.agent_id), *_show_key(key.key.id, key.key.key)])


def _show_key(key_id: str, key: str | None) -> list[tuple[str, str]]:
    lost = f"lost with the first answer; gpubroker keys rotate {key_id}"
    return [("key id", key_id), ("key", f"{key}" if key else lost)]


# Cells


def usd(micro: int | None) -> str:
    """USD with two decimals, or as many as there are."""
    return _NOTHING if micro is None else usd_text(format_usd(micro))


def usd_text(amount: str) -> str:
    """An amount of the interface without the zeros at its end, but for two decimals."""
    whole, _, fraction = amount.partition(".")
    return f"{whole}.{fraction.rstrip('0').ljust(2, '0')}"


def span(seconds: float) -> str:
    """A time in its largest unit: 59s, 12m, 3h, 2d."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f}{unit}"
    return f"{max(0, seconds):.0f}s"


def _to_the_second(moment: datetime) -> str:
    return format_time(moment.replace(microsecond=0))


def clock(seconds: int) -> str:
    """A time to the second: 1:02:03."""
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _gpu(model: str | None, count: int) -> str:
    return f"{count}x {model}" if model else _NOTHING


def _gpu_of(offer: "ChosenOffer") -> str:
    return _gpu(offer.gpu, offer.gpu_count)


def _end(pod: "Pod") -> str:
    return _NOTHING if pod.state in _OVER else span((pod.expires_at - now()).total_seconds())


def _since(moment: datetime) -> str:
    return span((now() - moment).total_seconds())


def _life(it: "Agent | Key") -> str:
    if it.revoked_at is not None:
        return "revoked"
    if it.expires_at is None:
        return "no end"
    left = (it.expires_at - now()).total_seconds()
    return f"{span(left)} left" if left > 0 else "expired"


def _more(page: "Page[Any]") -> list[str]:
    return [f"There are more: --cursor {page.next_cursor}"] if page.next_cursor else []
