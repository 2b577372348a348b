"""What was used: groups, cuts and pages that sum to the ledger to the micro-USD."""

import csv
import io
import itertools
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.books import Books
from tests.factories import Client, World

from gpubroker.money import parse_usd

pytestmark = pytest.mark.anyio

START = datetime(2026, 11, 1, tzinfo=UTC)
NOW = datetime(2026, 12, 2, 12, tzinfo=UTC)
WHOLE = {"from": START.isoformat(), "to": NOW.isoformat()}


def at(month: int, day: int, hour: int = 0, minute: int = 0, second: int = 0) -> datetime:
    return datetime(2026, month, day, hour, minute, second, tzinfo=UTC)


class Past:
    """A month of use by three agents, billed in slices of all sizes."""

    def __init__(self, world: World, agents: dict[str, Client]) -> None:
        self.agents = agents
        self.books = Books(world.database_url)
        self.books.freeze(START)
        self.books.org_id = self.books.value("SELECT org_id FROM agent WHERE id = %s", world.root.agent_id)
        self.pods: dict[str, str] = {}
        self.write(
            "plain", "a", at(11, 20, 12), at(11, 20, 13, 30, 1), 2_390_001, {"team": "x", "run": "1"}, stopped=3_000
        )
        self.write(
            "midnight",
            "b",
            at(11, 20, 23, 10),
            at(11, 21, 2, 20, 7),
            1_000_003,
            {"team": "x"},
            gpu="L4",
            gpu_count=4,
            provider="other",
        )
        self.write("month", "c", at(11, 30, 22, 0, 3), at(12, 1, 3, 59, 59), 777_777, {}, gpu=None, gpu_count=0)
        self.write("short", "a", at(11, 22, 8), at(11, 22, 8, 0, 10), 9_000_000, {"team": "y"}, minimum=3600)
        self.write("tiny", "b", at(11, 23, 9, 59, 59), at(11, 23, 10, 0, 1), 7_199_999, {"team": "x"}, gpu="L4")
        self.books.freeze(NOW)

    def write(self, name: str, agent: str, began: datetime, ended: datetime, price: int, labels: dict[str, str], stopped: int = 0,
              **options: Any) -> None:  # fmt: skip
        books, dice = self.books, random.Random(name)
        books.freeze(began)
        pod_id = self.pods[name] = books.pod(self.agents[agent].agent_id)
        for key, value in labels.items():
            books.query("INSERT INTO pod_label VALUES (%s, %s, %s, %s)", books.org_id, pod_id, key, value)
        books.hold(pod_id, 20_000_000)
        instance_id = books.instance(pod_id, began, price=price, **options)
        books.phase(instance_id, began, price=price)
        moments = sorted(dice.uniform(0, (ended - began).total_seconds()) for _ in range(8))
        for seconds in moments:
            books.bill(instance_id, began + timedelta(seconds=seconds))
        if stopped:
            books.phase(instance_id, ended, "storage", 100_000)
            ended += timedelta(seconds=stopped)
        books.freeze(ended + timedelta(seconds=1))
        books.gone(instance_id, ended)
        books.settle(pod_id)

    def ledger(self, *names: str) -> int:
        """What the agents were charged for these pods."""
        return sum(sum(self.books.posted(self.pods[name]).values()) for name in names or self.pods)


@pytest.fixture
async def past(world: World) -> "Iterator[Past]":
    a, c = await world.root.child(name="a"), await world.root.child(name="c")
    made = Past(world, {"a": a, "b": await a.child(name="b"), "c": c})
    yield made
    made.books.conn.close()


async def usage(client: Client, **query: str) -> dict[str, Any]:
    return await client.get("/v1/usage", params=WHOLE | query)


