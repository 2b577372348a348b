"""RunPod as its description has it: per second, stopped volumes bill double, no capacity is a 400 without a code."""

import shlex
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

from tests.providers.vendors.server import Answer, Machine, Request, Vendor, serves

from gpubroker.providers.base import Billing, Life
from gpubroker.providers.runpod import Runpod

KEY = "rpa_ThisIsTheKeyOfTheTests0123456789"
GPUS: dict[str, dict[str, Any]] = {
    "NVIDIA GeForce RTX 4090": {"name": "RTX 4090", "memory": 24, "secure": "0.69", "community": "0.34", "max": (8, 4)},
    "NVIDIA H100 80GB HBM3": {"name": "H100 SXM", "memory": 80, "secure": "3.49", "community": "0", "max": (8, 0)},
    "NVIDIA A40": {"name": "A40", "memory": 48, "secure": "0.4", "community": "0", "max": (4, 0)},
}
_ACTIONS = {
    "RUNNING": ["stop", "restart", "terminate"],
    "EXITED": ["start", "terminate"],
    "ERROR": ["start", "terminate"],
    "PROVISIONING": ["stop", "terminate"],
    "STARTING": ["stop", "terminate"],
    "TERMINATED": [],
}
_STATUS = {
    "starting": "PROVISIONING",
    "running": "RUNNING",
    "stopped": "EXITED",
    "gone": "TERMINATED",
    "failed": "ERROR",
}
_STORAGE_MONTH = 720


