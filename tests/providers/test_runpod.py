"""RunPod: the contract, and what is RunPod's alone."""

import asyncio

import pytest
from tests.providers.contract import OWNER, HttpProviderContract, make_ref
from tests.providers.vendors import described
from tests.providers.vendors.runpod import RunpodVendor
from tests.providers.vendors.server import Answer, Fault, Vendor

from gpubroker.errors import Rejected
from gpubroker.providers.base import Port
from gpubroker.providers.http.adapter import HttpProvider


class TestRunpod(HttpProviderContract):
    vendor = RunpodVendor

    async def test_both_clouds_are_offered_and_what_is_asked_for_is_rented(
        self, adapter: HttpProvider, sim: Vendor
    ) -> None:
        offers = {(o.provider_offer_id, o.region): o for o in await adapter.list_offers()}
        assert {key[0] for key in offers} == {
            *(f"secure/{n}x/NVIDIA GeForce RTX 4090" for n in (1, 2, 4, 8)),
            *(f"community/{n}x/NVIDIA GeForce RTX 4090" for n in (1, 2, 4)),
            *(f"secure/{n}x/NVIDIA H100 80GB HBM3" for n in (1, 2, 4, 8)),
            *(f"secure/{n}x/NVIDIA A40" for n in (1, 2, 4)),
        }
        assert {o.country for o in offers.values()} == {"US", "RO", None}
        romanian = offers["community/2x/NVIDIA GeForce RTX 4090", "EU-RO-1"]
        assert (romanian.price_micro_h, romanian.availability) == (2 * 340_000 + 40 * 139, "high")
        made = await adapter.create(self.spec(adapter), romanian, make_ref())
        asked = sim.machines[made.id].asked
        assert (asked["cloud"], asked["gpu"]) == ("COMMUNITY", {"id": "NVIDIA GeForce RTX 4090", "count": 2})
        assert asked["dataCenterIds"] == ["EU-RO-1"]

    async def test_where_no_data_centre_is_named_none_is_asked_for(self, adapter: HttpProvider, sim: Vendor) -> None:
        (anywhere,) = [o for o in await adapter.list_offers() if o.provider_offer_id == "secure/1x/NVIDIA A40"]
        assert (anywhere.region, anywhere.country, anywhere.availability) == ("any", None, "high")
        made = await adapter.create(self.spec(adapter), anywhere, make_ref())
        assert "dataCenterIds" not in sim.machines[made.id].asked

    async def test_the_accounts_keys_are_kept_out(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        assert machine.asked["env"]["PUBLIC_KEY"] == ""
        assert "startSsh" not in machine.asked

    async def test_a_create_that_tells_its_id_alone_made_it(self, adapter: HttpProvider, sim: Vendor) -> None:
        sim.plan("create", Fault(answer=Answer(201, {"id": "7h9k2m4n6p", "status": None})))
        made = await adapter.create(self.spec(adapter), await self.offer(adapter), make_ref())
        assert (made.id, made.instance) == ("7h9k2m4n6p", None)

    async def test_ports_that_are_not_mapped_yet_hide_no_others(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim, ssh_public_key="ssh-ed25519 AAAA me")
        for ports in (None, [{"private": 9000}], [{"private": 9000, "type": "tcp", "ip": None, "public": None}]):
            sim.extras = {"runtime": {"uptime": 1, "ports": ports}}
            seen = await adapter.get(machine.id)
            assert [endpoint.name for endpoint in seen.endpoints] == ["http-8000", "ssh"]

    async def test_a_log_that_never_falls_silent_is_read(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        machine.log = f"{'x' * 99}\n" * 2000
        page = await asyncio.wait_for(adapter.logs(machine.id, after=0, since=None, limit=1 << 20), 15)
        assert page.data.count(b"\n") == 2000

    async def test_a_barred_pool_is_no_dead_credential(self, adapter: HttpProvider, sim: Vendor) -> None:
        offer = await self.offer(adapter)
        sim.plan("create", Fault(answer=sim.refusal(403, "this pool is not for you")))
        with pytest.raises(Rejected) as rejected:
            await adapter.create(self.spec(adapter), offer, make_ref())
        assert (rejected.value.code, rejected.value.try_next_offer) == ("pool_barred", True)

    @pytest.mark.parametrize(
        "changes", [{"ports": (Port(53, "udp"),)}, {"registry_auth": {"username": "u"}}, {"image": None}]
    )
    async def test_what_it_cannot_do_is_refused_before_it_is_sent(
        self, adapter: HttpProvider, sim: Vendor, changes: dict[str, object]
    ) -> None:
        offer = await self.offer(adapter)
        with pytest.raises(Rejected):
            await adapter.create(self.spec(adapter, **changes), offer, make_ref())
        assert sim.count("create") == 0

    async def test_what_stopped_bills_its_volume_though_the_cost_is_zero(
        self, adapter: HttpProvider, sim: Vendor
    ) -> None:
        machine = await self.create(adapter, sim)
        await adapter.stop(machine.id)
        (seen,) = await adapter.list_managed(OWNER)
        assert (seen.billing, seen.price_micro_h) == ("storage", None)
        del machine.asked["mounts"]
        assert (await adapter.get(machine.id)).billing == "none"

    def test_every_status_of_the_description_is_mapped(self) -> None:
        known = described.load("runpod-rest-v2.json")
        if known is None:
            pytest.skip("the shared folder is not at hand")
        assert set(RunpodVendor.statuses) == set(known.document["components"]["schemas"]["PodStatus"]["enum"])
