"""DESIGN 5: the row is the work, the event only wakes. Events are lost, repeated, reordered, late or forged."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from tests.factories import World, app_named
from tests.faults.fuse import Fuse, Killed, check_all_ended, check_bill, check_instances, heal, rent_from
from tests.simulator import Final

from gpubroker import adapters, config, outbox, store
from gpubroker.provisioning import Driver
from gpubroker.store import events as rows

pytestmark = pytest.mark.anyio

PREFIX = "io.gpubroker."


@pytest.fixture
async def broker_world(world: World) -> World:
    """A world whose consumers rent where it rents."""
    await rent_from(world, Final())
    adapters._adapters = world.adapters
    return world


def as_sent(event: dict[str, Any]) -> dict[str, str]:
    """The headers of an event in binary mode, of its row."""
    return {
        "ce-specversion": "1.0", "ce-id": event["id"], "ce-type": event["type"], "ce-source": "/gpubroker/test",
        "ce-subject": event["subject"],
    }  # fmt: skip


async def deliver(consumer: str, headers: dict[str, str], body: bytes = b"{}") -> int:
    """What a Broker does: the status of the consumer's answer."""
    headers = {"content-type": "application/json"} | headers
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    through = httpx.ASGITransport(app_named(consumer))
    async with httpx.AsyncClient(transport=through, base_url="http://consumer") as http:
        answer = await http.post("/", headers=raw, content=body)
    if answer.status_code == 204:
        assert answer.content == b""
    return answer.status_code


def events_of(world: World, pod_id: str, consumer: str = "provisioning") -> list[dict[str, Any]]:
    """The events of a pod that a consumer waits for, in the order in which they were written."""
    return world.query(
        """SELECT e.*, d.done_at, d.tries AS delivery_tries, d.failure FROM event e JOIN delivery d ON d.event_id = e.id
            WHERE e.subject = %s AND d.consumer = %s ORDER BY e.id""",
        pod_id, consumer,
    )  # fmt: skip


def state_of(world: World, pod_id: str) -> str:
    return world.query("SELECT state FROM pod WHERE id = %s", pod_id)[0]["state"]


# Repeated, late, forged


async def test_an_event_drives_its_pod_and_is_finished(broker_world: World) -> None:
    world = broker_world
    pod = await world.root.pod()
    (event,) = events_of(world, pod["id"])
    assert await deliver("provisioning", as_sent(event)) == 204
    assert state_of(world, pod["id"]) == "running"
    assert events_of(world, pod["id"])[0]["done_at"] is not None


async def test_an_event_that_comes_ten_times_at_once_creates_one_instance(broker_world: World) -> None:
    world = broker_world
    pod = await world.root.pod()
    (event,) = events_of(world, pod["id"])
    assert await asyncio.gather(*(deliver("provisioning", as_sent(event)) for _ in range(10))) == [204] * 10
    assert world.provider.count("create") == 1
    assert state_of(world, pod["id"]) == "running"
    done_at = events_of(world, pod["id"])[0]["done_at"]
    assert await deliver("provisioning", as_sent(event)) == 204
    assert events_of(world, pod["id"])[0]["done_at"] == done_at


async def test_ten_drivers_at_once_create_one_instance(broker_world: World) -> None:
    world = broker_world
    pod = await world.root.pod()
    drove = await asyncio.gather(*(Driver(world.adapters).drive(pod["id"]) for _ in range(10)))
    assert sum(drove) >= 1
    await world.drive_due()
    assert world.provider.count("create") == 1
    assert world.query("SELECT count(*)::int AS n FROM attempt") == [{"n": 1}]
    check_instances(world, {pod["id"]})


