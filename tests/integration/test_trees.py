"""Trees of agents, changed at random by whoever is in them: no credential is ever worth more than its path."""

import functools
import math
from datetime import datetime
from typing import Any

import httpx
import pytest
from anyio import from_thread, to_thread
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.factories import Client, World

from gpubroker.resources import SCOPES
from gpubroker.times import now
from gpubroker.tokens import EXCHANGE

pytestmark = pytest.mark.anyio

SETS = st.lists(st.sampled_from(SCOPES), unique=True, max_size=len(SCOPES)).map(
    lambda chosen: [*chosen, "agents:write"]
)
SECONDS = st.sampled_from([None, 100, 1000, 10_000])
AMOUNTS = st.sampled_from(["1", "5", "20", "49", None])
COUNTS = st.sampled_from([None, 0, 3, 50])
STEPS = st.sampled_from(["agent", "agent", "key", "token", "token", "scopes", "expiry", "limits", "budget", "revoke"])


def call(client: Client, method: str, path: str, **arguments: Any) -> httpx.Response:
    """One request, from the thread in which examples are drawn."""
    return from_thread.run(functools.partial(client.call, method, path, **arguments))


class Tree:
    """Agents under one root, every credential that they were given, and what became of it."""

    def __init__(self, world: World, top: Client) -> None:
        self.world = world
        self.credentials: list[Client] = [top]
        self.agents: list[str] = [top.agent_id]
        self.origins: dict[str, Client] = {}
        """The credential that a token came from."""
        self.rooms: dict[str, float] = {}
        """What a token, and those that it came from, may spend at the most."""

    def query(self, sql: str, *parameters: object) -> list[dict[str, Any]]:
        return self.world.query(sql, *parameters)

    def step(self, kind: str, draw: Any) -> None:
        target = draw(st.sampled_from(self.agents))
        client = draw(st.sampled_from(self.credentials))
        if draw(st.integers(0, 3)):  # else whoever it is: most may do nothing there
            path = [agent["id"] for agent in self._path(target)]
            client = draw(st.sampled_from([c for c in self.credentials if c.agent_id in path]))
        if kind == "token":
            self._exchange(client, draw)
            return
        method, path, body = self._describe(kind, target, draw)
        asked = (self._worth(client), self._rights(target))
        answer = call(client, method, path, json=body)
        assert answer.status_code in (200, 201, 401, 403, 404, 422), answer.text
        if answer.status_code == 201:
            made = answer.json()
            self._check_made(client, made, asked[0])
            agent_id = made["id"] if kind == "agent" else made["agent_id"]
            self.credentials.append(Client(made["key"]["key"], agent_id))
            self.agents += [agent_id] if kind == "agent" else []
        if answer.status_code == 200 and kind == "budget":
            self._check_limit(target)
        if answer.status_code == 200 and target == client.agent_id:
            self._check_lowered(asked[1], self._rights(target))

    def _describe(self, kind: str, target: str, draw: Any) -> tuple[str, str, dict[str, Any] | None]:
        if kind in ("agent", "key"):
            body = {"name": kind, "scopes": draw(SETS), "expires_in": draw(SECONDS)}
            if kind == "key":
                return "POST", "/v1/keys", body | {"agent_id": target}
            amount = draw(AMOUNTS)
            return "POST", "/v1/agents", body | ({"budget": {"limit_usd": amount}} if amount else {})
        if kind == "budget":
            return "PUT", f"/v1/budgets/{target}", {"limit_usd": draw(AMOUNTS) or "100"}
        if kind == "revoke":
            return "DELETE", f"/v1/agents/{target}", None
        changes = {
            "scopes": {"scopes": draw(SETS)}, "expiry": {"expires_in": draw(SECONDS)},
            "limits": {"limits": {"max_pods": draw(COUNTS), "max_usd_per_hour": draw(AMOUNTS)}},
        }  # fmt: skip
        return "PATCH", f"/v1/agents/{target}", changes[kind]

    def _exchange(self, client: Client, draw: Any) -> None:
        actor = draw(st.sampled_from([None, *self.credentials]))
        scopes = draw(st.none() | SETS)
        fields = {"grant_type": EXCHANGE, "subject_token": client.key, "actor_token": actor.key if actor else ""}
        fields |= {"scope": " ".join(scopes)} if scopes else {}
        amount, seconds = draw(AMOUNTS), draw(SECONDS)
        fields |= {"budget_usd": amount or "", "expires_in": str(seconds or "")}
        before = self._worth(client)
        answer = call(client, "POST", "/v1/token", data=fields, headers={"Authorization": ""})
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 200:
            token = Client(answer.json()["access_token"], client.agent_id)
            assert before is not None
            assert set(answer.json()["scope"].split()) <= before
            ends = [agent["expires_at"] for agent in self._path(client.agent_id) if agent["expires_at"] is not None]
            lives = [(end - now()).total_seconds() + 1 for end in ends]
            assert answer.json()["expires_in"] <= min([3600, *lives, *([seconds] if seconds else [])])
            room = self.rooms.get(client.key, math.inf)
            assert amount is None or float(amount) <= room
            self.rooms[token.key] = min(room, float(amount or math.inf))
            self.origins[token.key] = client
            self.credentials.append(token)

    def _path(self, agent_id: str) -> list[dict[str, Any]]:
        return self.query(
            """SELECT a.* , b.limit_micro FROM agent a JOIN budget b ON b.agent_id = a.id
                WHERE a.id = ANY (SELECT unnest(path) FROM agent WHERE id = %s) ORDER BY cardinality(a.path)""",
            agent_id,
        )  # fmt: skip

    def _rights(self, agent_id: str) -> dict[str, Any]:
        return self._path(agent_id)[-1]

    def _worth(self, client: Client) -> set[str] | None:
        """The scopes of a credential, as it is told; None when it is none any more."""
        answer = call(client, "GET", "/v1/whoami")
        return set(answer.json()["scopes"]) if answer.status_code == 200 else None

    def _check_made(self, maker: Client, made: dict[str, Any], worth: set[str] | None) -> None:
        assert worth is not None
        assert set(made["scopes"]) <= worth
        *above, own = self._path(made.get("agent_id", made["id"]))
        for agent in above:
            assert set(made["scopes"]) <= set(agent["scopes"])
            if agent["expires_at"] is not None and made["expires_at"] is not None:
                assert datetime.fromisoformat(made["expires_at"]) <= agent["expires_at"]
        if made["id"] == own["id"]:
            self._check_limit(own["id"])

    def _check_limit(self, agent_id: str) -> None:
        """A limit that was just set is at most the least above it."""
        *above, own = [agent["limit_micro"] for agent in self._path(agent_id)]
        assert own is None or all(limit is None or own <= limit for limit in above)

    def _check_lowered(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Nobody raises anything of itself."""
        assert set(after["scopes"]) <= set(before["scopes"])
        for name in ("expires_at", "max_pods", "max_micro_h", "limit_micro"):
            if before[name] is not None:
                assert after[name] is not None, name
                assert after[name] <= before[name], name

    def check(self) -> None:
        """Each credential: dead with its path, else worth no more than everyone on it, and than what it came from."""
        for client in self.credentials:
            path = self._path(client.agent_id)
            worth = self._worth(client)
            if any(agent["revoked_at"] is not None for agent in path):
                assert worth is None
                continue
            origin = self.origins.get(client.key)
            if worth is None:
                continue  # its actor was revoked, or what it came from
            for agent in path:
                assert worth <= set(agent["scopes"])
            if origin is not None:
                came_from = self._worth(origin)
                assert came_from is not None
                assert worth <= came_from
            whoami = call(client, "GET", "/v1/whoami").json()
            within = [agent["limit_micro"] for agent in path if agent["limit_micro"] is not None]
            assert set(whoami["agent"]["effective_scopes"]) == set.intersection(*(set(a["scopes"]) for a in path))
            available = float(whoami["budgets"][0]["available_usd"])
            assert available * 10**6 <= min(within)
            assert available <= self.rooms.get(client.key, math.inf)


async def test_no_credential_is_ever_worth_more_than_its_path(world: World) -> None:
    @settings(
        max_examples=15, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data(), st.lists(STEPS, min_size=8, max_size=20))
    def play(data: st.DataObject, steps: list[str]) -> None:
        tree = Tree(world, from_thread.run(lambda: world.root.child(budget={"limit_usd": "50"})))
        for kind in steps:
            tree.step(kind, data.draw)
        tree.check()

    await to_thread.run_sync(play)
