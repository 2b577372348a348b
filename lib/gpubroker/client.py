"""A typed client, sync and async: what the command line and the demo use, and any Python agent may.

```
with Client("http://127.0.0.1:8080", key) as broker:
    pod = broker.create_pod({"command": ["nvidia-smi"], "requirements": {"gpu": ["h100"]}}, wait=60)
```

What a call is given is JSON as docs and OpenAPI describe it (money as decimal strings); what it returns are the models of
`gpubroker.resources`, whose amounts are integer micro-USD (`gpubroker.money.format_usd` writes them). Queries leave out what
is None, and write `from` as `from_`. An error answer, or none, is a `BrokerError`.

A call is sent again after a while when nothing was done, and when doing it twice does no harm: reads, and creates, which
carry an Idempotency-Key (`idempotency_key`, where a later process shall be able to repeat it). Actions on pods and commands
in them are not: their `BrokerError` says that they may have been done.
"""

import asyncio
import threading
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import aclosing
from datetime import datetime
from types import TracebackType
from typing import Concatenate, Final, Literal, ParamSpec, Self, TypeVar, cast
from urllib.parse import quote

from pydantic import BaseModel

from gpubroker import config
from gpubroker.connection import TIMEOUT_SECONDS, BrokerError, Connection, Hook, Json, parse
from gpubroker.resources import Page
from gpubroker.resources.agents import Agent, AgentWithKey, Key, KeyWithSecret, Whoami
from gpubroker.resources.budgets import Budget
from gpubroker.resources.commands import CommandAnswers
from gpubroker.resources.offers import Gpu, Offer, OfferPage, PriceHistory, ProviderView
from gpubroker.resources.plans import Plan, Subscription
from gpubroker.resources.pods import DryRun, ExecAnswer, Pod, PodEvent, Quote
from gpubroker.resources.tokens import Introspection, Jwks, ServerMetadata, TokenAnswer
from gpubroker.resources.usage import LimitsView, Statement, Usage, UsageRecord

__all__ = ["AsyncClient", "BrokerError", "Client"]

M = TypeVar("M", bound=BaseModel)
P = ParamSpec("P")
T = TypeVar("T")

Until = Literal["running", "settled", "change"]

_WATCH_SECONDS: Final = 20
_EXCHANGE: Final = "urn:ietf:params:oauth:grant-type:token-exchange"


