"""Rows of `provider_account`, `refresh`, `offer` and `offer_price` as refreshes write them."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from operator import itemgetter
from typing import Final, LiteralString, NamedTuple

from psycopg.types.json import Jsonb

from gpubroker.store import Connection

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


class NewOffer(NamedTuple):
    """An offer as its columns hold it: `vcpus` in hundredths, `ram_gb` in tenths, `reliability` in single precision.

    `supports` are names in order, with commas between: a text is read in a tenth of a list's time.
    """

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
    stopped_disk_micro_gb_h: int
    min_billing_s: int
    increment_s: int
    supports: str
    reliability: float | None
    availability: str
    quarantined: str | None


class Changes(NamedTuple):
    """What a refresh changed."""

    changed: int
    gone: int


Key = tuple[str, str, bool]
KEY: Final = itemgetter(*map(NewOffer._fields.index, ("provider_offer_id", "region", "spot")))
"""What tells an offer from the others of its account."""
_PRICE: Final = NewOffer._fields.index("price_micro_h")

_TURN: Final = 50
"""Offers that are worked at once; then others of this process, who may be searching, have their turn."""
_LOT: Final = 1000
"""Offers that are written in one statement."""

_LIVE: Final = """
SELECT provider_offer_id, gpu, gpu_count, vram_gb, vcpus::float, ram_gb::float, disk_gb, disk_base_gb, disk_micro_gb_h, region,
       country, spot, price_micro_h, stopped_micro_h, stopped_disk_micro_gb_h, min_billing_s, increment_s,
       array_to_string(supports, ','), reliability, availability, quarantined
  FROM offer WHERE account_id = %s AND gone_at IS NULL"""
_INPUT: Final = """
WITH input AS (
    SELECT provider_offer_id, region, spot, gpu, gpu_count, vram_gb, vcpus, ram_gb, disk_gb, disk_base_gb, disk_micro_gb_h,
           country, price_micro_h, stopped_micro_h, stopped_disk_micro_gb_h, min_billing_s, increment_s,
           string_to_array(supports, ',') AS supports, reliability, availability, quarantined, price_before
      FROM jsonb_to_recordset(%(offers)s) AS n(
        provider_offer_id text, gpu text, gpu_count int, vram_gb int, vcpus numeric(6,2), ram_gb numeric(8,1), disk_gb int,
        disk_base_gb int, disk_micro_gb_h bigint, region text, country text, spot boolean, price_micro_h bigint,
        stopped_micro_h bigint, stopped_disk_micro_gb_h bigint,
        min_billing_s int, increment_s int, supports text, reliability real, availability text,
        quarantined text, price_before bigint)
), """
_VALUES: Final = """
gpu = {0}.gpu, gpu_count = {0}.gpu_count, vram_gb = {0}.vram_gb, vcpus = {0}.vcpus, ram_gb = {0}.ram_gb, disk_gb = {0}.disk_gb,
disk_base_gb = {0}.disk_base_gb, disk_micro_gb_h = {0}.disk_micro_gb_h, country = {0}.country, price_micro_h = {0}.price_micro_h,
stopped_micro_h = {0}.stopped_micro_h, stopped_disk_micro_gb_h = {0}.stopped_disk_micro_gb_h,
min_billing_s = {0}.min_billing_s, increment_s = {0}.increment_s, supports = {0}.supports, reliability = {0}.reliability,
availability = {0}.availability, quarantined = {0}.quarantined, changed_at = clock_timestamp(), gone_at = NULL"""
_AND_HISTORY: Final = """, history AS (
    INSERT INTO offer_price (offer_id, at, price_micro_h)
    SELECT id, clock_timestamp(), price_micro_h FROM written WHERE price_before IS DISTINCT FROM price_micro_h
)
INSERT INTO offer_shape (gpu, gpu_count, vram_gb)
SELECT DISTINCT gpu, gpu_count, coalesce(vram_gb, 0) FROM input WHERE gpu IS NOT NULL
    ON CONFLICT DO NOTHING"""
_CHANGE: Final = (
    _INPUT
    + "written AS (UPDATE offer o SET "
    + _VALUES.format("n")
    + """
      FROM input n WHERE o.account_id = %(account)s AND o.provider_offer_id = n.provider_offer_id
                     AND o.region = n.region AND o.spot = n.spot
    RETURNING o.id, o.price_micro_h, n.price_before
)"""
    + _AND_HISTORY
)
_ADD: Final = (
    _INPUT
    + """before AS (
    SELECT n.*, o.id, o.price_micro_h AS price_of_before
      FROM input n LEFT JOIN offer o ON o.account_id = %(account)s AND o.provider_offer_id = n.provider_offer_id
                                    AND o.region = n.region AND o.spot = n.spot
), added AS (
    INSERT INTO offer AS o (id, account_id, provider, provider_offer_id, gpu, gpu_count, vram_gb, vcpus, ram_gb, disk_gb,
        disk_base_gb, disk_micro_gb_h, region, country, spot, price_micro_h, stopped_micro_h,
        stopped_disk_micro_gb_h, min_billing_s, increment_s,
        supports, reliability, availability, quarantined, changed_at)
    SELECT coalesce(id, new_id('ofr')), %(account)s, %(provider)s, provider_offer_id, gpu, gpu_count, vram_gb, vcpus, ram_gb,
           disk_gb, disk_base_gb, disk_micro_gb_h, region, country, spot, price_micro_h, stopped_micro_h,
           stopped_disk_micro_gb_h, min_billing_s, increment_s,
           supports, reliability, availability, quarantined, clock_timestamp()
      FROM before
      ON CONFLICT (account_id, provider_offer_id, region, spot) DO UPDATE SET """
    + _VALUES.format("excluded")
    + """
    RETURNING o.id, o.provider_offer_id, o.region, o.spot, o.price_micro_h
), written AS (
    SELECT a.id, a.price_micro_h, b.price_of_before AS price_before
      FROM added a JOIN before b USING (provider_offer_id, region, spot)
)"""
    + _AND_HISTORY
)
"""Offers that are new, or gone and there again."""
_END: Final = """
UPDATE offer SET gone_at = clock_timestamp()
 WHERE account_id = %s AND gone_at IS NULL
   AND (provider_offer_id, region, spot) IN (SELECT * FROM unnest(%s::text[], %s::text[], %s::boolean[]))"""


async def merge_offers(conn: Connection, account_id: str, provider: str, offers: Sequence[NewOffer]) -> Changes:
    """Make the account's live offers these: only what differs is written or locked, what is missing is gone."""
    new = {KEY(offer): offer for offer in offers}
    changed: list[Mapping[str, object]] = []
    gone: list[Key] = []
    async with conn.cursor(binary=True) as cursor:
        await cursor.execute(_LIVE, (account_id,))
        while live := await cursor.fetchmany(_TURN):
            for row in live:
                offer = new.pop(KEY(row), None)
                if offer is None:
                    gone.append(KEY(row))
                elif offer != row:
                    changed.append(offer._asdict() | {"price_before": row[_PRICE]})
            await asyncio.sleep(0)
    added = [offer._asdict() for offer in new.values()]
    await _write(conn, _CHANGE, changed, account_id, provider)
    await _write(conn, _ADD, added, account_id, provider)
    if gone:
        await conn.execute(_END, (account_id, *map(list, zip(*gone, strict=True))))
    return Changes(len(changed) + len(added), len(gone))


