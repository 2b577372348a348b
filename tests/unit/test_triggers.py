"""What the local broker makes of Knative's YAML, and how it reads and writes CloudEvents."""

import textwrap
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gpubroker import bundle, events
from gpubroker.errors import SetupError
from gpubroker.local import schedule, triggers
from gpubroker.local.envelope import Envelope, NoCloudEvent, parse

EVENT = {
    "specversion": "1.0",
    "id": "evt_1",
    "type": "io.gpubroker.pod.running.v1",
    "source": "/gpubroker/abcd1234",
    "subject": "pod_1",
    "tenant": "org_1",
}

BROKER = """
apiVersion: eventing.knative.dev/v1
kind: Broker
metadata: {name: default}
spec:
  delivery:
    retry: 5
    backoffPolicy: exponential
    backoffDelay: PT0.5S
    deadLetterSink: {ref: {apiVersion: serving.knative.dev/v1, kind: Service, name: deadletter}}
---
"""


def read(folder: Path, spec: str, *, subscriber: str = "{ref: {kind: Service, name: metering}}") -> triggers.Trigger:
    text = BROKER + "kind: Trigger\nmetadata: {name: it}\nspec:\n  broker: default\n"
    text += f"  subscriber: {subscriber}\n" + textwrap.indent(textwrap.dedent(spec), "  ")
    (folder / "trigger.yaml").write_text(text)
    (trigger,) = triggers.read(folder).triggers
    return trigger


FILTERS = {
    "no filter takes all": ("", True),
    "an empty filter takes all": ("filter: {}", True),
    "no attributes take all": ("filter: {attributes: {}}", True),
    "an attribute that fits": ("filter: {attributes: {type: io.gpubroker.pod.running.v1}}", True),
    "an attribute that does not fit": ("filter: {attributes: {type: io.gpubroker.pod.running}}", False),
    "all attributes must fit": (
        "filter: {attributes: {type: io.gpubroker.pod.running.v1, source: elsewhere}}",
        False,
    ),
    "an extension": ("filter: {attributes: {tenant: org_1}}", True),
    "an absent extension": ("filter: {attributes: {agent: agt_1}}", False),
    "an empty text is any value": ("filter: {attributes: {subject: ''}}", True),
    "an empty text is not absence": ("filter: {attributes: {agent: ''}}", False),
    "filters replace filter": (
        "filter: {attributes: {type: nothing}}\nfilters: [{exact: {subject: pod_1}}]",
        True,
    ),
    "empty filters leave filter": ("filter: {attributes: {type: nothing}}\nfilters: []", False),
    "exact": ("filters: [{exact: {subject: pod_1}}]", True),
    "exact does not fit": ("filters: [{exact: {subject: pod_2}}]", False),
    "exact on an extension": ("filters: [{exact: {tenant: org_1}}]", True),
    "exact with several attributes": ("filters: [{exact: {subject: pod_1, tenant: org_2}}]", False),
    "case counts": ("filters: [{exact: {subject: POD_1}}]", False),
    "prefix": ("filters: [{prefix: {type: io.gpubroker.pod.}}]", True),
    "prefix does not fit": ("filters: [{prefix: {type: gpubroker.}}]", False),
    "prefix of an absent attribute": ("filters: [{prefix: {time: '2026'}}]", False),
    "suffix": ("filters: [{suffix: {type: .v1}}]", True),
    "suffix does not fit": ("filters: [{suffix: {type: .v2}}]", False),
    "several filters must all fit": ("filters: [{suffix: {type: .v1}}, {exact: {subject: pod_2}}]", False),
    "all": ("filters: [{all: [{suffix: {type: .v1}}, {exact: {subject: pod_1}}]}]", True),
    "all does not fit": ("filters: [{all: [{suffix: {type: .v1}}, {exact: {subject: pod_2}}]}]", False),
    "any": ("filters: [{any: [{exact: {subject: pod_2}}, {exact: {subject: pod_1}}]}]", True),
    "any does not fit": ("filters: [{any: [{exact: {subject: pod_2}}, {exact: {subject: pod_3}}]}]", False),
    "not": ("filters: [{not: {exact: {subject: pod_2}}}]", True),
    "not does not fit": ("filters: [{not: {exact: {subject: pod_1}}}]", False),
    "not an absent attribute": ("filters: [{not: {exact: {agent: agt_1}}}]", True),
    "nested": ("filters: [{not: {any: [{exact: {subject: pod_1}}, {all: [{prefix: {type: x}}]}]}}]", False),
    "an empty dialect takes all": ("filters: [{}]", True),
    "an empty dialect counts for nothing beside others": ("filters: [{any: [{exact: {subject: pod_2}}, {}]}]", False),
    "not of an empty dialect takes all": ("filters: [{not: {}}]", True),
}


