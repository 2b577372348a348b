"""A new vendor is one file: laid beside the others it is everywhere, and nothing else was changed for it.

tests/providers/sample has the adapter and nothing more. Below are its simulator, its contract, and what it appears in.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.factories import World
from tests.providers.contract import HttpProviderContract
from tests.providers.vendors import server
from tests.providers.vendors.server import Answer, Machine, Request, Vendor, serves

from gpubroker import adapters, catalog, config, doctor, metering, operating, providers, reconciling
from gpubroker.errors import SetupError
from gpubroker.providers import registry
from gpubroker.providers.base import Billing, Life
from gpubroker.providers.http.adapter import HttpProvider

SAMPLE = Path(__file__).parent / "sample"
KEY = "op_TheKeyOfTheTests0123456789"
FLAVOURS: dict[str, dict[str, Any]] = {
    "h100x1": {"gpu": "H100 SXM", "gpus": 1, "vcpus": 16, "ram_gb": 180, "disk_gb": 200, "usd_per_hour": "1.987654"},
    "h100x8": {"gpu": "H100 SXM", "gpus": 8, "vcpus": 128, "ram_gb": 1440, "disk_gb": 1600, "usd_per_hour": "15.9"},
    "l4": {"gpu": "L4", "gpus": 1, "vcpus": 4, "ram_gb": 16.5, "disk_gb": 100, "usd_per_hour": "0.45"},
}
STATUS = {"starting": "building", "running": "up", "gone": "deleted"}
_PAGE = 25


@contextlib.contextmanager
def beside_the_others() -> Iterator[None]:
    """The one file is in the package, as if it lay in its folder."""
    providers.__path__.append(str(SAMPLE))
    try:
        yield
    finally:
        providers.__path__.remove(str(SAMPLE))


with beside_the_others():
    PROVIDER = registry.adapter("outpost")


@pytest.fixture(scope="module", autouse=True)
def _laid() -> Iterator[None]:
    with beside_the_others():
        yield


class OutpostVendor(Vendor):
    provider: ClassVar[type[HttpProvider]] = PROVIDER  # type: ignore[assignment]
    variables: ClassVar = {"OUTPOST_API_KEY": KEY}
    statuses: ClassVar[dict[str, tuple[Life, Billing]]] = {
        "building": ("starting", "none"),
        "up": ("running", "full"),
        "broken": ("failed", "unknown"),
        "deleting": ("terminating", "none"),
        "deleted": ("gone", "none"),
    }

    def is_authentic(self, request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {KEY}"

    def refusal(self, code: int, detail: str) -> Answer:
        return Answer(code, {"error": detail})

    def price(self, offer_id: str, disk_gb: int) -> int:
        del disk_gb  # it comes with the flavour
        return round(float(FLAVOURS[offer_id]["usd_per_hour"]) * self.dearer * 1_000_000)

    def bill(self, machine: Machine) -> int:
        return round(self.price(machine.offer, 0) * machine.seconds(self.now()) / 3600)

    def labels(self, machine: Machine) -> list[str]:
        return [machine.name, machine.asked["label"]]

    def received(self, machine: Machine) -> dict[str, Any]:
        return machine.asked | {"ssh_key": None}

    @serves("GET", "/flavours", "offers")
    def list_flavours(self, _: Request) -> Answer:
        stock = 3 if self.has_room else 0
        shown = [
            {"id": name, "zone": "fi-1", "country": "FI", "in_stock": stock, **about, **self.extras}
            | {"usd_per_hour": f"{self.price(name, 0) / 1_000_000:.6f}"}
            for name, about in FLAVOURS.items()
        ]
        return Answer(200, {"flavours": shown})

    @serves("POST", "/servers", "create")
    def order(self, request: Request) -> Answer:
        if not self.has_money:
            return self.refusal(402, "top up first")
        if not self.has_room:
            return self.refusal(409, "sold_out")
        asked = request.json
        first, *_ = [self.bear(asked["name"], asked, asked["flavour"]) for _ in range(1 + self.bears_twins)]
        return Answer(201, self._server(first))

    @serves("GET", "/servers", "list")
    def list_servers(self, request: Request) -> Answer:
        after = int(request.query.get("after", ["0"])[0])
        shown = self.shown()
        page = {"servers": [self._server(machine) for machine in shown[after : after + _PAGE]]}
        return Answer(200, page | ({"next": str(after + _PAGE)} if len(shown) > after + _PAGE else {}))

    @serves("GET", "/servers/{server}", "get")
    def show(self, _: Request, server: str) -> Answer:
        machine = self.find(server)
        return Answer(200, self._server(machine)) if machine else self.refusal(404, "no such server")

    @serves("DELETE", "/servers/{server}", "terminate")
    def delete(self, _: Request, server: str) -> Answer:
        machine = self.find(server)
        if machine is None:
            return self.refusal(404, "no such server")
        self.end(machine)
        return Answer(204)

    def _server(self, machine: Machine) -> dict[str, Any]:
        since = machine.started_at
        return {
            "id": machine.id,
            "name": machine.name,
            "label": machine.asked["label"] if machine.name.startswith("gb-") else "",
            "status": machine.status or STATUS[machine.life],
            "host": "198.51.100.7",
            "ports": [{"inside": port, "outside": 30000 + n} for n, port in enumerate(machine.asked["ports"])],
            "up_since": datetime.fromtimestamp(since, UTC).isoformat() if since else None,
        } | self.extras


class TestOutpost(HttpProviderContract):
    vendor = OutpostVendor
    path = "/v1"


@pytest.fixture
def sim() -> Iterator[Vendor]:
    with server.serve(OutpostVendor(), "/v1") as served:
        yield served


def settings(sim: Vendor, **more: str) -> config.Settings:
    return config.read({**sim.variables, "GPUBROKER_OUTPOST_URL": sim.url, **more})


def test_the_file_is_all_there_is() -> None:
    assert [path.name for path in SAMPLE.iterdir() if path.is_file()] == ["outpost.py"]
    assert len((SAMPLE / "outpost.py").read_text().splitlines()) <= 250


def test_it_contributes_more_than_sixty_checks_by_naming_itself() -> None:
    assert {name for name in vars(TestOutpost) if not name.startswith("__")} == {"vendor", "path"}
    assert TestOutpost.count_checks() >= 60


def test_its_settings_are_those_that_it_names(sim: Vendor) -> None:
    assert registry.adapter("outpost") is PROVIDER
    assert "outpost" in registry.names()
    assert registry.enabled(settings(sim)) == ("outpost",)
    assert registry.enabled(config.read({})) == ()
    assert registry.enabled(settings(sim, GPUBROKER_PROVIDERS="runpod")) == ()
    assert registry.enabled(settings(sim, GPUBROKER_PROVIDERS="outpost")) == ("outpost",)
    with pytest.raises(SetupError, match="OUTPOST_API_KEY"):
        PROVIDER.from_settings(config.read({}))
    with pytest.raises(SetupError, match=r"there are: .*outpost"):
        registry.adapter("outpots")


@pytest.mark.anyio
async def test_it_is_everywhere_where_vendors_are(world: World, sim: Vendor) -> None:
    agent = world.root

    async def show() -> Any:
        return next(p for p in (await agent.get("/v1/providers"))["items"] if p["name"] == "outpost")

    assert (await show())["configured"] is False
    config.use(config.with_variables(config.settings(), **settings(sim).variables, GPUBROKER_PROVIDERS="outpost"))
    await adapters.close()
    world.adapters = adapters.mine()
    assert await catalog.refresh_all(world.adapters) == {"outpost": "3 changed, 0 gone"}
    shown = await show()
    assert (shown["configured"], shown["healthy"], shown["offers"]) == (True, True, 3)
    assert shown["capabilities"]["supports"] == ["command", "image", "ports"]

    offers = (await agent.get("/v1/offers?provider=outpost&gpu=h100&gpu_count=1"))["items"]
    assert [(offer["gpu"], offer["price_usd_per_hour"]) for offer in offers] == [("H100 SXM", "1.987654")]
    missed = (await agent.get("/v1/offers?provider=outpots"))["no_match"]["nearest"]
    assert "outpost" in [near["change"].get("provider") for near in missed]
    wrong = (await agent.get("/v1/offers?providr=outpost", 422))["errors"][0]
    assert wrong["did_you_mean"] == "provider"
    assert "outpost" in next(g for g in (await agent.get("/v1/gpus"))["items"] if g["model"] == "L4")["providers"]

    pod = await world.run(agent, requirements={"provider": ["outpost"], "gpu": ["h100"]})
    assert (pod["state"], pod["provider"], len(sim.alive())) == ("running", "outpost", 1)
    await world.pass_time(seconds=300)
    await reconciling.sweep_all(world.adapters)
    await metering.bill_all(1)
    switch = next(f for f in await doctor.examine() if f.check == "dead man's switch")
    assert "'gpubroker deadman' alone covers 1.987654 USD/h (outpost)" in switch.said
    assert "OUTPOST_API_KEY" in (switch.what_to_do or "")
    assert [(report.provider, report.listed, report.is_good) for report in await operating.switch_off()] == [
        ("outpost", 1, True)
    ]
    await agent.delete(f"/v1/pods/{pod['id']}")
    await world.drive_due()
    assert sim.alive() == []
    (group,) = (await agent.get("/v1/usage?group_by=provider"))["items"]
    assert (group["key"], float(group["amount_usd"]) >= 0.165637) == ("outpost", True)


def test_it_is_checked_from_the_command_line(sim: Vendor) -> None:
    program = (
        f"from gpubroker import providers; providers.__path__.append({str(SAMPLE)!r}); "
        "from gpubroker.cli import main; main()"
    )
    variables = dict(settings(sim, GPUBROKER_OWNER="ownerown").variables)
    command = [sys.executable, "-c", program, "providers", "check"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[0] == "outpost"
    assert "offers      3 to be had now, 2 GPU models" in lines
    assert "cannot      exec, logs, stop, ssh" in lines
