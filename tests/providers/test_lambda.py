"""Lambda: the contract, and what is Lambda's alone."""

import json
from typing import Any

import pytest
import yaml
from tests.providers.contract import OWNER, HttpProviderContract, make_ref
from tests.providers.vendors import described, server
from tests.providers.vendors.lambda_ import LambdaVendor
from tests.providers.vendors.server import Answer, Fault, Machine, Vendor

from gpubroker.errors import AmbiguousOutcome, InstanceNotFound, ProviderError, Rejected
from gpubroker.providers import base, registry
from gpubroker.providers.base import Port
from gpubroker.providers.http.adapter import HttpProvider

KEY_NAME = f"gpubroker-{OWNER}"


class TestLambda(HttpProviderContract):
    vendor = LambdaVendor
    path = "/api/v1"

    async def find_offer(self, adapter: base.Provider) -> base.ProviderOffer:
        offers = [offer for offer in await adapter.list_offers() if offer.gpu]
        return min(offers, key=lambda offer: (offer.gpu_count, offer.price_micro_h, offer.region))

    def rename(self, machine: Machine, name: str) -> None:
        machine.name = name
        machine.asked = {**machine.asked, "tags": []}

    def test_its_file_has_the_name_of_a_keyword(self) -> None:
        assert "lambda" in registry.names()
        assert registry.adapter("lambda").name == "lambda"

    async def test_types_are_offered_where_there_is_room(self, adapter: HttpProvider) -> None:
        offers = {(o.provider_offer_id, o.region): o for o in await adapter.list_offers()}
        assert set(offers) == {
            ("gpu_1x_a10", "us-west-1"),
            ("gpu_1x_a10", "asia-northeast-2"),
            ("gpu_8x_h100_sxm5", "asia-northeast-2"),
            ("cpu_4x_general", "us-west-1"),
        }
        eight = offers["gpu_8x_h100_sxm5", "asia-northeast-2"]
        assert (eight.gpu_count, eight.vram_gb, eight.country, eight.price_micro_h) == (8, 80, "JP", 23_920_000)
        assert (eight.ram_gb, eight.disk_gb) == (1932.735, 24189)  # GiB there
        assert (eight.min_billing_s, eight.increment_s) == (60, 60)
        plain = offers["cpu_4x_general", "us-west-1"]
        assert (plain.gpu, plain.gpu_count, plain.vram_gb) == (None, 0, None)

    async def test_the_one_key_is_ours_and_nobodys(self, adapter: HttpProvider, sim: Vendor) -> None:
        first = await self.create(adapter, sim, ssh_public_key="ssh-ed25519 AAAA me")
        assert first.asked["ssh_key_names"] == [KEY_NAME]
        public = sim.keys[KEY_NAME]
        second = await self.create(adapter, sim)
        assert second.asked["ssh_key_names"] == [KEY_NAME]
        assert (sim.count("keys"), sim.count("add_key"), sim.keys[KEY_NAME]) == (2, 1, public)
        assert "AAAA me" not in public

    async def test_two_that_add_the_key_at_once_both_launch(self, adapter: HttpProvider, sim: Vendor) -> None:
        sim.plan("keys", Fault(answer=Answer(200, {"data": []})))
        sim.keys[KEY_NAME] = "ssh-ed25519 AAAA added-meanwhile"
        machine = await self.create(adapter, sim)
        assert machine.asked["ssh_key_names"] == [KEY_NAME]
        assert sim.count("add_key") == 1

    async def test_without_its_keys_nothing_is_launched(self, adapter: HttpProvider, sim: Vendor) -> None:
        offer = await self.offer(adapter)
        sim.plan("keys", *[server.status(500)] * 3)
        with pytest.raises(Rejected) as rejected:
            await adapter.create(self.spec(adapter), offer, make_ref())
        assert (rejected.value.try_next_offer, sim.count("create")) == (True, 0)

    async def test_a_key_that_reaches_nobody_is_a_rejection(
        self, adapter: HttpProvider, sim: Vendor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        offer = await self.offer(adapter)
        call = adapter.http.call

        async def cut_off(kind: Any, method: str, path: str, **more: Any) -> Any:
            if kind == "act":
                adapter.http.base_url = "http://127.0.0.1:9"
                adapter.http.origin = "http://127.0.0.1:9"
            return await call(kind, method, path, **more)

        monkeypatch.setattr(adapter.http, "call", cut_off)
        with pytest.raises(Rejected) as rejected:
            await adapter.create(self.spec(adapter), offer, make_ref())
        assert (rejected.value.code, sim.count("create")) == ("unreachable", 0)

    async def test_user_data_that_is_too_large_is_refused_before_it_is_sent(
        self, adapter: HttpProvider, sim: Vendor
    ) -> None:
        offer = await self.offer(adapter)
        with pytest.raises(Rejected) as rejected:
            await adapter.create(self.spec(adapter, env={"LONG": "é" * 200_000}), offer, make_ref())
        assert (rejected.value.code, rejected.value.try_next_offer) == ("user_data_too_large", True)
        assert sim.count("create", "keys") == 0

    async def test_a_launch_waits_for_both_of_its_turns(
        self, adapter: HttpProvider, sim: Vendor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken: list[tuple[str, ...]] = []

        async def take(*names: str, patience_seconds: float) -> None:
            assert patience_seconds > 0
            taken.append(names)

        offer, asked = await self.offer(adapter), sim.count()
        monkeypatch.setattr(adapter.http.buckets, "take", take)
        await adapter.create(self.spec(adapter), offer, make_ref())
        assert taken == [("calls",), ("calls",), ("launch", "calls")]
        assert sim.count() - asked == len(taken)

    async def test_an_account_that_may_not_list_its_keys_may_have_ours(
        self, adapter: HttpProvider, sim: Vendor
    ) -> None:
        sim.keys[KEY_NAME] = "ssh-ed25519 AAAA added-by-hand"
        sim.plan("keys", Fault(answer=sim.error(404, "global/not-found", "no")))
        assert (await self.create(adapter, sim)).asked["ssh_key_names"] == [KEY_NAME]

    @pytest.mark.parametrize(
        ("status", "code", "expected"),
        [
            (400, "instance-operations/launch/insufficient-capacity", ("no_capacity", True)),
            (400, "global/quota-exceeded", ("quota_exceeded", True)),
            (403, "global/account-inactive", ("no_balance", True)),
            (403, "global/invalid-address", ("no_balance", True)),
            (400, "global/invalid-parameters", ("invalid_parameters", False)),
            (404, "global/object-does-not-exist", ("http_404", True)),
        ],
    )
    async def test_a_refusal_is_told_by_its_code(
        self, adapter: HttpProvider, sim: Vendor, status: int, code: str, expected: tuple[str, bool]
    ) -> None:
        offer = await self.offer(adapter)
        sim.plan("create", Fault(answer=sim.error(status, code, "no")))
        with pytest.raises(Rejected) as rejected:
            await adapter.create(self.spec(adapter), offer, make_ref())
        assert (rejected.value.code, rejected.value.try_next_offer) == expected

    async def test_an_error_of_its_suppliers_leaves_open_what_happened(
        self, adapter: HttpProvider, sim: Vendor
    ) -> None:
        offer = await self.offer(adapter)
        sim.plan("create", Fault(answer=sim.error(400, "provider/internal-unavailable", "no"), after=True))
        with pytest.raises(AmbiguousOutcome):
            await adapter.create(self.spec(adapter), offer, make_ref())
        assert len(sim.alive()) == 1

    async def test_a_page_of_a_proxy_is_no_word_on_an_instance(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        for call, operation in ((adapter.get, "get"), (adapter.terminate, "terminate")):
            sim.plan(operation, server.status(404))
            with pytest.raises(ProviderError) as error:
                await call(machine.id)
            assert not isinstance(error.value, (InstanceNotFound, Rejected))

    async def test_an_answer_without_the_instance_is_no_end(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        nobody = Answer(200, {"data": {"terminated_instances": []}})
        sim.plan("terminate", Fault(answer=nobody))
        with pytest.raises(AmbiguousOutcome):
            await adapter.terminate(machine.id)
        sim.lingers = True
        await adapter.terminate(machine.id)
        await adapter.terminate(machine.id)  # it names none, and shows what is ending
        assert (await adapter.get(machine.id)).life == "gone"
        with pytest.raises(Rejected):
            await adapter.restart(machine.id)

    async def test_ports_are_told_by_a_tag_that_fits(self, adapter: HttpProvider, sim: Vendor) -> None:
        ports = (Port(22), *(Port(65500 + n, ("http", "tcp", "udp")[n % 3]) for n in range(15)))
        machine = await self.create(adapter, sim, ports=ports, ssh_public_key="ssh-ed25519 AAAA me")
        seen = (await adapter.get(machine.id)).endpoints
        assert [endpoint.port for endpoint in seen] == [port.port for port in ports]
        assert (seen[0].name, seen[0].command) == ("ssh", "ssh ubuntu@198.51.100.2")
        assert (seen[1].url, seen[3].protocol) == ("http://198.51.100.2:65500", "udp")
        without = await self.create(adapter, sim, ports=())
        assert (await adapter.get(without.id)).endpoints == ()

    async def test_a_machine_that_was_renamed_is_known_by_its_tag(self, adapter: HttpProvider, sim: Vendor) -> None:
        ref = make_ref()
        machine = await self.create(adapter, sim, ref)
        machine.name = "somebody renamed it"
        (found,) = await adapter.find_by_ref(ref)
        assert found.id == machine.id

    async def test_a_machine_without_gpus_needs_no_toolkit(self, adapter: HttpProvider, sim: Vendor) -> None:
        (plain,) = [offer for offer in await adapter.list_offers() if offer.gpu is None]
        made = await adapter.create(self.spec(adapter), plain, make_ref())
        files = yaml.safe_load(sim.machines[made.id].asked["user_data"])["write_files"]
        assert json.loads(files[0]["content"])["HostConfig"]["DeviceRequests"] == []

    def test_every_status_of_the_description_is_mapped(self) -> None:
        known = described.load("lambda.json")
        if known is None:
            pytest.skip("the shared folder is not at hand")
        assert set(LambdaVendor.statuses) == set(known.document["components"]["schemas"]["InstanceStatus"]["enum"])
