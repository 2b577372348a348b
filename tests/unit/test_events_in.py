"""CloudEvents in: what is one, and everything that is none."""

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import Request

from gpubroker import errors
from gpubroker.consumer import Incoming, MalformedEvent, decode

HEADERS = {
    "ce-specversion": "1.0",
    "ce-id": "evt_1",
    "ce-source": "/gpubroker/x",
    "ce-type": "io.gpubroker.pod.requested.v1",
}
MEMBERS: dict[str, Any] = {
    "specversion": "1.0",
    "id": "evt_1",
    "source": "/gpubroker/x",
    "type": "io.gpubroker.pod.requested.v1",
}


def read(headers: dict[str, str], body: bytes = b"") -> Incoming:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": raw}
    return asyncio.run(decode(Request(scope, receive)))


def binary(body: bytes = b"{}", media_type: str = "application/json", **changes: str | None) -> Incoming:
    headers = HEADERS | {f"ce-{name}": value for name, value in changes.items()}
    given = {name: value for name, value in headers.items() if value is not None}
    return read(given | {"content-type": media_type}, body)


def structured(media_type: str = "application/cloudevents+json", **changes: Any) -> Incoming:
    members = {name: value for name, value in (MEMBERS | changes).items() if value is not ...}
    return read({"content-type": media_type}, json.dumps(members).encode())


def test_a_binary_event_is_read():
    event = binary(
        b'{"a": [1, 2.5, null]}',
        subject="pod_1",
        time="2026-11-22T18:58:03.12Z",
        tenant="org_1",
        traceparent="00-x",
        dataschema="/s",
    )
    assert (event.id, event.type, event.source, event.subject) == ("evt_1", HEADERS["ce-type"], "/gpubroker/x", "pod_1")
    assert event.data == {"a": [1, 2.5, None]}
    assert event.extensions == {"tenant": "org_1", "traceparent": "00-x"}
    assert binary(b"", subject=None).data is None
    assert binary(b"{}", "application/json; charset=utf-8").data == {}


def test_a_structured_event_is_read():
    event = structured(
        data={"a": 1},
        subject="pod_1",
        tenant="org_1",
        datacontenttype="application/json",
        time="2026-11-22T18:58:03+01:00",
    )
    assert (event.id, event.subject, event.data, event.extensions) == ("evt_1", "pod_1", {"a": 1}, {"tenant": "org_1"})
    assert structured("application/cloudevents+json; charset=UTF-8").data is None
    assert structured(data=None).data is None


def test_an_attribute_that_is_null_is_an_absent_one():
    """CloudEvents 1.0.2, JSON format, 2.1: null MUST be treated as unset or omitted."""
    event = structured(subject=None, time=None, tenant=None, dataschema=None)
    assert (event.subject, event.extensions) == (None, {})


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in ("specversion", "id", "source", "type") for value in (None, "", " ")),
        {"specversion": "0.3"}, {"specversion": "1.0.2"}, {"time": "yesterday"}, {"time": "2026-11-22"}, {"time": ""},
        {"subject": ""},
        {"dataschema": ""}, {"bad_name": "x"}, {"a" * 21: "x"}, {"b-c": "x"}, {"é": "x"}, {"id": "a\x7fb"},
        {"subject": "a\tb"}, {"tenant": "a\x01"},
    ],
)  # fmt: skip
def test_a_binary_event_that_is_none_is_refused(changes: dict[str, str | None]):
    with pytest.raises(MalformedEvent):
        binary(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in ("specversion", "id", "source", "type") for value in (..., None, "", " ", 5, True,
        [], {})),
        {"specversion": 1.0}, {"id": 7}, {"time": 5}, {"time": "2026-11-22T18:58:03"}, {"subject": 5},
        {"subject": ""}, {"datacontenttype": 5},
        {"data_base64": "eA=="}, {"data": {}, "data_base64": "eA=="}, {"Tenant": "x"}, {"bad_name": "x"}, {"": "x"},
        {"a" * 21: "x"},
        {"id": "a\x00b"}, {"id": "a\nb"}, {"id": "\ud800"}, {"subject": "pod_\x00"}, {"subject": "\udfff"},
        {"tenant": "a\x00"}, {"source": "\x1f"},
        {"type": "a\x85b"},
    ],
)  # fmt: skip
def test_a_structured_event_that_is_none_is_refused(changes: dict[str, Any]):
    with pytest.raises(MalformedEvent):
        structured(**changes)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff", b"[" * 100_000, json.dumps([MEMBERS]).encode(),
    json.dumps(MEMBERS).encode()[:-1],
     json.dumps(MEMBERS).encode()[:-1] + b', "data": NaN}', json.dumps(MEMBERS).encode()[:-1] + b', "id": "evt_2"}'],
)  # fmt: skip
def test_a_structured_body_that_is_no_object_is_refused(body: bytes):
    with pytest.raises(MalformedEvent):
        read({"content-type": "application/cloudevents+json"}, body)


@pytest.mark.parametrize("body", [b"{", b"\xff", b"x", b"[" * 100_000, b"NaN", b'{"a": Infinity}', b"{} {}"])
def test_data_that_is_no_json_is_refused(body: bytes):
    with pytest.raises(MalformedEvent):
        binary(body)


@pytest.mark.parametrize(
    "media_type",
    [
        "application/cloudevents-batch+json",
        "application/cloudevents+avro",
        "application/cloudevents",
        "text/plain",
        "application/xml",
    ],
)
def test_other_modes_and_types_are_refused(media_type: str):
    with pytest.raises(MalformedEvent):
        binary(b"{}", media_type)


def test_an_event_above_one_mebibyte_is_refused():
    with pytest.raises(errors.BodyTooLarge):
        binary(b" " * (1024 * 1024 + 1))
