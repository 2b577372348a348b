"""Rows of `provider_account`, `refresh`, `offer` and `offer_price`."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Final, LiteralString, NamedTuple

from psycopg.rows import class_row, dict_row
from pydantic import TypeAdapter

from gpubroker.resources.offers import Gpu, Offer, PriceStep, ProviderView
from gpubroker.store import Connection
from gpubroker.store.candidates import Candidate

_COLUMNS: Final = """
SELECT o.id, o.provider, o.provider_offer_id, o.gpu, o.gpu_count, o.vram_gb, o.vcpus::float, o.ram_gb::float, o.disk_gb,
       o.region, o.country, o.spot, o.min_billing_s AS min_billing_seconds, o.increment_s AS billing_increment_seconds,
       array_to_string(o.supports, ',') AS supports, o.reliability, o.availability,
       p.refreshed_at AS observed_at, p.refreshed_at + p.stale_after_s * interval '1 second' < clock_timestamp() AS stale, """
_PRICE: Final = """o.price_micro_h AS price_usd_per_hour, o.stopped_micro_h AS stopped_price_usd_per_hour,
       CASE WHEN o.gpu_count > 0 THEN o.per_gpu END AS price_usd_per_gpu_hour"""
_DISK_PRICE: Final = "(o.price_micro_h + o.disk_micro_gb_h * greatest(0, %(disk)s - o.disk_base_gb))"
_STOPPED_PRICE: Final = "(o.stopped_micro_h + o.stopped_disk_micro_gb_h * greatest(0, %(disk)s - o.disk_base_gb))"
_PRICE_WITH_DISK: Final = (
    _DISK_PRICE
    + " AS price_usd_per_hour, "
    + _STOPPED_PRICE
    + " AS stopped_price_usd_per_hour, CASE WHEN o.gpu_count > 0 THEN "
    + _DISK_PRICE
    + " / o.gpu_count END AS price_usd_per_gpu_hour"
)
_FROM: Final = " FROM offer o JOIN provider_account p ON p.id = o.account_id WHERE p.refreshed_at IS NOT NULL AND o.gone_at IS NULL"
_OPEN: Final = " AND o.quarantined IS NULL"
_AVAILABLE: Final = " AND o.availability <> 'none'"

FILTERS: Final[Mapping[LiteralString, LiteralString]] = {
    "gpu": "o.gpu = ANY (%(gpu)s)",
    "gpu_count": "o.gpu_count = %(gpu_count)s",
    "min_gpu_count": "o.gpu_count >= %(min_gpu_count)s",
    "min_vram_gb": "o.vram_gb >= %(min_vram_gb)s",
    "min_vcpus": "o.vcpus >= %(min_vcpus)s",
    "min_ram_gb": "o.ram_gb >= %(min_ram_gb)s",
    "min_disk_gb": "o.disk_gb >= %(min_disk_gb)s",
    "provider": "o.provider = ANY (%(provider)s)",
    "region": "o.region ILIKE %(region)s",
    "country": "o.country = %(country)s",
    "spot": "o.spot = %(spot)s",
    "max_price_usd_per_hour": _DISK_PRICE + " <= %(max_price_usd_per_hour)s",
    "max_price_usd_per_gpu_hour": "o.gpu_count > 0 AND "
    + _DISK_PRICE
    + " / greatest(o.gpu_count, 1) <= %(max_price_usd_per_gpu_hour)s",
    "supports": "o.supports @> %(supports)s",
    "min_reliability": "o.reliability >= %(min_reliability)s::real",
}
"""Every filter of a search, by its public name. Values are columns' units: micro-USD, ILIKE patterns, lists of names."""

