"""The dead man's switch: with everything of ours dead, what is past its hard stop is destroyed, and nothing else."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from tests.simulator import OFFERS, Simulated

from gpubroker import deadman
from gpubroker.attempts import make_ref
from gpubroker.errors import InstanceNotFound, ProviderError, Throttled
from gpubroker.providers import base

pytestmark = pytest.mark.anyio
OWNER = "deadman1"


async def rent(provider: Simulated, n: int, hard_stop: timedelta, owner: str = OWNER) -> str:
    ref = make_ref(owner, f"att_{n:026}", datetime.now(UTC) + hard_stop)
    spec = base.Spec("pod_1", ("true",), None, {}, (), 10, datetime.now(UTC) + hard_stop)
    return (await provider.create(spec, OFFERS[0], ref)).id


def alive(provider: Simulated) -> set[str]:
    return set(provider.alive())


async def test_only_what_is_past_its_hard_stop_and_ours_is_destroyed() -> None:
    first, second = Simulated(), Simulated()
    late, live = await rent(first, 1, -timedelta(seconds=2)), await rent(first, 2, timedelta(hours=1))
    others = await rent(first, 3, -timedelta(days=9), owner="another1")
    also = await rent(second, 4, -timedelta(days=400))
    reports = await deadman.switch_off([first, second], OWNER)
    assert (alive(first), alive(second)) == ({live, others}, set())
    assert [[end.instance_id for end in report.ended] for report in reports] == [[late], [also]]
    assert all(report.is_good for report in reports)
    assert reports[0].listed == 2
    assert [report.ended for report in await deadman.switch_off([first, second], OWNER)] == [(), ()]


async def test_a_provider_that_fails_holds_no_other_up_and_is_reported() -> None:
    dead, good = Simulated(), Simulated()
    dead.fail["list_managed"] = [ProviderError("http_500", "again")]
    await rent(dead, 1, -timedelta(seconds=2))
    await rent(good, 2, -timedelta(seconds=2))
    failed, done = await deadman.switch_off([dead, good], OWNER)
    assert (failed.is_good, done.is_good, alive(good)) == (False, True, set())
    assert failed.error is not None
    assert "http_500" in failed.error
    again, _ = await deadman.switch_off([dead, good], OWNER)
    assert (again.is_good, alive(dead)) == (True, set())


async def test_a_refused_end_is_reported_and_one_that_is_unknown_is_done() -> None:
    provider = Simulated()
    refused = await rent(provider, 1, -timedelta(seconds=2))
    provider.fail["terminate"] = [Throttled("too_many", wait=1)]
    (report,) = await deadman.switch_off([provider], OWNER)
    assert (report.is_good, alive(provider)) == (False, {refused})
    provider.fail["terminate"] = [InstanceNotFound("gone")]
    (report,) = await deadman.switch_off([provider], OWNER)
    assert report.is_good


async def test_a_hard_stop_that_the_provider_moved_counts() -> None:
    provider = Simulated()
    moved = await rent(provider, 1, -timedelta(seconds=2))
    (listed,) = await provider.list_managed(OWNER)
    provider.listing = [replace(listed, hard_stop_at=datetime.now(UTC) + timedelta(hours=1))]
    (report,) = await deadman.switch_off([provider], OWNER)
    assert (report.ended, alive(provider)) == ((), {moved})


async def test_a_name_that_cannot_be_read_is_left_alone() -> None:
    for ref in ("gb-deadman1", "gb-deadman1-x-é", f"gb-deadman1-x-{'z' * 30}", ""):
        instance = base.Instance("i", ref, "running", "running", "full")
        assert deadman.find_hard_stop(instance) is None
