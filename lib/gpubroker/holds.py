"""What must be set aside for a pod: its whole life at the dearest price that it may cost, its provider's minimum, its end.

A hold covers price × lifetime + the minimum that the provider bills + the allowance that ending it may take, so that nothing
that can happen costs more than was held (DESIGN 8).
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import psycopg

from gpubroker import errors
from gpubroker.budgets import Purse, affordable_seconds
from gpubroker.money import HOUR, cost
from gpubroker.store.candidates import Candidate

DEFAULT_LIFE_SECONDS: Final = HOUR
"""The longest life of a pod that was given none; a pod without an end there is not."""
SHORTEST_LIFE_SECONDS: Final = 10


def fixed_micro(candidate: Candidate) -> int:
    """What a hold needs beside price × lifetime: the provider's minimum, and the allowance for the end."""
    allowance = int(candidate.capabilities.get("termination_allowance_seconds", 0))
    return cost(candidate.price_micro_h, candidate.min_billing_s) + cost(candidate.price_micro_h, allowance)


def needed_micro(candidates: Sequence[Candidate], life_seconds: int) -> int:
    """What must be held for a life with whichever of these offers it will be."""
    return max(cost(c.price_micro_h, life_seconds) + fixed_micro(c) for c in candidates)


def affordable_life(candidates: Sequence[Candidate], available_micro: int) -> int:
    """Seconds that this much pays for with whichever of these offers."""
    return min(affordable_seconds(available_micro, c.price_micro_h, fixed_micro(c)) for c in candidates)


def dearest(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate that costs most."""
    return max(candidates, key=lambda c: (c.price_micro_h, fixed_micro(c)))


def refuse(
    candidates: Sequence[Candidate], purse: Purse, needed: int, limiting: str | None = None
) -> errors.BudgetExhausted:
    """The problem of a hold that the budgets of the path do not cover."""
    worst = dearest(candidates)
    return purse.refuse(needed, worst.price_micro_h, fixed_micro(worst), limiting=limiting)


def limiting_agent(error: psycopg.Error) -> str | None:
    """The agent whose budget refused a hold, if that is what this error says."""
    return error.diag.message_primary if error.sqlstate == "GB001" else None


class ReachedLimit(NamedTuple):
    """The limit that a create would go beyond, and whose it is."""

    agent_id: str
    limit: str


def reached_limit(error: psycopg.Error) -> ReachedLimit | None:
    """The limit that refused a create, if that is what this error says."""
    if error.sqlstate != "GB004":
        return None
    return ReachedLimit(error.diag.message_primary or "", error.diag.message_detail or "")
