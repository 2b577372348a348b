"""One host and one credential: requests that are sent again where that is safe, streams that are resumed, errors in one form.

Nothing here shows the credential: not a repr, not an exception, not a variable of a frame in a traceback.
"""

import asyncio
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar, cast

import httpx
from pydantic import BaseModel

from gpubroker import bundle
from gpubroker.errors import GpubrokerError, SetupError
from gpubroker.times import format_time

M = TypeVar("M", bound=BaseModel)

Json = Mapping[str, Any]
Hook = Callable[[httpx.Response], Awaitable[None]]

TIMEOUT_SECONDS: Final = 90.0
_CONNECT_SECONDS: Final = 10.0
_HEARTBEAT_SECONDS: Final = 60.0
_KEEP_SECONDS: Final = 3.0  # less than servers do: a request on a connection that is just being closed is lost
_TRIES: Final = 4
_FOLLOW_TRIES: Final = 8
_PATIENCE_SECONDS: Final = 30.0
"""A call pauses between its tries for so long at the most; where the broker asks for more, the error says so instead."""
_FIRST_PAUSE_SECONDS: Final = 0.25
_CREDENTIAL: Final = re.compile(r"[\x21-\x7e]+")
_MAYBE_DONE: Final = "It may have been done all the same: look before you ask again."
_TOO_MANY: Final = 429
_UNAVAILABLE: Final = 503
_MAY_PASS: Final = frozenset({0, 502, _UNAVAILABLE, 504})


class BrokerError(GpubrokerError):
    """An error answer, or none: `status` is 0 then, `code` is `unreachable` or `no_answer`.

    `problem` is the whole document: type, title, status, detail, code, retryable, request_id, hint and what else belongs to
    the code. `retry_after` is seconds. `nothing_done`: the same call may be made again, whatever it does.
    """

    def __init__(
        self, problem: Mapping[str, Any], *, retry_after: float | None = None, nothing_done: bool = False
    ) -> None:
        self.problem = dict(problem)
        self.status = int(problem.get("status") or 0)
        self.code = str(problem.get("code") or problem.get("error") or "unknown")
        self.detail = str(problem.get("detail") or problem.get("error_description") or problem.get("title") or "")
        self.hint = str(problem.get("hint") or "")
        self.retry_after = retry_after
        self.nothing_done = nothing_done
        super().__init__(f"{self.status} {self.code}: {self.detail}")

    @property
    def may_pass(self) -> bool:
        """Say whether the same call may succeed later."""
        return self.nothing_done or self.status in _MAY_PASS or self.code == "idempotency_in_progress"


class _Bearer(httpx.Auth):
    """Adds the credential as a request is sent, so that it stands in no variable that a traceback could show."""

    def __init__(self, key: str) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response]:
        request.headers["Authorization"] = f"Bearer {self._key}"
        yield request


class Connection:
    """The way to a broker. Raises SetupError for an address or a credential that is missing or cannot be.

    The URL is one host for all functions, or has `{function}` in it where each has its own.
    """

    def __init__(self, url: str | None, key: str | None, on_answer: Hook | None) -> None:
        self.url, credential = _check_access(url, key)
        self._auth = _Bearer(credential)
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(TIMEOUT_SECONDS, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(keepalive_expiry=_KEEP_SECONDS),
            event_hooks={"response": [on_answer]} if on_answer else {},
        )

    async def close(self) -> None:
        """Let go of connections."""
        await self._http.aclose()

    async def send(
        self,
        method: str,
        path: str,
        *,
        body: Json | Sequence[Json] | None = None,
        form: Json | None = None,
        query: Json | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float = TIMEOUT_SECONDS,
        repeatable: bool,
    ) -> httpx.Response:
        """Send until it is answered well. Raises the BrokerError of the last try, or of one that must not be repeated."""
        request = self._http.build_request(
            method,
            _address(self.url, path),
            params=_write_query(query or {}),
            json=body,
            data=None if form is None else _write_query(form),
            headers=headers,
            timeout=httpx.Timeout(seconds, connect=_CONNECT_SECONDS),
        )
        for failures in range(1, _TRIES + 1):
            try:
                return await self._try(request)
            except BrokerError as error:
                may_repeat = error.nothing_done or (repeatable and error.may_pass)
                if failures == _TRIES or not may_repeat or (error.retry_after or 0) * failures > _PATIENCE_SECONDS:
                    raise
                await _pause(error, failures)
        raise AssertionError

    async def _try(self, request: httpx.Request) -> httpx.Response:
        try:
            answer = await self._http.send(request, auth=self._auth)
        except httpx.HTTPError as error:
            raise _unheard(self.url, error) from None
        if not answer.is_success:
            raise _as_error(answer)
        return answer

    async def follow(self, path: str, query: Json) -> AsyncGenerator[str]:
        """The data of server-sent events up to the event `end`; a stream that ends or breaks is resumed where it was."""
        last, failures = "", 0
        while True:
            try:
                async with aclosing(self._stream(path, query, last)) as events:
                    async for event in events:
                        if event.get("event") == "end":
                            return
                        last, failures = event.get("id", last), 0
                        if "data" in event:
                            yield event["data"]
                ended = BrokerError({"detail": "The stream ended."}, retry_after=0)
            except BrokerError as error:
                failures += 1
                if failures == _FOLLOW_TRIES or not error.may_pass:
                    raise
                ended = error
            await _pause(ended, failures)

    async def _stream(self, path: str, query: Json, last_id: str) -> AsyncGenerator[dict[str, str]]:
        """One stream of events to its end. Raises BrokerError for an error answer and for a stream that breaks."""
        request = self._http.build_request(
            "GET",
            _address(self.url, path),
            params=_write_query(query),
            headers={"Last-Event-ID": last_id} if last_id else None,
            timeout=httpx.Timeout(_HEARTBEAT_SECONDS, connect=_CONNECT_SECONDS),
        )
        try:
            answer = await self._http.send(request, auth=self._auth, stream=True)
            try:
                if not answer.is_success:
                    await answer.aread()
                    raise _as_error(answer)
                async for event in _read_events(answer.aiter_bytes()):
                    yield event
            finally:
                await answer.aclose()
        except httpx.HTTPError as error:
            raise _unheard(self.url, error) from None


