"""Rows of `provider_account`, `refresh`, `offer` and `offer_price`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, LiteralString

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from gpubroker.resources import Offer
from gpubroker.store import Connection

_COLUMNS: Final = """
SELECT o.id, o.provider, o.provider_offer_id, o.gpu, o.gpu_count, o.vram_gb, o.vcpus, o.ram_gb, o.disk_gb, o.region, o.country,
       o.spot, o.min_billing_s AS min_billing_seconds, o.increment_s AS billing_increment_seconds,
       o.stopped_micro_h AS stopped_price_usd_per_hour, o.supports, o.reliability, o.availability,
       p.refreshed_at AS observed_at, p.refreshed_at + p.stale_after_s * interval '1 second' < clock_timestamp() AS stale, """
_PRICE: Final = """o.price_micro_h AS price_usd_per_hour,
       CASE WHEN o.gpu_count > 0 THEN o.per_gpu END AS price_usd_per_gpu_hour"""
_PRICE_WITH_DISK: Final = """o.price_micro_h + o.disk_micro_gb_h * greatest(0, %(disk)s - o.disk_base_gb) AS price_usd_per_hour,
       CASE WHEN o.gpu_count > 0
            THEN (o.price_micro_h + o.disk_micro_gb_h * greatest(0, %(disk)s - o.disk_base_gb)) / o.gpu_count
       END AS price_usd_per_gpu_hour"""
_FROM: Final = " FROM offer o JOIN provider_account p ON p.id = o.account_id WHERE p.refreshed_at IS NOT NULL AND o.gone_at IS NULL"
_OPEN: Final = " AND o.quarantined IS NULL"
_AVAILABLE: Final = " AND o.availability <> 'none'"

FILTERS: Final[Mapping[str, LiteralString]] = {
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
    "max_price_usd_per_hour": "o.price_micro_h + o.disk_micro_gb_h * greatest(0, %(disk)s - o.disk_base_gb)"
    " <= %(max_price_usd_per_hour)s",
    "max_price_usd_per_gpu_hour": "o.per_gpu <= %(max_price_usd_per_gpu_hour)s AND o.gpu_count > 0",
    "supports": "o.supports @> %(supports)s",
    "min_reliability": "o.reliability >= %(min_reliability)s",
}
"""Every filter of a search, by its public name. Values are columns' units: micro-USD, ILIKE patterns, lists of names."""

_SORTS: Final[Mapping[str, LiteralString]] = {
    "price": "o.price_micro_h",
    "price_with_disk": "(o.price_micro_h + o.disk_micro_gb_h * greatest(0, %(disk)s - o.disk_base_gb))",
    "price_per_gpu": "o.per_gpu",
    "price_per_vram_gb": "o.per_vram",
    "value": "o.value",
}


@dataclass(frozen=True, slots=True)
class Question:
    """A search. `filters` are values by the names of FILTERS; `after` is (sort value, id) of the last offer seen."""

    filters: Mapping[str, Any]
    sort: str = "price"
    descending: bool = False
    available: bool = True
    disk_gb: int = 0
    after: tuple[int, str] | None = None
    limit: int = 50


_OF_ACCOUNT: Final = " JOIN provider_account p ON p.id = o.account_id AND p.refreshed_at IS NOT NULL"
_WITHIN: Final = "SELECT o.* FROM offer o WHERE o.gpu = s.gpu AND o.gpu_count = s.gpu_count AND o.gone_at IS NULL"
_PLAIN_PRICE: Final = "o.price_micro_h <= %(max_price_usd_per_hour)s"
_SHAPES: Final[Mapping[str, LiteralString]] = {
    "gpu": "gpu = ANY (%(gpu)s)",
    "gpu_count": "gpu_count = %(gpu_count)s",
    "min_gpu_count": "gpu_count >= %(min_gpu_count)s",
    "min_vram_gb": "vram_gb >= %(min_vram_gb)s",
}