async def test_the_total_is_the_ledger(world: World, past: Past):
    everything = await usage(world.root)
    assert parse_usd(everything["total"]["amount_usd"]) == past.ledger()
    assert everything["items"] == []
    assert (datetime.fromisoformat(everything["from"]), datetime.fromisoformat(everything["to"])) == (START, NOW)
    ran = 5401 + 11_407 + 21_596 + 10 + 2
    assert (everything["total"]["seconds"], everything["total"]["gpu_seconds"]) == (ran, 5401 + 4 * 11_407 + 10 + 2)
    assert past.books.value("SELECT count(*) FROM ledger WHERE account = 'loss'") == 0


GROUPS = ("agent", "pod", "provider", "gpu", "hour", "day", "month", "label:team", "label:run", "label:none")


async def test_every_group_sums_to_the_total_to_the_micro_dollar(world: World, past: Past, subtests: pytest.Subtests):
    for group in GROUPS:
        with subtests.test(group=group):
            shown = await usage(world.root, group_by=group)
            for name in ("seconds", "gpu_seconds"):
                assert sum(item[name] for item in shown["items"]) == shown["total"][name]
            total = parse_usd(shown["total"]["amount_usd"])
            assert sum(parse_usd(item["amount_usd"]) for item in shown["items"]) == total == past.ledger()
            keys = [item["key"] for item in shown["items"]]
            assert len(set(keys)) == len(keys)


async def test_groups_are_what_they_say(world: World, past: Past):
    def keyed(shown: dict[str, Any]) -> dict[Any, int]:
        return {item["key"]: parse_usd(item["amount_usd"]) for item in shown["items"]}

    ids = {name: client.agent_id for name, client in past.agents.items()}
    assert keyed(await usage(world.root, group_by="agent")) == {
        ids["a"]: past.ledger("plain", "short"), ids["b"]: past.ledger("midnight", "tiny"), ids["c"]: past.ledger("month"),
    }  # fmt: skip
    assert keyed(await usage(world.root, group_by="pod")) == {
        pod_id: past.ledger(name) for name, pod_id in past.pods.items()
    }
    assert keyed(await usage(world.root, group_by="provider")) == {
        "other": past.ledger("midnight"), "simulated": past.ledger("plain", "month", "short", "tiny"),
    }  # fmt: skip
    assert keyed(await usage(world.root, group_by="gpu")) == {
        "H100 SXM": past.ledger("plain", "short"), "L4": past.ledger("midnight", "tiny"), None: past.ledger("month"),
    }  # fmt: skip
    assert keyed(await usage(world.root, group_by="label:team")) == {
        "x": past.ledger("plain", "midnight", "tiny"), "y": past.ledger("short"), None: past.ledger("month"),
    }  # fmt: skip
    days = await usage(world.root, group_by="day")
    assert [item["key"] for item in days["items"]] == [
        "2026-11-20",
        "2026-11-21",
        "2026-11-22",
        "2026-11-23",
        "2026-11-30",
        "2026-12-01",
    ]
    months = await usage(world.root, group_by="month")
    assert [(item["key"], item["seconds"]) for item in months["items"]] == [
        ("2026-11", 5401 + 11_407 + 7_197 + 10 + 2),
        ("2026-12", 14_399),
    ]
    hours = await usage(world.root, group_by="hour", pod_id=past.pods["tiny"])
    assert [(item["key"], item["seconds"]) for item in hours["items"]] == [
        ("2026-11-23T09:00:00Z", 1),
        ("2026-11-23T10:00:00Z", 1),
    ]


async def test_storage_costs_money_and_is_no_running_second(world: World, past: Past):
    shown = await usage(world.root, pod_id=past.pods["plain"])
    assert shown["total"]["seconds"] == 5401
    assert parse_usd(shown["total"]["amount_usd"]) == 2_390_001 * 5401 // 3600 + 100_000 * 3000 // 3600


async def test_a_minimum_is_counted_when_it_was_charged(world: World, past: Past):
    (item,) = (await usage(world.root, pod_id=past.pods["short"], group_by="hour"))["items"]
    assert (item["key"], item["seconds"], item["amount_usd"]) == ("2026-11-22T08:00:00Z", 10, "9.000000")


