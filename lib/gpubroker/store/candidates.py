"""The row that a pod keeps of an offer."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Candidate(NamedTuple):
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
    priced_disk_gb: int | None = None
    """The most disk that this price is for; None in rows of before, which were made for a disk."""
    availability: str = "unknown"
    observed_at: str | None = None
    stale: bool | None = None
    """How it stood when it was chosen; unknown in rows of before."""


def read_candidate(row: Mapping[str, Any]) -> Candidate:
    """What a row keeps. Other releases write it too while they are replaced: fields that are not known here are left out."""
    return Candidate(**{name: row[name] for name in Candidate._fields if name in row})
