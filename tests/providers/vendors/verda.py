"""Verda as the shapes of its SDK have it (PyPI `verda` 1.25): tokens, ids as plain text, a result for each instance, volumes that
outlive machines that did not name them. Verda publishes no description that can be had: the paths below are what the SDK sends and
reads.
"""

import base64
import json
import re
from datetime import UTC, datetime
from typing import Any, ClassVar

from tests.providers.vendors import described
from tests.providers.vendors.server import Answer, Machine, Request, Vendor, serves

from gpubroker.providers.base import Billing, Life
from gpubroker.providers.verda import Verda

CLIENT, SECRET = "clientIbk5bdxV64lKAWOqYnvSi", "secretOfTheTests0123456789abcdef"
DOCKER = ["ubuntu-22.04", "ubuntu-24.04-cuda-12.8-open", "ubuntu-24.04-cuda-12.8-open-docker"]
TYPES: dict[str, dict[str, Any]] = {
    "1H100.80S.30V": {"gpu": ("1x H100 SXM5 80GB", 1, 80), "cpus": 30, "ram": 120, "price": "2.29", "spot": "0.801",
                      "os": DOCKER, "where": ["FIN-01", "ICE-01"]},
    "8H200.141S.176V": {"gpu": ("8x H200 SXM5 141GB", 8, 1128), "cpus": 176, "ram": 1480, "price": "27.12", "spot": "9.49",
                        "os": ["ubuntu-24.04-cuda-13.0-open-docker", "ubuntu-24.04"], "where": ["FIN-03"]},
    "2B200.60V": {"gpu": ("2x B200 SXM6 180GB", 2, 360), "cpus": 60, "ram": 368, "price": "9.98", "spot": "0",
                  "os": ["ubuntu-24.04"], "where": ["FIN-03"]},
    "CPU.4V.16G": {"gpu": ("", 0, 0), "cpus": 4, "ram": 16, "price": "0.0279", "spot": "0.0098",
                   "os": ["ubuntu-24.04", "debian-12"], "where": ["FIN-01"]},
}  # fmt: skip
GB_MONTH = 0.2
_STATUS = {"starting": "provisioning", "running": "running", "stopped": "offline", "failed": "error"}
_TEXT, _TEXTS = {"type": "string"}, {"type": "array", "items": {"type": "string"}}


def _shape(required: str, **properties: Any) -> dict[str, Any]:
    names = required.split()
    known = {name: {} for name in names if name not in properties} | properties
    return {"type": "object", "required": names, "properties": known}


def _operation(answers: dict[str, Any], body: Any = None, query: str = "", path: str = "") -> dict[str, Any]:
    content = {code: {"content": {"application/json": {"schema": schema}}} for code, schema in answers.items()}
    parameters = [{"name": name, "in": "query", "schema": _TEXT} for name in query.split()]
    parameters += [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in path.split()]
    found: dict[str, Any] = {"responses": content, "parameters": parameters}
    if body is not None:
        found["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": {**body, "additionalProperties": False}}},
        }
    return found


