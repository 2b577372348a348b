"""What every adapter of a vendor with an HTTP interface must keep: `class TestX(HttpProviderContract): vendor = XVendor`.

The adapter is the real one over a real socket; the vendor is a simulator that keeps machines and its own bill. What a vendor
cannot do is read from its capabilities, never from its name.
"""

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import traceback
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.factories import World
from tests.providers.common import ENV, HOUR, OWNER, Observe, ProviderContract, make_ref
from tests.providers.vendors import described, server
from tests.providers.vendors.server import Answer, Fault, Machine, Vendor

from gpubroker import catalog, config, deadman, gpus, sweep, trial
from gpubroker.errors import (
    AmbiguousOutcome,
    CannotDo,
    CredentialRefused,
    InstanceNotFound,
    ProviderError,
    Rejected,
    SetupError,
    Throttled,
)
from gpubroker.ids import base36
from gpubroker.providers import base
from gpubroker.providers.http import breakers
from gpubroker.providers.http.adapter import HttpProvider
from gpubroker.providers.http.buckets import Buckets

COMMAND = ("python", "-c", "print('it works; $HOME')")
_OFFERS: dict[str, base.ProviderOffer] = {}

AMBIGUOUS = {
    "5xx before": server.status(503),
    "5xx after": server.status(500, after=True),
    "502 of a proxy": server.status(502, after=True),
    "timed out there": server.status(408),
    "reset before": server.RESET,
    "reset after": server.RESET_AFTER,
    "cut": server.CUT,
    "garbage": server.GARBAGE,
    "html": server.HTML,
    "empty": server.EMPTY,
    "without what matters": server.NOTHING,
    "null": server.NULL,
    "huge": server.HUGE,
}
BAD_READS = {name: fault for name, fault in AMBIGUOUS.items() if name != "timed out there"} | {
    "gone path": server.status(404)
}


