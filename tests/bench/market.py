"""A market as it is: 100,000 offers of 12 vendors and 60 models, few of them with most of it, and questions to it."""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlencode

import psycopg

from gpubroker import gpus
from gpubroker.money import format_usd
from gpubroker.providers.base import Availability, ProviderOffer, Support
from gpubroker.store.offers import Question

OFFERS = 100_000
_VENDORS, _MODELS = 12, 60
_COLUMNS = """id, account_id, provider, provider_offer_id, gpu, gpu_count, vram_gb, vcpus, ram_gb, disk_gb, region, country, spot,
price_micro_h, stopped_micro_h, min_billing_s, increment_s, supports, reliability, availability, changed_at"""
_PLACES = (("eu-1", "FI"), ("eu-2", "DE"), ("us-1", "US"), ("us-2", "US"), ("ap-1", "JP"), ("ca-1", "CA"))
_SUPPORTS: tuple[frozenset[Support], ...] = (
    frozenset({"image", "ssh"}),
    frozenset({"image", "exec", "logs", "ports"}),
    frozenset({"image", "exec", "logs", "ports", "stop", "ssh"}),
)
_AVAILABILITY: tuple[Availability, ...] = ("none", "low", "medium", "high")


def fill(database_url: str) -> None:
    """Write the market, always the same one."""
    with psycopg.connect(database_url, autocommit=True) as conn:
        accounts = [
            conn.execute(
                """INSERT INTO provider_account (id, provider, identity, refreshed_at, stale_after_s)
                   VALUES (new_id('acc'), %s, 'bench', clock_timestamp(), 86400) RETURNING id, provider""",
                (f"vendor{n}",),
            ).fetchone()
            for n in range(_VENDORS)
        ]
        chance = random.Random(1)
        with conn.cursor() as cursor, cursor.copy(f"COPY offer ({_COLUMNS}) FROM STDIN") as copy:
            for n, offer in enumerate(make_offers(OFFERS, 1)):
                account_id, provider = chance.choices(accounts, _falling(_VENDORS))[0] or ("", "")
                copy.write_row((
                    f"ofr_{n:026d}", account_id, provider, offer.provider_offer_id, offer.gpu, offer.gpu_count, offer.vram_gb,
                    offer.vcpus, offer.ram_gb, offer.disk_gb, offer.region, offer.country, offer.spot, offer.price_micro_h,
                    None, 0, 1, sorted(offer.supports), offer.reliability, offer.availability, "2026-01-01",
                ))  # fmt: skip
        conn.execute(
            "INSERT INTO offer_shape SELECT DISTINCT gpu, gpu_count, vram_gb FROM offer ON CONFLICT DO NOTHING"
        )
    settle(database_url)


def settle(database_url: str) -> None:
    """Do at once what PostgreSQL would do in the background, beside what is measured."""
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("VACUUM ANALYZE")
        conn.execute("CHECKPOINT")


def make_offers(number: int, seed: int) -> Iterator[ProviderOffer]:
    """So many offers as vendors would list them: most of few models, of all places, at all prices."""
    chance = random.Random(seed)
    models = list(gpus.models().values())[:_MODELS]
    random.Random(1).shuffle(models)
    for n in range(number):
        model = chance.choices(models, _falling(_MODELS))[0]
        count = chance.choices((1, 2, 4, 8), (6, 2, 2, 3))[0]
        region, country = chance.choice(_PLACES)
        yield ProviderOffer(
            provider_offer_id=f"bench-{n}", gpu=model.name, gpu_count=count, vram_gb=model.vram_gb, vcpus=8 * count,
            ram_gb=64 * count, disk_gb=500, region=region, country=country, spot=chance.random() < 0.2,
            price_micro_h=round(count * model.vram_gb * chance.uniform(15_000, 60_000)), supports=chance.choice(_SUPPORTS),
            reliability=chance.uniform(0.9, 1), availability=chance.choices(_AVAILABILITY, (3, 2, 2, 5))[0],
        )  # fmt: skip


def _falling(n: int) -> list[float]:
    """Each has its share: the first most, the next half as much, then a third."""
    return [1 / place for place in range(1, n + 1)]


class Asked(NamedTuple):
    """The same search for the store and for HTTP: the first 20, with three filters."""

    question: Question
    path: str


def questions(count: int) -> list[Asked]:
    """So many different ones, always the same."""
    made: dict[str, Asked] = {}
    for filters in _filters(random.Random(2)):
        shown = {name: format_usd(value) if "usd" in name else value for name, value in filters.items()}
        if "gpu" in shown:
            shown["gpu"] = shown["gpu"][0]
        if "supports" in shown:
            shown["supports"] = ",".join(shown["supports"])
        path = f"/v1/offers?{urlencode(shown)}&limit=20"
        made[path] = Asked(Question(filters, limit=21), path)
        if len(made) == count:
            break
    return list(made.values())


def _filters(chance: random.Random) -> Iterator[dict[str, Any]]:
    """Values in the units of the columns, as `store.offers.FILTERS` says."""
    models = list(gpus.models().values())[:_MODELS]
    while True:
        model, count = chance.choice(models), chance.choice((1, 2, 4))
        price = model.vram_gb * chance.randrange(40_000, 60_000, 100)
        yield {"gpu": [model.name], "min_gpu_count": count, "max_price_usd_per_hour": 8 * price}
        yield {"gpu": [model.name], "country": chance.choice(_PLACES)[1], "max_price_usd_per_gpu_hour": price}
        yield {
            "min_vram_gb": chance.choice((24, 40, 48, 80)),
            "supports": ["exec"],
            "max_price_usd_per_gpu_hour": price * 2,
        }
        yield {"gpu": [model.name], "supports": ["exec", "logs"], "min_reliability": chance.randrange(900, 960) / 1000}
