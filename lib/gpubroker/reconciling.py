"""One tick: everything that an event should have moved and did not, and everything that only time moves.

First what needs the database alone, then due pods, then a complete listing of every account, then the bill. Ticks come
twice, late and overlapping; each part is claimed by its rows.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, Final

from gpubroker import config, errors, metering, outbox, provisioning, store
from gpubroker.events import BudgetData
from gpubroker.holds import SHORTEST_LIFE_SECONDS
from gpubroker.providers import registry
from gpubroker.providers.registry import Adapters
from gpubroker.provisioning import Driver
from gpubroker.store import billing as billing_rows
from gpubroker.store import budgets as budget_rows
from gpubroker.store import events as event_rows
from gpubroker.store import instances as rows
from gpubroker.store import plans as plan_rows
from gpubroker.store import tokens as token_rows
from gpubroker.sweep import sweep

log = logging.getLogger("gpubroker.reconcile")

_AT_ONCE: Final = 16
"""So many pods of one provider are driven side by side."""
_PATIENCE_SECONDS: Final = 4.0
_BATCH: Final = 500
_LOOK_SECONDS: Final = 3.0
_LONGEST_SECONDS: Final = 50.0
_TIGHT_PERCENT: Final = 80


async def reconcile(adapters: Adapters) -> None:
    """Work one tick. With something starting it looks again every few seconds, almost until the next tick.

    What waits for one provider holds the rest up for a moment only: it goes on beside it, and the tick ends with it.
    """
    began = time.monotonic()
    driver, gates = Driver(adapters), make_gates()
    late: list[asyncio.Task[None]] = []
    try:
        await expire()
        await _patiently(drive_due(driver, gates), late)
        await _patiently(sweep_all(adapters), late)
        await _patiently(drive_due(driver, gates), late)
        await metering.bill_all(older_than_seconds=min(60, config.settings().tick_seconds))
        await _tidy()
        limit = min(_LONGEST_SECONDS, config.settings().tick_seconds - 10.0)
        while time.monotonic() - began < limit and await _is_anything_due_soon():
            await asyncio.sleep(_LOOK_SECONDS)
            await expire()
            await _patiently(drive_due(driver, gates), late)
        await asyncio.gather(*late)
    finally:
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)


async def _patiently(work: Coroutine[Any, Any, None], late: list[asyncio.Task[None]]) -> None:
    """Wait for the work for as long as providers that are well take; then it goes on among what is late."""
    task = asyncio.create_task(work)
    late.append(task)
    done, _ = await asyncio.wait([task], timeout=_PATIENCE_SECONDS)
    if done:
        late.remove(task)
        await task


async def expire() -> None:
    """Want the end of every pod whose time is over: the database alone decides that."""
    async with store.worker() as tx:
        expired = await rows.list_expired(tx.conn, _BATCH)
    for pod_id in expired:
        await provisioning.expire(pod_id)


Gates = defaultdict[str, asyncio.Semaphore]


def make_gates() -> Gates:
    """By provider, within which its pods are driven: as many at once, however often in a tick it is looked for what is due."""
    return defaultdict(lambda: asyncio.Semaphore(_AT_ONCE))


async def drive_due(driver: Driver, gates: Gates) -> None:
    """Drive every pod that is due, several at once of each provider; one that fails holds no other up."""
    async with store.worker() as tx:
        due = await rows.list_due_at(tx.conn, _BATCH)

    async def drive(pod_id: str, provider: str) -> None:
        async with gates[provider]:
            await driver.drive_on(pod_id)

    await _gather([drive(*each) for each in due], [pod_id for pod_id, _ in due])


async def sweep_all(adapters: Adapters) -> None:
    """Sweep every account that is on or has something of ours, all at once: none waits for another."""
    async with store.worker() as tx:
        used = await rows.list_used_providers(tx.conn)
    names = sorted({*registry.enabled(config.settings()), *used})
    await _gather([sweep(adapters, name) for name in names], names)


async def _gather(work: Sequence[Awaitable[None]], names: Sequence[str]) -> None:
    for name, result in zip(names, await asyncio.gather(*work, return_exceptions=True), strict=True):
        if isinstance(result, errors.GpubrokerError | TimeoutError | OSError):
            log.warning("%s: %s %s", name, type(result).__name__, result)
        elif isinstance(result, BaseException):
            log.error("%s failed", name, exc_info=result)


async def _tidy() -> None:
    async with store.worker() as tx:
        overdue = await event_rows.take_overdue(tx)
        for month in await billing_rows.close_months(tx.conn):
            log.info("%s is closed", month)
        for org_id in await plan_rows.end_plans(tx.conn):
            log.info("the plan of %s is over", org_id)
        await event_rows.prune(tx)
        await _tell_of_budgets(tx)
        await token_rows.prune_tokens(tx.conn)
    if overdue:
        outbox.publish_soon(overdue)


async def _tell_of_budgets(tx: store.Transaction) -> None:
    """Write an event of each budget that has become tight or empty: once for each period and limit."""
    for news in await budget_rows.take_news(tx.conn, _TIGHT_PERCENT, SHORTEST_LIFE_SECONDS):
        data = BudgetData(
            agent_id=news.agent_id, limit_usd=news.limit_micro, committed_usd=news.committed_micro, period=news.period,
            period_start=news.period_start,
        )  # fmt: skip
        await outbox.write(tx, f"budget.{news.what}", news.agent_id, data, tenant=news.org_id, agent_id=news.agent_id)


async def _is_anything_due_soon() -> bool:
    async with store.worker() as tx:
        return bool(await rows.list_due(tx.conn, _LOOK_SECONDS * 2, 1))
