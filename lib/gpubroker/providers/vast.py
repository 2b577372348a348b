"""`vast`: Vast.ai, a market of other people's machines. Docker containers on GPUs, per second; loading costs the disk alone."""

import json
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, ClassVar, Final

from gpubroker import errors
from gpubroker.ids import find_ref
from gpubroker.providers import base
from gpubroker.providers.base import Capabilities, Endpoint, Instance, ProviderOffer
from gpubroker.providers.http.adapter import Answer, Document, HttpProvider, Kind, Limit
from gpubroker.providers.http.answers import until_midnight
from gpubroker.providers.http.images import registry
from gpubroker.providers.http.reading import cut_log, read_pages, segment

_SUPPORTS: Final = frozenset[base.Support]({"command", "image", "ports", "exec", "logs", "stop", "ssh"})
_DISK_GB, _MOST_OFFERS = 20, 50_000  # offers are priced with this disk, and it is the least that is rented
_LIVES: Final[Mapping[str, tuple[base.Life, base.Billing]]] = {
    "null": ("starting", "storage"), "loading": ("starting", "storage"), "running": ("running", "full"),
    "rebooting": ("starting", "full"), "recycling": ("starting", "full"), "stopped": ("stopped", "storage"),
    "frozen": ("stopped", "full"), "exited": ("stopped", "unknown"),  # nobody says what it costs when its program ended
}  # fmt: skip
_REFUSALS: Final[Mapping[tuple[str, int, str], str]] = {
    ("create", 400, "insufficient_credit"): "no_balance", ("create", 403, "invalid_args"): "offer_barred",
    ("create", 404, "invalid_args"): "no_capacity", ("create", 404, "no_such_ask"): "no_capacity",
    ("create", 410, "no_such_ask"): "no_capacity", ("act", 400, "invalid_args"): "invalid_args",
}  # fmt: skip
_RESULT_HOSTS: Final = ("s3.amazonaws.com",)
_LONGEST_COMMAND, _LONGEST_ONSTART, _STREAM_BYTES, _BAD, _TOO_MANY = 512, 4048, 1024 * 1024, 400, 429