@pytest.mark.parametrize(("spec", "passes"), FILTERS.values(), ids=FILTERS.keys())
def test_filters_mean_what_they_mean_in_knative(tmp_path: Path, spec: str, passes: bool) -> None:
    assert (read(tmp_path, spec).filter(EVENT) is not False) == passes


REFUSED = {
    "filters: [{cesql: \"type = 'x'\"}]": "cesql is not understood",
    "filters: [{exact: {type: x}, prefix: {type: y}}]": "one filter has one dialect, not exact and prefix",
    "filters: [{glob: {type: x}}]": "no filter dialect 'glob'",
    "filters: [{exact: {type: ''}}]": "exact must not look for an empty text",
    "filters: [{exact: {Type: x}}]": "'Type' is no attribute",
    "filters: {exact: {type: x}}": "filters must be a list of mappings",
    "filter: {attributes: {type: 1}}": "type must be a text",
    "delivery: {retry: -1}": "retry must be a whole number",
    "delivery: {backoffPolicy: random}": "backoffPolicy is linear or exponential",
    "delivery: {timeout: 5s}": "timeout '5s' is no ISO 8601 duration",
    "delivery: {deadLetterSink: {ref: {kind: Channel, name: x}}}": "only a Service",
}


@pytest.mark.parametrize(("spec", "reason"), REFUSED.items())
def test_what_is_not_understood_is_refused_naming_the_file(tmp_path: Path, spec: str, reason: str) -> None:
    with pytest.raises(SetupError) as raised:
        read(tmp_path, spec)
    assert str(tmp_path / "trigger.yaml") in str(raised.value)
    assert "Trigger it" in str(raised.value)
    assert reason in str(raised.value)


def test_a_trigger_needs_its_broker(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(
        "kind: Trigger\nmetadata: {name: it}\nspec: {broker: other, subscriber: {uri: http://x}}"
    )
    with pytest.raises(SetupError, match="no Broker 'other'"):
        triggers.read(tmp_path)


def test_broken_yaml_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("kind: [Trigger\nx")
    with pytest.raises(SetupError) as raised:
        triggers.read(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_trigger_has_the_brokers_delivery(tmp_path: Path) -> None:
    delivery = read(tmp_path, "").delivery
    assert (delivery.retry, delivery.backoff, delivery.backoff_delay) == (5, "exponential", 0.5)
    assert delivery.dead_letter == triggers.Destination("deadletter")


def test_a_triggers_delivery_replaces_the_brokers_but_for_the_sink(tmp_path: Path) -> None:
    delivery = read(
        tmp_path, "delivery: {retry: 2, backoffPolicy: linear, backoffDelay: PT2S, timeout: PT1M30S}"
    ).delivery
    assert (delivery.retry, delivery.backoff, delivery.backoff_delay, delivery.timeout) == (2, "linear", 2, 90)
    assert delivery.dead_letter == triggers.Destination("deadletter")
    delivery = read(tmp_path, "delivery: {deadLetterSink: {uri: 'http://127.0.0.1:9/x'}}").delivery
    assert (delivery.retry, delivery.backoff_delay) == (0, 0)
    assert delivery.dead_letter == triggers.Destination(None, "http://127.0.0.1:9/x")


def test_pauses_grow_as_in_knative(tmp_path: Path) -> None:
    exponential = triggers.Delivery(5, "exponential", 0.5)
    assert [exponential.pause(n) for n in range(4)] == [0.5, 1, 2, 4]
    linear = triggers.Delivery(5, "linear", 0.5)
    assert [linear.pause(n) for n in range(4)] == [0, 0.5, 1, 1.5]
    assert read(tmp_path, "delivery: {retry: 1, backoffDelay: PT2S}").delivery.pause(1) == 0, "no policy, no pause"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("PT0.2S", 0.2), ("PT1H1M1S", 3661), ("P1DT1S", 86401), ("P2W", 1209600), ("PT5M", 300), ("PT0S", 0)],
)
def test_durations(tmp_path: Path, text: str, seconds: float) -> None:
    assert read(tmp_path, f"delivery: {{timeout: {text}}}").delivery.timeout == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["P", "PT", "1S", "PT1.S", "PTS", "PT1S1M", "P1Y", "-PT1S", "P1M"])
