"""What tests are made of: a world with agents, clients and a provider, and the ticks that move it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
import psycopg
from psycopg.rows import dict_row
from tests.simulator import Final, Simulated

from gpubroker import accounts, adapters, bundle, catalog, metering, reconciling, serving, store, sweep
from gpubroker.provisioning import Driver
from gpubroker.store import instances

SECRET_KEY = "a secret key of the tests, 32 or more"
_APPS: dict[str, Any] = {}


@dataclass
class Client:
    """An agent's side: calls over HTTP to the functions' own applications."""

    key: str
    agent_id: str

    async def call(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """One request, routed by path as one host in front of all functions would."""
        headers = {"Authorization": f"Bearer {self.key}"} | arguments.pop("headers", {})
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app_of(path)), base_url="http://broker", timeout=70
        ) as http:
            return await http.request(method, path, headers=headers, **arguments)

    async def get(self, path: str, status: int = 200, **arguments: Any) -> Any:
        return self._check(await self.call("GET", path, **arguments), status)

    async def post(self, path: str, body: Mapping[str, Any] | None = None, status: int = 201, **arguments: Any) -> Any:
        return self._check(await self.call("POST", path, json=body, **arguments), status)

    async def put(self, path: str, body: Mapping[str, Any], status: int = 200) -> Any:
        return self._check(await self.call("PUT", path, json=body), status)

    async def delete(self, path: str, status: int = 202, **arguments: Any) -> Any:
        return self._check(await self.call("DELETE", path, **arguments), status)

    @staticmethod
    def _check(answer: httpx.Response, status: int) -> Any:
        assert answer.status_code == status, (
            f"{answer.request.method} {answer.request.url}: {answer.status_code} {answer.text}"
        )
        return (
            answer.json() if answer.headers.get("content-type", "").partition(";")[0].endswith("json") else answer.text
        )

    async def child(self, **request: Any) -> "Client":
        """Make a child agent."""
        made = await self.post("/v1/agents", {"name": "child"} | request)
        return Client(made["key"]["key"], made["id"])

    async def pod(self, status: int = 202, query: str = "", **request: Any) -> Any:
        """Ask for a pod; by default for one H100 for ten minutes."""
        body = {"image": "busybox", "requirements": {"gpu": ["h100"]}, "max_lifetime_seconds": 600} | request
        return await self.post(
            f"/v1/pods?duplicate=allow{query}", {k: v for k, v in body.items() if v is not None}, status
        )


def app_of(path: str) -> Any:
    """The application of the function that serves a path."""
    found = [f for f in bundle.FUNCTIONS for prefix in f.paths if re.match(rf"{prefix}($|[/?])", path)]
    return app_named(found[0].name if found else "auth")


def app_named(name: str) -> Any:
    """A function's application, loaded once for all tests."""
    if name not in _APPS:
        _APPS[name] = serving.load(name)
    return _APPS[name]


