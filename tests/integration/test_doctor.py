"""`gpubroker doctor`: well when all is well, and each thing that is not is named, with what to do."""

from dataclasses import replace
from datetime import timedelta

import pytest
from tests.factories import World

from gpubroker import config, doctor

pytestmark = pytest.mark.anyio
SWITCH = "dead man's switch"
OF_THE_DATABASE = {
    "settings",
    "database",
    "schema",
    "owner",
    "clock",
    "due pods",
    "events",
    "ticks",
    "providers",
    "months",
    SWITCH,
}


async def examined(**changes: object) -> dict[str, doctor.Finding]:
    before = config.settings()
    config.use(replace(before, **changes))  # type: ignore[arg-type]
    try:
        return {finding.check: finding for finding in await doctor.examine()}
    finally:
        config.use(before)


async def test_all_is_well(world: World) -> None:
    world.query("INSERT INTO tick (name, bucket) VALUES ('reconcile', clock_timestamp())")
    found = await examined(public_url="http://127.0.0.1:9")
    assert {name for name, finding in found.items() if finding.status == "ok"} == OF_THE_DATABASE
    assert (found["redis"].status, found["broker"].status, found["functions"].status) == ("warning", "warning", "bad")
    assert all((finding.what_to_do is None) == (finding.status == "ok") for finding in found.values())


@pytest.mark.parametrize(
    ("check", "sql", "said"),
    [
        ("ticks", "DELETE FROM tick", "never"),
        ("ticks", "UPDATE tick SET bucket = bucket - interval '1 hour'", "last at"),
        ("due pods", "UPDATE pod SET due_at = instant() - interval '1 hour'", "1 are due"),
        ("events", "UPDATE event SET published_at = NULL, at = at - interval '1 hour'", "could not be published"),
        (
            "providers",
            "UPDATE provider_account SET distrust_until = clock_timestamp() + interval '1 minute'",
            "vanished",
        ),
        ("providers", "UPDATE provider_account SET unhealthy_since = clock_timestamp(), last_error = 'boom'", "boom"),
        ("owner", "DELETE FROM installation", "no installation"),
        ("schema", "DELETE FROM migration WHERE number = (SELECT max(number) FROM migration)", "older"),
        ("schema", "UPDATE migration SET needs = 9999 WHERE number = 1", "needs code"),
    ],
)
async def test_what_is_not_well_is_named(world: World, check: str, sql: str, said: str) -> None:
    world.query("INSERT INTO tick (name, bucket) VALUES ('reconcile', clock_timestamp())")
    await world.root.pod()
    world.query(sql)
    finding = (await examined())[check]
    assert finding.status != "ok"
    assert said in finding.said
    assert finding.what_to_do


@pytest.mark.parametrize(
    ("sql", "status", "sums", "said"),
    [
        # runpod has no end of its own: the name alone tells the dead man's switch
        (None, "warning", {"deadman": "2.000000"}, "'gpubroker deadman' alone covers 2.000000 USD/h (runpod)"),
        (
            "UPDATE provider_account SET capabilities = capabilities || '{\"ttl\": true}'",
            "ok",
            {"provider": "2.000000"},
            "0.000000 USD/h without one; their providers end 2.000000 USD/h (runpod)",
        ),
        (
            "UPDATE instance SET hard_stop_at = seen_at - interval '1 hour', ref = 'gb-x-y-1'",
            "bad",
            {"none": "2.000000"},
            "no switch covers 2.000000 USD/h (runpod)",
        ),
        ("UPDATE instance SET ref = 'a name'", "bad", {"none": "2.000000"}, "no switch covers 2.000000"),
        ("UPDATE provider_account SET provider = 'unheard-of'", "bad", {"none": "2.000000"}, "(unheard-of)"),
        (
            "DELETE FROM phase; UPDATE instance SET attempt_id = NULL, ref = NULL",
            "bad",
            {"none": "0.000000"},
            "0.000000 USD/h, and 1 of unknown price (runpod)",
        ),
        ("UPDATE instance SET gone_at = instant(), gone_evidence = '{}'", "ok", {}, "0.000000 USD/h without one"),
    ],
)
async def test_what_no_switch_covers_is_told_in_usd_an_hour(
    world: World, sql: str | None, status: str, sums: dict[str, str], said: str
) -> None:
    await world.run(world.root)
    world.query("UPDATE provider_account SET provider = 'runpod'")
    for statement in (sql or "").split("; "):
        if statement:
            world.query(statement)
    finding = (await examined())[SWITCH]
    assert (finding.status, finding.said.count(said)) == (status, 1), finding
    assert finding.figures is not None
    for switch in ("provider", "deadman", "none"):
        told = finding.figures[switch]
        assert isinstance(told, dict)
        assert told["usd_per_hour"] == sums.get(switch, "0.000000")
        assert told["instances"] == (switch in sums)
    assert ("RUNPOD_API_KEY" in (finding.what_to_do or "")) == (status == "warning")


async def test_a_stopped_pod_counts_with_what_it_costs_now(world: World) -> None:
    pod = await world.run(world.root)
    await world.root.post(f"/v1/pods/{pod['id']}/stop", {}, 202)
    await world.drive_due()
    world.query("UPDATE provider_account SET provider = 'runpod'")
    assert "0.100000 USD/h (runpod)" in (await examined())[SWITCH].said


async def test_a_database_that_is_away_or_anothers(world: World) -> None:
    away = await examined(database_url="postgresql://nobody:secret@127.0.0.1:9/none")
    assert away["database"].status == "bad"
    assert "secret" not in str(away)
    assert "schema" not in away
    assert (await examined(owner="another1"))["owner"].status == "bad"


async def test_a_clock_that_is_off(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(doctor.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + timedelta(minutes=5)

    monkeypatch.setattr(doctor, "datetime", Late)
    assert (await examined())["clock"].status == "bad"


async def test_redis_and_the_broker_from_outside(world: World, redis_url: str) -> None:
    found = await examined(redis_url=redis_url, sink_url="http://127.0.0.1:9/")
    assert found["redis"].status == "ok"
    assert found["broker"].status == "bad"
    assert (await examined(redis_url="redis://127.0.0.1:9/0"))["redis"].status == "warning"