def _iterate(
    list_page: Callable[Concatenate["AsyncClient", P], Awaitable[Page[M]]],
) -> Callable[Concatenate["AsyncClient", P], AsyncGenerator[M]]:
    """The same list, item by item over all of its pages."""

    async def walk(self: "AsyncClient", *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[M]:
        ask = cast("Callable[..., Awaitable[Page[M]]]", list_page)
        query: dict[str, object] = {"limit": 200} | kwargs
        while True:
            page = await ask(self, *args, **query)
            for item in page.items:
                yield item
            if page.next_cursor is None:
                return
            query["cursor"] = page.next_cursor

    walk.__name__, walk.__doc__ = list_page.__name__.replace("list_", "iterate_"), list_page.__doc__
    return walk


class AsyncClient:
    """An agent's view of the broker. Without arguments: GPUBROKER_URL and GPUBROKER_API_KEY.

    The URL is one host for all functions, or has `{function}` in it where each has its own. The key is an API key or a JWT.
    `on_answer` is told every answer. Raises SetupError for what is missing or cannot be.
    """

    def __init__(self, url: str | None = None, key: str | None = None, *, on_answer: Hook | None = None) -> None:
        settings = config.settings()
        url, key = url or settings.variable("GPUBROKER_URL"), key or settings.variable("GPUBROKER_API_KEY")
        self._connection = Connection(url, key, on_answer)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of connections."""
        await self._connection.close()

    # Who calls

    async def whoami(self) -> Whoami:
        """Who the key is, with its rights, budget and limits."""
        return await self._read(Whoami, "/v1/whoami")

    async def create_agent(self, request: Json, *, idempotency_key: str | None = None) -> AgentWithKey:
        """Make a child agent; its key is shown once, and null where the first answer was lost: rotate it then."""
        return await self._make(AgentWithKey, "/v1/agents", request, idempotency_key)

    async def list_agents(self, **query: object) -> Page[Agent]:
        """The caller's agent and all below it."""
        return await self._read(Page[Agent], "/v1/agents", query)

    iterate_agents = _iterate(list_agents)

    async def get_agent(self, agent_id: str) -> Agent:
        """An agent of the subtree."""
        return await self._read(Agent, f"/v1/agents/{_segment(agent_id)}")

    async def change_agent(self, agent_id: str, change: Json) -> Agent:
        """Change name, metadata, scopes, expiry, may_act, grants or limits; what is left out stays."""
        return await self._do(Agent, "PATCH", f"/v1/agents/{_segment(agent_id)}", change)

    async def revoke_agent(self, agent_id: str) -> Agent:
        """Revoke an agent and all below it, and end their pods."""
        return await self._do(Agent, "DELETE", f"/v1/agents/{_segment(agent_id)}", repeatable=True)

    async def create_key(self, request: Json, *, idempotency_key: str | None = None) -> KeyWithSecret:
        """Make a further key, shown once as an agent's first."""
        return await self._make(KeyWithSecret, "/v1/keys", request, idempotency_key)

    async def list_keys(self, **query: object) -> Page[Key]:
        """The keys of the subtree, without the keys."""
        return await self._read(Page[Key], "/v1/keys", query)

    iterate_keys = _iterate(list_keys)

    async def rotate_key(
        self, key_id: str, *, overlap_seconds: int = 0, idempotency_key: str | None = None
    ) -> KeyWithSecret:
        """Replace a key by a new one, shown once; the old one lives for the overlap."""
        body = {"overlap_seconds": overlap_seconds}
        return await self._make(KeyWithSecret, f"/v1/keys/{_segment(key_id)}/rotate", body, idempotency_key)

    async def revoke_key(self, key_id: str) -> Key:
        """Revoke a key at once."""
        return await self._do(Key, "DELETE", f"/v1/keys/{_segment(key_id)}", repeatable=True)

    # Tokens

    async def issue_token(self, client_id: str, client_secret: str, **form: object) -> TokenAnswer:
        """A short-lived token for an agent's id and one of its keys; `scope`, `audience`, `expires_in`, `budget_usd` narrow it."""
        asked = {"grant_type": "client_credentials", "client_id": client_id, "client_secret": client_secret}
        return await self._post_form(TokenAnswer, "/v1/token", asked | form)

    async def exchange_token(self, subject_token: str, actor_token: str | None = None, **form: object) -> TokenAnswer:
        """A narrower token made of another or of a key, for whoever acts; its subject pays (RFC 8693)."""
        asked = {"grant_type": _EXCHANGE, "subject_token": subject_token, "actor_token": actor_token}
        return await self._post_form(TokenAnswer, "/v1/token", asked | form)

    async def introspect_token(self, token: str) -> Introspection:
        """What a token or key is and may do now (RFC 7662)."""
        return await self._post_form(Introspection, "/v1/introspect", {"token": token})

    async def revoke_token(self, token: str) -> None:
        """Revoke a token or key; what is none is no error (RFC 7009)."""
        await self._connection.send("POST", "/v1/revoke", form={"token": token}, repeatable=True)

    async def read_jwks(self) -> Jwks:
        """The public keys of the tokens."""
        return await self._read(Jwks, "/.well-known/jwks.json")

    async def describe_server(self) -> ServerMetadata:
        """The metadata of the authorization server (RFC 8414)."""
        return await self._read(ServerMetadata, "/.well-known/oauth-authorization-server")

    # What can be rented

    async def list_offers(self, **query: object) -> OfferPage:
        """Search offers by the filters of `GET /v1/offers`; an empty page says why it is."""
        return await self._read(OfferPage, "/v1/offers", query)

    iterate_offers = _iterate(list_offers)

    async def get_offer(self, offer_id: str) -> Offer:
        """One offer."""
        return await self._read(Offer, f"/v1/offers/{_segment(offer_id)}")

    async def list_gpus(self, **query: object) -> Page[Gpu]:
        """GPU models, with who offers them and for how much now."""
        return await self._read(Page[Gpu], "/v1/gpus", query)

    iterate_gpus = _iterate(list_gpus)

    async def show_prices(self, model: str, **query: object) -> PriceHistory:
        """What a GPU model cost over time, per GPU and hour: `from_`, `to`, `step`, `provider`."""
        return await self._read(PriceHistory, f"/v1/gpus/{_segment(model)}/prices", query)

    async def list_providers(self, **query: object) -> Page[ProviderView]:
        """Providers: configured, healthy, how old their offers are, what they can do."""
        return await self._read(Page[ProviderView], "/v1/providers", query)

    iterate_providers = _iterate(list_providers)

    async def make_quote(self, request: Json, *, idempotency_key: str | None = None) -> Quote:
        """A price that is firm for two minutes and one pod."""
        return await self._make(Quote, "/v1/quotes", request, idempotency_key)

    # Pods

    async def create_pod(
        self,
        request: Json,
        *,
        wait: int = 0,
        until: Until = "settled",
        idempotency_key: str | None = None,
        **query: object,
    ) -> Pod:
        """Ask for a pod, and wait up to `wait` seconds (60 at the most) until it is what is waited for."""
        asked = {"wait": wait, "until": until, **query}
        return await self._make(Pod, "/v1/pods", request, idempotency_key, asked)

    async def dry_run_pod(self, request: Json) -> DryRun:
        """What a request would choose and hold; nothing is done."""
        return await self._do(DryRun, "POST", "/v1/pods", request, {"dry_run": True}, repeatable=True)

    async def get_pod(
        self, pod_id: str, *, wait: int = 0, until: Until = "settled", after_version: int | None = None
    ) -> Pod:
        """A pod now, or within `wait` seconds (60 at the most) once it is what is waited for."""
        asked = {"wait": wait, "until": until, "after_version": after_version}
        return await self._read(Pod, f"/v1/pods/{_segment(pod_id)}", asked)

    async def watch_pod(self, pod_id: str, *, gone: bool = False) -> AsyncGenerator[Pod]:
        """A pod now, at each change, and every 20 seconds, until it is settled; with `gone`, until it is terminated."""
        pod = await self.get_pod(pod_id)
        while True:
            yield pod
            if pod.state == "terminated" or (pod.settled and not gone):
                return
            pod = await self.get_pod(pod_id, wait=_WATCH_SECONDS, until="change", after_version=pod.version)

    async def list_pods(self, **query: object) -> Page[Pod]:
        """Pods of the subtree, the newest first."""
        return await self._read(Page[Pod], "/v1/pods", query)

    iterate_pods = _iterate(list_pods)

    async def list_events(self, pod_id: str, **query: object) -> Page[PodEvent]:
        """A pod's history: every state, attempt and charge."""
        return await self._read(Page[PodEvent], f"/v1/pods/{_segment(pod_id)}/events", query)

    iterate_events = _iterate(list_events)

    async def start_pod(self, pod_id: str, *, wait: int = 0) -> Pod:
        """Start a stopped pod."""
        return await self._do(Pod, "POST", f"/v1/pods/{_segment(pod_id)}/start", query={"wait": wait})

    async def stop_pod(self, pod_id: str, *, wait: int = 0) -> Pod:
        """Stop a pod, its disk kept."""
        return await self._do(Pod, "POST", f"/v1/pods/{_segment(pod_id)}/stop", query={"wait": wait})

    async def restart_pod(self, pod_id: str, *, wait: int = 0) -> Pod:
        """End a pod's program and start it anew."""
        return await self._do(Pod, "POST", f"/v1/pods/{_segment(pod_id)}/restart", query={"wait": wait})

    async def extend_pod(self, pod_id: str, request: Json) -> Pod:
        """Give a pod a longer life: new totals of `max_lifetime_seconds`, `budget_usd`, or both."""
        return await self._do(Pod, "POST", f"/v1/pods/{_segment(pod_id)}/extend", request)

    async def terminate_pod(self, pod_id: str, *, wait: int = 0) -> Pod:
        """End a pod, disk and all; again is harmless."""
        return await self._do(Pod, "DELETE", f"/v1/pods/{_segment(pod_id)}", query={"wait": wait}, repeatable=True)

    async def terminate_pods(self, **query: object) -> Page[Pod]:
        """End all pods of the subtree that match `label`, `state`, `agent_id`, `created_after`: at least one is needed.

        Those that this call ended are returned; where the answer was lost and it was sent again, only the rest.
        """
        return await self._do(Page[Pod], "DELETE", "/v1/pods", query=query, repeatable=True)

    async def read_log(self, pod_id: str, **query: object) -> str:
        """The last lines of a pod's log: `tail`, `since`."""
        return (await self._connection.send("GET", f"/v1/logs/{_segment(pod_id)}", query=query, repeatable=True)).text

    async def follow_log(self, pod_id: str, *, tail: int = 200, since: datetime | None = None) -> AsyncGenerator[str]:
        """A pod's log, line by line, until its program has ended. A stream that ends or breaks is resumed where it was."""
        query = {"follow": True, "tail": tail, "since": since}
        async with aclosing(self._connection.follow(f"/v1/logs/{_segment(pod_id)}", query)) as lines:
            async for line in lines:
                yield line

    async def execute(
        self, pod_id: str, command: list[str], *, timeout_seconds: int = 60, stdin: str | None = None
    ) -> ExecAnswer:
        """Run a command in a running pod and wait for its end, 300 seconds at the most."""
        body: dict[str, object] = {"command": command, "timeout_seconds": timeout_seconds}
        if stdin is not None:
            body["stdin"] = stdin
        return await self._do(ExecAnswer, "POST", f"/v1/exec/{_segment(pod_id)}", body, seconds=timeout_seconds + 30)

    # What was used

    async def usage(self, **query: object) -> Usage:
        """What the subtree used: `from_`, `to`, `group_by`, `pod_id`, `agent_id`."""
        return await self._read(Usage, "/v1/usage", query)

    async def list_records(self, **query: object) -> Page[UsageRecord]:
        """The intervals that were charged."""
        return await self._read(Page[UsageRecord], "/v1/usage/records", query)

    iterate_records = _iterate(list_records)

    async def get_statement(self, month: str) -> Statement:
        """The statement of a month such as `2026-11`."""
        return await self._read(Statement, f"/v1/statements/{_segment(month)}")

    async def read_statement_csv(self, month: str) -> str:
        """The items of a statement as CSV."""
        headers = {"Accept": "text/csv"}
        return (
            await self._connection.send("GET", f"/v1/statements/{_segment(month)}", headers=headers, repeatable=True)
        ).text

    async def show_limits(self) -> LimitsView:
        """The limits of the agent and its organisation, and what is used of them."""
        return await self._read(LimitsView, "/v1/limits")

    async def list_budgets(self, **query: object) -> Page[Budget]:
        """Budgets of the subtree."""
        return await self._read(Page[Budget], "/v1/budgets", query)

    iterate_budgets = _iterate(list_budgets)

    async def set_budget(self, agent_id: str, limit_usd: str, period: str = "total") -> Budget:
        """Set the limit of an agent below, or lower one's own."""
        body = {"limit_usd": limit_usd, "period": period}
        return await self._do(Budget, "PUT", f"/v1/budgets/{_segment(agent_id)}", body, repeatable=True)

    async def list_plans(self, **query: object) -> Page[Plan]:
        """What an organisation can be on."""
        return await self._read(Page[Plan], "/v1/plans", query)

    iterate_plans = _iterate(list_plans)

    async def show_subscription(self, **query: object) -> Subscription:
        """The plan of the organisation; an operator asks for another's by `org_id`."""
        return await self._read(Subscription, "/v1/subscription", query)

    async def change_subscription(self, plan: str, **query: object) -> Subscription:
        """Put the organisation on a plan: an operator on any, its root agent on a lesser one."""
        return await self._do(Subscription, "PUT", "/v1/subscription", {"plan": plan}, query, repeatable=True)

    async def cancel_subscription(self, **query: object) -> Subscription:
        """Put the organisation on the free plan: now, or with `at_period_end`."""
        return await self._do(Subscription, "DELETE", "/v1/subscription", None, query, repeatable=True)

    # Commands as events

    async def send_commands(self, events: Sequence[Json]) -> CommandAnswers:
        """Carry out CloudEvents (`specversion id source type data`), each once by its source and id, and say what became of it."""
        headers = {"Content-Type": "application/cloudevents-batch+json"}
        answer = await self._connection.send("POST", "/v1/intake", body=events, headers=headers, repeatable=True)
        return parse(CommandAnswers, answer)

    # The wire

    async def _read(self, model: type[M], path: str, query: Json | None = None) -> M:
        return parse(model, await self._connection.send("GET", path, query=query, repeatable=True))

    async def _make(self, model: type[M], path: str, body: Json, key: str | None, query: Json | None = None) -> M:
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        return parse(
            model, await self._connection.send("POST", path, body=body, query=query, headers=headers, repeatable=True)
        )

    async def _do(
        self,
        model: type[M],
        method: str,
        path: str,
        body: Json | None = None,
        query: Json | None = None,
        *,
        seconds: float = TIMEOUT_SECONDS,
        repeatable: bool = False,
    ) -> M:
        answer = await self._connection.send(
            method, path, body=body, query=query, seconds=seconds, repeatable=repeatable
        )
        return parse(model, answer)

    async def _post_form(self, model: type[M], path: str, form: Json) -> M:
        return parse(model, await self._connection.send("POST", path, form=form, repeatable=True))


def _segment(name: str) -> str:
    """One segment of a path, whatever is in it."""
    return quote(name, safe="")


async def _break_off() -> None:
    """End all that is under way in this loop."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def _sync(method: Callable[Concatenate[AsyncClient, P], Awaitable[T]]) -> Callable[Concatenate["Client", P], T]:
    """The same method for the sync client: same arguments, same documentation, and it waits."""

    def call(self: "Client", *args: P.args, **kwargs: P.kwargs) -> T:
        return self.run(method(self.inner, *args, **kwargs))

    call.__name__, call.__doc__ = method.__name__, method.__doc__
    return call


def _sync_iterator(
    method: Callable[Concatenate[AsyncClient, P], AsyncGenerator[T]],
) -> Callable[Concatenate["Client", P], Generator[T]]:
    """The same for a method that yields one thing after another."""

    def walk(self: "Client", *args: P.args, **kwargs: P.kwargs) -> Generator[T]:
        items = method(self.inner, *args, **kwargs)
        try:
            while True:
                try:
                    item = self.run(anext(items))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if not self.is_closed:
                self.run(items.aclose())

    walk.__name__, walk.__doc__ = method.__name__, method.__doc__
    return walk


class Client:
    """The same client for code that is not async. Its methods are those of `AsyncClient`, and wait.

    Its event loop has a thread of its own, so that Ctrl-C breaks off the waiting and never the loop, and so that it can be
    used where an event loop runs already.
    """

    def __init__(self, url: str | None = None, key: str | None = None, *, on_answer: Hook | None = None) -> None:
        self.inner = AsyncClient(url, key, on_answer=on_answer)
        self.is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gpubroker-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, work: Awaitable[T]) -> T:
        """Wait for something that is async. What Ctrl-C breaks off has ended when this raises."""

        async def wait() -> T:
            return await work

        begun = asyncio.run_coroutine_threadsafe(wait(), self._loop)
        try:
            return begun.result()
        except KeyboardInterrupt:
            asyncio.run_coroutine_threadsafe(_break_off(), self._loop).result()
            raise

    def close(self) -> None:
        """Let go of connections; again is harmless."""
        if not self.is_closed:
            self.run(self.inner.close())
            self.is_closed = True
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    whoami = _sync(AsyncClient.whoami)
    create_agent = _sync(AsyncClient.create_agent)
    list_agents = _sync(AsyncClient.list_agents)
    iterate_agents = _sync_iterator(AsyncClient.iterate_agents)
    get_agent = _sync(AsyncClient.get_agent)
    change_agent = _sync(AsyncClient.change_agent)
    revoke_agent = _sync(AsyncClient.revoke_agent)
    create_key = _sync(AsyncClient.create_key)
    list_keys = _sync(AsyncClient.list_keys)
    iterate_keys = _sync_iterator(AsyncClient.iterate_keys)
    rotate_key = _sync(AsyncClient.rotate_key)
    revoke_key = _sync(AsyncClient.revoke_key)
    issue_token = _sync(AsyncClient.issue_token)
    exchange_token = _sync(AsyncClient.exchange_token)
    introspect_token = _sync(AsyncClient.introspect_token)
    revoke_token = _sync(AsyncClient.revoke_token)
    read_jwks = _sync(AsyncClient.read_jwks)
    describe_server = _sync(AsyncClient.describe_server)
    list_offers = _sync(AsyncClient.list_offers)
    iterate_offers = _sync_iterator(AsyncClient.iterate_offers)
    get_offer = _sync(AsyncClient.get_offer)
    list_gpus = _sync(AsyncClient.list_gpus)
    iterate_gpus = _sync_iterator(AsyncClient.iterate_gpus)
    show_prices = _sync(AsyncClient.show_prices)
    list_providers = _sync(AsyncClient.list_providers)
    iterate_providers = _sync_iterator(AsyncClient.iterate_providers)
    make_quote = _sync(AsyncClient.make_quote)
    create_pod = _sync(AsyncClient.create_pod)
    dry_run_pod = _sync(AsyncClient.dry_run_pod)
    get_pod = _sync(AsyncClient.get_pod)
    watch_pod = _sync_iterator(AsyncClient.watch_pod)
    list_pods = _sync(AsyncClient.list_pods)
    iterate_pods = _sync_iterator(AsyncClient.iterate_pods)
    list_events = _sync(AsyncClient.list_events)
    iterate_events = _sync_iterator(AsyncClient.iterate_events)
    start_pod = _sync(AsyncClient.start_pod)
    stop_pod = _sync(AsyncClient.stop_pod)
    restart_pod = _sync(AsyncClient.restart_pod)
    extend_pod = _sync(AsyncClient.extend_pod)
    terminate_pod = _sync(AsyncClient.terminate_pod)
    terminate_pods = _sync(AsyncClient.terminate_pods)
    read_log = _sync(AsyncClient.read_log)
    follow_log = _sync_iterator(AsyncClient.follow_log)
    execute = _sync(AsyncClient.execute)
    usage = _sync(AsyncClient.usage)
    list_records = _sync(AsyncClient.list_records)
    iterate_records = _sync_iterator(AsyncClient.iterate_records)
    get_statement = _sync(AsyncClient.get_statement)
    read_statement_csv = _sync(AsyncClient.read_statement_csv)
    show_limits = _sync(AsyncClient.show_limits)
    list_budgets = _sync(AsyncClient.list_budgets)
    iterate_budgets = _sync_iterator(AsyncClient.iterate_budgets)
    set_budget = _sync(AsyncClient.set_budget)
    list_plans = _sync(AsyncClient.list_plans)
    iterate_plans = _sync_iterator(AsyncClient.iterate_plans)
    show_subscription = _sync(AsyncClient.show_subscription)
    change_subscription = _sync(AsyncClient.change_subscription)
    cancel_subscription = _sync(AsyncClient.cancel_subscription)
    send_commands = _sync(AsyncClient.send_commands)
