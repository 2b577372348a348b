"""Vast.ai as its description has it: a market, 25 instances a page, logs and commands whose answers lie elsewhere.

What the description has wrong is put right first (SOURCES.md and FACTS.md of the shared folder name these): `env` is an object,
`ports` maps ports, and of an instance that is not there the answer is null.
"""

import json
import math
import re
from typing import Any, ClassVar

from tests.providers.vendors import described
from tests.providers.vendors.server import Answer, Machine, Request, Vendor, serves

from gpubroker.providers.base import Billing, Life
from gpubroker.providers.vast import Vast

KEY = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
OFFERS: dict[str, dict[str, Any]] = {
    "30000001": {"gpu_name": "RTX 4090", "num_gpus": 1, "gpu_ram": 24564, "dph_base": 0.4, "storage_cost": 0.144,
                 "geolocation": "California, US", "min_bid": 0.211111, "disk_space": 841.5},
    "30000002": {"gpu_name": "H100 SXM", "num_gpus": 8, "gpu_ram": 81559, "dph_base": 17.066667, "storage_cost": 0.216,
                 "geolocation": "Sweden, SE", "min_bid": 9.5, "disk_space": 20000.0, "cpu_cores": None, "cpu_ram": None},
    "30000003": {"gpu_name": "Q RTX 8000", "num_gpus": 2, "gpu_ram": 46080, "dph_base": 0.6, "storage_cost": 0.072,
                 "geolocation": ", US", "min_bid": None, "disk_space": 64.0, "direct_port_count": -1},
    "30000004": {"gpu_name": "RTX 3090", "num_gpus": 1, "gpu_ram": 24576, "dph_base": 0.1, "storage_cost": 0.072,
                 "geolocation": None, "min_bid": 0.05, "disk_space": 8.0},
    "30000005": {"gpu_name": "RTX 3090", "num_gpus": 1, "gpu_ram": 24576, "dph_base": 0.1, "storage_cost": 0.072,
                 "geolocation": "Utah, US", "min_bid": 0.05, "disk_space": 99.0, "external": True},
}  # fmt: skip
_STATUS = {"starting": "loading", "running": "running", "stopped": "stopped", "failed": "exited"}
_PAGE = 25