_INSTANCE = _shape(
    "id instance_type price_per_hour hostname description status created_at ssh_key_ids cpu gpu memory storage gpu_memory",
    price_per_hour={"type": "number"}, ssh_key_ids=_TEXTS, status=_TEXT, ip={"type": ["string", "null"]},
)  # fmt: skip
_TYPE = _shape(
    "id instance_type price_per_hour spot_price description cpu gpu memory gpu_memory storage best_for model name p2p currency "
    "manufacturer display_name supported_os", price_per_hour=_TEXT, spot_price=_TEXT, currency={"enum": ["usd", "eur"]},
)  # fmt: skip
_LIST = {"type": "array"}
_ORDER = _shape(
    "instance_type image hostname description location_code os_volume is_spot ssh_key_ids startup_script_id volumes "
    "existing_volumes coupon",
    os_volume=_shape("name size", size={"type": "integer"}, on_spot_discontinue=_TEXT), is_spot={"type": "boolean"},
    contract={"enum": ["LONG_TERM", "PAY_AS_YOU_GO", "SPOT"]}, pricing={"enum": ["DYNAMIC_PRICE", "FIXED_PRICE"]},
    volumes=_LIST, existing_volumes=_LIST, coupon={}, ssh_key_ids=_TEXTS,
    tags={"type": "array", "items": _shape("key", key=_TEXT, value=_TEXT)},
)  # fmt: skip
_ACTION = _shape(
    "id action volume_ids", id=_TEXTS, action={"enum": ["start", "shutdown", "delete", "hibernate", "restore"]},
    volume_ids={"type": ["array", "null"], "items": _TEXT},
    delete_permanently={"const": True},
)  # fmt: skip
_ERROR = _shape("code message")
_REFUSED = dict.fromkeys(("400", "401", "402", "403", "404", "503"), _ERROR)
_TOKEN = _shape("access_token refresh_token scope token_type expires_in")
_GRANT = _shape("grant_type client_id client_secret", grant_type={"const": "client_credentials"})
DESCRIPTION = described.Description(
    {
        "openapi": "3.1.0",
        "paths": {
            "/oauth2/token": {"post": _operation({"200": _TOKEN} | _REFUSED, _GRANT)},
            "/instance-types": {"get": _operation({"200": _LIST | {"items": _TYPE}} | _REFUSED, query="currency")},
            "/instance-availability": {
                "get": _operation({"200": _LIST | {"items": _shape("location_code availabilities")}} | _REFUSED,
                                  query="isSpot location_code"),
            },
            "/volume-types": {"get": _operation({"200": _LIST | {"items": _shape("type price")}} | _REFUSED)},
            "/scripts": {"post": _operation({"201": {}} | _REFUSED, _shape("name script", name=_TEXT, script=_TEXT))},
            "/scripts/{id}": {"delete": _operation({"200": {}} | _REFUSED, path="id")},
            "/instances": {
                "get": _operation({"200": _LIST | {"items": _INSTANCE}} | _REFUSED, query="status"),
                "post": _operation({"202": {}} | _REFUSED, _ORDER),
                "put": _operation({"202": _LIST, "207": _LIST} | _REFUSED, _ACTION),
            },
            "/instances/{id}": {"get": _operation({"200": _INSTANCE} | _REFUSED, path="id")},
        },
    }
)  # fmt: skip