async def _write(
    conn: Connection, statement: LiteralString, rows: Sequence[Mapping[str, object]], account_id: str, provider: str
) -> None:
    for start in range(0, len(rows), _LOT):
        lot = Jsonb(rows[start : start + _LOT])
        await conn.execute(statement, {"offers": lot, "account": account_id, "provider": provider})


_MEDIANS: Final = """
SELECT gpu, percentile_disc(0.5) WITHIN GROUP (ORDER BY per_gpu)::bigint FROM offer
 WHERE gpu IS NOT NULL AND gone_at IS NULL AND quarantined IS NULL AND availability <> 'none'
 GROUP BY gpu HAVING count(*) >= %s"""  # from an index alone, in a quarter of the time


async def read_medians(conn: Connection, least: int) -> dict[str, int]:
    """The median price of each GPU model that can be had, micro-USD per GPU and hour, where so many offers of it are."""
    return dict(await (await conn.execute(_MEDIANS, (least,))).fetchall())


_BEGIN_REFRESH: Final = """
INSERT INTO refresh (account_id, began_at) SELECT %(account)s, clock_timestamp()
 WHERE NOT EXISTS (SELECT FROM refresh WHERE account_id = %(account)s AND complete
                      AND began_at > clock_timestamp() - %(every)s * interval '1 second')
RETURNING id, began_at"""
_LOCK: Final = "SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))"
_IS_LATEST: Final = "SELECT NOT EXISTS (SELECT FROM refresh WHERE account_id = %s AND complete AND began_at > %s)"
_END_REFRESH: Final = """
UPDATE refresh SET ended_at = clock_timestamp(), complete = %(complete)s, seen = %(seen)s, changed = %(changed)s,
       quarantined = %(quarantined)s, error = %(error)s WHERE id = %(id)s"""
_TRUST: Final = """
UPDATE provider_account SET refreshed_at = %s, last_error = NULL, unhealthy_since = NULL WHERE id = %s"""
_DOUBT: Final = """
WITH before AS (SELECT id, unhealthy_since FROM provider_account WHERE id = %(account)s FOR UPDATE)
UPDATE provider_account p
   SET last_error = %(error)s, unhealthy_since = coalesce(before.unhealthy_since, clock_timestamp())
  FROM before WHERE p.id = before.id
RETURNING before.unhealthy_since IS NULL"""


async def begin_refresh(conn: Connection, account_id: str, every_seconds: int) -> tuple[int, datetime] | None:
    """Begin a refresh, unless a complete one began within the last `every_seconds`."""
    row = await (await conn.execute(_BEGIN_REFRESH, {"account": account_id, "every": every_seconds})).fetchone()
    return (int(row[0]), row[1]) if row else None


async def claim_offers(conn: Connection, account_id: str, began_at: datetime) -> bool:
    """Hold an account's offers alone until the transaction ends; false when a refresh that began later was written already."""
    await conn.execute(_LOCK, (account_id,))
    row = await (await conn.execute(_IS_LATEST, (account_id, began_at))).fetchone()
    return row is not None and bool(row[0])


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
    row = await (await conn.execute(_DOUBT, {"account": account_id, "error": error[:500]})).fetchone()
    return row is not None and bool(row[0])