def parse(model: type[M], answer: httpx.Response) -> M:
    """Read an answer as a resource. Raises BrokerError where it is none, in words without its values: they may be secrets."""
    try:
        return model.model_validate(answer.json())
    except ValueError:
        raise _foreign(answer) from None


def _check_access(url: str | None, key: str | None) -> tuple[str, str]:
    """Raises SetupError, naming all that is missing, and never the key."""
    missing = [] if url else ["GPUBROKER_URL (the broker's address, such as http://127.0.0.1:8080)"]
    missing += [] if key else ["GPUBROKER_API_KEY (a key such as 'gpubroker bootstrap' prints)"]
    if not url or not key:
        raise SetupError(f"set {' and '.join(missing)}", code=2)
    try:
        parsed = httpx.URL(_address(url, "/"))
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query or parsed.fragment:
        raise SetupError("GPUBROKER_URL is no address such as http://127.0.0.1:8080", code=2)
    if not _CREDENTIAL.fullmatch(key.strip()):
        raise SetupError("GPUBROKER_API_KEY holds characters that no key has", code=2)
    return url.rstrip("/"), key.strip()


def _address(url: str, path: str) -> str:
    if "{function}" not in url:
        return url.rstrip("/") + path
    served = [f for f in bundle.FUNCTIONS for prefix in f.paths if f"{path}/".startswith(f"{prefix}/")]
    return url.rstrip("/").replace("{function}", served[0].name if served else "auth") + path


def _write_query(query: Json) -> dict[str, Any]:
    """Without what is None; `from_` is `from`, and times are as the interface writes them."""
    return {
        name.rstrip("_"): format_time(value) if isinstance(value, datetime) else value
        for name, value in query.items()
        if value is not None
    }


async def _pause(error: BrokerError, failures: int) -> None:
    """As long as the answer says, else longer each time; a little more, so that many clients do not come at once."""
    seconds = error.retry_after if error.retry_after is not None else _FIRST_PAUSE_SECONDS * 2 ** (failures - 1)
    await asyncio.sleep(seconds + random.uniform(0, 0.1) * (1 + seconds))  # noqa: S311 - no secret hangs on it


def _unheard(url: str, error: httpx.HTTPError) -> BrokerError:
    """What became of a request that got no answer. Its own words are left out: they may hold a header."""
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)):
        detail = f"{url} cannot be reached: {str(error) or type(error).__name__}."
        problem = {
            "status": 0,
            "code": "unreachable",
            "detail": detail,
            "hint": "Check the address, and whether it runs.",
        }
        return BrokerError(problem, nothing_done=True)
    detail = f"{url} gave no answer ({type(error).__name__})."
    return BrokerError({"status": 0, "code": "no_answer", "detail": detail, "hint": _MAYBE_DONE})


def _as_error(answer: httpx.Response) -> BrokerError:
    try:
        problem: object = answer.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict) or not {"code", "error"} & set(cast("dict[str, Any]", problem)):
        return _foreign(answer)
    told = {"status": answer.status_code} | cast("dict[str, Any]", problem)
    retry_after = _read_retry_after(answer.headers.get("Retry-After"))
    # 503 without Retry-After is a proxy's word, and it may have lost an answer.
    nothing_done = answer.status_code == _TOO_MANY or (answer.status_code == _UNAVAILABLE and retry_after is not None)
    return BrokerError(told, retry_after=retry_after, nothing_done=nothing_done)


def _foreign(answer: httpx.Response) -> BrokerError:
    """An answer that is not the broker's: a proxy's page, or another server altogether."""
    kind = answer.headers.get("Content-Type", "nothing").partition(";")[0]
    moved = answer.headers.get("Location") if answer.is_redirect else None
    detail = f"{answer.url.copy_with(query=None)} answered {answer.status_code} with {kind}, not as a gpubroker does."
    hint = f"It points to {moved}: set GPUBROKER_URL to where that is." if moved else "Check GPUBROKER_URL."
    problem = {"status": answer.status_code, "code": "not_the_broker", "detail": detail, "hint": hint}
    return BrokerError(problem, retry_after=_read_retry_after(answer.headers.get("Retry-After")))


def _read_retry_after(text: str | None) -> float | None:
    """Seconds, from seconds or from an HTTP date."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


async def _read_events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[dict[str, str]]:
    """The fields of each block of server-sent events; a comment alone, such as a heartbeat, is an empty one.

    A block that breaks off is left out. Lines are parted here, as httpx would part them at form feeds and the like too.
    """
    event: dict[str, str] = {}
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            name, _, value = line.removesuffix(b"\r").decode(errors="replace").partition(":")
            if name:
                value = value.removeprefix(" ")
                event[name] = f"{event[name]}\n{value}" if name == "data" and "data" in event else value
            elif not value:
                yield event
                event = {}