async def test_cuts_anywhere_telescope_to_the_whole(world: World, past: Past):
    dice = random.Random(11)
    near = [at(11, 23, 9, 59, 59), at(11, 23, 10), at(11, 20, 13), at(11, 21), at(12, 1)]
    for is_whole in (True, False):
        for _ in range(10):
            cuts = [START + timedelta(seconds=dice.uniform(19 * 86400, 31 * 86400)) for _ in range(4)]
            cuts += [moment + timedelta(seconds=dice.uniform(-1, 1)) for moment in dice.choices(near, k=8)]
            cuts = [START, *sorted(cut.replace(microsecond=0) if is_whole else cut for cut in set(cuts)), NOW]
            parts = [
                (await usage(world.root, **{"from": one.isoformat(), "to": other.isoformat()}))["total"]
                for one, other in itertools.pairwise(cuts)
                if one < other
            ]
            assert sum(parse_usd(part["amount_usd"]) for part in parts) == past.ledger(), cuts
            assert sum(part["seconds"] for part in parts) == 38_416, cuts


async def test_by_default_it_is_this_month_until_now(world: World, past: Past):
    shown = await world.root.get("/v1/usage")
    assert (datetime.fromisoformat(shown["from"]), datetime.fromisoformat(shown["to"])) == (at(12, 1), NOW)
    assert shown["total"]["seconds"] == 14_399


async def test_agents_see_what_they_and_those_below_used(world: World, past: Past):
    sees = {"a": ("plain", "short", "midnight", "tiny"), "b": ("midnight", "tiny"), "c": ("month",)}
    for name, pods in sees.items():
        client = past.agents[name]
        assert parse_usd((await usage(client))["total"]["amount_usd"]) == past.ledger(*pods)
        found = await client.get("/v1/usage/records", params=WHOLE | {"limit": "200"})
        assert {record["pod_id"] for record in found["items"]} == {past.pods[pod] for pod in pods}
    assert (await usage(past.agents["b"], agent_id=past.agents["a"].agent_id))["total"]["amount_usd"] == "0.000000"
    assert (await usage(past.agents["b"], pod_id=past.pods["plain"]))["total"]["amount_usd"] == "0.000000"


async def test_records_are_every_interval_once_page_by_page(world: World, past: Past):
    records: list[dict[str, Any]] = []
    cursor = None
    while True:
        page = await world.root.get(
            "/v1/usage/records", params=WHOLE | {"limit": "7"} | ({"cursor": cursor} if cursor else {})
        )
        records += page["items"]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert (
        len(records)
        == len({record["id"] for record in records})
        == past.books.value("SELECT count(*) FROM usage_interval")
    )
    minimum = past.books.value("SELECT sum(amount_micro)::bigint FROM ledger WHERE account = 'minimum'")
    assert sum(parse_usd(record["amount_usd"]) for record in records) == past.ledger() - minimum
    for record in records:
        span = datetime.fromisoformat(record["to"]) - datetime.fromisoformat(record["from"])
        assert span.total_seconds() == record["seconds"] > 0
    first = next(record for record in records if record["pod_id"] == past.pods["midnight"])
    assert set(first) == {
        "id", "pod_id", "agent_id", "instance", "provider", "gpu", "gpu_count", "billing", "from", "to", "seconds",
        "price_usd_per_hour", "amount_usd",
    }  # fmt: skip
    assert (first["provider"], first["gpu"], first["gpu_count"], first["billing"]) == ("other", "L4", 4, "full")
    assert (first["price_usd_per_hour"], first["agent_id"]) == ("1.000003", past.agents["b"].agent_id)


