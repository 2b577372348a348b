"""`verda`: Verda's virtual machines in Finland and Iceland, DataCrunch before. A machine runs the pod's image by a startup script.

Its disk is a volume with a price of its own. Off, it bills in full. It has no log and no end of life of its own.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Final

import httpx

from gpubroker import errors
from gpubroker.ids import find_ref
from gpubroker.providers import base
from gpubroker.providers.base import Capabilities, Instance, ProviderOffer
from gpubroker.providers.http import cloudinit, ports
from gpubroker.providers.http.adapter import Answer, Document, HttpProvider, Kind, Limit, before_create
from gpubroker.providers.http.client import Manner
from gpubroker.providers.http.oauth import ClientCredentials
from gpubroker.providers.http.reading import read_nothing, segment

_SUPPORTS: Final = frozenset[base.Support]({"command", "image", "ports", "stop", "ssh"})
_DISK_GB: Final = 50  # of the system's volume: it is in the price, and the least that is rented
_VOLUME: Final = "NVMe"
_IMAGE: Final = "ubuntu-24.04-cuda-12.8-open-docker"
_LIVES: Final[Mapping[str, tuple[base.Life, base.Billing]]] = {
    "new": ("starting", "unknown"), "ordered": ("starting", "unknown"), "provisioning": ("starting", "unknown"),
    "validating": ("starting", "unknown"), "pending": ("starting", "none"), "running": ("running", "full"),
    "offline": ("stopped", "full"), "deleting": ("terminating", "unknown"), "discontinued": ("gone", "none"),
    "no_capacity": ("failed", "none"), "error": ("failed", "unknown"),
}  # fmt: skip
_PRICES: Final = {False: "price_per_hour", True: "spot_price"}
_COUNTRIES: Final = {"FIN": "FI", "ICE": "IS"}
_NO_ROOM: Final = re.compile("capacity|out of stock|(instance type|gpu|resource)s?\\b.*\\b(not |un)available")
"""Of a machine, not of Verda itself: a 503 without such words leaves open whether it made one."""
_TAG: Final = "gpubroker"
_PROVISIONING_SECONDS: Final = 20.0
_ACCEPTED: Final = 202


class Verda(HttpProvider):
    """One project at Verda."""

    name: ClassVar[str] = "verda"
    credentials: ClassVar[tuple[str, ...]] = ("VERDA_CLIENT_ID", "VERDA_CLIENT_SECRET")
    base_url: ClassVar[str] = "https://api.verda.com/v1"
    limits: ClassVar[Mapping[str, Limit]] = {"calls": Limit(interval_seconds=0.2, burst=10)}
    capabilities: ClassVar[Capabilities] = Capabilities(
        kind="vm", supports=_SUPPORTS, stopped_billing="full", boot_seconds=300, boot_limit_seconds=1800,
        bills_boot=False, termination_allowance_seconds=300, visibility_lag_seconds=120, spot=True, restarts=False,
    )  # fmt: skip

    @classmethod
    def sign(cls, *credentials: str) -> httpx.Auth:
        """By a token, which its id and secret are exchanged for."""
        return ClientCredentials("/oauth2/token", *credentials)

    @classmethod
    def judge(cls, kind: Kind, answer: Answer) -> errors.ProviderError | None:
        """Errors are told apart by `code`; where that says little, by the words of `message`."""
        code, said, detail = answer.find("code"), str(answer.find("message")).lower(), answer.detail()
        if code == "insufficient_funds" and kind in {"create", "act"}:
            return errors.Rejected("no_balance", detail)
        if code is not None and kind in {"create", "act"} and _NO_ROOM.search(said):
            return errors.Rejected("no_capacity", detail)
        if code == "forbidden_action" and kind in {"create", "act"}:
            return errors.Rejected("forbidden_action", detail)
        if kind != "create" and said == "invalid instance id":
            return errors.InstanceNotFound("not_found", detail)
        return None

    async def list_offers(self) -> Sequence[ProviderOffer]:
        """Every type with an image that has CUDA, in each location that has room for it, on demand and spot."""
        types = await self.http.call("offers", "GET", "/instance-types", query={"currency": "usd"}, read=_read_list)
        disk = await self._find_disk()
        found: list[ProviderOffer] = []
        for spot in (False, True):
            query = {"isSpot": str(spot).lower()}
            rooms = await self.http.call("offers", "GET", "/instance-availability", query=query, read=_read_list)
            where = [(room.text("location_code"), room.texts("availabilities")) for room in rooms]
            for kind in types:
                name = kind.text("instance_type")
                found += [o for place, names in where if name in names for o in _offers(kind, disk, place, spot=spot)]
        return found

    async def _find_disk(self) -> Document | None:
        """What a GB of the system's volume costs; None where the answer is that there are no such prices."""
        try:
            types = await self.http.call("offers", "GET", "/volume-types", read=_read_list)
        except errors.ProviderError as error:
            if error.code != "http_404":
                raise
            return None
        (disk,) = [one.child("price") for one in types if one.text("type") == _VOLUME][:1] or [None]
        if disk is None:
            raise errors.ProviderError("unreadable", f"there is no price of {_VOLUME}")
        return disk

    async def create(self, spec: base.Spec, offer: ProviderOffer, ref: str) -> base.Created:
        """Store the startup script, and order a machine with it that carries the reference wherever it can."""
        hidden = (*spec.env.values(), *(spec.registry_auth or {}).values())
        stored = {"name": ref, "script": cloudinit.write_script(spec, gpus=offer.gpu_count > 0)}
        with before_create():
            script_id = await self.http.call(
                "act", "POST", "/scripts", body=stored, manner="once", read=_read_id, hidden=hidden
            )
        body = _body(spec, offer, ref, script_id)
        try:
            made = await self.http.call("create", "POST", "/instances", body=body, read=_read_id, hidden=hidden)
        except (errors.Rejected, errors.Throttled, errors.CredentialRefused):
            await self._drop_script(script_id)
            raise
        return base.Created(made)

    async def _drop_script(self, script_id: str) -> None:
        """It holds the pod's secrets: it goes with the machine."""
        with suppress(errors.ProviderError):
            await self.http.call("act", "DELETE", f"/scripts/{segment(script_id)}", read=read_nothing)

    async def list_ours(self) -> Sequence[Instance]:
        """Every instance with a reference of ours: all that are not deleted come at once."""
        said = await self.http.call("read", "GET", "/instances", read=_read_list)
        return [_instance(instance) for instance in said if _find_ref(instance)]

    async def get(self, instance_id: str) -> Instance:
        """One instance now."""
        return _instance(await self._look(instance_id, "read", "repeatable"))

    async def _look(self, instance_id: str, kind: Kind, manner: Manner) -> Document:
        path = f"/instances/{segment(instance_id)}"
        return await self.http.call(kind, "GET", path, instance_id=instance_id, manner=manner, read=Answer.document)

    async def terminate(self, instance_id: str) -> None:
        """Delete it with its volumes by name: those that are not named are kept, and bill. While it is made it cannot be."""
        said = await self._look(instance_id, "act", "urgent")
        volumes = {*(said.texts("volume_ids") if said.has("volume_ids") else ()), said.words("os_volume_id")} - {None}
        if not volumes and said.text("status") in {"provisioning", "validating"}:
            raise errors.Throttled("provisioning", instance_id, wait=_PROVISIONING_SECONDS)
        more = {"volume_ids": sorted(str(volume) for volume in volumes), "delete_permanently": True}
        try:
            await self._act(instance_id, "delete", ("terminating", "gone"), more, "urgent")
        except errors.Rejected as rejected:
            if (await self.get(instance_id)).life == "starting":
                raise errors.Throttled("provisioning", rejected.detail, wait=_PROVISIONING_SECONDS) from None
            raise
        if said.has("startup_script_id"):
            await self._drop_script(said.text("startup_script_id"))

    async def stop(self, instance_id: str) -> None:
        """Shut it down; it bills as if it ran."""
        await self._act(instance_id, "shutdown", ("stopped", "stopping"), {}, "repeatable")

    async def start(self, instance_id: str) -> None:
        """Start it again."""
        await self._act(instance_id, "start", ("running", "starting"), {}, "repeatable")

    async def _act(
        self, instance_id: str, action: str, done: Collection[base.Life], more: Mapping[str, object], manner: Manner
    ) -> None:
        """What is refused because it is so already is done."""
        body = {"action": action, "id": [segment(instance_id)], "volume_ids": None, **more}
        try:
            await self.act("PUT", "/instances", instance_id, _read_results, body=body, manner=manner)
        except errors.Rejected:
            if (await self.get(instance_id)).life not in done:
                raise


