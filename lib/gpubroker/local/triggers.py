"""Knative's eventing resources as the local broker understands them: Broker, Trigger, PingSource.

The meaning is that of Knative 1.2x (pkg/eventfilter, pkg/kncloudevents): `filters`, if there are any, replace
`filter`; an empty filter takes every event; a Trigger's `delivery` replaces the Broker's as a whole, but for the dead
letter sink.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, cast

import yaml

from gpubroker.errors import SetupError

Attributes = Mapping[str, str]
Filter = Callable[[Attributes], bool | None]
"""Tells whether an event passes. None, Knative's NoFilter, is neither: `not` leaves it as it is, delivery takes it."""

_ATTRIBUTE: Final = re.compile(r"[a-z][a-z0-9]*")
_DURATION: Final = re.compile(
    r"P(?=[\dT])(?:(\d+(?:\.\d+)?)W)?(?:(\d+(?:\.\d+)?)D)?"
    r"(?:T(?=\d)(?:(\d+(?:\.\d+)?)H)?(?:(\d+(?:\.\d+)?)M)?(?:(\d+(?:\.\d+)?)S)?)?"
)
_DIALECTS: Final = ("exact", "prefix", "suffix", "all", "any", "not", "cesql")


@dataclass(frozen=True, slots=True)
class Destination:
    """Where events go: a Service by its name, an absolute URI, or a path at that Service."""

    service: str | None
    uri: str | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """How hard delivery is tried. Times are seconds."""

    retry: int = 0
    backoff: Literal["linear", "exponential"] = "exponential"
    backoff_delay: float = 0.0
    timeout: float | None = None
    dead_letter: Destination | None = None

    def pause(self, attempt: int) -> float:
        """How long to wait before retry number `attempt`, counted from 0."""
        return self.backoff_delay * (attempt if self.backoff == "linear" else 2**attempt)


@dataclass(frozen=True, slots=True)
class Trigger:
    """One subscription to the Broker."""

    name: str
    filter: Filter
    subscriber: Destination
    delivery: Delivery


@dataclass(frozen=True, slots=True)
class PingSource:
    """A clock that sends an event to its sink. `schedule` is a cron line of 5 fields, or 6 with seconds first."""

    name: str
    namespace: str
    schedule: str
    timezone: str
    sink: Destination
    content_type: str | None = None
    data: str | None = None


@dataclass(frozen=True, slots=True)
class Resources:
    """What the folder eventing/ declares."""

    triggers: tuple[Trigger, ...]
    sources: tuple[PingSource, ...]


@dataclass(frozen=True, slots=True)
class _Node:
    """A mapping of a YAML file, and the place to name in errors."""

    value: Mapping[str, object]
    place: str

    def refuse(self, reason: str) -> SetupError:
        return SetupError(f"{self.place}: {reason}")

    def child(self, name: str) -> "_Node | None":
        found = self.value.get(name)
        if found is None:
            return None
        if not isinstance(found, dict):
            raise self.refuse(f"{name} must be a mapping")
        return _Node(cast("dict[str, object]", found), f"{self.place}: {name}")

    def need(self, name: str) -> "_Node":
        found = self.child(name)
        if found is None:
            raise self.refuse(f"{name} is missing")
        return found

    def children(self, name: str) -> "list[_Node]":
        found: object = self.value.get(name) or []
        items = cast("list[object]", found) if isinstance(found, list) else [None]
        if not all(isinstance(item, dict) for item in items):
            raise self.refuse(f"{name} must be a list of mappings")
        nodes = cast("list[dict[str, object]]", items)
        return [_Node(item, f"{self.place}: {name}[{place}]") for place, item in enumerate(nodes)]

    def text(self, name: str) -> str | None:
        found = self.value.get(name)
        if found is not None and not isinstance(found, str):
            raise self.refuse(f"{name} must be a text")
        return found or None


def read(folder: Path) -> Resources:
    """Read every YAML file below a folder. Raises SetupError naming the file and what it is that is not understood."""
    found: dict[str, list[_Node]] = {"Broker": [], "Trigger": [], "PingSource": []}
    for node in _documents(folder):
        found.get(str(node.value.get("kind")), []).append(node)
    brokers = {_name(node): _read_delivery(node.child("spec")) for node in found["Broker"]}
    triggers = tuple(_read_trigger(node, brokers) for node in found["Trigger"])
    return Resources(triggers, tuple(_read_source(node) for node in found["PingSource"]))


