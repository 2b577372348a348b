"""`runpod`: RunPod's pods through its REST interface, version 2. Docker containers on GPUs, billed per second.

A pod has a container disk of 20 GB, which does not outlive a stop, and the disk that was asked for at `/workspace`, which does.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import product
from typing import Any, ClassVar, Final

from gpubroker.errors import ProviderError, Rejected
from gpubroker.ids import find_ref
from gpubroker.providers import base
from gpubroker.providers.base import Capabilities, Endpoint, Instance, ProviderOffer
from gpubroker.providers.http.adapter import Answer, Document, HttpProvider, Kind, Limit
from gpubroker.providers.http.reading import cut_log, event_data, read_nothing, segment

_SUPPORTS: Final = frozenset[base.Support]({"command", "image", "ports", "logs", "stop", "ssh"})
_COUNTS: Final = (1, 2, 4, 8)
_DISK_GB: Final = 20
"""Of each disk: the container's, and the least at `/workspace`. Both are in the price."""
_GB_MICRO_H: Final = 139
"""$0.10 a GB and month of 30 days, running; a stopped pod's volume is $0.20, its container disk nothing."""
_LIVES: Final[Mapping[str, base.Life]] = {
    "PROVISIONING": "starting", "STARTING": "starting", "RUNNING": "running",
    "EXITED": "stopped", "ERROR": "failed", "TERMINATED": "gone",
}  # fmt: skip
_LEVELS: Final[Mapping[str, base.Availability]] = {"NONE": "none", "LOW": "low", "MEDIUM": "medium", "HIGH": "high"}
_REGIONS: Final = frozenset({"EU", "EUR", "AP", "OC", "SEA", "NA", "SA", "ME", "AF"})
_OFFER: Final = re.compile(r"(secure|community)/(\d{1,2})x/(.+)")


class Runpod(HttpProvider):
    """One account at RunPod."""

    name: ClassVar[str] = "runpod"
    credentials: ClassVar[tuple[str, ...]] = ("RUNPOD_API_KEY",)
    base_url: ClassVar[str] = "https://api.runpod.io"
    limits: ClassVar[Mapping[str, Limit]] = {"calls": Limit(interval_seconds=0.1, burst=20)}
    capabilities: ClassVar[Capabilities] = Capabilities(
        kind="container",
        supports=_SUPPORTS,
        stopped_billing="storage",
        boot_seconds=60,
        boot_limit_seconds=900,
        bills_boot=True,
        termination_allowance_seconds=60,
        visibility_lag_seconds=120,
    )
    quiet_seconds: float = 1.0
    """A log's stream has shown what there was when it is silent for so long."""

    @classmethod
    def judge(cls, kind: Kind, answer: Answer) -> ProviderError | None:
        """No capacity is 400 without a code, for a create as for a start; a 403 to a create bars one kind of GPU."""
        meaning = {("create", 400): "no_capacity", ("act", 400): "no_capacity", ("create", 403): "pool_barred"}
        code = meaning.get((kind, answer.status))
        return Rejected(code, answer.detail()) if code else None

    async def list_offers(self) -> Sequence[ProviderOffer]:
        """Every GPU in both clouds, 1, 2, 4 and 8 of them, in each data centre that has them."""
        found: list[ProviderOffer] = []
        for cloud, count in product(("secure", "community"), _COUNTS):
            query = {"include": "AVAILABILITY", "product": "POD", "count": count, "cloud": cloud.upper()}
            gpus = await self.http.call("offers", "GET", "/v2/catalog/gpus", query=query, read=_read_gpus)
            found += [offer for gpu in gpus for offer in _offers(gpu, cloud, count)]
        return found

    async def create(self, spec: base.Spec, offer: ProviderOffer, ref: str) -> base.Created:
        """Create a pod whose name is the reference."""
        body, hidden = _body(spec, offer, ref), tuple(spec.env.values())
        return await self.http.call("create", "POST", "/v2/pods", body=body, read=_read_created, hidden=hidden)

    async def list_ours(self) -> Sequence[Instance]:
        """Every pod with a name of ours: one page, and no filter."""
        return await self.http.call("read", "GET", "/v2/pods", read=_read_list)

    async def get(self, instance_id: str) -> Instance:
        """One pod now."""
        return await self.http.call("read", "GET", _path(instance_id), instance_id=instance_id, read=_read_one)

    async def terminate(self, instance_id: str) -> None:
        """Delete the pod and its disks."""
        path = _path(instance_id)
        await self.http.call("act", "DELETE", path, instance_id=instance_id, manner="urgent", read=read_nothing)

    async def stop(self, instance_id: str) -> None:
        """Stop it; `/workspace` stays and is billed."""
        await self._act(instance_id, "stop", ("stopped", "stopping"))

    async def start(self, instance_id: str) -> None:
        """Start it on the host that it has: Rejected `no_capacity` when no GPU is free there."""
        await self._act(instance_id, "start", ("running", "starting"))

    async def restart(self, instance_id: str) -> None:
        """Restart the container in place."""
        await self._act(instance_id, "restart", ())

    async def _act(self, instance_id: str, action: str, done: Sequence[base.Life]) -> None:
        path, manner = f"{_path(instance_id)}/action", "repeatable" if done else "once"
        try:
            await self.http.call(
                "act", "POST", path, body={"action": action}, instance_id=instance_id, manner=manner, read=read_nothing
            )
        except Rejected as rejected:  # 409: not in this state; when it is what was wanted, it is done
            if rejected.code != "http_409" or (await self.get(instance_id)).life not in done:
                raise

    async def logs(self, instance_id: str, *, after: int | None, since: datetime | None, limit: int) -> base.LogPage:
        """The program's lines from the first that RunPod still has, up to 16 MiB; positions count from there."""
        stream = await self.http.read_stream(
            f"{_path(instance_id)}/logs",
            query={"source": "container", "since": "1970-01-01T00:00:00Z"},
            instance_id=instance_id,
            quiet_seconds=self.quiet_seconds,
            cap=16 * 1024 * 1024,
        )
        return cut_log([_line(said) for said in event_data(stream)], after, since, limit)


