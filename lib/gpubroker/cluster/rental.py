"""What of a cluster is rented out, and for how much: the settings `GPUBROKER_KUBERNETES_*`, and the GPUs of its nodes.

Nodes say what they have by the labels of NVIDIA's GPU feature discovery and by their allocatable resources: whole GPUs
(`nvidia.com/gpu`), slices (`nvidia.com/mig-1g.10gb`, or a product that ends `-MIG-1g.10gb`), and shared ones
(`nvidia.com/gpu.shared`, or a product that ends `-SHARED`). A slice or a share is never taken for a whole GPU: its name is no
model's, and it has a price only where the settings name it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, NamedTuple

from gpubroker import gpus
from gpubroker.cluster.client import Object
from gpubroker.config import Settings
from gpubroker.errors import SetupError
from gpubroker.money import parse_usd
from gpubroker.providers.base import Availability, ProviderOffer, Support

_GB: Final = 10**9
_SHARE: Final = Decimal("0.8")
"""Of a node's cores and memory so much goes with its GPUs; the rest is the system's."""
_UNITS: Final = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
_QUANTITY: Final = re.compile(r"([0-9.]+)(m|[kKMGT]i?|)")
_SLICE: Final = re.compile(r"mig-\S*?(\d+)gb", re.IGNORECASE)
_AVAILABILITY: Final[tuple[Availability, ...]] = ("none", "low", "medium", "medium", "high")


@dataclass(frozen=True, slots=True)
class Terms:
    """How pods are made and what they cost."""

    namespace: str = "gpubroker-pods"
    prices: tuple[tuple[str, int], ...] = ()
    """Names of GPUs as an operator writes them, and micro-USD per hour for one."""
    storage_class: str | None = None
    """Its volumes keep a stopped pod's disk. None: a pod's disk is gone when it stops, so it cannot be stopped."""
    service_type: str = "NodePort"
    host: str | None = None
    """Where NodePorts are reached from outside; None: the node's own address."""
    runtime_class: str | None = None
    disk_gb: int = 50

    @property
    def supports(self) -> frozenset[Support]:
        """What its pods can do."""
        if self.storage_class:
            return frozenset[Support]({"image", "ports", "exec", "logs", "stop"})
        return frozenset[Support]({"image", "ports", "exec", "logs"})


def read_terms(settings: Settings) -> Terms:
    """Read the settings. Raises SetupError, one line that names the variable."""
    default = Terms()
    service_type = settings.variable("GPUBROKER_KUBERNETES_SERVICE_TYPE") or default.service_type
    if service_type not in ("NodePort", "LoadBalancer", "ClusterIP"):
        raise SetupError("GPUBROKER_KUBERNETES_SERVICE_TYPE must be NodePort, LoadBalancer or ClusterIP")
    disk = settings.variable("GPUBROKER_KUBERNETES_DISK_GB") or str(default.disk_gb)
    if not re.fullmatch(r"[1-9][0-9]{0,5}", disk):
        raise SetupError("GPUBROKER_KUBERNETES_DISK_GB must be a whole number above 0")
    return Terms(
        namespace=settings.variable("GPUBROKER_KUBERNETES_NAMESPACE") or default.namespace,
        prices=_read_prices(settings.variable("GPUBROKER_KUBERNETES_PRICES") or ""),
        storage_class=settings.variable("GPUBROKER_KUBERNETES_STORAGE_CLASS"),
        service_type=service_type,
        host=settings.variable("GPUBROKER_KUBERNETES_HOST"),
        runtime_class=settings.variable("GPUBROKER_KUBERNETES_RUNTIME_CLASS"),
        disk_gb=int(disk),
    )


def _read_prices(text: str) -> tuple[tuple[str, int], ...]:
    found: list[tuple[str, int]] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, price = entry.rpartition("=")
        try:
            found.append((name.strip().lower(), parse_usd(price.strip())))
        except ValueError as error:
            raise SetupError(f"GPUBROKER_KUBERNETES_PRICES: {price.strip() or entry}: {error}") from None
        if not name.strip() or found[-1][1] == 0:
            msg = "GPUBROKER_KUBERNETES_PRICES must be a list such as 'H100 SXM=2.50, mig-1g.10gb=0.40, *=1.00'"
            raise SetupError(msg)
    return tuple(found)


class Kind(NamedTuple):
    """One kind of GPU as it is asked for; the same on every node that has it."""

    resource: str
    product: str
    region: str

    @property
    def name(self) -> str:
        """The vendor's name: the product's, with the slice where the resource is one."""
        part = self.resource.partition("/")[2]
        return self.product if part == "gpu" else f"{self.product} {part}"

    @property
    def is_part(self) -> bool:
        """It is a slice or a share of a GPU, not one."""
        return self.resource != "nvidia.com/gpu" or bool(re.search(r"-(MIG-\S+|SHARED)$", self.product))


@dataclass(slots=True)
class Room:
    """What nodes have of one kind."""

    vram_gb: int
    free: list[int] = field(default_factory=list[int])
    sizes: list[tuple[int, Decimal, Decimal]] = field(default_factory=list[tuple[int, Decimal, Decimal]])
    """Each node's count, and the cores and GB of memory that go with one."""


