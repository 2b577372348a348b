"""The schema: made once, checked always, and whatever is wrong said in one line."""

import asyncio
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from tests.books import Books, after
from tests.conftest import at_database

from gpubroker import accounts, cli, config, store
from gpubroker.errors import SetupError
from gpubroker.local import servers
from gpubroker.local.processes import free_port
from gpubroker.local.servers import Postgres
from gpubroker.store import migrations

FILES = sorted(path.stem for path in Path(migrations.__file__).parent.glob("*.sql"))


@pytest.fixture
def empty_url(postgres_url: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """A database without anything in it."""
    name = f"gb_empty_{abs(hash(request.node.nodeid)) % 10**9}"
    with psycopg.connect(postgres_url, autocommit=True) as conn:
        conn.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        conn.execute(f"CREATE DATABASE {name}")
        yield at_database(postgres_url, name)
        conn.execute(f"DROP DATABASE {name} WITH (FORCE)")


def check(url: str, owner: str = "abcd1234") -> None:
    async def run() -> None:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
            await migrations.check(conn, owner)

    asyncio.run(run())


def refusal(call: object, *arguments: object) -> str:
    """The one line that a wrong set-up is told in."""
    with pytest.raises(SetupError) as refused:
        call(*arguments)  # type: ignore[operator]
    line = str(refused.value)
    assert line
    assert "\n" not in line
    assert refused.value.code == 1
    return line


def shape(url: str) -> list[tuple[object, ...]]:
    """All columns, functions, policies and grants."""
    with psycopg.connect(url) as conn:
        return conn.execute(
            """SELECT 'column', table_name, column_name, data_type, column_default FROM information_schema.columns
                WHERE table_schema = 'public'
               UNION ALL SELECT 'function', p.proname, md5(p.prosrc), '', '' FROM pg_proc p
                          WHERE pronamespace = 'public'::regnamespace AND prolang > 13
               UNION ALL SELECT 'policy', c.relname, p.polname, '', '' FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid
               UNION ALL SELECT 'grant', table_name, grantee, privilege_type, '' FROM information_schema.role_table_grants
                          WHERE grantee LIKE 'gpubroker_%%' AND table_schema = 'public' ORDER BY 1, 2, 3, 4, 5"""
        ).fetchall()


def test_a_fresh_database_gets_every_file_in_order_and_again_nothing(empty_url: str):
    assert migrations.migrate(empty_url) == FILES
    before = shape(empty_url)
    assert migrations.migrate(empty_url) == []
    assert shape(empty_url) == before
    with psycopg.connect(empty_url) as conn:
        rows = conn.execute("SELECT number, name FROM migration ORDER BY number").fetchall()
    assert [f"{number:04d}_{name}" for number, name in rows] == FILES
    assert [number for number, _ in rows] == list(range(1, len(FILES) + 1))


def test_a_second_database_of_the_same_server_finds_the_roles_there(postgres_url: str, template: str, empty_url: str):
    assert migrations.migrate(empty_url) == FILES
    owner = accounts.install(empty_url)
    check(empty_url, owner)


def test_migrations_that_race_apply_each_file_once(empty_url: str):
    with ThreadPoolExecutor(4) as threads:
        applied = list(threads.map(migrations.migrate, [empty_url] * 4))
    assert sorted(name for names in applied for name in names) == FILES


def test_a_file_that_failed_leaves_nothing_and_is_applied_next_time(empty_url: str, monkeypatch: pytest.MonkeyPatch):
    real = migrations.known()
    broken = migrations.Migration(2, real[1].name, real[1].sql + "\nSELECT 1 / 0;", 0)
    monkeypatch.setattr(migrations, "known", lambda: [real[0], broken])
    with pytest.raises(psycopg.errors.DivisionByZero):
        migrations.migrate(empty_url)
    with psycopg.connect(empty_url) as conn:
        assert conn.execute("SELECT number FROM migration").fetchall() == [(1,)]
        assert conn.execute("SELECT to_regclass('offer')").fetchone() == (None,)
    monkeypatch.undo()
    assert migrations.migrate(empty_url) == FILES[1:]


def test_a_file_that_was_changed_after_it_was_applied_is_refused(database_url: str):
    with psycopg.connect(database_url) as conn:
        conn.execute("UPDATE migration SET checksum = 'x' WHERE number = 3")
    assert "0003_pods".replace("_", " ") in refusal(migrations.migrate, database_url)


def test_a_newer_database_is_left_alone_by_migrate_and_served_if_it_says_so(database_url: str):
    owner = accounts.install(database_url)
    with psycopg.connect(database_url) as conn:
        conn.execute("INSERT INTO migration (number, name, checksum, needs) VALUES (9001, 'later', 'x', 0)")
    assert "9001 later" in refusal(migrations.migrate, database_url)
    check(database_url, owner)
    with psycopg.connect(database_url) as conn:
        conn.execute("UPDATE migration SET needs = 9001 WHERE number = 9001")
    line = refusal(check, database_url, owner)
    assert re.search(r"needs at least 9001, this version is \d{4}; upgrade", line)


def test_an_older_database_an_empty_one_and_anothers_are_refused(empty_url: str, database_url: str):
    assert "gpubroker migrate" in refusal(check, empty_url)
    with psycopg.connect(database_url) as conn:
        conn.execute("DELETE FROM migration WHERE number = (SELECT max(number) FROM migration)")
    assert "older" in refusal(check, database_url, accounts.install(database_url))
    migrations.migrate(empty_url)
    assert "gpubroker bootstrap" in refusal(check, empty_url)
    accounts.install(empty_url)
    assert "copy of another" in refusal(check, empty_url, "zzzz9999")


def test_an_installation_has_one_owner_for_ever(database_url: str):
    owner = accounts.install(database_url)
    assert re.fullmatch(r"[a-z0-9]{8}", owner)
    assert {accounts.install(database_url) for _ in range(3)} == {owner}
    with psycopg.connect(database_url) as conn, pytest.raises(psycopg.errors.UniqueViolation):
        conn.execute("INSERT INTO installation (owner) VALUES ('abcd1234')")


def test_ids_that_the_database_makes_are_ids(database_url: str):
    from gpubroker.ids import is_id

    with psycopg.connect(database_url) as conn:
        made = [row[0] for row in conn.execute("SELECT new_id('pod') FROM generate_series(1, 200)").fetchall()]
    assert all(is_id("pod", one) for one in made)
    assert len(set(made)) == 200


# One line for whatever is wrong


WRONG_URLS = {
    "nobody listens": lambda url: f"postgresql://x@127.0.0.1:{free_port()}/x",
    "no such database": lambda url: at_database(url, "nonesuch"),
    "wrong password": lambda url: re.sub(r":[^:@/]+@", ":secret@", url),
    "no url": lambda url: "nonsense",
    "no such scheme": lambda url: "mysql://x:secret@127.0.0.1/x",
    "no such host": lambda url: "postgresql://x@nonesuch.invalid/x",
}


@pytest.mark.parametrize("what", sorted(WRONG_URLS))
def test_a_database_that_cannot_be_reached_is_one_line(postgres_url: str, what: str):
    url = WRONG_URLS[what](postgres_url)
    for call in (migrations.migrate, accounts.install):
        line = refusal(call, url)
        assert "database" in line
        assert "secret" not in line


def test_bootstrap_before_migrate_is_one_line(empty_url: str):
    assert "gpubroker migrate" in refusal(accounts.install, empty_url)


def test_a_user_who_may_not_migrate_is_told_so(empty_url: str):
    with psycopg.connect(empty_url, autocommit=True) as conn:
        conn.execute("DROP ROLE IF EXISTS gb_weak")
        conn.execute("CREATE ROLE gb_weak LOGIN PASSWORD 'weak'")
    try:
        line = refusal(migrations.migrate, re.sub(r"//[^@]+@", "//gb_weak:weak@", empty_url))
        assert "may not migrate" in line
    finally:
        with psycopg.connect(empty_url, autocommit=True) as conn:
            conn.execute("DROP ROLE gb_weak")


def test_the_commands_say_it_on_stderr_with_an_exit_code(
    empty_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    def run(*arguments: str, **variables: str) -> tuple[int, str, str]:
        config.use(config.read(variables))
        monkeypatch.setattr("sys.argv", ["gpubroker", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    before = config._settings
    try:
        assert run("migrate") == (
            1,
            "",
            "gpubroker: missing settings: DATABASE_URL (docs/settings.md says what they are)\n",
        )
        code, out, err = run("bootstrap", "--data", str(tmp_path))
        assert (code, out) == (1, "")
        assert "nothing runs in" in err
        code, out, err = run("bootstrap", DATABASE_URL=empty_url)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert run("migrate", DATABASE_URL=empty_url)[:2] == (0, "".join(f"applied {name}\n" for name in FILES))
        assert run("migrate", DATABASE_URL=empty_url)[:2] == (0, "the schema is up to date\n")
        code, out, err = run("bootstrap", "--json", DATABASE_URL=empty_url)
        assert (code, err) == (0, "")
        assert '"created": true' in out
        code, out, err = run("bootstrap", "--budget-usd", "1.0000001", DATABASE_URL=empty_url)
        assert (code, out) == (2, "")
    finally:
        config._settings = before


# The oldest PostgreSQL that is promised


OLDEST = Path("/usr/lib/postgresql/15/bin")


@pytest.mark.skipif(not (OLDEST / "postgres").exists(), reason="PostgreSQL 15 is not installed here")
def test_the_schema_and_its_money_work_on_postgresql_15(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(servers, "_installed_postgres", lambda: iter([OLDEST]))
    with Postgres(tmp_path / "fifteen", durable=False) as server:
        with psycopg.connect(server.url, autocommit=True) as conn:
            assert conn.info.server_version // 10000 == 15
            conn.execute("CREATE DATABASE fifteen")
        url = at_database(server.url, "fifteen")
        assert migrations.migrate(url) == FILES
        check(url, accounts.install(url))
        assert accounts.bootstrap(url, "default", 10**9, "total", "free", new_key=False).created
        books = Books(url)
        books.freeze()
        books.tree(10**9, 10**9, period="day")
        pod_id, instance_id = books.running(3 * 86400, minimum=300_000)
        books.bill(instance_id, after(100_000))
        books.gone(instance_id, after(200_000))
        books.settle(pod_id)
        assert sum(books.posted(pod_id).values()) == 2_390_000 * 300_000 // 3600
        books.query("SELECT set_budget(%s, 5, 'month')", books.agents[1])
        books.query("SELECT close_months()")
        books.check()
        books.conn.close()


def test_a_schema_that_does_not_fit_is_503_for_callers_and_named_in_the_log(
    database_url: str, caplog: pytest.LogCaptureFixture
):
    with psycopg.connect(database_url) as conn:
        conn.execute("DELETE FROM migration WHERE number > 2")
    before = config._settings
    config.use(
        config.read({"DATABASE_URL": database_url, "GPUBROKER_OWNER": "abcd1234", "GPUBROKER_SECRET_KEY": "x" * 32})
    )

    async def ask() -> None:
        await store.close()
        with pytest.raises(SetupError, match="older"):
            await store.pool()

    try:
        asyncio.run(ask())
    finally:
        config._settings = before
