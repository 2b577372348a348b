"""Strict reading of vendors' answers: money without floats, places in errors, pages that end, references in names."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime

import httpx
import pytest

from gpubroker.errors import ProviderError
from gpubroker.ids import find_ref
from gpubroker.providers.http.answers import Answer, Secrets
from gpubroker.providers.http.reading import Document, cents, cut_log, event_data, parse_json, read_pages, segment, usd

pytestmark = pytest.mark.anyio
REF = "gb-ownerown-01jd3kq8v0e4vsm2x7x5rmd2p9-t3k9zc"


@pytest.mark.parametrize(
    ("value", "micro"),
    [
        ("2.39", 2_390_000), (Decimal("0.1"), 100_000), (3, 3_000_000), ("0.2844444444444", 284_444),
        (Decimal("0.4399999976158142"), 440_000), ("1e-2", 10_000), (0, 0),
    ],
)  # fmt: skip
def test_an_amount_is_exact(value: object, micro: int) -> None:
    assert usd(value) == micro


@pytest.mark.parametrize("value", [True, None, "", "x", "NaN", "Infinity", "-1", -1, [], 2.5, "1" * 50, 10**12, "٣"])
def test_what_is_no_amount_is_an_error(value: object) -> None:
    with pytest.raises(ProviderError):
        usd(value)


def test_json_numbers_never_become_floats() -> None:
    assert Document.of(parse_json(b'{"price": 0.1}')).usd("price") == 100_000
    assert cents(parse_json(b"239")) == 2_390_000
    for bad in (b"NaN", b"[Infinity]", b"\xff", b"{", b"[" * 100_000, b"1" * 5000):
        with pytest.raises(ProviderError):
            parse_json(bad)


def test_an_error_names_the_place() -> None:
    answer = Document.of(parse_json(b'{"pods": [{"id": "a"}, {"id": 7, "at": "2026-01-01T00:00:00"}]}'))
    _, second = answer.children("pods")
    with pytest.raises(ProviderError, match=r"the answer\.pods\[1\]\.id is no text"):
        second.text("id")
    for read in (second.moment, second.flag, second.child, second.children, second.whole, second.texts):
        with pytest.raises(ProviderError, match=r"pods\[1\]\.at"):
            read("at")
    with pytest.raises(ProviderError, match="is missing"):
        second.text("name")


async def test_pages_are_all_or_an_error() -> None:
    pages = {None: ([1, 2], "a"), "a": ([3], "b"), "b": ([4], None)}

    async def read(cursor: str | None) -> tuple[list[int], str | None]:
        return pages[cursor]

    assert await read_pages(read) == [1, 2, 3, 4]
    pages["b"] = ([4], "a")
    with pytest.raises(ProviderError, match="no end"):
        await read_pages(read)


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (("", None, REF), REF), ((f"name={REF},x",), REF), (("x" + REF,), None), ((REF + "-more",), None),
        (("gb-short-x-y", "mine"), None), ((REF.upper(),), None),
    ],
)  # fmt: skip
def test_a_reference_is_found_in_names_and_labels(texts: tuple[str | None, ...], found: str | None) -> None:
    assert find_ref(*texts) == found


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"retry-after": "12"}, 12, 12), ({"retry-after": "0"}, 0, 0), ({"retry-after": "soon"}, 5, 5), ({}, 5, 5),

        ({"ratelimit": '"minute";r=0;t=12, "hour";r=2800;t=1812, "day";r=0;t=45'}, 45, 45),
        ({"retry-after": "99999999999"}, 86400, 86400),
    ],
)  # fmt: skip
def test_how_long_to_wait(headers: dict[str, str], low: float, high: float) -> None:
    assert low <= Answer(429, httpx.Headers(headers), b"").wait_seconds() <= high


def test_a_date_says_how_long_to_wait() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=900), usegmt=True)
    assert 600 <= Answer(503, httpx.Headers({"retry-after": date}), b"").wait_seconds() <= 900


def test_what_is_shown_of_an_answer_is_short_printable_and_without_secrets() -> None:
    said = Answer(
        400, httpx.Headers(), b"bad key hunter2-hunter2\x00\x1b[31m" + b"x" * 5000, Secrets(("hunter2-hunter2",))
    )
    assert said.detail().startswith("bad key ***  [31m")
    assert len(said.detail()) <= 300
    assert "hunter2" not in repr(said.hidden)


def test_an_id_is_one_part_of_a_path() -> None:
    assert segment("pod_1-a.b") == "pod_1-a.b"
    for bad in ("", "..", "a/b", "a?b", "a#b", "é", "a b", "x" * 200):
        with pytest.raises(ProviderError):
            segment(bad)


def test_a_log_is_cut_by_bytes_and_times() -> None:
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    lines = [(noon + timedelta(minutes=n), f"line {n}\n".encode()) for n in range(3)]
    assert cut_log(lines, 0, noon + timedelta(minutes=1), 100).starts_at == 7
    assert cut_log(lines, None, None, 7).data == b"line 2\n"
    assert cut_log(lines, 99, None, 7) == cut_log(lines, 21, None, 7)
    events = 'id: 1\ndata: {"line": "a\u2028data: "}\n\n: alive\n\ndata: nothing\n\ndata:{"line": "b"}\r\nid: 3\ndata: {"line": "c'
    assert [event.text("line") for event in event_data(events.encode())] == ["a\u2028data: ", "b"]