_SORTS: Final[Mapping[str, LiteralString]] = {
    "price": "o.price_micro_h",
    "price_per_gpu": "o.per_gpu",
    "price_per_vram_gb": "o.per_vram",
    "value": "o.value",
}
_SORTS_WITH_DISK: Final[Mapping[str, LiteralString]] = {
    "price": _DISK_PRICE,
    "price_per_gpu": _DISK_PRICE + " / greatest(o.gpu_count, 1)",
    "price_per_vram_gb": "CASE WHEN o.vram_gb * o.gpu_count > 0 THEN "
    + _DISK_PRICE
    + " / (o.vram_gb * o.gpu_count) ELSE o.per_vram END",
    "value": "CASE WHEN o.vram_gb * o.gpu_count > 0 THEN ("
    + _DISK_PRICE
    + " / (o.vram_gb * o.gpu_count) / greatest(coalesce(o.reliability, 0.9), 0.1))::bigint ELSE o.value END",
}


class Question(NamedTuple):
    """A search. `filters` are values by the names of FILTERS; `after` is (sort value, id) of the last offer seen."""

    filters: Mapping[str, Any]
    sort: str = "price"
    descending: bool = False
    available: bool = True
    disk_gb: int = 0
    after: tuple[int, str] | None = None
    limit: int = 50


_OF_ACCOUNT: Final = " JOIN provider_account p ON p.id = o.account_id AND p.refreshed_at IS NOT NULL"
_EACH: Final = """
 CROSS JOIN LATERAL (SELECT o.* FROM offer o WHERE o.gpu = s.gpu AND o.gpu_count = s.gpu_count AND o.gone_at IS NULL"""
_PLAIN: Final[Mapping[str, LiteralString]] = {
    "max_price_usd_per_hour": "o.price_micro_h <= %(max_price_usd_per_hour)s",
    "max_price_usd_per_gpu_hour": "o.per_gpu <= %(max_price_usd_per_gpu_hour)s AND o.gpu_count > 0",
}
"""What filters say where no disk is asked for, so that an index serves them."""
_PLAIN_WITHIN: Final[Mapping[str, LiteralString]] = {
    **_PLAIN,
    "max_price_usd_per_gpu_hour": "o.price_micro_h < (%(max_price_usd_per_gpu_hour)s::bigint + 1) * s.gpu_count",
}
"""The same within a shape `s`: its own index goes by the price of the whole."""
_ENDS: Final[Mapping[str, tuple[LiteralString, LiteralString]]] = {
    "": ("max", "9223372036854775807"),
    " DESC": ("min", "-1"),
}
"""By the way of an order: what gives the place that is furthest on it, and a place beyond all."""
_SHAPES: Final[Mapping[str, LiteralString]] = {
    "gpu": "gpu = ANY (%(gpu)s)",
    "gpu_count": "gpu_count = %(gpu_count)s",
    "min_gpu_count": "gpu_count >= %(min_gpu_count)s",
    "min_vram_gb": "vram_gb >= %(min_vram_gb)s",
}


async def search(conn: Connection, question: Question) -> list[tuple[int, Offer]]:
    """Offers in the order asked for, each with its sort value; by index, whatever the filters, where BY_INDEX is set."""
    by = (_SORTS_WITH_DISK if question.disk_gb else _SORTS)[question.sort]
    rules: LiteralString = _OPEN + (_AVAILABLE if question.available else "")
    if question.after is not None:
        rules += " AND (" + by + ", o.id) " + ("<" if question.descending else ">") + " (%(after_value)s, %(after_id)s)"
    columns: LiteralString = _COLUMNS + (_PRICE_WITH_DISK if question.disk_gb else _PRICE) + ", " + by + " AS place"
    sql = columns + _compose(question.filters, question.disk_gb, rules, by, descending=question.descending)
    return await _fetch(conn, sql, question)