class World:
    """The broker in one process, with a provider that obeys the test."""

    def __init__(self, database_url: str, owner: str) -> None:
        self.database_url = database_url
        self.owner = owner
        self.provider: Simulated = Simulated()
        self.adapters = adapters.mine()  # those of the functions too: logs and exec reach the same provider
        self.root = Client("", "")
        self.frozen: float | None = None
        self._conn: psycopg.Connection[dict[str, Any]] | None = None

    async def open(self) -> None:
        made = accounts.bootstrap(self.database_url, "default", 100_000_000, "total", "enterprise", new_key=False)
        self.root = Client(made.key.key or "", made.agent_id)
        await self.use(self.provider)

    async def use(self, provider: Simulated) -> Simulated:
        """Rent from this provider from now on."""
        self.provider = provider
        provider.shift, provider.frozen = await self.shift(), self.frozen
        self.adapters._made = {provider.name: provider}
        await catalog.refresh_offers(provider, 60)
        return provider

    async def use_final(self) -> Simulated:
        """Rent from a provider whose terminal answers prove the end."""
        return await self.use(Final())

    async def close(self) -> None:
        if self._conn is not None:
            self._conn.close()
        await adapters.close()

    def connect(self) -> psycopg.Connection[dict[str, Any]]:
        """The database, as its owner: sees and may do everything."""
        return psycopg.connect(self.database_url, autocommit=True, row_factory=dict_row)

    def query(self, sql: str, *parameters: object) -> list[dict[str, Any]]:
        if self._conn is None:
            self._conn = self.connect()
        done = self._conn.execute(sql, parameters)
        return done.fetchall() if done.description else []

    async def shift(self) -> timedelta:
        return self.query("SELECT shift FROM clock")[0]["shift"]

    async def freeze(self) -> None:
        """Let no time pass but what a test passes: sums to the micro-USD then do not depend on how busy the machine is."""
        (row,) = self.query("UPDATE clock SET frozen = clock_timestamp() RETURNING frozen")
        self.frozen = row["frozen"].timestamp()
        self.provider.frozen = self.frozen

    async def pass_time(self, **span: float) -> None:
        """Move the clock of billing, and the provider's."""
        moved = timedelta(**span)
        self.query("UPDATE clock SET shift = shift + %s", moved)
        self.provider.shift += moved

    # What moves the world

    async def drive(self, pod_id: str) -> bool:
        """One step of one pod."""
        return await Driver(self.adapters).drive(pod_id)

    async def drive_due(self) -> None:
        """The steps that are due, until none is."""
        for _ in range(20):
            async with store.worker() as tx:
                due = await instances.list_due(tx.conn, 0, 100)
            if not due:
                return
            for pod_id in due:
                await Driver(self.adapters).drive(pod_id)

    async def sweep(self) -> None:
        await sweep.sweep(self.adapters, self.provider.name)

    async def tick(self) -> None:
        """What `reconcile` does, with this world's provider alone."""
        await reconciling.expire()
        await self.drive_due()
        await self.sweep()
        await self.drive_due()
        await metering.bill_all(1)

    async def run(self, client: Client, **request: Any) -> Any:
        """A pod that runs."""
        pod = await client.pod(**request)
        await self.drive_due()
        return await client.get(f"/v1/pods/{pod['id']}")

    async def end(self, pod_id: str, ticks: int = 12) -> None:
        """Tick until the pod is terminated, with all the time that evidence takes."""
        for _ in range(ticks):
            await self.tick()
            if self.query("SELECT state FROM pod WHERE id = %s", pod_id)[0]["state"] == "terminated":
                return
            await self.pass_time(seconds=70)
        raise AssertionError(f"{pod_id} was not terminated: {self.query('SELECT * FROM pod WHERE id = %s', pod_id)}")

    def check_money(self) -> None:
        """What must be true of the money at every moment."""
        over = self.query(
            """SELECT agent_id, committed_micro, limit_micro FROM budget
               WHERE limit_micro IS NOT NULL AND committed_micro > limit_micro"""
        )
        assert not over, f"over the limit: {over}"
        wrong = self.query(
            """SELECT b.agent_id, b.committed_micro, s.sum FROM budget b JOIN LATERAL (
                 SELECT coalesce(sum(CASE WHEN h.closed_at IS NULL THEN h.amount_micro ELSE h.drawn_micro END), 0) AS sum
                   FROM hold_budget hb JOIN hold h ON h.id = hb.hold_id
                  WHERE hb.agent_id = b.agent_id AND hb.period_start = b.period_start) s ON true
               WHERE b.committed_micro <> s.sum"""
        )
        assert not wrong, f"committed is not what holds say: {wrong}"
        unequal = self.query(
            """SELECT h.id, h.drawn_micro, coalesce(sum(l.amount_micro), 0) AS posted
               FROM hold h LEFT JOIN ledger l ON l.hold_id = h.id
               GROUP BY h.id HAVING h.drawn_micro <> coalesce(sum(l.amount_micro), 0)"""
        )
        assert not unequal, f"drawn is not what the ledger says: {unequal}"