def quantity(text: str | int) -> Decimal:
    """A Kubernetes quantity such as `1500m` or `64Gi` as a number."""
    match = _QUANTITY.fullmatch(str(text))
    if match is None:
        return Decimal(0)
    return Decimal(match[1]) / 1000 if match[2] == "m" else Decimal(match[1]) * _UNITS[match[2]]


def list_offers(terms: Terms, nodes: Iterable[Object], pods: Iterable[Object]) -> list[ProviderOffer]:
    """Everything that has a price, whether it is free now or not."""
    rooms = _find_rooms(nodes, _find_used(pods))
    return [offer for kind, room in sorted(rooms.items()) for offer in _offers_of(terms, kind, room)]


def _find_used(pods: Iterable[Object]) -> dict[str, dict[str, int]]:
    """How many of each GPU resource the pods of every node ask for, node by node."""
    used: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for pod in pods:
        if pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
            continue
        spec = pod["spec"]
        running = _asked(spec.get("containers", []), sum)
        first = _asked(spec.get("initContainers", []), max)
        for resource in {*running, *first}:
            used[spec.get("nodeName", "")][resource] += max(running.get(resource, 0), first.get(resource, 0))
    return used


def _asked(containers: Iterable[Object], join: object) -> dict[str, int]:
    found: dict[str, list[int]] = defaultdict(list)
    for container in containers:
        for resource, count in container.get("resources", {}).get("limits", {}).items():
            if resource.startswith("nvidia.com/"):
                found[resource].append(int(count))
    return {resource: (sum if join is sum else max)(counts) for resource, counts in found.items()}


def _find_rooms(nodes: Iterable[Object], used: dict[str, dict[str, int]]) -> dict[Kind, Room]:
    rooms: dict[Kind, Room] = {}
    for node in nodes:
        labels, has = node["metadata"].get("labels", {}), node["status"].get("allocatable", {})
        counts = {name: int(count) for name, count in has.items() if name.startswith("nvidia.com/") and int(count) > 0}
        ready = any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions", []))
        usable = ready and not node["spec"].get("unschedulable")
        for resource, count in counts.items():
            kind = Kind(
                resource,
                labels.get("nvidia.com/gpu.product", "GPU"),
                labels.get("topology.kubernetes.io/region", "cluster"),
            )
            slice_gb = _SLICE.search(kind.name)
            vram = int(slice_gb[1]) if slice_gb else round(int(labels.get("nvidia.com/gpu.memory", 0)) * 2**20 / _GB)
            room = rooms.setdefault(kind, Room(vram))
            taken = used.get(node["metadata"]["name"], {}).get(resource, 0)
            room.free.append(max(0, count - taken) if usable else 0)
            each = _SHARE / sum(counts.values())
            room.sizes.append((count, quantity(has.get("cpu", 0)) * each, quantity(has.get("memory", 0)) * each / _GB))
    return rooms


def _offers_of(terms: Terms, kind: Kind, room: Room) -> Iterator[ProviderOffer]:
    price = find_price(terms, kind)
    if price is None:
        return
    largest = 1 if kind.is_part else max(count for count, _, _ in room.sizes)
    for count in sorted({1, largest, *(2**power for power in range(1, 7) if 2**power <= largest)}):
        fitting = [size for size in room.sizes if size[0] >= count]
        times = sum(free // count for free in room.free)
        yield ProviderOffer(
            provider_offer_id=f"{kind.resource}:{kind.product}:{count}",
            gpu=kind.name,
            gpu_count=count,
            vcpus=float(round(min(cores for _, cores, _ in fitting) * count, 1)),
            ram_gb=float(round(min(ram for _, _, ram in fitting) * count, 1)),
            disk_gb=terms.disk_gb,
            disk_base_gb=terms.disk_gb,
            region=kind.region,
            price_micro_h=price * count,
            stopped_micro_h=0,
            supports=terms.supports,
            availability=_AVAILABILITY[min(times, len(_AVAILABILITY) - 1)],
            vram_gb=room.vram_gb,
        )


def find_price(terms: Terms, kind: Kind) -> int | None:
    """The price of one: of its own name, else of a model that its name means, else of `*`. Parts have only the first."""
    prices = dict(terms.prices)
    own = {kind.name.lower(), kind.product.lower(), kind.resource.partition("/")[2].lower()} - {"gpu"}
    part = re.search(r"(mig-\S+|shared)$", kind.name, re.IGNORECASE)
    for name in [*sorted(own, key=len, reverse=True), *([part[1].lower()] if part else [])]:
        if name in prices and not (kind.is_part and name == kind.product.lower() and kind.name != kind.product):
            return prices[name]
    if kind.is_part:
        return None
    model = gpus.recognise(kind.product)
    if model is not None and model.name.lower() in prices:
        return prices[model.name.lower()]
    meant = [micro for name, micro in terms.prices if model is not None and model.name in gpus.ask(name)]
    return meant[0] if meant else prices.get("*")


def read_offer_id(offer: ProviderOffer) -> Kind:
    """What an offer of ours names. Raises ValueError for another's."""
    resource, product, _ = offer.provider_offer_id.split(":")
    return Kind(resource, product, offer.region)
