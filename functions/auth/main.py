"""Function `auth`: agents, keys, and who calls."""

import functions_framework.aio
from starlette.requests import Request

from gpubroker import accounts, errors, idempotency, paging, pods, signing, store, tokens, web
from gpubroker.inputs import NoQuery, Nothing
from gpubroker.resources import Page
from gpubroker.resources.agents import (
    Agent,
    AgentChange,
    AgentRequest,
    AgentWithKey,
    Key,
    KeyRequest,
    KeyWithSecret,
    RotateRequest,
    Whoami,
)
from gpubroker.resources.tokens import (
    Introspection,
    Jwks,
    Revoked,
    ServerMetadata,
    TokenAnswer,
    TokenForm,
    TokenQuestion,
)
from gpubroker.store import accounts as rows

api = web.Api("auth")


class KeyQuery(paging.Paged):
    """Which keys to list."""

    agent_id: str | None = None


@api.operation(
    "POST", "/v1/agents", scope="agents:write", body=AgentRequest, answers={201: AgentWithKey}, idempotent=True
)
async def create_agent(call: web.Call[AgentRequest, NoQuery]) -> web.Answer:
    """Make a child of the calling agent, with its first key, shown once."""
    request = idempotency.Request(call.idempotency_key, "POST /v1/agents", call.raw)
    async with call.transaction() as tx:
        made = await idempotency.find_made(tx, request)
        if made is not None:
            agent = await accounts.show_agent(tx, made)
            (first,) = await rows.list_keys(tx.conn, tx.known.agent_id, made, None, 1)
            return _replay(agent, first.id, f"/v1/agents/{made}")
        created = await accounts.create_agent(tx, call.body)
        await idempotency.keep(tx, request, created.id)
    return web.Answer(created, 201, {"Location": f"/v1/agents/{created.id}"})


@api.operation("GET", "/v1/agents", query=paging.Paged, answers={200: Page[Agent]})
async def list_agents(call: web.Call[Nothing, paging.Paged]) -> web.Answer:
    """List the calling agent and all below it."""
    after = paging.read_cursor(call.query.cursor, str)
    async with call.transaction() as tx:
        found = await rows.list_agents(tx.conn, tx.known.agent_id, after[0] if after else None, call.query.limit + 1)
    items, cursor = paging.cut_page(found, call.query.limit)
    return web.Answer(Page[Agent](items=items, next_cursor=cursor))


@api.operation("GET", "/v1/agents/{id}", answers={200: Agent})
async def show_agent(call: web.Call[Nothing, NoQuery]) -> web.Answer:
    """Show an agent of the subtree."""
    async with call.transaction() as tx:
        return web.Answer(await accounts.show_agent(tx, call.path("id")))


@api.operation("PATCH", "/v1/agents/{id}", scope="agents:write", body=AgentChange, answers={200: Agent})
async def change_agent(call: web.Call[AgentChange, NoQuery]) -> web.Answer:
    """Change an agent of the subtree; of oneself only downwards."""
    async with call.transaction() as tx:
        return web.Answer(await accounts.change_agent(tx, call.path("id"), call.body))


@api.operation("DELETE", "/v1/agents/{id}", scope="agents:write", answers={200: Agent})
async def revoke_agent(call: web.Call[Nothing, NoQuery]) -> web.Answer:
    """Revoke an agent and all below it, and end their pods."""
    async with call.transaction() as tx:
        agent, revoked = await accounts.revoke_agent(tx, call.path("id"))
        await pods.end_pods_of(tx, revoked, "agent_revoked")
    return web.Answer(agent)


@api.operation("POST", "/v1/keys", scope="agents:write", body=KeyRequest, answers={201: KeyWithSecret}, idempotent=True)
async def create_key(call: web.Call[KeyRequest, NoQuery]) -> web.Answer:
    """Make a further key, shown once."""
    request = idempotency.Request(call.idempotency_key, "POST /v1/keys", call.raw)
    async with call.transaction() as tx:
        made = await idempotency.find_made(tx, request)
        if made is not None:
            key = await accounts.show_key(tx, made)
            return _replay(key, made, f"/v1/keys/{made}")
        created = await accounts.create_key(tx, call.body)
        await idempotency.keep(tx, request, created.id)
    return web.Answer(created, 201, {"Location": f"/v1/keys/{created.id}"})


@api.operation("GET", "/v1/keys", query=KeyQuery, answers={200: Page[Key]})
async def list_keys(call: web.Call[Nothing, KeyQuery]) -> web.Answer:
    """List the keys of the subtree: how each begins, never the key."""
    after = paging.read_cursor(call.query.cursor, str)
    async with call.transaction() as tx:
        found = await rows.list_keys(
            tx.conn, tx.known.agent_id, call.query.agent_id, after[0] if after else None, call.query.limit + 1
        )
    items, cursor = paging.cut_page(found, call.query.limit)
    return web.Answer(Page[Key](items=items, next_cursor=cursor))


