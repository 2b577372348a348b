"""Row-level security: whoever has another organisation's setting sees, changes and adds nothing, in every table there is."""

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb
from tests.books import NOON, Books, after

from gpubroker import accounts, keys
from gpubroker.ids import new_id

GLOBAL = {
    "installation",
    "migration",
    "signing_key",
    "provider_account",
    "refresh",
    "offer",
    "offer_shape",
    "offer_price",
    "month_closed",
}
"""What callers of all organisations may read: it is nobody's."""
WORKERS_ONLY = {"tick", "listing"}


@pytest.fixture
def books(database_url: str) -> Iterator[Books]:
    made = Books(database_url)
    made.freeze()
    yield made
    made.conn.close()


def tables(books: Books) -> set[str]:
    found = books.query(
        """SELECT c.relname FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm')"""
    )
    return {row["relname"] for row in found} - {"frozen", "clock"}


def fill(books: Books) -> dict[str, dict]:
    """One row in every table that belongs to an organisation. Returns each table's row."""
    books.tree(10**12, None, period="day")
    agent_id, org_id = books.agents[1], books.org_id
    pod_id, instance_id = books.running(minimum=60)
    books.bill(instance_id, after(10))
    key_id, text = keys.new_key()
    books.query(
        "INSERT INTO key (id, org_id, agent_id, name, start, hash, scopes) VALUES (%s, %s, %s, 'k', %s, %s, '{}')",
        key_id, org_id, agent_id, text[:16], keys.hash_key(text),
    )  # fmt: skip
    books.query(
        """INSERT INTO token (jti, org_id, agent_id, actor_id, actors, scopes, expires_at)
           VALUES (%s, %s, %s, %s, %s, '{}', '2100-01-01')""",
        new_id("tok"), org_id, agent_id, agent_id, [agent_id],
    )  # fmt: skip
    books.query("INSERT INTO idempotency VALUES (%s, 'k', %s, 'POST /v1/pods', 'x', %s)", agent_id, org_id, pod_id)
    books.query(
        """INSERT INTO quote (id, org_id, agent_id, offer_id, offer, price_micro_h, seconds, expires_at)
           VALUES (%s, %s, %s, 'ofr', '{}', 1, 1, '2100-01-01')""",
        new_id("qte"), org_id, agent_id,
    )  # fmt: skip
    books.query(
        "INSERT INTO budget_news (agent_id, org_id, what, limit_micro, period_start) VALUES (%s, %s, 'threshold', 1, '2026-01-01')",
        agent_id, org_id,
    )  # fmt: skip
    books.query(
        "INSERT INTO command (agent_id, source, event_id, org_id, body_mac) VALUES (%s, 's', 'e', %s, 'x')",
        agent_id,
        org_id,
    )
    books.query("INSERT INTO pod_label VALUES (%s, %s, 'k', 'v')", org_id, pod_id)
    books.query("INSERT INTO pod_log VALUES (%s, %s, 0, 'x', %s)", pod_id, org_id, NOON)
    event_id = new_id("evt")
    books.query(
        "INSERT INTO event (id, type, subject, tenant, data) VALUES (%s, 't', %s, %s, %s)",
        event_id,
        pod_id,
        org_id,
        Jsonb({}),
    )
    books.query("INSERT INTO delivery (event_id, consumer, tenant) VALUES (%s, 'provisioning', %s)", event_id, org_id)
    rows = {}
    for table in tables(books) - GLOBAL - WORKERS_ONLY:
        column = owner_column(books, table)
        found = books.query(f"SELECT * FROM {table} WHERE {column} = %s", org_id)
        assert found, f"fill() writes nothing into {table}: add a row, so that its policies are tested"
        rows[table] = found[0]
    return rows


def owner_column(books: Books, table: str) -> str:
    columns = {
        row["column_name"]
        for row in books.query("SELECT column_name FROM information_schema.columns WHERE table_name = %s", table)
    }
    named = {"org": "id"}.get(table) or next((name for name in ("org_id", "tenant") if name in columns), None)
    assert named, f"{table} has no organisation: is it in GLOBAL, or does it need a policy?"
    return named


