"""Many requests at once: authenticated in lots, each by itself, and a page read once for all who ask for it."""

import asyncio
from typing import Any

import psycopg
import pytest
from tests.factories import Client, World

from gpubroker import errors, keys, store
from gpubroker.shelf import Shelf
from gpubroker.store import entrance

pytestmark = pytest.mark.anyio


async def token_of(agent: Client) -> str:
    form = {"grant_type": "client_credentials", "client_id": agent.agent_id, "client_secret": agent.key}
    answer = await agent.call("POST", "/v1/token", data=form, headers={"Authorization": ""})
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"]


@pytest.fixture
def lots(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each lot had."""
    sizes: list[int] = []
    authenticate = entrance._authenticate

    async def count(lot: list[Any]) -> Any:
        sizes.append(len(lot))
        return await authenticate(lot)

    monkeypatch.setattr(entrance, "_authenticate", count)
    return sizes


async def test_each_of_a_lot_gets_its_own_answer(world: World, lots: list[int]):
    reader = await world.root.child(scopes=["offers:read"])
    other = await world.root.child(scopes=["pods:read"])
    revoked = await world.root.child()
    by_token, dead_token = Client(await token_of(reader), ""), Client(await token_of(revoked), "")
    await world.root.delete(f"/v1/agents/{revoked.agent_id}", 200)
    unknown = Client(keys.new_key()[1], "")
    callers = [
        (reader, 200),
        (revoked, 401),
        (by_token, 200),
        (other, 403),
        (unknown, 401),
        (dead_token, 401),
        (world.root, 200),
    ]
    answers = await asyncio.gather(*(caller.call("GET", "/v1/offers") for caller, _ in callers * 4))
    assert [answer.status_code for answer in answers] == [status for _, status in callers] * 4
    assert sum(lots) == 28
    assert len(lots) < 6
    assert {answer.json()["scope"] for answer in answers if answer.status_code == 403} == {"offers:read"}
    used = world.query("SELECT used_at FROM key WHERE hash = %s", keys.hash_key(reader.key))
    assert used[0]["used_at"] is not None


async def test_a_revocation_is_obeyed_by_the_next_request_whatever_lot_it_is_in(world: World):
    doomed = await world.root.child()
    for _ in range(3):
        crowd = [asyncio.create_task(world.root.call("GET", "/v1/offers")) for _ in range(10)]
        assert (await doomed.call("GET", "/v1/offers")).status_code == 200
        await asyncio.gather(*crowd)
    crowd = [asyncio.create_task(doomed.call("GET", "/v1/offers")) for _ in range(10)]
    await world.root.delete(f"/v1/agents/{doomed.agent_id}", 200)
    assert (await doomed.call("GET", "/v1/offers")).status_code == 401
    assert {answer.status_code for answer in await asyncio.gather(*crowd)} <= {200, 401}


async def test_a_lot_stands_in_no_organisation_after_it(world: World):
    pool = await store.pool()
    async with pool.connection() as conn, conn.transaction():
        await conn.execute("SET LOCAL ROLE gpubroker_public")
        sql = "SELECT agent_id FROM authenticate_all(%s::bytea[], ARRAY[NULL]::text[], ARRAY[NULL]::text[])"
        entered = await (await conn.execute(sql, ([keys.hash_key(world.root.key)],))).fetchall()
        assert entered == [(world.root.agent_id,)]
        assert await (await conn.execute("SELECT id FROM agent")).fetchall() == []


async def test_who_leaves_takes_nobody_along(world: World):
    credential = store.Credential(key_hash=keys.hash_key(world.root.key))
    waiting = [asyncio.create_task(entrance.enter(credential, "offers:read")) for _ in range(6)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    waiting[3].cancel()
    told = await asyncio.gather(*waiting, return_exceptions=True)
    assert [isinstance(each, asyncio.CancelledError) for each in told] == [True, False, False, True, False, False]
    assert all(each.caller.agent_id == world.root.agent_id for each in told if isinstance(each, entrance.Entered))


async def test_without_a_database_all_are_told_so_and_later_ones_enter(world: World):
    credential = store.Credential(key_hash=keys.hash_key(world.root.key))
    await entrance.enter(credential, None)
    with psycopg.connect(world.database_url, autocommit=True) as conn:
        conn.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'gpubroker'")
    told = await asyncio.gather(*(entrance.enter(credential, None) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(each, errors.Unavailable | entrance.Entered) for each in told)
    assert any(isinstance(each, errors.Unavailable) for each in told)
    for _ in range(10):
        try:
            return await entrance.enter(credential, None)
        except errors.Unavailable:
            continue
    raise AssertionError("the entrance stays closed")


# The shelf


async def test_a_page_is_read_once_for_all_who_wait():
    shelf, reads, go = Shelf(), [], asyncio.Event()

    async def read() -> bytes:
        reads.append(1)
        await go.wait()
        return b"page"

    asking = [asyncio.create_task(shelf.show(b"q", "1", read)) for _ in range(5)]
    await asyncio.sleep(0)
    go.set()
    assert await asyncio.gather(*asking) == [b"page"] * 5
    assert len(reads) == 1
    assert await shelf.show(b"q", "2", read) == b"page"
    assert len(reads) == 2, "another version is another page"


async def test_a_page_that_could_not_be_read_is_read_by_the_next():
    shelf, reads = Shelf(), []

    async def read() -> bytes:
        reads.append(1)
        await asyncio.sleep(0)
        if len(reads) < 3:
            raise errors.Unavailable
        return b"page"

    told = await asyncio.gather(*(shelf.show(b"q", "1", read) for _ in range(4)), return_exceptions=True)
    assert [type(each) for each in told] == [errors.Unavailable, errors.Unavailable, bytes, bytes]
    assert len(reads) == 3
