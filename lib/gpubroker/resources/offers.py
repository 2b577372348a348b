"""What can be rented: offers, GPU models, providers, and why nothing matched."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field

from gpubroker.money import Usd
from gpubroker.resources import FROM, Output, Page, is_none
from gpubroker.times import Moment


def _read_names(value: object) -> object:
    """A row may hold names as one text, with commas between: it is read in a tenth of a list's time."""
    return [name for name in value.split(",") if name] if isinstance(value, str) else value


class Offer(Output):
    """Something that can be rented now. `price_usd_per_hour` is all that is charged for all of it."""

    id: str
    provider: str
    provider_offer_id: str
    gpu: str | None
    gpu_count: int
    vram_gb: int | None = Field(description="Nominal, per GPU.")
    vcpus: float
    ram_gb: float
    disk_gb: int
    region: str
    country: str | None
    spot: bool
    price_usd_per_hour: Usd
    price_usd_per_gpu_hour: Usd | None
    min_billing_seconds: int
    billing_increment_seconds: int
    stopped_price_usd_per_hour: Usd | None
    supports: Annotated[list[str], BeforeValidator(_read_names)]
    reliability: float | None
    availability: str
    observed_at: Moment
    stale: bool


class Near(Output):
    """An offer that almost matched, and what each filter would have to be for it."""

    offer: Offer
    change: dict[str, Any]


class NoMatch(Output):
    """Why nothing matched: of the offers considered, how many each filter alone leaves out."""

    considered: int
    removed_by: dict[str, int]
    nearest: list[Near]


class OfferPage(Page[Offer]):
    """A page of offers; an empty one says why."""

    no_match: NoMatch | None = Field(default=None, exclude_if=is_none)


class Gpu(Output):
    """A GPU model. Prices are per GPU and hour, of what can be had now."""

    model: str
    vram_gb: int | None
    providers: list[str]
    offers: int
    lowest_usd_per_gpu_hour: Usd | None
    median_usd_per_gpu_hour: Usd | None


class PriceStep(Output):
    """Prices of a model within one step, per GPU and hour, over every offer and price that stood at any moment of it."""

    from_: Moment = Field(validation_alias=FROM, serialization_alias="from")
    low_usd_per_gpu_hour: Usd | None
    median_usd_per_gpu_hour: Usd | None
    high_usd_per_gpu_hour: Usd | None
    offers: int


class PriceHistory(Output):
    """What a GPU model cost, step by step. `models` are all that the question meant."""

    models: list[str]
    from_: Moment = Field(validation_alias=FROM, serialization_alias="from")
    to: Moment
    step: str
    items: list[PriceStep]


class ProviderView(Output):
    """A provider: whether it is configured, how it does, and what it can do."""

    name: str
    configured: bool
    healthy: bool
    last_refresh: Moment | None
    staleness_seconds: int | None
    stale: bool
    offers: int
    capabilities: dict[str, Any]
    last_error: str | None
    breakers: dict[str, Literal["closed", "open", "half_open"]] | None = None
    """By kind of call (offers, read, act, create); null where Redis, through which processes tell it, cannot say."""

    @classmethod
    def unconfigured(cls, name: str) -> Self:
        """A provider of which there is nothing but its name."""
        return cls(
            name=name, configured=False, healthy=False, last_refresh=None, staleness_seconds=None, stale=True, offers=0,
            capabilities={}, last_error=None,
        )  # fmt: skip