async def search(conn: Connection, question: Question) -> list[tuple[int, Offer]]:
    """Offers in the order asked for, each with its sort value; by index, whatever the filters."""
    by = _SORTS["price_with_disk" if question.sort == "price" and question.disk_gb else question.sort]
    shaping = [name for name in _SHAPES if _has_gpu(question.filters, name)]
    rules: LiteralString = _OPEN + (_AVAILABLE if question.available else "")
    for name in question.filters:
        if name not in shaping:
            rules += " AND " + (
                _PLAIN_PRICE if name == "max_price_usd_per_hour" and not question.disk_gb else FILTERS[name]
            )
    if question.after is not None:
        rules += " AND (" + by + ", o.id) " + ("<" if question.descending else ">") + " (%(after_value)s, %(after_id)s)"
    way = " DESC" if question.descending else ""
    order: LiteralString = " ORDER BY " + by + way + ", o.id" + way + " LIMIT %(limit)s"
    columns: LiteralString = _COLUMNS + (_PRICE_WITH_DISK if question.disk_gb else _PRICE) + ", " + by + " AS place"
    if shaping:
        shape: LiteralString = "SELECT DISTINCT gpu, gpu_count FROM offer_shape WHERE true"
        for name in shaping:
            shape += " AND " + _SHAPES[name]
        source: LiteralString = " FROM (" + shape + ") s CROSS JOIN LATERAL (" + _WITHIN + rules + order + ") o"
        sql: LiteralString = columns + source + _OF_ACCOUNT + order
    else:
        sql = columns + _FROM + rules + order
    return await _fetch(conn, sql, question)


def _has_gpu(filters: Mapping[str, Any], name: str) -> bool:
    """Say whether this filter leaves out every offer without GPU, so that shapes can stand for it."""
    return name in filters and (name in ("gpu", "min_vram_gb") or filters[name] > 0)


async def _fetch(conn: Connection, sql: LiteralString, question: Question) -> list[tuple[int, Offer]]:
    parameters = {**question.filters, "disk": question.disk_gb, "limit": question.limit}
    if question.after is not None:
        parameters |= {"after_value": question.after[0], "after_id": question.after[1]}
    cursor = await conn.execute(sql, parameters)
    names = [column.name for column in cursor.description or ()]
    found: list[tuple[int, Offer]] = []
    for row in await cursor.fetchall():
        values = dict(zip(names, row, strict=True))
        found.append((int(values.pop("place")), Offer(**values)))
    return found


_FIND: Final = _COLUMNS + _PRICE + _FROM + " AND o.id = %(id)s"


async def find_offer(conn: Connection, offer_id: str) -> Offer | None:
    """An offer by its id, available or not, unless it is gone."""
    cursor = conn.cursor(row_factory=class_row(Offer))
    await cursor.execute(_FIND, {"id": offer_id})
    return await cursor.fetchone()


@dataclass(frozen=True, slots=True)
class Candidate:
    """An offer as a pod may use it: the price for the disk asked for, and what its provider needs and costs."""

    offer_id: str
    account_id: str
    provider: str
    provider_offer_id: str
    gpu: str | None
    gpu_count: int
    vram_gb: int | None
    vcpus: float
    ram_gb: float
    disk_gb: int
    region: str
    country: str | None
    spot: bool
    price_micro_h: int
    stopped_micro_h: int | None
    min_billing_s: int
    increment_s: int
    supports: list[str]
    reliability: float | None
    capabilities: dict[str, Any]


_CANDIDATE: Final = """
SELECT o.id AS offer_id, o.account_id, o.provider, o.provider_offer_id, o.gpu, o.gpu_count, o.vram_gb, o.vcpus::float,
       o.ram_gb::float,
       o.disk_gb, o.region, o.country, o.spot,
       o.price_micro_h + o.disk_micro_gb_h * greatest(0, %(disk)s - o.disk_base_gb) AS price_micro_h, o.stopped_micro_h,
       o.min_billing_s, o.increment_s, o.supports, o.reliability, p.capabilities"""


async def list_candidates(
    conn: Connection, filters: Mapping[str, Any], disk_gb: int, limit: int, *, offer_id: str | None = None
) -> list[Candidate]:
    """The offers that a pod may use, cheapest first, those of a provider not refreshed lately last."""
    sql: LiteralString = _CANDIDATE + _FROM + _OPEN
    if offer_id is None:
        sql += _AVAILABLE
    else:
        sql += " AND o.id = %(offer_id)s"
    for name in filters:
        sql += " AND " + FILTERS[name]
    sql += (
        " ORDER BY p.refreshed_at + p.stale_after_s * interval '1 second' < clock_timestamp(),"
        " o.price_micro_h + o.disk_micro_gb_h * greatest(0, %(disk)s - o.disk_base_gb), o.id LIMIT %(limit)s"
    )
    cursor = conn.cursor(row_factory=class_row(Candidate))
    await cursor.execute(sql, {**filters, "disk": disk_gb, "limit": limit, "offer_id": offer_id})
    return await cursor.fetchall()


