"""The heart of billing: each second once, to the micro-USD, whoever bills, whenever, and however often."""

import itertools
import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta

import psycopg
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.books import NOON, PRICE, Books, after, bounded, cloned


@pytest.fixture(scope="module")
def books_url(postgres_url: str, template: str) -> Iterator[str]:
    with cloned(postgres_url, template) as url:
        yield url


@pytest.fixture
def books(books_url: str) -> Iterator[Books]:
    made = Books(books_url)
    made.freeze()
    made.tree(10**12)
    yield made
    made.clear()


def floor(price: int, seconds: float) -> int:
    return price * int(seconds) // 3600


# Exactly once


def test_eight_writers_at_random_moments_bill_every_second_exactly_once(books: Books):
    pod_id, instance_id = books.running(4 * 86400)
    books.phase(instance_id, after(100_003), "storage", 100_001)
    books.phase(instance_id, after(150_001), "none", 0)
    books.phase(instance_id, after(150_777), "full", PRICE)
    end = 250_000
    moments = random.Random(7)
    plans = [[after(moments.uniform(-10, end)) for _ in range(30)] for _ in range(8)]
    went_back: list[str] = []
    start = threading.Barrier(8)

    def write(plan: list[datetime]) -> int:
        charged, seen = 0, NOON
        with books.connect() as conn:
            start.wait()
            for moment in plan:
                charged += (conn.execute("SELECT bill(%s, %s)", (instance_id, moment)).fetchone() or {})["bill"]
                row = conn.execute("SELECT billed_until FROM instance WHERE id = %s", (instance_id,)).fetchone() or {}
                if row["billed_until"] < max(seen, moment.replace(microsecond=0)):
                    went_back.append(f"{row['billed_until']} after {seen} and {moment}")
                seen = row["billed_until"]
        return charged

    with ThreadPoolExecutor(8) as threads:
        charged = sum(threads.map(write, plans)) + books.bill(instance_id, after(end))
    assert not went_back
    covered = books.value("SELECT range_agg(during)::text FROM usage_interval WHERE instance_id = %s", instance_id)
    wanted = books.value(
        "SELECT tstzmultirange(tstzrange(%s, %s), tstzrange(%s, %s))::text",
        NOON,
        after(150_001),
        after(150_777),
        after(end),
    )
    assert covered == wanted  # overlap is refused by the exclusion constraint, so this is: each second once
    whole = floor(PRICE, 100_003) + floor(100_001, 150_001 - 100_003) + floor(PRICE, end - 150_777)
    assert (
        charged
        == whole
        == books.posted(pod_id)["usage"]
        == sum(row["amount_micro"] for row in books.intervals(instance_id))
    )
    books.check()


def test_billing_a_moment_again_or_an_earlier_one_changes_nothing(books: Books):
    pod_id, instance_id = books.running()
    assert books.bill(instance_id, after(100.9)) == floor(PRICE, 100)
    before = books.intervals(instance_id)
    for seconds in (100, 100.2, 99, 0, -5000):
        assert books.bill(instance_id, after(seconds)) == 0
    assert books.intervals(instance_id) == before
    assert books.posted(pod_id) == {"usage": floor(PRICE, 100)}


def test_slices_of_a_second_cost_together_what_the_whole_costs(books: Books):
    price = 1_234_567
    _, instance_id = books.running(price=price)
    total = sum(books.bill(instance_id, after(second)) for second in range(1, 400))
    assert total == floor(price, 399)


def test_the_watermark_never_goes_back_for_anyone(books: Books):
    _, instance_id = books.running()
    books.bill(instance_id, after(100))
    with pytest.raises(psycopg.errors.RaiseException, match="would go back"):
        books.query("UPDATE instance SET billed_until = %s WHERE id = %s", after(99), instance_id)


def test_two_intervals_of_an_instance_cannot_overlap(books: Books):
    _, instance_id = books.running()
    books.bill(instance_id, after(100))
    with pytest.raises(psycopg.errors.ExclusionViolation):
        books.query(
            """INSERT INTO usage_interval (id, instance_id, phase_seq, during, month, amount_micro, charged_micro, payer)
               VALUES ('use_x', %s, 0, tstzrange(%s, %s), '2026-11-01', 0, 0, 'operator')""",
            instance_id, after(99), after(101),
        )  # fmt: skip


