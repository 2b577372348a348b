"""`shadeform`: machines of many clouds through Shadeform's interface, version 1, which runs the pod's image on them in Docker.

Shadeform itself deletes an instance at its hard stop, or when it has cost more than it could until then. No stop, no log.
docs/providers.md says what was met.
"""

import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar, Final

import httpx

from gpubroker.errors import ProviderError, Rejected
from gpubroker.ids import find_ref
from gpubroker.providers import base
from gpubroker.providers.base import Capabilities, Instance, ProviderOffer
from gpubroker.providers.http import ports
from gpubroker.providers.http.adapter import Answer, Document, Header, HttpProvider, Kind, Limit, before_create
from gpubroker.providers.http.client import Manner
from gpubroker.providers.http.reading import read_nothing, segment

_SUPPORTS: Final = frozenset[base.Support]({"command", "image", "ports", "ssh"})
_MACHINES: Final = frozenset({"vm", "baremetal"})  # what has a Docker to run an image in; a `container` has none
_LIVES: Final[Mapping[str, tuple[base.Life, base.Billing]]] = {
    "creating": ("starting", "none"), "pending_provider": ("starting", "none"), "pending": ("starting", "none"),
    "active": ("running", "full"), "error": ("failed", "unknown"),
    "deleting": ("terminating", "none"), "deleted": ("gone", "none"),
}  # fmt: skip
_REFUSALS: Final[Mapping[object, str]] = {"OUT_OF_STOCK": "no_capacity", "INSUFFICIENT_FUNDS": "no_balance"}
_FORM: Final = re.compile(r"(sxm|pcie|nvl)\d?", re.IGNORECASE)
_COUNTRY: Final = re.compile(r"(?!EU|UK)[A-Z]{2}\b")
_PORTS_TAG: Final = "gpubroker-ports="
_UNTIL_TAG: Final = "gpubroker-until="
"""The hard stop in seconds since 1970: a listing does not show `auto_delete`."""
_SPARE_SECONDS: Final = 3600
"""So much later than the date the spending would reach its threshold: it is there for when the date fails."""