# Refreshing


_ENSURE_ACCOUNT: Final = """
INSERT INTO provider_account (id, provider, identity, capabilities, stale_after_s)
VALUES (new_id('acc'), %(provider)s, %(identity)s, %(capabilities)s, %(stale_after)s)
ON CONFLICT (provider, identity) DO UPDATE
   SET capabilities = excluded.capabilities, stale_after_s = excluded.stale_after_s
RETURNING id"""


async def ensure_account(
    conn: Connection, provider: str, identity: str, capabilities: Mapping[str, object], stale_after: int
) -> str:
    """Know the account of this identity at a provider, with its present capabilities. Returns our id of it."""
    cursor = await conn.execute(
        _ENSURE_ACCOUNT,
        {"provider": provider, "identity": identity, "capabilities": Jsonb(capabilities), "stale_after": stale_after},
    )
    row = await cursor.fetchone()
    return str(row[0]) if row else ""


@dataclass(frozen=True, slots=True)
class NewOffer:
    """An offer to be written, in the columns' units."""

    provider_offer_id: str
    gpu: str | None
    gpu_count: int
    vram_gb: int | None
    vcpus: float
    ram_gb: float
    disk_gb: int
    disk_base_gb: int
    disk_micro_gb_h: int
    region: str
    country: str | None
    spot: bool
    price_micro_h: int
    stopped_micro_h: int | None
    min_billing_s: int
    increment_s: int
    supports: list[str]
    reliability: float | None
    availability: str
    quarantined: str | None


@dataclass(frozen=True, slots=True)
class Changes:
    """What a refresh changed."""

    changed: int
    gone: int


_MERGE: Final = """
WITH input AS (
    SELECT * FROM jsonb_to_recordset(%(offers)s) AS n(
        provider_offer_id text, gpu text, gpu_count int, vram_gb int, vcpus numeric(6,2), ram_gb numeric(8,1), disk_gb int,
        disk_base_gb int, disk_micro_gb_h bigint, region text, country text, spot boolean, price_micro_h bigint,
        stopped_micro_h bigint, min_billing_s int, increment_s int, supports text[], reliability real, availability text,
        quarantined text)
), old AS (
    SELECT o.id, o.price_micro_h FROM offer o WHERE o.account_id = %(account)s
), written AS (
    INSERT INTO offer AS o (id, account_id, provider, provider_offer_id, gpu, gpu_count, vram_gb, vcpus, ram_gb, disk_gb,
        disk_base_gb, disk_micro_gb_h, region, country, spot, price_micro_h, stopped_micro_h, min_billing_s, increment_s,
        supports, reliability, availability, quarantined, changed_at)
    SELECT new_id('ofr'), %(account)s, %(provider)s, n.*, clock_timestamp()
      FROM (SELECT provider_offer_id, gpu, gpu_count, vram_gb, vcpus, ram_gb, disk_gb, disk_base_gb, disk_micro_gb_h, region,
                   country, spot, price_micro_h, stopped_micro_h, min_billing_s, increment_s, supports, reliability,
                   availability, quarantined FROM input) n
      ON CONFLICT (account_id, provider_offer_id, region, spot) DO UPDATE
         SET gpu = excluded.gpu, gpu_count = excluded.gpu_count, vram_gb = excluded.vram_gb, vcpus = excluded.vcpus,
             ram_gb = excluded.ram_gb, disk_gb = excluded.disk_gb, disk_base_gb = excluded.disk_base_gb,
             disk_micro_gb_h = excluded.disk_micro_gb_h, country = excluded.country, price_micro_h = excluded.price_micro_h,
             stopped_micro_h = excluded.stopped_micro_h, min_billing_s = excluded.min_billing_s,
             increment_s = excluded.increment_s, supports = excluded.supports, reliability = excluded.reliability,
             availability = excluded.availability, quarantined = excluded.quarantined, changed_at = excluded.changed_at,
             gone_at = NULL
       WHERE (o.gpu, o.gpu_count, o.vram_gb, o.vcpus, o.ram_gb, o.disk_gb, o.disk_base_gb, o.disk_micro_gb_h, o.country,
              o.price_micro_h, o.stopped_micro_h, o.min_billing_s, o.increment_s, o.supports, o.reliability, o.availability,
              o.quarantined, o.gone_at)
             IS DISTINCT FROM
             (excluded.gpu, excluded.gpu_count, excluded.vram_gb, excluded.vcpus, excluded.ram_gb, excluded.disk_gb,
              excluded.disk_base_gb, excluded.disk_micro_gb_h, excluded.country, excluded.price_micro_h,
              excluded.stopped_micro_h, excluded.min_billing_s, excluded.increment_s, excluded.supports,
              excluded.reliability, excluded.availability, excluded.quarantined, NULL)
    RETURNING o.id, o.price_micro_h
), history AS (
    INSERT INTO offer_price (offer_id, at, price_micro_h)
    SELECT w.id, clock_timestamp(), w.price_micro_h FROM written w LEFT JOIN old ON old.id = w.id
     WHERE old.price_micro_h IS DISTINCT FROM w.price_micro_h
), shapes AS (
    INSERT INTO offer_shape (gpu, gpu_count, vram_gb)
    SELECT DISTINCT gpu, gpu_count, coalesce(vram_gb, 0) FROM input WHERE gpu IS NOT NULL
        ON CONFLICT DO NOTHING
), gone AS (
    UPDATE offer o SET gone_at = clock_timestamp()
     WHERE o.account_id = %(account)s AND o.gone_at IS NULL
       AND NOT EXISTS (SELECT FROM input n
                        WHERE n.provider_offer_id = o.provider_offer_id AND n.region = o.region AND n.spot = o.spot)
    RETURNING o.id
)
SELECT (SELECT count(*) FROM written)::int AS changed, (SELECT count(*) FROM gone)::int AS gone"""


