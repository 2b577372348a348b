"""OAuth 2 client credentials: a short-lived token for an id and a secret, renewed as it ends, and once when it is refused."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Final

import httpx

from gpubroker.errors import CredentialRefused, ProviderError, Throttled
from gpubroker.providers.http.answers import Answer
from gpubroker.providers.http.reading import Document

_EARLY_SECONDS: Final = 60.0
"""A token is renewed so long before its end."""
_UNAUTHORIZED: Final = 401
_REFUSED: Final = frozenset({400, _UNAUTHORIZED, 403})
_TOO_MANY: Final = 429


class ClientCredentials(httpx.Auth):
    """The token is asked for at `path` below the base address. It is a secret as the credential is, and is in no repr.

    Raises CredentialRefused or Throttled where the token is refused. Whatever else fails, the request was not sent: ConnectError.
    """

    def __init__(self, path: str, client_id: str, client_secret: str) -> None:
        self._path = path
        self._body = {"grant_type": "client_credentials", "client_id": client_id, "client_secret": client_secret}
        self._token = ""
        self._renew_at = 0.0
        self._lock = asyncio.Lock()

    @property
    def secrets(self) -> tuple[str, ...]:
        """The token, while there is one."""
        return (self._token,) if self._token else ()

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Send with the token; with a new one when it is refused before its time. A refused request did nothing."""
        async with self._lock:
            if time.monotonic() >= self._renew_at:
                await self._take((yield self._ask(request)))
            used = self._token
        request.headers["Authorization"] = f"Bearer {used}"
        response = yield request
        if response.status_code != _UNAUTHORIZED:
            return
        async with self._lock:
            if self._token == used:  # nobody renewed it meanwhile
                await self._take((yield self._ask(request)))
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request

    def _ask(self, request: httpx.Request) -> httpx.Request:
        base, timeout = request.extensions["base_url"], request.extensions["timeout"]
        return httpx.Request("POST", f"{base}{self._path}", json=self._body, extensions={"timeout": timeout})

    async def _take(self, response: httpx.Response) -> None:
        answer = Answer(response.status_code, response.headers, await response.aread())
        if answer.status in _REFUSED:
            raise CredentialRefused("credential_refused", "no token was given for the client's id and secret")
        if answer.status == _TOO_MANY:
            raise Throttled("throttled", "no token was given", wait=answer.wait_seconds())
        try:
            self._token, lasts = _read(answer.document())
        except ProviderError:
            raise httpx.ConnectError("no token was given") from None
        self._renew_at = time.monotonic() + lasts - _EARLY_SECONDS


def _read(said: Document) -> tuple[str, float]:
    """The token and how long it lasts, in seconds; one that does not say is used until it is refused."""
    return said.text("access_token"), said.number("expires_in") if said.has("expires_in") else float("inf")
