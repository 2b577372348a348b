"""Spend ≤ cap, always: holds under nested budgets, whoever races, and what may be set by whom."""

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import httpx
import psycopg
import pytest
from tests.books import NOON, Books, cloned
from tests.factories import Client, World, app_of

from gpubroker import accounts, keys
from gpubroker.ids import new_id
from gpubroker.money import format_usd


@pytest.fixture(scope="module")
def books_url(postgres_url: str, template: str) -> Iterator[str]:
    with cloned(postgres_url, template) as url:
        yield url


@pytest.fixture
def books(books_url: str) -> Iterator[Books]:
    made = Books(books_url)
    made.freeze()
    yield made
    made.clear()


def refused_by(books: Books, pod_id: str, amount: int, cause: str = "create") -> str:
    with pytest.raises(psycopg.Error) as refused:
        books.hold(pod_id, amount, cause)
    assert refused.value.sqlstate == "GB001"
    return refused.value.diag.message_primary or ""


# Holds


def test_a_thousand_racing_holds_under_a_budget_for_300_are_exactly_300(books: Books):
    root, middle, leaf = books.tree(1_000 * 7, 300 * 7 + 6, 900 * 7)
    other = books.agent(None, path=[root, middle])
    pods = [(books.pod(agent_id), agent_id) for agent_id in random.Random(1).choices((leaf, middle, other), k=1000)]
    over: list[object] = []
    done = threading.Event()

    def watch() -> None:
        with books.connect() as conn:
            while not done.is_set():
                over.extend(conn.execute("SELECT * FROM budget WHERE committed_micro > limit_micro").fetchall())

    def take(mine: list[tuple[str, str]]) -> int:
        taken = 0
        with books.connect() as conn:
            for pod_id, agent_id in mine:
                try:
                    conn.execute("SELECT take_hold(%s, 'create', %s, 7)", (pod_id, agent_id))
                    taken += 1
                except psycopg.Error as error:
                    if (error.sqlstate, error.diag.message_primary) != ("GB001", middle):
                        raise
        return taken

    with ThreadPoolExecutor(9) as threads:
        watching = threads.submit(watch)
        taken = list(threads.map(take, [pods[n::8] for n in range(8)]))
        done.set()
        watching.result()
    assert not over
    assert sum(taken) == 300 == books.value("SELECT count(*) FROM hold")
    assert books.standing(root) == books.standing(middle) == 2100
    books.check()


def test_takers_givers_and_setters_never_deadlock_and_never_lose_a_micro_dollar(books: Books):
    root, middle = books.tree(500_000, 300_000)
    leaves = [books.agent(limit, path=[root, middle]) for limit in (None, 100_000, 250_000)]
    pods = [(books.pod(leaf), leaf) for leaf in leaves for _ in range(200)]
    until = time.monotonic() + 2.0
    outcomes: Counter[str] = Counter()

    def work(seed: int) -> None:
        dice, mine = random.Random(seed), pods[seed::5]
        held: list[int] = []
        with books.connect() as conn:
            while time.monotonic() < until and (mine or held):
                what = dice.random()
                if what < 0.55 and mine:
                    pod_id, agent_id = mine.pop()
                    try:
                        row = conn.execute(
                            "SELECT take_hold(%s, 'create', %s, %s)", (pod_id, agent_id, dice.randint(1, 9_000))
                        ).fetchone()
                        held.append((row or {})["take_hold"])
                        outcomes["taken"] += 1
                    except psycopg.Error as error:
                        if error.sqlstate != "GB001":
                            raise
                        outcomes["refused"] += 1
                elif what < 0.9 and held:
                    conn.execute("SELECT close_hold(%s)", (held.pop(dice.randrange(len(held))),))
                    outcomes["closed"] += 1
                else:
                    agent_id = dice.choice([root, middle, *leaves])
                    limit = dice.choice([300_000, 400_000, 500_000])
                    conn.execute(
                        "SELECT set_budget(%s, %s, %s)", (agent_id, limit, dice.choice(["total", "day", "month"]))
                    )
                    outcomes["set"] += 1

    with ThreadPoolExecutor(5) as threads:
        for done in [threads.submit(work, seed) for seed in range(5)]:
            done.result()
    assert min(outcomes[what] for what in ("taken", "closed", "set")) > 10, outcomes
    books.check()
    for row in books.query("SELECT id FROM hold WHERE closed_at IS NULL"):
        books.query("SELECT close_hold(%s)", row["id"])
    assert [row["committed_micro"] for row in books.query("SELECT committed_micro FROM budget")] == [0] * 5


