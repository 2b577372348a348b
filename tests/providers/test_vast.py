"""Vast.ai: the contract, and what is Vast.ai's alone."""

import dataclasses
from datetime import UTC, datetime

import pytest
from tests.factories import World
from tests.providers.contract import HttpProviderContract, make_ref
from tests.providers.vendors.server import Answer, Fault, Machine, Vendor
from tests.providers.vendors.vast import VastVendor

from gpubroker import catalog, sweep
from gpubroker.errors import (
    AmbiguousOutcome,
    CannotDo,
    CredentialRefused,
    InstanceNotFound,
    ProviderError,
    Rejected,
    Throttled,
)
from gpubroker.providers.base import Port, ProviderOffer
from gpubroker.providers.http.adapter import HttpProvider


class TestVast(HttpProviderContract):
    vendor = VastVendor

    def rename(self, machine: Machine, name: str) -> None:
        machine.name = name

    async def find(self, adapter: HttpProvider, number: str, *, spot: bool = False) -> ProviderOffer:
        (found,) = [o for o in await adapter.list_offers() if (o.provider_offer_id, o.spot) == (number, spot)]
        return found

    # Offers

    async def test_offers_are_the_hosts_machines_as_they_are(self, adapter: HttpProvider) -> None:
        offers = {(o.provider_offer_id, o.spot): o for o in await adapter.list_offers()}
        assert set(offers) == {
            ("30000001", False), ("30000001", True), ("30000002", False), ("30000002", True), ("30000003", False),
        }  # fmt: skip
        one = offers["30000001", False]
        assert (one.gpu, one.gpu_count, one.vram_gb, one.country, one.region) == (
            "RTX 4090",
            1,
            24,
            "US",
            "California, US",
        )
        assert (one.vcpus, one.ram_gb, one.disk_gb) == (8.0, 32.1, 841)
        assert (one.price_micro_h, one.stopped_micro_h, one.disk_micro_gb_h) == (404_000, 4000, 200)
        bid = offers["30000001", True]
        assert (bid.price_micro_h, bid.stopped_micro_h) == (211_111 + 4000, 4000)
        untold = offers["30000002", False]
        assert (untold.vcpus, untold.ram_gb) == (8.0, 0.0)
        closed = offers["30000003", False]
        assert (closed.region, closed.country, closed.supports & {"ports", "ssh"}) == ("US", "US", frozenset())

    async def test_as_many_offers_as_can_be_asked_for_may_be_a_part(self, adapter: HttpProvider, sim: Vendor) -> None:
        sim.plan("offers", Fault(answer=Answer(200, {"offers": [{}] * 50_000})))
        with pytest.raises(ProviderError, match="incomplete"):
            await adapter.list_offers()

    async def test_searches_are_counted_until_midnight(self, adapter: HttpProvider, sim: Vendor) -> None:
        spent = {"success": False, "error": "search_quota_exceeded", "msg": "Daily search quota exceeded"}
        sim.plan("offers", Fault(answer=Answer(429, spent)))
        with pytest.raises(Throttled) as throttled:
            await adapter.list_offers()
        now = datetime.now(UTC)
        left = 86400 - (now.hour * 3600 + now.minute * 60 + now.second)
        assert ("search_quota_exceeded" in throttled.value.detail, sim.count("offers")) == (True, 1)
        assert abs(throttled.value.wait - left) < 5

    async def test_a_search_with_a_bad_key_is_a_404(self, adapter: HttpProvider, sim: Vendor) -> None:
        sim.is_dead = True
        with pytest.raises(CredentialRefused):
            await adapter.list_offers()

    async def test_too_frequent_is_asked_again_in_a_second(self, adapter: HttpProvider, sim: Vendor) -> None:
        often = Answer(429, b"API requests too frequent: endpoint threshold=1.0", content_type="text/plain")
        sim.plan("create", Fault(answer=often))
        with pytest.raises(Throttled) as throttled:
            await adapter.create(self.spec(adapter), await self.offer(adapter), make_ref())
        assert throttled.value.wait == 1.0

    # Creating

    async def test_what_is_sent(self, adapter: HttpProvider, sim: Vendor) -> None:
        ports = (Port(8000, "http"), Port(9000), Port(5353, "udp"))
        auth = {"username": "me", "password": "it's secret"}
        image = "registry.example.com:5000/me/it:1"
        ref = make_ref()
        machine = await self.create(
            adapter, sim, ref, ports=ports, registry_auth=auth, image=image, disk_gb=0, env={"A": "b"}
        )
        assert machine.asked == {
            "image": image, "label": ref, "disk": 20, "runtype": "args", "target_state": "running", "cancel_unavail": True,
            "env": {"A": "b", "-p 8000:8000": "1", "-p 9000:9000": "1", "-p 5353:5353/udp": "1"},
            "args": list(self.spec(adapter).command),
            "image_login": "-u me -p 'it'\"'\"'s secret' registry.example.com:5000",
        }  # fmt: skip
        plain = await self.create(
            adapter, sim, image="me/it", registry_auth={"username": "u", "password": "p"}, command=()
        )
        assert plain.asked["image_login"] == "-u u -p p docker.io"
        assert "args" not in plain.asked

    async def test_with_a_key_there_is_an_sshd_and_the_command_starts_with_it(
        self, adapter: HttpProvider, sim: Vendor
    ) -> None:
        machine = await self.create(adapter, sim, ssh_public_key="ssh-ed25519 AAAA me", command=("sleep", "1 2"))
        key = "mkdir -p ~/.ssh; echo 'ssh-ed25519 AAAA me' > ~/.ssh/authorized_keys"
        assert (machine.asked["runtype"], machine.asked["onstart"]) == ("ssh_direct", f"{key}; sleep '1 2'")
        (ssh,) = [e for e in (await adapter.get(machine.id)).endpoints if e.name == "ssh"]
        assert ssh.command == f"ssh root@63.135.50.11 -p {ssh.external_port}"
        with pytest.raises(Rejected, match="command_too_long"):
            await self.create(adapter, sim, ssh_public_key="ssh-ed25519 AAAA me", command=("x" * 4048,))

    async def test_an_image_is_needed(self, adapter: HttpProvider, sim: Vendor) -> None:
        with pytest.raises(Rejected) as rejected:
            await self.create(adapter, sim, image=None)
        assert not rejected.value.try_next_offer

    @pytest.mark.parametrize("status", [200, 400, 500])
    async def test_an_error_that_carries_a_contract_made_it(
        self, adapter: HttpProvider, sim: Vendor, status: int
    ) -> None:
        body = {"success": False, "error": "internal", "msg": "?", "new_contract": 4711}
        sim.plan("create", Fault(answer=Answer(status, body)))
        with pytest.raises(AmbiguousOutcome) as ambiguous:
            await adapter.create(self.spec(adapter), await self.offer(adapter), make_ref())
        assert ambiguous.value.maybe_id == "4711"

    @pytest.mark.parametrize(
        ("status", "error", "code"),
        [
            (404, "invalid_args", "no_capacity"),
            (410, "no_such_ask", "no_capacity"),
            (403, "invalid_args", "offer_barred"),
        ],
    )
    async def test_an_offer_that_cannot_be_had_is_left_for_the_next(
        self, adapter: HttpProvider, sim: Vendor, status: int, error: str, code: str
    ) -> None:
        sim.plan("create", Fault(answer=Answer(status, {"success": False, "error": error, "msg": "no"})))
        with pytest.raises(Rejected) as rejected:
            await adapter.create(self.spec(adapter), await self.offer(adapter), make_ref())
        assert (rejected.value.code, rejected.value.try_next_offer) == (code, True)

    async def test_a_bid_is_for_the_machine_and_may_be_lost(self, adapter: HttpProvider, sim: VastVendor) -> None:
        offer = await self.find(adapter, "30000001", spot=True)
        with_disk = dataclasses.replace(offer, price_micro_h=offer.price_micro_h + 30 * 200, stopped_micro_h=50 * 200)
        created = await adapter.create(self.spec(adapter), with_disk, make_ref())
        machine = sim.machines[created.id]
        assert (machine.asked["price"], machine.asked["disk"]) == (0.211111, 50)
        sim.shift += 3600
        assert abs(sim.bill(machine) - with_disk.price_micro_h) < 10
        sim.outbid.add(machine.id)
        seen = await adapter.get(machine.id)
        assert (seen.life, seen.billing, seen.endpoints) == ("interrupted", "storage", ())

    # Listing and looking

    async def test_a_listing_that_is_shorter_than_it_says_is_none(self, adapter: HttpProvider, sim: Vendor) -> None:
        page = {"success": True, "instances": [], "total_instances": 1, "next_token": None}
        sim.plan("list", Fault(answer=Answer(200, page)))
        with pytest.raises(ProviderError, match="incomplete"):
            await adapter.list_managed("ownerown")

    async def test_a_look_up_asks_for_the_label(self, adapter: HttpProvider, sim: Vendor) -> None:
        ref = make_ref()
        await adapter.find_by_ref(ref)
        (asked,) = [request for name, request in sim.requests if name == "list"]
        assert asked.query["select_filters"] == ['{"label": {"eq": "' + ref + '"}}']

    async def test_an_instance_without_a_status_is_being_made(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        said = {
            "id": int(machine.id),
            "label": machine.name,
            "actual_status": None,
            "cur_state": "running",
            "ports": [8000],
        }
        sim.plan("get", Fault(answer=Answer(200, {"instances": said})))
        seen = await adapter.get(machine.id)
        assert (seen.life, seen.billing, seen.status) == ("starting", "storage", "null")

    async def test_an_answer_without_the_instance_is_no_end(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        sim.plan("get", Fault(answer=Answer(200, {})), Fault(answer=sim.refusal(400, "too many arguments")))
        for code in ("unreadable", "http_400"):
            with pytest.raises(ProviderError, match=code):
                await adapter.get(machine.id)
        sim.plan("get", Fault(answer=Answer(404, {"msg": "no"})), Fault(answer=sim.refusal(400, "Invalid instance ID")))
        for _ in range(2):
            with pytest.raises(InstanceNotFound):
                await adapter.get(machine.id)

    @pytest.mark.parametrize("status", [None, "loading", "exited", "stopped", "offline"])
    async def test_what_was_stopped_before_it_ran_has_stopped(
        self, adapter: HttpProvider, sim: Vendor, status: str | None
    ) -> None:
        machine = await self.create(adapter, sim)
        await adapter.stop(machine.id)
        sim.extras = {"actual_status": status}
        seen = await adapter.get(machine.id)
        assert (seen.life, seen.billing) == (("unknown",) * 2 if status == "offline" else ("stopped", "storage"))

    async def test_ssh_through_the_proxy_where_there_is_no_port(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        said = {
            "id": int(machine.id), "label": machine.name, "actual_status": "running", "image_runtype": "ssh ssh_proxy",
            "ports": {"8000/tcp": None, "9000/tcp": [{"HostIp": "0.0.0.0", "HostPort": "none"}]}, "public_ipaddr": "63.135.50.11",
            "ssh_host": "ssh7.vast.ai", "ssh_port": 10882,
        }  # fmt: skip
        sim.plan("get", Fault(answer=Answer(200, {"instances": said})))
        (ssh,) = (await adapter.get(machine.id)).endpoints
        assert (ssh.name, ssh.port, ssh.command) == ("ssh", 22, "ssh root@ssh7.vast.ai -p 10882")

    # Acting

    async def test_a_start_that_would_wait_for_the_gpu_is_taken_back(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        await adapter.stop(machine.id)
        sim.has_room = False
        with pytest.raises(Rejected, match="no_capacity"):
            await adapter.start(machine.id)
        assert (machine.life, machine.asked.get("queued"), sim.count("stop")) == ("stopped", None, 2)
        machine.asked["queued"] = True
        assert (await adapter.get(machine.id)).life == "starting"

    async def test_not_done_is_no_success(self, adapter: HttpProvider, sim: Vendor) -> None:
        machine = await self.create(adapter, sim)
        sim.plan("terminate", Fault(answer=Answer(200, {"success": False, "msg": "try later"})))
        with pytest.raises(ProviderError):
            await adapter.terminate(machine.id)
        assert sim.alive() == [machine]

    # Logs and commands

    async def test_results_are_waited_for(self, adapter: HttpProvider, sim: VastVendor) -> None:
        machine = await self.create(adapter, sim)
        sim.waits, adapter.http.poll_seconds = 2, 0.01
        page = await adapter.logs(machine.id, after=None, since=None, limit=100)
        assert (page.data, sim.count("result")) == (b"one\ntwo\nthree\n", 3)
        said = await adapter.exec(machine.id, ["ls", "-l", "a b"], stdin=None, timeout_seconds=5)
        assert (said.exit_code, said.stdout, said.stderr, said.truncated) == (None, b"of ls -l 'a b'\n", b"", False)
        sim.waits = 10_000
        late = await adapter.exec(machine.id, ["du"], stdin=None, timeout_seconds=0)
        assert (late.exit_code, late.stdout) == (None, b"")

    async def test_a_long_answer_is_cut(self, adapter: HttpProvider, sim: VastVendor) -> None:
        machine = await self.create(adapter, sim)
        sim.plan("exec", Fault(answer=Answer(200, {"success": True, "result_url": f"{sim.url}/results/0"})))
        adapter.http.largest_result = 1 << 22
        sim.results["0"] = [Answer(200, b"x" * (1024 * 1024 + 1), content_type="text/plain")]
        said = await adapter.exec(machine.id, ["ls"], stdin=None, timeout_seconds=5)
        assert (len(said.stdout), said.truncated) == (1024 * 1024, True)

    @pytest.mark.parametrize(
        "url",
        [
            "http://s3.amazonaws.com/x",
            "https://elsewhere.example/x",
            "https://s3.amazonaws.com.evil.example/x",
            "file:///etc/passwd",
        ],
    )
    async def test_results_lie_where_they_may_and_nowhere_else(
        self, adapter: HttpProvider, sim: Vendor, url: str
    ) -> None:
        machine = await self.create(adapter, sim)
        for name, call in {
            "logs": adapter.logs(machine.id, after=None, since=None, limit=100),
            "exec": adapter.exec(machine.id, ["ls"], stdin=None, timeout_seconds=5),
        }.items():
            sim.plan(name, Fault(answer=Answer(200, {"success": True, "result_url": url})))
            with pytest.raises(ProviderError, match="bad_result_url"):
                await call

    async def test_commands_are_short_and_not_all_are_let_run(self, adapter: HttpProvider, sim: VastVendor) -> None:
        machine = await self.create(adapter, sim)
        await adapter.exec(machine.id, ["ls", "x" * 509], stdin=None, timeout_seconds=5)
        assert [len(command) for command in sim.commands] == [512]
        with pytest.raises(CannotDo):
            await adapter.exec(machine.id, ["ls", "x" * 510], stdin=None, timeout_seconds=5)
        with pytest.raises(CannotDo):
            await adapter.exec(machine.id, ["ls"], stdin=b"in", timeout_seconds=5)
        with pytest.raises(CannotDo, match="Invalid command given"):
            await adapter.exec(machine.id, ["nvidia-smi"], stdin=None, timeout_seconds=5)
        await adapter.stop(machine.id)
        with pytest.raises(Rejected):
            await adapter.exec(machine.id, ["ls"], stdin=None, timeout_seconds=5)
        assert len(sim.commands) == 1

    # Through the broker

    async def test_a_program_that_ends_gives_its_machine_back(
        self, world: World, sim: Vendor, adapter: HttpProvider
    ) -> None:
        world.adapters._made = {"vast": adapter}
        await catalog.refresh_offers(adapter, 60)
        pod = await world.root.pod(
            requirements={"gpu": ["RTX 4090"], "spot": False}, image="busybox:1", ports=[{"port": 8000, "protocol": "http"}],
            max_lifetime_seconds=7200,
        )  # fmt: skip
        await world.drive_due()
        path, (machine,) = f"/v1/pods/{pod['id']}", sim.machines.values()
        (endpoint,) = (await world.root.get(path))["endpoints"]
        assert (endpoint["name"], endpoint["protocol"]) == ("http-8000", "http")
        assert endpoint["url"] == f"http://63.135.50.11:{endpoint['external_port']}"
        machine.status = "exited"
        await sweep.sweep(world.adapters, "vast")
        assert (await world.root.get(path))["state"] == "stopped"
        machine.status = None
        await world.drive_due()
        seen = await world.root.get(path)
        assert (seen["state"], seen["billing"], machine.life) == ("stopped", "storage", "stopped")
        assert sim.count("stop") == 1