def test_every_table_of_an_organisation_has_row_level_security(books: Books):
    for table in sorted(tables(books) - GLOBAL - WORKERS_ONLY):
        (row,) = books.query("SELECT relrowsecurity FROM pg_class WHERE oid = %s::regclass", table)
        assert row["relrowsecurity"], f"{table} has no row-level security"
        policies = books.query(
            "SELECT polname, polcmd, polroles::regrole[]::text AS roles FROM pg_policy WHERE polrelid = %s::regclass",
            table,
        )
        assert {(p["roles"], p["polcmd"]) for p in policies} == {
            ("{gpubroker_public}", "*"),
            ("{gpubroker_worker}", "*"),
        }, table


def test_tables_without_an_owner_hold_nothing_that_could_have_one(books: Books):
    for table in GLOBAL | WORKERS_ONLY:
        columns = {
            row["column_name"]
            for row in books.query("SELECT column_name FROM information_schema.columns WHERE table_name = %s", table)
        }
        assert columns, f"there is no table {table}"
        assert not columns & {"org_id", "tenant", "agent_id", "pod_id"}, table


def test_another_organisation_sees_changes_and_adds_nothing(books: Books, subtests: pytest.Subtests):
    rows = fill(books)
    theirs = books.org_id
    fill(books)
    others = books.org_id
    for table, row in rows.items():
        with subtests.test(table=table):
            with books.role("gpubroker_public", theirs) as conn:
                assert conn.execute(f"SELECT * FROM {table}").fetchall(), f"{table}: its owner does not see it"
            column = owner_column(books, table)
            for org_id in (others, "", None):
                with books.role("gpubroker_public", org_id) as conn:
                    assert not conn.execute(f"SELECT FROM {table} WHERE {column} = %s", (theirs,)).fetchall()
                    if org_id is None:
                        assert not conn.execute(f"SELECT FROM {table}").fetchall()
            refuse_insert(books, table, row, others)
            for statement in (f"DELETE FROM {table}", updates(books, table)):
                with books.role("gpubroker_public", others) as conn:
                    change(conn, statement, table)
                    conn.execute("RESET ROLE")
                    assert (
                        conn.execute(f"SELECT * FROM {table} WHERE {column} = %s LIMIT 1", (theirs,)).fetchone() == row
                    )


def refuse_insert(books: Books, table: str, row: dict, org_id: str) -> None:
    """The same row with another key, as another organisation's: neither privilege nor policy allows it."""
    generated = {
        r["attname"]
        for r in books.query(
            "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attidentity <> ''", table
        )
    }
    values = {
        name: Jsonb(value) if isinstance(value, dict) else value for name, value in row.items() if name not in generated
    }
    statement = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
        sql.Identifier(table),
        sql.SQL(", ").join(map(sql.Identifier, values)),
        sql.SQL(", ").join(sql.Placeholder() * len(values)),
    )
    with books.role("gpubroker_public", org_id) as conn, pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute(statement, list(values.values()))


def updates(books: Books, table: str) -> str:
    """An UPDATE of a column that callers may change, or of any."""
    allowed = books.query(
        """SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
              AND has_column_privilege('gpubroker_public', attrelid, attnum, 'UPDATE')""",
        table,
    )
    column = allowed[0]["attname"] if allowed else owner_column(books, table)
    return f"UPDATE {table} SET {column} = {column}"


def change(conn: psycopg.Connection, statement: str, table: str) -> None:
    try:
        with conn.transaction():
            done = conn.execute(statement + " WHERE true")
    except psycopg.errors.InsufficientPrivilege:
        return
    assert done.rowcount <= 3, table  # its own, which fill() made


def test_callers_may_write_only_what_their_functions_write(books: Books):
    may = books.query(
        """SELECT c.relname, string_agg(p, ' ' ORDER BY p) AS rights
             FROM pg_class c, unnest(ARRAY['INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'TRIGGER', 'REFERENCES']) p
            WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')
              AND has_table_privilege('gpubroker_public', c.oid, p) GROUP BY 1"""
    )
    rights = {row["relname"]: row["rights"] for row in may}
    assert set(rights.values()) <= {"INSERT"}, f"no table as a whole may be updated or emptied: {rights}"
    never = {
        "ledger",
        "usage_interval",
        "hold",
        "hold_budget",
        "phase",
        "attempt",
        "instance",
        "org",
        "month_closed",
        *GLOBAL,
    } - {"signing_key"}
    assert not set(rights) & never
    columns = books.query(
        """SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
            WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')
              AND has_column_privilege('gpubroker_public', c.oid, a.attnum, 'UPDATE')"""
    )
    changeable = {(row["relname"], row["attname"]) for row in columns}
    assert not {name for name, _ in changeable} & (never | {"budget"})
    assert not {
        pair
        for pair in changeable
        if pair[1] in ("id", "org_id", "agent_id", "hash", "path", "parent_id", "tenant", "committed_micro")
    }