def test_a_refusal_names_the_agent_whose_limit_is_in_the_way_and_leaves_nothing(books: Books):
    root, middle, leaf = books.tree(100, 50, None)
    pod_id = books.pod()
    assert refused_by(books, pod_id, 51) == middle
    assert refused_by(books, pod_id, 101) == middle
    books.query("SELECT set_budget(%s, 1000, 'total')", middle)
    assert refused_by(books, pod_id, 101) == root
    assert books.query("SELECT * FROM hold") == books.query("SELECT * FROM hold_budget") == []
    assert [books.standing(agent_id) for agent_id in (root, middle, leaf)] == [0, 0, 0]


def test_exactly_the_limit_can_be_held_and_not_one_micro_dollar_more(books: Books):
    books.tree(100, 50)
    books.hold(books.pod(), 49)
    assert refused_by(books, books.pod(), 2) == books.agents[1]
    books.hold(books.pod(), 1)
    assert books.standing(books.agents[1]) == 50


def test_nobody_spends_without_a_limit_somewhere_above(books: Books):
    root, _, _ = books.tree(None, None, None)
    assert refused_by(books, books.pod(), 1) == root
    books.query("SELECT set_budget(%s, 0, 'total')", books.agents[1])
    assert refused_by(books, books.pod(), 1) == books.agents[1]


def test_a_limit_set_later_counts_what_was_held_and_spent_before(books: Books):
    _, leaf = books.tree(10**9, None)
    spent, _ = books.running(hold=700, price=3600)
    books.query("UPDATE hold SET drawn_micro = 300 WHERE pod_id = %s", spent)
    books.query("SELECT close_hold(id) FROM hold")
    books.hold(books.pod(), 200)
    books.query("SELECT set_budget(%s, 600, 'total')", leaf)
    assert books.standing(leaf) == 500
    assert refused_by(books, books.pod(), 101) == leaf
    books.hold(books.pod(), 100)


def test_a_limit_below_what_is_committed_allows_nothing_new_until_enough_came_back(books: Books):
    (root,) = books.tree(1000)
    first = books.hold(books.pod(), 800)
    books.query("SELECT set_budget(%s, 500, 'total')", root)
    assert refused_by(books, books.pod(), 1) == root
    books.query("SELECT close_hold(%s)", first)
    books.hold(books.pod(), 500)


def test_closing_a_hold_twice_gives_back_once(books: Books):
    books.tree(1000)
    hold = books.hold(books.pod(), 800)
    for _ in range(2):
        books.query("SELECT close_hold(%s)", hold)
    assert books.standing(books.agents[0]) == 0


def test_the_same_cause_holds_once(books: Books):
    books.tree(1000)
    pod_id = books.pod()
    books.hold(pod_id, 10)
    with pytest.raises(psycopg.errors.UniqueViolation):
        books.hold(pod_id, 10)
    assert books.standing(books.agents[0]) == 10


def test_a_hold_of_nothing_or_less_is_refused(books: Books):
    books.tree(1000)
    for amount in (0, -5):
        with pytest.raises(psycopg.errors.CheckViolation):
            books.hold(books.pod(), amount)


# Periods


def test_a_new_day_has_its_whole_limit_again_and_yesterdays_holds_do_not_touch_it(books: Books):
    (root,) = books.tree(1000, period="day")
    yesterday = books.hold(books.pod(), 900)
    assert refused_by(books, books.pod(), 200) == root
    books.freeze(datetime(2026, 11, 21, tzinfo=UTC))
    assert books.standing(root) == 0
    books.hold(books.pod(), 1000)
    books.query("SELECT close_hold(%s)", yesterday)
    assert books.standing(root) == 1000
    books.check()


def test_a_month_begins_at_midnight_utc_for_everyone(books: Books):
    books.freeze(datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC))
    (root,) = books.tree(1000, period="month")
    books.query("SET TIME ZONE 'Pacific/Auckland'")
    books.hold(books.pod(), 1000)
    assert refused_by(books, books.pod(), 1) == root
    books.freeze(datetime(2026, 12, 1, tzinfo=UTC))
    books.hold(books.pod(), 1000)