async def merge_offers(conn: Connection, account_id: str, provider: str, offers: Sequence[NewOffer]) -> Changes:
    """Make the account's offers these: only what differs is written, what is missing is gone. One statement."""
    values = [{name: getattr(offer, name) for name in NewOffer.__slots__} for offer in offers]
    cursor = conn.cursor(row_factory=class_row(Changes))
    await cursor.execute(_MERGE, {"offers": Jsonb(values), "account": account_id, "provider": provider})
    changes = await cursor.fetchone()
    return changes or Changes(0, 0)


_BEGIN_REFRESH: Final = """
INSERT INTO refresh (account_id, began_at) SELECT %(account)s, clock_timestamp()
 WHERE NOT EXISTS (SELECT FROM refresh WHERE account_id = %(account)s AND complete
                      AND began_at > clock_timestamp() - %(every)s * interval '1 second')
RETURNING id, began_at"""
_END_REFRESH: Final = """
UPDATE refresh SET ended_at = clock_timestamp(), complete = %(complete)s, seen = %(seen)s, changed = %(changed)s,
       quarantined = %(quarantined)s, error = %(error)s WHERE id = %(id)s"""
_TRUST: Final = """
UPDATE provider_account SET refreshed_at = %s, last_error = NULL, unhealthy_since = NULL WHERE id = %s"""
_DOUBT: Final = """
UPDATE provider_account SET last_error = %s, unhealthy_since = coalesce(unhealthy_since, clock_timestamp()) WHERE id = %s
RETURNING unhealthy_since > clock_timestamp() - interval '1 second'"""


async def begin_refresh(conn: Connection, account_id: str, every_seconds: int) -> tuple[int, datetime] | None:
    """Begin a refresh, unless a complete one began within the last `every_seconds`."""
    row = await (await conn.execute(_BEGIN_REFRESH, {"account": account_id, "every": every_seconds})).fetchone()
    return (int(row[0]), row[1]) if row else None


async def end_refresh(
    conn: Connection,
    refresh_id: int,
    *,
    complete: bool,
    seen: int = 0,
    changed: int = 0,
    quarantined: int = 0,
    error: str | None = None,
) -> None:
    """Note what became of a refresh."""
    await conn.execute(
        _END_REFRESH,
        {
            "id": refresh_id,
            "complete": complete,
            "seen": seen,
            "changed": changed,
            "quarantined": quarantined,
            "error": error,
        },
    )


async def trust_account(conn: Connection, account_id: str, began_at: datetime) -> None:
    """The account's offers are those of a complete refresh that began then."""
    await conn.execute(_TRUST, (began_at, account_id))


async def doubt_account(conn: Connection, account_id: str, error: str) -> bool:
    """Note that the provider fails; true when it did not fail before."""
    row = await (await conn.execute(_DOUBT, (error[:500], account_id))).fetchone()
    return row is not None and bool(row[0])
