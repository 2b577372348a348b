"""Billing what ran. The watermark of an instance moves in one SQL function, whoever calls it, in any order, any number of times."""

import logging
from typing import Final

from gpubroker import outbox, store
from gpubroker.events import UsageData
from gpubroker.store import billing as billing_rows
from gpubroker.store import instances as rows

log = logging.getLogger("gpubroker.metering")

_BATCH: Final = 500


async def bill_pod(tx: store.Transaction, pod_id: str) -> int:
    """Bill a pod's instances up to when they were last seen. Returns what its agent was charged, micro-USD."""
    charged = 0
    for instance_id, seen_at in await rows.list_billable(tx.conn, pod_id):
        paid = await billing_rows.bill(tx.conn, instance_id, seen_at)
        if paid:
            await _record(tx, instance_id)
        charged += paid
    return charged


async def bill_all(older_than_seconds: int) -> int:
    """Bill every instance that was seen so many seconds after its watermark, each in a transaction of its own."""
    async with store.worker() as tx:
        unbilled = await rows.list_unbilled(tx.conn, older_than_seconds, _BATCH)
    for instance_id, seen_at in unbilled:
        async with store.worker() as tx:
            if await billing_rows.bill(tx.conn, instance_id, seen_at):
                await _record(tx, instance_id)
    return len(unbilled)


async def _record(tx: store.Transaction, instance_id: str) -> None:
    billed = await billing_rows.find_billed(tx.conn, instance_id)
    if billed is None:
        return
    data = UsageData(
        pod_id=billed.pod_id, agent_id=billed.agent_id, instance_id=instance_id, billed_until=billed.billed_until,
        spent_usd=billed.spent_micro,
    )  # fmt: skip
    await outbox.write(tx, "usage.recorded", billed.pod_id, data, tenant=billed.org_id, agent_id=billed.agent_id)