def test_another_period_counts_what_was_taken_in_it(books: Books):
    (root,) = books.tree(1000)
    books.hold(books.pod(), 100)
    books.freeze(NOON + timedelta(days=1))
    books.hold(books.pod(), 20)
    books.freeze(NOON + timedelta(days=12))  # December
    books.hold(books.pod(), 3)
    for period, counted in (("day", 3), ("month", 3), ("total", 123), ("month", 3), ("day", 3), ("total", 123)):
        books.query("SELECT set_budget(%s, 1000, %s)", root, period)
        assert books.standing(root) == counted, period
        books.check()
    books.query("SELECT close_hold(id) FROM hold")
    assert books.standing(root) == 0


def test_a_hold_that_waited_across_midnight_comes_back_from_where_it_counts(books: Books):
    """It was asked for on the last day of a month, waited for the row, and was taken on the first of the next."""
    books.freeze(datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC))
    (root,) = books.tree(1000, period="day")
    late, early = books.pod(), books.pod()
    with books.connect() as blocker, books.connect() as other, ThreadPoolExecutor(1) as thread:
        with blocker.transaction():
            blocker.execute("SELECT FROM budget WHERE agent_id = %s FOR UPDATE", (root,))
            waiting = thread.submit(other.execute, "SELECT take_hold(%s, 'create', %s, 300)", (late, root))
            while not books.value(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%%take_hold%%'"
            ):
                time.sleep(0.01)
            books.freeze(datetime(2026, 12, 1, tzinfo=UTC))
            blocker.execute("SELECT take_hold(%s, 'create', %s, 50)", (early, root))
        waiting.result()
    books.check()
    books.query("SELECT set_budget(%s, 1000, 'month')", root)
    books.check()
    books.query("SELECT close_hold(id) FROM hold")
    assert books.standing(root) == 0


# Tokens


def token(books: Books, limit: int | None, parent: str | None = None) -> str:
    return books.value(
        """INSERT INTO token (jti, org_id, agent_id, actor_id, actors, parent_jti, scopes, limit_micro, expires_at)
           VALUES (%s, %s, %s, %s, %s, %s, '{}', %s, 'infinity') RETURNING jti""",
        new_id("tok"), books.org_id, books.agents[-1], books.agents[-1], [books.agents[-1]], parent, limit,
    )  # fmt: skip


def test_a_tokens_own_budget_bounds_its_pods_and_those_of_tokens_made_from_it(books: Books):
    _, leaf = books.tree(1000, 500)
    outer = token(books, 100)
    inner = token(books, None, token(books, 80, outer))
    first = books.hold(books.pod(jti=inner), 60)
    assert refused_by(books, books.pod(jti=inner), 21) == leaf
    books.hold(books.pod(jti=outer), 40)
    assert refused_by(books, books.pod(jti=outer), 1) == leaf
    books.hold(books.pod(), 400)  # the agent's own are not the token's
    assert refused_by(books, books.pod(jti=token(books, 10**6)), 1) == leaf
    books.query("UPDATE hold SET drawn_micro = 10 WHERE id = %s", first)
    books.query("SELECT close_hold(%s)", first)
    committed = books.query(
        "SELECT committed_micro FROM token WHERE limit_micro < 1000 OR limit_micro IS NULL ORDER BY created_at"
    )
    assert [row["committed_micro"] for row in committed] == [50, 10, 10]
    books.hold(books.pod(jti=outer), 50)


# Who may take


def test_a_caller_takes_no_hold_on_a_pod_of_another_organisation_and_closes_none(books: Books):
    books.tree(1000)
    pod_id, agent_id = books.pod(), books.agents[0]
    theirs = books.org_id
    books.tree(1000)
    with books.role("gpubroker_public", books.org_id) as conn, pytest.raises(psycopg.errors.NoDataFound):
        conn.execute("SELECT take_hold(%s, 'create', %s, 5)", (pod_id, agent_id))
    with books.role("gpubroker_public", books.org_id) as conn, pytest.raises(psycopg.errors.NoDataFound):
        conn.execute("SELECT set_budget(%s, 5, 'total')", (agent_id,))
    with books.role("gpubroker_public", theirs) as conn, pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute("SELECT close_hold(1)")


# Through the interface


def make_keys(world: World, agents: list[Client], number: int) -> list[str]:
    """So many keys of these agents in turn, straight into their table."""
    made = [keys.new_key() for _ in range(number)]
    with world.connect() as conn, conn.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO key (id, org_id, agent_id, name, start, hash, scopes)"
            " SELECT %s, org_id, id, 'one of many', %s, %s, scopes FROM agent WHERE id = %s",
            [
                (key_id, key[: keys.SHOWN], keys.hash_key(key), agents[n % len(agents)].agent_id)
                for n, (key_id, key) in enumerate(made)
            ],
        )
    return [key for _, key in made]


