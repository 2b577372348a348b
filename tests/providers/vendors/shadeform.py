"""Shadeform as its description has it: machines of many clouds, prices in cents, billed from active to deleting."""

import shlex
import uuid
from datetime import UTC, datetime
from typing import Any, ClassVar

from tests.providers.vendors.server import Answer, Machine, Request, Vendor, serves

from gpubroker.providers.base import Billing, Life
from gpubroker.providers.shadeform import Shadeform

KEY = "shade_0123456789abcdefThisIsTheKey"
KANSAS = {"region": "us-central-1", "available": True, "display_name": "US, Wichita, KS"}
FULL = {"region": "us-central-2", "available": False, "display_name": "US, Wichita, KS"}
TORONTO = {"region": "canada-1", "available": True, "display_name": "Toronto, Canada"}
TYPES: dict[str, dict[str, Any]] = {
    "hyperstack/A6000": {"cents": 51, "gpu": ("A6000", 1, 48, "pcie"), "places": [TORONTO, FULL]},
    "lambdalabs/A6000": {"cents": 92, "gpu": ("A6000", 1, 48, "pcie"), "places": [KANSAS]},
    "denvr/H100_sxm5x8": {"cents": 2392, "gpu": ("H100", 8, 80, "sxm5"), "places": [KANSAS, TORONTO]},
    "latitude/H100": {"cents": 199, "gpu": ("H100", 1, 80, "pcie"), "places": [FULL]},
    "paperspace/C5": {"cents": 9, "gpu": ("CPU", 0, 0, "none"), "places": [TORONTO], "deployment_type": "baremetal"},
    "boxes/A6000": {"cents": 20, "gpu": ("A6000", 1, 48, "pcie"), "places": [KANSAS], "deployment_type": "container"},
}
_STATUS = {"starting": "pending", "running": "active", "gone": "deleting"}
_NEVER = "0001-01-01T00:00:00Z"


