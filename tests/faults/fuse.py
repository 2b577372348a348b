"""Killing a driver at a chosen moment, and healing the world after it."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Coroutine, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

from tests.factories import World
from tests.simulator import OFFERS, Simulated

from gpubroker import store
from gpubroker.provisioning import Driver


class Killed(BaseException):
    """The process died here."""


class Fuse:
    """Counts the moments of a driver: round every commit and every provider call.

    At moment number `at`, counted from 1, the driver dies; or, with `then`, that happens first, and the driver goes on.
    """

    def __init__(self, at: int | None = None, then: Callable[[], Awaitable[Any]] | None = None) -> None:
        self.at = at
        self.then = then
        self.passed: list[str] = []
        self.is_blown = False

    async def pass_point(self, name: str) -> None:
        if self.is_blown:
            return
        self.passed.append(name)
        if len(self.passed) != self.at:
            return
        self.is_blown = True
        if self.then is None:
            raise Killed(name)
        await self.then()

    @contextmanager
    def lit(self, world: World) -> Iterator[None]:
        """Whatever this process does meanwhile burns the fuse down."""
        worker = store.worker

        @asynccontextmanager
        async def burning() -> AsyncGenerator[store.Transaction]:
            async with worker() as tx:
                yield tx
                if self.then is None:  # rows are locked: whatever happens then would wait for this
                    await self.pass_point("before a commit")
            await self.pass_point("after a commit")

        store.worker = burning
        world.provider.on_point = self.pass_point
        try:
            yield
        finally:
            store.worker = worker
            world.provider.on_point = None


class Cut:
    """Awaits a coroutine, and cancels it at its `at`-th suspension, as a shutdown would."""

    def __init__(self, work: Coroutine[Any, Any, Any], at: int) -> None:
        self._work = work
        self._at = at
        self.suspensions = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._work.__await__()
        try:
            waited = next(steps)
            while True:
                self.suspensions += 1
                if self.suspensions == self._at:
                    if asyncio.isfuture(waited):
                        waited.cancel()
                    waited = steps.throw(asyncio.CancelledError())
                    continue
                try:
                    sent = yield waited
                except BaseException as error:  # noqa: BLE001 - all of them are the coroutine's
                    waited = steps.throw(error)
                else:
                    waited = steps.send(sent)
        except StopIteration as end:
            return end.value


async def rent_from(world: World, provider: Simulated, offers: int = 5) -> None:
    """Rent from this provider, which has so many equal offers, and let money be no object."""
    provider.offers = [replace(OFFERS[0], provider_offer_id=f"h100-{n}") for n in range(offers)]
    world.query("UPDATE refresh SET began_at = began_at - interval '1 day'")  # the next one is due
    await world.use(provider)
    world.query("UPDATE budget SET limit_micro = 100000000000")


async def drive(world: World, pod_id: str, fuse: Fuse | None = None) -> bool:
    """The steps of one pod that are due now; false when the fuse was blown on the way."""
    fuse = fuse or Fuse()
    try:
        with fuse.lit(world):
            for _ in range(30):
                if not await Driver(world.adapters).drive(pod_id):
                    break
    except Killed:
        return False
    return not fuse.is_blown


async def heal(world: World, ticks: int = 3, seconds: float = 70) -> None:
    """Time passes, and ticks come."""
    for _ in range(ticks):
        await world.pass_time(seconds=seconds)
        await world.tick()


def check_instances(world: World, running: set[str] | None = None) -> None:
    """Every instance that lives is exactly one live pod's, and every pod that shall run has exactly one."""
    rows = world.query(
        "SELECT i.provider_instance_id, i.pod_id FROM instance i JOIN pod p ON p.id = i.pod_id"
        " WHERE i.role = 'live' AND i.gone_at IS NULL AND p.state <> 'terminated'"
    )
    assert sorted(world.provider.alive()) == sorted(row["provider_instance_id"] for row in rows)
    pods = [row["pod_id"] for row in rows]
    assert len(set(pods)) == len(pods)
    if running is not None:
        assert set(pods) == running
        lives = {i.life for i in world.provider.rented.values() if i.gone_at is None}
        assert lives <= {"running"}


def check_bill(world: World, lost: Collection[str] = ()) -> None:
    """What we billed of each instance is what its provider bills, to the second: to its agent or to the installation.

    Of the pods' own instances exactly; of strays we know only from when to when they may have lived, and of those that were
    lost for a while no more than was seen.
    """
    billed = {
        row["id"]: row
        for row in world.query(
            """SELECT i.provider_instance_id AS id, i.role, i.started_at IS NOT NULL AS started,
                      coalesce(sum(extract(epoch FROM upper(u.during) - lower(u.during))) FILTER (WHERE f.billing = 'full'), 0)::int
                          AS seconds
                 FROM instance i LEFT JOIN usage_interval u ON u.instance_id = i.id
                 LEFT JOIN phase f ON f.instance_id = u.instance_id AND f.seq = u.phase_seq GROUP BY i.id"""
        )
    }
    assert set(billed) == set(world.provider.rented)
    for instance in world.provider.rented.values():
        ours, theirs = billed[instance.id], instance.billed_seconds(world.provider.now())
        if instance.id in lost:
            assert ours["role"] == "stray" or ours["seconds"] <= theirs, f"we billed {ours['seconds']}: {instance}"
        elif ours["role"] == "live":
            assert ours["seconds"] == theirs, f"we billed {ours['seconds']}, its provider {theirs}: {instance}"
        else:
            assert ours["seconds"] >= theirs - 1, f"we booked {ours['seconds']}, its provider {theirs}: {instance}"


def check_all_ended(world: World) -> None:
    """Nothing lives, nothing is held, nothing is due."""
    world.check_money()
    alive = world.provider.alive()
    assert alive == [], f"still alive at the provider: {alive}"
    for what, rows in {
        "not over": "SELECT id, state, state_reason, due_at FROM pod WHERE state <> 'terminated' OR due_at IS NOT NULL",
        "still held": "SELECT pod_id, cause FROM hold WHERE closed_at IS NULL",
        "not settled": "SELECT id, state FROM attempt WHERE state IN ('open', 'ambiguous')",
        "not erased": "SELECT id FROM pod WHERE env_sealed IS NOT NULL",
        "not proved gone": "SELECT id, provider_instance_id, role, life FROM instance WHERE gone_at IS NULL",
    }.items():
        left = world.query(rows)
        assert not left, f"{what}: {left}"
