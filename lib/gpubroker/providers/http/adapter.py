"""What every adapter of a vendor with an HTTP interface is made of, beside the vendor itself: the names below are its parts."""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, Final, Self, TypeVar

import httpx

from gpubroker.config import Settings
from gpubroker.errors import CredentialRefused, ProviderError, Rejected, Throttled
from gpubroker.providers.base import Instance, Provider
from gpubroker.providers.http.answers import Answer
from gpubroker.providers.http.breakers import Kind
from gpubroker.providers.http.buckets import Limit
from gpubroker.providers.http.client import Client, Header, Manner, address
from gpubroker.providers.http.reading import Document

__all__ = ["Answer", "Document", "Header", "HttpProvider", "Kind", "Limit", "before_create"]

T = TypeVar("T")

_TURN_SECONDS: Final = {"call": 10, "create": 20}
"""What is kept of a call's limit for the wait for its turn under the vendor's rate limits."""
_LISTING_SECONDS: Final = 50.0  # less than those who ask for offers wait


class HttpProvider(Provider):
    """A provider behind one base URL, with credentials from variables. A subclass says which, and how they are sent."""

    base_url: ClassVar[str]
    """As the vendor documents it; `GPUBROKER_<NAME>_URL` replaces it."""
    limits: ClassVar[Mapping[str, Limit]] = {}
    """Its rate limits; a call counts against `calls` unless it says another."""

    def __init__(self, http: Client, identity: str) -> None:
        self.http = http
        self._identity = identity

    @classmethod
    def sign(cls, *credentials: str) -> httpx.Auth:
        """How requests are signed, from the values of `credentials` in their order: by a bearer where nothing else is said."""
        return Header("Authorization", f"Bearer {credentials[0]}")

    @classmethod
    def judge(cls, kind: Kind, answer: Answer) -> ProviderError | None:
        """What an answer that is no success means at this vendor alone; None: what it means anywhere."""
        del kind, answer
        return None

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Read the credentials, `GPUBROKER_<NAME>_URL` and `GPUBROKER_<NAME>_ACCOUNT`."""
        settings.need(*cls.credentials)
        prefix = f"GPUBROKER_{cls.name.upper()}"
        secrets = tuple(settings.variable(name) or "" for name in cls.credentials)
        can = cls.capabilities
        http = Client(
            cls.name,
            address(cls.name, settings.variable(f"{prefix}_URL"), cls.base_url),
            cls.sign(*secrets),
            limits=cls.limits,
            seconds={
                "offers": _LISTING_SECONDS,
                "read": can.call_limit_seconds - _TURN_SECONDS["call"],
                "act": can.call_limit_seconds - _TURN_SECONDS["call"],
                "create": can.create_limit_seconds - _TURN_SECONDS["create"],
            },
            judge_first=cls.judge,
            secrets=secrets,
        )
        return cls(http, settings.variable(f"{prefix}_ACCOUNT") or _fingerprint(cls.name, secrets))

    async def account(self) -> str:
        """What `GPUBROKER_<NAME>_ACCOUNT` says, else a fingerprint of the credential: for vendors that do not say who we are.

        Another credential is another account then, unless the variable says that it is the same.
        """
        return self._identity

    @abstractmethod
    async def list_ours(self) -> Sequence[Instance]:
        """Every instance of the account with a reference of any owner: all pages, or an error."""

    async def find_by_ref(self, ref: str) -> Sequence[Instance]:
        """Found in the listing, for vendors that have no filter."""
        return [instance for instance in await self.list_ours() if instance.ref == ref]

    async def list_managed(self, owner: str) -> Sequence[Instance]:
        """Those of the listing that are the owner's."""
        return [instance for instance in await self.list_ours() if (instance.ref or "").startswith(f"gb-{owner}-")]

    async def act(
        self,
        method: str,
        path: str,
        instance_id: str,
        read: Callable[[Answer], T],
        *,
        body: object = None,
        manner: Manner = "repeatable",
    ) -> T:
        """Change one instance; `Client.call` says what `manner` is."""
        return await self.http.call("act", method, path, body=body, instance_id=instance_id, manner=manner, read=read)

    def read_clock(self) -> float | None:
        """By the `Date` of its last answer, which has whole seconds."""
        return self.http.clock_seconds

    async def close(self) -> None:
        """Let go of connections."""
        await self.http.close()


@contextmanager
def before_create() -> Generator[None]:
    """Around what must be there before a create is sent: when it fails, nothing was made, and that is Rejected."""
    try:
        yield
    except (Throttled, CredentialRefused):
        raise
    except ProviderError as error:
        raise Rejected(error.code, error.detail) from None


def _fingerprint(name: str, secrets: tuple[str, ...]) -> str:
    return f"key-{hashlib.sha256(':'.join((name, *secrets)).encode()).hexdigest()[:16]}"
