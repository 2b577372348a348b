"""Lambda as its description has it: machines only, one key each, no stop; billed by the minute from healthy to terminate."""

import json
import math
import re
from typing import Any, ClassVar

import yaml
from tests.providers.vendors.server import Answer, Machine, Request, Vendor, serves

from gpubroker.providers import registry
from gpubroker.providers.base import Billing, Life
from gpubroker.providers.http.adapter import HttpProvider

KEY = "secret_tests_0123456789abcdef.ThisIsTheKey"
CALIFORNIA = {"name": "us-west-1", "description": "California, USA"}
OSAKA = {"name": "asia-northeast-2", "description": "Osaka, Japan"}
TYPES: dict[str, dict[str, Any]] = {
    "gpu_1x_a10": {"gpu": "A10 (24 GB PCIe)", "cents": 75, "specs": (30, 200, 1400, 1), "regions": [CALIFORNIA, OSAKA]},
    "gpu_8x_h100_sxm5": {"gpu": "H100 (80 GB SXM5)", "cents": 2392, "specs": (208, 1800, 22528, 8), "regions": [OSAKA]},
    "gpu_1x_gh200": {"gpu": "GH200 (96 GB)", "cents": 149, "specs": (64, 432, 4096, 1), "regions": []},
    "cpu_4x_general": {"gpu": "N/A", "cents": 8, "specs": (4, 16, 128, 0), "regions": [CALIFORNIA]},
}
_STATUS = {"starting": "booting", "running": "active", "gone": "terminated"}
_CODES = {
    401: "global/invalid-api-key",
    403: "global/forbidden",
    409: "global/conflict",
    422: "global/invalid-parameters",
}
_TAG_KEY = re.compile(r"[a-z][a-z0-9-:]+")


