"""What a vendor's answer means: the statuses of HTTP as the errors of `gpubroker.errors`."""

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final

import httpx

from gpubroker.errors import (
    AmbiguousOutcome,
    CredentialRefused,
    InstanceNotFound,
    ProviderError,
    Rejected,
    Throttled,
)
from gpubroker.providers.http.breakers import Kind
from gpubroker.providers.http.reading import Document, parse_json

_USUAL_WAIT_SECONDS: Final = 5.0
_LONGEST_WAIT_SECONDS: Final = 86400.0
_LONGEST_DETAIL: Final = 300
_SPENT: Final = re.compile(r'"?[\w-]+"?\s*;\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})')
_TOO_MANY: Final = 429
_NO_BALANCE: Final = 402
_NOT_FOUND: Final = 404
_CREDENTIAL: Final = frozenset({401, 403})
_CLEAN: Final = frozenset({400, 402, 404, 405, 406, 409, 410, 411, 412, 413, 414, 415, 422})
_OUR_FAULT: Final = frozenset({405, 406, 411, 412, 413, 414, 415, 422})
"""The request itself is wrong: another offer would not mend it."""
_MAY_PASS: Final = frozenset({408, 425, 500, 502, 503, 504, 520, 521, 522, 523, 524})


class Secrets(tuple[str, ...]):
    """What nobody may see, not even as a variable in a traceback."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} secrets>"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, read whole. Texts of it that are shown are short, printable, and without the secrets of the request."""

    status: int
    headers: httpx.Headers
    body: bytes
    hidden: Secrets = field(default_factory=Secrets)

    @property
    def is_success(self) -> bool:
        """Say whether it is a 2xx."""
        return 200 <= self.status < 300  # noqa: PLR2004 - statuses

    @property
    def may_pass(self) -> bool:
        """Say whether the same call may be answered well in a moment."""
        return self.status in _MAY_PASS

    def json(self) -> object:
        """Its JSON. Raises ProviderError `unreadable`."""
        return parse_json(self.body)

    def document(self) -> Document:
        """Its JSON object. Raises ProviderError `unreadable`."""
        return Document.of(self.json())

    def find(self, *keys: str) -> object:
        """A value inside its JSON objects, or None: for errors, which may have any shape."""
        try:
            value = self.json()
        except ProviderError:
            return None
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None  # pyright: ignore[reportUnknownVariableType]
        return value  # pyright: ignore[reportUnknownVariableType]

    def detail(self) -> str:
        """The beginning of what it says, for a person."""
        text = self.body[: 16 * _LONGEST_DETAIL].decode(errors="replace")
        return hide("".join(c if c.isprintable() else " " for c in text), self.hidden)[:_LONGEST_DETAIL].strip()

    def wait_seconds(self, otherwise: float = _USUAL_WAIT_SECONDS) -> float:
        """How long it asks to wait: `Retry-After` in seconds or as a date, else the spent windows of `RateLimit`."""
        said = self.headers.get("retry-after", "").strip()
        if said:
            try:
                wait = float(said) if said[0].isdigit() else _until(said)
            except ValueError:
                wait = otherwise
        else:
            wait = max((float(t) for t in _SPENT.findall(self.headers.get("ratelimit", ""))), default=otherwise)
        return min(max(0.0, wait), _LONGEST_WAIT_SECONDS)

    def clock_seconds(self) -> float | None:
        """How far the clock that dated this answer is ahead of ours; None when none did."""
        try:
            return _until(self.headers["date"])
        except (KeyError, ValueError):
            return None


def until_midnight() -> float:
    """Seconds until a quota of the day, by UTC, is new."""
    now = datetime.now(UTC)
    return 86400.0 - timedelta(hours=now.hour, minutes=now.minute, seconds=now.second).total_seconds()


def _until(date: str) -> float:
    at = parsedate_to_datetime(date)
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()


def hide(text: str, secrets: Secrets) -> str:
    """The text without these secrets."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def judge(kind: Kind, answer: Answer, instance_id: str | None) -> ProviderError:
    """What an answer that is no success means where the vendor has no meaning of its own for it.

    A create is rejected by a clear refusal alone; whatever else it is, nobody knows what happened.
    """
    code, detail, status = f"http_{answer.status}", answer.detail(), answer.status
    if status == _TOO_MANY:
        return Throttled("throttled", detail, wait=answer.wait_seconds())
    if status in _CREDENTIAL:
        return CredentialRefused("credential_refused", detail)
    if status == _NOT_FOUND and instance_id is not None:
        return InstanceNotFound("not_found", instance_id)
    if kind in {"create", "act"}:
        if status in _CLEAN:
            code = "no_balance" if status == _NO_BALANCE else code
            return Rejected(code, detail, try_next_offer=status not in _OUR_FAULT)
        return AmbiguousOutcome(code, detail)
    return ProviderError(code, detail)