class Vast(HttpProvider):
    """One account at Vast.ai. An offer is one machine at its host's price, to keep or, for a bid, until somebody bids more."""

    name: ClassVar[str] = "vast"
    credentials: ClassVar[tuple[str, ...]] = ("VAST_API_KEY",)
    base_url: ClassVar[str] = "https://console.vast.ai"
    limits: ClassVar[Mapping[str, Limit]] = {"calls": Limit(interval_seconds=0.25, burst=8)}
    capabilities: ClassVar[Capabilities] = Capabilities(
        kind="container", supports=_SUPPORTS, stopped_billing="storage", boot_seconds=180, boot_limit_seconds=1200,
        bills_boot=False, termination_allowance_seconds=60, visibility_lag_seconds=120, refresh_seconds=600, spot=True,
    )  # fmt: skip

    @classmethod
    def judge(cls, kind: Kind, answer: Answer) -> errors.ProviderError | None:
        """429 is often plain text; 403 and 404 may be about an offer; an error may carry the contract that was made."""
        status, detail, contract = answer.status, answer.detail(), answer.find("new_contract")
        if kind == "create" and str(contract).isdecimal():
            return errors.AmbiguousOutcome("error_with_contract", detail, maybe_id=str(contract))
        if status == _TOO_MANY:
            wait = until_midnight() if "search_quota_exceeded" in detail else answer.wait_seconds(otherwise=1.0)
            return errors.Throttled("throttled", detail, wait=wait)
        if kind in {"act", "read"} and status == _BAD and "invalid instance" in detail.lower():
            return errors.InstanceNotFound("not_found", detail)
        if (kind, status) == ("offers", 404) and answer.find("msg"):
            return errors.CredentialRefused("credential_refused", detail)
        code = _REFUSALS.get((kind, status, str(answer.find("error"))))
        return errors.Rejected(code, detail) if code else None

    async def list_offers(self) -> Sequence[ProviderOffer]:
        """Every verified machine that is free, each with its bid where there is one: one search, as searches are counted."""
        only = {"verified": {"eq": True}, "rentable": {"eq": True}, "rented": {"eq": False}}
        body = {"type": "ondemand", **only, "allocated_storage": _DISK_GB, "limit": _MOST_OFFERS}
        said = await self.http.call("offers", "POST", "/api/v0/bundles/", body=body, read=Answer.document)
        if len(machines := said.children("offers")) >= _MOST_OFFERS:
            raise errors.ProviderError("incomplete", f"there are {_MOST_OFFERS} offers or more")
        return [offer for one in machines if one.values.get("external") is not True for offer in _offers(one)]

    async def create(self, spec: base.Spec, offer: ProviderOffer, ref: str) -> base.Created:
        """Accept the offer; the new contract's label is the reference."""
        path, body = f"/api/v0/asks/{segment(offer.provider_offer_id)}/", _body(spec, offer, ref)
        hidden = (*spec.env.values(), *(spec.registry_auth or {}).values())
        return await self.http.call("create", "PUT", path, body=body, read=_read_created, hidden=hidden)

    async def list_ours(self) -> Sequence[Instance]:
        """Every instance with a label of ours."""
        return await self._list({})

    async def find_by_ref(self, ref: str) -> Sequence[Instance]:
        """Asked for by its label."""
        return [instance for instance in await self._list({"label": {"eq": ref}}) if instance.ref == ref]

    async def _list(self, filters: Mapping[str, object]) -> list[Instance]:
        totals: list[int] = []

        async def read_page(token: str | None) -> tuple[list[Document], str | None]:
            query = {"limit": "25", "select_filters": json.dumps(filters)} | ({"after_token": token} if token else {})
            page = await self.http.call("read", "GET", "/api/v1/instances/", query=query, read=Answer.document)
            totals.append(page.whole("total_instances") if page.has("total_instances") else 0)
            return page.children("instances"), str(page.values.get("next_token") or "") or None

        found = await read_pages(read_page)
        if len(found) < min(totals):
            raise errors.ProviderError("incomplete", f"{len(found)} of {min(totals)} instances were listed")
        return [_instance(instance) for instance in found if find_ref(instance.words("label"))]

    async def get(self, instance_id: str) -> Instance:
        """One instance now; of one that is not there the answer is null, 400 or 404."""
        said = await self.http.call("read", "GET", _path(instance_id), instance_id=instance_id, read=Answer.document)
        if said.values.get("instances", ...) is None:
            raise errors.InstanceNotFound("not_found", instance_id)
        return _instance(said.child("instances"))

    async def terminate(self, instance_id: str) -> None:
        """Destroy the instance and its disk."""
        await self.act("DELETE", _path(instance_id), instance_id, _read_done, manner="urgent")

    async def stop(self, instance_id: str) -> None:
        """Stop it; the disk stays and is billed."""
        await self.act("PUT", _path(instance_id), instance_id, _read_done, body={"state": "stopped"})

    async def start(self, instance_id: str) -> None:
        """Start it on the machine that it has. When that is let to another, Vast.ai would wait for it: that is taken back."""
        try:
            await self.act("PUT", _path(instance_id), instance_id, _read_done, body={"state": "running"})
        except errors.Rejected as rejected:
            if (await self.get(instance_id)).life != "running":
                with suppress(errors.ProviderError):
                    await self.stop(instance_id)
                raise errors.Rejected("no_capacity", rejected.detail) from None

    async def restart(self, instance_id: str) -> None:
        """Stop and start the container, without giving the GPU back."""
        await self.act("PUT", _path(instance_id, "reboot/"), instance_id, _read_done, manner="once")

    async def logs(self, instance_id: str, *, after: int | None, since: datetime | None, limit: int) -> base.LogPage:
        """The last 100,000 lines; positions count from the first of them. Lines have no times: `since` leaves none out."""
        path, body = _path(instance_id, "request_logs/"), {"tail": "100000"}
        said = await self.http.call("read", "PUT", path, body=body, instance_id=instance_id, read=Answer.document)
        if (text := await self.http.await_result(said.text("result_url"), _RESULT_HOSTS, 12.0)) is None:
            raise errors.ProviderError("not_ready", "the log was not there in time")
        return cut_log([(None, text)], after, since, limit)

    async def exec(
        self, instance_id: str, command: Sequence[str], *, stdin: bytes | None, timeout_seconds: int
    ) -> base.ExecResult:
        """Run one of the few commands that Vast.ai lets run. It tells what they said in one stream, and no exit code."""
        line, path, began = shlex.join(command), _path(instance_id, "command/"), time.monotonic()
        if stdin is not None or len(line) > _LONGEST_COMMAND:
            raise errors.CannotDo(self.name, f"commands have no input and {_LONGEST_COMMAND} characters at most")
        try:
            said = await self.act("PUT", path, instance_id, Answer.document, body={"command": line}, manner="once")
        except errors.Rejected as rejected:
            raise (
                errors.CannotDo(self.name, rejected.detail) if rejected.code == "invalid_args" else rejected
            ) from None
        text = await self.http.await_result(said.text("result_url"), _RESULT_HOSTS, timeout_seconds) or b""
        ms = round((time.monotonic() - began) * 1000)
        return base.ExecResult(None, text[:_STREAM_BYTES], b"", len(text) > _STREAM_BYTES, ms)