def _compose(
    filters: Mapping[str, Any], disk_gb: int, rules: LiteralString, by: LiteralString, *, descending: bool = False
) -> LiteralString:
    """FROM to LIMIT of a search: along the index of its order, or, where a filter speaks of GPUs, within each shape."""
    way = " DESC" if descending else ""
    order: LiteralString = " ORDER BY " + by + way + ", o.id" + way
    shaping = [name for name in _SHAPES if _has_gpu(filters, name)]
    plain = _PLAIN_WITHIN if shaping else _PLAIN
    for name, rule in FILTERS.items():
        if name in filters and (
            name not in shaping or name == "min_vram_gb"
        ):  # an unknown model comes in several sizes
            said: LiteralString = rule if disk_gb else plain.get(name, rule)
            rules += " AND " + said
    order_limit: LiteralString = order + " LIMIT %(limit)s"
    if not shaping:
        return _FROM + rules + order_limit
    shapes: LiteralString = "(SELECT DISTINCT gpu, gpu_count FROM offer_shape WHERE true"
    for name in shaping:
        shapes += " AND " + _SHAPES[name]
    shapes += ") s"
    rules_within = rules + " AND " + by + (" >= " if descending else " <= ") + "s.last"
    shapes = _narrow(shapes, rules, by, way)
    return " FROM " + shapes + _EACH + rules_within + order_limit + ") o" + _OF_ACCOUNT + order_limit


def _narrow(shapes: LiteralString, rules: LiteralString, by: LiteralString, way: LiteralString) -> LiteralString:
    """Of many shapes those that the first n offers are of, whose own first ones come first; none of these is beyond `last`.

    That is the place of the n-th shape's first offer or, of fewer shapes, of the n-th offer of the one that comes first.
    """
    order: LiteralString = " ORDER BY " + by + way + ", o.id" + way
    furthest, beyond = _ENDS[way]
    each: LiteralString = _EACH + rules + order
    firsts: LiteralString = (
        "SELECT s.gpu, s.gpu_count, " + by + " AS place FROM " + shapes + each + " LIMIT 1) o" + order
    )
    first: LiteralString = "(SELECT * FROM firsts ORDER BY place" + way + " LIMIT 1) s"
    nth: LiteralString = "SELECT " + by + " FROM " + first + each + " OFFSET %(limit)s - 1 LIMIT 1) o"
    last: LiteralString = "CASE WHEN (SELECT count(*) FROM firsts) = %(limit)s THEN (SELECT " + furthest
    last += "(place) FROM firsts) ELSE coalesce((" + nth + "), " + beyond + ") END AS last"
    return "(WITH firsts AS MATERIALIZED (" + firsts + " LIMIT %(limit)s) SELECT *, " + last + " FROM firsts) s"


def _has_gpu(filters: Mapping[str, Any], name: str) -> bool:
    """Say whether this filter leaves out every offer without GPU, so that shapes can stand for it."""
    return name in filters and (name in ("gpu", "min_vram_gb") or filters[name] > 0)


async def _fetch(conn: Connection, sql: LiteralString, question: Question) -> list[tuple[int, Offer]]:
    parameters = {**question.filters, "disk": question.disk_gb, "limit": question.limit}
    if question.after is not None:
        parameters |= {"after_value": question.after[0], "after_id": question.after[1]}
    cursor = conn.cursor(row_factory=dict_row, binary=True)
    await cursor.execute(sql, parameters)
    found = await cursor.fetchall()
    return [(int(row["place"]), offer) for row, offer in zip(found, _reader().validate_python(found), strict=True)]


@cache
def _reader() -> TypeAdapter[list[Offer]]:
    """Makes offers of a page's rows at once, in half the time of one by one."""
    return TypeAdapter(list[Offer])


class NearOffer(NamedTuple):
    """An offer that almost matched, and the filters that leave it out."""

    offer_id: str
    failed: list[str]


class Explanation(NamedTuple):
    """Why a search found nothing."""

    considered: int
    removed_by: dict[str, int]
    nearest: list[NearOffer]


