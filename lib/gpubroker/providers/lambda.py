"""`lambda`: Lambda's on-demand virtual machines through its Cloud API, version 1. Billed by the minute, from healthy to terminate.

An instance runs the pod's image by cloud-init. It has no stop, no log and no end of life of its own. docs/providers.md says what
was met.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import ClassVar, Final

from gpubroker.errors import AmbiguousOutcome, ProviderError, Rejected
from gpubroker.ids import find_ref
from gpubroker.providers import base
from gpubroker.providers.base import Capabilities, Instance, ProviderOffer
from gpubroker.providers.http import cloudinit, ports
from gpubroker.providers.http.adapter import Answer, Document, HttpProvider, Kind, Limit, before_create
from gpubroker.providers.http.client import Manner
from gpubroker.providers.http.reading import read_nothing, segment

_SUPPORTS: Final = frozenset[base.Support]({"command", "image", "ports", "ssh"})
_LIVES: Final[Mapping[str, tuple[base.Life, base.Billing]]] = {
    "booting": ("starting", "none"),
    "active": ("running", "full"),
    "unhealthy": ("unknown", "full"),  # it does not answer Lambda; it may again, and bills until terminated
    "terminating": ("terminating", "none"),
    "terminated": ("gone", "none"),
    "preempted": ("interrupted", "none"),
}
_REFUSALS: Final[Mapping[object, tuple[str, bool]]] = {
    "instance-operations/launch/insufficient-capacity": ("no_capacity", True),
    "global/quota-exceeded": ("quota_exceeded", True),
    "global/account-inactive": ("no_balance", True),
    "global/invalid-address": ("no_balance", True),
    "global/invalid-parameters": ("invalid_parameters", False),
}
"""Of a launch, by the answer's code: what it is called here, and whether another offer may do."""
_UNKNOWN_INSTANCE: Final = frozenset({"global/object-does-not-exist", "global/not-found"})
_NOT_FOUND: Final = 404
_COUNTRIES: Final = {
    "USA": "US", "Canada": "CA", "Germany": "DE", "United Kingdom": "GB", "UK": "GB", "Israel": "IL", "India": "IN",
    "Japan": "JP", "Australia": "AU", "Singapore": "SG",
}  # fmt: skip
_VRAM: Final = re.compile(r"\((\d{1,3}) GB\b")
_GIB: Final = 1.073741824
_REF_TAG: Final = "gpubroker-ref"
_PORTS_TAG: Final = "gpubroker-ports"
"""Lambda does not show user data: this tells a pod's ports. A value has at most 128 characters."""
_USER: Final = "ubuntu"
_LARGEST_USER_DATA: Final = 1_000_000