def _path(instance_id: str, action: str = "") -> str:
    return f"/api/v0/instances/{action}{segment(instance_id)}/"


def _offers(machine: Document) -> Iterator[ProviderOffer]:
    count, gb_micro_h = machine.whole("num_gpus"), round(machine.usd("storage_cost") / 720)  # hours of its month
    if (disk_gb := int(machine.number("disk_space"))) < _DISK_GB:
        return
    region = (machine.words("geolocation") or "").strip(" ,") or "unknown"
    country = region.rpartition(",")[2].strip()
    ram_mb, cores, vcpus = (machine.estimate(key) for key in ("cpu_ram", "cpu_cores", "cpu_cores_effective"))
    share = vcpus / cores if 0 < vcpus < cores else 1.0  # of the host, whose RAM is told whole
    is_closed = machine.has("direct_port_count") and not machine.estimate("direct_port_count")
    prices = {False: machine.usd("dph_total")}
    if machine.has("min_bid") and machine.usd("min_bid"):
        prices[True] = max(1000, machine.usd("min_bid")) + _DISK_GB * gb_micro_h
    for spot, price in prices.items():
        yield ProviderOffer(
            provider_offer_id=str(machine.whole("id")), gpu=machine.text("gpu_name") if count else None, gpu_count=count,
            vcpus=vcpus or cores, ram_gb=round(ram_mb * share / 1000, 1), price_micro_h=price, spot=spot,
            disk_gb=disk_gb, disk_base_gb=_DISK_GB, disk_micro_gb_h=gb_micro_h, stopped_disk_micro_gb_h=gb_micro_h,
            stopped_micro_h=_DISK_GB * gb_micro_h, availability="low",
            region=region, country=country if re.fullmatch("[A-Z]{2}", country) else None,
            supports=_SUPPORTS - {"ports", "ssh"} if is_closed else _SUPPORTS,
            vram_gb=round(machine.estimate("gpu_ram") / 1024) or None if count else None,
            reliability=machine.number("reliability2", most=1) if machine.has("reliability2") else None,
        )  # fmt: skip


