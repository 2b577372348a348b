"""Quotes: an offer's price for a time, firm for two minutes for the agent that asked, and for one pod.

A quote is firm in price, not in capacity: whether the provider has room is known when the pod is made.
"""

from typing import Annotated, Final, NamedTuple

from pydantic import Field, model_validator

from gpubroker import errors, holds, idempotency, inputs, offers, store
from gpubroker.ids import new_id
from gpubroker.inputs import Input
from gpubroker.money import cost
from gpubroker.pods import Life, present_offer
from gpubroker.resources.pods import Quote
from gpubroker.store import offers as offer_rows
from gpubroker.store import quotes as rows
from gpubroker.store.candidates import Candidate, read_candidate

FIRM_SECONDS: Final = 120


class QuoteRequest(Input):
    """What shall be quoted: the cheapest offer that satisfies requirements, or one offer; and for how long."""

    requirements: offers.Requirements | None = None
    offer_id: Annotated[str, Field(max_length=40)] | None = None
    duration_seconds: Life

    @model_validator(mode="after")
    def _check_together(self) -> "QuoteRequest":
        if (self.requirements is None) == (self.offer_id is None):
            msg = "exactly one of requirements and offer_id is needed"
            raise ValueError(msg)
        return self


class Quoted(NamedTuple):
    """A quote that may make its pod now: the offer at the price that was quoted, and the lifetime that it was for."""

    candidate: Candidate
    seconds: int


async def make_quote(tx: store.Transaction, request: QuoteRequest, key: idempotency.Request) -> tuple[Quote, bool]:
    """Quote a price. Returns the quote and whether it is a replay. Raises NoOffer or Invalid."""
    made = await idempotency.find_made(tx, key)
    if made is not None:
        return await show_quote(tx, made), True
    candidate = await _choose(tx, request)
    quote_id = new_id("qte")
    new = rows.NewQuote(
        quote_id, tx.known.org_id, tx.known.agent_id, candidate.offer_id, candidate._asdict(), candidate.price_micro_h,
        request.duration_seconds, FIRM_SECONDS,
    )  # fmt: skip
    await rows.add_quote(tx.conn, new)
    await idempotency.keep(tx, key, quote_id)
    return await show_quote(tx, quote_id), False


async def _choose(tx: store.Transaction, request: QuoteRequest) -> Candidate:
    if request.offer_id is not None:
        candidate = await offer_rows.find_candidate(tx.conn, request.offer_id, 0)
        if candidate is None:
            raise inputs.invalid("/offer_id", "is no offer that there is now")
        return candidate
    wanted = request.requirements or offers.Requirements()
    filters = await offers.read_filters(tx, wanted, "/requirements/")
    found = await offer_rows.list_candidates(tx.conn, filters, wanted.min_disk_gb or 0, 1)
    if not found:
        no_match = await offers.explain(tx, filters, wanted.min_disk_gb or 0)
        msg = "No offer that can be had now satisfies all of the requirements."
        raise errors.NoOffer(msg, more={"errors": [], "no_match": no_match})
    return found[0]


async def show_quote(tx: store.Transaction, quote_id: str) -> Quote:
    """A quote of the caller's own. Raises NotFound, also for another agent's."""
    row = await rows.find_quote(tx.conn, tx.known.agent_id, quote_id)
    if row is None:
        raise errors.NotFound
    candidate = read_candidate(row.offer)
    return Quote(
        id=row.id,
        offer=present_offer(candidate),
        price_usd_per_hour=row.price_micro_h,
        duration_seconds=row.seconds,
        total_usd=cost(row.price_micro_h, row.seconds) + holds.fixed_micro(candidate),
        expires_at=row.expires_at,
        pod_id=row.pod_id,
    )


async def take_quote(tx: store.Transaction, quote_id: str) -> Quoted:
    """The quote, locked, for making its pod. Raises NotFound, QuoteUsed with its pod, or QuoteExpired."""
    row = await rows.lock_quote(tx.conn, tx.known.agent_id, quote_id)
    if row is None:
        raise errors.NotFound("There is no such quote.")
    if row.pod_id is not None:
        raise errors.QuoteUsed(more={"pod_id": row.pod_id}, steps=[errors.Next("GET", f"/v1/pods/{row.pod_id}")])
    if row.is_expired:
        again = {"offer_id": row.offer_id, "duration_seconds": row.seconds}
        raise errors.QuoteExpired(steps=[errors.Next("POST", "/v1/quotes", again)])
    return Quoted(read_candidate(row.offer), row.seconds)
