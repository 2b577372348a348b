"""The schema: numbered plain SQL, forward-only, applied under one lock, with checksums.

A file may begin `-- needs: NNNN`: the oldest code (by the number of its last migration) that still works with the
schema after it. Without the line, code that does not know the migration keeps working: a roll-back is possible.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, LiteralString, cast

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict

from gpubroker.errors import SetupError

_FOLDER: Final = Path(__file__).parent
_FILE: Final = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
_NEEDS: Final = re.compile(r"-- needs: (\d{4})")
_LOCK: Final = 7205759403792793
_WAIT_SECONDS: Final = 10

_TABLE: Final = """
CREATE TABLE IF NOT EXISTS migration (
    number     integer PRIMARY KEY,
    name       text NOT NULL,
    checksum   text NOT NULL,
    needs      integer NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
)"""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file: `number` orders them, `needs` is the oldest code that works after it."""

    number: int
    name: str
    sql: str
    needs: int

    @property
    def checksum(self) -> str:
        """What tells that an applied file was changed afterwards."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


def known() -> list[Migration]:
    """Read all migrations of this version, in order."""
    found: list[Migration] = []
    for path in sorted(_FOLDER.glob("*.sql")):
        named = _FILE.fullmatch(path.name)
        if named is None:
            msg = f"{path.name} is not named NNNN_name.sql"
            raise SetupError(msg)
        sql = path.read_text(encoding="utf-8")
        needs = _NEEDS.match(sql)
        found.append(Migration(int(named[1]), named[2], sql, int(needs[1]) if needs else 0))
    return found


def connect(database_url: str) -> psycopg.Connection[Any]:
    """Connect once, for the operator's commands. Raises SetupError, in one line, when that cannot be."""
    check_url(database_url)
    try:
        return psycopg.connect(database_url, connect_timeout=_WAIT_SECONDS)
    except psycopg.OperationalError as error:
        raise SetupError(f"the database cannot be reached: {_reason(error)}") from None


def check_url(database_url: str) -> None:
    """Raise SetupError for what is no database URL, without showing it: it may hold a password."""
    try:
        conninfo_to_dict(database_url)
    except psycopg.ProgrammingError:
        msg = "DATABASE_URL is no database URL such as postgresql://user:password@host:5432/name"
        raise SetupError(msg) from None


def migrate(database_url: str) -> list[str]:
    """Apply what is missing, each file in a transaction of its own, and name what was applied.

    Raises SetupError, in one line, when the database cannot be reached, was made by a newer version, or differs from it.
    """
    try:
        with connect(database_url) as conn:
            conn.autocommit = True
            conn.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
            conn.execute(_TABLE)
            conn.execute("REVOKE ALL ON migration FROM PUBLIC")
            applied = _applied(conn.execute(_READ).fetchall())
            return [_apply(conn, migration) for migration in _missing(applied)]
    except psycopg.OperationalError as error:
        raise SetupError(f"the database cannot be reached: {_reason(error)}") from None
    except psycopg.errors.InsufficientPrivilege as error:
        raise SetupError(
            f"the database user may not migrate: {_reason(error)}; use one that may create tables and roles"
        ) from None


_READ: Final = "SELECT number, name, checksum, needs FROM migration ORDER BY number"


def _applied(rows: list[tuple[Any, ...]]) -> dict[int, tuple[str, str, int]]:
    return {number: (name, checksum, needs) for number, name, checksum, needs in rows}


def _missing(applied: dict[int, tuple[str, str, int]]) -> list[Migration]:
    mine = {migration.number: migration for migration in known()}
    newer = sorted(set(applied) - set(mine))
    if newer:
        name = applied[newer[-1]][0]
        msg = f"the database was made by a newer version (migration {newer[-1]:04d} {name}); upgrade gpubroker"
        raise SetupError(msg)
    for number, (name, checksum, _) in applied.items():
        if mine[number].checksum != checksum:
            msg = f"migration {number:04d} {name} was changed after it was applied; restore the file or the database"
            raise SetupError(msg)
    return [migration for number, migration in sorted(mine.items()) if number not in applied]


def _apply(conn: psycopg.Connection[Any], migration: Migration) -> str:
    with conn.transaction():
        conn.execute(cast("LiteralString", migration.sql))
        conn.execute(
            "INSERT INTO migration (number, name, checksum, needs) VALUES (%s, %s, %s, %s)",
            (migration.number, migration.name, migration.checksum, migration.needs),
        )
    return f"{migration.number:04d}_{migration.name}"


_STATE: Final = "SELECT max(number), coalesce(max(needs), 0), (SELECT owner FROM installation) FROM migration"


async def check(conn: AsyncConnection[Any], owner: str) -> None:
    """See whether this code may use this database. Raises SetupError when it is older, too new, or another's."""
    try:
        async with conn.transaction():
            await conn.execute(
                "SET LOCAL ROLE gpubroker_public"
            )  # the user itself may have no right but to take a role
            row = await (await conn.execute(_STATE)).fetchone()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidParameterValue):
        row = None
    number, needs, installed = row or (None, 0, None)
    mine = max(int(path.name[:4]) for path in _FOLDER.glob("*.sql"))
    if number is None or number < mine:
        msg = f"the database's schema is older ({number or 0:04d}) than this version ({mine:04d}); run 'gpubroker migrate'"
        raise SetupError(msg)
    if needs > mine:
        msg = f"the database's schema ({number:04d}) needs at least {needs:04d}, this version is {mine:04d}; upgrade gpubroker"
        raise SetupError(msg)
    if installed is None:
        msg = "the database has no installation yet; run 'gpubroker bootstrap'"
        raise SetupError(msg)
    if installed != owner:
        msg = f"GPUBROKER_OWNER is {owner}, the database belongs to {installed}: it may be a copy of another installation's"
        raise SetupError(msg)


def _reason(error: psycopg.Error) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
