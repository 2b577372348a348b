"""Verda: the contract, and what is Verda's alone."""

import asyncio
from typing import Any

import pytest
from tests.providers.contract import ENV, HttpProviderContract, make_ref
from tests.providers.vendors import server
from tests.providers.vendors.server import Answer, Fault, Machine, Vendor
from tests.providers.vendors.verda import CLIENT, GB_MONTH, SECRET, VerdaVendor

from gpubroker.errors import AmbiguousOutcome, CredentialRefused, InstanceNotFound, ProviderError, Rejected, Throttled
from gpubroker.providers import base
from gpubroker.providers.http.adapter import HttpProvider
from gpubroker.providers.http.oauth import ClientCredentials

GB_HOUR = round(GB_MONTH * 1_000_000 / 730)


class TestVerda(HttpProviderContract):
    vendor = VerdaVendor

    def copy(self, sim: Vendor, machine: Machine, ref: str) -> Machine:
        return sim.bear(ref, machine.asked | {"hostname": ref, "description": ref, "tags": []}, machine.offer)

    async def find_offer(self, adapter: base.Provider) -> base.ProviderOffer:
        offers = [o for o in await adapter.list_offers() if o.gpu and not o.spot and o.availability != "none"]
        return min(offers, key=lambda offer: (offer.gpu_count, offer.price_micro_h, offer.region))

    # Offers

    async def test_offers_are_types_where_there_is_room_with_the_price_of_their_disk(
        self, adapter: HttpProvider
    ) -> None:
        offers = {(o.provider_offer_id.partition("/")[0], o.region, o.spot): o for o in await adapter.list_offers()}
        assert set(offers) == {
            *(("1H100.80S.30V", place, spot) for place in ("FIN-01", "ICE-01") for spot in (False, True)),
            *(("8H200.141S.176V", "FIN-03", spot) for spot in (False, True)),
            *(("CPU.4V.16G", "FIN-01", spot) for spot in (False, True)),
        }  # without CUDA there is no image for a pod with GPUs
        one = offers["1H100.80S.30V", "ICE-01", False]
        assert (one.gpu, one.gpu_count, one.vram_gb, one.vcpus, one.ram_gb) == ("1x H100 SXM5 80GB", 1, 80, 30, 120)
        assert (one.country, one.currency, one.provider_offer_id.partition("/")[2]) == (
            "IS", "USD", "ubuntu-24.04-cuda-12.8-open-docker",
        )  # fmt: skip
        assert (one.price_micro_h, one.stopped_micro_h) == (2_290_000 + 50 * GB_HOUR,) * 2
        eight = offers["8H200.141S.176V", "FIN-03", True]
        assert (eight.gpu_count, eight.vram_gb, eight.price_micro_h) == (8, 141, 9_490_000 + 50 * GB_HOUR)
        assert eight.provider_offer_id.endswith("/ubuntu-24.04-cuda-13.0-open-docker")
        plain = offers["CPU.4V.16G", "FIN-01", False]
        assert (plain.gpu, plain.provider_offer_id) == (None, "CPU.4V.16G/ubuntu-24.04")

    async def test_prices_in_another_currency_say_so(self, adapter: HttpProvider, sim: VerdaVendor) -> None:
        sim.currency = "eur"
        assert {offer.currency for offer in await adapter.list_offers()} == {"EUR"}

    async def test_where_volumes_have_no_price_the_disk_has_none(self, adapter: HttpProvider, sim: Vendor) -> None:
        sim.plan("offers", server.PASS, Fault(answer=sim.refusal(404, "no such path")))
        prices = {o.price_micro_h for o in await adapter.list_offers() if o.gpu_count == 1 and not o.spot}
        assert prices == {2_290_000}
        sim.plan("offers", server.PASS, Fault(answer=Answer(200, [])))
        with pytest.raises(ProviderError, match="unreadable"):
            await adapter.list_offers()

    # The token

    async def test_one_token_is_enough_for_all_calls_at_once(self, adapter: HttpProvider, sim: Vendor) -> None:
        await asyncio.gather(*(adapter.list_managed("ownerown") for _ in range(5)))
        await adapter.list_offers()
        assert sim.count("token") == 1

    async def test_a_token_that_is_refused_is_renewed_once(self, adapter: HttpProvider, sim: VerdaVendor) -> None:
        offer = await self.offer(adapter)
        sim.tokens.append("the old one is over")
        created = await adapter.create(self.spec(adapter), offer, make_ref())
        assert (list(sim.machines), sim.count("token") > 0) == ([created.id], True)
        sim.tokens.append("the old one is over")
        before = sim.count("token")
        await asyncio.gather(*(adapter.get(created.id) for _ in range(5)))
        assert sim.count("token") - before <= 2

    async def test_a_token_is_renewed_before_its_end(self, adapter: HttpProvider, sim: Vendor) -> None:
        token = {"access_token": "short", "token_type": "Bearer", "expires_in": 60}
        sim.plan("token", Fault(answer=Answer(200, token)))
        auth: Any = adapter.http._auth
        assert isinstance(auth, ClientCredentials)
        sim.plan("token", Fault(answer=Answer(200, token)))
        with pytest.raises(ProviderError):  # it is not the one that the vendor knows: a new one is asked for, once
            await adapter.list_managed("ownerown")
        assert auth.secrets == ("short",)
        await adapter.list_managed("ownerown")
        assert sim.count("token") == 3

    @pytest.mark.parametrize("status", [400, 401, 403])
    async def test_without_a_token_the_credential_is_refused(
        self, adapter: HttpProvider, sim: Vendor, status: int
    ) -> None:
        sim.plan("token", Fault(answer=sim.refusal(status, f"unknown {CLIENT} {SECRET}")))
        with pytest.raises(CredentialRefused) as refused:
            await adapter.list_managed("ownerown")
        assert CLIENT not in refused.value.detail

    @pytest.mark.parametrize("fault", [server.status(500), server.RESET, server.GARBAGE, server.NOTHING, server.CUT])
    async def test_a_create_without_a_token_was_not_sent(
        self, adapter: HttpProvider, sim: VerdaVendor, fault: Fault
    ) -> None:
        offer = await self.offer(adapter)
        fresh = self.make(sim)
        sim.plan("token", *[fault] * 3)
        with pytest.raises(Rejected) as rejected:
            await fresh.create(self.spec(adapter), offer, make_ref())
        assert (rejected.value.try_next_offer, sim.machines, sim.scripts) == (True, {}, {})
        await fresh.close()

    async def test_a_throttled_token_throttles(self, adapter: HttpProvider, sim: Vendor) -> None:
        sim.plan("token", server.status(429, Retry_After="9"))
        with pytest.raises(Throttled) as throttled:
            await adapter.list_managed("ownerown")
        assert throttled.value.wait == 9

    async def test_the_token_is_hidden_where_an_answer_repeats_it(
        self, adapter: HttpProvider, sim: VerdaVendor
    ) -> None:
        await adapter.list_managed("ownerown")
        sim.plan("list", *[Fault(answer=sim.refusal(500, f"bad {sim.tokens[-1]}"))] * 3)
        with pytest.raises(ProviderError) as error:
            await adapter.list_managed("ownerown")
        assert (sim.tokens[-1] in error.value.detail, "bad ***" in error.value.detail) == (False, True)

    # Creating

    async def test_what_is_ordered(self, adapter: HttpProvider, sim: VerdaVendor) -> None:
        ref = make_ref()
        machine = await self.create(adapter, sim, ref, ssh_public_key="ssh-ed25519 AAAA me")
        (script_id,) = sim.scripts
        assert sim.scripts[script_id]["name"] == ref
        assert machine.asked == {
            "instance_type": "1H100.80S.30V", "image": "ubuntu-24.04-cuda-12.8-open-docker", "location_code": "FIN-01",
            "hostname": ref, "description": f"{ref} 8000h-9000t-22t", "tags": [{"key": "gpubroker", "value": ref}],
            "ssh_key_ids": [], "startup_script_id": script_id, "os_volume": {"name": ref, "size": 50}, "is_spot": False,
            "contract": "PAY_AS_YOU_GO", "pricing": "FIXED_PRICE", "volumes": [], "existing_volumes": [], "coupon": None,
        }  # fmt: skip
        found = {e.name: e for e in (await adapter.get(machine.id)).endpoints}
        assert found["http-8000"].url == "http://135.181.63.50:8000"
        assert found["ssh"].command == "ssh root@135.181.63.50"

    async def test_a_spot_machine_takes_its_disk_with_it(self, adapter: HttpProvider, sim: VerdaVendor) -> None:
        (offer,) = [o for o in await adapter.list_offers() if o.spot and o.gpu_count == 8]
        created = await adapter.create(self.spec(adapter), offer, make_ref())
        asked = sim.machines[created.id].asked
        assert (asked["is_spot"], asked["contract"]) == (True, "SPOT")
        assert asked["os_volume"]["on_spot_discontinue"] == "delete_permanently"

    @pytest.mark.parametrize("body", [b"abc-1", b'"abc-1"\n', b'{"id": "abc-1", "status": "new"}'])
    async def test_an_id_is_read_as_it_comes(self, adapter: HttpProvider, sim: Vendor, body: bytes) -> None:
        sim.plan("create", Fault(answer=Answer(202, body, content_type="text/plain")))
        made = await adapter.create(self.spec(adapter), await self.offer(adapter), make_ref())
        assert made.id == "abc-1"

    @pytest.mark.parametrize(
        ("status", "body", "code"),
        [
            (402, {"code": "insufficient_funds", "message": "Top up"}, "no_balance"),
            (400, {"code": "insufficient_funds", "message": "Top up"}, "no_balance"),
            (503, {"code": "service_unavailable", "message": "No capacity available"}, "no_capacity"),
            (400, {"code": "invalid_request", "message": "Instance type is not available in FIN-01"}, "no_capacity"),
            (403, {"code": "forbidden_action", "message": "Not for you"}, "forbidden_action"),
        ],
    )
    async def test_what_refusals_mean(
        self, adapter: HttpProvider, sim: VerdaVendor, status: int, body: dict[str, str], code: str
    ) -> None:
        sim.plan("create", Fault(answer=Answer(status, body)))
        with pytest.raises(Rejected) as rejected:
            await adapter.create(self.spec(adapter), await self.offer(adapter), make_ref())
        assert (rejected.value.code, rejected.value.try_next_offer) == (code, True)
        assert sim.scripts == {}

    @pytest.mark.parametrize("said", ["Service is temporarily unavailable", "Service not available", "Upstream error"])
    async def test_a_503_that_names_no_machine_leaves_open_what_happened(
        self, adapter: HttpProvider, sim: VerdaVendor, said: str
    ) -> None:
        answer = Answer(503, {"code": "service_unavailable", "message": said})
        sim.plan("create", Fault(answer=answer, after=True))
        with pytest.raises(AmbiguousOutcome):
            await adapter.create(self.spec(adapter), await self.offer(adapter), make_ref())
        assert (len(sim.alive()), len(sim.scripts)) == (1, 1)

    async def test_a_create_that_may_have_happened_keeps_its_script(
        self, adapter: HttpProvider, sim: VerdaVendor
    ) -> None:
        ref = make_ref()
        sim.plan("create", server.RESET_AFTER)
        with pytest.raises(AmbiguousOutcome):
            await adapter.create(self.spec(adapter), await self.offer(adapter), ref)
        assert [script["name"] for script in sim.scripts.values()] == [ref]
        (found,) = await adapter.find_by_ref(ref)
        await adapter.terminate(found.id)
        assert (sim.scripts, sim.volumes) == ({}, set())

    async def test_without_a_script_nothing_is_ordered(self, adapter: HttpProvider, sim: VerdaVendor) -> None:
        offer = await self.offer(adapter)
        sim.plan("script", Fault(answer=sim.refusal(400, f"bad script {ENV['TOKEN']}")))
        with pytest.raises(Rejected) as rejected:
            await adapter.create(self.spec(adapter), offer, make_ref())
        assert ENV["TOKEN"] not in rejected.value.detail
        assert (sim.count("create"), sim.machines) == (0, {})

    # Looking and acting

    async def test_a_bad_id_is_an_instance_that_is_not_there(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        sim.plan("get", Fault(answer=Answer(400, {"code": "invalid_request", "message": "Invalid instance id"})))
        with pytest.raises(InstanceNotFound):
            await adapter.get(machine.id)

    async def test_delete_names_every_volume(self, adapter: HttpProvider, sim: VerdaVendor) -> None:
        machine = await self.create(adapter, sim)
        sim.extras = {"volume_ids": [f"vol-{machine.id}", "vol-more"]}
        await adapter.terminate(machine.id)
        (asked,) = [request.json for name, request in sim.requests if name == "terminate"]
        assert asked == {
            "action": "delete", "id": [machine.id], "volume_ids": ["vol-more", f"vol-{machine.id}"] if machine.id > "more" else
            [f"vol-{machine.id}", "vol-more"], "delete_permanently": True,
        }  # fmt: skip
        assert (sim.volumes, sim.scripts) == (set(), {})

    async def test_while_it_is_made_it_cannot_be_deleted(self, adapter: HttpProvider, sim: VerdaVendor) -> None:
        sim.boots_at_once = False
        machine = await self.create(adapter, sim)
        with pytest.raises(Throttled):
            await adapter.terminate(machine.id)
        sim.extras = {"os_volume_id": f"vol-{machine.id}"}
        with pytest.raises(Throttled):
            await adapter.terminate(machine.id)
        sim.extras = {}
        sim.run(machine)
        await adapter.terminate(machine.id)
        assert (sim.alive(), sim.volumes, sim.scripts) == ([], set(), {})

    async def test_a_refused_action_is_no_success(self, adapter: HttpProvider, sim: VerdaVendor) -> None:
        machine = await self.create(adapter, sim)
        said = [{"action": "delete", "instanceId": machine.id, "status": "error", "error": "no", "statusCode": 500}]
        sim.plan("terminate", Fault(answer=Answer(207, said)))
        with pytest.raises(Rejected):
            await adapter.terminate(machine.id)
        assert (sim.alive(), len(sim.scripts)) == ([machine], 1)

    @pytest.mark.parametrize("body", [b"", b"Accepted", b'{"results": []}', b"null"])
    async def test_what_is_accepted_is_accepted_in_any_words(
        self, adapter: HttpProvider, sim: VerdaVendor, body: bytes
    ) -> None:
        machine = await self.create(adapter, sim)
        sim.plan("stop", Fault(answer=Answer(202, body), after=True))
        await adapter.stop(machine.id)
        sim.plan("stop", Fault(answer=Answer(207, body or b"null")))
        with pytest.raises(AmbiguousOutcome):
            await adapter.stop(machine.id)

    @pytest.mark.parametrize("tags", [["theirs"], {"a": "b"}, None, "text", [{"key": "free"}]])
    async def test_tags_of_others_may_have_any_shape(
        self, adapter: HttpProvider, sim: VerdaVendor, tags: object
    ) -> None:
        machine = await self.create(adapter, sim)
        sim.extras = {"tags": tags}
        assert [instance.id for instance in await adapter.list_managed("ownerown")] == [machine.id]
        sim.extras = {"tags": [machine.name], "hostname": "renamed", "description": ""}
        assert (await adapter.get(machine.id)).ref == machine.name

    async def test_off_bills_as_if_it_ran(self, adapter: HttpProvider, sim: VerdaVendor) -> None:
        machine = await self.create(adapter, sim)
        await adapter.stop(machine.id)
        seen = await adapter.get(machine.id)
        assert (seen.life, seen.billing, seen.endpoints) == ("stopped", "full", ())
