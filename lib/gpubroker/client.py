"""A typed client, sync and async: what the command line and the demo use, and any Python agent may.

```
with Client("http://127.0.0.1:8080", key) as broker:
    pod = broker.create_pod({"command": ["nvidia-smi"], "requirements": {"gpu": ["h100"]}}, wait=60)
```

Creates carry an Idempotency-Key of their own, so that a retry after a lost answer makes nothing twice. Amounts are integer
micro-USD (`gpubroker.money.format_usd` writes them). An error answer is a `BrokerError` with all of its problem document.
"""

import asyncio
import random
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from types import TracebackType
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar, cast

import httpx
from pydantic import BaseModel

from gpubroker import bundle, config
from gpubroker.errors import GpubrokerError
from gpubroker.resources import (
    Agent,
    AgentWithKey,
    Budget,
    ExecAnswer,
    Key,
    KeyWithSecret,
    Offer,
    Page,
    Pod,
    Usage,
    UsageRecord,
    Whoami,
)

M = TypeVar("M", bound=BaseModel)
P = ParamSpec("P")
T = TypeVar("T")

Json = Mapping[str, Any]
_TRIES: Final = 5
_NOTHING_DONE: Final = frozenset({429, 503})
_CONFLICT: Final = 409
_UNSURE: Final = frozenset({502, 504})
_TIMEOUT_SECONDS: Final = 90.0
_LONGEST_PAUSE_SECONDS: Final = 10.0


class BrokerError(GpubrokerError):
    """An error answer. `problem` is its whole document: type, title, status, detail, code, retryable, request_id, hint."""

    def __init__(self, problem: Mapping[str, Any]) -> None:
        self.problem = dict(problem)
        self.status = int(problem.get("status") or 0)
        self.code = str(problem.get("code") or "unknown")
        self.detail = str(problem.get("detail") or problem.get("title") or "")
        self.hint = str(problem.get("hint") or "")
        super().__init__(f"{self.status} {self.code}: {self.detail}")


