"""CloudEvents 1.0 over HTTP as a broker sees them: attributes are read and checked, data are opaque bytes.

Written down here once more, beside `gpubroker.consumer`, as a broker carries what it does not understand: any type, any
media type, any extension.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, cast
from urllib.parse import unquote

from gpubroker.errors import GpubrokerError
from gpubroker.times import parse_time

_NAME: Final = re.compile(r"[a-z0-9]+")
_MEDIA_TYPE: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+/[!#$%&'*+.^_`|~0-9A-Za-z-]+( *;[\x20-\x7e]*)?")
_QUOTED: Final = re.compile(r'"(?:[^"\\]|\\.)*"')
_STRUCTURED: Final = "application/cloudevents+json"
_NOT_TEXT: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_LARGEST_INTEGER: Final = 2**31


class NoCloudEvent(GpubrokerError):
    """An HTTP message holds no valid CloudEvent 1.0; the text says what is wrong."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """One event. `attributes` are all of them, in the text form of HTTP; `specversion` is always `1.0`."""

    attributes: Mapping[str, str]
    data: bytes | None = None

    def extended(self, **changes: str | None) -> "Envelope":
        """Make the same event with some attributes set, or removed where they are None."""
        changed = {**self.attributes, **changes}
        return replace(self, attributes={name: value for name, value in changed.items() if value is not None})

    def headers(self) -> dict[str, str]:
        """Write the headers of binary mode."""
        made = {f"ce-{name}": _escape(value) for name, value in self.attributes.items() if name != "datacontenttype"}
        if "datacontenttype" in self.attributes:
            made["content-type"] = self.attributes["datacontenttype"]
        return made


def is_cloudevent(headers: Mapping[str, str]) -> bool:
    """Tell whether a message claims to be a CloudEvent, valid or not. `headers` ignores case."""
    return "ce-specversion" in headers or _media_type(headers).startswith("application/cloudevents")


def parse(headers: Mapping[str, str], body: bytes) -> Envelope:
    """Read an event in binary or structured mode. Raises NoCloudEvent, for a batch too."""
    media_type = _media_type(headers)
    if media_type == _STRUCTURED:
        return _parse_structured(body)
    if media_type.startswith("application/cloudevents"):
        msg = f"{media_type} is not taken: send one event, in binary mode or as {_STRUCTURED}"
        raise NoCloudEvent(msg)
    attributes = {
        name[3:].lower(): _unescape(value) for name, value in headers.items() if name.lower().startswith("ce-")
    }
    if "datacontenttype" in attributes:
        msg = "datacontenttype is the header Content-Type, not ce-datacontenttype"
        raise NoCloudEvent(msg)
    if headers.get("content-type"):
        attributes["datacontenttype"] = headers["content-type"]
    return _check(Envelope(attributes, body or None))


def _media_type(headers: Mapping[str, str]) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _parse_structured(body: bytes) -> Envelope:
    try:
        whole: object = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        msg = "the body is not JSON"
        raise NoCloudEvent(msg) from None
    if not isinstance(whole, dict):
        msg = "a structured event is a JSON object"
        raise NoCloudEvent(msg)
    members = cast("dict[str, object]", whole)
    kept = {name: value for name, value in members.items() if name not in ("data", "data_base64") and value is not None}
    attributes = {name: _as_text(name, value) for name, value in kept.items()}
    if members.get("data") is not None and members.get("data_base64") is not None:
        msg = "an event has data or data_base64, not both"
        raise NoCloudEvent(msg)
    if "data" not in members and members.get("data_base64") is None:
        return _check(Envelope(attributes))
    if members.get("data_base64") is not None:
        return _check(Envelope(attributes, _decode_base64(members["data_base64"])))
    media_type = attributes.setdefault("datacontenttype", "application/json")
    return _check(Envelope(attributes, _encode_data(members["data"], media_type)))


def _encode_data(data: object, media_type: str) -> bytes:
    subtype = media_type.partition(";")[0].strip().lower().partition("/")[2]
    if isinstance(data, str) and subtype != "json" and not subtype.endswith("+json"):
        return data.encode(errors="replace")
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _decode_base64(value: object) -> bytes:
    try:
        return base64.b64decode(value if isinstance(value, str) else "!", validate=True)
    except (ValueError, binascii.Error):
        msg = "data_base64 is not base64"
        raise NoCloudEvent(msg) from None


def _refuse_constant(text: str) -> object:
    msg = f"{text} is not JSON"
    raise ValueError(msg)


def _as_text(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and name not in ("id", "source", "type", "specversion") and abs(value) < _LARGEST_INTEGER:
        return str(value)
    if isinstance(value, str):
        return value
    msg = f"{name[:40]!r} is of a type that no attribute has"
    raise NoCloudEvent(msg)


def _check(event: Envelope) -> Envelope:
    attributes = event.attributes
    if attributes.get("specversion") != "1.0":
        msg = f"specversion must be 1.0, not {attributes.get('specversion', 'absent')!r}"
        raise NoCloudEvent(msg)
    for name in ("id", "source", "type"):
        if not attributes.get(name, "").strip():
            msg = f"{name} is missing or empty"
            raise NoCloudEvent(msg)
    for name, value in attributes.items():
        _check_text(name, value)
    if not attributes.get("subject", "x"):
        msg = "subject is empty"
        raise NoCloudEvent(msg)
    if "time" in attributes:
        try:
            parse_time(attributes["time"])
        except ValueError as error:
            msg = f"time {error}"
            raise NoCloudEvent(msg) from None
    if "datacontenttype" in attributes and not _MEDIA_TYPE.fullmatch(attributes["datacontenttype"]):
        msg = "datacontenttype is no media type"
        raise NoCloudEvent(msg)
    return event


def _check_text(name: str, value: str) -> None:
    if not _NAME.fullmatch(name):
        msg = f"{name[:40]!r} is no name of an attribute: a-z and 0-9"
        raise NoCloudEvent(msg)
    if _NOT_TEXT.search(value):
        msg = f"{name} has a control character"
        raise NoCloudEvent(msg)


def _escape(value: str) -> str:
    """Encode as CloudEvents' HTTP binding says: all but printable ASCII, and space, double quote, percent sign."""
    return "".join(
        character
        if "\x21" <= character <= "\x7e" and character not in '"%'
        else "".join(f"%{byte:02X}" for byte in character.encode())
        for character in value
    )


def _unescape(value: str) -> str:
    text = value
    if _QUOTED.fullmatch(text):
        text = re.sub(r"\\(.)", r"\1", text[1:-1])
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        msg = "a header is not percent-encoded UTF-8"
        raise NoCloudEvent(msg) from None