def test_workers_cannot_rewrite_what_was_posted_nor_the_installation(books: Books):
    for table, privileges in {
        "ledger": "UPDATE DELETE TRUNCATE",
        "usage_interval": "UPDATE DELETE TRUNCATE",
        "installation": "INSERT UPDATE DELETE TRUNCATE",
        "migration": "INSERT UPDATE DELETE TRUNCATE",
    }.items():
        for privilege in privileges.split():
            assert not books.value("SELECT has_table_privilege('gpubroker_worker', %s, %s)", table, privilege), (
                table,
                privilege,
            )


def test_neither_role_logs_in_or_passes_row_level_security(books: Books):
    for row in books.query("SELECT * FROM pg_roles WHERE rolname IN ('gpubroker_public', 'gpubroker_worker')"):
        assert not row["rolcanlogin"]
        assert not row["rolsuper"]
        assert not row["rolbypassrls"]
        assert not row["rolcreaterole"]


def test_functions_that_pass_row_level_security_are_granted_one_by_one(books: Books):
    definers = books.query(
        """SELECT proname, proconfig::text AS config, has_function_privilege('public', oid, 'EXECUTE') AS open_to_all
             FROM pg_proc WHERE prosecdef AND pronamespace = 'public'::regnamespace"""
    )
    assert len(definers) >= 6
    for row in definers:
        assert not row["open_to_all"], f"{row['proname']} may be called by every role"
        assert "search_path=pg_catalog, public, pg_temp" in (row["config"] or ""), (
            f"{row['proname']} can be led to another schema"
        )


# Who calls


def root_key(books: Books, org: str = "default", scopes: list[str] | None = None) -> tuple[str, bytes]:
    made = accounts.bootstrap(books.url, org, 10**9, "total", "free", new_key=False)
    if scopes is not None:
        books.query("UPDATE key SET scopes = %s WHERE id = %s", scopes, made.key.id)
    return made.agent_id, keys.hash_key(made.key.key or "")


def sqlstate_of(books: Books, hashed: bytes, scope: str | None) -> str | None:
    with books.role("gpubroker_public") as conn:
        try:
            conn.execute("SELECT * FROM authenticate(%s, %s)", (hashed, scope))
        except psycopg.Error as error:
            return error.sqlstate
    return None


def test_authenticate_refuses_a_key_that_is_unknown_expired_or_revoked_or_whose_path_is(books: Books):
    agent_id, hashed = root_key(books)
    assert sqlstate_of(books, hashed, "pods:read") is None
    assert sqlstate_of(books, keys.hash_key("another"), None) == "GB401"
    for table in ("key", "agent"):
        which = "agent_id" if table == "key" else "id"
        for column, value in (("revoked_at", "clock_timestamp()"), ("expires_at", "clock_timestamp()")):
            books.query(f"UPDATE {table} SET {column} = {value} WHERE {which} = %s", agent_id)
            assert sqlstate_of(books, hashed, None) == "GB401", (table, column)
            books.query(f"UPDATE {table} SET {column} = NULL WHERE {which} = %s", agent_id)
    assert sqlstate_of(books, hashed, "pods:read") is None


def test_authenticate_refuses_a_scope_that_the_key_or_its_path_lacks(books: Books):
    agent_id, hashed = root_key(books, scopes=["pods:read", "pods:write"])
    assert sqlstate_of(books, hashed, "pods:write") is None
    assert sqlstate_of(books, hashed, "offers:read") == "GB403"
    books.query("UPDATE agent SET scopes = '{pods:read}' WHERE id = %s", agent_id)
    assert sqlstate_of(books, hashed, "pods:write") == "GB403"


def test_authenticate_gives_its_organisation_to_this_transaction_alone(books: Books):
    _, hashed = root_key(books)
    with books.connect() as conn:
        with conn.transaction():
            conn.execute("SET LOCAL ROLE gpubroker_public")
            conn.execute("SELECT * FROM authenticate(%s)", (hashed,))
            assert len(conn.execute("SELECT * FROM org").fetchall()) == 1
        with conn.transaction():
            conn.execute("SET LOCAL ROLE gpubroker_public")
            assert conn.execute("SELECT * FROM org").fetchall() == []
