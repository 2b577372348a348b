"""Events of budgets: tight at four fifths, exhausted when nothing can be rented any more; once each, until it changes."""

import pytest
from tests.factories import World

from gpubroker import reconciling

pytestmark = pytest.mark.anyio


def told(world: World) -> list[tuple[str, str, str, str]]:
    rows = world.query(
        "SELECT type, subject, data FROM event WHERE type LIKE 'io.gpubroker.budget.%%' ORDER BY at, type"
    )
    return [
        (row["type"].removeprefix("io.gpubroker.budget.").removesuffix(".v1"), row["subject"], row["data"]["limit_usd"],
         row["data"]["committed_usd"])
        for row in rows
    ]  # fmt: skip


async def test_a_budget_is_told_of_once_for_each_limit_and_only_when_it_is_so(world: World) -> None:
    await world.use_final()
    parent = await world.root.child(budget={"limit_usd": "10"})
    child = await parent.child(budget={"limit_usd": "5"})
    await world.run(child, max_lifetime_seconds=3600)
    await reconciling.reconcile(world.adapters)
    assert told(world) == []
    pod = await world.run(child, max_lifetime_seconds=3000)
    await reconciling.reconcile(world.adapters)
    await reconciling.reconcile(world.adapters)
    ((what, subject, limit, committed),) = told(world)
    assert (what, subject, limit) == ("threshold", child.agent_id, "5.000000")
    assert "4.000000" <= committed <= "5.000000"
    (row,) = world.query(
        "SELECT tenant, agent_id FROM event WHERE subject = %s AND type LIKE '%%threshold%%'", child.agent_id
    )
    assert row["agent_id"] == child.agent_id
    assert row["tenant"] == (await child.get("/v1/whoami"))["organisation"]["id"]
    await parent.call("PUT", f"/v1/budgets/{child.agent_id}", json={"limit_usd": committed, "period": "total"})
    await reconciling.reconcile(world.adapters)
    assert told(world)[1:] == [(what, child.agent_id, committed, committed) for what in ("exhausted", "threshold")]
    await child.delete(f"/v1/pods/{pod['id']}")
    await world.drive_due()
    await reconciling.reconcile(world.adapters)
    assert len(told(world)) == 3