class HttpProviderContract(ProviderContract):
    """The contract. A subclass sets `vendor`, and what below does not fit all."""

    vendor: ClassVar[type[Vendor]]
    path: ClassVar[str] = ""
    """The path of the base URL."""

    # Parts

    @pytest.fixture(scope="class")
    @classmethod
    def served(cls) -> Iterator[Vendor]:
        with server.serve(cls.vendor(), cls.path) as vendor:
            yield vendor

    @pytest.fixture
    def sim(self, served: Vendor) -> Iterator[Vendor]:
        served.reset()
        yield served
        served.released.set()
        assert served.violations == []

    @pytest.fixture
    async def adapter(self, sim: Vendor, anyio_backend: str) -> AsyncIterator[HttpProvider]:
        made = self.make(sim)
        yield made
        await made.close()

    def settings(self, sim: Vendor, **more: str) -> config.Settings:
        url = f"GPUBROKER_{sim.provider.name.upper()}_URL"
        return config.read({**sim.variables, url: sim.url, "GPUBROKER_PROVIDERS": sim.provider.name, **more})

    def make(self, sim: Vendor, **more: str) -> HttpProvider:
        """An adapter that does not wait for its turns, and tries again at once."""
        made = sim.provider.from_settings(self.settings(sim, **more))
        made.http.buckets.limits = {}
        made.http.pause_seconds = 0.001
        made.http.largest = dict.fromkeys(made.http.largest, 1 << 20)
        made.http.largest_result = 1 << 20
        if hasattr(made, "quiet_seconds"):
            made.quiet_seconds = 0.15
        return made

    def spec(self, adapter: base.Provider, **changes: Any) -> base.Spec:
        """What a vendor of this kind can run."""
        has = adapter.capabilities.supports
        spec = base.Spec(
            pod_id="pod_1",
            command=COMMAND if "command" in has else (),
            image="busybox:1" if "image" in has else None,
            env=ENV,
            ports=(base.Port(8000, "http"), base.Port(9000)) if "ports" in has else (),
            disk_gb=50,
            hard_stop_at=datetime.now(UTC) + timedelta(hours=1),
        )
        return dataclasses.replace(spec, **changes)

    @pytest.fixture
    def observe(self, sim: Vendor) -> Observe:
        async def look(instance_id: str) -> Mapping[str, str]:
            return sim.received(sim.machines[instance_id])["env"]

        return look

    @pytest.fixture
    def absent(self, sim: Vendor) -> str:
        return sim.make_id()

    @classmethod
    def provider(cls) -> type[base.Provider]:
        return cls.vendor.provider

    async def offer(self, adapter: base.Provider) -> base.ProviderOffer:
        """The cheapest of the smallest, asked for once: prices are the same in all tests."""
        key = type(self).__name__
        if key not in _OFFERS:
            _OFFERS[key] = await self.find_offer(adapter)
        return _OFFERS[key]

    async def find_offer(self, adapter: base.Provider) -> base.ProviderOffer:
        offers = [offer for offer in await adapter.list_offers() if offer.availability != "none" and not offer.spot]
        return min(offers, key=lambda offer: (offer.gpu_count, offer.price_micro_h, offer.region))

    async def create(self, adapter: HttpProvider, sim: Vendor, ref: str | None = None, **changes: Any) -> Machine:
        created = await adapter.create(self.spec(adapter, **changes), await self.offer(adapter), ref or make_ref())
        return sim.machines[created.id]

    # Offers

    async def test_a_price_is_what_the_vendor_charges_to_the_micro_usd(
        self, adapter: HttpProvider, sim: Vendor
    ) -> None:
        for offer in await adapter.list_offers():
            if not offer.spot:
                assert offer.price_micro_h == sim.price(offer.provider_offer_id, offer.disk_base_gb), offer
                more = offer.disk_base_gb + 30
                if offer.disk_gb >= more:
                    asked = offer.price_micro_h + 30 * offer.disk_micro_gb_h
                    assert asked == sim.price(offer.provider_offer_id, more), offer

    async def test_every_gpu_is_known_by_its_spelling(self, adapter: HttpProvider) -> None:
        for offer in await adapter.list_offers():
            assert offer.gpu is None or gpus.recognise(offer.gpu, offer.vram_gb), offer.gpu

    async def test_what_is_sold_out_says_so_or_is_not_listed(self, adapter: HttpProvider, sim: Vendor) -> None:
        sim.has_room = False
        assert {offer.availability for offer in await adapter.list_offers()} <= {"none"}

    async def test_a_price_rise_shows_at_the_next_look(self, adapter: HttpProvider, sim: Vendor) -> None:
        first = await self.find_offer(adapter)
        sim.dearer = 2.0
        assert (await self.find_offer(adapter)).price_micro_h > first.price_micro_h

    async def test_fields_that_nobody_knows_disturb_nothing(self, adapter: HttpProvider, sim: Vendor) -> None:
        sim.extras = {"brand_new": {"a": [1]}}
        assert await adapter.list_offers()
        machine = await self.create(adapter, sim)
        assert (await adapter.get(machine.id)).life == "running"

    @pytest.mark.parametrize("fault", BAD_READS.values(), ids=BAD_READS)
    async def test_bad_offers_are_an_error_never_an_empty_list(
        self, adapter: HttpProvider, sim: Vendor, fault: Fault
    ) -> None:
        sim.plan("offers", *[fault] * 3)
        with pytest.raises(ProviderError):
            await adapter.list_offers()

    async def test_a_short_failure_of_a_read_is_not_seen(self, adapter: HttpProvider, sim: Vendor) -> None:
        sim.plan("offers", server.status(503), server.RESET)
        assert await adapter.list_offers()

    async def test_what_is_asked_again_takes_its_turn_again(
        self, adapter: HttpProvider, sim: Vendor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await adapter.list_managed(OWNER)
        turns, asked = 0, sim.count()

        async def take(*_: str, patience_seconds: float) -> None:
            nonlocal turns
            turns += 1

        monkeypatch.setattr(adapter.http.buckets, "take", take)
        sim.plan("list", server.status(503), server.RESET)
        await adapter.list_managed(OWNER)
        assert turns == sim.count() - asked >= 3

    async def test_a_read_that_hangs_ends_in_its_time(self, adapter: HttpProvider, sim: Vendor) -> None:
        adapter.http.read_seconds = 0.05
        sim.plan("offers", server.HANG, server.HANG, server.HANG)
        with pytest.raises(ProviderError):
            await adapter.list_offers()

    # Creating

    async def test_a_create_makes_one_machine_that_carries_the_reference(
        self, adapter: HttpProvider, sim: Vendor
    ) -> None:
        ref = make_ref()
        assert len(ref) <= 50
        machine = await self.create(adapter, sim, ref)
        assert [m.id for m in sim.alive()] == [machine.id]
        assert sim.labels(machine)
        assert all(ref in label for label in sim.labels(machine))
        assert sim.count("create") == 1

    async def test_the_vendor_runs_what_was_asked_for(self, adapter: HttpProvider, sim: Vendor) -> None:
        asked = self.spec(adapter)
        got = sim.received(await self.create(adapter, sim))
        assert got["env"] == asked.env
        if asked.command:
            assert tuple(got["args"]) == asked.command
        if asked.image:
            assert got["image"] == asked.image
        assert set(got["ports"]) >= {port.port for port in asked.ports}
        if got["disk_gb"] is not None:
            assert got["disk_gb"] >= asked.disk_gb

    async def test_the_pod_has_its_own_ssh_key_or_none(self, adapter: HttpProvider, sim: Vendor) -> None:
        without = sim.received(await self.create(adapter, sim))
        assert without["ssh_key"] in {"", None}
        if "ssh" in adapter.capabilities.supports:
            mine = sim.received(await self.create(adapter, sim, ssh_public_key="ssh-ed25519 AAAA me"))
            assert mine["ssh_key"] == "ssh-ed25519 AAAA me"

    async def test_what_the_answer_says_of_the_new_instance_is_of_it(self, adapter: HttpProvider, sim: Vendor) -> None:
        sim.boots_at_once = False
        ref = make_ref()
        created = await adapter.create(self.spec(adapter), await self.offer(adapter), ref)
        assert created.instance is None or (created.instance.id, created.instance.ref) == (created.id, ref)
        seen = await adapter.get(created.id)
        assert seen.life in {"starting", "unknown"}
        assert seen.endpoints == ()

    async def test_no_capacity_is_a_rejection_and_the_next_offer(self, adapter: HttpProvider, sim: Vendor) -> None:
        offer = await self.offer(adapter)
        sim.has_room = False
        with pytest.raises(Rejected) as rejected:
            await adapter.create(self.spec(adapter), offer, make_ref())
        assert (rejected.value.code, rejected.value.try_next_offer) == ("no_capacity", True)
        assert sim.machines == {}

    async def test_no_money_is_a_rejection(self, adapter: HttpProvider, sim: Vendor) -> None:
        offer = await self.offer(adapter)
        sim.has_money = False
        with pytest.raises(Rejected) as rejected:
            await adapter.create(self.spec(adapter), offer, make_ref())
        assert (rejected.value.code, rejected.value.try_next_offer) == ("no_balance", True)

    async def test_a_request_that_is_wrong_is_wrong_everywhere(self, adapter: HttpProvider, sim: Vendor) -> None:
        offer = await self.offer(adapter)
        sim.plan("create", Fault(answer=sim.refusal(422, "additional properties not allowed")))
        with pytest.raises(Rejected) as rejected:
            await adapter.create(self.spec(adapter), offer, make_ref())
        assert not rejected.value.try_next_offer

    @pytest.mark.parametrize("fault", AMBIGUOUS.values(), ids=AMBIGUOUS)
    async def test_what_is_no_clear_answer_to_a_create_is_ambiguous_and_sent_once(
        self, adapter: HttpProvider, sim: Vendor, fault: Fault
    ) -> None:
        offer, ref = await self.offer(adapter), make_ref()
        sim.plan("create", fault)
        with pytest.raises(AmbiguousOutcome):
            await adapter.create(self.spec(adapter), offer, ref)
        assert sim.count("create") == 1
        assert len(sim.alive()) == fault.after
        assert [found.ref for found in await adapter.find_by_ref(ref)] == [ref] * fault.after

    async def test_a_create_that_hangs_is_ambiguous(self, adapter: HttpProvider, sim: Vendor) -> None:
        offer, ref = await self.offer(adapter), make_ref()
        sim.plan("create", server.HANG_AFTER)
        adapter.http.seconds["create"] = 0.2
        with pytest.raises(AmbiguousOutcome):
            await adapter.create(self.spec(adapter), offer, ref)
        assert sim.count("create") == 1
        assert len(await adapter.find_by_ref(ref)) == 1

    async def test_a_create_that_its_caller_gives_up_ends_at_once(self, adapter: HttpProvider, sim: Vendor) -> None:
        offer = await self.offer(adapter)
        sim.plan("create", server.HANG)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(adapter.create(self.spec(adapter), offer, make_ref()), 0.15)

    async def test_a_create_that_reaches_nobody_is_rejected(self, adapter: HttpProvider, sim: Vendor) -> None:
        offer = await self.offer(adapter)
        far = self.make(sim, **{f"GPUBROKER_{adapter.name.upper()}_URL": "http://127.0.0.1:9"})
        with pytest.raises(Rejected) as rejected:
            await far.create(self.spec(adapter), offer, make_ref())
        assert (rejected.value.code, rejected.value.try_next_offer) == ("unreachable", True)
        await far.close()

    async def test_one_create_two_machines(self, adapter: HttpProvider, sim: Vendor) -> None:
        sim.bears_twins = True
        ref = make_ref()
        await self.create(adapter, sim, ref)
        assert {found.id for found in await adapter.find_by_ref(ref)} == set(sim.machines)
        assert len(sim.machines) == 2

    # Throttling

    @pytest.mark.parametrize("said", ["seconds", "date", "text"])
    async def test_a_429_says_how_long_to_wait(self, adapter: HttpProvider, sim: Vendor, said: str) -> None:
        offer = await self.offer(adapter)
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=400), usegmt=True)
        fault = {
            "seconds": server.status(429, Retry_After="7"),
            "date": server.status(429, Retry_After=date),
            "text": server.THROTTLED_TEXT,
        }[said]
        sim.plan("create", fault)
        with pytest.raises(Throttled) as throttled:
            await adapter.create(self.spec(adapter), offer, make_ref())
        low, high = {"seconds": (7, 7), "date": (300, 400), "text": (1, 60)}[said]
        assert low <= throttled.value.wait <= high
        assert (sim.count("create"), sim.machines) == (1, {})

    async def test_a_throttled_listing_is_no_listing(self, adapter: HttpProvider, sim: Vendor) -> None:
        sim.plan("list", *[server.status(429, Retry_After="60")] * 3)
        with pytest.raises(Throttled):
            await adapter.list_managed(OWNER)

    async def test_its_own_limits_are_kept(self, sim: Vendor) -> None:
        for name, limit in sim.provider.limits.items():
            buckets = Buckets(f"test-{secrets.token_hex(4)}", {name: limit})
            for _ in range(limit.burst):
                await buckets.take(name, patience_seconds=0)
            with pytest.raises(Throttled) as throttled:
                await buckets.take(name, patience_seconds=0)
            assert 0 < throttled.value.wait <= limit.interval_seconds
        assert "calls" in sim.provider.limits

    # Listing

    async def test_a_listing_has_the_owners_and_no_others(self, adapter: HttpProvider, sim: Vendor) -> None:
        mine = await self.create(adapter, sim)
        await self.create(adapter, sim, make_ref("otherone"))
        for name in ("somebody's own machine", ""):
            self.rename(await self.create(adapter, sim), name)
        assert [instance.id for instance in await adapter.list_managed(OWNER)] == [mine.id]

    def rename(self, machine: Machine, name: str) -> None:
        """Take our reference off a machine, in every label that it has."""
        machine.name = name

    async def test_a_long_listing_is_whole(self, adapter: HttpProvider, sim: Vendor) -> None:
        first = await self.create(adapter, sim)
        for _ in range(60):
            self.copy(sim, first, make_ref())
        assert {instance.id for instance in await adapter.list_managed(OWNER)} == set(sim.machines)
        assert len(await adapter.find_by_ref(first.name)) == 1

    def copy(self, sim: Vendor, machine: Machine, ref: str) -> Machine:
        """Another machine like this one."""
        return sim.bear(ref, machine.asked, machine.offer)

    async def test_when_one_page_fails_the_listing_does(self, adapter: HttpProvider, sim: Vendor) -> None:
        first = await self.create(adapter, sim)
        for _ in range(60):
            self.copy(sim, first, make_ref())
        await adapter.list_managed(OWNER)
        pages = sim.count("list")
        for good in range(pages):
            nothing = [server.PASS] * good
            sim.faults["list"] = [*nothing, *[server.status(500)] * 3]
            with pytest.raises(ProviderError):
                await adapter.list_managed(OWNER)
            sim.faults.clear()

    async def test_an_empty_listing_is_told_as_it_is(self, adapter: HttpProvider, sim: Vendor) -> None:
        await self.create(adapter, sim)
        sim.is_empty = True
        assert list(await adapter.list_managed(OWNER)) == []

    @pytest.mark.parametrize("fault", BAD_READS.values(), ids=BAD_READS)
    async def test_a_bad_listing_is_an_error_never_an_empty_one(
        self, adapter: HttpProvider, sim: Vendor, fault: Fault
    ) -> None:
        await self.create(adapter, sim)
        sim.plan("list", *[fault] * 3)
        with pytest.raises(ProviderError) as error:
            await adapter.list_managed(OWNER)
        assert not isinstance(error.value, InstanceNotFound)

    async def test_a_machine_may_be_invisible_for_a_while(self, adapter: HttpProvider, sim: Vendor) -> None:
        sim.invisible_seconds = adapter.capabilities.visibility_lag_seconds
        ref = make_ref()
        machine = await self.create(adapter, sim, ref)
        assert list(await adapter.find_by_ref(ref)) == []
        with pytest.raises(InstanceNotFound):
            await adapter.get(machine.id)
        sim.shift += adapter.capabilities.visibility_lag_seconds + 1
        assert (await adapter.get(machine.id)).ref == ref

    async def test_a_machine_of_an_unknown_status_is_listed_as_unknown(
        self, adapter: HttpProvider, sim: Vendor
    ) -> None:
        machine = await self.create(adapter, sim)
        machine.status = "migrating_sideways"
        (listed,) = await adapter.list_managed(OWNER)
        assert (listed.id, listed.life, listed.billing) == (machine.id, "unknown", "unknown")

    # Looking

    async def test_every_status_means_something(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        for status, (life, billing) in sim.statuses.items():
            machine.status = status
            seen = await adapter.get(machine.id)
            assert (status, seen.life, seen.billing) == (status, life, billing)
            assert status in seen.status

    async def test_a_status_that_nobody_knows_is_unknown(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        machine.status = "migrating_sideways"
        seen = await adapter.get(machine.id)
        assert (seen.life, seen.billing, seen.endpoints) == ("unknown", "unknown", ())

    async def test_what_is_not_there_is_not_found(self, adapter: HttpProvider, sim: Vendor) -> None:
        gone = await self.create(adapter, sim)
        sim.end(gone)
        with pytest.raises(InstanceNotFound):
            await adapter.get(gone.id)

    @pytest.mark.parametrize("fault", AMBIGUOUS.values(), ids=AMBIGUOUS)
    async def test_a_bad_look_is_an_error_never_an_end(self, adapter: HttpProvider, sim: Vendor, fault: Fault) -> None:
        machine = await self.create(adapter, sim)
        sim.plan("get", *[fault] * 3)
        with pytest.raises(ProviderError) as error:
            await adapter.get(machine.id)
        assert not isinstance(error.value, InstanceNotFound)

    @pytest.mark.parametrize("name", ["../../admin", "a/b", "a?b=c", "", "a b", "é", "https://elsewhere.example/x"])
    async def test_an_id_leads_nowhere_else(self, adapter: HttpProvider, sim: Vendor, name: str) -> None:
        for call in (adapter.get, adapter.terminate):
            with pytest.raises(ProviderError):
                await call(name)
        assert sim.count() == 0

    async def test_a_running_machine_says_since_when(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        seen = await adapter.get(machine.id)
        if seen.started_at is not None:
            assert abs(seen.started_at.timestamp() - (machine.started_at or 0)) < 2
            assert seen.started_at.tzinfo is not None

    async def test_ssh_is_shown_when_it_was_asked_for(self, adapter: HttpProvider, sim: Vendor) -> None:
        if "ssh" not in adapter.capabilities.supports:
            pytest.skip("it has no ssh")
        machine = await self.create(adapter, sim, ssh_public_key="ssh-ed25519 AAAA me")
        (ssh,) = [endpoint for endpoint in (await adapter.get(machine.id)).endpoints if endpoint.name == "ssh"]
        assert (ssh.port, (ssh.command or "").partition(" ")[0]) == (22, "ssh")

    # Acting

    async def test_terminate_ends_it(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine, other = await self.create(adapter, sim), await self.create(adapter, sim)
        await adapter.terminate(machine.id)
        assert sim.alive() == [other]
        with contextlib.suppress(InstanceNotFound):
            assert (await adapter.get(machine.id)).life in {"gone", "terminating"}

    async def test_terminate_is_asked_again_when_the_vendor_stumbles(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        sim.plan("terminate", server.status(503), server.RESET)
        await adapter.terminate(machine.id)
        assert sim.alive() == []

    async def test_a_terminate_that_was_lost_is_no_success(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        sim.plan("terminate", *[server.status(503)] * 3)
        with pytest.raises(ProviderError) as error:
            await adapter.terminate(machine.id)
        assert not isinstance(error.value, (InstanceNotFound, Rejected))
        assert sim.alive() == [machine]

    async def test_what_it_cannot_do_is_refused_before_any_call(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        asked = sim.count()
        calls = {
            "stop": lambda: adapter.stop(machine.id),
            "exec": lambda: adapter.exec(machine.id, ("true",), stdin=None, timeout_seconds=5),
            "logs": lambda: adapter.logs(machine.id, after=None, since=None, limit=10),
        }
        for support in calls.keys() - adapter.capabilities.supports:
            with pytest.raises(CannotDo):
                await calls[support]()
        assert sim.count() == asked

    async def test_what_is_done_already_is_no_error(self, adapter: HttpProvider, sim: Vendor) -> None:
        if "stop" not in adapter.capabilities.supports:
            pytest.skip("it cannot stop")
        machine = await self.create(adapter, sim)
        await adapter.start(machine.id)
        await adapter.stop(machine.id)
        await adapter.stop(machine.id)
        assert machine.life == "stopped"

    async def test_there_may_be_no_room_for_what_was_stopped(self, adapter: HttpProvider, sim: Vendor) -> None:
        if "stop" not in adapter.capabilities.supports:
            pytest.skip("it cannot stop")
        machine = await self.create(adapter, sim)
        await adapter.stop(machine.id)
        sim.has_room = False
        with pytest.raises(Rejected):
            await adapter.start(machine.id)
        assert machine.life == "stopped"

    async def test_restart_keeps_it_running_or_cannot_be(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        try:
            await adapter.restart(machine.id)
        except CannotDo:
            return
        assert sim.alive() == [machine]
        assert sim.count("restart") == 1

    async def test_acting_on_what_is_not_there(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        sim.end(machine)
        for call in (adapter.stop, adapter.start, adapter.restart):
            with pytest.raises((InstanceNotFound, CannotDo)):
                await call(machine.id)

    # Logs

    async def test_a_log_is_read_whole_and_in_parts(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        if "logs" not in adapter.capabilities.supports:
            with pytest.raises(CannotDo):
                await adapter.logs(machine.id, after=None, since=None, limit=1000)
            return
        whole = await adapter.logs(machine.id, after=0, since=None, limit=1000)
        assert (whole.starts_at, whole.data) == (0, b"one\ntwo\nthree\n")
        part = await adapter.logs(machine.id, after=4, since=None, limit=4)
        assert (part.starts_at, part.data) == (4, b"two\n")
        last = await adapter.logs(machine.id, after=None, since=None, limit=6)
        assert (last.starts_at, last.data) == (8, b"three\n")
        nothing = await adapter.logs(machine.id, after=14, since=None, limit=1000)
        assert (nothing.starts_at, nothing.data) == (14, b"")
        sim.end(machine)
        with pytest.raises(InstanceNotFound):
            await adapter.logs(machine.id, after=None, since=None, limit=1000)

    # Money

    async def test_our_price_over_its_times_is_the_vendors_bill(self, adapter: HttpProvider, sim: Vendor) -> None:
        offer = await self.offer(adapter)
        more = 20 if offer.disk_gb >= offer.disk_base_gb + 20 else 0
        disk = offer.disk_base_gb + more
        created = await adapter.create(self.spec(adapter, disk_gb=disk), offer, make_ref())
        machine, expected = sim.machines[created.id], 0
        stopped = (offer.stopped_micro_h or 0) + more * offer.stopped_disk_micro_gb_h
        rates = {"full": offer.price_micro_h + more * offer.disk_micro_gb_h, "storage": stopped, "none": 0}
        calls = [None, adapter.stop, adapter.start] if "stop" in adapter.capabilities.supports else [None]
        for call in calls:
            if call is not None:
                await call(machine.id)
            rate = rates[(await adapter.get(machine.id)).billing]
            sim.shift += 2 * HOUR
            expected += 2 * rate
        await adapter.terminate(machine.id)
        assert abs(sim.bill(machine) - expected) <= max(10, expected // 1000)  # the test itself takes a moment
        sim.shift += HOUR
        assert abs(sim.bill(machine) - expected) <= max(10, expected // 1000)

    # The credential

    async def test_a_dead_credential_is_told_by_every_call(self, adapter: HttpProvider, sim: Vendor) -> None:
        offer, machine = await self.offer(adapter), await self.create(adapter, sim)
        sim.is_dead = True
        calls = [
            adapter.list_offers(),
            adapter.create(self.spec(adapter), offer, make_ref()),
            adapter.find_by_ref(make_ref()),
            adapter.list_managed(OWNER),
            adapter.get(machine.id),
            adapter.terminate(machine.id),
        ]
        for call in calls:
            with pytest.raises(CredentialRefused):
                await call
        assert sim.alive() == [machine]

    async def test_no_secret_is_in_a_log_a_repr_or_an_error(
        self, adapter: HttpProvider, sim: Vendor, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        offer, shown = await self.offer(adapter), [repr(adapter), repr(vars(adapter)), repr(vars(adapter.http))]
        hidden = [*sim.variables.values(), ENV["TOKEN"]]
        for code in (400, 401, 403, 422, 500):
            sim.plan("create", Fault(answer=sim.refusal(code, f"you sent {' and '.join(hidden)}")))
            try:
                await adapter.create(self.spec(adapter), offer, make_ref())
            except ProviderError as error:
                shown += [repr(error), str(error), error.detail, *traceback.format_exception(error)]
        text = "\n".join([*shown, *(record.getMessage() for record in caplog.records), await adapter.account()])
        assert not [secret for secret in hidden if secret in text]

    async def test_a_redirect_is_not_followed_and_the_credential_stays(
        self, adapter: HttpProvider, sim: Vendor
    ) -> None:
        elsewhere = type(sim)()
        with server.serve(elsewhere):
            offer, machine = await self.offer(adapter), await self.create(adapter, sim)
            for code in (301, 302, 307, 308):
                away = Fault(answer=Answer(code, b"", {"Location": f"{elsewhere.url}/v2/pods"}))
                for operation in ("create", "get", "list", "offers", "terminate"):
                    sim.plan(operation, away)
                with pytest.raises(AmbiguousOutcome):
                    await adapter.create(self.spec(adapter), offer, make_ref())
                for call in (
                    adapter.get(machine.id),
                    adapter.list_managed(OWNER),
                    adapter.list_offers(),
                    adapter.terminate(machine.id),
                ):
                    with pytest.raises(ProviderError):
                        await call
            assert elsewhere.requests == []

    async def test_cookies_are_not_kept(self, adapter: HttpProvider, sim: Vendor) -> None:
        sim.plan("list", Fault(answer=Answer(500, b"", {"Set-Cookie": "a=b; Path=/"})))
        await adapter.list_managed(OWNER)
        await adapter.list_managed(OWNER)
        assert not [request for _, request in sim.requests if "cookie" in request.headers]

    def test_all_that_is_missing_is_named(self, sim: Vendor) -> None:
        with pytest.raises(SetupError) as error:
            sim.provider.from_settings(config.read({}))
        assert all(name in str(error.value) for name in sim.provider.credentials)

    async def test_a_credential_may_be_a_file(self, sim: Vendor, tmp_path: Path) -> None:
        variables: dict[str, str] = {}
        for name, value in sim.variables.items():
            (tmp_path / name).write_text(value + "\n")
            variables[f"{name}_FILE"] = str(tmp_path / name)
        url = f"GPUBROKER_{sim.provider.name.upper()}_URL"
        adapter = sim.provider.from_settings(config.read({**variables, url: sim.url}))
        assert list(await adapter.list_managed(OWNER)) == []
        await adapter.close()

    async def test_an_address_may_have_a_path(self, sim: Vendor) -> None:
        sim.url += "/behind/a/proxy"
        try:
            adapter = self.make(sim)
            assert await adapter.list_offers()
            await adapter.close()
        finally:
            sim.url = sim.url.removesuffix("/behind/a/proxy")

    @pytest.mark.parametrize("url", ["ftp://x", "nonsense", "https://user:pass@x", "https://x/?a=b", "http://"])
    def test_an_address_that_cannot_be_is_refused(self, sim: Vendor, url: str) -> None:
        with pytest.raises(SetupError):
            sim.provider.from_settings(self.settings(sim, **{f"GPUBROKER_{sim.provider.name.upper()}_URL": url}))

    async def test_the_account_lasts_and_has_no_secret(self, adapter: HttpProvider, sim: Vendor) -> None:
        first = await adapter.account()
        again = self.make(sim)
        assert first
        assert await again.account() == first
        assert not [secret for secret in sim.variables.values() if secret in first]
        await again.close()

    # Breakers

    async def test_a_vendor_that_fails_creates_is_left_alone_and_tried_again(
        self, adapter: HttpProvider, sim: Vendor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        offer = await self.offer(adapter)
        sim.plan("create", *[server.status(500)] * breakers.FAILURES)
        for _ in range(breakers.FAILURES):
            with pytest.raises(AmbiguousOutcome):
                await adapter.create(self.spec(adapter), offer, make_ref())
        with pytest.raises(Rejected) as rejected:
            await adapter.create(self.spec(adapter), offer, make_ref())
        assert (rejected.value.code, rejected.value.try_next_offer) == ("breaker_open", True)
        assert sim.count("create") == breakers.FAILURES
        assert await adapter.list_offers()
        began = breakers.time.monotonic()
        monkeypatch.setattr(breakers.time, "monotonic", lambda: began + breakers.OPEN_SECONDS + 1)
        await adapter.create(self.spec(adapter), offer, make_ref())
        await adapter.create(self.spec(adapter), offer, make_ref())

    async def test_terminate_passes_an_open_breaker(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        for _ in range(breakers.FAILURES + 1):
            await adapter.http.breakers.fail("act")
            await adapter.http.breakers.fail("read")
        assert adapter.http.breakers.wait("act") > 0
        await adapter.terminate(machine.id)
        assert sim.alive() == []

    async def test_refusals_open_no_breaker(self, adapter: HttpProvider, sim: Vendor) -> None:
        offer = await self.offer(adapter)
        sim.has_room = False
        for _ in range(breakers.FAILURES + 2):
            with pytest.raises(Rejected) as rejected:
                await adapter.create(self.spec(adapter), offer, make_ref())
            assert rejected.value.code == "no_capacity"

    # The whole

    async def test_a_pod_lives_and_dies_through_the_broker(
        self, world: World, sim: Vendor, adapter: HttpProvider
    ) -> None:
        world.adapters._made = {adapter.name: adapter}
        await catalog.refresh_offers(adapter, 60)
        offer = await self.offer(adapter)
        model = gpus.recognise(offer.gpu or "", offer.vram_gb)
        asked = self.spec(adapter)
        pod = await world.root.pod(
            requirements={"gpu": [model.name if model else ""], "gpu_count": offer.gpu_count},
            image=asked.image,
            command=list(asked.command) or None,
            env=ENV,
            max_lifetime_seconds=2 * HOUR,
        )
        await world.drive_due()
        seen = await world.root.get(f"/v1/pods/{pod['id']}")
        assert (seen["state"], len(sim.alive())) == ("running", 1)
        assert sim.received(sim.alive()[0])["env"] == ENV

        async def pass_time(seconds: int) -> None:
            world.query("UPDATE clock SET shift = shift + %s", timedelta(seconds=seconds))
            sim.shift += seconds

        await pass_time(HOUR)
        await sweep.sweep(world.adapters, adapter.name)
        await world.root.delete(f"/v1/pods/{pod['id']}")
        for _ in range(12):
            await world.drive_due()
            await sweep.sweep(world.adapters, adapter.name)
            await world.drive_due()
            seen = await world.root.get(f"/v1/pods/{pod['id']}")
            if seen["state"] == "terminated":
                break
            await pass_time(70)
        assert (seen["state"], sim.alive(), sim.count("create")) == ("terminated", [], 1)
        world.check_money()
        (machine,) = sim.machines.values()
        spent = round(float(seen["spent_usd"]) * 1_000_000)
        step = offer.price_micro_h * offer.increment_s // HOUR  # a second more there may begin another
        assert spent >= sim.bill(machine) - sim.bill(machine) // 500 - step
        assert (
            spent
            <= sim.bill(machine)
            + offer.price_micro_h * (adapter.capabilities.termination_allowance_seconds + 60) // HOUR
        )

    def test_its_capabilities_are_a_vendors(self) -> None:
        can = self.provider().capabilities
        assert can.call_limit_seconds < can.create_limit_seconds
        assert can.visibility_lag_seconds > 0
        assert not can.terminal_is_final

    async def test_a_whole_life_uses_every_operation_as_the_vendor_describes_it(
        self, adapter: HttpProvider, sim: Vendor
    ) -> None:
        sim.used.clear()
        await adapter.account()
        await adapter.list_offers()
        ref = make_ref()
        machine = await self.create(adapter, sim, ref)
        await adapter.get(machine.id)
        await adapter.find_by_ref(ref)
        await adapter.list_managed(OWNER)
        has = adapter.capabilities.supports
        if "logs" in has:
            await adapter.logs(machine.id, after=None, since=None, limit=100)
        if "exec" in has:
            assert (await adapter.exec(machine.id, ["true"], stdin=None, timeout_seconds=5)).exit_code in {0, None}
        await self.live_on(adapter, machine)
        if "stop" in has:
            await adapter.stop(machine.id)
            await adapter.start(machine.id)
        await adapter.terminate(machine.id)
        assert sim.used == {route[3].__name__ for route in sim.routes}
        assert sim.violations == []
        if sim.description is not None and described.load(sim.description) is None:
            pytest.skip("the vendor's description is not at hand: nothing was held against it")

    async def live_on(self, adapter: HttpProvider, machine: Machine) -> None:
        """What else the vendor can do with a running machine."""
        try:
            await adapter.restart(machine.id)
        except CannotDo:
            return

    # Without a broker

    async def test_the_dead_man_destroys_what_is_past_its_hard_stop_and_nothing_else(
        self, adapter: HttpProvider, sim: Vendor
    ) -> None:
        past = datetime.now(UTC) - timedelta(seconds=90)
        late = make_ref().rpartition("-")[0] + "-" + base36(int(past.timestamp()))
        machine = await self.create(adapter, sim, late, hard_stop_at=past)
        live = await self.create(adapter, sim)
        anothers = await self.create(adapter, sim, late.replace(OWNER, "anothers"), hard_stop_at=past)
        (report,) = await deadman.switch_off([adapter], OWNER)
        assert report.is_good
        assert [ended.instance_id for ended in report.ended] == [machine.id]
        assert sim.alive() == [live, anothers]

    async def test_the_dead_man_tells_of_what_it_cannot_see(self, adapter: HttpProvider, sim: Vendor) -> None:
        sim.plan("list", *[server.status(500)] * 3)
        (report,) = await deadman.switch_off([adapter], OWNER)
        assert (report.is_good, report.ended) == (False, ())

    async def test_a_check_says_how_it_stands(self, adapter: HttpProvider, sim: Vendor) -> None:
        await self.create(adapter, sim)
        standing = await trial.check(adapter, OWNER)
        assert standing.error is None
        assert (standing.account, standing.instances) == (await adapter.account(), 1)
        assert standing.offers >= standing.gpus > 0
        assert standing.clock_seconds is not None
        assert abs(standing.clock_seconds) < 5
        assert set(standing.lacks) | adapter.capabilities.supports == set(trial.EVERYTHING)

    async def test_a_live_trial_leaves_nothing(self, adapter: HttpProvider, sim: Vendor) -> None:
        steps = await trial.Trial(adapter, OWNER, 10**9, look_seconds=0.01).run()
        assert [step for step in steps if step.error] == []
        assert {"create", "run", "destroy"} <= {step.what for step in steps}
        assert (len(sim.machines), sim.alive()) == (1, [])

    async def test_a_live_trial_ends_what_a_lost_create_made(
        self, adapter: HttpProvider, sim: Vendor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            type(adapter), "capabilities", dataclasses.replace(adapter.capabilities, visibility_lag_seconds=0.1)
        )
        sim.plan("create", server.RESET_AFTER)
        steps = await trial.Trial(adapter, OWNER, 10**9, look_seconds=0.01).run()
        assert [step.what for step in steps] == ["find an offer", "create", "destroy"]
        assert [step.error is None for step in steps] == [True, False, True]
        assert (len(sim.machines), sim.alive()) == (1, [])

    async def test_a_live_trial_that_would_cost_more_than_it_may_rents_nothing(
        self, adapter: HttpProvider, sim: Vendor
    ) -> None:
        (step,) = await trial.Trial(adapter, OWNER, 1, look_seconds=0.01).run()
        assert "too_dear" in (step.error or "")
        assert sim.machines == {}
