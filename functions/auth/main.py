"""Function `auth`: agents, keys, and who calls."""

import functions_framework.aio
from starlette.requests import Request

from gpubroker import accounts, errors, idempotency, paging, web
from gpubroker.inputs import NoQuery, Nothing
from gpubroker.resources import (
    Agent,
    AgentRequest,
    AgentWithKey,
    Key,
    KeyRequest,
    KeyWithSecret,
    Page,
    Whoami,
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


@api.operation("GET", "/v1/whoami", answers={200: Whoami})
async def whoami(call: web.Call[Nothing, NoQuery]) -> web.Answer:
    """Say who calls, with which rights, budget and limits."""
    async with call.transaction() as tx:
        return web.Answer(await accounts.describe_caller(tx))


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
