"""`outpost`: a vendor that there is not, as small as an adapter can be. tests/providers/test_sample.py lays it beside the others.

Its servers run the pod's image in containers, and bill each second from running to delete. No stop, no log, no end of their own.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

from gpubroker.errors import ProviderError, Rejected
from gpubroker.ids import find_ref
from gpubroker.providers import base
from gpubroker.providers.base import Capabilities, Instance, ProviderOffer
from gpubroker.providers.http.adapter import Answer, Document, HttpProvider, Kind, Limit
from gpubroker.providers.http.reading import read_nothing, read_pages, segment

_SUPPORTS: Final = frozenset[base.Support]({"command", "image", "ports"})
_LIVES: Final[Mapping[str, tuple[base.Life, base.Billing]]] = {
    "building": ("starting", "none"), "up": ("running", "full"), "broken": ("failed", "unknown"),
    "deleting": ("terminating", "none"), "deleted": ("gone", "none"),
}  # fmt: skip


class Outpost(HttpProvider):
    """One project at Outpost."""

    name: ClassVar[str] = "outpost"
    credentials: ClassVar[tuple[str, ...]] = ("OUTPOST_API_KEY",)
    base_url: ClassVar[str] = "https://outpost.example.com/v1"
    limits: ClassVar[Mapping[str, Limit]] = {"calls": Limit(interval_seconds=0.2, burst=10)}
    capabilities: ClassVar[Capabilities] = Capabilities(
        kind="container", supports=_SUPPORTS, stopped_billing="full", boot_seconds=20, boot_limit_seconds=600, bills_boot=False,
        termination_allowance_seconds=60, visibility_lag_seconds=30, restarts=False,
    )  # fmt: skip

    @classmethod
    def judge(cls, kind: Kind, answer: Answer) -> ProviderError | None:
        """Errors are told apart by `error`."""
        is_sold_out = kind == "create" and answer.find("error") == "sold_out"
        return Rejected("no_capacity", answer.detail()) if is_sold_out else None

    async def list_offers(self) -> Sequence[ProviderOffer]:
        """Every flavour in every zone where there is some."""
        return await self.http.call("offers", "GET", "/flavours", read=_read_offers)

    async def create(self, spec: base.Spec, offer: ProviderOffer, ref: str) -> base.Created:
        """Order a server whose name and label are the reference."""
        if spec.image is None:
            raise Rejected("image_needed", "a pod at Outpost needs an image")
        if spec.registry_auth or spec.ssh_public_key:
            raise Rejected("not_supported", "Outpost knows neither private images nor ssh")
        body = {
            "flavour": offer.provider_offer_id, "zone": offer.region, "name": ref, "label": ref, "disk_gb": spec.disk_gb,
            "image": spec.image, "args": list(spec.command), "env": dict(spec.env),
            "ports": [port.port for port in spec.ports],
        }  # fmt: skip
        return await self.http.call(
            "create", "POST", "/servers", body=body, read=_read_created, hidden=spec.env.values()
        )

    async def list_ours(self) -> Sequence[Instance]:
        """Every server with a reference of ours, on all pages."""

        async def read(cursor: str | None) -> tuple[list[Instance], str | None]:
            page = await self.http.call(
                "read", "GET", "/servers", query={"after": cursor} if cursor else None, read=Answer.document
            )
            found = [_instance(server) for server in page.children("servers") if _find_ref(server)]
            return found, page.text("next") if page.has("next") else None

        return await read_pages(read)

    async def get(self, instance_id: str) -> Instance:
        """One server now."""
        path = f"/servers/{segment(instance_id)}"
        return _instance(await self.http.call("read", "GET", path, instance_id=instance_id, read=Answer.document))

    async def terminate(self, instance_id: str) -> None:
        """Delete it, disk and all."""
        path = f"/servers/{segment(instance_id)}"
        await self.act("DELETE", path, instance_id, read_nothing, manner="urgent")


def _read_offers(answer: Answer) -> list[ProviderOffer]:
    return [_offer(flavour) for flavour in answer.document().children("flavours")]


def _read_created(answer: Answer) -> base.Created:
    made = _instance(answer.document())
    return base.Created(made.id, made)


def _offer(flavour: Document) -> ProviderOffer:
    return ProviderOffer(
        provider_offer_id=flavour.text("id"), gpu=flavour.text("gpu"), gpu_count=flavour.whole("gpus", least=1),
        vcpus=flavour.number("vcpus"), ram_gb=flavour.number("ram_gb"), disk_gb=flavour.whole("disk_gb"),
        disk_base_gb=flavour.whole("disk_gb"), region=flavour.text("zone"), country=flavour.text("country"),
        price_micro_h=flavour.usd("usd_per_hour"), supports=_SUPPORTS,
        availability="high" if flavour.whole("in_stock") else "none",
    )  # fmt: skip


def _find_ref(server: Document) -> str | None:
    return find_ref(server.words("name"), server.words("label"))


def _instance(server: Document) -> Instance:
    status = server.text("status")
    life, billing = _LIVES.get(status, ("unknown", "unknown"))
    is_up = life == "running"
    return Instance(
        id=server.text("id"), ref=_find_ref(server), status=status, life=life, billing=billing,
        started_at=server.moment("up_since") if is_up and server.has("up_since") else None,
        endpoints=tuple(_endpoint(server, port) for port in server.children("ports")) if is_up else (),
    )  # fmt: skip


def _endpoint(server: Document, port: Document) -> base.Endpoint:
    inside, outside = (port.whole(side, least=1, most=65535) for side in ("inside", "outside"))
    return base.Endpoint(f"tcp-{inside}", inside, "tcp", server.text("host"), outside)