def _documents(folder: Path) -> Iterator[_Node]:
    for path in sorted(folder.rglob("*.yaml")):
        try:
            documents = cast("list[object]", list(yaml.safe_load_all(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, yaml.YAMLError) as error:
            msg = f"{path} cannot be read: {' '.join(str(error).split())}"
            raise SetupError(msg) from None
        for document in documents:
            if isinstance(document, dict):
                yield _Node(cast("dict[str, object]", document), str(path))


def _name(node: _Node) -> str:
    name = node.need("metadata").text("name")
    if name is None:
        raise node.refuse("metadata.name is missing")
    return name


def _read_trigger(node: _Node, brokers: Mapping[str, Delivery]) -> Trigger:
    named = replace(node, place=f"{node.place}: Trigger {_name(node)}")
    spec = named.need("spec")
    broker = spec.text("broker") or ((ref := spec.child("brokerRef")) and ref.text("name")) or ""
    if broker not in brokers:
        raise named.refuse(f"there is no Broker '{broker}'")
    delivery = brokers[broker]
    if spec.child("delivery") is not None:
        own = _read_delivery(spec)
        delivery = replace(own, dead_letter=own.dead_letter or delivery.dead_letter)
    return Trigger(_name(node), _read_filter(spec), _read_destination(spec.need("subscriber")), delivery)


def _read_destination(node: _Node) -> Destination:
    ref, uri = node.child("ref"), node.text("uri")
    if ref is None:
        if uri is None or not uri.startswith(("http://", "https://")):
            raise node.refuse("needs a ref or an absolute uri")
        return Destination(None, uri)
    if ref.text("kind") != "Service" or ref.text("name") is None:
        raise ref.refuse("only a Service, by its name, can be reached here")
    return Destination(ref.text("name"), uri)


def _read_delivery(spec: _Node | None) -> Delivery:
    node = spec.child("delivery") if spec else None
    if node is None:
        return Delivery()
    retry, policy = node.value.get("retry", 0), node.text("backoffPolicy") or "exponential"
    if isinstance(retry, bool) or not isinstance(retry, int) or retry < 0:
        raise node.refuse("retry must be a whole number")
    if policy not in ("linear", "exponential"):
        raise node.refuse(f"backoffPolicy is linear or exponential, not {policy}")
    sink = node.child("deadLetterSink")
    # Knative waits only where policy and delay are both given.
    delay = _read_duration(node, "backoffDelay") if node.text("backoffPolicy") else None
    return Delivery(
        retry, "linear" if policy == "linear" else "exponential", delay or 0.0,
        _read_duration(node, "timeout"), _read_destination(sink) if sink else None,
    )  # fmt: skip


def _read_duration(node: _Node, name: str) -> float | None:
    text = node.text(name)
    if text is None:
        return None
    found = _DURATION.fullmatch(text)
    if found is None:
        raise node.refuse(f"{name} '{text}' is no ISO 8601 duration of weeks to seconds, such as PT0.5S")
    units = (604_800, 86_400, 3_600, 60, 1)
    return sum(float(part or 0) * unit for part, unit in zip(found.groups(), units, strict=True))


def _read_filter(spec: _Node) -> Filter:
    filters = spec.children("filters")
    if filters:
        return _all(_read_dialects(filters))
    legacy = spec.child("filter")
    attributes = legacy.child("attributes") if legacy else None
    if attributes is None:
        return lambda _: None
    return _exact_or_any(_read_attributes(attributes))


def _read_attributes(node: _Node) -> dict[str, str]:
    for name, value in node.value.items():
        if not _ATTRIBUTE.fullmatch(name):
            raise node.refuse(f"'{name}' is no attribute: a-z and 0-9, a letter first")
        if not isinstance(value, str):
            raise node.refuse(f"{name} must be a text")
    return cast("dict[str, str]", dict(node.value))


def _read_dialects(nodes: Sequence[_Node]) -> list[Filter]:
    """Read filters; those without a dialect count for nothing."""
    return [each for each in map(_read_dialect, nodes) if each is not None]


def _read_dialect(node: _Node) -> Filter | None:
    given = [name for name in _DIALECTS if node.value.get(name) or (name == "not" and node.child("not"))]
    unknown = sorted(set(node.value) - set(_DIALECTS))
    if unknown:
        raise node.refuse(f"there is no filter dialect '{unknown[0]}'")
    if len(given) > 1:
        raise node.refuse(f"one filter has one dialect, not {' and '.join(given)}")
    if not given:
        return None
    (dialect,) = given
    if dialect == "cesql":
        raise node.refuse(
            "cesql is not understood by the local broker: write it with exact, prefix, suffix, all, any, not"
        )
    if dialect == "not":
        inner = _read_dialect(node.need("not"))
        return _not(inner) if inner else lambda _: None
    if dialect in ("all", "any"):
        nested = _read_dialects(node.children(dialect))
        return _all(nested) if dialect == "all" else _any(nested)
    wanted = _read_attributes(node.need(dialect))
    if not all(wanted.values()):
        raise node.refuse(f"{dialect} must not look for an empty text")
    tests: dict[str, Callable[[str, str], bool]] = {
        "exact": str.__eq__, "prefix": str.startswith, "suffix": str.endswith,
    }  # fmt: skip
    return _matches(wanted, tests[dialect])


def _matches(wanted: Attributes, test: Callable[[str, str], bool]) -> Filter:
    return lambda event: all(name in event and test(event[name], value) for name, value in wanted.items())


def _exact_or_any(wanted: Attributes) -> Filter:
    def passes(event: Attributes) -> bool:
        """Take an empty text for any value."""
        return all(event.get(name, "") == value if value else bool(event.get(name)) for name, value in wanted.items())

    return passes


def _all(filters: Sequence[Filter]) -> Filter:
    def passes(event: Attributes) -> bool | None:
        result = None
        for each in filters:
            result = each(event)
            if result is False:
                return False
        return result

    return passes


def _any(filters: Sequence[Filter]) -> Filter:
    def passes(event: Attributes) -> bool | None:
        result = None
        for each in filters:
            result = each(event)
            if result:
                return True
        return result

    return passes


def _not(inner: Filter) -> Filter:
    def passes(event: Attributes) -> bool | None:
        result = inner(event)
        return None if result is None else not result

    return passes


def _read_source(node: _Node) -> PingSource:
    named = replace(node, place=f"{node.place}: PingSource {_name(node)}")
    spec = named.need("spec")
    if spec.value.get("dataBase64"):
        raise spec.refuse("dataBase64 is not understood here, use data")
    return PingSource(
        name=_name(node),
        namespace=node.need("metadata").text("namespace") or "default",
        schedule=spec.text("schedule") or "* * * * *",
        timezone=spec.text("timezone") or "UTC",
        sink=_read_destination(spec.need("sink")),
        content_type=spec.text("contentType"),
        data=spec.text("data"),
    )