class ShadeformVendor(Vendor):
    provider = Shadeform
    description = "shadeform.yaml"
    variables: ClassVar = {"SHADEFORM_API_KEY": KEY}
    statuses: ClassVar[dict[str, tuple[Life, Billing]]] = {
        "creating": ("starting", "none"),
        "pending_provider": ("starting", "none"),
        "pending": ("starting", "none"),
        "active": ("running", "full"),
        "error": ("failed", "unknown"),
        "deleting": ("terminating", "none"),
        "deleted": ("gone", "none"),
    }

    def reset(self) -> None:
        super().reset()
        self.keys: dict[str, dict[str, str]] = {}
        self.lingers = False
        """What was deleted is shown while it is being deleted."""
        self.keeps_time = False
        """It deletes by itself what is past its thresholds."""
        self.mapped: list[dict[str, int]] = []
        """Ports that a cloud put elsewhere."""

    def make_id(self) -> str:
        return str(uuid.uuid4())

    def is_authentic(self, request: Request) -> bool:
        return request.headers.get("x-api-key") == KEY and "authorization" not in request.headers

    def refusal(self, code: int, detail: str) -> Answer:
        return Answer(code, {"error_code": "REFUSED", "error": detail})

    def error(self, status: int, code: str) -> Answer:
        return Answer(status, {"error_code": code, "error": "it cannot be"})

    def _check_answer(self, request: Request, path: str, answer: Answer) -> None:
        if answer.status == 200:  # the description lists no others
            super()._check_answer(request, path, answer)

    def price(self, offer_id: str, disk_gb: int) -> int:
        del disk_gb  # it comes with the machine
        return round(TYPES[offer_id]["cents"] * self.dearer) * 10_000

    def bill(self, machine: Machine) -> int:
        return round(self.price(machine.offer, 0) * machine.seconds(self.now()) / 3600)

    def labels(self, machine: Machine) -> list[str]:
        return [machine.name, machine.asked["tags"][0]]

    def received(self, machine: Machine) -> dict[str, Any]:
        docker = machine.asked["launch_configuration"]["docker_configuration"]
        key = machine.asked.get("ssh_key_id")
        return {
            "image": docker["image"],
            "args": shlex.split(docker.get("args", "")),
            "env": {env["name"]: env["value"] for env in docker["envs"]},
            "ports": [port["container_port"] for port in docker["port_mappings"]],
            "disk_gb": None,
            "ssh_key": self.keys[key]["public_key"] if key else None,
        }

    def find(self, machine_id: str) -> Machine | None:
        machine = self.machines.get(machine_id)
        if self.keeps_time and machine is not None and machine.gone_at is None:
            ending = machine.asked["auto_delete"]
            is_late = self.now() >= datetime.fromisoformat(ending["date_threshold"]).timestamp()
            if is_late or self.bill(machine) >= float(ending["spend_threshold"]) * 1_000_000:
                self.end(machine)
        if machine is not None and machine.gone_at is not None and self.lingers:
            return machine
        return super().find(machine_id)

    # Its paths

    @serves("GET", "/instances/types", "offers")
    def list_types(self, _: Request) -> Answer:
        return Answer(200, {"instance_types": [self._type(*item) for item in TYPES.items()]})

    def _type(self, offer_id: str, about: dict[str, Any]) -> dict[str, Any]:
        cloud, kind = offer_id.split("/")
        places = [place | {"available": place["available"] and self.has_room} for place in about["places"]]
        return {
            "cloud": cloud, "shade_instance_type": kind, "cloud_instance_type": f"of-{cloud}", "availability": places,
            "configuration": self._configuration(about) | {"os_options": ["ubuntu22.04_cuda12.2_shade_os"]},
            "hourly_price": round(about["cents"] * self.dearer), "deployment_type": about.get("deployment_type", "vm"),
            "boot_time": {"min_boot_in_sec": 180, "max_boot_in_sec": 300},
        } | self.extras  # fmt: skip

    def _configuration(self, about: dict[str, Any]) -> dict[str, Any]:
        gpu, count, vram, interconnect = about["gpu"]
        return {
            "memory_in_gb": 58, "storage_in_gb": 256, "vcpus": 28, "num_gpus": count, "gpu_type": gpu, "nvlink": False,
            "interconnect": interconnect, "vram_per_gpu_in_gb": vram, "gpu_manufacturer": "nvidia",
        }  # fmt: skip

    @serves("GET", "/sshkeys", "keys")
    def list_keys(self, _: Request) -> Answer:
        return Answer(200, {"ssh_keys": [{"id": name, "is_default": False} | key for name, key in self.keys.items()]})

    @serves("POST", "/sshkeys/add", "add_key")
    def add_key(self, request: Request) -> Answer:
        if request.json["name"] in [key["name"] for key in self.keys.values()]:
            return self.error(400, "name must be unique")
        name = self.make_id()
        self.keys[name] = request.json
        return Answer(200, {"id": name})

    @serves("POST", "/instances/create", "create")
    def create(self, request: Request) -> Answer:
        asked = request.json
        if asked["launch_configuration"]["type"] != "docker" or asked.get("ssh_key_id", None) not in {None, *self.keys}:
            return self.error(400, "BAD_REQUEST")
        if not self.has_money:
            return self.error(409, "INSUFFICIENT_FUNDS")
        offer = f"{asked['cloud']}/{asked['shade_instance_type']}"
        places = [place["region"] for place in TYPES[offer]["places"] if place["available"]]
        if not self.has_room or asked["region"] not in places:
            return self.error(409, "OUT_OF_STOCK")
        made = [self.bear(asked["name"], asked, offer) for _ in range(1 + self.bears_twins)]
        return Answer(200, {"id": made[0].id} | self.extras)

    @serves("GET", "/instances", "list")
    def list_instances(self, _: Request) -> Answer:
        return Answer(200, {"instances": [self._instance(machine) for machine in self.shown()]})

    @serves("GET", "/instances/{instance}/info", "get")
    def get_instance(self, _: Request, instance: str) -> Answer:
        machine = self.find(instance)
        if machine is None:
            return self.error(404, "NOT_FOUND")
        ending = {"auto_delete": machine.asked["auto_delete"], "ssh_key_id": machine.asked.get("ssh_key_id", "")}
        return Answer(200, self._instance(machine) | ending)

    @serves("POST", "/instances/{instance}/delete", "terminate")
    def delete(self, _: Request, instance: str) -> Answer:
        machine = self.find(instance)
        if machine is None:
            return self.error(404, "NOT_FOUND")
        if machine.gone_at is not None:
            return self.error(409, "BEING_DELETED")
        self.end(machine)
        return Answer(200)

    @serves("POST", "/instances/{instance}/restart", "restart")
    def restart(self, _: Request, instance: str) -> Answer:
        return Answer(200) if self.find(instance) else self.error(404, "NOT_FOUND")

    @serves("POST", "/instances/{instance}/update", "update")
    def update(self, request: Request, instance: str) -> Answer:
        machine = self.find(instance)
        if machine is None:
            return self.error(404, "NOT_FOUND")
        machine.asked = {**machine.asked, **request.json}
        machine.name = request.json.get("name", machine.name)
        return Answer(200)

    def _instance(self, machine: Machine) -> dict[str, Any]:
        asked, status = machine.asked, machine.status or _STATUS[machine.life]
        begun = datetime.fromtimestamp(machine.started_at, UTC).isoformat() if machine.started_at else _NEVER
        return {
            "id": machine.id, "cloud": asked["cloud"], "region": asked["region"], "name": machine.name, "status": status,
            "shade_instance_type": asked["shade_instance_type"], "cloud_instance_type": "gpu_1x_a6000", "shade_cloud": True,
            "cloud_assigned_id": f"of-{machine.id}", "ip": "1.0.0.1" if status == "active" else "", "ssh_user": "shadeform",
            "configuration": self._configuration(TYPES[machine.offer]) | {"os": "ubuntu_22_shade_os"}, "ssh_port": 22,
            "status_details": "", "cost_estimate": f"{self.bill(machine) / 1_000_000:.4f}", "tags": asked["tags"],
            "hourly_price": round(TYPES[machine.offer]["cents"] * self.dearer), "port_mappings": self.mapped,
            "launch_configuration": asked["launch_configuration"], "active_at": begun,
            "created_at": datetime.fromtimestamp(machine.born_at, UTC).isoformat(), "deleted_at": _NEVER,
        } | self.extras  # fmt: skip