class AsyncClient:
    """An agent's view of the broker. Without arguments: GPUBROKER_URL and GPUBROKER_API_KEY.

    The URL is one host for all functions, or has `{function}` in it where each has its own.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        on_answer: Callable[[httpx.Response], Awaitable[None]] | None = None,
    ) -> None:
        settings = config.settings()
        self.url = (url or settings.variable("GPUBROKER_URL") or "http://127.0.0.1:8080").rstrip("/")
        self._key = key or settings.variable("GPUBROKER_API_KEY") or ""
        hooks = {"response": [on_answer]} if on_answer else {}
        self._http = httpx.AsyncClient(timeout=httpx.Timeout(_TIMEOUT_SECONDS, connect=10.0), event_hooks=hooks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of connections."""
        await self._http.aclose()

    # Who calls

    async def whoami(self) -> Whoami:
        """Who the key is, with its rights, budget and limits."""
        return await self._read(Whoami, "GET", "/v1/whoami")

    async def create_agent(self, request: Json) -> AgentWithKey:
        """Make a child agent; its key is shown once."""
        return await self._read(AgentWithKey, "POST", "/v1/agents", body=request, create=True)

    async def list_agents(self, **query: object) -> Page[Agent]:
        """The caller's agent and all below it."""
        return await self._read(Page[Agent], "GET", "/v1/agents", query=query)

    async def create_key(self, request: Json) -> KeyWithSecret:
        """Make a further key, shown once."""
        return await self._read(KeyWithSecret, "POST", "/v1/keys", body=request, create=True)

    async def list_keys(self, **query: object) -> Page[Key]:
        """The keys of the subtree, without the keys."""
        return await self._read(Page[Key], "GET", "/v1/keys", query=query)

    async def revoke_key(self, key_id: str) -> Key:
        """Revoke a key at once."""
        return await self._read(Key, "DELETE", f"/v1/keys/{key_id}")

    # What can be rented

    async def list_offers(self, **query: object) -> Page[Offer]:
        """Search offers: the filters of `GET /v1/offers`."""
        return await self._read(Page[Offer], "GET", "/v1/offers", query=query)

    # Pods

    async def create_pod(self, request: Json, *, wait: int = 0, until: str = "settled", **query: object) -> Pod:
        """Ask for a pod, and wait up to `wait` seconds until it is what is waited for."""
        asked = {"wait": wait, "until": until, **query}
        return await self._read(Pod, "POST", "/v1/pods", body=request, query=asked, create=True)

    async def get_pod(self, pod_id: str, *, wait: int = 0, until: str = "settled", **query: object) -> Pod:
        """A pod now, or once it is what is waited for."""
        return await self._read(Pod, "GET", f"/v1/pods/{pod_id}", query={"wait": wait, "until": until, **query})

    async def list_pods(self, **query: object) -> Page[Pod]:
        """Pods of the subtree, the newest first."""
        return await self._read(Page[Pod], "GET", "/v1/pods", query=query)

    async def start_pod(self, pod_id: str, *, wait: int = 0) -> Pod:
        """Start a stopped pod."""
        return await self._read(Pod, "POST", f"/v1/pods/{pod_id}/start", query={"wait": wait})

    async def stop_pod(self, pod_id: str, *, wait: int = 0) -> Pod:
        """Stop a pod, its disk kept."""
        return await self._read(Pod, "POST", f"/v1/pods/{pod_id}/stop", query={"wait": wait})

    async def restart_pod(self, pod_id: str, *, wait: int = 0) -> Pod:
        """End a pod's program and start it anew."""
        return await self._read(Pod, "POST", f"/v1/pods/{pod_id}/restart", query={"wait": wait})

    async def extend_pod(self, pod_id: str, request: Json) -> Pod:
        """Give a pod a longer life."""
        return await self._read(Pod, "POST", f"/v1/pods/{pod_id}/extend", body=request)

    async def terminate_pod(self, pod_id: str, *, wait: int = 0) -> Pod:
        """End a pod, disk and all."""
        return await self._read(Pod, "DELETE", f"/v1/pods/{pod_id}", query={"wait": wait})

    async def read_log(self, pod_id: str, **query: object) -> str:
        """The last lines of a pod's log."""
        return (await self._send("GET", f"/v1/logs/{pod_id}", query=query)).text

    async def follow_log(self, pod_id: str, *, tail: int = 200) -> AsyncGenerator[str]:
        """A pod's log, line by line, until its program has ended; streams that end are resumed."""
        last: str | None = None
        while True:
            headers = {"Authorization": f"Bearer {self._key}"} | ({"Last-Event-ID": last} if last else {})
            address = self._address(f"/v1/logs/{pod_id}")
            async with self._http.stream(
                "GET", address, params={"follow": "true", "tail": tail}, headers=headers, timeout=httpx.Timeout(60.0)
            ) as answer:
                if answer.is_error:
                    await answer.aread()
                    raise _as_error(answer)
                async for event in _read_events(answer):
                    if event.get("event") == "end":
                        return
                    last = event.get("id", last)
                    if "data" in event:
                        yield event["data"]

    async def execute(
        self, pod_id: str, command: list[str], *, timeout_seconds: int = 60, stdin: str | None = None
    ) -> ExecAnswer:
        """Run a command in a running pod and wait for its end."""
        body: dict[str, object] = {"command": command, "timeout_seconds": timeout_seconds}
        if stdin is not None:
            body["stdin"] = stdin
        return await self._read(ExecAnswer, "POST", f"/v1/exec/{pod_id}", body=body, seconds=timeout_seconds + 30)

    # What was used

    async def usage(self, **query: object) -> Usage:
        """What the subtree used; `from_` stands for `from`."""
        return await self._read(Usage, "GET", "/v1/usage", query=query)

    async def list_records(self, **query: object) -> Page[UsageRecord]:
        """The intervals that were charged."""
        return await self._read(Page[UsageRecord], "GET", "/v1/usage/records", query=query)

    async def list_budgets(self, **query: object) -> Page[Budget]:
        """Budgets of the subtree."""
        return await self._read(Page[Budget], "GET", "/v1/budgets", query=query)

    async def set_budget(self, agent_id: str, limit_usd: str, period: str = "total") -> Budget:
        """Set the limit of an agent below."""
        return await self._read(
            Budget, "PUT", f"/v1/budgets/{agent_id}", body={"limit_usd": limit_usd, "period": period}
        )

    # The wire

    async def _read(
        self,
        model: type[M],
        method: str,
        path: str,
        *,
        body: Json | None = None,
        query: Json | None = None,
        create: bool = False,
        seconds: float | None = None,
    ) -> M:
        answer = await self._send(method, path, body=body, query=query, create=create, seconds=seconds)
        return model.model_validate(_rename(answer.json()))

    async def _send(
        self,
        method: str,
        path: str,
        *,
        body: Json | None = None,
        query: Json | None = None,
        create: bool = False,
        seconds: float | None = None,
    ) -> httpx.Response:
        """Send, and send again what may be: anything of which nothing was done, reads, and creates with their key."""
        headers = {"Authorization": f"Bearer {self._key}"} | ({"Idempotency-Key": uuid.uuid4().hex} if create else {})
        repeatable = create or method in ("GET", "PUT", "DELETE")
        parameters = {name.rstrip("_"): value for name, value in (query or {}).items() if value not in (None, 0, "")}
        timeout = httpx.Timeout(seconds, connect=10.0) if seconds else httpx.USE_CLIENT_DEFAULT
        for left in reversed(range(_TRIES)):
            try:
                answer = await self._http.request(
                    method,
                    self._address(path),
                    params=cast("Any", parameters),
                    json=body,
                    headers=headers,
                    timeout=timeout,
                )
            except httpx.ConnectError as error:
                if not left:
                    raise _unheard("unreachable", f"{self.url} cannot be reached: {error}") from None
                pause = 0.2
            except httpx.TransportError as error:
                if not left or not repeatable:
                    raise _unheard("no_answer", f"no answer of {self.url}: {type(error).__name__}") from None
                pause = 0.5
            else:
                if answer.is_success:
                    return answer
                if not left or not _may_repeat(answer, repeatable=repeatable):
                    raise _as_error(answer)
                pause = min(float(answer.headers.get("Retry-After") or 1), _LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(pause * (1 + random.random() / 2))  # noqa: S311 - so that many clients do not come at once
        raise AssertionError

    def _address(self, path: str) -> str:
        if "{function}" not in self.url:
            return self.url + path
        served = [f for f in bundle.FUNCTIONS for prefix in f.paths if f"{path}/".startswith(f"{prefix}/")]
        return self.url.replace("{function}", served[0].name if served else "auth") + path


def _may_repeat(answer: httpx.Response, *, repeatable: bool) -> bool:
    if answer.status_code in _NOTHING_DONE:
        return True
    in_progress = answer.status_code == _CONFLICT and "idempotency_in_progress" in answer.text
    return repeatable and (answer.status_code in _UNSURE or in_progress)


def _unheard(code: str, detail: str) -> BrokerError:
    return BrokerError({"status": 0, "code": code, "detail": detail})


def _as_error(answer: httpx.Response) -> BrokerError:
    try:
        problem: object = answer.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        detail = f"{answer.url} is no gpubroker: {answer.text[:200]}"
        problem = {"status": answer.status_code, "code": "not_the_broker", "detail": detail}
    return BrokerError({"status": answer.status_code} | cast("dict[str, Any]", problem))


def _rename(value: object) -> object:
    """`from` is a word of Python: in the models it is `from_`."""
    if isinstance(value, dict):
        members = cast("dict[str, object]", value)
        return {"from_" if name == "from" else name: _rename(member) for name, member in members.items()}
    if isinstance(value, list):
        return [_rename(member) for member in cast("list[object]", value)]
    return value


async def _read_events(answer: httpx.Response) -> AsyncGenerator[dict[str, str]]:
    event: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if not line:
            if event:
                yield event
            event = {}
            continue
        name, _, value = line.partition(":")
        if name:
            value = value.removeprefix(" ")
            event[name] = f"{event[name]}\n{value}" if name == "data" and "data" in event else value


def _sync(method: Callable[Concatenate[AsyncClient, P], Awaitable[T]]) -> Callable[Concatenate["Client", P], T]:
    """The same method for the sync client: same arguments, same documentation, and it waits."""

    def call(self: "Client", *args: P.args, **kwargs: P.kwargs) -> T:
        return self.run(method(self.inner, *args, **kwargs))

    call.__name__, call.__doc__ = method.__name__, method.__doc__
    return call


class Client:
    """The same client for code that is not async. Its methods are those of `AsyncClient`, and wait."""

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        on_answer: Callable[[httpx.Response], Awaitable[None]] | None = None,
    ) -> None:
        self.inner = AsyncClient(url, key, on_answer=on_answer)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, work: Awaitable[T]) -> T:
        """Wait for something that is async."""

        async def wait() -> T:
            return await work

        return self._runner.run(wait())

    def close(self) -> None:
        """Let go of connections."""
        self.run(self.inner.close())
        self._runner.close()

    def follow_log(self, pod_id: str, *, tail: int = 200) -> Generator[str]:
        """A pod's log, line by line, until its program has ended."""
        lines = self.inner.follow_log(pod_id, tail=tail)
        try:
            while True:
                try:
                    yield self.run(anext(lines))
                except StopAsyncIteration:
                    return
        finally:
            self.run(lines.aclose())

    whoami = _sync(AsyncClient.whoami)
    create_agent = _sync(AsyncClient.create_agent)
    list_agents = _sync(AsyncClient.list_agents)
    create_key = _sync(AsyncClient.create_key)
    list_keys = _sync(AsyncClient.list_keys)
    revoke_key = _sync(AsyncClient.revoke_key)
    list_offers = _sync(AsyncClient.list_offers)
    create_pod = _sync(AsyncClient.create_pod)
    get_pod = _sync(AsyncClient.get_pod)
    list_pods = _sync(AsyncClient.list_pods)
    start_pod = _sync(AsyncClient.start_pod)
    stop_pod = _sync(AsyncClient.stop_pod)
    restart_pod = _sync(AsyncClient.restart_pod)
    extend_pod = _sync(AsyncClient.extend_pod)
    terminate_pod = _sync(AsyncClient.terminate_pod)
    read_log = _sync(AsyncClient.read_log)
    execute = _sync(AsyncClient.execute)
    usage = _sync(AsyncClient.usage)
    list_records = _sync(AsyncClient.list_records)
    list_budgets = _sync(AsyncClient.list_budgets)
    set_budget = _sync(AsyncClient.set_budget)
