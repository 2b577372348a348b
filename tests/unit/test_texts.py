"""Money, times, ids, keys, references, cursors, models and settings: what is read is what was written."""

import base64
import json
import re
import string
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.books import bounded

from gpubroker import config, errors, gpus, ids, keys, money, paging, sealing
from gpubroker.attempts import make_ref
from gpubroker.errors import SetupError
from gpubroker.times import format_time, parse_time

MICRO = st.integers(0, money.LARGEST - 1)


# Money


@given(MICRO)
@bounded(300)
def test_an_amount_that_is_written_is_read_again_as_text_and_as_number(micro: int):
    text = money.format_usd(micro)
    assert re.fullmatch(r"[0-9]+\.[0-9]{6}", text)
    assert money.parse_usd(text) == money.parse_usd(Decimal(text)) == micro
    assert money.parse_usd(text.rstrip("0").rstrip(".") or "0") == micro
    assert money.format_usd(-micro) == (f"-{text}" if micro else text)


@given(MICRO, st.integers(1, 9), st.integers(1, 40))
@bounded(300)
def test_nothing_below_a_micro_dollar_is_ever_taken_however_far_down(micro: int, digit: int, zeros: int):
    text = money.format_usd(micro) + "0" * (zeros - 1) + str(digit)
    for value in (text, Decimal(text)):
        with pytest.raises(ValueError, match="six decimals"):
            money.parse_usd(value)


@pytest.mark.parametrize(
    "value",
    ["", " ", "1 ", " 1", "+1", "-1", "1e3", "1,5", "1_000", ".5", "5.", "\u0661", "NaN", "inf", "0x1", "1" * 10,
    10**9, -1, True, None, 2.5, [], b"1",
     Decimal(-1), Decimal("1e9"), Decimal("NaN"), Decimal("Infinity"), Decimal("1e-7"), "9" * 5000],
)  # fmt: skip
def test_what_is_no_amount_is_a_value_error(value: object):
    with pytest.raises(ValueError):
        money.parse_usd(value)


@given(st.integers(0, 10**11), st.integers(0, 10**8))
@bounded(300)
def test_a_cost_is_the_least_that_covers_a_price_for_a_time(price: int, seconds: int):
    assert money.cost(price, seconds) * 3600 >= price * seconds
    assert (money.cost(price, seconds) - 1) * 3600 < price * seconds or money.cost(price, seconds) == 0


# Times


MOMENTS = st.datetimes(
    datetime(2, 1, 1), datetime(9998, 12, 31),  # noqa: DTZ001 - the zone comes with `timezones`
    timezones=st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes))),
)  # fmt: skip


@given(MOMENTS)
@bounded(300)
def test_a_time_that_is_written_is_read_again(moment: datetime):
    text = format_time(moment)
    assert text.endswith("Z")
    assert parse_time(text) == moment
    assert parse_time(text.lower()) == moment
    assert parse_time(moment.isoformat()) == moment


@pytest.mark.parametrize(
    "text",
    ["", "now", "2026-11-22", "2026-11-22T18:58:03", "2026-11-22T18:58Z ", "20261122T185803Z", "2026-13-01T00:00:00Z",
    "2026-11-31T00:00:00Z",
     "2026-11-22T24:00:01Z", "2026-11-22T18:58:03+25:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00",
     "1732301883", "x" * 100],
)  # fmt: skip
def test_what_is_no_time_with_an_offset_is_a_value_error(text: str):
    with pytest.raises(ValueError):
        parse_time(text)


# Ids and references


def test_ids_sort_by_the_time_they_were_made_and_never_repeat():
    made = [ids.new_id("pod") for _ in range(5000)]
    assert len(set(made)) == 5000
    assert all(ids.is_id("pod", one) for one in made)
    assert [one[:14] for one in made] == sorted(one[:14] for one in made)


@pytest.mark.parametrize(
    "text",
    ["pod_", "pod_" + "0" * 25, "pod_" + "0" * 27, "pod_8" + "0" * 25, "pod_" + "0" * 25 + "I", "agt_" + "0" * 26, ""],
)
def test_what_has_not_the_shape_of_an_id_is_none(text: str):
    assert not ids.is_id("pod", text)


