"""Authentication alone, of many requests in one round trip.

A request that arrives while a lot is at the database waits for the next one, so each is authenticated by a statement that
began after it arrived, and a revocation is obeyed at once. The more requests, the larger the lots: a round trip costs a
process as much as all else of an answer that is read from memory.
"""

import asyncio
from typing import Final, NamedTuple

from psycopg import AsyncClientCursor

from gpubroker import errors
from gpubroker.store import Caller, Credential, connection, told_refusal

_LOT: Final = 64
_ENTER: Final = """
SET LOCAL ROLE gpubroker_public;
SELECT refusal, key_id, org_id, agent_id, path, scopes, plan, jti, actors
  FROM authenticate_all(%s::bytea[], %s::text[], %s::text[]);
SELECT offers_version()"""


class Entered(NamedTuple):
    """Who calls, and the version of the offers at that moment."""

    caller: Caller
    version: str


class _Arrival(NamedTuple):
    credential: Credential
    scope: str | None
    entered: asyncio.Future[Entered]


class _Entrance:
    """Where the requests of this process wait."""

    def __init__(self) -> None:
        self._waiting: list[_Arrival] = []
        self._working: asyncio.Task[None] | None = None

    async def enter(self, credential: Credential, scope: str | None) -> Entered:
        loop = asyncio.get_running_loop()
        arrival = _Arrival(credential, scope, loop.create_future())
        self._waiting.append(arrival)
        if self._working is None:
            self._working = loop.create_task(self._work())
        return await arrival.entered

    async def _work(self) -> None:
        try:
            while self._waiting:
                lot, self._waiting = self._waiting[:_LOT], self._waiting[_LOT:]
                try:
                    told = await _authenticate(lot)
                except Exception as error:  # noqa: BLE001 - it belongs to those who wait
                    told = [error] * len(lot)
                for arrival, outcome in zip(lot, told, strict=True):
                    _tell(arrival.entered, outcome)
        finally:
            self._working = None


def _tell(entered: asyncio.Future[Entered], outcome: Entered | Exception) -> None:
    if entered.done():  # its request was cancelled
        return
    if isinstance(outcome, Exception):
        entered.set_exception(outcome)
    else:
        entered.set_result(outcome)


async def _authenticate(lot: list[_Arrival]) -> list[Entered | Exception]:
    """One message, which is a transaction of its own. Who comes several times is asked for once."""
    asked = list(dict.fromkeys((arrival.credential, arrival.scope) for arrival in lot))
    hashes, tokens = [each.key_hash for each, _ in asked], [each.jti for each, _ in asked]
    async with connection() as conn, AsyncClientCursor(conn) as cursor:
        await cursor.execute(_ENTER, (hashes, tokens, [scope for _, scope in asked]))
        cursor.nextset()
        rows = await cursor.fetchall()
        cursor.nextset()
        (version,) = await cursor.fetchone() or ("",)
    told = dict(zip(asked, rows, strict=True))
    outcomes: list[Entered | Exception] = []
    for credential, scope, _ in lot:
        refused, *row = told[credential, scope]
        refusal = refused and (told_refusal(refused, scope) or errors.Internal())
        outcomes.append(refusal or Entered(Caller(*row), str(version)))
    return outcomes


_entrance: Final = _Entrance()


async def enter(credential: Credential, scope: str | None) -> Entered:
    """Authenticate, without a transaction to go on with. Raises Unauthenticated, Forbidden or Unavailable."""
    return await _entrance.enter(credential, scope)