def correct(known: described.Description | None) -> None:
    """The description as the real thing is."""
    if known is None:
        return
    paths, instance = known.document["paths"], known.document["components"]["schemas"]["Instance"]["properties"]
    create = paths["/api/v0/asks/{id}"]["put"]
    create["requestBody"]["content"]["application/json"]["schema"]["properties"]["env"] = {"type": "object"}
    refused = create["responses"]["400"]["content"]["application/json"]["schema"]["properties"]["error"]
    refused["enum"] = [*refused["enum"], "insufficient_credit"]
    listed = paths["/api/v1/instances"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    rows = listed["properties"]["instances"]["items"]["properties"]
    instance |= {"ports": rows["ports"], "extra_env": rows["extra_env"]}
    shown = paths["/api/v0/instances/{id}"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    shown["properties"]["instances"] = {"anyOf": [{"$ref": "#/components/schemas/Instance"}, {"type": "null"}]}
    deleted = paths["/api/v0/instances/{id}"]["delete"]["responses"]
    deleted["401"] = deleted["404"]


class VastVendor(Vendor):
    provider = Vast
    description = "vastai.yaml"
    variables: ClassVar = {"VAST_API_KEY": KEY}
    statuses: ClassVar[dict[str, tuple[Life, Billing]]] = {
        "loading": ("starting", "storage"),
        "running": ("running", "full"),
        "stopped": ("stopped", "storage"),
        "frozen": ("stopped", "full"),
        "exited": ("stopped", "unknown"),
        "rebooting": ("starting", "full"),
        "recycling": ("starting", "full"),
        "unknown": ("unknown", "unknown"),
        "offline": ("unknown", "unknown"),
    }

    def __init__(self) -> None:
        correct(described.load(self.description))
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self.results: dict[str, list[Answer]] = {}
        """What is found where a result is to be, look by look; the last stays."""
        self.waits = 0
        """So many looks find nothing."""
        self.commands: list[str] = []
        self.outbid: set[str] = set()

    def is_authentic(self, request: Request) -> bool:
        return request.path.startswith("/results/") or request.headers.get("authorization") == f"Bearer {KEY}"

    def refusal(self, code: int, detail: str) -> Answer:
        return Answer(code, {"success": False, "error": "auth_error" if code == 401 else "invalid_args", "msg": detail})

    def _answer(self, request: Request, handler: Any, parts: dict[str, str]) -> Answer:
        is_refused = self.is_dead or not self.is_authentic(request)
        if is_refused and request.path.endswith("/bundles/"):
            return Answer(404, {"error": "not_found", "msg": "Invalid user key"})
        return super()._answer(request, handler, parts)

    def make_id(self) -> str:
        return str(20000000 + len(self.machines))

    def price(self, offer_id: str, disk_gb: int) -> int:
        about = OFFERS[offer_id]
        return round(about["dph_base"] * self.dearer * 1_000_000) + disk_gb * self.storage(offer_id)

    def storage(self, offer_id: str) -> int:
        """A GB and hour of 720 in a month, micro-USD."""
        return round(OFFERS[offer_id]["storage_cost"] * 1_000_000 / 720)

    def bill(self, machine: Machine) -> int:
        there = (machine.gone_at or self.now()) - machine.born_at
        disk = machine.asked["disk"] * self.storage(machine.offer)
        machine_h = (
            round(machine.asked["price"] * 1_000_000) if "price" in machine.asked else self.price(machine.offer, 0)
        )
        return round((machine_h * machine.seconds(self.now()) + disk * there) / 3600)

    def labels(self, machine: Machine) -> list[str]:
        return [machine.name]

    def received(self, machine: Machine) -> dict[str, Any]:
        asked = machine.asked
        key = re.search(r"echo '?(ssh-[^']*)'? > ~/.ssh/authorized_keys", asked.get("onstart", ""))
        env = asked["env"]
        return {
            "image": asked["image"],
            "args": asked.get("args", []),
            "env": {name: value for name, value in env.items() if not name.startswith("-p ")},
            "ports": [int(name.partition(":")[2].partition("/")[0]) for name in env if name.startswith("-p ")],
            "disk_gb": asked["disk"],
            "ssh_key": key[1] if key else None,
        }

    # Its paths

    @serves("POST", "/api/v0/bundles/", "offers")
    def search(self, request: Request) -> Answer:
        asked = request.json
        assert asked["type"] == "ondemand"
        assert all(asked[name] == {"eq": wanted} for name, wanted in [("rentable", True), ("rented", False)])
        if not self.has_room:
            return Answer(200, {"offers": []})
        return Answer(200, {"offers": [self._offer(number, asked["allocated_storage"]) for number in OFFERS]})

    def _offer(self, number: str, disk_gb: int) -> dict[str, Any]:
        about = OFFERS[number]
        disk_h = about["storage_cost"] * disk_gb / 720
        base_h = about["dph_base"] * self.dearer
        return {
            "id": int(number), "ask_contract_id": int(number), "cpu_cores": 64, "cpu_cores_effective": 8.0, "cpu_ram": 257000,
            "cpu_arch": "amd64", "dph_total": base_h + disk_h, "direct_port_count": 42, "rentable": True, "rented": False,
            "is_bid": False, "reliability2": 0.9986, "storage_total_cost": disk_h, "verification": "verified",
            "gpu_frac": 0.125, "external": None, **about, "dph_base": base_h,
        } | self.extras  # fmt: skip

    @serves("PUT", "/api/v0/asks/{ask}/", "create")
    def create(self, request: Request, ask: str) -> Answer:
        asked = request.json
        if ask not in OFFERS:
            return Answer(404, {"success": False, "error": "invalid_args", "msg": "no_such_ask", "ask_id": int(ask)})
        if not self.has_money:
            return Answer(400, {"success": False, "error": "insufficient_credit", "msg": "Your account lacks credit"})
        if not self.has_room:
            return Answer(
                410, {"success": False, "error": "no_such_ask", "msg": "is no longer available.", "ask_id": int(ask)}
            )
        made = self.bear(asked["label"], asked, ask)
        if self.bears_twins:
            self.bear(asked["label"], asked, ask)
        return Answer(200, {"success": True, "new_contract": int(made.id)} | self.extras)

    @serves("GET", "/api/v1/instances/", "list")
    def list_instances(self, request: Request) -> Answer:
        label = json.loads(request.query["select_filters"][0]).get("label", {}).get("eq")
        found = [machine for machine in self.shown() if label is None or machine.name == label]
        begin = int(request.query.get("after_token", ["0"])[0])
        page, is_last = found[begin : begin + _PAGE], len(found) <= begin + _PAGE
        rows = {"instances": [self._instance(machine) for machine in page], "total_instances": len(found)}
        counts = {"instances_found": len(page), "next_token": None if is_last else str(begin + _PAGE)}
        return Answer(200, {"success": True, **rows, **counts} | self.extras)

    @serves("GET", "/api/v0/instances/{instance}/", "get")
    def show(self, _: Request, instance: str) -> Answer:
        machine = self.find(instance)
        return Answer(200, {"instances": self._instance(machine) if machine else None})

    @serves("DELETE", "/api/v0/instances/{instance}/", "terminate")
    def destroy(self, _: Request, instance: str) -> Answer:
        machine = self.find(instance)
        if machine is None:
            return Answer(404, {"success": False, "error": "not_found", "msg": "Instance not found"})
        self.end(machine)
        return Answer(200, {"success": True, "msg": "Instance destroyed successfully"})

    @serves(
        "PUT", "/api/v0/instances/{instance}/", lambda request: {"stopped": "stop"}.get(request.json["state"], "start")
    )
    def manage(self, request: Request, instance: str) -> Answer:
        machine = self.find(instance)
        if machine is None:
            return Answer(404, {"success": False, "error": "not_found", "msg": "Instance not found"})
        if request.json["state"] == "stopped":
            self.halt(machine)
        elif self.has_room:
            self.run(machine)
        elif machine.life != "running":
            machine.asked["queued"] = True
            said = "Required resources are currently unavailable, state change queued."
            return Answer(200, {"success": False, "error": "resources_unavailable", "msg": said})
        machine.asked.pop("queued", None)
        return Answer(200, {"success": True})

    @serves("PUT", "/api/v0/instances/reboot/{instance}/", "restart")
    def reboot(self, _: Request, instance: str) -> Answer:
        if self.find(instance) is None:
            return self.refusal(400, "invalid instance_id")
        return Answer(200, {"success": True})

    @serves("PUT", "/api/v0/instances/request_logs/{instance}/", "logs")
    def request_log(self, request: Request, instance: str) -> Answer:
        machine = self.find(instance)
        if machine is None:
            return Answer(404, {"error": "invalid_id", "msg": "Invalid instance id."})
        lines = machine.log.splitlines(keepends=True)[-int(request.json["tail"]) :]
        return Answer(200, {"success": True, "result_url": self._put("".join(lines)), "msg": "uploading"})

    @serves("PUT", "/api/v0/instances/command/{instance}/", "exec")
    def execute(self, request: Request, instance: str) -> Answer:
        command, machine = request.json["command"], self.find(instance)
        if machine is None or machine.life != "running":
            return Answer(400, {"success": False, "error": "invalid_container", "msg": "Invalid container."})
        if command.startswith("nvidia-smi") or len(command) > 512:
            return self.refusal(400, "Invalid command given.")
        self.commands.append(command)
        url = self._put(f"of {command}\n")
        return Answer(
            200, {"success": True, "writeable_path": "/var/lib/docker/x", "result_url": url, "msg": "executing"}
        )

    def _put(self, text: str) -> str:
        name = str(len(self.results))
        self.results[name] = [Answer(404, b"<Error/>", content_type="application/xml")] * self.waits
        self.results[name].append(Answer(200, text.encode(), content_type="text/plain"))
        return f"{self.url}/results/{name}"

    @serves("GET", "/results/{name}", "result")
    def read_result(self, request: Request, name: str) -> Answer:
        assert not {"authorization", "cookie"} & set(request.headers)
        found = self.results[name]
        return found.pop(0) if len(found) > 1 else found[0]

    def _check_request(self, request: Request, path: str) -> None:
        if not path.startswith("/results/"):
            super()._check_request(request, path)

    def _instance(self, machine: Machine) -> dict[str, Any]:
        asked, status = machine.asked, machine.status or _STATUS[machine.life]
        is_outbid = machine.id in self.outbid
        contract = "stopped" if is_outbid or machine.life == "stopped" else "running"
        ports = [key.removeprefix("-p ").partition(":")[2] for key in asked.get("env", {}) if key.startswith("-p ")]
        ports += ["22"] if asked.get("runtype") == "ssh_direct" else []
        doors = {
            p if "/" in p else f"{p}/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(40000 + n)}]
            for n, p in enumerate(ports)
        }
        return {
            "id": int(machine.id), "actual_status": "exited" if is_outbid else status, "cur_state": contract,
            "intended_status": "running" if asked.get("queued") else contract,
            "next_state": "running" if asked.get("queued") else contract, "label": machine.name, "is_bid": "price" in asked,
            "image_uuid": asked.get("image", ""), "image_args": asked.get("args", []),
            "image_runtype": "ssh ssh_direc ssh_proxy" if asked.get("runtype") == "ssh_direct" else "args",
            "extra_env": [[name, value] for name, value in asked.get("env", {}).items()], "onstart": asked.get("onstart", ""),
            "status_msg": f"success, {status}\n", "public_ipaddr": "63.135.50.11\n", "ssh_host": "ssh2281.vast.ai",
            "ssh_port": 10882, "start_date": machine.born_at, "end_date": math.ceil(machine.born_at) + 8640000.0,
            "disk_space": float(asked.get("disk", 8)), "gpu_name": "RTX 4090", "num_gpus": 1,
            "dph_total": self.price(machine.offer, asked["disk"]) / 1_000_000 if machine.offer else 0.1,
            "ports": doors if status == "running" and not is_outbid else None,
        } | self.extras  # fmt: skip