@given(st.integers(0, 2**70))
@bounded(200)
def test_base36_is_what_python_reads(number: int):
    assert int(ids.base36(number), 36) == number
    assert not (len(ids.base36(number)) > 1 and ids.base36(number).startswith("0"))


@given(
    st.text(string.ascii_lowercase + string.digits, min_size=8, max_size=8),
    st.integers(1_577_836_800, 7_258_118_400),
)
@bounded(200)
def test_a_reference_fits_every_vendor_and_carries_its_hard_stop(owner: str, stop: int):
    attempt_id = ids.new_id("att")
    ref = make_ref(owner, attempt_id, datetime.fromtimestamp(stop + 0.9, UTC))
    assert re.fullmatch(r"[a-z0-9-]{1,50}", ref)
    assert ref.startswith(f"gb-{owner}-")
    assert attempt_id.removeprefix("att_") in ref
    assert int(ref.rpartition("-")[2], 36) == stop


# Keys


@given(st.integers(0, 88), st.sampled_from(string.ascii_lowercase + string.digits + "-_ é\n"))
@bounded(300)
def test_a_key_with_one_other_character_is_none(place: int, character: str):
    _, key = keys.new_key()
    assert keys.is_key(key)
    changed = key[:place] + character + key[place + 1 :]
    assert keys.is_key(changed) == (changed == key)
    assert not keys.is_key(key + character)
    assert not keys.is_key(key[:-1])


def test_keys_do_not_show_themselves():
    key_id, key = keys.new_key()
    assert key_id.removeprefix("key_") in key
    assert keys.hash_key(key) != keys.hash_key(key[:-1])
    assert len(keys.hash_key(key)) == 32
    assert len(key) - keys.SHOWN > 60


# Cursors


@given(
    st.lists(st.one_of(st.integers(-(2**63), 2**63), st.from_regex(r"[a-z0-9_ .:-]{0,40}", fullmatch=True)), max_size=4)
)
@bounded(200)
def test_a_cursor_that_is_written_is_read_again_and_only_as_what_it_is(place: list[object]):
    cursor = paging.write_cursor(*place)
    assert re.fullmatch(r"[A-Za-z0-9_-]*", cursor)
    kinds = [type(value) for value in place]
    assert paging.read_cursor(cursor, *kinds) == tuple(place)
    for wrong in ([*kinds, str], kinds[1:] if kinds else [int], [dict, *kinds[1:]]):
        with pytest.raises(errors.Invalid):
            paging.read_cursor(cursor, *wrong)


@given(st.one_of(st.text(max_size=60), st.binary(max_size=40).map(lambda raw: base64.urlsafe_b64encode(raw).decode())))
@example("W10")
@example(base64.urlsafe_b64encode(b"[" * 700).decode())
@example(base64.urlsafe_b64encode(json.dumps(["a\x00"]).encode()).decode())
@example(base64.urlsafe_b64encode(b'["\\ud800"]').decode())
@example(base64.urlsafe_b64encode(b"[1e999]").decode())
@example(base64.urlsafe_b64encode(b"[true]").decode())
@bounded(300)
def test_any_other_text_is_invalid_or_a_place_that_a_database_takes(text: str):
    try:
        read = paging.read_cursor(text, str)
    except errors.Invalid:
        return
    assert read is not None
    assert read[0].isprintable()


# GPUs