def _read_list(answer: Answer) -> list[Document]:
    return Document({"items": answer.json()}).children("items")


def _read_results(answer: Answer) -> None:
    """An action is taken with 202, whatever else that says; with 207 the result of each instance may be an error."""
    try:
        results = _read_list(answer) if answer.body.strip() else []
    except errors.ProviderError:
        if answer.status == _ACCEPTED:
            return
        raise
    for result in results:
        if result.has("error") or result.words("status") in {"error", "failed"}:
            raise errors.Rejected("not_done", answer.detail())


def _read_id(answer: Answer) -> str:
    """An id comes as plain text; as JSON, or in an object, it is taken as well."""
    text = answer.body.decode(errors="replace").strip()
    if text == "null":
        raise errors.ProviderError("unreadable", "the answer has no id")
    return segment(answer.document().text("id") if text.startswith("{") else text.strip('"'))


def _offers(kind: Document, disk: Document | None, location: str, *, spot: bool) -> Iterator[ProviderOffer]:
    images, priced = kind.texts("supported_os") if kind.has("supported_os") else [_IMAGE], _PRICES[spot]
    price = kind.usd(priced) if kind.has(priced) else 0
    gpus = kind.child("gpu").whole("number_of_gpus")
    image = _choose_image(images, needs_cuda=gpus > 0)
    if image is None or not price:
        return
    gb_micro_h = round(disk.usd("price_per_month_per_gb") / 730) if disk else 0
    currencies = {str(one.values.get("currency") or "usd").upper() for one in (kind, disk) if one}
    total = price + _DISK_GB * gb_micro_h
    yield ProviderOffer(
        provider_offer_id=f"{kind.text('instance_type')}/{image}", gpu=kind.child("gpu").text("description") if gpus else None,
        gpu_count=gpus, vcpus=kind.child("cpu").number("number_of_cores"), ram_gb=kind.child("memory").number("size_in_gigabytes"),
        vram_gb=round(kind.child("gpu_memory").number("size_in_gigabytes") / gpus) if gpus else None, spot=spot,
        disk_gb=10_000, disk_base_gb=_DISK_GB, disk_micro_gb_h=gb_micro_h, stopped_disk_micro_gb_h=gb_micro_h,
        price_micro_h=total, stopped_micro_h=total, currency=max(currencies - {"USD"}, default="USD"), supports=_SUPPORTS,
        region=location, country=_COUNTRIES.get(location.partition("-")[0]), availability="high",
    )  # fmt: skip


