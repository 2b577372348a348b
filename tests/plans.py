"""How PostgreSQL goes about a search: the plan of what the store would execute."""

from typing import Any

from gpubroker.store import Connection
from gpubroker.store import offers as rows

_BY_INDEX = {"Index Scan", "Index Only Scan", "Bitmap Heap Scan"}


class _Planned(Exception):
    """The plan of a search, instead of its rows."""


class _Explaining:
    """A connection that explains what it is told to execute."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn

    async def execute(self, sql: Any, parameters: Any) -> Any:
        shown = await (await self._conn.execute("EXPLAIN (ANALYZE, FORMAT JSON) " + sql, parameters)).fetchone()
        assert shown is not None
        raise _Planned(shown[0][0]["Plan"])


async def offers_read(conn: Connection, question: rows.Question) -> int:
    """How many offers a search reads. Fails when it reads any of them otherwise than by index."""
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