async def explain(
    conn: Connection, filters: Mapping[str, Any], disk_gb: int, limit: int, *, available: bool
) -> Explanation:
    """Hold every live offer against every filter: only for searches that found nothing, it reads all of them."""
    failed: LiteralString = "ARRAY[]::text[]"
    counts: LiteralString = "count(*)::int"
    for name, rule in FILTERS.items():
        if name not in filters:
            continue
        failed += " || CASE WHEN (" + rule + ") IS TRUE THEN '{}' ELSE ARRAY['" + name + "'] END"
        counts += ", count(*) FILTER (WHERE (" + rule + ") IS NOT TRUE)::int"
    given = [name for name in FILTERS if name in filters]
    parameters = {**filters, "disk": disk_gb, "limit": limit}
    live: LiteralString = _FROM + _OPEN + (_AVAILABLE if available else "")
    await conn.execute("SET LOCAL enable_seqscan = on")
    row = await (await conn.execute("SELECT " + counts + live, parameters)).fetchone()
    considered, *removed = row or (0,)
    nearest: LiteralString = "SELECT o.id AS offer_id, " + failed + " AS failed" + live
    nearest += " ORDER BY cardinality(" + failed + "), o.price_micro_h, o.id LIMIT %(limit)s"
    cursor = conn.cursor(row_factory=class_row(NearOffer))
    await cursor.execute(nearest, parameters)
    removed_by = {name: count for name, count in zip(given, removed, strict=True) if count}
    return Explanation(considered, removed_by, await cursor.fetchall())


_GPUS: Final = """
SELECT gpu AS model, max(vram_gb) AS vram_gb, array_agg(DISTINCT provider ORDER BY provider) AS providers, count(*)::int AS offers,
       min(per_gpu) AS lowest_usd_per_gpu_hour,
       percentile_disc(0.5) WITHIN GROUP (ORDER BY per_gpu) AS median_usd_per_gpu_hour
  FROM offer WHERE gpu IS NOT NULL AND gone_at IS NULL AND quarantined IS NULL AND availability <> 'none' GROUP BY gpu"""


async def list_gpus(conn: Connection) -> list[Gpu]:
    """The GPU models that can be had now."""
    cursor = conn.cursor(row_factory=class_row(Gpu))
    await cursor.execute(_GPUS)
    return await cursor.fetchall()


_PRICES: Final = """
WITH priced AS (
    SELECT o.id, p.price_micro_h / greatest(o.gpu_count, 1) AS per_gpu, p.at,
           lead(p.at, 1, coalesce(o.gone_at, 'infinity')) OVER (PARTITION BY o.id ORDER BY p.at) AS until
      FROM offer o JOIN offer_price p ON p.offer_id = o.id
     WHERE o.gpu = ANY (%(models)s) AND o.quarantined IS NULL AND p.at < %(to)s
       AND (%(provider)s::text IS NULL OR o.provider = %(provider)s)
)
SELECT s.at AS from_, min(p.per_gpu) AS low_usd_per_gpu_hour,
       percentile_disc(0.5) WITHIN GROUP (ORDER BY p.per_gpu) AS median_usd_per_gpu_hour,
       max(p.per_gpu) AS high_usd_per_gpu_hour, count(DISTINCT p.id)::int AS offers
  FROM generate_series(%(from)s::timestamptz, %(to)s::timestamptz - interval '1 microsecond', %(step)s::interval) s (at)
  LEFT JOIN priced p ON p.at < least(s.at + %(step)s::interval, %(to)s) AND p.until > s.at
 GROUP BY s.at ORDER BY s.at"""


async def list_prices(
    conn: Connection, models: Sequence[str], provider: str | None, span: tuple[datetime, datetime], step: timedelta
) -> list[PriceStep]:
    """What these models cost in each step of a time, by the prices that refreshes saw change."""
    cursor = conn.cursor(row_factory=class_row(PriceStep))
    begin, end = span
    parameters = {"models": list(models), "provider": provider, "from": begin, "to": end, "step": step}
    await cursor.execute(_PRICES, parameters)
    return await cursor.fetchall()


_PROVIDERS: Final = """
SELECT DISTINCT ON (p.provider) p.provider AS name, true AS configured, p.unhealthy_since IS NULL AS healthy,
       p.refreshed_at AS last_refresh, extract(epoch FROM clock_timestamp() - p.refreshed_at)::int AS staleness_seconds,
       coalesce(p.refreshed_at + p.stale_after_s * interval '1 second' < clock_timestamp(), true) AS stale,
       (SELECT count(*)::int FROM offer o WHERE o.account_id = p.id AND o.gone_at IS NULL) AS offers, p.capabilities, p.last_error
  FROM provider_account p ORDER BY p.provider, p.refreshed_at DESC NULLS LAST"""