async def test_an_event_of_running_bills_once_however_often_it_comes(broker_world: World) -> None:
    world = broker_world
    pod = await world.run(world.root, max_lifetime_seconds=36_000)
    (event,) = events_of(world, pod["id"], "metering")
    await world.pass_time(minutes=10)
    await world.sweep()
    assert await asyncio.gather(*(deliver("metering", as_sent(event)) for _ in range(10))) == [204] * 10
    billed = world.query("SELECT sum(upper(during) - lower(during))::text AS t FROM usage_interval")
    assert billed in ([{"t": "00:10:00"}], [{"t": "00:10:01"}])
    recorded = world.query("SELECT data FROM event WHERE type = %s", f"{PREFIX}usage.recorded.v1")
    assert len(recorded) == 1
    world.check_money()


async def test_events_in_any_order_lead_to_what_was_wanted_last(broker_world: World) -> None:
    world = broker_world
    pod = await world.root.pod(max_lifetime_seconds=36_000)
    path = f"/v1/pods/{pod['id']}"
    await world.drive_due()
    await world.root.post(f"{path}/stop", status=202)
    await world.drive_due()
    await world.root.post(f"{path}/start", status=202)
    await world.drive_due()
    await world.root.delete(path)
    found = events_of(world, pod["id"])
    assert len(found) == 4
    for event in reversed(found):
        assert await deliver("provisioning", as_sent(event)) == 204
    assert state_of(world, pod["id"]) == "terminated"
    assert world.provider.count("create") == 1
    assert [event["done_at"] is not None for event in events_of(world, pod["id"])] == [True] * 4
    check_all_ended(world)


async def test_an_event_that_comes_after_the_end_does_nothing(broker_world: World) -> None:
    world = broker_world
    pod = await world.root.pod()
    (event,) = events_of(world, pod["id"])
    await world.root.delete(f"/v1/pods/{pod['id']}")
    await world.drive_due()
    calls = len(world.provider.calls)
    assert await deliver("provisioning", as_sent(event)) == 204
    assert len(world.provider.calls) == calls
    check_all_ended(world)


async def test_an_event_that_was_done_is_not_done_again_though_its_pod_is_due(broker_world: World) -> None:
    world = broker_world
    pod = await world.run(world.root)
    (event,) = events_of(world, pod["id"])
    world.query("UPDATE delivery SET done_at = clock_timestamp() WHERE event_id = %s", event["id"])
    await world.root.post(f"/v1/pods/{pod['id']}/stop", status=202)
    assert await deliver("provisioning", as_sent(event)) == 204
    assert world.provider.count("stop") == 0


async def test_a_forged_event_has_no_effect(broker_world: World) -> None:
    world = broker_world
    pod = await world.root.pod()
    (event,) = events_of(world, pod["id"])
    for forgery in (
        {"ce-id": "evt_01m82h00000000000000000000"},
        {"ce-id": "x' OR 1=1 --"},
        {"ce-id": "\u00e9\u00ff"},
        {"ce-subject": "pod_01m82h00000000000000000000"},
        {"ce-subject": "'; DELETE FROM pod; --"},
    ):
        assert await deliver("provisioning", as_sent(event) | forgery) == 204
    assert world.provider.count("create") == 0
    assert events_of(world, pod["id"])[0]["done_at"] is None
    assert state_of(world, pod["id"]) == "requested"


async def test_an_event_with_the_id_of_one_pod_and_the_subject_of_another_moves_neither(broker_world: World) -> None:
    world = broker_world
    mine, other = await world.root.pod(), await world.root.pod()
    (event,) = events_of(world, mine["id"])
    for consumer in ("provisioning", "metering"):
        headers = as_sent(event) | {"ce-subject": other["id"], "ce-type": f"{PREFIX}pod.requested.v1"}
        if consumer == "metering":
            headers["ce-type"] = f"{PREFIX}pod.running.v1"
        assert await deliver(consumer, headers) == 204
    assert world.provider.count("create") == 0
    assert events_of(world, mine["id"])[0]["done_at"] is None
    assert events_of(world, other["id"])[0]["done_at"] is None