def _path(instance_id: str) -> str:
    return f"/v2/pods/{segment(instance_id)}"


def _read_gpus(answer: Answer) -> list[Document]:
    return answer.document().children("gpus")


def _offers(gpu: Document, cloud: str, count: int) -> Iterator[ProviderOffer]:
    price = gpu.child("price")
    if not gpu.flag(cloud) or gpu.child("maxCount").whole(cloud) < count or not price.usd(cloud):
        return
    centres = gpu.children("dataCenters") if gpu.has("dataCenters") else []
    for centre in centres or [gpu]:
        region = centre.text("id") if centres else "any"
        yield ProviderOffer(
            provider_offer_id=f"{cloud}/{count}x/{gpu.text('id')}", gpu=gpu.text("id"), gpu_count=count,
            vram_gb=gpu.whole("memory"), vcpus=0, ram_gb=0,  # the catalogue says neither of these two
            disk_gb=2000, disk_base_gb=_DISK_GB, disk_micro_gb_h=_GB_MICRO_H, stopped_disk_micro_gb_h=2 * _GB_MICRO_H,
            price_micro_h=price.usd(cloud) * count + 2 * _DISK_GB * _GB_MICRO_H, stopped_micro_h=2 * _DISK_GB * _GB_MICRO_H,
            region=region, country=_country(region), supports=_SUPPORTS,
            availability=_LEVELS.get(str(centre.values.get("availability")), "none"),
        )  # fmt: skip


def _country(region: str) -> str | None:
    """`US-KS-2` is in the United States, `EU-RO-1` in Romania."""
    parts = region.split("-")
    code = parts[1] if parts[0] in _REGIONS and len(parts) > 1 else parts[0]
    return code if len(code) == 2 and code.isupper() else None  # noqa: PLR2004 - ISO 3166