def test_nobody_changes_what_was_posted(books: Books, subtests: pytest.Subtests):
    pod_id, instance_id = books.running()
    books.bill(instance_id, after(100))
    owner = books.value("SELECT current_user")
    assert books.value("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
    for table, role, statement in itertools.product(
        ("ledger", "usage_interval"),
        (owner, "gpubroker_worker", "gpubroker_public"),
        ("UPDATE {} SET org_id = org_id", "DELETE FROM {}"),
    ):
        with subtests.test(table=table, role=role, statement=statement), books.role(role, books.org_id) as conn:
            with pytest.raises(psycopg.Error) as refused:
                conn.execute(statement.format(table))
            if role == owner:
                assert "append-only" in str(refused.value)
            else:
                assert isinstance(refused.value, psycopg.errors.InsufficientPrivilege)
    assert books.posted(pod_id) == {"usage": floor(PRICE, 100)}


# Where intervals are cut


def test_intervals_are_cut_at_midnight_utc_whatever_the_session_thinks(books: Books, subtests: pytest.Subtests):
    for zone in ("UTC", "America/New_York", "Asia/Kathmandu"):
        with subtests.test(zone=zone):
            books.query(f"SET TIME ZONE '{zone}'")
            _, instance_id = books.running(4 * 86400)
            books.bill(instance_id, after(3 * 86400))
            cuts = [row["z"].astimezone(UTC) for row in books.intervals(instance_id)]
            assert cuts == [datetime(2026, 11, day, tzinfo=UTC) for day in (21, 22, 23)] + [after(3 * 86400)]
            assert sum(row["amount_micro"] for row in books.intervals(instance_id)) == floor(PRICE, 3 * 86400)


def test_no_second_after_charge_until_is_the_customers(books: Books):
    pod_id, instance_id = books.running()
    books.query("UPDATE pod SET charge_until = %s WHERE id = %s", after(100), pod_id)
    assert books.bill(instance_id, after(250)) == floor(PRICE, 100)
    assert [(row["a"], row["z"], row["payer"]) for row in books.intervals(instance_id)] == [
        (NOON, after(100), "customer"), (after(100), after(250), "operator"),
    ]  # fmt: skip
    assert books.posted(pod_id) == {"usage": floor(PRICE, 100), "loss": floor(PRICE, 250) - floor(PRICE, 100)}


def test_nothing_is_billed_past_the_end_of_the_instance(books: Books):
    pod_id, instance_id = books.running()
    books.gone(instance_id, after(70.8))
    assert books.bill(instance_id, after(3000)) == floor(PRICE, 70)
    assert books.posted(pod_id) == {"usage": floor(PRICE, 70)}
    assert books.value("SELECT billed_until FROM instance WHERE id = %s", instance_id) == after(70)


# Months


CLOSINGS = (
    (datetime(2026, 12, 2, 23, 59, 59, tzinfo=UTC), date(2026, 10, 1)),
    (datetime(2026, 12, 3, tzinfo=UTC), date(2026, 11, 1)),
    (datetime(2027, 1, 2, 23, 59, 59, tzinfo=UTC), date(2026, 11, 1)),
    (datetime(2027, 1, 3, tzinfo=UTC), date(2026, 12, 1)),
    (datetime(2027, 3, 31, 5, tzinfo=UTC), date(2027, 2, 1)),
)


def test_a_month_closes_on_the_third_at_midnight_utc(books: Books, subtests: pytest.Subtests):
    books.query("SET TIME ZONE 'Pacific/Kiritimati'")
    for at, closed in CLOSINGS:
        with subtests.test(at=at):
            books.query("DELETE FROM month_closed")
            books.freeze(at)
            assert [row["close_months"] for row in books.query("SELECT close_months()")] == [closed]
            assert books.query("SELECT close_months()") == []


def test_what_is_billed_late_is_posted_to_the_first_open_month(books: Books):
    pod_id, instance_id = books.running(30 * 86400)
    in_time = datetime(2026, 11, 30, tzinfo=UTC)
    books.bill(instance_id, in_time)
    books.freeze(datetime(2026, 12, 3, tzinfo=UTC))
    books.query("SELECT close_months()")
    books.bill(instance_id, datetime(2026, 12, 4, tzinfo=UTC))
    by_month = {
        row["month"]: row["sum"]
        for row in books.query(
            "SELECT month, sum(amount_micro)::bigint AS sum FROM ledger WHERE pod_id = %s GROUP BY month", pod_id
        )
    }
    until, end = (in_time - NOON).total_seconds(), (datetime(2026, 12, 4, tzinfo=UTC) - NOON).total_seconds()
    assert by_month == {
        date(2026, 11, 1): floor(PRICE, until),
        date(2026, 12, 1): floor(PRICE, end) - floor(PRICE, until),
    }


def test_an_entry_of_an_open_month_is_posted_to_its_own(books: Books):
    pod_id, instance_id = books.running(30 * 86400)
    books.freeze(datetime(2026, 12, 2, 12, tzinfo=UTC))
    books.query("SELECT close_months()")
    books.bill(instance_id, datetime(2026, 12, 2, tzinfo=UTC))
    months = books.query("SELECT DISTINCT month FROM ledger WHERE pod_id = %s ORDER BY month", pod_id)
    assert [row["month"] for row in months] == [date(2026, 11, 1), date(2026, 12, 1)]


def test_a_minimum_of_a_closed_month_goes_to_the_open_one(books: Books):
    pod_id, instance_id = books.running(minimum=3600)
    books.bill(instance_id, after(10))
    books.gone(instance_id, after(10))
    books.freeze(datetime(2026, 12, 5, tzinfo=UTC))
    books.query("SELECT close_months()")
    books.settle(pod_id)
    entries = books.query("SELECT account, month, amount_micro FROM ledger WHERE pod_id = %s ORDER BY id", pod_id)
    assert [(e["account"], e["month"]) for e in entries] == [
        ("usage", date(2026, 11, 1)),
        ("minimum", date(2026, 12, 1)),
    ]


def test_a_month_that_closes_while_others_bill_never_changes_again(books: Books):
    books.freeze(datetime(2026, 12, 4, tzinfo=UTC))
    late = datetime(2026, 11, 30, 23, tzinfo=UTC)
    instances = []
    for _ in range(6):
        pod_id = books.pod()
        books.hold(pod_id, 100_000_000)
        instances.append(books.instance(pod_id, late))
        books.phase(instances[-1], late)
    sums = "SELECT coalesce(sum(amount_micro), 0)::bigint AS sum FROM ledger WHERE month = '2026-11-01'"
    start = threading.Barrier(4)

    def write(mine: list[str]) -> None:
        with books.connect() as conn:
            start.wait()
            for second in range(60, 3600, 60):
                for instance_id in mine:
                    conn.execute("SELECT bill(%s, %s)", (instance_id, late + timedelta(seconds=second)))

    with ThreadPoolExecutor(3) as threads:
        writers = [threads.submit(write, instances[n::3]) for n in range(3)]
        start.wait()
        while not books.value(sums):
            pass
        books.query("SELECT close_months()")
        at_close = books.value(sums)
        for writer in writers:
            writer.result()
    assert books.value(sums) == at_close
    assert books.value("SELECT sum(amount_micro)::bigint FROM ledger") == 6 * floor(PRICE, 3540)
    assert at_close < 6 * floor(PRICE, 3540), "nothing was billed after the month closed: the test shows nothing"


# Who pays


def test_a_stray_is_the_installations_loss(books: Books):
    pod_id = books.pod()
    books.hold(pod_id, 1_000_000)
    stray = books.instance(pod_id, role="stray")
    books.phase(stray, NOON, payer="operator")
    assert books.bill(stray, after(60)) == 0
    assert books.posted(pod_id) == {"loss": floor(PRICE, 60)}
    books.settle(pod_id)
    assert books.value("SELECT committed_micro FROM budget WHERE agent_id = %s", books.agents[0]) == 0


def test_a_stray_of_no_pod_is_billed_as_nobodys(books: Books):
    stray = books.value(
        """INSERT INTO instance (id, account_id, provider_instance_id, role, known_at, billed_until)
           VALUES ('ins_x', %s, 'x', 'stray', %s, %s) RETURNING id""",
        books.account_id, NOON, NOON,
    )  # fmt: skip
    books.phase(stray, NOON, payer="operator")
    assert books.bill(stray, after(60)) == 0
    (entry,) = books.query("SELECT account, org_id, amount_micro FROM ledger")
    assert entry == {"account": "loss", "org_id": None, "amount_micro": floor(PRICE, 60)}


def test_an_agent_never_pays_more_than_was_held(books: Books):
    pod_id, instance_id = books.running(100)
    held = books.value("SELECT amount_micro FROM hold")
    assert books.bill(instance_id, after(250)) == held
    posted = books.posted(pod_id)
    assert posted == {"usage": held, "loss": floor(PRICE, 250) - held}
    (row,) = books.intervals(instance_id)
    assert (row["amount_micro"], row["charged_micro"]) == (floor(PRICE, 250), held)


def test_what_the_hold_could_not_pay_is_lost_once(books: Books):
    pod_id, instance_id = books.running(100, increment=1)
    books.bill(instance_id, after(250))
    books.gone(instance_id, after(300))
    books.settle(pod_id)
    assert sum(books.posted(pod_id).values()) == floor(PRICE, 300)


def test_holds_are_drawn_in_the_order_in_which_they_were_taken(books: Books):
    pod_id, instance_id = books.running(100)
    first = books.value("SELECT amount_micro FROM hold")
    books.hold(pod_id, 1_000_000, "extend:1")
    books.bill(instance_id, after(160))
    drawn = [row["drawn_micro"] for row in books.query("SELECT drawn_micro FROM hold ORDER BY id")]
    assert drawn == [first, floor(PRICE, 160) - first]
    books.check()


# The end


ENDS = (  # seconds that it ran, the provider's minimum and increment, seconds to be paid
    (10, 0, 1, 10), (10, 60, 1, 60), (60, 60, 1, 60), (61, 60, 1, 61), (10, 0, 60, 60), (60, 0, 60, 60), (61, 0, 60, 120),
    (61, 300, 60, 300), (310, 300, 60, 360), (1, 3600, 3600, 3600), (0, 3600, 60, 0),
)  # fmt: skip


def test_the_end_tops_up_to_the_minimum_and_the_increment(books: Books, subtests: pytest.Subtests):
    for ran, minimum, increment, paid_for in ENDS:
        with subtests.test(ran=ran, minimum=minimum, increment=increment):
            books.tree(10**12)
            pod_id, instance_id = books.running(7200, minimum=minimum, increment=increment)
            books.bill(instance_id, after(ran / 2))
            books.gone(instance_id, after(ran))
            books.settle(pod_id)
            posted = books.posted(pod_id)
            assert posted.get("usage", 0) == floor(PRICE, ran)
            assert posted.get("usage", 0) + posted.get("minimum", 0) == floor(PRICE, paid_for)
            assert "loss" not in posted
            (hold,) = books.query("SELECT drawn_micro, closed_at FROM hold WHERE pod_id = %s", pod_id)
            assert (hold["drawn_micro"], hold["closed_at"]) == (floor(PRICE, paid_for), NOON)
            assert books.standing(books.agents[0]) == floor(PRICE, paid_for)
    books.check()


def test_the_minimum_counts_all_runs_of_an_instance_and_no_storage(books: Books):
    pod_id, instance_id = books.running(7200, minimum=100)
    books.phase(instance_id, after(30), "storage", 36_000)
    books.phase(instance_id, after(1030), "full", PRICE)
    books.gone(instance_id, after(1060))
    books.settle(pod_id)
    runs = 2 * floor(PRICE, 30)
    assert books.posted(pod_id) == {"usage": runs + floor(36_000, 1000), "minimum": floor(PRICE, 100) - runs}


def test_seconds_that_the_customer_does_not_pay_call_for_no_minimum(books: Books):
    pod_id, instance_id = books.running(7200, minimum=3600)
    books.query("UPDATE pod SET charge_until = %s WHERE id = %s", NOON, pod_id)
    books.gone(instance_id, after(500))
    books.settle(pod_id)
    assert books.posted(pod_id) == {"loss": floor(PRICE, 500)}


def test_nothing_is_settled_while_an_instance_lives(books: Books):
    pod_id, _ = books.running()
    with pytest.raises(psycopg.errors.RaiseException, match="is not gone"):
        books.settle(pod_id)
    assert books.value("SELECT count(*) FROM hold WHERE closed_at IS NOT NULL") == 0


def test_settling_again_changes_nothing(books: Books):
    pod_id, instance_id = books.running(minimum=600)
    books.gone(instance_id, after(10))
    books.settle(pod_id)
    rows = "SELECT l.*, b.committed_micro FROM ledger l JOIN budget b USING (agent_id) ORDER BY l.id"
    before = books.query(rows)
    assert len(before) == 2
    books.settle(pod_id)
    assert books.query(rows) == before


def test_a_pod_that_failed_over_pays_each_minimum_and_each_run(books: Books):
    pod_id, first = books.running(7200, minimum=60)
    books.gone(first, after(10))
    second = books.instance(pod_id, after(20), minimum=60)
    books.phase(second, after(25))
    books.gone(second, after(125))
    books.settle(pod_id)
    assert books.posted(pod_id) == {
        "usage": floor(PRICE, 10) + floor(PRICE, 100),
        "minimum": floor(PRICE, 60) - floor(PRICE, 10),
    }


def test_settling_while_others_bill_leaves_drawn_and_ledger_equal(books: Books):
    for _ in range(5):
        pod_id, instance_id = books.running(minimum=700)
        books.gone(instance_id, after(500))
        start = threading.Barrier(4)

        def write(statement: str, *parameters: object, start: threading.Barrier = start) -> None:
            with books.connect() as conn:
                start.wait()
                conn.execute(statement, parameters)

        with ThreadPoolExecutor(4) as threads:
            work = [threads.submit(write, "SELECT bill(%s, %s)", instance_id, after(n * 200)) for n in (1, 2, 3)]
            work.append(threads.submit(write, "SELECT settle(%s)", pod_id))
            for done in work:
                done.result()
        assert books.posted(pod_id) == {"usage": floor(PRICE, 500), "minimum": floor(PRICE, 700) - floor(PRICE, 500)}
    books.check()


# Phases


def test_a_phase_begins_at_a_whole_second_and_never_before_what_is_billed(books: Books):
    _, instance_id = books.running()
    books.bill(instance_id, after(100))
    books.phase(instance_id, after(50.7), "storage", 7)
    books.phase(instance_id, after(200.9), "full", PRICE)
    books.phase(instance_id, after(150), "none", 0)
    froms = [row["from_at"] for row in books.query("SELECT from_at FROM phase ORDER BY seq")]
    assert froms == [NOON, after(100), after(200), after(200)]


def test_a_phase_equal_to_the_last_is_not_written_again(books: Books):
    _, instance_id = books.running()
    books.phase(instance_id, after(10))
    assert books.value("SELECT count(*) FROM phase") == 1


def test_a_later_price_changes_nothing_that_was_billed(books: Books):
    pod_id, instance_id = books.running()
    books.bill(instance_id, after(100))
    books.phase(instance_id, after(10), "full", PRICE * 2)
    books.bill(instance_id, after(200))
    assert books.posted(pod_id) == {"usage": floor(PRICE, 100) + floor(PRICE * 2, 100)}


def test_billing_before_the_first_phase_takes_nothing_from_it(books: Books):
    """Who pays for a boot is known at its end, and its phase is written then: from the first second."""
    pod_id = books.pod()
    books.hold(pod_id, 10_000_000)
    instance_id = books.instance(pod_id)
    assert books.bill(instance_id, after(90)) == 0
    books.phase(instance_id, NOON)
    books.gone(instance_id, after(120))
    books.settle(pod_id)
    assert books.posted(pod_id) == {"usage": floor(PRICE, 120)}


# All of it at once, against a model that a child could check


LIMITS = st.sampled_from([None, 0, 3_000_000, 12_000_000, 40_000_000, 10**10])
AMOUNTS = st.sampled_from([1, 70_000, 900_000, 5_000_000])


class Heart(RuleBasedStateMachine):
    """Random phases, bills, holds, extensions, limits, days, and ends; after each step all sums are those of the model."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.books = Books(self.url)
        self.now = self.books.freeze()
        self.limits: list[int | None] = []
        self.periods: list[str] = []
        self.holds: list[dict] = []
        self.pods: dict[str, dict] = {}

    def teardown(self) -> None:
        self.books.conn.close()

    @initialize(limits=st.lists(LIMITS, min_size=3, max_size=3))
    def begin(self, limits: list[int | None]) -> None:
        self.limits = limits
        self.books.tree(*self.limits)
        self.periods = ["total"] * 3

    # The model

    def start_of(self, period: str) -> datetime:
        midnight = self.now.replace(hour=0, minute=0, second=0, microsecond=0)
        return {"total": datetime.min.replace(tzinfo=UTC), "day": midnight, "month": midnight.replace(day=1)}[period]

    def committed(self, place: int) -> int:
        start = self.start_of(self.periods[place])
        return sum(
            h["drawn"] if h["closed"] else h["amount"] for h in self.holds if place in h["on"] and h["at"] >= start
        )

    def may_hold(self, depth: int, amount: int) -> bool:
        path = range(depth + 1)
        limited = [place for place in path if self.limits[place] is not None]
        return bool(limited) and all(self.committed(p) + amount <= (self.limits[p] or 0) for p in limited)

    def owed(self, pod: dict) -> Counter:
        """What is owed for all that is billed, by the customer and by the installation, and what the customer's runs are of it."""
        sums: Counter = Counter()
        ends = [phase[0] for phase in pod["phases"][1:]] + [pod["billed"]]
        for (a, billing, price, payer), end in zip(pod["phases"], ends, strict=True):
            z = max(a, min(end, pod["billed"]))
            turn = z if pod["charge_until"] is None else min(max(pod["charge_until"], a), z)
            theirs = floor(price, (turn - a).total_seconds()) if payer == "customer" else 0
            sums["customer"] += theirs
            sums["operator"] += floor(price, (z - a).total_seconds()) - theirs
            if (billing, payer) == ("full", "customer"):
                sums["seconds"] += int((turn - a).total_seconds())
                sums["runs"] += theirs
        return sums

    def draw(self, pod: dict, amount: int, account: str) -> None:
        for h in pod["holds"]:
            part = min(amount, h["amount"] - h["drawn"]) if not h["closed"] else 0
            h["drawn"] += part
            amount -= part
            pod["posted"][account] += part
        pod["posted"]["loss"] += amount

    def move(self, pod: dict, until: datetime) -> None:
        """The watermark goes forward; what that adds is drawn, or lost."""
        until = min(until, pod["ended"] or until).replace(microsecond=0)
        if until <= pod["billed"] or not pod["phases"]:
            return
        before = self.owed(pod)
        pod["billed"] = until
        now = self.owed(pod)
        self.draw(pod, now["customer"] - before["customer"], "usage")
        pod["posted"]["loss"] += now["operator"] - before["operator"]

    # What happens

    @rule(hours=st.sampled_from([0.001, 0.01, 0.3, 7, 30, 24 * 20]))
    def time_passes(self, hours: float) -> None:
        self.now = self.books.freeze(self.now + timedelta(hours=hours, microseconds=123_457))

    @rule(depth=st.integers(0, 2), amount=AMOUNTS, price=st.integers(1, 9_000_000), minimum=st.sampled_from([0, 1, 600]),
          increment=st.sampled_from([1, 60]), boots=st.booleans())  # fmt: skip
    def a_pod_is_wanted(self, depth: int, amount: int, price: int, minimum: int, increment: int, boots: bool) -> None:
        if len(self.pods) >= 6:
            return
        pod_id = self.books.pod(self.books.agents[depth])
        pod = {
            "depth": depth, "price": price, "minimum": minimum, "increment": increment, "holds": [], "phases": [], "ended": None,
            "charge_until": None, "over": False, "posted": {"usage": 0, "minimum": 0, "loss": 0},
        }  # fmt: skip
        self.take(pod_id, pod, "create", amount)
        pod["instance"] = self.books.instance(pod_id, self.now, price=price, minimum=minimum, increment=increment)
        pod["billed"] = self.now.replace(microsecond=0)
        self.pods[pod_id] = pod
        if not boots:
            self.begin_phase(pod, self.now, "full", "customer")

    def take(self, pod_id: str, pod: dict, cause: str, amount: int) -> None:
        if not self.may_hold(pod["depth"], amount):
            with pytest.raises(psycopg.Error) as refused:
                self.books.hold(pod_id, amount, cause)
            assert refused.value.sqlstate == "GB001"
            return
        self.books.hold(pod_id, amount, cause)
        hold = {"amount": amount, "drawn": 0, "closed": False, "at": self.now, "on": range(pod["depth"] + 1)}
        self.holds.append(hold)
        pod["holds"].append(hold)

    def choose(self, number: int) -> tuple[str, dict] | None:
        alive = [(pod_id, pod) for pod_id, pod in self.pods.items() if not pod["over"]]
        return alive[number % len(alive)] if alive else None

    @precondition(lambda self: self.pods)
    @rule(number=st.integers(0, 9), amount=AMOUNTS)
    def a_pod_is_extended(self, number: int, amount: int) -> None:
        if chosen := self.choose(number):
            self.take(*chosen, f"extend:{len(self.holds)}:{self.now}", amount)

    @precondition(lambda self: self.pods)
    @rule(number=st.integers(0, 9), ago=st.floats(0, 4000), billing=st.sampled_from(["full", "full", "storage", "none"]),
          payer=st.sampled_from(["customer", "customer", "operator"]))  # fmt: skip
    def a_phase_begins(self, number: int, ago: float, billing: str, payer: str) -> None:
        if chosen := self.choose(number):
            self.begin_phase(chosen[1], self.now - timedelta(seconds=ago), billing, payer)

    def begin_phase(self, pod: dict, at: datetime, billing: str, payer: str) -> None:
        price = {"full": pod["price"], "storage": pod["price"] // 20, "none": 0}[billing]
        self.books.phase(pod["instance"], at, billing, price, payer)
        self.note_phase(pod, at, billing, price, payer)

    def note_phase(self, pod: dict, at: datetime, *cost: object) -> None:
        last = pod["phases"][-1] if pod["phases"] else (pod["billed"],)
        if last[1:] != cost:
            pod["phases"].append((max(at.replace(microsecond=0), pod["billed"], last[0]), *cost))

    @precondition(lambda self: self.pods)
    @rule(number=st.integers(0, 9), ago=st.floats(-50, 100_000))
    def somebody_bills(self, number: int, ago: float) -> None:
        if chosen := self.choose(number):
            until = self.now - timedelta(seconds=ago)
            self.books.bill(chosen[1]["instance"], until)
            self.move(chosen[1], until)

    @precondition(lambda self: self.pods)
    @rule(number=st.integers(0, 9), allowance=st.integers(0, 300))
    def the_end_is_wanted(self, number: int, allowance: int) -> None:
        chosen = self.choose(number)
        if chosen and not chosen[1]["charge_until"]:
            pod = chosen[1]
            pod["charge_until"] = max(self.now.replace(microsecond=0), pod["billed"]) + timedelta(seconds=allowance)
            self.books.query("UPDATE pod SET charge_until = %s WHERE id = %s", pod["charge_until"], chosen[0])

    @precondition(lambda self: self.pods)
    @rule(number=st.integers(0, 9), ago=st.floats(0, 4000))
    def an_instance_is_gone_and_settled(self, number: int, ago: float) -> None:
        if not (chosen := self.choose(number)):
            return
        pod_id, pod = chosen
        pod["ended"] = ended = self.now - timedelta(seconds=ago)
        self.books.gone(pod["instance"], ended)
        self.note_phase(pod, ended, "none", 0, "operator")
        self.books.settle(pod_id)
        self.move(pod, ended)
        pod["over"] = True
        sums = self.owed(pod)
        if sums["seconds"]:
            due = max(pod["minimum"], -(-sums["seconds"] // pod["increment"]) * pod["increment"])
            self.draw(pod, max(0, floor(pod["price"], due) - sums["runs"]), "minimum")
        for hold in pod["holds"]:
            hold["closed"] = True

    @rule(place=st.integers(0, 2), limit=LIMITS, period=st.sampled_from(["total", "day", "month"]))
    def a_limit_is_set(self, place: int, limit: int | None, period: str) -> None:
        self.books.query("SELECT set_budget(%s, %s, %s)", self.books.agents[place], limit, period)
        self.limits[place], self.periods[place] = limit, period

    # What is true after each step

    @invariant()
    def every_sum_is_the_models(self) -> None:
        if not self.books.agents:
            return
        for pod_id, pod in self.pods.items():
            posted = {account: amount for account, amount in pod["posted"].items() if amount}
            assert self.books.posted(pod_id) == posted
        drawn = self.books.query("SELECT drawn_micro FROM hold WHERE org_id = %s ORDER BY id", self.books.org_id)
        assert [row["drawn_micro"] for row in drawn] == [h["drawn"] for h in self.holds]
        standing = [self.books.standing(agent_id) for agent_id in self.books.agents]
        assert standing == [self.committed(place) for place in range(3)]
        self.books.check()


def test_any_sequence_of_events_leaves_the_sums_of_the_model(books: Books):
    Heart.url = books.url
    run_state_machine_as_test(Heart, settings=bounded(40, steps=40))