@api.operation("DELETE", "/v1/keys/{id}", scope="agents:write", answers={200: Key})
async def revoke_key(call: web.Call[Nothing, NoQuery]) -> web.Answer:
    """Revoke a key: the next request with it is refused."""
    async with call.transaction() as tx:
        return web.Answer(await accounts.revoke_key(tx, call.path("id")))


@api.operation(
    "POST",
    "/v1/keys/{id}/rotate",
    scope="agents:write",
    body=RotateRequest,
    answers={201: KeyWithSecret},
    idempotent=True,
)
async def rotate_key(call: web.Call[RotateRequest, NoQuery]) -> web.Answer:
    """Replace a key; the old one lives for the overlap."""
    request = idempotency.Request(call.idempotency_key, f"POST /v1/keys/{call.path('id')}/rotate", call.raw)
    async with call.transaction() as tx:
        made = await idempotency.find_made(tx, request)
        if made is not None:
            return _replay(await accounts.show_key(tx, made), made, f"/v1/keys/{made}")
        created = await accounts.rotate_key(tx, call.path("id"), call.body.overlap_seconds)
        await idempotency.keep(tx, request, created.id)
    return web.Answer(created, 201, {"Location": f"/v1/keys/{created.id}"})


@api.operation("POST", "/v1/token", open=True, form=TokenForm, answers={200: TokenAnswer})
async def issue_token(call: web.Call[Nothing, NoQuery]) -> web.Answer:
    """Issue a short-lived token: OAuth 2 client credentials, or RFC 8693 token exchange."""
    client = web.read_client(call.request, call.form)
    issued = await tokens.issue(call.form, tokens.Client(*client) if client else None, call.count)
    return web.Answer(issued, 200, {"Cache-Control": "no-store"})


@api.operation("POST", "/v1/introspect", open=True, form=TokenQuestion, answers={200: Introspection})
async def introspect_token(call: web.Call[Nothing, NoQuery]) -> web.Answer:
    """Say what a token is and may do now (RFC 7662)."""
    caller = await _read_caller(call)
    stated = await tokens.introspect(caller, call.form["token"], call.count)
    return web.Answer(stated, 200, {"Cache-Control": "no-store"})


@api.operation("POST", "/v1/revoke", open=True, form=TokenQuestion, answers={200: Revoked})
async def revoke_token(call: web.Call[Nothing, NoQuery]) -> web.Answer:
    """Revoke a token or key (RFC 7009); what is none is no error."""
    caller = await _read_caller(call)
    await tokens.revoke(caller, call.form["token"], call.count)
    return web.Answer({})


@api.operation("GET", "/.well-known/jwks.json", open=True, answers={200: Jwks})
async def show_keys(call: web.Call[Nothing, NoQuery]) -> web.Answer:
    """Show the public keys of the tokens."""
    del call
    async with store.anonymous() as tx:
        await signing.ensure_keys(tx.conn)
        shown = await signing.list_public(tx.conn)
    return web.Answer({"keys": shown}, 200, {"Cache-Control": "public, max-age=300"})


@api.operation("GET", "/.well-known/oauth-authorization-server", open=True, answers={200: ServerMetadata})
async def show_server(call: web.Call[Nothing, NoQuery]) -> web.Answer:
    """Describe this authorization server (RFC 8414)."""
    del call
    return web.Answer(tokens.describe_server())


@api.operation("GET", "/v1/whoami", answers={200: Whoami})
async def whoami(call: web.Call[Nothing, NoQuery]) -> web.Answer:
    """Say who calls, with which rights, budget and limits."""
    async with call.transaction() as tx:
        return web.Answer(await accounts.describe_caller(tx))


async def _read_caller(call: web.Call[Nothing, NoQuery]) -> store.Credential:
    """Who asks about a token: a bearer credential, or a client's id and secret. Raises OAuthError or Unauthenticated."""
    if not call.form.get("token"):
        raise errors.OAuthError("invalid_request", "token is missing")
    client = web.read_client(call.request, call.form)
    if client is None:
        return await web.read_credential(call.request)
    return await tokens.authenticate_client(tokens.Client(*client))


def _replay(made: Agent | Key, key_id: str, location: str) -> web.Answer:
    """What was made before, as it is now. A key is shown once: whoever lost it rotates it."""
    rotate = errors.Next("POST", f"/v1/keys/{key_id}/rotate", {"overlap_seconds": 0})
    shown = made.model_dump(mode="json") | {"key": {"id": key_id, "key": None}, "next": [rotate.as_json()]}
    return web.Answer(shown, 201, {"Location": location, "Idempotency-Replayed": "true"})


@functions_framework.aio.http
async def auth(request: Request) -> web.Api:
    """The function."""
    del request
    return api
