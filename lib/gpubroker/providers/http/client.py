"""Calls to one vendor: its credential goes to its own origin and nowhere else, and each kind of call has its own patience.

- `offers`, `read`: asked again when the vendor does not answer, or answers 5xx.
- `act`: asked again only where the vendor's contract makes a repetition harmless, or when nothing was sent.
- `create`: sent once. A clear refusal is Rejected; anything else but a readable success is AmbiguousOutcome.
"""

import asyncio
import random
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ssl import SSLContext
from typing import Any, Final, Literal, NoReturn, TypeVar

import httpx

from gpubroker.errors import (
    AmbiguousOutcome,
    CredentialRefused,
    InstanceNotFound,
    ProviderError,
    Rejected,
    SetupError,
    Throttled,
)
from gpubroker.providers.http.answers import Answer, Secrets, judge
from gpubroker.providers.http.breakers import Breakers, Kind
from gpubroker.providers.http.buckets import Buckets, Limit
from gpubroker.providers.http.oauth import ClientCredentials

T = TypeVar("T")
Judge = Callable[[Kind, Answer], ProviderError | None]
Manner = Literal["repeatable", "once", "urgent"]
Query = Mapping[str, str | int | list[str]]

_MIB: Final = 1024 * 1024
_CONNECT_SECONDS: Final = 5.0
_KEEP_SECONDS: Final = 3.0  # less than servers do: a request on a connection that is just being closed is lost
_TRIES: Final = 3
_PATIENCE: Final[Mapping[Kind, float]] = {"offers": 20.0, "read": 8.0, "act": 8.0, "create": 15.0}
"""So long a call waits for its turn under the vendor's rate limits."""
_NOT_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)
_CLEAR: Final = (Rejected, Throttled, CredentialRefused, AmbiguousOutcome)
_SHORTEST_SECRET: Final = 4
_TRICKLE_BYTES: Final = 4096


class Header(httpx.Auth):
    """A credential in a header. It is added as a request is sent, and is in no repr."""

    def __init__(self, name: str, value: str) -> None:
        self._name, self._value = name, value

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response]:
        """Add it."""
        request.headers[self._name] = self._value
        yield request


class _Failed(Exception):
    """One try failed: what that means, whether anything was sent, whether another try may help."""

    def __init__(self, error: ProviderError, *, sent: bool, may_pass: bool) -> None:
        super().__init__(error.code)
        self.error, self.sent, self.may_pass = error, sent, may_pass


