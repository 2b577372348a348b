"""What every provider must keep, a vendor, this machine or a cluster: `class TestX(ProviderContract)`.

A subclass gives the adapter, the real one, and says what a program is there. What a provider cannot do is read from its offers and
capabilities, never from its name. `tests.providers.contract` adds what is about HTTP.
"""

import asyncio
import dataclasses
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import pytest

from gpubroker import deadman, trial
from gpubroker.errors import CannotDo, InstanceNotFound, Rejected
from gpubroker.ids import base36
from gpubroker.providers import base

OWNER = "ownerown"
HOUR = 3600
ENV = {"TOKEN": "hunter2-hunter2", "HOSTILE": "a 'b' \"c\" $d\n{e}\\ é 🦊"}
PROGRAM = ("sh", "-c", "trap 'exit 0' TERM; echo one; echo two; echo three; sleep 600 & wait")
SAID = b"one\ntwo\nthree\n"
Observe = Callable[[str], Awaitable[Mapping[str, str]]]


def make_ref(owner: str = OWNER) -> str:
    """A reference as long as they are."""
    attempt = "".join(secrets.choice("0123456789abcdefghjkmnpqrstvwxyz") for _ in range(26))
    return f"gb-{owner}-{attempt}-{base36(int(datetime.now(UTC).timestamp()) + HOUR)}"