ASKED = {
    "h100": {"H100", "H100 SXM", "H100 PCIe", "H100 NVL"}, "H100_SXM": {"H100 SXM"}, "h100 sxm5": {"H100 SXM"},
    "H100-SXM5-80GB": {"H100 SXM"},
    "nvidia h100 pcie": {"H100 PCIe"}, "A100-80G": {"A100 80GB", "A100 SXM 80GB", "A100 PCIe 80GB"},
    "a100 80gb": {"A100 80GB", "A100 SXM 80GB", "A100 PCIe 80GB"},
    "A100_80GB": {"A100 80GB", "A100 SXM 80GB", "A100 PCIe 80GB"},
    "rtx4090": {"RTX 4090"}, "GeForce RTX 4090": {"RTX 4090"}, "4090": {"RTX 4090"}, "rtx 4090 d": {"RTX 4090 D"},
    "l40s": {"L40S"}, "L40": {"L40"},
    "Tesla T4": {"T4"}, "v100 32gb": {"V100 32GB", "V100 SXM 32GB", "V100 PCIe 32GB"}, "mi300x": {"MI300X"},
    "AMD Instinct MI300X": {"MI300X"},
    "RTX PRO 6000 Blackwell Server Edition": {"RTX PRO 6000"}, "a6000": {"RTX A6000"},
    "rtx 6000 ada": {"RTX 6000 Ada"}, "8x H100 SXM": {"H100 SXM"},
}  # fmt: skip


def test_a_question_means_every_model_that_it_can_mean():
    for text, names in ASKED.items():
        assert set(gpus.ask(text)) == names, text


@pytest.mark.parametrize(
    "text", ["", " ", "h", "gpu", "nvidia", "h1000", "rtx", "a100 ti", "potato", "100", "💥", "x" * 80]
)
def test_a_question_that_means_none_means_none(text: str):
    assert gpus.ask(text) == []
    assert gpus.recognise(text) is None


def test_every_model_means_itself_in_any_spelling():
    for name, model in gpus.models().items():
        for text in (name, name.lower(), name.replace(" ", "_"), name.replace(" ", "-"), f"NVIDIA {name}"):
            assert name in gpus.ask(text), text
        recognised = gpus.recognise(name, model.vram_gb)
        assert recognised is not None
        assert (recognised.chip, recognised.form, recognised.vram_gb) == (model.chip, model.form, model.vram_gb)


def test_vendors_spellings_become_one_model_with_its_nominal_memory():
    for text, vram, name in (
        ("NVIDIA H100 80GB HBM3", None, "H100 SXM"), ("NVIDIA H100 PCIe", 80, "H100 PCIe"),
        ("H100_sxm5x8", None, "H100 SXM"),
        ("NVIDIA A100-SXM4-40GB", None, "A100 SXM 40GB"), ("A100", 40, "A100 40GB"), ("A100", 79, "A100 80GB"),
        ("GH200_480GB", 96, "GH200 96GB"),
        ("Tesla V100-SXM2-16GB", None, "V100 SXM 16GB"), ("NVIDIA H100 NVL", 94, "H100 NVL"), ("Gaudi 3", None, "Gaudi 3"),
    ):  # fmt: skip
        found = gpus.recognise(text, vram)
        assert found is not None, text
        assert found.name == name
    assert gpus.models()["H100 SXM"].vram_gb == 80
    assert gpus.models()["H100 NVL"].vram_gb == 94


@given(st.text(max_size=40))
@bounded(300)
def test_no_text_breaks_the_reading_of_models(text: str):
    assert all(name in gpus.models() for name in gpus.ask(text))
    near = gpus.nearest(text)
    assert near is None or gpus.ask(near)


# Settings


def test_all_that_is_missing_is_named_at_once():
    with pytest.raises(SetupError) as missing:
        config.read({"GPUBROKER_OWNER": "abcd1234"}).need("DATABASE_URL", "GPUBROKER_OWNER", "GPUBROKER_SECRET_KEY")
    assert "DATABASE_URL, GPUBROKER_SECRET_KEY" in str(missing.value)
    assert "GPUBROKER_OWNER" not in str(missing.value)


def test_all_that_is_wrong_is_named_at_once():
    wrong = {
        "PORT": "eighty", "GPUBROKER_OWNER": "ABC", "GPUBROKER_SECRET_KEY": "short", "GPUBROKER_TICK_SECONDS": "0",
        "GPUBROKER_STRAY_GRACE_SECONDS": "-1", "GPUBROKER_POOL_SIZE": "1.5",
    }  # fmt: skip
    with pytest.raises(SetupError) as refused:
        config.read(wrong)
    assert all(name in str(refused.value) for name in wrong)
    assert "short" not in str(refused.value)