class LambdaVendor(Vendor):
    provider: ClassVar[type[HttpProvider]] = registry.adapter("lambda")  # type: ignore[assignment]
    description = "lambda.json"
    described_below = "/api/v1"
    variables: ClassVar = {"LAMBDA_API_KEY": KEY}
    statuses: ClassVar[dict[str, tuple[Life, Billing]]] = {
        "booting": ("starting", "none"),
        "active": ("running", "full"),
        "unhealthy": ("unknown", "full"),
        "terminating": ("terminating", "none"),
        "terminated": ("gone", "none"),
        "preempted": ("interrupted", "none"),
    }

    def reset(self) -> None:
        super().reset()
        self.keys = {"the operator's own": "ssh-ed25519 AAAA operator"}
        self.lingers = False
        """What was terminated is shown for a while."""

    def is_authentic(self, request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {KEY}"

    def refusal(self, code: int, detail: str) -> Answer:
        return self.error(
            code, _CODES.get(code, "global/invalid-parameters" if code < 500 else "global/internal-error"), detail
        )

    def error(self, status: int, code: str, message: str) -> Answer:
        return Answer(status, {"error": {"code": code, "message": message, "suggestion": "Try again later."}})

    def price(self, offer_id: str, disk_gb: int) -> int:
        del disk_gb  # it comes with the machine
        return round(TYPES[offer_id]["cents"] * self.dearer) * 10_000

    def bill(self, machine: Machine) -> int:
        minutes = math.ceil(round(machine.seconds(self.now())) / 60)
        return round(self.price(machine.offer, 0) * minutes / 60)

    def labels(self, machine: Machine) -> list[str]:
        return [machine.name, *(tag["value"] for tag in machine.asked["tags"] if tag["key"] == "gpubroker-ref")]

    def received(self, machine: Machine) -> dict[str, Any]:
        config = yaml.safe_load(machine.asked["user_data"])
        files = {file["path"]: file for file in config["write_files"]}
        made = json.loads(files["/etc/gpubroker/container.json"]["content"])
        return {
            "image": made["Image"],
            "args": made.get("Cmd", []),
            "env": dict(one.split("=", 1) for one in made["Env"]),
            "ports": [int(name.partition("/")[0]) for name in made["HostConfig"]["PortBindings"]],
            "disk_gb": None,
            "ssh_key": next(iter(config.get("ssh_authorized_keys", [])), None),
        }

    # Its paths

    @serves("GET", "/instance-types", "offers")
    def list_types(self, _: Request) -> Answer:
        shown = {
            name: {
                "instance_type": self._type(name),
                "regions_with_capacity_available": about["regions"] if self.has_room else [],
            }
            | self.extras
            for name, about in TYPES.items()
        }
        return Answer(200, {"data": shown})

    def _type(self, name: str) -> dict[str, Any]:
        about = TYPES[name]
        names = ("vcpus", "memory_gib", "storage_gib", "gpus")
        return {
            "name": name, "description": f"{about['specs'][3]}x {about['gpu']}", "gpu_description": about["gpu"],
            "price_cents_per_hour": round(about["cents"] * self.dearer), "specs": dict(zip(names, about["specs"], strict=True)),
        } | self.extras  # fmt: skip

    @serves("GET", "/ssh-keys", "keys")
    def list_keys(self, _: Request) -> Answer:
        return Answer(200, {"data": [self._key(name) for name in self.keys]})

    @serves("POST", "/ssh-keys", "add_key")
    def add_key(self, request: Request) -> Answer:
        name = request.json["name"]
        if name in self.keys:
            return self.error(400, "global/invalid-parameters", "there is a key of this name")
        self.keys[name] = request.json["public_key"]
        return Answer(200, {"data": self._key(name)})

    def _key(self, name: str) -> dict[str, str]:
        return {"id": f"id-of-{name}", "name": name, "public_key": self.keys[name]}

    @serves("POST", "/instance-operations/launch", "create")
    def launch(self, request: Request) -> Answer:
        asked = request.json
        tags_fit = all(_TAG_KEY.fullmatch(t["key"]) and len(t["value"]) <= 128 for t in asked.get("tags", []))
        if len(asked["ssh_key_names"]) != 1 or not tags_fit or len(asked["user_data"]) > 1 << 20:
            return self.error(400, "global/invalid-parameters", "exactly one key, and tags that fit")
        if asked["ssh_key_names"][0] not in self.keys:
            return self.error(404, "global/object-does-not-exist", "no such key")
        if not self.has_money:
            return self.error(403, "global/account-inactive", "Your account is inactive.")
        name = asked["instance_type_name"]
        if not self.has_room or asked["region_name"] not in [region["name"] for region in TYPES[name]["regions"]]:
            return self.error(400, "instance-operations/launch/insufficient-capacity", "Not enough capacity.")
        made = [self.bear(asked["name"], asked, name) for _ in range(1 + self.bears_twins)]
        return Answer(200, {"data": {"instance_ids": [made[0].id]}})

    @serves("GET", "/instances", "list")
    def list_instances(self, _: Request) -> Answer:
        return Answer(200, {"data": [self._instance(machine) for machine in self.shown()]})

    @serves("GET", "/instances/{instance}", "get")
    def get_instance(self, _: Request, instance: str) -> Answer:
        machine = self.machines.get(instance) if self.lingers else self.find(instance)
        return Answer(200, {"data": self._instance(machine)}) if machine else self._not_found()

    @serves("POST", "/instance-operations/terminate", "terminate")
    def terminate(self, request: Request) -> Answer:
        machine = self._named(request)
        if machine is None:
            return self._not_found()
        ended = [machine] if machine.gone_at is None else []
        self.end(machine)
        return Answer(200, {"data": {"terminated_instances": [self._instance(machine) for machine in ended]}})

    @serves("POST", "/instance-operations/restart", "restart")
    def restart(self, request: Request) -> Answer:
        machine = self._named(request)
        if machine is None:
            return self._not_found()
        done = [machine] if machine.life == "running" else []
        return Answer(200, {"data": {"restarted_instances": [self._instance(machine) for machine in done]}})

    def _named(self, request: Request) -> Machine | None:
        (name,) = request.json["instance_ids"]
        return self.machines.get(name) if self.lingers else self.find(name)

    def _not_found(self) -> Answer:
        return self.error(404, "global/object-does-not-exist", "Specified instance does not exist.")

    def _instance(self, machine: Machine) -> dict[str, Any]:
        asked, status = machine.asked, machine.status or _STATUS[machine.life]
        actions = ("migrate", "rebuild", "restart", "cold_reboot", "terminate")
        address = {"ip": "198.51.100.2", "hostname": "198.51.100.2"} if status != "booting" else {}
        return {
            "id": machine.id, "name": machine.name, "status": status, "ssh_key_names": asked["ssh_key_names"],
            "file_system_names": [], "region": {"name": asked["region_name"], "description": "Somewhere, USA"},
            "instance_type": self._type(machine.offer), "actions": {name: {"available": True} for name in actions},
            "tags": asked["tags"], "jupyter_token": "t0ken", "is_reserved": False,
        } | address | self.extras  # fmt: skip