class ProviderContract:
    """The contract. A subclass gives `adapter`, and says what below does not fit it."""

    pytestmark = pytest.mark.anyio
    owner: ClassVar[str] = OWNER
    program: ClassVar[tuple[str, ...]] = PROGRAM
    """It says three lines and goes on."""
    image: ClassVar[str] = "busybox:1"
    disk_gb: ClassVar[int] = 50
    patience_seconds: ClassVar[float] = 15.0
    """So long a change may take to show."""
    pause_seconds: ClassVar[float] = 0.02

    @classmethod
    def count_checks(cls) -> int:
        """How many tests it is, with each of their cases."""
        tests = [member for name in dir(cls) if name.startswith("test_") and callable(member := getattr(cls, name))]
        return sum(
            math.prod(len(mark.args[1]) for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize")
            for test in tests
        )

    # Parts

    @pytest.fixture
    def adapter(self) -> base.Provider:
        """The adapter, at an account that has nothing of ours; nothing of ours is left there."""
        raise NotImplementedError

    @pytest.fixture
    def observe(self, adapter: base.Provider) -> Observe:
        """What a program finds in its environment, seen from beside it."""

        async def look(instance_id: str) -> Mapping[str, str]:
            said = await adapter.exec(instance_id, ("cat", "/proc/self/environ"), stdin=None, timeout_seconds=20)
            assert said.exit_code == 0, said
            return dict(one.split("=", 1) for one in said.stdout.decode().split("\0") if one)

        return look

    @pytest.fixture
    def absent(self) -> str:
        """An id that the provider never gave."""
        return make_ref(self.owner)

    def spec(self, adapter: base.Provider, **changes: Any) -> base.Spec:
        """What a provider of this kind can run."""
        has = adapter.capabilities.supports
        spec = base.Spec(
            pod_id="pod_1",
            command=self.program,
            image=self.image if "image" in has else None,
            env=ENV,
            ports=(base.Port(8000, "http"), base.Port(9000)) if "ports" in has else (),
            disk_gb=self.disk_gb,
            hard_stop_at=datetime.now(UTC) + timedelta(hours=1),
        )
        return dataclasses.replace(spec, **changes)

    async def offer(self, adapter: base.Provider) -> base.ProviderOffer:
        """The cheapest of the smallest."""
        offers = [offer for offer in await adapter.list_offers() if offer.availability != "none" and not offer.spot]
        return min(offers, key=lambda offer: (offer.gpu_count, offer.price_micro_h, offer.region))

    async def rent(self, adapter: base.Provider, ref: str | None = None, **changes: Any) -> base.Instance:
        """An instance that runs."""
        spec, offer = self.spec(adapter, **changes), await self.offer(adapter)
        created = await adapter.create(spec, offer, ref or make_ref(self.owner))
        return await self.await_life(adapter, created.id, "running")

    async def await_life(self, adapter: base.Provider, instance_id: str, *lives: base.Life) -> base.Instance:
        """Look until it is in one of these lives."""
        until = time.monotonic() + self.patience_seconds
        while (seen := await adapter.get(instance_id)).life not in lives:
            assert time.monotonic() < until, seen
            await asyncio.sleep(self.pause_seconds)
        return seen

    async def await_end(self, adapter: base.Provider, instance_id: str) -> None:
        """Look until it is gone, or known no more."""
        try:
            await self.await_life(adapter, instance_id, "gone")
        except InstanceNotFound:
            return

    # Offers

    async def test_offers_are_complete_and_each_is_one(self, adapter: base.Provider) -> None:
        offers = await adapter.list_offers()
        keys = [(offer.provider_offer_id, offer.region, offer.spot) for offer in offers]
        assert len(keys) == len(set(keys)) > 0

    async def test_offers_are_sane(self, adapter: base.Provider) -> None:
        for offer in await adapter.list_offers():
            assert isinstance(offer.price_micro_h, int)
            assert offer.price_micro_h > 0
            assert offer.supports <= adapter.capabilities.supports
            assert offer.region
            assert offer.country is None or (len(offer.country) == 2 and offer.country.isupper())
            assert offer.gpu_count > 0 or offer.gpu is None
            assert offer.disk_gb >= offer.disk_base_gb >= 0
            assert offer.increment_s > 0
            assert offer.spot <= adapter.capabilities.spot

    # Creating

    async def test_a_created_instance_is_found_by_its_reference(self, adapter: base.Provider) -> None:
        ref = make_ref(self.owner)
        mine = await self.rent(adapter, ref)
        other = await self.rent(adapter)
        (found,) = await adapter.find_by_ref(ref)
        assert (found.id, found.ref, mine.ref) == (mine.id, ref, ref)
        assert {instance.id for instance in await adapter.list_managed(self.owner)} == {mine.id, other.id}

    async def test_a_reference_that_nothing_carries_finds_nothing(self, adapter: base.Provider) -> None:
        assert list(await adapter.find_by_ref(make_ref(self.owner))) == []
        assert list(await adapter.list_managed(self.owner)) == []

    async def test_hostile_values_arrive_unharmed(self, adapter: base.Provider, observe: Observe) -> None:
        seen = await observe((await self.rent(adapter)).id)
        assert {name: seen.get(name) for name in ENV} == ENV

    async def test_two_creates_at_once_do_not_mix(self, adapter: base.Provider, observe: Observe) -> None:
        refs = [make_ref(self.owner) for _ in range(2)]
        made = await asyncio.gather(*(self.rent(adapter, ref, env={"WHICH": ref}) for ref in refs))
        assert [instance.ref for instance in made] == refs
        assert [(await observe(instance.id))["WHICH"] for instance in made] == refs
        assert len({instance.id for instance in made}) == 2

    async def test_a_create_that_is_given_up_leaves_nothing_that_cannot_be_ended(self, adapter: base.Provider) -> None:
        """Whatever was made is found by its reference: a caller that was cancelled may end it all."""
        ref, offer = make_ref(self.owner), await self.offer(adapter)
        giving_up = asyncio.create_task(adapter.create(self.spec(adapter), offer, ref))
        await asyncio.sleep(0.01)
        giving_up.cancel()
        await asyncio.wait([giving_up], timeout=self.patience_seconds)
        assert giving_up.done()
        found: list[base.Instance] = []
        for _ in range(3):  # what was on its way when it was given up may come yet
            found = [instance for instance in await adapter.find_by_ref(ref) if instance.life != "gone"]
            for instance in found:
                await adapter.terminate(instance.id)
                await self.await_end(adapter, instance.id)
            await asyncio.sleep(5 * self.pause_seconds)
        assert found == []
        assert list(await adapter.list_managed(self.owner)) == []

    async def test_no_secret_is_in_a_log_a_repr_or_an_error(
        self, adapter: base.Provider, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        spec, offer = self.spec(adapter), await self.offer(adapter)
        created = await adapter.create(spec, offer, make_ref(self.owner))
        seen = await self.await_life(adapter, created.id, "running")
        shown = [repr(each) for each in (adapter, vars(adapter), spec, created, seen)]
        text = "\n".join([*shown, *(record.getMessage() for record in caplog.records), await adapter.account()])
        assert ENV["TOKEN"] not in text

    # Looking

    async def test_a_listing_has_the_owners_and_no_others(self, adapter: base.Provider) -> None:
        other = secrets.token_hex(4)
        mine, theirs = await self.rent(adapter), await self.rent(adapter, make_ref(other))
        assert [instance.id for instance in await adapter.list_managed(self.owner)] == [mine.id]
        assert [instance.id for instance in await adapter.list_managed(other)] == [theirs.id]
        await adapter.terminate(theirs.id)
        await self.await_end(adapter, theirs.id)

    async def test_what_was_never_made_is_not_found(self, adapter: base.Provider, absent: str) -> None:
        later = datetime.now(UTC) + timedelta(hours=2)
        for call in (adapter.get, adapter.terminate):
            with pytest.raises(InstanceNotFound):
                await call(absent)
        for act in (
            lambda: adapter.stop(absent),
            lambda: adapter.start(absent),
            lambda: adapter.restart(absent),
            lambda: adapter.extend(absent, later),
            lambda: adapter.logs(absent, after=None, since=None, limit=10),
            lambda: adapter.exec(absent, ("true",), stdin=None, timeout_seconds=5),
        ):
            with pytest.raises((InstanceNotFound, CannotDo, Rejected)):
                await act()

    async def test_ports_can_be_reached_where_it_says(self, adapter: base.Provider) -> None:
        if "ports" not in adapter.capabilities.supports:
            pytest.skip("it forwards no ports")
        seen = await self.rent(adapter)
        found = {e.port: e.protocol for e in seen.endpoints}
        assert found[8000] in {"http", "tcp"}  # who forwards it as TCP does not know: `pods.present` names it
        assert found[9000] == "tcp"
        for endpoint in seen.endpoints:
            assert endpoint.host
            assert 0 < endpoint.external_port < 65536
            assert endpoint.protocol != "http" or (endpoint.url or "").startswith("http")

    async def test_the_hard_stop_is_carried(self, adapter: base.Provider) -> None:
        ref = make_ref(self.owner)
        named = datetime.fromtimestamp(int(ref.rpartition("-")[2], 36), UTC)
        await self.rent(adapter, ref, hard_stop_at=named)
        (listed,) = await adapter.list_managed(self.owner)
        assert deadman.find_hard_stop(listed) == named
        if adapter.capabilities.ttl:
            assert listed.hard_stop_at == named

    async def test_the_account_lasts_and_has_no_secret(self, adapter: base.Provider) -> None:
        first = await adapter.account()
        assert first
        assert await adapter.account() == first

    # Acting

    async def test_terminating_twice_is_harmless_and_what_is_gone_stays_gone(self, adapter: base.Provider) -> None:
        ended, other = await self.rent(adapter), await self.rent(adapter)
        for _ in range(2):
            try:
                await adapter.terminate(ended.id)
            except InstanceNotFound:
                break
        await self.await_end(adapter, ended.id)
        await self.await_end(adapter, ended.id)
        assert [instance.id for instance in await adapter.list_managed(self.owner)] == [other.id]
        assert all(instance.life == "gone" for instance in await adapter.find_by_ref(ended.ref or ""))

    async def test_stop_and_start(self, adapter: base.Provider) -> None:
        instance = await self.rent(adapter)
        if "stop" not in (await self.offer(adapter)).supports:
            with pytest.raises(CannotDo):
                await adapter.stop(instance.id)
            return
        await adapter.stop(instance.id)
        seen = await self.await_life(adapter, instance.id, "stopped")
        assert (seen.billing, seen.endpoints) == (adapter.capabilities.stopped_billing, ())
        await adapter.start(instance.id)
        assert (await self.await_life(adapter, instance.id, "running")).ref == instance.ref

    async def test_restart_keeps_it_running_or_cannot_be(self, adapter: base.Provider) -> None:
        instance = await self.rent(adapter)
        try:
            await adapter.restart(instance.id)
        except CannotDo:
            return
        assert (await self.await_life(adapter, instance.id, "running")).ref == instance.ref

    async def test_the_end_can_be_moved_or_not(self, adapter: base.Provider) -> None:
        instance, later = await self.rent(adapter), datetime.now(UTC).replace(microsecond=0) + timedelta(hours=2)
        if not adapter.capabilities.moves_hard_stop:
            with pytest.raises(CannotDo):
                await adapter.extend(instance.id, later)
            return
        await adapter.extend(instance.id, later)
        (listed,) = await adapter.list_managed(self.owner)
        assert (listed.hard_stop_at, deadman.find_hard_stop(listed)) == (later, later)

    async def test_a_command_is_executed_or_cannot_be(self, adapter: base.Provider) -> None:
        instance = await self.rent(adapter)
        call = adapter.exec(instance.id, ("true",), stdin=None, timeout_seconds=20)
        if "exec" in adapter.capabilities.supports:
            assert (await call).exit_code in {0, None}
            return
        with pytest.raises(CannotDo):
            await call

    async def test_a_log_is_read_whole_and_in_parts(self, adapter: base.Provider) -> None:
        instance = await self.rent(adapter)
        if "logs" not in adapter.capabilities.supports:
            with pytest.raises(CannotDo):
                await adapter.logs(instance.id, after=None, since=None, limit=1000)
            return
        until = time.monotonic() + self.patience_seconds
        while (whole := await adapter.logs(instance.id, after=0, since=None, limit=1000)).data != SAID:
            assert time.monotonic() < until, whole
            await asyncio.sleep(self.pause_seconds)
        first = await adapter.logs(instance.id, after=0, since=None, limit=4)
        rest = await adapter.logs(instance.id, after=first.starts_at + len(first.data), since=None, limit=1000)
        assert (first.data, rest.data) == (b"one\n", b"two\nthree\n")
        assert (await adapter.logs(instance.id, after=None, since=None, limit=6)).data == b"three\n"
        end = rest.starts_at + len(rest.data)
        assert (await adapter.logs(instance.id, after=end, since=None, limit=1000)).data == b""

    # Without a broker

    async def test_the_dead_man_leaves_what_has_time_left(self, adapter: base.Provider) -> None:
        instance = await self.rent(adapter)
        (report,) = await deadman.switch_off([adapter], self.owner)
        assert (report.error, report.listed, report.ended) == (None, 1, ())
        assert (await adapter.get(instance.id)).life == "running"

    async def test_a_check_says_how_it_stands(self, adapter: base.Provider) -> None:
        await self.rent(adapter)
        standing = await trial.check(adapter, self.owner)
        assert (standing.error, standing.account, standing.instances) == (None, await adapter.account(), 1)
        assert standing.offers > 0
        can = {support for offer in await adapter.list_offers() for support in offer.supports}
        assert set(standing.lacks) == set(trial.EVERYTHING) - can

    async def test_a_live_trial_leaves_nothing(self, adapter: base.Provider, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trial, "_IMAGE", self.image)
        steps = await trial.Trial(adapter, self.owner, 10**9, look_seconds=self.pause_seconds).run()
        assert [step for step in steps if step.error] == []
        assert {"create", "run", "destroy"} <= {step.what for step in steps}
        assert list(await adapter.list_managed(self.owner)) == []

    def test_its_capabilities_are_sane(self) -> None:
        can = self.provider().capabilities
        assert 0 < can.call_limit_seconds <= 30
        assert 0 < can.create_limit_seconds <= 120
        assert can.boot_limit_seconds > can.boot_seconds > 0
        assert can.termination_allowance_seconds > 0
        for support in ("exec", "logs", "stop"):
            assert (support in can.supports) == (
                getattr(self.provider(), support) is not getattr(base.Provider, support)
            )
        assert can.restarts == (self.provider().restart is not base.Provider.restart)
        moves = self.provider().extend is not base.Provider.extend
        assert can.moves_hard_stop == moves
        assert can.moves_hard_stop or not can.ttl, "an end of the provider's own must move with the pod's"

    @classmethod
    def provider(cls) -> type[base.Provider]:
        """The adapter's class."""
        raise NotImplementedError
