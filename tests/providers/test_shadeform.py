"""Shadeform: the contract, and what is Shadeform's alone."""

from datetime import UTC, datetime, timedelta

import pytest
from tests.providers.contract import OWNER, HttpProviderContract, make_ref
from tests.providers.vendors import described
from tests.providers.vendors.server import Answer, Fault, Machine, Vendor
from tests.providers.vendors.shadeform import ShadeformVendor

from gpubroker import deadman
from gpubroker.errors import InstanceNotFound, ProviderError, Rejected
from gpubroker.providers import base
from gpubroker.providers.base import Port
from gpubroker.providers.http.adapter import HttpProvider

MINE = "ssh-ed25519 AAAA me"


class TestShadeform(HttpProviderContract):
    vendor = ShadeformVendor
    path = "/v1"

    async def find_offer(self, adapter: base.Provider) -> base.ProviderOffer:
        offers = [offer for offer in await adapter.list_offers() if offer.gpu]
        return min(offers, key=lambda offer: (offer.gpu_count, offer.price_micro_h, offer.region))

    def rename(self, machine: Machine, name: str) -> None:
        machine.name = name
        machine.asked = {**machine.asked, "tags": ["theirs"]}

    async def live_on(self, adapter: HttpProvider, machine: Machine) -> None:
        await super().live_on(adapter, machine)
        await adapter.extend(machine.id, datetime.now(UTC) + timedelta(hours=3))
        with_key = self.spec(adapter, ssh_public_key=MINE)
        await adapter.create(with_key, await self.offer(adapter), make_ref())

    async def test_machines_are_offered_where_they_are_available(self, adapter: HttpProvider) -> None:
        offers = {(o.provider_offer_id, o.region): o for o in await adapter.list_offers()}
        assert set(offers) == {
            ("hyperstack/A6000", "canada-1"),
            ("lambdalabs/A6000", "us-central-1"),
            ("denvr/H100_sxm5x8", "us-central-1"),
            ("denvr/H100_sxm5x8", "canada-1"),
            ("paperspace/C5", "canada-1"),
        }
        eight = offers["denvr/H100_sxm5x8", "us-central-1"]
        assert (eight.gpu, eight.gpu_count, eight.vram_gb, eight.price_micro_h) == ("H100 sxm5", 8, 80, 23_920_000)
        assert (eight.country, eight.disk_gb, eight.ram_gb) == ("US", 256, 58)
        assert offers["paperspace/C5", "canada-1"].gpu is None

    async def test_what_is_rented_is_what_was_offered(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        asked = machine.asked
        assert (asked["cloud"], asked["region"], asked["shade_instance_type"]) == ("hyperstack", "canada-1", "A6000")
        assert asked["shade_cloud"] is True
        assert "ssh_key_id" not in asked

    async def test_shadeform_ends_it_at_the_hard_stop_and_not_for_its_cost(
        self, adapter: HttpProvider, sim: Vendor
    ) -> None:
        sim.keeps_time = True
        machine = await self.create(adapter, sim)
        assert machine.asked["auto_delete"]["spend_threshold"] == "1.02"  # an hour, and an hour to spare
        sim.shift += 3500
        seen = await adapter.get(machine.id)
        assert seen.life == "running"
        assert seen.hard_stop_at is not None
        assert abs((seen.hard_stop_at - datetime.now(UTC)).total_seconds() - 3600) < 5
        sim.shift += 101
        with pytest.raises(InstanceNotFound):
            await adapter.get(machine.id)

    async def test_an_end_that_is_moved_is_moved_everywhere(self, adapter: HttpProvider, sim: Vendor) -> None:
        sim.keeps_time = True
        machine = await self.create(adapter, sim)
        sim.shift += 3000
        later = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=30)
        await adapter.extend(machine.id, later)
        await adapter.extend(machine.id, later)
        (listed,) = await adapter.list_managed(OWNER)
        assert (listed.hard_stop_at, (await adapter.get(machine.id)).hard_stop_at) == (later, later)
        assert deadman.find_hard_stop(listed) == later
        assert listed.endpoints != ()
        sim.shift += 29 * 3600
        assert sim.find(machine.id) is machine  # neither the old date nor the old spending ended it
        sim.shift += 3600
        assert sim.find(machine.id) is None

    async def test_a_moved_end_needs_what_it_has_cost(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        sim.plan("get", Fault(answer=Answer(200, {"id": machine.id, "cost_estimate": "much", "hourly_price": 51})))
        with pytest.raises(ProviderError):
            await adapter.extend(machine.id, datetime.now(UTC) + timedelta(hours=2))
        assert sim.count("update") == 0

    async def test_an_end_is_moved_though_the_price_is_not_told(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        sim.extras = {"hourly_price": None}
        await adapter.extend(machine.id, datetime.now(UTC) + timedelta(hours=9))
        spend = float(machine.asked["auto_delete"]["spend_threshold"])
        assert 5.1 <= spend < 5.2  # as it was reckoned: 51 cents an hour, and an hour to spare
        sim.plan("get", Fault(answer=Answer(200, {"id": machine.id, "cost_estimate": "1.5"})))
        await adapter.extend(machine.id, datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC))
        assert machine.asked["auto_delete"] == {"date_threshold": "2030-01-02T03:04:05+00:00"}

    async def test_the_pods_key_is_added_once(self, adapter: HttpProvider, sim: Vendor) -> None:
        first = await self.create(adapter, sim, ssh_public_key=MINE)
        second = await self.create(adapter, sim, ssh_public_key=MINE)
        assert first.asked["ssh_key_id"] == second.asked["ssh_key_id"]
        await self.create(adapter, sim, ssh_public_key="ssh-ed25519 BBBB other")
        assert sim.count("add_key") == 2
        assert all(key["name"].startswith(f"gpubroker-{OWNER}-") for key in sim.keys.values())

    async def test_without_the_pods_key_nothing_is_created(self, adapter: HttpProvider, sim: Vendor) -> None:
        offer = await self.offer(adapter)
        for operation in ("keys", "add_key"):
            sim.plan(operation, *[Fault(answer=sim.refusal(500, "no"))] * 3)
            with pytest.raises(Rejected) as rejected:
                await adapter.create(self.spec(adapter, ssh_public_key=MINE), offer, make_ref())
            assert rejected.value.try_next_offer
            sim.faults.clear()
        assert sim.count("create") == 0

    @pytest.mark.parametrize("status", [400, 402, 409, 500])
    async def test_a_refusal_is_told_by_its_code(self, adapter: HttpProvider, sim: Vendor, status: int) -> None:
        offer = await self.offer(adapter)
        for code, expected in (("OUT_OF_STOCK", "no_capacity"), ("INSUFFICIENT_FUNDS", "no_balance")):
            sim.plan("create", Fault(answer=sim.error(status, code)))
            with pytest.raises(Rejected) as rejected:
                await adapter.create(self.spec(adapter), offer, make_ref())
            assert (rejected.value.code, rejected.value.try_next_offer) == (expected, True)

    @pytest.mark.parametrize("changes", [{"ports": (Port(53, "udp"),)}, {"image": None}])
    async def test_what_it_cannot_do_is_refused_before_it_is_sent(
        self, adapter: HttpProvider, sim: Vendor, changes: dict[str, object]
    ) -> None:
        offer = await self.offer(adapter)
        with pytest.raises(Rejected):
            await adapter.create(self.spec(adapter, **changes), offer, make_ref())
        assert sim.count("create") == 0

    async def test_what_is_being_deleted_bills_no_more_and_may_be_deleted_again(
        self, adapter: HttpProvider, sim: Vendor
    ) -> None:
        sim.lingers = True
        machine = await self.create(adapter, sim)
        await adapter.terminate(machine.id)
        seen = await adapter.get(machine.id)
        assert (seen.life, seen.billing, seen.ended_at) == ("terminating", "none", None)
        await adapter.terminate(machine.id)

    async def test_a_date_of_deletion_proves_nothing(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        sim.extras = {"deleted_at": datetime.now(UTC).isoformat()}
        seen = await adapter.get(machine.id)
        assert (seen.life, seen.ended_at) == ("running", None)

    async def test_ports_that_a_cloud_put_elsewhere_are_reached_there(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim, ssh_public_key=MINE)
        sim.mapped = [{"internal_port": 8000, "external_port": 30080}, {"internal_port": 22, "external_port": 30022}]
        sim.extras = {"ssh_port": 30022}
        http, tcp, ssh = (await adapter.get(machine.id)).endpoints
        assert (http.port, http.url, tcp.external_port) == (8000, "http://1.0.0.1:30080", 9000)
        assert (ssh.external_port, ssh.command) == (30022, "ssh shadeform@1.0.0.1 -p 30022")

    async def test_credentials_of_a_registry_are_sent(self, adapter: HttpProvider, sim: Vendor) -> None:
        auth = {"username": "me", "password": "hunter2"}
        machine = await self.create(adapter, sim, registry_auth=auth)
        docker = machine.asked["launch_configuration"]["docker_configuration"]
        assert docker["registry_credentials"] == auth

    def test_every_status_of_the_description_is_mapped(self) -> None:
        known = described.load("shadeform.yaml")
        if known is None:
            pytest.skip("the shared folder is not at hand")
        assert set(ShadeformVendor.statuses) == set(known.document["components"]["schemas"]["Status"]["enum"])
