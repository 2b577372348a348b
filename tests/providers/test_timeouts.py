"""Each call to a vendor has three limits: to connect, between two bytes, and for the whole of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import pytest

from gpubroker.errors import AmbiguousOutcome, ProviderError
from gpubroker.providers.http.answers import Answer
from gpubroker.providers.http.client import Client, Header

pytestmark = pytest.mark.anyio


@pytest.fixture
async def dripping(anyio_backend: str) -> AsyncIterator[Client]:
    """The way to a vendor whose answers never stop coming, a byte at a time."""

    served: list[asyncio.Task[None] | None] = []

    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.current_task())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n[")
        with contextlib.suppress(OSError):
            while not writer.is_closing():
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.02)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    seconds = {"offers": 0.2, "read": 0.2, "act": 0.2, "create": 0.2}
    client = Client(
        "drip", url, Header("X", "secret"), limits={}, seconds=seconds, judge_first=lambda *_: None, secrets=()
    )  # type: ignore[arg-type]
    yield client
    await client.close()
    server.close()
    await asyncio.wait_for(asyncio.gather(*(task for task in served if task is not None)), 10)


async def test_an_answer_that_never_ends_is_given_up_at_the_whole_calls_limit(dripping: Client) -> None:
    async with asyncio.timeout(10):
        with pytest.raises(ProviderError, match="timeout"):
            await dripping.call("read", "GET", "/", read=Answer.json)
        with pytest.raises(AmbiguousOutcome, match="timeout"):
            await dripping.call("create", "POST", "/", read=Answer.json)


async def test_connecting_and_silence_have_limits_of_their_own(dripping: Client) -> None:
    limits: httpx.Timeout = dripping._request("read", "GET", "/", None, None).extensions["timeout"]
    assert (limits["connect"], limits["read"]) == (5.0, dripping.read_seconds)
