"""`gpubroker doctor`: looks at an installation from inside and from outside, and says what to do. It changes nothing.

One function a check. Each says in a line what it found, and when that is not well, what to do about it.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, NamedTuple

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from gpubroker import bundle, config
from gpubroker.ids import read_hard_stop
from gpubroker.money import format_usd
from gpubroker.providers import registry
from gpubroker.store import health

_SECONDS: Final = 10
_COLD_SECONDS: Final = 30
_CLOCK_SECONDS: Final = 5
_FOREIGN: Final = 500
_SWITCHED: Final = timedelta(minutes=15)
"""What is still seen so long after its hard stop was not ended by any switch: the dead man's is thrown every 5 minutes."""
_SWITCH: Final = "dead man's switch"
Connection = AsyncConnection[TupleRow]
Switch = Literal["provider", "deadman", "none"]


class Finding(NamedTuple):
    """What a check found. `what_to_do` is None when all is well."""

    check: str
    status: Literal["ok", "warning", "bad"]
    said: str
    what_to_do: str | None = None
    figures: Mapping[str, object] | None = None
    """What was counted, for machines."""


def ok(check: str, said: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", said)


async def examine() -> list[Finding]:
    """Every check there is, those of the database only where it can be reached."""
    settings = config.settings()
    found = [check_settings(settings)]
    reached, conn = await check_database(settings)
    found.append(reached)
    if conn is not None:
        async with conn:
            inside = [await check(settings, conn) for check in (check_schema, check_owner, check_clock)]
            found += inside
            if all(each.status != "bad" for each in inside):
                work = await health.read_work(conn)
                checks = (check_due_pods, check_events, check_ticks, check_providers, check_months)
                found += [check(settings, work) for check in checks]
                found.append(check_switches(await health.list_present(conn)))
    outside: tuple[Callable[[config.Settings], Awaitable[Finding]], ...] = (check_redis, check_broker, check_functions)
    return [*found, *await asyncio.gather(*(check(settings) for check in outside))]


# Inside


def check_settings(settings: config.Settings) -> Finding:
    """What every function needs is set."""
    needed = ("DATABASE_URL", "GPUBROKER_OWNER", "GPUBROKER_SECRET_KEY")
    missing = [name for name in needed if not settings.variable(name)]
    if missing:
        return Finding(
            "settings", "bad", f"missing: {', '.join(missing)}", "Set them; docs/settings.md says what they are."
        )
    return ok("settings", "all that is needed is set")


async def check_database(settings: config.Settings) -> tuple[Finding, Connection | None]:
    """PostgreSQL takes a connection. Gives it for the checks that follow."""
    try:
        conn = await AsyncConnection[TupleRow].connect(
            settings.database_url or "", connect_timeout=_SECONDS, autocommit=True
        )
    except (psycopg.Error, OSError) as error:
        reason = (str(error).strip().splitlines() or ["no answer"])[-1]
        advice = (
            "See that PostgreSQL runs, that DATABASE_URL is right, and that no policy of the network stands between."
        )
        return Finding("database", "bad", reason, advice), None
    return ok("database", f"PostgreSQL {conn.info.server_version // 10000} answers"), conn


async def check_schema(settings: config.Settings, conn: Connection) -> Finding:
    """The schema is one that this code works with."""
    del settings
    schema, mine = await health.read_schema(conn), health.newest()
    if schema.number is None:
        return Finding("schema", "bad", "the database was never migrated", "Run 'gpubroker migrate'.")
    if schema.number < mine:
        return Finding(
            "schema", "bad", f"{schema.number:04d} is older than this code's {mine:04d}", "Run 'gpubroker migrate'."
        )
    if (schema.needs or 0) > mine:
        return Finding(
            "schema", "bad", f"{schema.number:04d} needs code of {schema.needs:04d} or later", "Upgrade gpubroker."
        )
    return ok("schema", f"{schema.number:04d}, this code knows {mine:04d}")


async def check_owner(settings: config.Settings, conn: Connection) -> Finding:
    """The database is this installation's: a copy of another's must end nobody's pods."""
    schema = await health.read_schema(conn)
    if schema.owner is None:
        return Finding("owner", "bad", "the database has no installation yet", "Run 'gpubroker bootstrap'.")
    if schema.owner != settings.owner:
        said = f"the database belongs to {schema.owner}, GPUBROKER_OWNER is {settings.owner}"
        return Finding(
            "owner", "bad", said, "Is this a copy of another installation's database? Then give it one of its own."
        )
    return ok("owner", schema.owner)


async def check_clock(settings: config.Settings, conn: Connection) -> Finding:
    """This machine's clock is PostgreSQL's, by which everything is billed and ends."""
    del settings
    before = datetime.now(UTC)
    row = await (await conn.execute("SELECT clock_timestamp()")).fetchone()
    after = datetime.now(UTC)
    theirs: datetime = row[0] if row else after
    apart = max((before - theirs).total_seconds(), (theirs - after).total_seconds(), 0.0)
    if apart > _CLOCK_SECONDS:
        return Finding(
            "clock", "bad", f"{apart:.0f} s from PostgreSQL's", "Let NTP set both: hard stops and tokens go by it."
        )
    return ok("clock", f"within {apart:.1f} s of PostgreSQL's")


def check_due_pods(settings: config.Settings, work: health.Work) -> Finding:
    """No pod waits for a step that is long due."""
    del settings
    if not work.late_pods:
        return ok("due pods", "none is late")
    since = work.latest_late.isoformat(timespec="seconds") if work.latest_late else ""
    advice = "See the logs of 'reconcile' and 'provisioning', and whether their provider answers ('gpubroker providers check')."
    return Finding("due pods", "bad", f"{work.late_pods} are due since {since}", advice)


def check_events(settings: config.Settings, work: health.Work) -> Finding:
    """The Broker takes events, and consumers finish them."""
    del settings
    if work.unpublished:
        advice = "See that K_SINK is the Broker's address and that it is Ready; the ticks do the work meanwhile."
        return Finding("events", "warning", f"{work.unpublished} could not be published for 5 minutes", advice)
    if work.undelivered:
        why = f", such as: {work.failing}" if work.failing else ""
        advice = "See the Triggers and the logs of their consumers; the tick publishes them again."
        return Finding("events", "warning", f"{work.undelivered} wait for a consumer for 10 minutes{why}", advice)
    return ok("events", "none waits")


def check_ticks(settings: config.Settings, work: health.Work) -> Finding:
    """`reconcile` is ticked: without it nothing expires and no listing is made."""
    limit = timedelta(seconds=3 * settings.tick_seconds + 60)
    if work.tick_at is None or work.now - work.tick_at > limit:
        since = "never" if work.tick_at is None else f"last at {work.tick_at.isoformat(timespec='seconds')}"
        advice = "See that the PingSource 'reconcile' and its Service are Ready."
        return Finding("ticks", "bad", f"'reconcile' was ticked {since}", advice)
    return ok("ticks", f"the last at {work.tick_at.isoformat(timespec='seconds')}")


def check_providers(settings: config.Settings, work: health.Work) -> Finding:
    """Every provider's account answers, and is believed."""
    del settings
    if work.distrusted:
        advice = "Too much vanished at once: see the vendor's console. Nothing is believed gone for half an hour."
        return Finding("providers", "bad", work.sick or "", advice)
    if work.unhealthy:
        return Finding(
            "providers", "warning", work.sick or "", "Run 'gpubroker providers check'; its pods are kept meanwhile."
        )
    return ok("providers", "all answer")


def check_months(settings: config.Settings, work: health.Work) -> Finding:
    """The last month is closed from the 3rd on."""
    del settings
    if work.month_is_late:
        return Finding("months", "warning", "last month is not closed yet", "'reconcile' closes it: see its logs.")
    return ok("months", "closed as they should be")


def check_switches(present: Sequence[health.Present]) -> Finding:
    """What ends every instance when the broker is dead, and what an hour costs of those that nothing would end.

    A machine that would only power itself off bills on at most vendors: that is no switch.
    """
    by_switch: dict[Switch, list[health.Present]] = {switch: [] for switch in ("provider", "deadman", "none")}
    for instance in present:
        by_switch[_find_switch(instance)].append(instance)
    figures = {name: _sum(instances) for name, instances in by_switch.items()}
    none, deadman = by_switch["none"], by_switch["deadman"]
    said = f"{format_usd(0)} USD/h without one" if not none else f"no switch covers {_describe(none)}"
    if deadman:
        said += f"; 'gpubroker deadman' alone covers {_describe(deadman)}"
    if by_switch["provider"]:
        said += f"; their providers end {_describe(by_switch['provider'])}"
    advice: list[str] = []
    if none:
        advice.append("Look at these at their providers and end them there: nothing else will.")
    if deadman:
        needed = ", ".join(["GPUBROKER_OWNER", *_credentials({instance.provider for instance in deadman})])
        advice.append(
            f"Nothing here can see whether 'gpubroker deadman' runs: see that it does, best in another cluster, with {needed}."
        )
    return Finding(_SWITCH, "bad" if none else "warning" if deadman else "ok", said, " ".join(advice) or None, figures)


def _find_switch(instance: health.Present) -> Switch:
    """What would end it. Without an adapter, or a hard stop in its reference, the dead man's switch does not know it."""
    stop = read_hard_stop(instance.ref or "")
    stops_at = max((each for each in (stop, instance.hard_stop_at) if each is not None), default=None)
    if instance.seen_at and stops_at and instance.seen_at > stops_at + _SWITCHED:
        return "none"
    if instance.ends_itself:
        return "provider"
    return "deadman" if stop is not None and instance.provider in registry.names() else "none"


def _sum(instances: Sequence[health.Present]) -> dict[str, object]:
    prices = [instance.price_micro_h for instance in instances]
    sums: Counter[str] = Counter()
    for instance in instances:
        sums[instance.provider] += instance.price_micro_h or 0
    return {
        "instances": len(prices),
        "unpriced": prices.count(None),
        "usd_per_hour": format_usd(sums.total()),
        "by_provider": {provider: format_usd(micro) for provider, micro in sorted(sums.items())},
    }


def _describe(instances: Sequence[health.Present]) -> str:
    total = format_usd(sum(instance.price_micro_h or 0 for instance in instances))
    unpriced = sum(instance.price_micro_h is None for instance in instances)
    more = f", and {unpriced} of unknown price" if unpriced else ""
    return f"{total} USD/h{more} ({', '.join(sorted({instance.provider for instance in instances}))})"


def _credentials(providers: Iterable[str]) -> list[str]:
    return [name for provider in sorted(providers) for name in registry.adapter(provider).credentials]


# Outside


async def check_redis(settings: config.Settings) -> Finding:
    """Redis answers, where there is to be one."""
    if settings.redis_url is None:
        return Finding(
            "redis", "warning", "REDIS_URL is not set", "Each process counts rate limits for itself: set one."
        )
    from redis.asyncio import Redis  # noqa: PLC0415 - only the doctor asks for it at once
    from redis.exceptions import RedisError  # noqa: PLC0415 - as above

    client = Redis.from_url(settings.redis_url, socket_timeout=_SECONDS, socket_connect_timeout=_SECONDS)
    try:
        await client.execute_command("PING")
    except (RedisError, OSError) as error:
        advice = "It is only a cache: requests go on, with limits of each process's own."
        return Finding("redis", "warning", str(error) or type(error).__name__, advice)
    finally:
        await client.aclose()
    return ok("redis", "answers")


async def check_broker(settings: config.Settings) -> Finding:
    """Whatever is at K_SINK answers."""
    if settings.sink_url is None:
        return Finding(
            "broker", "warning", "K_SINK is not set", "Only the ticks move things: set it to the Broker's address."
        )
    status = await _ask(settings.sink_url, _SECONDS, method="OPTIONS")
    if isinstance(status, str) or status >= _FOREIGN:
        return Finding(
            "broker", "bad", f"{settings.sink_url}: {status}", "See that the Broker is Ready; the ticks do its work."
        )
    return ok("broker", f"{settings.sink_url} answers")


async def check_functions(settings: config.Settings) -> Finding:
    """Every public function answers where agents call it."""
    names = [function.name for function in bundle.FUNCTIONS if function.kind == "public"]
    base = (settings.variable("GPUBROKER_URL") or settings.public_url).rstrip("/")
    urls = [f"{base.replace('{function}', name)}/openapi/{name}.json" for name in names]
    answers = await asyncio.gather(*(_ask(url, _COLD_SECONDS) for url in urls))
    silent = {name: answer for name, answer in zip(names, answers, strict=True) if answer != 200}  # noqa: PLR2004 - OK
    if silent:
        said = ", ".join(f"{name}: {answer}" for name, answer in silent.items())
        advice = (
            f"See that {base} leads to them, and 'kubectl get ksvc': a function that cannot start says why in its log."
        )
        return Finding("functions", "bad", said, advice)
    return ok("functions", f"{len(names)} answer at {base}")


async def _ask(url: str, seconds: float, *, method: str = "GET") -> int | str:
    """The status of an answer, or why there is none."""
    import httpx  # noqa: PLC0415 - only the doctor asks for it at once

    try:
        async with httpx.AsyncClient(timeout=seconds, trust_env=False) as client:
            return (await client.request(method, url)).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return type(error).__name__
