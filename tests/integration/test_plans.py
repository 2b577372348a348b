"""Plans and subscriptions: who may change them, when they end, what they allow."""

import asyncio

import pytest
from tests.factories import Client, World
from tests.integration.test_auth import second

from gpubroker import reconciling, store
from gpubroker.store import plans as rows

pytestmark = pytest.mark.anyio

PATH = "/v1/subscription"


async def show(agent: Client, query: str = "") -> tuple[str, int, str]:
    shown = await agent.get(PATH + query)
    return shown["plan"], shown["limits"]["requests_per_second"], shown["state"]


async def test_plans_are_listed_with_what_they_allow(world: World):
    plans = (await (await world.root.child(scopes=[])).get("/v1/plans"))["items"]
    assert [(plan["name"], plan["limits"]["requests_per_second"]) for plan in plans] == [
        ("free", 10), ("pro", 100), ("enterprise", 1000),
    ]  # fmt: skip
    first = await world.root.get("/v1/plans?limit=2")
    assert (await world.root.get(f"/v1/plans?cursor={first['next_cursor']}"))["items"] == plans[2:]
    assert (await Client("gbk_x", "").call("GET", "/v1/plans")).status_code == 401
    await world.root.get("/v1/plans?cursor=x", 422)


async def test_an_operator_puts_any_organisation_on_any_plan_and_it_holds_at_once(world: World):
    other = second(world)
    org_id = (await other.get("/v1/whoami"))["organisation"]["id"]
    before = await show(other)
    for plan, limit in (("pro", 100), ("free", 10), ("enterprise", 1000)):
        changed = await world.root.put(f"{PATH}?org_id={org_id}", {"plan": plan})
        assert (changed["org_id"], changed["plan"], changed["ends_at"]) == (org_id, plan, None)
        assert await show(other) == await show(world.root, f"?org_id={org_id}") == (plan, limit, "active")
        answer = await other.call("GET", "/v1/whoami")
        assert answer.headers["RateLimit-Policy"] == f'"plan";q={limit};w=1'
        assert answer.json()["organisation"]["plan"] == plan
    assert (await show(world.root))[0] == "enterprise"
    assert before[2] == "active"


async def test_nobody_raises_its_own_plan_and_only_the_root_agent_lowers_it(world: World):
    other = second(world)
    org_id = (await other.get("/v1/whoami"))["organisation"]["id"]
    await world.root.put(f"{PATH}?org_id={org_id}", {"plan": "pro"})
    child = await other.child()
    for agent, plan in ((other, "enterprise"), (child, "free"), (child, "enterprise")):
        assert (await agent.put(PATH, {"plan": plan}, 403))["code"] == "forbidden"
    await child.delete(PATH, 403)
    theirs = (await world.root.get("/v1/whoami"))["organisation"]["id"]
    for unknown in (theirs, "org_00000000000000000000000000"):
        await other.get(f"{PATH}?org_id={unknown}", 404)
        await other.put(f"{PATH}?org_id={unknown}", {"plan": "free"}, 404)
        await other.delete(f"{PATH}?org_id={unknown}", 404)
    reader = await other.child(scopes=["usage:read"])
    assert (await show(reader))[0] == "pro"
    await reader.put(PATH, {"plan": "free"}, 403)
    for body in ({}, {"plan": "gold"}, {"plan": "free", "until": 1}):
        await other.put(PATH, body, 422)
    assert (await other.put(PATH, {"plan": "pro"}))["plan"] == "pro"
    assert (await other.put(PATH, {"plan": "free"}))["plan"] == "free"
    await other.put(PATH, {"plan": "pro"}, 403)


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
async def test_nobody_overtakes_the_operator_who_lowers_a_plan(world: World, method: str):
    other = second(world)
    org_id = (await other.get("/v1/whoami"))["organisation"]["id"]
    await world.root.put(f"{PATH}?org_id={org_id}", {"plan": "pro"})
    async with store.worker() as tx:
        await rows.lock_plan(tx.conn, org_id)
        arguments = {"json": {"plan": "pro"}} if method == "PUT" else {"params": {"at_period_end": "true"}}
        asked = asyncio.create_task(other.call(method, PATH, **arguments))
        await asyncio.sleep(0.2)
        assert not asked.done()
        await tx.conn.execute("UPDATE org SET plan = 'free' WHERE id = %s", (org_id,))
    assert (await asked).status_code == (403 if method == "PUT" else 200)
    assert (await show(other))[0] == "free"


async def test_a_plan_is_cancelled_now_or_at_the_end_of_the_month(world: World):
    root = world.root
    ending = await root.delete(f"{PATH}?at_period_end=true", 200)
    assert (ending["plan"], ending["state"], ending["ends_at"]) == ("enterprise", "ending", ending["period_end"])
    assert ending["ends_at"].endswith("-01T00:00:00Z")
    assert await root.delete(f"{PATH}?at_period_end=true", 200) == ending
    assert (await root.put(PATH, {"plan": "enterprise"}))["ends_at"] is None, "taken back"
    await root.delete(f"{PATH}?at_period_end=true", 200)
    await reconciling.reconcile(world.adapters)
    assert await show(root) == ("enterprise", 1000, "ending")
    await world.pass_time(days=32)
    await reconciling.reconcile(world.adapters)
    over = await root.get(PATH)
    assert (over["plan"], over["state"], over["ends_at"], over["since"]) == ("free", "active", None, ending["ends_at"])
    await root.put(PATH, {"plan": "pro"})
    assert (await root.delete(PATH, 200))["plan"] == "free"
    assert (await root.delete(f"{PATH}?at_period_end=true", 200))["state"] == "active"
    await root.delete(f"{PATH}?at_period_end=1", 422)