class Client:
    """The way to one vendor's account. `secrets` are hidden in whatever is shown of an answer."""

    def __init__(
        self,
        provider: str,
        base_url: str,
        auth: httpx.Auth,
        *,
        limits: Mapping[str, Limit],
        seconds: Mapping[Kind, float],
        judge_first: Judge,
        secrets: Iterable[str],
    ) -> None:
        self.provider = provider
        self.base_url = base_url.rstrip("/")
        self.origin = _origin(base_url)
        self.seconds = dict(seconds)
        """The longest that a whole call lasts, tries and pauses included."""
        self.read_seconds = 20.0
        """The longest silence while an answer is on its way; of a create, the whole call's time is."""
        self.largest: dict[Kind, int] = {"offers": 64 * _MIB, "read": 16 * _MIB, "act": 16 * _MIB, "create": 16 * _MIB}
        """Bytes of an answer, which takes seven times that when it is read; one that is larger is not read on."""
        self.largest_result = 64 * _MIB
        """Bytes of what the vendor put elsewhere, such as a log; it stays as it is."""
        self.pause_seconds = 0.25
        """The first pause between two tries, about."""
        self.poll_seconds = 0.3
        """Between two looks for a result that will be put somewhere."""
        self.clock_seconds: float | None = None
        """How far the vendor's clock was ahead of ours at its last answer that said its time."""
        self.breakers = Breakers(provider)
        self.buckets = Buckets(provider, dict(limits))
        self._judge = judge_first
        self._auth = auth
        self._secrets = _worth_hiding(secrets)
        self._http = httpx.AsyncClient(
            verify=_tls(),
            trust_env=False,
            follow_redirects=False,
            headers={"User-Agent": "gpubroker"},
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            limits=httpx.Limits(keepalive_expiry=_KEEP_SECONDS),
        )

    async def close(self) -> None:
        """Let go of connections."""
        await self._http.aclose()

    async def call(
        self,
        kind: Kind,
        method: str,
        path: str,
        *,
        read: Callable[[Answer], T],
        query: Query | None = None,
        body: object = None,
        instance_id: str | None = None,
        manner: Manner = "repeatable",
        limits: Sequence[str] = ("calls",),
        hidden: Iterable[str] = (),
    ) -> T:
        """Call and read the answer. Raises ProviderErrors only.

        `instance_id`: a 404 means that this one is not known. `manner` is an act's contract: `once` may not be repeated,
        `urgent` may be, and passes an open breaker, as the end of an instance must. `limits` are the rate limits that the
        call counts against. `hidden` are secrets in the body, which an error may repeat.
        """
        if manner != "urgent":
            self._pass_breaker(kind)
        await self.buckets.take(*limits, patience_seconds=_PATIENCE[kind])
        request = self._request(kind, method, path, query, body)
        tries = _TRIES if kind != "create" and manner != "once" else 1
        secrets = Secrets((*self._secrets, *_worth_hiding(hidden)))
        try:
            async with asyncio.timeout(self.seconds[kind]):
                answer = await self._send(kind, request, tries, secrets, instance_id, limits)
            result = read(answer)
        except TimeoutError:
            await self.breakers.fail(kind)
            _raise_unknown(kind, ProviderError("timeout", f"{method} {path}"))
        except _Failed as failed:
            await (self.breakers.succeed(kind) if _is_alive(failed.error) else self.breakers.fail(kind))
            if not failed.sent and kind == "create":
                raise Rejected("unreachable", failed.error.detail) from None
            if not failed.sent:
                raise failed.error from None
            _raise_unknown(kind, failed.error)
        except ProviderError as error:  # of `read`
            await (self.breakers.succeed(kind) if isinstance(error, _CLEAR) else self.breakers.fail(kind))
            _raise_unknown(kind, error)
        await self.breakers.succeed(kind)
        return result

    def _pass_breaker(self, kind: Kind) -> None:
        wait = self.breakers.wait(kind)
        if wait <= 0:
            return
        detail = f"{self.provider} failed too often; the next call is in {wait:.0f} s"
        raise Rejected("breaker_open", detail) if kind == "create" else Throttled("breaker_open", detail, wait=wait)

    def _request(self, kind: Kind, method: str, path: str, query: Query | None, body: object) -> httpx.Request:
        url = httpx.URL(self.base_url + path)
        if _origin(url) != self.origin:
            raise ProviderError("bad_path", "an instance's name leads away from the vendor")
        silence = self.seconds[kind] if kind == "create" else self.read_seconds
        timeout = httpx.Timeout(silence, connect=_CONNECT_SECONDS)
        return self._http.build_request(
            method,
            url,
            params=None if query is None else dict(query),
            json=body,
            timeout=timeout,
            extensions={"base_url": self.base_url},
        )

    async def _send(
        self,
        kind: Kind,
        request: httpx.Request,
        tries: int,
        secrets: Secrets,
        instance_id: str | None,
        limits: Sequence[str],
    ) -> Answer:
        for n in range(1, _TRIES + 1):
            try:
                return await self._try(kind, request, secrets, instance_id)
            except _Failed as failed:
                may_repeat = n < tries or (not failed.sent and kind != "create" and n < _TRIES)
                if not (may_repeat and failed.may_pass):
                    raise
                wait = failed.error.wait if isinstance(failed.error, Throttled) else 0.0
                await asyncio.sleep(max(wait, self.pause_seconds * 2 ** (n - 1) * random.uniform(0.5, 1.5)))  # noqa: S311 - no secret
                try:
                    await self.buckets.take(*limits, patience_seconds=_PATIENCE[kind])
                except Throttled:
                    raise failed from None
        raise AssertionError

    async def _try(self, kind: Kind, request: httpx.Request, secrets: Secrets, instance_id: str | None) -> Answer:
        try:
            response = await self._http.send(request, auth=self._auth, stream=True)
            try:
                body = await _read_body(response, self.largest[kind])
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            has_token = not isinstance(self._auth, ClientCredentials) or "Authorization" in request.headers
            sent = has_token and not isinstance(error, _NOT_SENT)
            said = f"{type(error).__name__} at {request.method} {request.url.path}"
            raise _Failed(
                ProviderError("no_answer" if sent else "unreachable", said), sent=sent, may_pass=True
            ) from None
        if isinstance(self._auth, ClientCredentials):
            secrets = Secrets((*secrets, *self._auth.secrets))
        answer = Answer(response.status_code, response.headers, body, secrets)
        self.clock_seconds = answer.clock_seconds()
        if answer.is_success:
            return answer
        error = self._judge(kind, answer) or judge(kind, answer, instance_id)
        is_short = isinstance(error, Throttled) and error.wait <= 1 and kind in {"offers", "read"}
        raise _Failed(error, sent=True, may_pass=answer.may_pass or is_short)

    async def read_stream(self, path: str, *, query: Query, instance_id: str, quiet_seconds: float, cap: int) -> bytes:
        """What a stream that may never end says: until it is silent or slow for `quiet_seconds`, ends, or said `cap` bytes.

        What there was comes at once; signs of life and new lines that trickle in after it are not waited for.
        """
        self._pass_breaker("read")
        await self.buckets.take("calls", patience_seconds=_PATIENCE["read"])
        request = self._request("read", "GET", path, query, None)
        request.headers["Accept"] = "text/event-stream"
        said, began, counted = bytearray(), False, 0
        try:
            async with asyncio.timeout(self.seconds["read"]) as limit:
                response = await self._http.send(request, auth=self._auth, stream=True)
                try:
                    if not response.is_success:
                        answer = Answer(
                            response.status_code,
                            response.headers,
                            await _read_body(response, self.largest["read"]),
                            self._secrets,
                        )
                        raise self._judge("read", answer) or judge("read", answer, instance_id)
                    end, began = limit.when() or 0.0, True
                    limit.reschedule(min(end, asyncio.get_running_loop().time() + quiet_seconds))
                    async for chunk in response.aiter_bytes():
                        said += chunk
                        if len(said) > cap:
                            break
                        if len(said) - counted >= _TRICKLE_BYTES:
                            limit.reschedule(min(end, asyncio.get_running_loop().time() + quiet_seconds))
                            counted = len(said)
                finally:
                    await response.aclose()
        except TimeoutError:
            if not began:
                raise ProviderError("timeout", f"GET {path}") from None
        except httpx.HTTPError as error:
            if not said:
                raise ProviderError("no_answer", f"{type(error).__name__} at {path}") from None
        return bytes(said[:cap])

    async def fetch_result(self, url: str, hosts: Collection[str], cap: int) -> Answer:
        """Get what the vendor put elsewhere: https and a host of the list, or the vendor's own origin; no header is sent.

        A host that begins with a point means every host below it.
        """
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL:
            raise ProviderError("bad_result_url", "the result's address is none") from None
        listed = any(address.host == host or (host[0] == "." and address.host.endswith(host)) for host in hosts)
        is_allowed = address.scheme == "https" and listed and address.port in {None, 443} and not address.userinfo
        if not is_allowed and (_origin(address) != self.origin or address.userinfo):
            raise ProviderError("bad_result_url", f"results are not fetched from {address.host}")
        try:
            async with asyncio.timeout(self.seconds["read"]):
                request = self._http.build_request("GET", address, timeout=httpx.Timeout(self.read_seconds))
                response = await self._http.send(request, auth=None, stream=True)
                try:
                    return Answer(
                        response.status_code, response.headers, await _read_body(response, cap), self._secrets
                    )
                finally:
                    await response.aclose()
        except (httpx.HTTPError, TimeoutError) as error:
            raise ProviderError("no_answer", f"{type(error).__name__} at a result's address") from None

    async def await_result(self, url: str, hosts: Collection[str], seconds: float) -> bytes | None:
        """What the vendor will have put there; None when nothing is there in time. Until then the answer is 403 or 404."""
        until = time.monotonic() + seconds
        while not (answer := await self.fetch_result(url, hosts, self.largest_result)).is_success:
            if time.monotonic() >= until:
                return None
            await asyncio.sleep(self.poll_seconds)
        return answer.body