def _body(spec: base.Spec, offer: ProviderOffer, ref: str) -> dict[str, Any]:
    if spec.image is None:
        raise errors.Rejected("image_needed", "an instance at Vast.ai needs an image", try_next_offer=False)
    ports = {f"-p {port.port}:{port.port}{'/udp' * (port.protocol == 'udp')}": "1" for port in spec.ports}
    body: dict[str, Any] = {
        "image": spec.image, "label": ref, "disk": max(_DISK_GB, spec.disk_gb), "env": {**spec.env, **ports},
        "runtype": "args", "target_state": "running", "cancel_unavail": True,
    }  # fmt: skip
    if spec.ssh_public_key:  # with its sshd Vast.ai replaces the image's entry point, and puts the account's keys in
        key = f"mkdir -p ~/.ssh; echo {shlex.quote(spec.ssh_public_key)} > ~/.ssh/authorized_keys"
        body |= {"runtype": "ssh_direct", "onstart": f"{key}; {shlex.join(spec.command)}"}
        if len(body["onstart"]) > _LONGEST_ONSTART:
            raise errors.Rejected("command_too_long", f"with ssh it may have {_LONGEST_ONSTART} characters")
    elif spec.command:
        body["args"] = list(spec.command)
    if auth := spec.registry_auth:
        body["image_login"] = shlex.join(["-u", auth["username"], "-p", auth["password"], registry(spec.image)])
    if offer.spot:  # the bid is for the machine without its disk
        body["price"] = max(1000, offer.price_micro_h - (offer.stopped_micro_h or 0)) / 1_000_000
    return body


def _read_created(answer: Answer) -> base.Created:
    contract = str(answer.document().whole("new_contract"))
    if answer.find("success") is False:
        raise errors.AmbiguousOutcome("error_with_contract", answer.detail(), maybe_id=contract)
    return base.Created(contract)


def _read_done(answer: Answer) -> None:
    if not answer.document().flag("success"):
        raise errors.Rejected("not_done", answer.detail())


def _instance(instance: Document) -> Instance:
    """A bid that was lost is stopped in all ways; what was started while its GPU is let to another waits for that."""
    status = instance.words("actual_status") or "null"
    life, billing = _LIVES.get(status, ("unknown", "unknown"))
    now, wanted, then = (instance.values.get(key) for key in ("cur_state", "intended_status", "next_state"))
    if (now, wanted, then) == ("stopped",) * 3 and instance.values.get("is_bid") is True:
        life, billing = "interrupted", "storage"
    elif (now, wanted) == ("stopped", "stopped") and life == "starting":  # it never came to run
        life, billing = "stopped", "storage"
    elif life == now == "stopped":
        life, billing = "starting" if wanted == "running" else "stopped", "storage"
    return Instance(
        id=str(instance.whole("id")), ref=find_ref(instance.words("label")), status=status, life=life, billing=billing,
        reason=instance.words("status_msg"), endpoints=tuple(_endpoints(instance)) if life == "running" else (),
        price_micro_h=instance.usd("dph_total") if life == "running" and instance.has("dph_total") else None,
    )  # fmt: skip


def _endpoints(instance: Document) -> Iterator[Endpoint]:
    """`ports` says for `8000/tcp` of the container where on the host it is; with an sshd there is a proxy besides."""
    host, has_ssh = instance.words("public_ipaddr"), "ssh" in (instance.words("image_runtype") or "")
    ports = instance.child("ports") if isinstance(instance.values.get("ports"), dict) else Document({})
    doors = {key: (host, ports.children(key)[0].words("HostPort")) for key in ports.values if ports.values[key]}
    if has_ssh and "22/tcp" not in doors and instance.has("ssh_port"):
        doors["22/tcp"] = instance.words("ssh_host"), str(instance.whole("ssh_port", most=65535))
    for inside, (at, outside) in doors.items():
        port, _, protocol = inside.partition("/")
        is_ssh = has_ssh and inside == "22/tcp"
        command, name = (f"ssh root@{at} -p {outside}", "ssh") if is_ssh else (None, f"{protocol}-{port}")
        if at and outside and outside.isdecimal() and port.isdecimal():
            yield Endpoint(name, int(port), protocol, at, int(outside), command=command)
