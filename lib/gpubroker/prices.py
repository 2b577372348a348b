"""What GPU models cost over time, from the prices that refreshes saw change."""

from datetime import timedelta
from typing import Final, Literal

from pydantic import Field

from gpubroker import errors, inputs, store
from gpubroker.resources.offers import PriceHistory
from gpubroker.store import offers as rows

_STEPS: Final = {"hour": timedelta(hours=1), "day": timedelta(days=1), "week": timedelta(weeks=1)}
_USUAL: Final = 30
_MOST: Final = 400


class HistoryQuery(inputs.Query):
    """Of when, in which steps, of whom."""

    from_: inputs.Time | None = Field(default=None, alias="from", description="Default: 30 steps before `to`.")
    to: inputs.Time | None = Field(default=None, description="Default: now.")
    step: Literal["hour", "day", "week"] = "day"
    provider: str | None = Field(default=None, min_length=1, max_length=80)


async def show_history(tx: store.Transaction, model: str, query: HistoryQuery) -> PriceHistory:
    """What the models that a question such as `H100` means cost, step by step. Raises NotFound for what is no model."""
    from gpubroker import gpus  # noqa: PLC0415 - few ask for this

    models = gpus.ask(model)
    if not models:
        near = gpus.nearest(model)
        meant = f" Did you mean {near}?" if near else ""
        raise errors.NotFound(f"{model!r} is no GPU model known here.{meant}", steps=[errors.Next("GET", "/v1/gpus")])
    step = _STEPS[query.step]
    to_at = query.to or await store.read_instant(tx.conn)
    try:
        from_at = query.from_ or to_at - step * _USUAL
    except OverflowError:
        raise inputs.invalid("?to", "is out of range") from None
    if from_at >= to_at:
        raise inputs.invalid("?from", "must be before to")
    if (to_at - from_at) / step > _MOST:
        raise inputs.invalid("?step", f"makes more than {_MOST} steps: ask for less time or longer steps")
    items = await rows.list_prices(tx.conn, models, query.provider, (from_at, to_at), step)
    return PriceHistory(models=models, from_=from_at, to=to_at, step=query.step, items=items)