async def list_providers(conn: Connection) -> list[ProviderView]:
    """The providers that were ever asked for offers, each by the account that was refreshed last."""
    cursor = conn.cursor(row_factory=class_row(ProviderView))
    await cursor.execute(_PROVIDERS)
    return await cursor.fetchall()


_FIND: Final = _COLUMNS + _PRICE_WITH_DISK + _FROM + " AND o.id = %(id)s"


async def find_offer(conn: Connection, offer_id: str, disk_gb: int = 0) -> Offer | None:
    """An offer by its id, available or not, unless it is gone; its price is with this much disk."""
    cursor = conn.cursor(row_factory=class_row(Offer))
    await cursor.execute(_FIND, {"id": offer_id, "disk": disk_gb})
    return await cursor.fetchone()


_CALLED: Final = """
SELECT DISTINCT gpu FROM offer_shape WHERE lower(regexp_replace(gpu, '[^A-Za-z0-9]', '', 'g')) = %s ORDER BY gpu"""


async def list_called(conn: Connection, compact: str) -> list[str]:
    """The GPUs that offers ever had whose name, its letters and digits alone in lower case, is this."""
    return [str(row[0]) for row in await (await conn.execute(_CALLED, (compact,))).fetchall()]


_CANDIDATE: Final = """
SELECT o.id AS offer_id, o.account_id, o.provider, o.provider_offer_id, o.gpu, o.gpu_count, o.vram_gb, o.vcpus::float,
       o.ram_gb::float,
       o.disk_gb, o.region, o.country, o.spot,
       o.price_micro_h + o.disk_micro_gb_h * greatest(0, %(disk)s - o.disk_base_gb) AS price_micro_h,
       o.stopped_micro_h + o.stopped_disk_micro_gb_h * greatest(0, %(disk)s - o.disk_base_gb) AS stopped_micro_h,
       o.min_billing_s, o.increment_s, o.supports, o.reliability, p.capabilities,
       CASE WHEN o.disk_micro_gb_h + o.stopped_disk_micro_gb_h = 0 THEN o.disk_gb
            ELSE greatest(%(disk)s, o.disk_base_gb) END AS priced_disk_gb,
       o.availability, to_char(p.refreshed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS observed_at,
       p.refreshed_at + p.stale_after_s * interval '1 second' < clock_timestamp() AS stale"""


_FRESH: Final = """
SELECT array_agg(id) FILTER (WHERE is_fresh), array_agg(id) FILTER (WHERE NOT is_fresh)
  FROM (SELECT id, refreshed_at + stale_after_s * interval '1 second' >= clock_timestamp() AS is_fresh
          FROM provider_account WHERE refreshed_at IS NOT NULL) a"""
_OF_THESE: Final = " AND o.account_id = ANY (%(accounts)s)"


async def list_candidates(conn: Connection, filters: Mapping[str, Any], disk_gb: int, limit: int) -> list[Candidate]:
    """The offers that a pod may use, cheapest first; those of a provider that was not refreshed lately come last."""
    by = (_SORTS_WITH_DISK if disk_gb else _SORTS)["price"]
    sql: LiteralString = _CANDIDATE + _compose(filters, disk_gb, _OPEN + _AVAILABLE + _OF_THESE, by)
    row = await (await conn.execute(_FRESH)).fetchone()
    found: list[Candidate] = []
    for accounts in row or ():
        if not accounts or len(found) >= limit:
            continue
        cursor = conn.cursor(row_factory=class_row(Candidate))
        await cursor.execute(sql, {**filters, "disk": disk_gb, "limit": limit - len(found), "accounts": accounts})
        found += await cursor.fetchall()
    return found


_FIND_CANDIDATE: Final = _CANDIDATE + _FROM + _OPEN + " AND o.id = %(id)s"


async def find_candidate(conn: Connection, offer_id: str, disk_gb: int) -> Candidate | None:
    """One offer as a pod may use it, available or not, unless it is gone."""
    cursor = conn.cursor(row_factory=class_row(Candidate))
    await cursor.execute(_FIND_CANDIDATE, {"id": offer_id, "disk": disk_gb})
    return await cursor.fetchone()