class VerdaVendor(Vendor):
    provider = Verda
    variables: ClassVar = {"VERDA_CLIENT_ID": CLIENT, "VERDA_CLIENT_SECRET": SECRET}
    statuses: ClassVar[dict[str, tuple[Life, Billing]]] = {
        "new": ("starting", "unknown"),
        "ordered": ("starting", "unknown"),
        "provisioning": ("starting", "unknown"),
        "validating": ("starting", "unknown"),
        "pending": ("starting", "none"),
        "running": ("running", "full"),
        "offline": ("stopped", "full"),
        "discontinued": ("gone", "none"),
        "deleting": ("terminating", "unknown"),
        "no_capacity": ("failed", "none"),
        "error": ("failed", "unknown"),
        "notfound": ("unknown", "unknown"),
        "unknown": ("unknown", "unknown"),
    }

    def reset(self) -> None:
        super().reset()
        self.tokens: list[str] = []
        self.scripts: dict[str, dict[str, str]] = {}
        self.volumes: set[str] = set()
        self.kept: dict[str, dict[str, str]] = {}
        """Scripts as they were when machines were made of them."""
        self.currency = "usd"

    def is_authentic(self, request: Request) -> bool:
        if request.path.endswith("/oauth2/token"):
            return True
        return bool(self.tokens) and request.headers.get("authorization") == f"Bearer {self.tokens[-1]}"

    def refusal(self, code: int, detail: str) -> Answer:
        codes = {401: "unauthorized_request", 402: "insufficient_funds", 403: "forbidden_action", 404: "not_found"}
        fallback = "server_error" if code >= 500 else "invalid_request"
        return Answer(code, {"code": codes.get(code, fallback), "message": detail})

    def _check_request(self, request: Request, path: str) -> None:
        self.violations += DESCRIPTION.check_request(request.method, path, request.query, request.json)

    def _check_answer(self, request: Request, path: str, answer: Answer) -> None:
        is_odd = self.extras or any(machine.status not in {None, *self.statuses} for machine in self.machines.values())
        if not is_odd and answer.content_type == "application/json":
            said = DESCRIPTION.check_answer(request.method, path, answer.status, answer.content_type, answer.raw)
            self.violations += [f"the simulator: {one}" for one in said]

    def price(self, offer_id: str, disk_gb: int, kind: str = "price") -> int:
        about = TYPES[offer_id.partition("/")[0]]
        return round(float(about[kind]) * self.dearer * 1_000_000) + disk_gb * round(GB_MONTH * 1_000_000 / 730)

    def bill(self, machine: Machine) -> int:
        """It bills the time that the machine is there, off or not, and its volume with it."""
        there, asked = (machine.gone_at or self.now()) - machine.born_at, machine.asked
        price = self.price(machine.offer, asked["os_volume"]["size"], "spot" if asked["is_spot"] else "price")
        return round(price * there / 3600)

    def labels(self, machine: Machine) -> list[str]:
        return [machine.name, machine.asked["description"], *(tag["value"] for tag in machine.asked["tags"])]

    def received(self, machine: Machine) -> dict[str, Any]:
        script = self.kept[machine.id]["script"]
        files = dict(
            re.findall(r"^cat > (\S+) <<'end of gpubroker'\n(.*?)\nend of gpubroker$", script, re.MULTILINE | re.DOTALL)
        )
        made = json.loads(files["/etc/gpubroker/container.json"])
        key = re.search(r"^echo (\S+) \| base64 -d >> /root/.ssh/authorized_keys$", script, re.MULTILINE)
        return {
            "image": made["Image"],
            "args": made.get("Cmd", []),
            "env": dict(one.split("=", 1) for one in made["Env"]),
            "ports": [int(name.partition("/")[0]) for name in made["HostConfig"]["PortBindings"]],
            "disk_gb": machine.asked["os_volume"]["size"],
            "ssh_key": base64.b64decode(key[1]).decode().strip() if key else None,
        }

    # Its paths

    @serves("POST", "/oauth2/token", "token")
    def give_token(self, request: Request) -> Answer:
        asked = request.json
        if (asked["client_id"], asked["client_secret"]) != (CLIENT, SECRET):
            return self.refusal(401, "the client is not known")
        self.tokens.append(f"token-{len(self.tokens)}-0123456789abcdef")
        token = {"access_token": self.tokens[-1], "refresh_token": "r", "scope": "cloud-api-v1", "token_type": "Bearer"}
        return Answer(200, token | {"expires_in": 3600})

    @serves("GET", "/instance-types", "offers")
    def list_types(self, _: Request) -> Answer:
        return Answer(200, [self._type(name) for name in TYPES])

    def _type(self, name: str) -> dict[str, Any]:
        about = TYPES[name]
        gpu, count, vram = about["gpu"]
        return {
            "id": f"id-of-{name}", "instance_type": name, "description": "Dedicated Hardware Instance", "best_for": [], "model": "",
            "name": gpu, "p2p": None, "manufacturer": "NVIDIA", "display_name": None, "currency": self.currency,
            "price_per_hour": str(float(about["price"]) * self.dearer), "spot_price": about["spot"], "supported_os": about["os"],
            "cpu": {"description": "", "number_of_cores": about["cpus"]}, "gpu": {"description": gpu, "number_of_gpus": count},
            "memory": {"description": "", "size_in_gigabytes": about["ram"]},
            "gpu_memory": {"description": "", "size_in_gigabytes": vram}, "storage": {"description": "dynamic"},
        } | self.extras  # fmt: skip

    @serves("GET", "/instance-availability", "offers")
    def list_availability(self, _: Request) -> Answer:
        places = ("FIN-01", "FIN-03", "ICE-01")
        where = {
            place: [name for name, about in TYPES.items() if place in about["where"] and self.has_room]
            for place in places
        }
        return Answer(200, [{"location_code": place, "availabilities": names} for place, names in where.items()])

    @serves("GET", "/volume-types", "offers")
    def list_volume_types(self, _: Request) -> Answer:
        price = {"price_per_month_per_gb": GB_MONTH, "cps_per_gb": 7.6e-8, "currency": self.currency}
        return Answer(
            200, [{"type": "HDD", "price": price | {"price_per_month_per_gb": 0.05}}, {"type": "NVMe", "price": price}]
        )

    @serves("POST", "/scripts", "script")
    def add_script(self, request: Request) -> Answer:
        name = f"script-{len(self.requests)}"
        self.scripts[name] = request.json
        return Answer(201, name.encode(), content_type="text/plain")

    @serves("DELETE", "/scripts/{script}", "drop")
    def delete_script(self, _: Request, script: str) -> Answer:
        if self.scripts.pop(script, None) is None:
            return self.refusal(404, "Invalid script id")
        return Answer(200, b"", content_type="text/plain")

    @serves("POST", "/instances", "create")
    def order(self, request: Request) -> Answer:
        asked = request.json
        if not self.has_money:
            return self.refusal(402, "Insufficient funds")
        if not self.has_room:
            return Answer(503, {"code": "service_unavailable", "message": "No capacity available"})
        assert asked["startup_script_id"] in self.scripts
        made = self._make(asked)
        if self.bears_twins:
            self._make(asked)
        return Answer(202, made.id.encode(), content_type="text/plain; charset=utf-8")

    def bear(self, name: str, asked: Any, offer: str) -> Machine:
        made = super().bear(name, asked, offer)
        self.volumes.add(f"vol-{made.id}")
        self.kept[made.id] = self.scripts.get(asked["startup_script_id"], {})
        return made

    def _make(self, asked: Any) -> Machine:
        return self.bear(asked["hostname"], asked, f"{asked['instance_type']}/{asked['image']}")

    @serves("GET", "/instances", "list")
    def list_instances(self, _: Request) -> Answer:
        return Answer(200, [self._instance(machine) for machine in self.shown()])

    @serves("GET", "/instances/{instance}", "get")
    def get_instance(self, _: Request, instance: str) -> Answer:
        machine = self.find(instance)
        return Answer(200, self._instance(machine)) if machine else self.refusal(404, "Instance not found")

    @serves(
        "PUT",
        "/instances",
        lambda request: {"delete": "terminate", "shutdown": "stop"}.get(request.json["action"], "start"),
    )
    def act(self, request: Request) -> Answer:
        asked, (instance,) = request.json, request.json["id"]
        machine = self.find(instance)
        said = {"action": asked["action"], "instanceId": instance}
        if machine is None:
            return Answer(207, [said | {"status": "error", "error": "instance not found", "statusCode": 404}])
        wanted = {"start": "stopped", "shutdown": "running"}.get(asked["action"], machine.life)
        if machine.life == "starting" or machine.life != wanted:
            return Answer(207, [said | {"status": "error", "error": "not in this state", "statusCode": 400}])
        if asked["action"] == "start" and not self.has_room:
            return Answer(503, {"code": "service_unavailable", "message": "No capacity available"})
        if asked["action"] == "delete":
            self.volumes -= set(asked["volume_ids"])
            self.end(machine)
        else:
            self.run(machine) if asked["action"] == "start" else self.halt(machine)
        return Answer(202, [said | {"status": "success"}])

    def _instance(self, machine: Machine) -> dict[str, Any]:
        asked, status = machine.asked, machine.status or _STATUS[machine.life]
        kind = self._type(asked["instance_type"])
        parts = {name: kind[name] for name in ("cpu", "gpu", "memory", "gpu_memory", "storage")}
        has_ip = status in {"running", "offline"}
        return {
            "id": machine.id, "instance_type": asked["instance_type"], "price_per_hour": float(kind["price_per_hour"]),
            "hostname": machine.name, "description": asked["description"] if machine.name == asked["hostname"] else machine.name,
            "status": status, "created_at": datetime.fromtimestamp(machine.born_at, UTC).isoformat(), "ssh_key_ids": [], **parts,
            "ip": "135.181.63.50" if has_ip else None, "os_volume_id": f"vol-{machine.id}" if machine.life != "starting" else None,
            "location": asked["location_code"], "image": asked["image"], "startup_script_id": asked["startup_script_id"],
            "is_spot": asked["is_spot"], "contract": asked["contract"], "pricing": asked["pricing"],
            "tags": asked["tags"] if machine.name == asked["hostname"] else [],
        } | self.extras  # fmt: skip