class Lambda(HttpProvider):
    """One account at Lambda."""

    name: ClassVar[str] = "lambda"
    credentials: ClassVar[tuple[str, ...]] = ("LAMBDA_API_KEY",)
    base_url: ClassVar[str] = "https://cloud.lambda.ai/api/v1"
    limits: ClassVar[Mapping[str, Limit]] = {"calls": Limit(interval_seconds=1), "launch": Limit(interval_seconds=12)}
    capabilities: ClassVar[Capabilities] = Capabilities(
        kind="vm",
        supports=_SUPPORTS,
        stopped_billing="full",
        boot_seconds=300,
        boot_limit_seconds=1800,
        bills_boot=False,
        termination_allowance_seconds=120,
        visibility_lag_seconds=120,
    )

    @classmethod
    def judge(cls, kind: Kind, answer: Answer) -> ProviderError | None:
        """Lambda's errors are told apart by `code`; those of its own suppliers, `provider/…`, leave open what happened."""
        code = answer.find("error", "code")
        if kind == "create" and code in _REFUSALS:
            name, try_next_offer = _REFUSALS[code]
            return Rejected(name, answer.detail(), try_next_offer=try_next_offer)
        if isinstance(code, str) and code.startswith("provider/"):
            return ProviderError("provider_error", answer.detail())
        if kind != "create" and answer.status == _NOT_FOUND and code not in _UNKNOWN_INSTANCE:
            return ProviderError(f"http_{_NOT_FOUND}", answer.detail())  # a proxy's page is no word on an instance
        return None

    async def list_offers(self) -> Sequence[ProviderOffer]:
        """Every type of instance, in each region that has room for it now."""

        def read(answer: Answer) -> list[ProviderOffer]:
            types = answer.document().child("data")
            return [offer for name in types.values for offer in _offers(types.child(name))]

        return await self.http.call("offers", "GET", "/instance-types", read=read)

    async def create(self, spec: base.Spec, offer: ProviderOffer, ref: str) -> base.Created:
        """Launch an instance whose name and tag are the reference."""
        user_data = cloudinit.write(spec, gpus=offer.gpu_count > 0)
        if len(user_data) > _LARGEST_USER_DATA:
            raise Rejected("user_data_too_large", "Lambda takes 1 MB")
        tags = {_REF_TAG: ref, _PORTS_TAG: ports.write(spec)}
        body = {
            "region_name": offer.region,
            "instance_type_name": offer.provider_offer_id,
            "ssh_key_names": [await self._have_key(ref.split("-")[1])],
            "name": ref,
            "user_data": user_data,
            "tags": [{"key": key, "value": value} for key, value in tags.items() if value],
        }
        return await self.http.call(
            "create", "POST", "/instance-operations/launch", body=body, read=_read_created, limits=("launch", "calls"),
            hidden=(*spec.env.values(), *(spec.registry_auth or {}).values()),
        )  # fmt: skip

    async def _have_key(self, owner: str) -> str:
        """The name of the one key that Lambda demands: ours, of which nobody has the private half.

        The pod's own key is put on the machine by cloud-init. No key of the operator's is ever used.
        """
        name = f"gpubroker-{owner}"
        try:
            with before_create():
                if name in await self.http.call("read", "GET", "/ssh-keys", read=_read_key_names):
                    return name
        except Rejected as rejected:
            if not rejected.code.startswith("http_4"):  # that it may not be asked says nothing: the launch finds out
                raise
        body = {"name": name, "public_key": f"{_make_public_key()} {name}"}
        # another may have added it meanwhile: the launch finds out
        with before_create(), suppress(AmbiguousOutcome, Rejected):
            await self.http.call("act", "POST", "/ssh-keys", body=body, manner="once", read=read_nothing)
        return name

    async def list_ours(self) -> Sequence[Instance]:
        """Every instance with a reference of ours: Lambda lists all at once, and filters by no tag."""

        def read(answer: Answer) -> list[Instance]:
            return [_instance(one) for one in answer.document().children("data") if _find_ref(one)]

        return await self.http.call("read", "GET", "/instances", read=read)

    async def get(self, instance_id: str) -> Instance:
        """One instance now."""
        return await self.http.call(
            "read", "GET", f"/instances/{segment(instance_id)}", instance_id=instance_id,
            read=lambda answer: _instance(answer.document().child("data")),
        )  # fmt: skip

    async def terminate(self, instance_id: str) -> None:
        """Terminate it, disk and all. An answer that does not name it is a success where it is ending already."""
        if await self._operate("terminate", instance_id, "terminated_instances", "urgent"):
            return
        if (await self.get(instance_id)).life not in {"terminating", "gone"}:
            raise AmbiguousOutcome("not_terminated", instance_id)

    async def restart(self, instance_id: str) -> None:
        """Restart the machine: it runs the program anew, in the same container."""
        if not await self._operate("restart", instance_id, "restarted_instances", "once"):
            raise Rejected("not_restarted", instance_id)

    async def _operate(self, operation: str, instance_id: str, named: str, manner: Manner) -> bool:
        """Ask for it, and say whether the answer names the instance."""

        def read(answer: Answer) -> bool:
            return instance_id in {one.text("id") for one in answer.document().child("data").children(named)}

        return await self.http.call(
            "act", "POST", f"/instance-operations/{operation}", body={"instance_ids": [segment(instance_id)]},
            instance_id=instance_id, manner=manner, read=read,
        )  # fmt: skip


def _offers(item: Document) -> Iterator[ProviderOffer]:
    kind = item.child("instance_type")
    specs, model = kind.child("specs"), kind.text("gpu_description")
    gpus, price, vram = specs.whole("gpus"), kind.cents("price_cents_per_hour"), _VRAM.search(model)
    for region in item.children("regions_with_capacity_available") if price else ():
        disk_gb = int(specs.whole("storage_gib") * _GIB)
        yield ProviderOffer(
            provider_offer_id=kind.text("name"),
            gpu=model if gpus else None,
            gpu_count=gpus,
            vcpus=specs.whole("vcpus"),
            ram_gb=round(specs.whole("memory_gib") * _GIB, 3),
            disk_gb=disk_gb,
            disk_base_gb=disk_gb,
            region=region.text("name"),
            country=_COUNTRIES.get(str(region.values.get("description")).rpartition(", ")[2]),
            price_micro_h=price,
            supports=_SUPPORTS,
            availability="high",  # there is room; how much is not said
            vram_gb=int(vram[1]) if vram and gpus else None,
            min_billing_s=60,
            increment_s=60,
        )


def _read_key_names(answer: Answer) -> set[str]:
    return {key.text("name") for key in answer.document().children("data")}


def _read_created(answer: Answer) -> base.Created:
    ids = answer.document().child("data").texts("instance_ids")
    if not ids or not ids[0]:
        raise ProviderError("unreadable", "the launch names no instance")
    return base.Created(ids[0])


def _tags(instance: Document) -> dict[str, str]:
    tags = instance.children("tags") if instance.has("tags") else []
    return {str(tag.values.get("key")): str(tag.values.get("value")) for tag in tags}


def _find_ref(instance: Document) -> str | None:
    return find_ref(str(instance.values.get("name")), *_tags(instance).values())


def _instance(instance: Document) -> Instance:
    status = instance.text("status")
    life, billing = _LIVES.get(status, ("unknown", "unknown"))
    is_running = life == "running"
    ip = instance.text("ip") if is_running and instance.has("ip") else None
    return Instance(
        id=instance.text("id"),
        ref=_find_ref(instance),
        status=status,
        life=life,
        billing=billing,
        endpoints=tuple(ports.read(_tags(instance).get(_PORTS_TAG, ""), ip, _USER)) if ip else (),
        price_micro_h=instance.child("instance_type").cents("price_cents_per_hour") if is_running else None,
    )


def _make_public_key() -> str:
    """A public key whose private half is thrown away at once."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415 - asked for once
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat  # noqa: PLC0415 - as above

    return Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
