"""Whatever agents, drivers, providers and clocks do, in any order: no orphan, no second billed twice, no cap exceeded."""

import asyncio
import contextlib
from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, TypeVar

import psycopg
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.conftest import at_database
from tests.factories import SECRET_KEY, Client, World
from tests.faults.fuse import Fuse, Killed, check_all_ended, check_bill, check_instances, drive, heal, rent_from
from tests.simulator import Broken, Final

from gpubroker import config, outbox, store
from gpubroker.store import billing as billing_rows

T = TypeVar("T")

MOST_PODS = 5
ALLOWANCE = 10

FAULTS = [None, None, None, "timeout", "after", "with id", "twice", "no_capacity", "late 30", "late 400", "late 900"]
CALLS = ["get", "stop", "start", "restart", "terminate", "extend", "find_by_ref"]
PLACES = st.integers(0, MOST_PODS - 1)


class Broking(RuleBasedStateMachine):
    """Two agents under one root, one provider whose word is final, and everything that can go wrong."""

    server: ClassVar[str]
    template: ClassVar[str]
    made: ClassVar[int] = 0

    @initialize()
    def open(self) -> None:
        type(self).made += 1
        self.name = f"gb_invariants_{type(self).made}"
        with psycopg.connect(self.server, autocommit=True) as conn:
            conn.execute(f"DROP DATABASE IF EXISTS {self.name} WITH (FORCE)")
            conn.execute(f"CREATE DATABASE {self.name} TEMPLATE {self.template} STRATEGY FILE_COPY")
        url = at_database(self.server, self.name)
        with psycopg.connect(url) as conn:
            (owner,) = conn.execute("SELECT owner FROM installation").fetchone() or ("",)
        config.use(
            config.read(
                {
                    "DATABASE_URL": url,
                    "GPUBROKER_OWNER": owner,
                    "GPUBROKER_SECRET_KEY": SECRET_KEY,
                    "GPUBROKER_PROVIDERS": "",
                }
            )
        )
        self.runner = asyncio.Runner()
        self.world = World(url, owner)
        self.pods: list[tuple[Client, str]] = []
        self.lost: set[str] = set()
        self.run(self.world.open())
        self.run(rent_from(self.world, Final()))
        self.world.query("UPDATE budget SET limit_micro = 200000000")
        rich = self.run(self.world.root.child(budget={"limit_usd": "150", "period": "month"}))
        poor = self.run(rich.child(budget={"limit_usd": "9", "period": "day"}))
        self.agents = [rich, poor]

    def run(self, work: Awaitable[T]) -> T:
        async def do() -> T:
            return await work

        return self.runner.run(do())

    def live(self, place: int) -> tuple[Client, str]:
        return self.pods[place % len(self.pods)]

    def instance_of(self, place: int) -> str | None:
        """The provider's name of the instance that a pod has and that lives."""
        found = self.world.query(
            "SELECT provider_instance_id AS id FROM instance WHERE pod_id = %s AND role = 'live' AND gone_at IS NULL",
            self.live(place)[1],
        )
        return found[0]["id"] if found and self.world.provider.rented[found[0]["id"]].gone_at is None else None

    # What agents want

    @precondition(lambda self: len(self.pods) < MOST_PODS)
    @rule(agent=st.integers(0, 1), life=st.sampled_from([300, 3600, 40_000]), fault=st.sampled_from(FAULTS))
    def create(self, agent: int, life: int, fault: str | None) -> None:
        if fault is not None:
            self.world.provider.fail["create"] = [fault]
        body = {"image": "x", "requirements": {"gpu": ["h100"]}, "max_lifetime_seconds": life, "max_attempts": 3}
        answer = self.run(self.agents[agent].call("POST", "/v1/pods?duplicate=allow", json=body))
        assert answer.status_code in (202, 402), answer.text
        if answer.status_code == 202:
            self.pods.append((self.agents[agent], answer.json()["id"]))

    @precondition(lambda self: self.pods)
    @rule(place=PLACES, action=st.sampled_from(["stop", "start", "restart"]))
    def act(self, place: int, action: str) -> None:
        client, pod_id = self.live(place)
        answer = self.run(client.call("POST", f"/v1/pods/{pod_id}/{action}"))
        assert answer.status_code in (200, 202, 409), answer.text

    @precondition(lambda self: self.pods)
    @rule(place=PLACES, more=st.sampled_from([600, 7200]))
    def extend(self, place: int, more: int) -> None:
        client, pod_id = self.live(place)
        (pod,) = self.world.query(
            "SELECT round(extract(epoch FROM ends_at - created_at))::int AS life FROM pod WHERE id = %s", pod_id
        )
        body = {"max_lifetime_seconds": pod["life"] + more}
        answer = self.run(client.call("POST", f"/v1/pods/{pod_id}/extend", json=body))
        assert answer.status_code in (200, 202, 402, 409), answer.text

    @precondition(lambda self: self.pods)
    @rule(place=PLACES)
    def delete(self, place: int) -> None:
        client, pod_id = self.live(place)
        answer = self.run(client.call("DELETE", f"/v1/pods/{pod_id}"))
        assert answer.status_code in (200, 202), answer.text

    # What moves it, and dies

    @rule()
    def tick(self) -> None:
        self.run(self.world.tick())

    @precondition(lambda self: self.pods)
    @rule(place=PLACES)
    def drive_one(self, place: int) -> None:
        self.run(self.world.drive(self.live(place)[1]))

    @precondition(lambda self: self.pods)
    @rule(place=PLACES, at=st.integers(1, 14))
    def die_driving(self, place: int, at: int) -> None:
        self.run(drive(self.world, self.live(place)[1], Fuse(at)))

    @rule(at=st.integers(1, 16))
    def die_sweeping(self, at: int) -> None:
        with Fuse(at).lit(self.world), contextlib.suppress(Killed):
            self.run(self.world.sweep())

    # What providers do

    @precondition(lambda self: self.pods)
    @rule(place=PLACES, what=st.sampled_from(["exit", "interrupt", "kill", "boot"]))
    def happen(self, place: int, what: str) -> None:
        name = self.instance_of(place)
        if name is None:
            return
        life = self.world.provider.rented[name].life
        if what == "boot" and life == "starting":
            self.world.provider.run(name)
        if life != "running":
            return
        if what == "exit":
            self.world.provider.halt(name, exit_code=1)
        elif what == "interrupt":
            self.world.provider.halt(name, life="interrupted")
        elif what == "kill":
            self.world.provider.end(name)

    @precondition(lambda self: self.pods)
    @rule(place=PLACES, how=st.sampled_from(["hidden", "denied", "both", "obscure"]))
    def lose(self, place: int, how: str) -> None:
        name = self.instance_of(place)
        if name is None:
            return
        self.lost.add(name)
        for flag in ("hidden", "denied") if how == "both" else (how,):
            getattr(self.world.provider, flag).add(name)

    @rule()
    def find_again(self) -> None:
        for flag in (self.world.provider.hidden, self.world.provider.denied, self.world.provider.obscure):
            flag.clear()
        self.world.provider.listing = None

    @rule(lie=st.sampled_from(["empty", "broken"]))
    def lie(self, lie: str) -> None:
        self.world.provider.listing = [] if lie == "empty" else Broken("http_500")

    @rule(call=st.sampled_from(CALLS), fault=st.sampled_from(["after", "timeout", "deaf", "refuse"]))
    def fail(self, call: str, fault: str) -> None:
        self.world.provider.fail[call] = [Broken("http_500") if fault == "refuse" else fault]

    @rule(at_once=st.booleans())
    def boot(self, at_once: bool) -> None:
        self.world.provider.boots_at_once = at_once

    # Time

    @rule(seconds=st.sampled_from([1, 7, 40, 130, 700, 3600]))
    def pass_time(self, seconds: int) -> None:
        self.run(self.world.pass_time(seconds=seconds))

    @rule(to=st.sampled_from(["midnight", "month", "third"]))
    def jump(self, to: str) -> None:
        """To two seconds before the next midnight, the month's, or the month's closing."""
        now = datetime.now(UTC) + self.world.provider.shift
        day = now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
        while (to == "month" and day.day != 1) or (to == "third" and day.day != 3):
            day += timedelta(days=1)
        self.run(self.world.pass_time(seconds=max(1.0, (day - now).total_seconds() - 2)))
        self.run(self.close_months())

    async def close_months(self) -> None:
        async with store.worker() as tx:
            await billing_rows.close_months(tx.conn)

    @rule()
    def two_good_sweeps(self) -> None:
        self.find_again()
        self.world.provider.fail.clear()
        self.run(heal(self.world, ticks=2, seconds=130))
        check_instances(self.world)

    # What is true at every moment

    @invariant()
    def money_is_right(self) -> None:
        if hasattr(self, "world"):
            self.world.check_money()

    @invariant()
    def nobody_pays_beyond_the_end(self) -> None:
        if not hasattr(self, "world"):
            return
        beyond = self.world.query(
            """SELECT u.id FROM usage_interval u JOIN pod p ON p.id = u.pod_id
                WHERE u.payer = 'customer' AND upper(u.during) > least(p.charge_until, p.ends_at + %s * interval '1 second')""",
            ALLOWANCE,
        )
        assert not beyond, beyond

    @invariant()
    def no_pod_has_two_instances(self) -> None:
        if not hasattr(self, "world"):
            return
        strays = {
            row["id"]
            for row in self.world.query("SELECT provider_instance_id AS id FROM instance WHERE role = 'stray'")
        }
        pods = [
            row["pod_id"]
            for row in self.world.query("SELECT pod_id FROM instance WHERE role = 'live' AND gone_at IS NULL")
        ]
        assert len(set(pods)) == len(pods)
        customers = self.world.query(
            """SELECT i.provider_instance_id AS id, sum(extract(epoch FROM upper(u.during) - lower(u.during)))::int AS seconds
                 FROM usage_interval u JOIN instance i ON i.id = u.instance_id
                 JOIN phase f ON f.instance_id = u.instance_id AND f.seq = u.phase_seq
                WHERE u.payer = 'customer' AND f.billing = 'full' GROUP BY 1"""
        )
        for row in customers:
            ran = self.world.provider.rented[row["id"]].billed_seconds(self.world.provider.now())
            assert row["seconds"] <= ran or row["id"] in strays | self.lost, f"{row} ran {ran}"

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self.find_again()
            self.world.provider.fail.clear()
            for client, pod_id in self.pods:
                self.run(client.call("DELETE", f"/v1/pods/{pod_id}"))
            self.run(heal(self.world, ticks=9, seconds=240))
            check_all_ended(self.world)
            check_bill(self.world, self.lost)
        finally:
            self.run(self.close())
            self.runner.close()
            with psycopg.connect(self.server, autocommit=True) as conn:
                conn.execute(f"DROP DATABASE IF EXISTS {self.name} WITH (FORCE)")

    async def close(self) -> None:
        await self.world.close()
        await outbox.close()
        await store.close()


def test_whatever_happens_in_whatever_order_nothing_is_lost_and_nothing_is_billed_twice(
    postgres_url: str, template: str
) -> None:
    Broking.server, Broking.template, Broking.made = postgres_url, template, 0
    before: Any = config._settings
    bounded = settings(
        max_examples=12, stateful_step_count=35, deadline=None, derandomize=True, database=None, print_blob=True,
        phases=(Phase.generate,), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    try:
        run_state_machine_as_test(Broking, settings=bounded)
    finally:
        config._settings = before