@pytest.mark.anyio
async def test_a_thousand_creates_at_once_under_three_budgets_of_which_one_allows_300_make_exactly_300_pods(
    world: World,
):
    needed = 90_279  # 10 s and 120 s of termination at 2.50 USD/h, rounded up each: the dearest candidate
    parent = await world.root.child(budget={"limit_usd": "100"}, name="parent")
    middle = await parent.child(budget={"limit_usd": format_usd(300 * needed + needed - 1)}, name="middle")
    leaves = [await middle.child(name=f"leaf {n}") for n in range(4)]
    callers = make_keys(world, leaves, 1000)
    body = {"image": "busybox", "requirements": {"gpu": ["h100"]}, "max_lifetime_seconds": 10}
    over: list[object] = []

    async def create(http: httpx.AsyncClient, number: int) -> httpx.Response:
        headers = {"Authorization": f"Bearer {callers[number]}", "Idempotency-Key": f"n{number}"}
        while (answer := await http.post("/v1/pods", json=body, headers=headers)).status_code == 503:
            assert answer.json()["code"] == "unavailable"  # it waited too long: others use this machine too
            await asyncio.sleep(number / 100)
        if number % 25 == 0:
            over.extend(world.query("SELECT * FROM budget WHERE committed_micro > limit_micro"))
        return answer

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app_of("/v1/pods")), base_url="http://broker", timeout=60
    ) as http:
        answers = await asyncio.gather(*(create(http, number) for number in range(1000)))
    assert Counter(answer.status_code for answer in answers) == {202: 300, 402: 700}
    assert not over
    refused = next(answer.json() for answer in answers if answer.status_code == 402)
    assert (refused["code"], refused["limiting_agent"], refused["available_usd"]) == ("budget_exhausted", None, None)
    assert world.query("SELECT count(*)::int AS pods, (SELECT count(*)::int FROM hold) AS holds FROM pod") == [
        {"pods": 300, "holds": 300}
    ]
    budgets = {budget["agent_id"]: budget for budget in (await world.root.get("/v1/budgets"))["items"]}
    for above in (world.root, parent, middle):
        assert (budgets[above.agent_id]["held_usd"], budgets[above.agent_id]["spent_usd"]) == ("27.083700", "0.000000")
    assert budgets[middle.agent_id]["available_usd"] == "0.090278"
    world.check_money()


@pytest.mark.anyio
async def test_a_budget_shows_what_is_spent_held_and_available_along_the_path(world: World):
    await world.use_final()
    parent = await world.root.child(budget={"limit_usd": "1"}, name="parent")
    child = await parent.child(budget={"limit_usd": "0.9"}, name="child")
    bare = await child.child(name="bare")
    pod = await world.run(
        bare, requirements=None, offer_id=world.query("SELECT id FROM offer ORDER BY price_micro_h")[0]["id"]
    )
    held = 333_334 + 5_556  # 600 s and 10 s of termination at 2 USD/h, rounded up each
    for client, limit, least in ((parent, 1_000_000, 1_000_000), (child, 900_000, 900_000), (bare, None, 900_000)):
        (shown,) = [b for b in (await client.get("/v1/budgets"))["items"] if b["agent_id"] == client.agent_id]
        assert shown["limit_usd"] == (format_usd(limit) if limit else None)
        assert shown["own_available_usd"] == (format_usd(limit - held) if limit else None)
        assert (shown["available_usd"], shown["held_usd"], shown["spent_usd"]) == (
            format_usd(least - held),
            "0.338890",
            "0.000000",
        )
        assert (shown["period"], shown["period_start"]) == ("total", None)
    await world.pass_time(seconds=180)
    await world.tick()
    await bare.delete(f"/v1/pods/{pod['id']}")
    await world.drive_due()
    ended = await bare.get(f"/v1/pods/{pod['id']}")
    (shown,) = (await bare.get("/v1/budgets"))["items"]
    assert (shown["held_usd"], shown["spent_usd"]) == ("0.000000", ended["spent_usd"])
    assert shown["parent_id"] == child.agent_id
    assert "0.099" < ended["spent_usd"] < "0.103"


