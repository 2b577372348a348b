"""PostgreSQL, the only truth. Modules here hold the only SQL, one module per group of tables.

Every transaction begins with a role: `worker()` for consumers and ticks, `public()` for callers, who are authenticated
in the same round trip and see one organisation through row-level security. There is no session state, so a
transaction-pooling proxy works. `Transaction.events` collects the events written, for publishing after COMMIT.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, LiteralString, NamedTuple

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow, class_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from gpubroker import config, errors
from gpubroker.store import migrations

Connection = AsyncConnection[TupleRow]
Pool = AsyncConnectionPool[Connection]

_WAIT_SECONDS: Final = 15.0
_CONNECT_SECONDS: Final = 10
"""A connection whose first packet is lost is begun anew then; psycopg's own limit is 130 s."""
_BEGIN_WORKER: Final = "BEGIN; SET LOCAL ROLE gpubroker_worker; SET LOCAL statement_timeout = '60s'"
_BEGIN_PUBLIC: Final = "BEGIN; SET LOCAL ROLE gpubroker_public; SET LOCAL statement_timeout = '15s'"
BY_INDEX: Final = (
    "; SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL jit = off"
    "; SET LOCAL plan_cache_mode = force_generic_plan"
)
"""For a transaction that searches: along an index in its order, whatever the planner guesses, by one plan a connection."""

_OPEN: Final = (psycopg.pq.TransactionStatus.INTRANS, psycopg.pq.TransactionStatus.INERROR)


@dataclass(frozen=True, slots=True)
class Credential:
    """A credential as it came, checked as far as that goes without the database: an API key or a JWT."""

    key_hash: bytes | None = field(default=None, repr=False)
    jti: str | None = None


class Caller(NamedTuple):
    """Who calls, with the rights of this moment. `path` is root first, the agent itself last."""

    key_id: str | None
    org_id: str
    agent_id: str
    path: list[str]
    scopes: list[str]
    plan: str
    jti: str | None = None
    actors: Sequence[str] = ()


class Event(NamedTuple):
    """An event as it stands in its row; `type` is the CloudEvents type, `data` ids and states only."""

    id: str
    type: str
    subject: str
    tenant: str | None
    agent_id: str | None
    traceparent: str | None
    data: dict[str, object]
    at: datetime


@dataclass(slots=True)
class Transaction:
    """An open transaction: its connection, who calls (None for consumers and ticks), the events it wrote."""

    conn: Connection
    caller: Caller | None = None
    events: list["Event"] = field(default_factory=list["Event"])

    @property
    def known(self) -> Caller:
        """The caller of a public transaction."""
        if self.caller is None:
            msg = "this transaction has no caller"
            raise RuntimeError(msg)
        return self.caller


_pool: Pool | None = None
_opening = asyncio.Lock()
after_commit: Callable[[Sequence[Event]], None] | None = None
"""What is told the events of a committed transaction: gpubroker.outbox sets it."""


async def pool() -> Pool:
    """The connections of this process, opened at the first use.

    Raises SetupError when the schema or the owner does not fit, Unavailable when the database is away.
    """
    global _pool  # noqa: PLW0603 - functions-framework has no lifespan to keep it in
    if _pool is None:
        async with _opening:
            if _pool is None:
                _pool = await _open()
    return _pool


async def _open() -> Pool:
    settings = config.settings()
    settings.need("DATABASE_URL", "GPUBROKER_OWNER")
    migrations.check_url(settings.database_url or "")
    opened: Pool = AsyncConnectionPool(
        settings.database_url or "",
        connection_class=Connection,
        kwargs={"autocommit": True, "application_name": "gpubroker"} | _connect_limit(settings.database_url or ""),
        min_size=1,
        max_size=settings.pool_size,
        timeout=_WAIT_SECONDS,
        max_idle=300,
        open=False,
    )
    try:
        await opened.open(wait=True, timeout=_WAIT_SECONDS)
        async with opened.connection() as conn:
            await migrations.check(conn, settings.owner or "")
    except (psycopg.Error, PoolTimeout) as error:
        await opened.close(timeout=1)
        raise errors.Unavailable(headers={"Retry-After": "5"}) from error
    except BaseException:
        await opened.close(timeout=1)
        raise
    return opened


def _connect_limit(database_url: str) -> dict[str, int]:
    return {} if "connect_timeout" in conninfo_to_dict(database_url) else {"connect_timeout": _CONNECT_SECONDS}