def test_texts_that_are_no_durations(tmp_path: Path, text: str) -> None:
    with pytest.raises(SetupError, match="ISO 8601"):
        read(tmp_path, f"delivery: {{timeout: '{text}'}}")


def test_the_rendered_triggers_take_what_the_catalogue_says() -> None:
    read_back = triggers.read(bundle.home() / "eventing")
    taken = {
        trigger.name: {event.type for event in events.EVENTS if trigger.filter({**EVENT, "type": event.type})}
        for trigger in read_back.triggers
    }
    assert taken == {
        function.name: {event.type for event in events.consumed_by(function.name)}
        for function in bundle.FUNCTIONS
        if events.consumed_by(function.name)
    }
    assert {(source.name, source.schedule) for source in read_back.sources} == {
        (function.name, function.schedule) for function in bundle.FUNCTIONS if function.schedule
    }


# PingSources


def ping(line: str, timezone: str = "UTC") -> triggers.PingSource:
    return triggers.PingSource("tick", "default", line, timezone, triggers.Destination("reconcile"))


@pytest.mark.parametrize(
    ("line", "timezone", "expected"),
    [
        ("* * * * *", "UTC", (2026, 3, 1, 12, 1, 0)),
        ("*/15 * * * * *", "UTC", (2026, 3, 1, 12, 0, 15)),
        ("0 */2 * * *", "UTC", (2026, 3, 1, 14, 0, 0)),
        ("30 9 * * MON", "Europe/Berlin", (2026, 3, 2, 8, 30, 0)),
        ("@hourly", "UTC", (2026, 3, 1, 13, 0, 0)),
        ("0 0 1 1 ?", "UTC", (2027, 1, 1, 0, 0, 0)),
    ],
)
def test_cron_lines(line: str, timezone: str, expected: tuple[int, ...]) -> None:
    after = datetime(2026, 3, 1, 12, 0, 0, 400, tzinfo=UTC)
    assert schedule.next_time(ping(line, timezone), after) == datetime(*expected, tzinfo=UTC)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "timezone"), [("* * * *", "UTC"), ("61 * * * *", "UTC"), ("@every 5s", "UTC"), ("* * * * *", "Mars/Base")]
)
def test_schedules_that_are_none(line: str, timezone: str) -> None:
    with pytest.raises(SetupError, match="PingSource tick"):
        schedule.next_time(ping(line, timezone), datetime(2026, 3, 1, tzinfo=UTC))


def test_a_tick_is_pingsources_own_event() -> None:
    source = triggers.PingSource(
        "reconcile", "gpu", "* * * * *", "UTC", triggers.Destination("reconcile"), "text/plain", "hi"
    )
    event = schedule.make_event(source)
    assert event.attributes["type"] == "dev.knative.sources.ping"
    assert event.attributes["source"] == "/apis/v1/namespaces/gpu/pingsources/reconcile"
    assert event.attributes["datacontenttype"] == "text/plain"
    assert event.data == b"hi"
    assert parse(event.headers(), event.data) == event
    assert schedule.make_event(source).attributes["id"] != event.attributes["id"]


# CloudEvents over HTTP

STRUCTURED = {"content-type": "application/cloudevents+json; charset=utf-8"}