class Shadeform(HttpProvider):
    """One account at Shadeform."""

    name: ClassVar[str] = "shadeform"
    credentials: ClassVar[tuple[str, ...]] = ("SHADEFORM_API_KEY",)
    base_url: ClassVar[str] = "https://api.shadeform.ai/v1"
    limits: ClassVar[Mapping[str, Limit]] = {"calls": Limit(interval_seconds=0.2, burst=10)}
    capabilities: ClassVar[Capabilities] = Capabilities(
        kind="vm", supports=_SUPPORTS, stopped_billing="full", boot_seconds=300, boot_limit_seconds=1800, bills_boot=False,
        termination_allowance_seconds=60, visibility_lag_seconds=120, moves_hard_stop=True, ttl=True,
    )  # fmt: skip

    @classmethod
    def sign(cls, *credentials: str) -> httpx.Auth:
        """The key has a header of its own."""
        return Header("X-API-KEY", credentials[0])

    @classmethod
    def judge(cls, kind: Kind, answer: Answer) -> ProviderError | None:
        """The description lists no error; users know these by their `error_code`, mostly with a 409."""
        code = _REFUSALS.get(answer.find("error_code")) if kind == "create" else None
        return Rejected(code, answer.detail()) if code else None

    async def list_offers(self) -> Sequence[ProviderOffer]:
        """Every type of machine of every cloud, in each region where it is available now."""
        return await self.http.call("offers", "GET", "/instances/types", read=_read_offers)

    async def create(self, spec: base.Spec, offer: ProviderOffer, ref: str) -> base.Created:
        """Create an instance whose name and tag are the reference, with Shadeform's own end of it."""
        cloud, _, kind = offer.provider_offer_id.partition("/")
        body = {
            "cloud": cloud, "region": offer.region, "shade_instance_type": kind, "shade_cloud": True, "name": ref,
            "launch_configuration": {"type": "docker", "docker_configuration": _docker(spec)},
            "auto_delete": _auto_delete(spec.hard_stop_at, offer.price_micro_h, spent_micro=0),
            "tags": [ref, f"{_UNTIL_TAG}{int(spec.hard_stop_at.timestamp())}", _PORTS_TAG + ports.write(spec)],
        }  # fmt: skip
        if spec.ssh_public_key:
            body["ssh_key_id"] = await self._find_key(ref.split("-")[1], spec.ssh_public_key)
        return await self.http.call(
            "create", "POST", "/instances/create", body=body, hidden=(*spec.env.values(), *(spec.registry_auth or {}).values()),
            read=lambda answer: base.Created(_read_id(answer)),
        )  # fmt: skip

    async def _find_key(self, owner: str, public_key: str) -> str:
        """The id of the pod's own key in the account, where it is added once under a name of ours."""
        name = f"gpubroker-{owner}-{hashlib.sha256(public_key.encode()).hexdigest()[:16]}"
        with before_create():
            keys = await self.http.call("read", "GET", "/sshkeys", read=_read_keys)
            if name in keys:
                return keys[name]
            body = {"name": name, "public_key": public_key}
            return await self.http.call("act", "POST", "/sshkeys/add", body=body, manner="once", read=_read_id)

    async def list_ours(self) -> Sequence[Instance]:
        """Every instance with a reference of ours: all that are not deleted come at once."""
        return await self.http.call("read", "GET", "/instances", read=_read_list)

    async def get(self, instance_id: str) -> Instance:
        """One instance now."""
        return _instance(await self._look(instance_id))

    async def _look(self, instance_id: str) -> Document:
        path = f"/instances/{segment(instance_id)}/info"
        return await self.http.call("read", "GET", path, instance_id=instance_id, read=Answer.document)

    async def terminate(self, instance_id: str) -> None:
        """Delete it, disk and all; billing ends as it begins to be deleted."""
        try:
            await self._act(instance_id, "delete", "urgent")
        except Rejected:
            if (await self.get(instance_id)).life not in {"terminating", "gone"}:
                raise

    async def restart(self, instance_id: str) -> None:
        """Restart the machine. It says `active` all the while."""
        await self._act(instance_id, "restart", "once")

    async def extend(self, instance_id: str, hard_stop_at: datetime) -> None:
        """Move the date of `auto_delete`, and its spending with it."""
        seen = await self._look(instance_id)
        spent = seen.usd("cost_estimate") if seen.values.get("cost_estimate") else 0
        tags = [tag for tag in _tags(seen) if not tag.startswith(_UNTIL_TAG)]
        ending = _auto_delete(hard_stop_at, _price(seen), spent_micro=spent)
        changes = {"auto_delete": ending, "tags": [*tags, f"{_UNTIL_TAG}{int(hard_stop_at.timestamp())}"]}
        await self._act(instance_id, "update", "repeatable", changes)

    async def _act(self, instance_id: str, action: str, manner: Manner, body: object = None) -> None:
        path = f"/instances/{segment(instance_id)}/{action}"
        await self.http.call("act", "POST", path, body=body, instance_id=instance_id, manner=manner, read=read_nothing)


def _read_offers(answer: Answer) -> list[ProviderOffer]:
    return [offer for kind in answer.document().children("instance_types") for offer in _offers(kind)]


def _read_id(answer: Answer) -> str:
    return answer.document().text("id")


def _read_keys(answer: Answer) -> dict[str, str]:
    return {key.text("name"): key.text("id") for key in answer.document().children("ssh_keys")}


def _read_list(answer: Answer) -> list[Instance]:
    return [_instance(one) for one in answer.document().children("instances") if _find_ref(one)]


def _offers(kind: Document) -> Iterator[ProviderOffer]:
    has, price = kind.child("configuration"), kind.cents("hourly_price")
    gpus, form = has.whole("num_gpus"), str(has.values.get("interconnect"))
    model = f"{has.text('gpu_type')} {form}" if _FORM.fullmatch(form) else has.text("gpu_type")
    is_machine = kind.text("deployment_type") in _MACHINES
    for place in [one for one in kind.children("availability") if one.flag("available") and price and is_machine]:
        country = _COUNTRY.match(str(place.values.get("display_name")))
        yield ProviderOffer(
            provider_offer_id=f"{kind.text('cloud')}/{kind.text('shade_instance_type')}", gpu=model if gpus else None,
            gpu_count=gpus, vcpus=has.number("vcpus"), ram_gb=has.number("memory_in_gb"), disk_gb=has.whole("storage_in_gb"),
            disk_base_gb=has.whole("storage_in_gb"), region=place.text("region"), country=country[0] if country else None,
            price_micro_h=price, supports=_SUPPORTS, vram_gb=has.whole("vram_per_gpu_in_gb") if gpus else None,
            availability="high",  # there is some; how much is not said
        )  # fmt: skip


