"""A vendor that hangs, answers garbage, or takes a minute delays no other vendor's refresh, sweep or pod, and no search."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.factories import World
from tests.providers.vendors import server
from tests.providers.vendors.lambda_ import LambdaVendor
from tests.providers.vendors.runpod import RunpodVendor
from tests.providers.vendors.server import Fault, Vendor
from tests.simulator import OFFERS

from gpubroker import adapters, catalog, config, reconciling
from gpubroker.providers import base

pytestmark = pytest.mark.anyio
SECONDS = 20.0
"""Far less than a call to the sick vendor may take, far more than all else does."""


@pytest.fixture(scope="module")
def vendors() -> Iterator[tuple[Vendor, Vendor]]:
    with server.serve(RunpodVendor(), "/v2") as sick, server.serve(LambdaVendor(), "/api/v1") as well:
        yield sick, well


@pytest.fixture
async def sick(world: World, vendors: tuple[Vendor, Vendor]) -> AsyncIterator[Vendor]:
    """RunPod, which is to be sick; Lambda is well. Both were refreshed once."""
    variables: dict[str, str] = {"GPUBROKER_PROVIDERS": "runpod,lambda", "GPUBROKER_TICK_SECONDS": "10"}
    for vendor in vendors:
        vendor.reset()
        variables |= {**vendor.variables, f"GPUBROKER_{vendor.provider.name.upper()}_URL": vendor.url}
    config.use(config.with_variables(config.settings(), **variables))
    await adapters.close()
    world.adapters = adapters.mine()
    world.provider.offers = ()
    for name in ("runpod", "lambda"):
        world.adapters.get(name).http.buckets.limits = {}  # type: ignore[attr-defined]
    said = await catalog.refresh_all(world.adapters)
    assert all("changed" in line for line in said.values()), said
    world.query("UPDATE refresh SET began_at = began_at - interval '1 day'")
    yield vendors[0]
    for vendor in vendors:
        vendor.released.set()


def lower(vendor: Vendor, fault: Fault) -> None:
    """Every call of it comes to this."""
    for operation in ("offers", "list", "create", "get", "terminate"):
        vendor.plan(operation, *[fault] * 500)


async def until(what: str, condition: Callable[[], Awaitable[Any]]) -> None:
    deadline = time.monotonic() + SECONDS
    while not await condition():
        assert time.monotonic() < deadline, f"{what} waited for the sick vendor"
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("fault", [server.HANG, server.GARBAGE], ids=["hangs, or takes a minute", "garbage"])
async def test_a_sick_vendor_holds_nobody_else_up(
    world: World, sick: Vendor, vendors: Any, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciling, "_PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(reconciling, "_AT_ONCE", 4)
    well, agent = vendors[1], world.root
    model = (await agent.get("/v1/offers?provider=runpod&limit=1"))["items"][0]["gpu"]
    lower(sick, fault)
    well.dearer = 2.0

    refreshing = asyncio.create_task(catalog.refresh_all(world.adapters))

    async def is_refreshed() -> bool:
        offers = (await agent.get("/v1/offers?provider=lambda&gpu=a10"))["items"]
        return [offer["price_usd_per_hour"] for offer in offers] == ["1.500000"] * 2

    await until("the refresh of the other", is_refreshed)

    stuck = [
        await agent.pod(requirements={"provider": ["runpod"], "gpu": [model]}, max_lifetime_seconds=600)
        for _ in range(reconciling._AT_ONCE + 2)
    ]
    other = await agent.pod(requirements={"provider": ["lambda"], "gpu": ["a10"]}, max_lifetime_seconds=600)
    tick = asyncio.create_task(reconciling.reconcile(world.adapters))

    async def runs() -> bool:
        began = time.monotonic()
        assert (await agent.get("/v1/offers?limit=1"))["items"]
        assert time.monotonic() - began < SECONDS / 4, "a search waited for the sick vendor"
        return (await agent.get(f"/v1/pods/{other['id']}"))["state"] == "running"

    async def is_swept() -> bool:
        listed = world.query(
            """SELECT 1 FROM listing l JOIN provider_account a ON a.id = l.account_id
                WHERE a.provider = 'lambda' AND l.complete"""
        )
        return bool(listed)

    await until("the other pod", runs)
    await until("the other's sweep", is_swept)
    if fault is server.HANG:
        assert not refreshing.done(), "the sick one is waited for meanwhile"
        assert not tick.done(), "the sick one is waited for meanwhile"
    refreshing.cancel()
    tick.cancel()
    await asyncio.wait([refreshing, tick])
    assert "running" not in {(await agent.get(f"/v1/pods/{pod['id']}"))["state"] for pod in stuck}


async def test_what_the_database_cannot_hold_fails_for_its_vendor_alone(
    world: World, sick: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def list_offers() -> list[base.ProviderOffer]:
        return [replace(OFFERS[0], provider_offer_id="a\0b")]

    monkeypatch.setattr(world.adapters.get(sick.provider.name), "list_offers", list_offers)
    monkeypatch.setattr(catalog, "_is_possible", lambda _: True)
    said = await catalog.refresh_all(world.adapters)
    assert said["runpod"].startswith("failed")
    assert "changed" in said["lambda"]
