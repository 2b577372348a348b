"""How PostgreSQL goes about a search: the plan by which it would answer the store, of a statement that was prepared as there."""

import re
from typing import Any, Self

from psycopg import AsyncClientCursor

from gpubroker.store import Connection
from gpubroker.store import offers as rows

_BY_INDEX = {"Index Scan", "Index Only Scan"}
_NAMED = re.compile(r"%\((\w+)\)s")


class _Planned(Exception):
    """The plan of a search, instead of its rows."""


class _Explaining:
    """A connection that explains what its cursors are told to execute."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn

    def cursor(self, **_: Any) -> Self:
        return self

    async def execute(self, sql: str, parameters: dict[str, Any]) -> Any:
        names = list(dict.fromkeys(_NAMED.findall(sql)))
        numbered = _NAMED.sub(lambda found: f"${names.index(found[1]) + 1}", sql)
        values = ", ".join(["%s"] * len(names))
        async with AsyncClientCursor(self._conn) as cursor:
            await cursor.execute("PREPARE planned AS " + numbered)  # type: ignore[arg-type]
            await cursor.execute(
                f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE planned ({values})",  # type: ignore[arg-type]
                [parameters[name] for name in names],
            )
            shown = await cursor.fetchone()
            await cursor.execute("DEALLOCATE planned")
        assert shown is not None
        raise _Planned(shown[0][0]["Plan"])


async def offers_read(conn: Connection, question: rows.Question) -> int:
    """How many offers a search reads. Fails when it reads any of them otherwise than along an index."""
    try:
        await rows.search(_Explaining(conn), question)  # type: ignore[arg-type]
    except _Planned as planned:
        scans = [node for node in _nodes(planned.args[0]) if node.get("Relation Name") == "offer"]
    else:
        raise AssertionError("the search executed nothing")
    assert scans
    ways = {scan["Node Type"] for scan in scans}
    assert ways <= _BY_INDEX, ways
    return sum((scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0)) * scan["Actual Loops"] for scan in scans)


def _nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan] + [node for below in plan.get("Plans", []) for node in _nodes(below)]
