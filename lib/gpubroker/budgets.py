"""What may be spent: limits along the path from an agent to its root, and what they still allow."""

from collections.abc import Sequence

from gpubroker import errors, store
from gpubroker.money import HOUR, format_usd
from gpubroker.resources.budgets import Budget, BudgetRequest
from gpubroker.store import accounts
from gpubroker.store import budgets as rows


async def show_budget(tx: store.Transaction, agent_id: str) -> Budget:
    """The budget of an agent of the caller's subtree. Raises NotFound."""
    found = await rows.list_budgets(tx.conn, tx.known.agent_id, agent_id=agent_id)
    if not found:
        raise errors.NotFound
    return found[0]


async def set_budget(tx: store.Transaction, agent_id: str, request: BudgetRequest) -> Budget:
    """Set the limit of an agent below the caller, or lower the caller's own; with `admin`, of any organisation.

    Raises ExceedsParent for more than the least limit above it, Forbidden for raising one's own, NotFound for an agent
    outside the subtree.
    """
    caller = tx.known
    if "admin" in caller.scopes and await rows.enter_root(tx.conn, agent_id):
        await rows.set_budget(tx.conn, agent_id, request.limit_usd, request.period)
        return (await rows.list_budgets(tx.conn, agent_id, agent_id=agent_id))[0]
    present = await show_budget(tx, agent_id)
    if agent_id == caller.agent_id:
        raised = present.limit_usd is not None and request.limit_usd > present.limit_usd
        if raised or present.limit_usd is None or request.period != present.period:
            raise errors.Forbidden("Nobody may raise a limit of itself.", hint="Have an agent above this one do it.")
    await check_limit(
        tx, [above for above in await _path(tx, agent_id) if above != agent_id], request.limit_usd, "/limit_usd"
    )
    await rows.set_budget(tx.conn, agent_id, request.limit_usd, request.period)
    return await show_budget(tx, agent_id)


async def check_limit(tx: store.Transaction, path: Sequence[str], limit_micro: int, pointer: str) -> None:
    """Raise ExceedsParent when a limit is more than the least one of the agents above."""
    limits = [s.limit_micro for s in await rows.list_standings(tx.conn, path) if s.limit_micro is not None]
    if limits and limit_micro > min(limits):
        found = [{"pointer": pointer, "message": "is more than an agent above it has"}]
        raise errors.ExceedsParent("A child's budget cannot be more than its parent's.", more={"errors": found})


async def _path(tx: store.Transaction, agent_id: str) -> list[str]:
    return await accounts.find_path(tx.conn, tx.known.agent_id, agent_id) or []


class Purse:
    """What the budgets along a path allowed when they were read: good for refusing the hopeless, not for spending."""

    def __init__(self, caller: store.Caller, standings: Sequence[rows.Standing], token_room: int | None = None) -> None:
        self._agent_id = caller.agent_id
        self._limited = [(s.available_micro, s.agent_id) for s in standings if s.available_micro is not None]
        if token_room is not None:
            self._limited.append((token_room, caller.agent_id))

    @property
    def available_micro(self) -> int:
        """The least of the path; nothing where nobody has a limit."""
        return min((available for available, _ in self._limited), default=0)

    def refuse(
        self, needed_micro: int, price_micro_h: int, fixed_micro: int, *, limiting: str | None = None
    ) -> errors.BudgetExhausted:
        """The problem of a hold that the path does not cover.

        `fixed_micro` is what a hold needs beside price × lifetime. Amounts of an agent above the caller are not told.
        """
        available, least = min(((a, i) for a, i in self._limited), default=(0, self._agent_id))
        told = (limiting or least) == self._agent_id
        return refuse(needed_micro, available, price_micro_h, fixed_micro, self._agent_id if told else None)


def refuse(
    needed_micro: int, available_micro: int, price_micro_h: int, fixed_micro: int, limiting_agent: str | None
) -> errors.BudgetExhausted:
    """Say what was needed and what would fit."""
    seconds = affordable_seconds(available_micro, price_micro_h, fixed_micro)
    fits = f" It covers {seconds} seconds of it." if seconds else ""
    return errors.BudgetExhausted(
        f"This needs {format_usd(needed_micro)} USD to be held, and a budget on the path has less.{fits}",
        more={
            "needed_usd": format_usd(needed_micro),
            "available_usd": format_usd(available_micro) if limiting_agent else None,
            "limiting_agent": limiting_agent,
            "affordable_seconds": seconds,
        },
    )


def affordable_seconds(available_micro: int, price_micro_h: int, fixed_micro: int) -> int:
    """How long a pod of this price can live on this much, its minimum and termination allowance covered."""
    return max(0, (available_micro - fixed_micro) * HOUR // price_micro_h)
