"""Secrets through a whole session: afterwards they are nowhere but in the one answer that shows each."""

import base64
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.factories import SECRET_KEY, Client, World
from tests.simulator import Broken

from gpubroker import accounts
from gpubroker.tokens import EXCHANGE

pytestmark = pytest.mark.anyio

SHOWN_ONCE = ("/v1/agents", "/v1/keys", "/rotate", "/v1/token")
"""The ends of the paths that answer with a new key or token."""


class Witness:
    """Every answer there was, by what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[tuple[str, str]] = []
        original = Client.call

        async def call(client: Client, method: str, path: str, **arguments: Any) -> httpx.Response:
            answer = await original(client, method, path, **arguments)
            self.answers.append((f"{method} {path}", f"{answer.text} {answer.headers}"))
            return answer

        monkeypatch.setattr(Client, "call", call)


def spellings(secret: str) -> Iterator[str]:
    """A secret as it may stand in a text: as it is, in hexadecimal, in base64 at each offset, reversed, in capitals."""
    yield secret
    yield secret.encode().hex()
    for offset in range(3):
        written = base64.b64encode(b"\0" * offset + secret.encode()).decode()
        yield written[4 if offset else 0 : -4].rstrip("=")
    yield json.dumps(secret)[1:-1]


async def live(world: World) -> dict[str, str]:
    """A session with a secret in every place that takes one, things that fail included. Returns the secrets by name."""
    secrets = {"of the installation": SECRET_KEY, "root key": world.root.key}
    agent = await world.root.child(name="agent", budget={"limit_usd": "50"})
    actor = await agent.child(name="actor")
    further = await agent.post("/v1/keys", {"name": "n"}, headers={"Idempotency-Key": "i"})
    await agent.post("/v1/keys", {"name": "n"}, headers={"Idempotency-Key": "i"})
    rotated = await agent.post(f"/v1/keys/{further['id']}/rotate", {"overlap_seconds": 60})
    secrets |= {
        "agent key": agent.key,
        "actor key": actor.key,
        "further key": further["key"]["key"],
        "new key": rotated["key"]["key"],
    }
    fields = {"grant_type": EXCHANGE, "subject_token": agent.key, "actor_token": actor.key, "budget_usd": "5"}
    token = (await agent.call("POST", "/v1/token", data=fields)).json()["access_token"]
    basic = {"Authorization": "Basic " + base64.b64encode(f"{agent.agent_id}:{agent.key}".encode()).decode()}
    second = (await agent.call("POST", "/v1/token", data={"grant_type": "client_credentials"}, headers=basic)).json()[
        "access_token"
    ]
    secrets |= {"token": token, "second token": second}
    holder = Client(token, agent.agent_id)
    for path in ("/v1/introspect", "/v1/revoke"):
        await agent.call("POST", path, data={"token": second})
        await agent.call("POST", path, data={"token": second[:-3]})
    await agent.call("POST", "/v1/token", data={**fields, "scope": "admin"})
    await agent.call("POST", "/v1/token", data={**fields, "grant_type": "password"})

    env, password = "canary-of-the-environment", "canary-of-the-registry"
    secrets |= {"env": env, "password": password}
    body = {
        "image": "busybox", "requirements": {"gpu": ["h100"]}, "max_lifetime_seconds": 600, "name": "n",
        "env": {"TOKEN": env}, "registry_auth": {"username": "u", "password": password},
    }  # fmt: skip
    world.provider.fail["create"] = [Broken("http_500", "an answer that nobody can read")]
    pod = await holder.post("/v1/pods", body, 202, headers={"Idempotency-Key": "k"})
    for again in (body, {**body, "name": "m"}):
        await holder.call("POST", "/v1/pods", json=again, headers={"Idempotency-Key": "k"})
    await holder.call("POST", "/v1/pods?dry_run=true", json={**body, "name": "m"})
    for wrong in (
        {"env": {"TOKEN": [env]}}, {"env": {"GPUBROKER_X": env}}, {"registry_auth": {"password": password}},
        {"registry_auth": {"username": "u", "password": password, "colour": password}}, {"image": None},
        {"requirements": {"gpu": ["h100"], "country": "AQ"}}, {"max_lifetime_seconds": 10**7}, {"env": {"A": env + "\0"}},
    ):  # fmt: skip
        assert (await agent.call("POST", "/v1/pods", json={**body, "name": "w", **wrong})).status_code in (402, 422)
    for content in (f'{{"env": {{"TOKEN": "{env}"', f'{{"env": {{"A": "{env}", "A": "{env}"}}}}', f'"{env}"', f"{env}"):
        await agent.call("POST", "/v1/pods", content=content, headers={"Content-Type": "application/json"})
    await agent.call("POST", "/v1/pods", content=env, headers={"Content-Type": "text/plain"})
    for credential in (agent.key[:-1] + "0", token + "x", "Bearer", second):
        await agent.call("GET", "/v1/whoami", headers={"Authorization": f"Bearer {credential}"})
        await agent.call("GET", "/v1/whoami", headers={"Authorization": "", "X-API-Key": credential})
    for _ in range(3):
        await world.tick()
        await world.pass_time(seconds=40)
    await world.drive_due()
    path = f"/v1/pods/{pod['id']}"
    for read in (path, f"{path}/events", f"/v1/logs/{pod['id']}", "/v1/pods", "/v1/keys", "/v1/agents", "/v1/usage", "/v1/whoami",
                 "/v1/budgets", "/v1/usage/records", "/v1/limits", "/v1/providers"):  # fmt: skip
        await agent.call("GET", read)
        await world.root.call("GET", read)
    world.query(
        "ALTER TABLE hold RENAME COLUMN drawn_micro TO away"
    )  # an error that nobody foresaw, in the middle of all
    assert (await agent.call("POST", "/v1/pods", json={**body, "name": "o"})).status_code == 500
    world.query("ALTER TABLE hold RENAME COLUMN away TO drawn_micro")
    await holder.call("POST", f"{path}/stop")
    await world.drive_due()
    assert world.query("SELECT env_sealed IS NOT NULL AS kept FROM pod WHERE id = %s", pod["id"])[0]["kept"]
    return secrets


async def test_no_secret_is_anywhere_but_in_the_one_answer_that_shows_it(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    witness = Witness(monkeypatch)
    secrets = await live(world)
    made = accounts.bootstrap(world.database_url, "default", 1, "total", "free", new_key=True)
    secrets["bootstrapped key"] = made.key.key or ""
    tables = world.query(
        "SELECT relname AS name FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
    )
    texts = {
        f"table {table['name']}": "\n".join(
            row["t"] for row in world.query(f"SELECT t::text AS t FROM {table['name']} t")
        )
        for table in tables
    }
    assert len(texts["table event"]) > 1000
    texts["the repr of what was made"] = repr(made)
    formatter = logging.Formatter()
    texts["the log"] = "\n".join(formatter.format(record) for record in caplog.records)
    assert "unforeseen error" in texts["the log"]
    texts |= {f"{number} {asked}": text for number, (asked, text) in enumerate(witness.answers)}
    assert len(texts) > 80
    found: dict[str, list[str]] = {name: [] for name in secrets}
    for name, secret in secrets.items():
        needles = [needle for needle in spellings(secret) if len(needle) > 8]
        assert needles
        found[name] = [place for place, text in texts.items() if any(needle in text for needle in needles)]
    for name, places in found.items():
        once = [place for place in places if place.partition("?")[0].endswith(SHOWN_ONCE) and " POST " in place]
        assert places == once, f"{name} is in {places}"
        assert len(once) <= 1, f"{name} is shown in {once}"
    assert sum(map(len, found.values())) >= 6, "the answers that show secrets were seen, or this looks at nothing"