def _docker(spec: base.Spec) -> dict[str, Any]:
    if spec.image is None:
        raise Rejected("image_needed", "a pod at Shadeform needs an image", try_next_offer=False)
    if any(port.protocol == "udp" for port in spec.ports):
        raise Rejected("udp_port", "Shadeform maps no UDP")
    numbers = [port.port for port in spec.ports if port.port != ports.SSH]
    docker: dict[str, Any] = {
        "image": spec.image,
        "envs": [{"name": name, "value": value} for name, value in spec.env.items()],
        "port_mappings": [{"host_port": number, "container_port": number} for number in numbers],
    }
    if spec.command:
        docker["args"] = shlex.join(spec.command)
    if spec.registry_auth:
        docker["registry_credentials"] = dict(spec.registry_auth)
    return docker


def _auto_delete(hard_stop_at: datetime, price_micro_h: int | None, *, spent_micro: int) -> dict[str, str]:
    ending = {"date_threshold": hard_stop_at.astimezone(UTC).isoformat(timespec="seconds")}
    if price_micro_h is not None:
        seconds = max(0, int((hard_stop_at - datetime.now(UTC)).total_seconds())) + _SPARE_SECONDS
        cents = -(-(spent_micro + price_micro_h * seconds // 3600) // 10_000)
        ending["spend_threshold"] = f"{cents // 100}.{cents % 100:02d}"
    return ending


def _price(instance: Document) -> int | None:
    """What it costs an hour; where that is not told, what its threshold was reckoned with."""
    ending = instance.find("auto_delete")
    if instance.has("hourly_price"):
        return instance.cents("hourly_price")
    if ending is None or not (ending.has("date_threshold") and ending.has("spend_threshold")):
        return None
    life = ending.moment("date_threshold") - instance.moment("created_at")
    return ending.usd("spend_threshold") * 3600 // max(1, int(life.total_seconds()) + _SPARE_SECONDS)


def _tags(instance: Document) -> list[str]:
    return instance.texts("tags") if instance.has("tags") else []


def _find_tag(instance: Document, name: str) -> str:
    return next((tag.removeprefix(name) for tag in _tags(instance) if tag.startswith(name)), "")


def _find_ref(instance: Document) -> str | None:
    return find_ref(str(instance.values.get("name")), *_tags(instance))


def _instance(instance: Document) -> Instance:
    status = instance.text("status")
    life, billing = _LIVES.get(status, ("unknown", "unknown"))
    is_running = life == "running"
    return Instance(
        id=instance.text("id"),
        ref=_find_ref(instance),
        status=status,
        life=life,
        billing=billing,
        started_at=instance.moment("active_at") if is_running and instance.has("active_at") else None,
        reason=str(instance.values.get("status_details") or "") or None,
        endpoints=tuple(_endpoints(instance)) if is_running and instance.values.get("ip") else (),
        hard_stop_at=_hard_stop(instance),
        price_micro_h=instance.cents("hourly_price") if is_running and instance.has("hourly_price") else None,
    )


def _hard_stop(instance: Document) -> datetime | None:
    ending = instance.find("auto_delete")
    if ending is not None and ending.values.get("date_threshold"):
        return ending.moment("date_threshold")
    until = _find_tag(instance, _UNTIL_TAG)
    return datetime.fromtimestamp(int(until), UTC) if re.fullmatch(r"\d{1,11}", until, re.ASCII) else None


def _endpoints(instance: Document) -> Iterator[base.Endpoint]:
    """A cloud may have put a machine's ports elsewhere."""
    outside = {
        one.whole("internal_port"): one.whole("external_port", least=1, most=65535)
        for one in (instance.children("port_mappings") if instance.has("port_mappings") else ())
        if one.has("internal_port") and one.has("external_port")
    }
    user, ssh_port = instance.text("ssh_user"), instance.whole("ssh_port", most=65535)
    return ports.read(_find_tag(instance, _PORTS_TAG), instance.text("ip"), user, ssh_port, outside)