def _body(spec: base.Spec, offer: ProviderOffer, ref: str) -> dict[str, Any]:
    rented = _OFFER.fullmatch(offer.provider_offer_id)
    if rented is None:
        raise Rejected("bad_offer", offer.provider_offer_id)
    if spec.image is None:
        raise Rejected("image_needed", "a pod at RunPod needs an image", try_next_offer=False)
    if spec.registry_auth is not None:
        raise Rejected("registry_auth", "RunPod takes stored registry credentials only")
    if any(port.protocol == "udp" for port in spec.ports):
        raise Rejected("udp_port", "RunPod forwards no UDP")
    ports = [f"{port.port}/{port.protocol}" for port in spec.ports]
    # Without a PUBLIC_KEY of the pod's own RunPod puts the account's keys in: they are the operator's.
    env = {"PUBLIC_KEY": spec.ssh_public_key or "", **spec.env}
    if spec.ssh_public_key and "22/tcp" not in ports:
        ports.append("22/tcp")
    body: dict[str, Any] = {
        "name": ref,
        "image": spec.image,
        "cloud": rented[1].upper(),
        "gpu": {"id": rented[3], "count": int(rented[2])},
        "disk": _DISK_GB,
        "mounts": {"persistent": {"size": max(_DISK_GB, spec.disk_gb), "path": "/workspace"}},
        "env": env,
        "ports": ports,
    }
    if spec.command:
        body["args"] = shlex.join(spec.command)
    if offer.region != "any":
        body["dataCenterIds"] = [offer.region]
    return body


def _read_one(answer: Answer) -> Instance:
    return _instance(answer.document())


def _read_list(answer: Answer) -> list[Instance]:
    return [_instance(pod) for pod in answer.document().children("pods") if find_ref(str(pod.get("name")))]


def _read_created(answer: Answer) -> base.Created:
    """Its id is all that is needed: what cannot be read of the rest is looked at later."""
    pod = answer.document()
    try:
        return base.Created(pod.text("id"), _instance(pod))
    except ProviderError:
        return base.Created(pod.text("id"))


def _instance(pod: Document) -> Instance:
    status = pod.text("status")
    life: base.Life = _LIVES.get(status, "unknown")
    return Instance(
        id=pod.text("id"),
        ref=find_ref(str(pod.get("name"))),
        status=status,
        life=life,
        billing=_billing(pod, life),
        started_at=pod.moment("startedAt") if pod.has("startedAt") else None,
        endpoints=tuple(_endpoints(pod)) if life == "running" else (),
        price_micro_h=pod.usd("cost") if pod.has("cost") and life == "running" else None,
    )


def _billing(pod: Document, life: base.Life) -> base.Billing:
    """`cost` is 0 when a pod is stopped, although its volume bills."""
    if life in {"starting", "running", "failed"}:
        return "full"
    if life == "stopped":
        return "storage" if pod.find("mounts", "persistent") is not None else "none"
    return "none" if life == "gone" else "unknown"


def _endpoints(pod: Document) -> Iterator[Endpoint]:
    """A `http` port is behind RunPod's proxy, another where `runtime` maps it, once it does; `ssh.direct` tells of sshd's."""
    runtime, ssh = pod.find("runtime"), pod.find("ssh", "direct")
    live = runtime.children("ports") if runtime is not None and runtime.has("ports") else []
    doors = {f"{door.values.get('private')}/{door.values.get('type')}": door for door in live}
    for asked in pod.texts("ports") if pod.has("ports") else ():
        inside, _, protocol = asked.partition("/")
        door = doors.get(asked, pod)
        if not inside.isdecimal():
            continue
        if protocol == "http":
            host = f"{pod.text('id')}-{inside}.proxy.runpod.net"
            yield Endpoint(f"http-{inside}", int(inside), "http", host, 443, f"https://{host}")
        elif asked == "22/tcp" and ssh is not None:
            outside = ssh.whole("port", least=1, most=65535)
            yield Endpoint("ssh", 22, "tcp", ssh.text("host"), outside, command=ssh.text("command"))
        elif door.has("ip") and door.has("public"):
            outside = door.whole("public", least=1, most=65535)
            yield Endpoint(f"{protocol}-{inside}", int(inside), protocol, door.text("ip"), outside)


def _line(said: Document) -> tuple[datetime | None, bytes]:
    return said.moment("ts") if said.has("ts") else None, str(said.values.get("line", "")).encode() + b"\n"
