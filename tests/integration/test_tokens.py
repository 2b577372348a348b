"""Tokens: issued, narrowed, delegated, described, revoked, and signed by keys that rotate."""

import asyncio
import base64
import hashlib
import hmac
import json
from datetime import timedelta
from typing import Any

import httpx
import jwt
import pytest
from tests.factories import Client, World

from gpubroker import accounts, signing, store
from gpubroker.ids import new_id
from gpubroker.resources import SCOPES
from gpubroker.store import tokens as token_rows
from gpubroker.times import now
from gpubroker.tokens import ACCESS_TOKEN, EXCHANGE

pytestmark = pytest.mark.anyio

ISSUER = "http://127.0.0.1:8080"
NOBODY = Client("", "")


async def form(path: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return await NOBODY.call("POST", path, data=fields, headers={"Authorization": ""} | (headers or {}))


async def ask(status: int = 200, **fields: Any) -> dict[str, Any]:
    answer = await form("/v1/token", **fields)
    assert answer.status_code == status, answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    return answer.json()


async def token_of(client: Client, **fields: Any) -> Client:
    """A client that uses a token instead of its key."""
    answer = await ask(grant_type="client_credentials", client_id=client.agent_id, client_secret=client.key, **fields)
    return Client(answer["access_token"], client.agent_id)


async def exchange(subject: Client, actor: Client | None = None, status: int = 200, **fields: Any) -> dict[str, Any]:
    more = {"actor_token": actor.key} if actor else {}
    return await ask(status, grant_type=EXCHANGE, subject_token=subject.key, **more, **fields)


async def acting(subject: Client, actor: Client | None = None, **fields: Any) -> Client:
    """A client with a token by which the actor acts for the subject."""
    return Client((await exchange(subject, actor, **fields))["access_token"], subject.agent_id)


def claims_of(text: str) -> dict[str, Any]:
    return jwt.decode(text, options={"verify_signature": False})


async def is_alive(client: Client) -> bool:
    answer = await client.call("GET", "/v1/whoami")
    assert answer.status_code in (200, 401)
    return answer.status_code == 200


# Issued


async def test_a_client_gets_a_token_by_basic_or_form_and_anyone_can_check_it(world: World):
    agent = await world.root.child(scopes=["pods:read", "offers:read"])
    basic = base64.b64encode(f"{agent.agent_id}:{agent.key}".encode()).decode()
    wanted = {"grant_type": "client_credentials", "scope": "pods:read"}
    answers = [
        await form("/v1/token", {"Authorization": f"Basic {basic}"}, **wanted),
        await form("/v1/token", client_id=agent.agent_id, client_secret=agent.key, **wanted),
    ]
    jwks = (await form_get("/.well-known/jwks.json")).json()
    for answer in answers:
        issued = answer.json()
        assert {**issued, "access_token": ""} == {
            "access_token": "", "token_type": "Bearer", "expires_in": 3600, "scope": "pods:read",
        }  # fmt: skip
        header = jwt.get_unverified_header(issued["access_token"])
        (key,) = [key for key in jwt.PyJWKSet.from_dict(jwks).keys if key.key_id == header["kid"]]
        claims = jwt.decode(issued["access_token"], key, algorithms=["EdDSA"], audience=ISSUER, issuer=ISSUER)
        assert header["typ"] == "at+jwt"
        assert (claims["sub"], claims["scope"], claims["exp"] - claims["iat"]) == (agent.agent_id, "pods:read", 3600)
        assert claims["org"] == world.query("SELECT id FROM org")[0]["id"]
        assert set(claims) == {"iss", "sub", "org", "scope", "aud", "jti", "iat", "exp", "client_id"}
        whoami = await Client(issued["access_token"], "").get("/v1/whoami")
        assert (whoami["scopes"], whoami["delegation"]) == (["pods:read"], [agent.agent_id])
    assert "private" not in str(jwks)
    assert {frozenset(key) for key in jwks["keys"]} == {frozenset({"kty", "crv", "x", "kid", "use", "alg"})}


async def form_get(path: str) -> httpx.Response:
    return await NOBODY.call("GET", path, headers={"Authorization": ""})


async def test_a_token_request_is_checked_in_the_words_of_its_rfcs(world: World, subtests: pytest.Subtests):
    agent, other = await world.root.child(scopes=["pods:read"]), await world.root.child(name="other")
    good = {"grant_type": "client_credentials", "client_id": agent.agent_id, "client_secret": agent.key}
    swap = {"grant_type": EXCHANGE, "subject_token": agent.key}
    for fields, status, error in (
        ({}, 400, "invalid_request"),
        ({"grant_type": "password"}, 400, "unsupported_grant_type"),
        ({"grant_type": "client_credentials"}, 401, "invalid_client"),
        (good | {"client_secret": "gbk_nonsense"}, 401, "invalid_client"),
        (good | {"client_secret": other.key}, 401, "invalid_client"),
        (good | {"client_id": other.agent_id}, 401, "invalid_client"),
        (good | {"scope": "pods:read usage:read"}, 400, "invalid_scope"),
        (good | {"scope": "everything"}, 400, "invalid_scope"),
        (good | {"expires_in": "0"}, 400, "invalid_request"),
        (good | {"expires_in": "1.5"}, 400, "invalid_request"),
        (good | {"expires_in": "\u0663"}, 400, "invalid_request"),
        (good | {"budget_usd": "-1"}, 400, "invalid_request"),
        (good | {"budget_usd": "0.0000001"}, 400, "invalid_request"),
        (good | {"audience": "x" * 201}, 400, "invalid_target"),
        (good | {"scope": ["pods:read", "pods:read"]}, 400, "invalid_request"),
        ({"grant_type": EXCHANGE}, 400, "invalid_request"),
        (swap | {"subject_token": "nonsense"}, 400, "invalid_request"),
        (swap | {"subject_token": "a.b.c"}, 400, "invalid_request"),
        (swap | {"actor_token": "a.b.c"}, 400, "invalid_request"),
        (swap | {"subject_token_type": "urn:x"}, 400, "invalid_request"),
        (swap | {"requested_token_type": "urn:ietf:params:oauth:token-type:saml2"}, 400, "invalid_request"),
        (swap | {"scope": "usage:read"}, 400, "invalid_scope"),
    ):
        with subtests.test(fields=str(fields)[:120]):
            answer = await form("/v1/token", **fields)
            assert (answer.status_code, answer.json()["error"]) == (status, error), answer.text
            assert answer.json()["error_description"]
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["X-Request-Id"]
            assert ("WWW-Authenticate" in answer.headers) == (status == 401)
            assert agent.key not in answer.text
    assert (await world.root.call("POST", "/v1/token", json=good)).json()["error"] == "invalid_request"
    assert world.query("SELECT count(*) FROM token")[0]["count"] == 0


async def test_a_token_lives_an_hour_at_most_and_never_longer_than_its_key_and_agent(world: World):
    agent = await world.root.child()
    assert (
        await ask(grant_type="client_credentials", client_id=agent.agent_id, client_secret=agent.key, expires_in=9**8)
    )["expires_in"] == 3600
    assert (await exchange(agent, expires_in=60))["expires_in"] == 60
    short = await agent.post("/v1/keys", {"name": "n", "expires_in": 100})
    assert (await exchange(Client(short["key"]["key"], "")))["expires_in"] in (98, 99, 100)
    ending = await world.root.child(expires_in=50)
    assert (await exchange(ending))["expires_in"] in (48, 49, 50)
    minute = await acting(agent, expires_in=60)
    assert 55 <= (await exchange(minute))["expires_in"] <= 60


async def test_omitted_scopes_are_all_but_admin(world: World):
    token = await token_of(world.root)
    assert set((await token.get("/v1/whoami"))["scopes"]) == set(SCOPES) - {"admin"}
    assert claims_of((await token_of(world.root, scope="admin")).key)["scope"] == "admin"


async def test_what_is_no_token_of_ours_for_us_is_401(world: World, subtests: pytest.Subtests):
    agent = await world.root.child()
    token = (await token_of(agent)).key
    header, payload, signature = token.split(".")
    claims = claims_of(token)
    async with store.worker() as tx:
        public = (await token_rows.list_signing_keys(tx.conn))[0].public_jwk

    def encode(part: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")

    def sealed(algorithm: str, secret: bytes) -> str:
        signed = f"{encode({'alg': algorithm, 'typ': 'JWT', 'kid': public['kid']})}.{payload}"
        mac = hmac.digest(secret, signed.encode(), hashlib.sha256)
        return f"{signed}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"

    async with store.worker() as tx:
        ours = {
            name: await signing.sign(tx.conn, claims | changes)
            for name, changes in {
                "expired": {"exp": int(now().timestamp()) - 60}, "of another issuer": {"iss": "https://other.example"},
                "for another": {"aud": "https://other.example"}, "unknown here": {"jti": new_id("tok")},
                "without its end": {"exp": None}, "not yet": {"nbf": int(now().timestamp()) + 3600},
            }.items()
        }  # fmt: skip
    odd = ours | {
        "another's claims": f"{header}.{encode(claims | {'scope': 'admin'})}.{signature}",
        "unsigned": f"{encode({'alg': 'none', 'kid': public['kid']})}.{payload}.",
        "signed with the public key": sealed("HS256", public["x"].encode()),
        "of an unknown key": f"{encode({'alg': 'EdDSA', 'kid': 'x'})}.{payload}.{signature}",
        "cut": token[:-4], "no base64": "\xe9.\xe9.\xe9", "empty parts": "..", "long": "a" * 60_000 + ".b.c",
    }  # fmt: skip
    for name, text in odd.items():
        with subtests.test(name):
            answer = await world.root.call(
                "GET", "/v1/whoami", headers={"Authorization": b"Bearer " + text.encode("latin-1")}
            )
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
            assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]
    assert await is_alive(Client(token, ""))


# Delegated


async def test_the_actor_is_oneself_one_below_or_one_that_is_named(world: World):
    agent, stranger = await world.root.child(name="agent"), await world.root.child(name="stranger")
    below = await (await agent.child(name="child")).child(name="grandchild")
    for actor in (agent, below, await token_of(below)):
        assert (await exchange(agent, actor))["issued_token_type"] == ACCESS_TOKEN
    for actor in (stranger, world.root):
        assert (await exchange(agent, actor, 400))["error"] == "invalid_request"
    refused = await world.root.call("PATCH", f"/v1/agents/{agent.agent_id}", json={"may_act": [stranger.agent_id]})
    assert refused.status_code == 403
    await agent.call("PATCH", f"/v1/agents/{agent.agent_id}", json={"may_act": [stranger.agent_id]})
    token = await acting(agent, stranger)
    assert claims_of(token.key)["act"] == {"sub": stranger.agent_id}
    assert (await token.get("/v1/whoami"))["delegation"] == [agent.agent_id, stranger.agent_id]
    await agent.call("PATCH", f"/v1/agents/{agent.agent_id}", json={"may_act": []})
    assert (await exchange(agent, stranger, 400))["error"] == "invalid_request"


async def test_who_acts_is_nested_and_four_deep_at_most(world: World):
    subject = await world.root.child(name="subject")
    actors = [await subject.child(name=f"actor {n}") for n in range(5)]
    token, act = subject, None
    for actor in actors[:4]:
        token = await acting(token, actor)
        act = {"sub": actor.agent_id} | ({"act": act} if act else {})
        claims = claims_of(token.key)
        assert (claims["sub"], claims["act"], claims["client_id"]) == (subject.agent_id, act, actor.agent_id)
    assert (await token.get("/v1/whoami"))["delegation"] == [subject.agent_id, *(a.agent_id for a in actors[:4])]
    assert "4 deep" in (await exchange(token, actors[4], 400))["error_description"]
    again = await acting(token, actors[3], scope="pods:read")  # narrower, and no deeper
    assert claims_of(again.key)["act"] == act
    assert (await exchange(again, actors[3]))["scope"] == "pods:read"


async def test_a_token_of_a_token_is_never_wider(world: World):
    agent = await world.root.child()
    narrow = await acting(agent, scope="pods:read offers:read")
    assert (await exchange(narrow, scope="usage:read", status=400))["error"] == "invalid_scope"
    assert (await narrow.post("/v1/keys", {"name": "n"}, 403))["code"] == "forbidden"
    narrower = await acting(narrow, scope="offers:read")
    assert (await narrower.get("/v1/whoami"))["scopes"] == ["offers:read"]
    world.query("UPDATE agent SET scopes = '{pods:read}' WHERE id = %s", agent.agent_id)
    assert (await narrow.get("/v1/whoami"))["scopes"] == ["pods:read"]
    assert (await narrower.get("/v1/offers", 403))["code"] == "forbidden"


async def test_the_subject_pays_and_owns_what_its_actor_does(world: World):
    subject, actor = (
        await world.root.child(budget={"limit_usd": "5"}),
        await world.root.child(budget={"limit_usd": "5"}),
    )
    await subject.call("PATCH", f"/v1/agents/{subject.agent_id}", json={"may_act": [actor.agent_id]})
    pod = await (await acting(subject, actor)).pod()
    assert pod["agent_id"] == subject.agent_id
    assert (await subject.get("/v1/budgets"))["items"][0]["held_usd"] == pod["committed_usd"]
    assert (await actor.get("/v1/budgets"))["items"][0]["held_usd"] == "0.000000"
    await actor.get(f"/v1/pods/{pod['id']}", 404)


# With a budget of its own


async def test_a_tokens_budget_bounds_all_that_is_made_with_it_and_its_like(world: World):
    agent = await world.root.child(budget={"limit_usd": "50"})
    outer = await acting(agent, budget_usd="1")
    inner = await acting(outer, budget_usd="0.5")
    for holder, room in ((agent, "50.000000"), (outer, "1.000000"), (inner, "0.500000")):
        assert (await holder.get("/v1/whoami"))["budgets"][0]["available_usd"] == room
    assert (await exchange(outer, budget_usd="1.000001", status=400))["error"] == "invalid_request"
    refused = await inner.pod(402)
    pod = await outer.pod()
    assert (refused["code"], pod["committed_usd"]) == ("budget_exhausted", refused["needed_usd"])
    held = float(pod["committed_usd"])
    assert 0.5 < held <= 1
    assert (await outer.pod(402))["available_usd"] == f"{1 - held:.6f}"
    assert (await agent.pod())["agent_id"] == agent.agent_id
    await outer.post(f"/v1/pods/{pod['id']}/extend", {"max_lifetime_seconds": 7200}, 402)
    assert world.query("SELECT max(committed_micro) FROM token")[0]["max"] == round(held * 10**6)


async def test_a_token_with_a_budget_makes_nothing_that_spends_beyond_it(world: World):
    agent = await world.root.child(budget={"limit_usd": "50"})
    pod = await agent.pod()
    token = await acting(await acting(agent, budget_usd="1"))
    (key,) = [k["id"] for k in (await agent.get("/v1/keys"))["items"]]
    for path, body in (
        ("/v1/keys", {"name": "n"}), ("/v1/agents", {"name": "n"}), (f"/v1/keys/{key}/rotate", {}),
        (f"/v1/pods/{pod['id']}/extend", {"max_lifetime_seconds": 7200}),
    ):  # fmt: skip
        refused = await token.post(path, body, 403)
        assert (refused["code"], "budget" in refused["detail"]) == ("forbidden", True)
    mine = await token.pod(max_lifetime_seconds=60)
    await token.post(f"/v1/pods/{mine['id']}/extend", {"max_lifetime_seconds": 70}, 202)
    free = await acting(agent)
    await free.post("/v1/keys", {"name": "n"})
    await free.post(f"/v1/pods/{pod['id']}/extend", {"max_lifetime_seconds": 700}, 202)


async def test_twenty_pods_at_once_never_go_beyond_a_tokens_budget(world: World):
    agent = await world.root.child(budget={"limit_usd": "50"})
    token = await acting(agent, budget_usd="2")
    body = {"image": "b", "requirements": {"gpu": ["h100"]}, "max_lifetime_seconds": 600}
    answers = await asyncio.gather(*(token.call("POST", "/v1/pods?duplicate=allow", json=body) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {202, 402}
    assert sum(float(a.json()["committed_usd"]) for a in answers if a.status_code == 202) <= 2
    world.check_money()


# Described and revoked


async def test_introspection_tells_whoever_holds_it_or_stands_above_and_nobody_else(world: World):
    agent, other = await world.root.child(name="agent"), await world.root.child(name="other")
    below = await agent.child(name="below")
    made = accounts.bootstrap(world.database_url, "second", 10**6, "total", "free", new_key=False)
    token = await acting(agent, below, scope="pods:read")

    async def look(text: str, **asking: Any) -> dict[str, Any]:
        answer = await form("/v1/introspect", asking.pop("headers", None), token=text, **asking)
        assert answer.status_code == 200
        assert answer.headers["Cache-Control"] == "no-store"
        return answer.json()

    expected = {name: claims_of(token.key)[name] for name in ("exp", "iat", "iss", "aud", "jti", "act")} | {
        "active": True, "scope": "pods:read", "sub": agent.agent_id, "client_id": below.agent_id, "token_type": "Bearer",
        "org": claims_of(token.key)["org"],
    }  # fmt: skip
    for asking in (agent, below, world.root):
        assert await look(token.key, headers={"Authorization": f"Bearer {asking.key}"}) == expected
    assert await look(token.key, client_id=agent.agent_id, client_secret=agent.key) == expected
    for asking in (other.key, made.key.key):
        assert await look(token.key, headers={"Authorization": f"Bearer {asking}"}) == {"active": False}
    by_agent = {"Authorization": f"Bearer {agent.key}"}
    assert (await look(agent.key, headers=by_agent))["sub"] == agent.agent_id
    elsewhere = await acting(agent, audience="https://tool.example")
    assert (await look(elsewhere.key, headers=by_agent))["aud"] == "https://tool.example"
    assert not await is_alive(elsewhere)
    for text in ("nonsense", "a.b.c", world.root.key, token.key[:-3]):
        assert await look(text, headers=by_agent) == {"active": False}
    world.query("UPDATE agent SET scopes = '{offers:read}' WHERE id = %s", agent.agent_id)
    assert (await look(token.key, headers=by_agent))["scope"] == ""


async def test_who_asks_about_a_token_must_say_who_it_is(world: World):
    for path in ("/v1/introspect", "/v1/revoke"):
        for asking in (
            {"Authorization": ""},
            {"Authorization": "Bearer nonsense"},
            {"X-API-Key": "x"},
            {"Authorization": "Basic !"},
        ):
            answer = await form(path, asking, token="x")
            assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
            assert answer.headers["WWW-Authenticate"].startswith("Basic")
        missing = await form(path, {"Authorization": f"Bearer {world.root.key}"})
        assert (missing.status_code, missing.json()["error"]) == (400, "invalid_request")


async def test_a_revoked_token_ends_with_all_that_came_from_it(world: World):
    agent, other = await world.root.child(name="agent"), await world.root.child(name="other")
    below = await agent.child(name="below")
    first = await acting(agent)
    second = await acting(first, below)
    third = await acting(second)

    async def revoke(text: str, asking: Client) -> None:
        answer = await form("/v1/revoke", {"Authorization": f"Bearer {asking.key}"}, token=text)
        assert answer.status_code == 200, answer.text

    for text in (first.key, agent.key, world.root.key, "nonsense", "a.b.c"):
        await revoke(text, other)
    assert all([await is_alive(client) for client in (agent, first, second, third, world.root)])
    await revoke(second.key, below)  # who holds it
    assert [await is_alive(client) for client in (first, second, third)] == [True, False, False]
    await revoke(second.key, below)
    await revoke(first.key, world.root)
    assert [await is_alive(client) for client in (agent, first)] == [True, False]
    token = await acting(agent)
    await revoke(agent.key, agent)  # a key goes the same way, and tokens with it
    assert [await is_alive(client) for client in (agent, token, below)] == [False, False, True]


async def test_a_token_ends_with_its_key_its_agent_and_its_actor(world: World):
    for what in ("key", "subject", "above", "actor", "expiry"):
        above = await world.root.child(name="above")
        subject = await above.child(name="subject")
        actor = await subject.child(name="actor")
        token = await acting(subject, actor)
        assert await is_alive(token)
        if what == "key":
            (key,) = world.query("SELECT id FROM key WHERE agent_id = %s", subject.agent_id)
            await world.root.delete(f"/v1/keys/{key['id']}", 200)
        elif what == "expiry":
            world.query("UPDATE agent SET expires_at = clock_timestamp() WHERE id = %s", above.agent_id)
        else:
            doomed = {"subject": subject, "above": above, "actor": actor}[what]
            await world.root.delete(f"/v1/agents/{doomed.agent_id}", 200)
        assert not await is_alive(token), what


# The keys that sign


async def test_signing_keys_rotate_and_overlap(world: World):
    agent = await world.root.child()

    async def shown() -> list[str]:
        signing.forget_keys()  # as another process, or this one a minute later
        return [key["kid"] for key in (await form_get("/.well-known/jwks.json")).json()["keys"]]

    def kid(client: Client) -> str:
        return jwt.get_unverified_header(client.key)["kid"]

    def age(days: float) -> None:
        moved = timedelta(days=days)
        world.query(
            "UPDATE signing_key SET signs_until = signs_until - %s, shown_until = shown_until - %s", moved, moved
        )

    (first,) = await shown()
    old = await acting(agent)
    assert kid(old) == first
    age(28.9)
    assert await shown() == [first]
    age(0.2)  # a day before it signs no more, its successor is shown
    assert (await shown())[0] == first
    (_, second) = await shown()
    assert kid(await acting(agent)) == first
    age(0.92)  # it signs no more, and is shown as long as a token of it may live
    assert await shown() == [first, second]
    new = await acting(agent)
    assert kid(new) == second
    assert [await is_alive(client) for client in (old, new)] == [True, True]
    age(0.06)
    assert await shown() == [second]
    assert [await is_alive(client) for client in (old, new)] == [False, True]
    private = world.query("SELECT private_sealed FROM signing_key")
    assert all(len(row["private_sealed"]) > 32 for row in private)


async def test_many_that_need_the_first_key_at_once_make_one(world: World):
    agent = await world.root.child()
    await asyncio.gather(*(exchange(agent) for _ in range(10)))
    assert world.query("SELECT count(*) FROM signing_key")[0]["count"] == 1


async def test_the_servers_metadata_is_rfc_8414_and_true(world: World):
    metadata = (await form_get("/.well-known/oauth-authorization-server")).json()
    assert metadata["issuer"] == ISSUER
    for name in ("token_endpoint", "jwks_uri", "introspection_endpoint", "revocation_endpoint"):
        path = metadata[name].removeprefix(ISSUER)
        assert (await world.root.call("OPTIONS", path)).status_code == 405, name
    assert metadata["grant_types_supported"] == ["client_credentials", EXCHANGE]
    assert metadata["response_types_supported"] == []
    assert metadata["scopes_supported"] == list(SCOPES)
    assert set(metadata["token_endpoint_auth_methods_supported"]) == {
        "client_secret_basic",
        "client_secret_post",
        "none",
    }


async def test_old_tokens_are_forgotten_but_not_those_that_made_pods(world: World):
    agent = await world.root.child()
    outer = await acting(agent)
    inner = await acting(outer)
    bare = await acting(agent)
    await inner.pod()
    world.query("UPDATE token SET expires_at = expires_at - interval '8 days'")
    await acting(agent)
    for _ in range(2):
        async with store.worker() as tx:
            await token_rows.prune_tokens(tx.conn)
    left = {row["jti"] for row in world.query("SELECT jti FROM token WHERE expires_at < clock_timestamp()")}
    assert left == {claims_of(client.key)["jti"] for client in (outer, inner)}
    assert claims_of(bare.key)["jti"] not in left