def test_empty_counts_as_absent_and_a_secret_may_be_a_file(tmp_path: Path):
    path = tmp_path / "secret"
    path.write_text("x" * 40 + "\n")
    settings = config.read(
        {"DATABASE_URL": "", "GPUBROKER_SECRET_KEY": "", "GPUBROKER_SECRET_KEY_FILE": str(path), "PORT": ""}
    )
    assert (settings.database_url, settings.secret_key, settings.port, settings.providers) == (
        None,
        "x" * 40,
        8080,
        None,
    )
    assert config.read({"GPUBROKER_PROVIDERS": " local , vast,"}).providers == ("local", "vast")
    for broken in (tmp_path / "none", tmp_path):
        with pytest.raises(SetupError, match="GPUBROKER_SECRET_KEY_FILE"):
            config.read({"GPUBROKER_SECRET_KEY_FILE": str(broken)})
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SetupError, match="not text"):
        config.read({"GPUBROKER_SECRET_KEY_FILE": str(path)})


def test_settings_show_no_secret():
    secrets = {
        "DATABASE_URL": "postgresql://u:hidden1@h/d",
        "GPUBROKER_SECRET_KEY": "hidden2" * 8,
        "REDIS_URL": "redis://:hidden3@h",
        "VAST_API_KEY": "hidden4",
    }
    assert "hidden" not in repr(config.read(secrets))
    assert "hidden" not in str(config.read(secrets))


def test_settings_are_bounded():
    for name, least, most in (("PORT", 0, 65535), ("GPUBROKER_TICK_SECONDS", 1, 3600), ("GPUBROKER_POOL_SIZE", 1, 64)):
        for number in (least, most):
            config.read({name: str(number)})
        for text in (str(least - 1), str(most + 1), "1e1", "٣", " 5"):
            with pytest.raises(SetupError, match=name):
                config.read({name: text})


# Sealing


@given(st.binary(max_size=200), st.text(max_size=20))
@bounded(60)
def test_what_is_sealed_opens_for_its_own_thing_alone(plain: bytes, bound_to: str):
    before = config._settings
    config.use(config.read({"GPUBROKER_SECRET_KEY": "a" * 40}))
    try:
        sealed = sealing.seal("pod", bound_to, plain)
        assert sealing.unseal("pod", bound_to, sealed) == plain
        assert sealing.seal("pod", bound_to, plain) != sealed
        for label, thing, text in (
            ("pod", bound_to + "x", sealed), ("other", bound_to, sealed),
            ("pod", bound_to, sealed[:-1] + bytes([sealed[-1] ^ 1])),
        ):  # fmt: skip
            with pytest.raises(sealing.SealBroken):
                sealing.unseal(label, thing, text)
        config.use(config.read({"GPUBROKER_SECRET_KEY": "b" * 40}))
        with pytest.raises(sealing.SealBroken):
            sealing.unseal("pod", bound_to, sealed)
    finally:
        config._settings = before


def test_a_sealed_text_that_was_cut_is_broken_and_no_crash():
    before = config._settings
    config.use(config.read({"GPUBROKER_SECRET_KEY": "a" * 40}))
    try:
        for cut in (b"", b"x", b"x" * 11, b"x" * 12, b"x" * 27):
            with pytest.raises(sealing.SealBroken):
                sealing.unseal("pod", "p", cut)
    finally:
        config._settings = before


def test_macs_count_the_boundaries_of_their_parts():
    before = config._settings
    config.use(config.read({"GPUBROKER_SECRET_KEY": "a" * 40}))
    try:
        assert sealing.mac("l", b"ab", b"c") != sealing.mac("l", b"a", b"bc")
        assert sealing.mac("l", b"x") != sealing.mac("m", b"x")
        assert sealing.mac("l", b"x") == sealing.mac("l", b"x")
    finally:
        config._settings = before