async def _read_body(response: httpx.Response, cap: int) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > cap:
            raise httpx.DecodingError("the answer is too large")
    return bytes(body)


def _raise_unknown(kind: Kind, error: ProviderError) -> NoReturn:
    """What went wrong with a call that was sent: of what changes something nobody knows whether it did."""
    if kind in {"create", "act"} and not isinstance(error, (*_CLEAR, InstanceNotFound)):
        raise AmbiguousOutcome(error.code, error.detail) from None
    raise error from None


def _is_alive(error: ProviderError) -> bool:
    """Whether this answer shows a vendor that works."""
    is_refusal = isinstance(error, (Rejected, Throttled, CredentialRefused, InstanceNotFound))
    return is_refusal or error.code.startswith("http_4")


def _worth_hiding(secrets: Iterable[str]) -> Secrets:
    return Secrets(secret for secret in secrets if len(secret) >= _SHORTEST_SECRET)


def _origin(url: httpx.URL | str) -> str:
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL:
        raise SetupError("the address of a provider is none") from None
    port = address.port or {"https": 443, "http": 80}.get(address.scheme, 0)
    return f"{address.scheme}://{address.host}:{port}"


@cache
def _tls() -> SSLContext:
    return httpx.create_ssl_context()


def address(provider: str, given: str | None, usual: str) -> str:
    """The base address: the vendor's own, or what `GPUBROKER_<PROVIDER>_URL` says. Raises SetupError for one that cannot be."""
    if given is None:
        return usual
    try:
        url: Any = httpx.URL(given)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in {"http", "https"} or not url.host or url.userinfo or url.query or url.fragment:
        msg = f"GPUBROKER_{provider.upper()}_URL must be an http or https address without credentials and query"
        raise SetupError(msg)
    return given