async def test_what_an_event_says_is_not_believed(broker_world: World) -> None:
    """Everything but the ids is read from PostgreSQL."""
    world = broker_world
    pod = await world.root.pod()
    (event,) = events_of(world, pod["id"])
    lie = json.dumps({"pod_id": "pod_other", "state": "terminated", "agent_id": "agt_other", "version": 99}).encode()
    assert await deliver("provisioning", as_sent(event), lie) == 204
    assert state_of(world, pod["id"]) == "running"


MALFORMED: list[tuple[dict[str, str], bytes]] = [
    ({"ce-type": f"{PREFIX}pod.running.v1"}, b"{}"),
    ({"ce-type": f"{PREFIX}pod.requested.v2"}, b"{}"),
    ({"ce-type": "com.example.anything"}, b"{}"),
    ({"ce-specversion": "0.3"}, b"{}"),
    ({"ce-id": " "}, b"{}"),
    ({"ce-source": ""}, b"{}"),
    ({"ce-time": "yesterday"}, b"{}"),
    ({"ce-bad-name": "x"}, b"{}"),
    ({}, b"{not json"),
    ({}, b"[" * 100_000),
    ({"content-type": "text/xml"}, b"<x/>"),
    ({"content-type": "application/cloudevents-batch+json"}, b"[]"),
    ({"content-type": "application/cloudevents+json"}, b"[]"),
    ({"content-type": "application/cloudevents+json"}, b'{"specversion":"1.0","id":7,"source":"/x","type":"y"}'),
]


async def test_what_is_malformed_is_refused_for_good(broker_world: World) -> None:
    """422 goes to the dead letters; Knative repeats no 422."""
    world = broker_world
    pod = await world.root.pod()
    (event,) = events_of(world, pod["id"])
    for wrong, body in MALFORMED:
        assert await deliver("provisioning", as_sent(event) | wrong, body) == 422, (wrong, body[:20])
    assert world.provider.count("create") == 0
    assert events_of(world, pod["id"])[0]["done_at"] is None


async def test_an_event_without_a_subject_does_nothing(broker_world: World) -> None:
    world = broker_world
    pod = await world.root.pod()
    (event,) = events_of(world, pod["id"])
    headers = as_sent(event)
    del headers["ce-subject"]
    assert await deliver("provisioning", headers) == 204
    assert world.provider.count("create") == 0


# The guard and its effect are one


async def test_a_consumer_that_dies_before_its_commit_has_neither_finished_nor_done_anything(
    broker_world: World,
) -> None:
    world = broker_world
    pod = await world.run(world.root, max_lifetime_seconds=36_000)
    await world.pass_time(minutes=1)
    await world.sweep()
    (event,) = events_of(world, pod["id"], "metering")
    with Fuse(1).lit(world), pytest.raises(Killed):
        await deliver("metering", as_sent(event))
    assert events_of(world, pod["id"], "metering")[0]["done_at"] is None
    assert world.query("SELECT 1 FROM usage_interval") == []
    assert await deliver("metering", as_sent(event)) == 204
    assert events_of(world, pod["id"], "metering")[0]["done_at"] is not None
    assert len(world.query("SELECT 1 FROM usage_interval")) >= 1


async def test_a_delivery_is_finished_with_the_claim_of_its_pod(broker_world: World) -> None:
    world = broker_world
    pod = await world.root.pod()
    (event,) = events_of(world, pod["id"])
    with Fuse(1).lit(world), pytest.raises(Killed):
        await deliver("provisioning", as_sent(event))
    assert events_of(world, pod["id"])[0]["done_at"] is None
    with Fuse(2).lit(world), pytest.raises(Killed):
        await deliver("provisioning", as_sent(event))
    assert events_of(world, pod["id"])[0]["done_at"] is not None
    await heal(world, ticks=1)
    check_instances(world, {pod["id"]})


async def test_a_consumer_without_its_database_says_again_later(broker_world: World) -> None:
    world = broker_world
    pod = await world.root.pod()
    (event,) = events_of(world, pod["id"])
    await store.close()
    here = config.settings()
    config.use(config.with_variables(here, DATABASE_URL="postgresql://nobody@127.0.0.1:1/none?connect_timeout=1"))
    store_wait, store._WAIT_SECONDS = store._WAIT_SECONDS, 0.2
    try:
        assert await deliver("provisioning", as_sent(event)) == 503
    finally:
        config.use(here)
        store._WAIT_SECONDS = store_wait
    assert await deliver("provisioning", as_sent(event)) == 204
    assert state_of(world, pod["id"]) == "running"