class RunpodVendor(Vendor):
    provider = Runpod
    description = "runpod-rest-v2.json"
    variables: ClassVar = {"RUNPOD_API_KEY": KEY}
    statuses: ClassVar[dict[str, tuple[Life, Billing]]] = {
        "PROVISIONING": ("starting", "full"),
        "STARTING": ("starting", "full"),
        "RUNNING": ("running", "full"),
        "EXITED": ("stopped", "storage"),
        "ERROR": ("failed", "full"),
        "TERMINATED": ("gone", "none"),
    }

    def is_authentic(self, request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {KEY}"

    def refusal(self, code: int, detail: str) -> Answer:
        body = {"title": "Refused", "status": code, "detail": detail}
        return Answer(code, body, content_type="application/problem+json")

    def price(self, offer_id: str, disk_gb: int) -> int:
        cloud, count, gpu = offer_id.split("/", 2)
        compute = round(float(GPUS[gpu][cloud]) * self.dearer * 1_000_000) * int(count.removesuffix("x"))
        return compute + (20 + max(20, disk_gb)) * 139

    def bill(self, machine: Machine) -> int:
        ran = machine.seconds(self.now())
        there = (machine.gone_at or self.now()) - machine.born_at
        volume = machine.asked["mounts"]["persistent"]["size"]
        rate = self.price(machine.offer, volume)
        return round((rate * ran + volume * 278 * (there - ran)) / 3600)

    def labels(self, machine: Machine) -> list[str]:
        return [machine.name]

    def received(self, machine: Machine) -> dict[str, Any]:
        asked = machine.asked
        return {
            "image": asked["image"],
            "args": shlex.split(asked.get("args", "")),
            "env": {key: value for key, value in asked["env"].items() if key != "PUBLIC_KEY"},
            "ports": [int(port.partition("/")[0]) for port in asked["ports"]],
            "disk_gb": asked["mounts"]["persistent"]["size"],
            "ssh_key": asked["env"].get("PUBLIC_KEY"),
        }

    # Its paths

    @serves("GET", "/v2/catalog/gpus", "offers")
    def list_gpus(self, request: Request) -> Answer:
        if request.query.get("include") and "product" not in request.query:
            return self.refusal(400, "include=AVAILABILITY requires product")
        return Answer(200, {"gpus": [self._gpu(gpu_id, about) for gpu_id, about in GPUS.items()]})

    def _gpu(self, gpu_id: str, about: dict[str, Any]) -> dict[str, Any]:
        level = "HIGH" if self.has_room else "NONE"
        shown: dict[str, Any] = {
            "id": gpu_id, "name": about["name"], "pool": None, "manufacturer": "NVIDIA", "memory": about["memory"],
            "secure": about["secure"] != "0", "community": about["community"] != "0",
            "price": {cloud: float(about[cloud]) * self.dearer for cloud in ("secure", "community")},
            "maxCount": dict(zip(("secure", "community"), about["max"], strict=True)), "availability": level,
        }  # fmt: skip
        if self.has_room and gpu_id != "NVIDIA A40":
            shown["dataCenters"] = [
                {"id": "US-KS-2", "name": "US Kansas 2", "availability": "LOW"},
                {"id": "EU-RO-1", "name": "Romania 1", "availability": "HIGH"},
            ]
        return shown | self.extras

    @serves("POST", "/v2/pods", "create")
    def create_pod(self, request: Request) -> Answer:
        asked = request.json
        if not self.has_money:
            return self.refusal(402, "insufficient balance")
        if not self.has_room:
            return self.refusal(400, "There are no instances currently available")
        cloud, gpu = asked["cloud"].lower(), asked["gpu"]
        offer = f"{cloud}/{gpu['count']}x/{gpu['id']}"
        made = self.bear(asked["name"], asked, offer)
        if self.bears_twins:
            self.bear(asked["name"], asked, offer)
        return Answer(201, self._pod(made))

    @serves("GET", "/v2/pods", "list")
    def list_pods(self, _: Request) -> Answer:
        return Answer(200, {"pods": [self._pod(machine) for machine in self.shown()]})

    @serves("GET", "/v2/pods/{pod}", "get")
    def get_pod(self, _: Request, pod: str) -> Answer:
        machine = self.find(pod)
        return Answer(200, self._pod(machine)) if machine else self.refusal(404, "pod not found")

    @serves("DELETE", "/v2/pods/{pod}", "terminate")
    def delete_pod(self, _: Request, pod: str) -> Answer:
        machine = self.find(pod)
        if machine is None:
            return self.refusal(404, "pod not found")
        self.end(machine)
        return Answer(204)

    @serves("POST", "/v2/pods/{pod}/action", lambda request: request.json["action"])
    def act(self, request: Request, pod: str) -> Answer:
        machine, action = self.find(pod), request.json["action"]
        if machine is None:
            return self.refusal(404, "pod not found")
        if action not in _ACTIONS[_STATUS[machine.life]]:
            return self.refusal(409, f"{action} is not allowed")
        if action == "start" and not self.has_room:
            return self.refusal(400, "There are not enough free GPUs on the host machine to start this pod.")
        self.halt(machine) if action == "stop" else self.run(machine)
        return Answer(200, self._pod(machine))

    @serves("GET", "/v2/pods/{pod}/logs", "logs")
    def read_log(self, _: Request, pod: str) -> Answer:
        machine = self.find(pod)
        if machine is None:
            return self.refusal(404, "pod not found")
        begin = datetime.fromtimestamp(machine.born_at, UTC)
        events = b""
        for n, line in enumerate(machine.log.splitlines()):
            ts = (begin + timedelta(seconds=n)).isoformat()
            said = f'{{"ts":"{ts}","source":"container","line":"{line}"}}'
            events += f"id: {ts}/{n:012d}\ndata: {said}\n\n".encode()
        return Answer(200, events, {"Cache-Control": "no-cache"}, "text/event-stream", hold=True)

    def _pod(self, machine: Machine) -> dict[str, Any]:
        asked, status = machine.asked, machine.status or _STATUS[machine.life]
        is_on = status == "RUNNING"
        ports = [int(port.partition("/")[0]) for port in asked.get("ports", [])]
        kinds = [port.partition("/")[2] for port in asked.get("ports", [])]
        ip, begun = "195.26.233.3", datetime.fromtimestamp(machine.started_at or 0, UTC).isoformat()
        direct = {"host": ip, "port": 40022, "username": "root", "command": f"ssh root@{ip} -p 40022"}
        compute = self.price(machine.offer, 20) - 40 * 139 if machine.offer else 0
        return {
            "id": machine.id, "name": machine.name, "image": asked.get("image", ""), "args": asked.get("args", ""),
            "disk": asked.get("disk", 20), "ports": asked.get("ports", []), "env": asked.get("env", {}), "registry": None,
            "status": status, "actions": _ACTIONS.get(status, []), "mounts": asked.get("mounts", {}),
            "gpu": asked.get("gpu", {"id": "x"}),
            "cloud": asked.get("cloud", "SECURE"), "dataCenterId": "US-KS-2", "cudaVersion": None,
            "ssh": {"proxy": None, "direct": direct if is_on and 22 in ports else None}, "template": None,
            "cost": compute / 1_000_000 if is_on else 0.0, "locked": False, "globalNetworking": {"enabled": False},
            "runtime": {
                "uptime": 1,
                "ports": [{"private": p, "public": 40000 + p, "type": k, "ip": ip} for p, k in zip(ports, kinds, strict=True)],
            } if is_on else None,
            "createdAt": datetime.fromtimestamp(machine.born_at, UTC).isoformat(), "startedAt": begun if machine.runs else None,
        } | self.extras  # fmt: skip