async def test_records_can_be_asked_for_by_pod_agent_and_time(world: World, past: Past):
    async def pods(**query: str) -> set[str]:
        found = await world.root.get("/v1/usage/records", params=WHOLE | {"limit": "200"} | query)
        return {name for name, pod_id in past.pods.items() if pod_id in {record["pod_id"] for record in found["items"]}}

    assert await pods(pod_id=past.pods["short"]) == {"short"}
    assert await pods(agent_id=past.agents["b"].agent_id) == {"midnight", "tiny"}
    assert await pods(**{"from": at(11, 22).isoformat(), "to": at(11, 24).isoformat()}) == {"short", "tiny"}
    assert await pods(**{"from": at(11, 22, 8, 0, 10).isoformat(), "to": at(11, 22, 9).isoformat()}) == set()


async def test_a_question_of_usage_is_checked(world: World):
    wrong = [
        "group_by=colour", "group_by=label:", "group_by=label:a%20b", "from=yesterday", "from=2026-01-01",
        "from=2026-01-01T00:00:00", "to=2026-13-01T00:00:00Z", "from=2026-02-01T00:00:00Z&to=2026-01-01T00:00:00Z",
        "from=2026-01-01T00:00:00Z&to=2026-01-01T00:00:00Z", "groupby=day",
        "from_=2026-01-01T00:00:00Z", "pod_id=a&pod_id=b", "pod_id=%00",
    ]  # fmt: skip
    for query in wrong:
        refused = await world.root.get(f"/v1/usage?{query}", 422)
        assert refused["code"] == "invalid", query
    for query in ("limit=0", "limit=201", "cursor=x", "cursor=WyJcdTAwMDAiXQ", "group_by=day"):
        assert (await world.root.get(f"/v1/usage/records?{query}", 422))["code"] == "invalid", query
    for moment in (
        "2026-11-01T00:00:00Z",
        "2026-11-01T01:00:00%2B01:00",
        "2026-11-01T00:00:00.5Z",
        "0001-01-01T00:00:00Z",
        "2026-11-01t00:00:00z",
    ):
        await world.root.get(f"/v1/usage?from={moment}")


async def test_months_sum_to_the_ledger_and_closed_ones_stay(world: World, past: Past):
    before = await world.root.get("/v1/statements/2026-11")
    assert before["state"] == "open"
    past.books.freeze(at(12, 3))
    past.books.query("SELECT close_months()")
    for month in ("2026-11", "2026-12"):
        statement = await world.root.get(f"/v1/statements/{month}")
        ledger = past.books.value(
            "SELECT sum(amount_micro)::bigint FROM ledger WHERE to_char(month, 'YYYY-MM') = %s", month
        )
        items = sum(parse_usd(item["amount_usd"]) for item in statement["items"])
        assert items + parse_usd(statement["minimum_usd"]) == parse_usd(statement["total_usd"]) == ledger
    closed = await world.root.get("/v1/statements/2026-11")
    assert closed == before | {"state": "closed"}
    text = await world.root.get("/v1/statements/2026-11", headers={"Accept": "text/csv"})
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [{k: row[k] for k in ("agent_id", "pod_id", "amount_usd")} for row in rows] == [
        {k: item[k] for k in ("agent_id", "pod_id", "amount_usd")} for item in closed["items"]
    ]


async def test_usage_of_a_running_pod_grows_with_what_was_seen(world: World):
    await world.use_final()
    agent = await world.root.child(budget={"limit_usd": "10"})
    pod = await world.run(agent, max_lifetime_seconds=3600, labels={"team": "x"})
    spent: list[int] = []
    for _ in range(3):
        await world.pass_time(seconds=100)
        await world.tick()
        spent.append(parse_usd((await agent.get("/v1/usage?group_by=label:team"))["total"]["amount_usd"]))
        shown = await agent.get(f"/v1/pods/{pod['id']}")
        assert (
            parse_usd(shown["spent_usd"])
            == spent[-1]
            == parse_usd((await agent.get("/v1/budgets"))["items"][0]["spent_usd"])
        )
        link = await agent.get(shown["links"]["usage"])
        assert sum(parse_usd(record["amount_usd"]) for record in link["items"]) == spent[-1]
    assert spent == sorted(set(spent))