# Dead letters


async def test_a_dead_letter_is_noted_where_somebody_waits_and_published_again(broker_world: World) -> None:
    world = broker_world
    pod = await world.root.pod()
    (event,) = events_of(world, pod["id"])
    headers = as_sent(event) | {"ce-knativeerrorcode": "503", "ce-knativeerrordest": "http://provisioning"}
    assert await deliver("deadletter", headers) == 204
    assert events_of(world, pod["id"])[0]["failure"] == "503 from http://provisioning"
    assert events_of(world, pod["id"])[0]["done_at"] is None
    world.query("UPDATE delivery SET next_at = clock_timestamp()")
    async with store.worker() as tx:
        assert [taken.id for taken in await rows.take_overdue(tx)] == [event["id"]]


async def test_a_dead_letter_of_anything_is_taken(broker_world: World) -> None:
    world = broker_world
    pod = await world.root.pod()
    (event,) = events_of(world, pod["id"])
    world.query("UPDATE delivery SET done_at = clock_timestamp()")
    for what in ({}, {"ce-id": "evt_forged"}, {"ce-type": "anything.at.all"}):
        assert await deliver("deadletter", as_sent(event) | what) == 204
    assert events_of(world, pod["id"])[0]["failure"] is None


# Publishing


class Broker:
    """What stands between: it takes events, and delivers them as badly as it is told to."""

    def __init__(self) -> None:
        self.taken: list[dict[str, str]] = []
        self.status = 202
        self.refusals = 0
        """So many it does not take first."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        status, self.refusals = (503, self.refusals - 1) if self.refusals else (self.status, 0)
        if status < 300:
            self.taken.append({name: value for name, value in headers.items() if name.startswith("ce-")})
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def of(self, what: str) -> list[dict[str, str]]:
        return [headers for headers in self.taken if headers["ce-type"] == f"{PREFIX}{what}.v1"]


@asynccontextmanager
async def publishing(broker: Broker) -> AsyncIterator[None]:
    """Events go to this Broker meanwhile."""
    here = config.settings()
    config.use(config.with_variables(here, K_SINK="http://broker/"))
    outbox._client = httpx.AsyncClient(transport=httpx.ASGITransport(broker))
    try:
        yield
    finally:
        await outbox.close()
        config.use(here)


async def published() -> None:
    """What is being published was answered; nobody waits to send it again."""
    while outbox._publishing:
        await asyncio.wait(outbox._publishing, timeout=0.02)
        for pause in [*outbox._pauses]:
            outbox._end_pause(pause, False)


async def test_an_event_is_published_after_its_commit_and_marked(broker_world: World) -> None:
    world, broker = broker_world, Broker()
    async with publishing(broker):
        pod = await world.root.pod()
        await published()
        (sent,) = broker.of("pod.requested")
        assert (sent["ce-subject"], sent["ce-source"]) == (pod["id"], f"/gpubroker/{world.owner}")
        (event,) = events_of(world, pod["id"])
        assert event["published_at"] is not None
        assert sent["ce-id"] == event["id"]
        refused = await world.root.call("POST", "/v1/pods", json={"nonsense": 1})
        await published()
        assert refused.status_code == 422
        assert len(broker.taken) == 1


async def test_what_the_broker_does_not_take_for_a_moment_is_sent_again_without_a_tick(
    broker_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, broker = broker_world, Broker()
    monkeypatch.setattr(outbox, "_AGAIN_AFTER", (0.01, 0.02, 0.04))
    for refusals, is_taken in ((3, True), (4, False)):
        broker.refusals = refusals
        async with publishing(broker):
            pod = await world.root.pod()
            await asyncio.gather(*outbox._publishing)
            assert [event["published_at"] is not None for event in events_of(world, pod["id"])] == [is_taken]


async def test_an_end_of_the_process_does_not_wait_to_send_again(broker_world: World) -> None:
    world, broker = broker_world, Broker()
    broker.status = 503
    async with publishing(broker):
        await world.root.pod()
        began = time.monotonic()
        await outbox.close()
        assert time.monotonic() - began < min(outbox._AGAIN_AFTER)
        assert not outbox._publishing


async def test_what_the_broker_did_not_take_is_published_again_with_ever_longer_pauses(broker_world: World) -> None:
    world, broker = broker_world, Broker()
    broker.status = 500
    async with publishing(broker):
        pod = await world.root.pod()
        await published()
        assert events_of(world, pod["id"])[0]["published_at"] is None
        world.query("UPDATE event SET published_at = clock_timestamp() WHERE subject <> %s", pod["id"])
        pauses: list[int] = []
        for _ in range(12):
            world.query("UPDATE event SET next_at = clock_timestamp()")
            async with store.worker() as tx:
                overdue = await rows.take_overdue(tx)
                assert [event.id for event in overdue] == [events_of(world, pod["id"])[0]["id"]]
                assert await rows.take_overdue(tx) == []
            row = world.query("SELECT extract(epoch FROM next_at - clock_timestamp())::float AS s FROM event WHERE subject = %s",
                              pod["id"])  # fmt: skip
            pauses.append(round(row[0]["s"]))
        assert pauses == sorted(pauses)
        assert (pauses[0], pauses[1], pauses[-1]) == (10, 20, 3600)
        broker.status = 202
        world.query("UPDATE event SET next_at = clock_timestamp() WHERE published_at IS NULL")
        async with store.worker() as tx:
            overdue = await rows.take_overdue(tx)
        await outbox.publish(overdue)
        assert events_of(world, pod["id"])[0]["published_at"] is not None
        assert len(broker.of("pod.requested")) == 1


async def test_what_a_consumer_did_not_finish_is_published_again_with_ever_longer_pauses(broker_world: World) -> None:
    world = broker_world
    pod = await world.root.pod()
    world.query("UPDATE event SET published_at = clock_timestamp()")
    pauses: list[int] = []
    for _ in range(12):
        world.query("UPDATE delivery SET next_at = clock_timestamp()")
        async with store.worker() as tx:
            assert [event.subject for event in await rows.take_overdue(tx)] == [pod["id"]]
        row = world.query("SELECT extract(epoch FROM next_at - clock_timestamp())::float AS s FROM delivery")
        pauses.append(round(row[0]["s"]))
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[1], pauses[-1]) == (60, 120, 6 * 3600)
    world.query("UPDATE delivery SET done_at = clock_timestamp(), next_at = clock_timestamp()")
    async with store.worker() as tx:
        assert await rows.take_overdue(tx) == []


@pytest.mark.parametrize("seed", range(3))
async def test_a_broker_that_loses_repeats_delays_and_reorders_changes_nothing_but_the_time(
    broker_world: World, seed: int
) -> None:
    world, broker, chance = broker_world, Broker(), random.Random(seed)
    late: list[dict[str, str]] = []

    async def pass_on() -> None:
        await published()
        waiting = late + broker.taken
        broker.taken, late[:] = [], []
        chance.shuffle(waiting)
        for headers in waiting:
            what = chance.choice(["lose", "once", "twice", "delay"])
            if what == "delay":
                late.append(headers)
            for consumer in ("provisioning", "metering"):
                if what in ("once", "twice"):
                    statuses = {await deliver(consumer, headers) for _ in range(1 + (what == "twice"))}
                    assert statuses <= {204, 422}

    wanted: dict[str, str] = {}
    async with publishing(broker):
        for _ in range(4):
            pod = await world.root.pod(max_lifetime_seconds=36_000)
            wanted[pod["id"]] = "running"
        for _ in range(12):
            await pass_on()
            pod_id = chance.choice(list(wanted))
            action = chance.choice(["stop", "start", "restart"])
            answer = await world.root.call("POST", f"/v1/pods/{pod_id}/{action}")
            if answer.status_code == 202:
                wanted[pod_id] = "stopped" if action == "stop" else "running"
        ended = chance.choice(list(wanted))
        await world.root.delete(f"/v1/pods/{ended}")
        wanted[ended] = "terminated"
        broker.status = 500
        await pass_on()
        await heal(world, ticks=2)
        assert {pod_id: state_of(world, pod_id) for pod_id in wanted} == wanted
        creates = [ref for operation, ref in world.provider.calls if operation == "create"]
        assert len(creates) == len(set(creates)) == len(world.query("SELECT DISTINCT pod_id FROM attempt"))
        world.check_money()
        for pod_id in wanted:
            await world.root.call("DELETE", f"/v1/pods/{pod_id}")
        await heal(world, ticks=1)
        broker.status = 202
        await pass_on()
    check_all_ended(world)
    check_bill(world)


# Waking


async def wake(world: World, pod_id: str) -> int:
    """How many events a look at the pod publishes again."""
    async with store.public(await credential(world), "pods:read") as tx:
        await rows.wake(tx, pod_id)
        return len(tx.events)


async def credential(world: World) -> store.Credential:
    from gpubroker import keys

    return store.Credential(key_hash=keys.hash_key(world.root.key))


async def test_a_look_at_a_due_pod_publishes_its_event_again_at_most_once_in_two_seconds(broker_world: World) -> None:
    world = broker_world
    pod = await world.root.pod()
    assert await wake(world, pod["id"]) == 0, "it was written this moment"
    world.query("UPDATE event SET next_at = clock_timestamp() + interval '7 seconds'")  # as two seconds later
    world.query("UPDATE delivery SET done_at = clock_timestamp()")
    woken = await asyncio.gather(*(wake(world, pod["id"]) for _ in range(8)))
    assert sum(woken) == 1
    (event,) = events_of(world, pod["id"])
    assert event["done_at"] is None
    assert await deliver("provisioning", as_sent(event)) == 204
    assert state_of(world, pod["id"]) == "running"


async def test_a_get_of_a_due_pod_wakes_it_through_the_broker(broker_world: World) -> None:
    world, broker = broker_world, Broker()
    async with publishing(broker):
        pod = await world.root.pod()
        await published()
        world.query("UPDATE event SET next_at = clock_timestamp()")
        await world.root.get(f"/v1/pods/{pod['id']}")
        await published()
        first, again = broker.of("pod.requested")
        assert first["ce-id"] == again["ce-id"]


async def test_nobody_wakes_what_is_not_due_or_not_his(broker_world: World) -> None:
    world = broker_world
    from gpubroker import accounts, keys

    resting = await world.run(world.root)
    world.query("UPDATE event SET next_at = clock_timestamp()")
    assert await wake(world, resting["id"]) == 0
    due = await world.root.pod()
    world.query("UPDATE event SET next_at = clock_timestamp()")
    other = accounts.bootstrap(world.database_url, "another", 1_000_000, "total", "free", new_key=False)
    async with store.public(store.Credential(key_hash=keys.hash_key(other.key.key or "")), "pods:read") as tx:
        await rows.wake(tx, due["id"])
        assert tx.events == []
    assert await wake(world, due["id"]) == 1


# Ticks


async def test_a_tick_that_comes_ten_times_at_once_is_worked_once(broker_world: World) -> None:
    world = broker_world
    await world.run(world.root)
    tick = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "/ping", "ce-type": "dev.knative.sources.ping"}
    before = world.provider.count("list_managed")
    assert await asyncio.gather(*(deliver("reconcile", tick) for _ in range(10))) == [204] * 10
    buckets = len(world.query("SELECT 1 FROM tick WHERE name = 'reconcile'"))
    assert buckets in (1, 2), "of one minute, or of two when it changed just now"
    assert world.provider.count("list_managed") - before <= buckets