@pytest.mark.anyio
async def test_nobody_raises_its_own_limit_and_everyone_may_lower_it(world: World):
    agent = await world.root.child(budget={"limit_usd": "10"})
    path = f"/v1/budgets/{agent.agent_id}"
    for body in ({"limit_usd": "10.000001"}, {"limit_usd": "11", "period": "day"}, {"limit_usd": "5", "period": "day"}):
        refused = await agent.put(path, body, 403)
        assert refused["code"] == "forbidden"
    assert (await agent.put(path, {"limit_usd": "10"}))["limit_usd"] == "10.000000"
    assert (await agent.put(path, {"limit_usd": "2.5"}))["limit_usd"] == "2.500000"
    await agent.put(path, {"limit_usd": "10"}, 403)


@pytest.mark.anyio
async def test_a_parent_sets_its_childs_limit_up_to_the_least_above_it(world: World):
    parent = await world.root.child(budget={"limit_usd": "10"})
    child = await parent.child(name="child")
    grandchild = await child.child(name="grandchild", budget={"limit_usd": "3"})
    path = f"/v1/budgets/{grandchild.agent_id}"
    assert (await parent.put(path, {"limit_usd": 7, "period": "month"}))["period"] == "month"
    refused = await parent.put(path, {"limit_usd": "10.01"}, 422)
    assert (refused["code"], refused["errors"][0]["pointer"]) == ("exceeds_parent", "/limit_usd")
    await parent.put(f"/v1/budgets/{child.agent_id}", {"limit_usd": "4"})
    assert (await parent.put(path, {"limit_usd": "4.5"}, 422))["code"] == "exceeds_parent"
    assert (await parent.put(path, {"limit_usd": "4"}))["limit_usd"] == "4.000000"


@pytest.mark.anyio
async def test_a_parent_that_shrinks_shrinks_what_its_child_can_hold_at_once(world: World):
    parent = await world.root.child(budget={"limit_usd": "10"})
    child = await parent.child(name="child", budget={"limit_usd": "10"})
    await child.pod(max_lifetime_seconds=600)
    await world.root.put(f"/v1/budgets/{parent.agent_id}", {"limit_usd": "0.4"})
    refused = await child.pod(402)
    assert (refused["code"], refused["limiting_agent"]) == ("budget_exhausted", None)
    assert (await child.get("/v1/budgets"))["items"][0]["available_usd"] == "0.000000"


@pytest.mark.anyio
async def test_an_organisations_limit_needs_admin(world: World):
    assert (await world.root.put(f"/v1/budgets/{world.root.agent_id}", {"limit_usd": "1000", "period": "month"}))[
        "limit_usd"
    ] == "1000.000000"
    made = accounts.bootstrap(world.database_url, "second", 5_000_000, "total", "free", new_key=False)
    second = Client(made.key.key or "", made.agent_id)
    assert (await second.put(f"/v1/budgets/{made.agent_id}", {"limit_usd": "6"}, 403))["code"] == "forbidden"
    assert (await second.put(f"/v1/budgets/{made.agent_id}", {"limit_usd": "4"}))["limit_usd"] == "4.000000"


@pytest.mark.anyio
async def test_budgets_of_others_do_not_exist(world: World):
    first, second = (
        await world.root.child(name="first", budget={"limit_usd": "5"}),
        await world.root.child(name="second"),
    )
    unknown = await second.put("/v1/budgets/agt_00000000000000000000000000", {"limit_usd": "1"}, 404)
    for agent_id in (first.agent_id, world.root.agent_id):
        hidden = await second.put(f"/v1/budgets/{agent_id}", {"limit_usd": "1"}, 404)
        assert {k: v for k, v in hidden.items() if k != "request_id"} == {
            k: v for k, v in unknown.items() if k != "request_id"
        }
    assert [b["agent_id"] for b in (await second.get("/v1/budgets"))["items"]] == [second.agent_id]


@pytest.mark.anyio
async def test_setting_a_budget_needs_its_scope(world: World):
    reader = await world.root.child(scopes=["usage:read"])
    refused = await reader.put(f"/v1/budgets/{reader.agent_id}", {"limit_usd": "1"}, 403)
    assert refused["scope"] == "budgets:write"
    await reader.get("/v1/budgets")


@pytest.mark.anyio
async def test_budgets_are_listed_page_by_page(world: World):
    ids = [world.root.agent_id] + [(await world.root.child(name=f"n{n}")).agent_id for n in range(4)]
    found, cursor = [], ""
    while cursor is not None:
        page = await world.root.get(f"/v1/budgets?limit=2{cursor and '&cursor=' + cursor}")
        found += [b["agent_id"] for b in page["items"]]
        cursor = page["next_cursor"]
    assert found == sorted(ids)