def test_both_modes_carry_the_same() -> None:
    body = (
        b'{"specversion":"1.0","id":"1","type":"t","source":"/s","subject":"a \\u00fc \\"%","n":7,"yes":true,'
        b'"none":null,"data":{"x":[1,"\xc3\xbc"]}}'
    )
    event = parse(STRUCTURED, body)
    assert event.attributes == {
        "specversion": "1.0", "id": "1", "type": "t", "source": "/s", "subject": 'a ü "%', "n": "7", "yes": "true",
        "datacontenttype": "application/json",
    }  # fmt: skip
    assert event.data == '{"x":[1,"ü"]}'.encode()
    headers = event.headers()
    assert headers["ce-subject"] == "a%20%C3%BC%20%22%25"
    assert headers["content-type"] == "application/json"
    assert parse(headers, event.data or b"") == event


@pytest.mark.parametrize(
    ("member", "data"),
    [
        (b'"data":"text","datacontenttype":"text/plain"', b"text"),
        (b'"data":"text"', b'"text"'),
        (b'"data":"text","datacontenttype":"application/x+json"', b'"text"'),
        (b'"data_base64":"AAH/"', b"\x00\x01\xff"),
        (b'"data":null', b"null"),
        (b'"x":"y"', None),
    ],
)
def test_data_of_structured_events(member: bytes, data: bytes | None) -> None:
    assert parse(STRUCTURED, b'{"specversion":"1.0","id":"1","type":"t","source":"/s",%s}' % member).data == data


def test_quoted_headers_are_read() -> None:
    headers = {"ce-specversion": "1.0", "ce-id": '"a\\"b"', "ce-type": "t", "ce-source": "/s"}
    assert parse(headers, b"") == Envelope({"specversion": "1.0", "id": 'a"b', "type": "t", "source": "/s"})


GOOD = {"ce-specversion": "1.0", "ce-id": "1", "ce-type": "t", "ce-source": "/s"}


@pytest.mark.parametrize(
    "changes",
    [
        {"ce-specversion": "0.3"}, {"ce-specversion": ""}, {"ce-id": ""}, {"ce-id": "%20"}, {"ce-source": ""},
        {"ce-type": ""}, {"ce-time": "yesterday"}, {"ce-time": "2026-01-01T00:00:00"}, {"ce-subject": ""},
        {"ce-with_score": "x"}, {"ce-datacontenttype": "text/plain"}, {"content-type": "json"}, {"ce-id": "%ff"},
        {"ce-id": "a%00b"}, {"content-type": "application/cloudevents-batch+json"},
    ],
)  # fmt: skip
def test_binary_events_that_are_none(changes: dict[str, str]) -> None:
    parse(GOOD, b"")
    with pytest.raises(NoCloudEvent):
        parse({**GOOD, **changes}, b"")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"nonsense", b"{", b'{"specversion":"1.0"}', b"\xff",
        b'{"specversion":1.0,"id":"1","type":"t","source":"/s"}',
        b'{"specversion":"1.0","id":1,"type":"t","source":"/s"}',
        b'{"specversion":"1.0","id":"1","type":"t","source":"/s","x":{}}',
        b'{"specversion":"1.0","id":"1","type":"t","source":"/s","x":1.5}',
        b'{"specversion":"1.0","id":"1","type":"t","source":"/s","X":"1"}',
        b'{"specversion":"1.0","id":"1","type":"t","source":"/s","data":NaN}',
        b'{"specversion":"1.0","id":"1","type":"t","source":"/s","data":1,"data_base64":"AA=="}',
        b'{"specversion":"1.0","id":"1","type":"t","source":"/s","data_base64":"???"}',
        b'{"specversion":"1.0","id":"1","type":"t","source":"/s","data_base64":1}',
        b'{"specversion":"1.0","id":"1","type":"t","source":"/s","subject":"\\ud800"}',
        b"[" * 100_000,
    ],
)  # fmt: skip
def test_structured_events_that_are_none(body: bytes) -> None:
    with pytest.raises(NoCloudEvent):
        parse(STRUCTURED, body)