def _choose_image(images: Collection[str], *, needs_cuda: bool) -> str | None:
    """One with CUDA for GPUs, and with Docker where there is one: a script installs what is missing."""
    fit = [("docker" in image, image) for image in images if "ubuntu" in image and ("cuda" in image or not needs_cuda)]
    return _IMAGE if _IMAGE in images else max(fit)[1] if fit else None


def _body(spec: base.Spec, offer: ProviderOffer, ref: str, script_id: str) -> dict[str, Any]:
    kind, _, image = offer.provider_offer_id.partition("/")
    volume: dict[str, Any] = {"name": ref, "size": max(_DISK_GB, spec.disk_gb)}
    if offer.spot:
        volume["on_spot_discontinue"] = "delete_permanently"
    return {
        "instance_type": kind, "image": image, "location_code": offer.region, "hostname": ref,
        "description": f"{ref} {ports.write(spec)}".strip(), "tags": [{"key": _TAG, "value": ref}], "ssh_key_ids": [],
        "startup_script_id": script_id, "os_volume": volume, "is_spot": offer.spot,
        "contract": "SPOT" if offer.spot else "PAY_AS_YOU_GO", "pricing": "FIXED_PRICE", "volumes": [], "existing_volumes": [],
        "coupon": None,
    }  # fmt: skip


def _find_ref(instance: Document) -> str | None:
    """Its tags may be of any shape: others' machines are in the listing too."""
    return find_ref(instance.words("hostname"), instance.words("description"), str(instance.values.get("tags")))


def _instance(instance: Document) -> Instance:
    status = instance.text("status")
    life, billing = _LIVES.get(status, ("unknown", "unknown"))
    ip, wanted = instance.words("ip"), (instance.words("description") or "").partition(" ")[2]
    return Instance(
        id=instance.text("id"), ref=_find_ref(instance), status=status, life=life, billing=billing,
        endpoints=tuple(ports.read(wanted, ip, "root")) if ip and life == "running" else (),
        price_micro_h=instance.usd("price_per_hour") if life == "running" and instance.has("price_per_hour") else None,
    )  # fmt: skip