async def close() -> None:
    """Close this process's connections; the next use opens new ones."""
    global _pool
    closing, _pool = _pool, None
    if closing is not None:
        await closing.close(timeout=5)


async def check() -> None:
    """Ask the database something. Raises Unavailable when it does not answer, SetupError when it is not the right one."""
    async with connection() as conn:
        await conn.execute("SELECT 1")


@asynccontextmanager
async def worker(settings: LiteralString = "") -> AsyncGenerator[Transaction]:
    """A transaction that sees all organisations, for consumers and ticks. `settings` such as BY_INDEX hold within it."""
    async with connection() as conn, _transaction(Transaction(conn), _BEGIN_WORKER + settings) as tx:
        yield tx


@asynccontextmanager
async def anonymous() -> AsyncGenerator[Transaction]:
    """A transaction of nobody yet: it sees no organisation's rows before `authenticate`."""
    async with connection() as conn, _transaction(Transaction(conn), _BEGIN_PUBLIC) as tx:
        yield tx


@asynccontextmanager
async def public(
    credential: Credential, scope: str | None, settings: LiteralString = ""
) -> AsyncGenerator[Transaction]:
    """A transaction of the caller whose credential this is, within its organisation. `settings` as for `worker`.

    Raises Unauthenticated, or Forbidden when the caller's rights lack `scope`.
    """
    async with connection() as conn, _transaction(Transaction(conn), _BEGIN_PUBLIC + settings) as tx:
        tx.caller = await authenticate(conn, credential, scope)
        yield tx


@asynccontextmanager
async def connection() -> AsyncGenerator[Connection]:
    """A connection of the pool, for single statements. Raises Unavailable when there is none to be had."""
    try:
        async with (await pool()).connection() as conn:
            yield conn
    except (psycopg.OperationalError, PoolTimeout) as error:
        raise errors.Unavailable(headers={"Retry-After": "2"}) from error


@asynccontextmanager
async def _transaction(tx: Transaction, begin: LiteralString) -> AsyncGenerator[Transaction]:
    await tx.conn.execute(begin)
    try:
        yield tx
    except BaseException:
        if tx.conn.info.transaction_status in _OPEN:  # a cancelled one is still active: the pool drops its connection
            await tx.conn.execute("ROLLBACK")
        raise
    if tx.conn.info.transaction_status in _OPEN:  # else it was committed together with its last statement
        await tx.conn.execute("COMMIT")
    if tx.events and after_commit is not None:
        after_commit(tx.events)


_AUTHENTICATE_KEY: Final = "SELECT key_id, org_id, agent_id, path, scopes, plan FROM authenticate(%s, %s)"
_AUTHENTICATE_JWT: Final = """
SELECT key_id, org_id, agent_id, path, scopes, plan, jti, actors FROM authenticate_token(%s, %s)"""


async def authenticate(conn: Connection, credential: Credential, scope: str | None) -> Caller:
    """Find out who calls, and set its organisation for the row-level policies of this transaction."""
    try:
        cursor = conn.cursor(row_factory=class_row(Caller))
        if credential.jti is None:
            await cursor.execute(_AUTHENTICATE_KEY, (credential.key_hash, scope))
        else:
            await cursor.execute(_AUTHENTICATE_JWT, (credential.jti, scope))
    except psycopg.Error as error:
        raise refusal(error) from None
    caller = await cursor.fetchone()
    if caller is None:
        raise errors.Unauthenticated
    return caller


def refusal(error: psycopg.Error) -> Exception:
    """Turn the refusals that our SQL functions raise into problems; other errors stay as they are."""
    return told_refusal(error.sqlstate, error.diag.message_primary) or error


def told_refusal(sqlstate: str | None, scope: str | None) -> errors.Problem | None:
    """The problem that a refusal of our SQL functions means; None for any other state."""
    if sqlstate == "GB401":
        return errors.Unauthenticated(headers={"WWW-Authenticate": 'Bearer realm="gpubroker", error="invalid_token"'})
    if sqlstate == "GB403":
        return errors.Forbidden(f"This needs the scope {scope or ''}.", more={"scope": scope or ""})
    return None


async def read_instant(conn: Connection) -> datetime:
    """The only clock of billing."""
    row = await (await conn.execute("SELECT instant()")).fetchone()
    if row is None:
        msg = "instant() returned nothing"
        raise LookupError(msg)
    return row[0]
