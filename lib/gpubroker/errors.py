"""Every error, once. An error is a fact: what was wrong, where, and what to do now.

```
GpubrokerError
├── Problem                     answered to a caller as application/problem+json (RFC 9457)
│   ├── MalformedJson           400
│   ├── Unauthenticated         401
│   ├── BudgetExhausted         402
│   ├── Forbidden               403
│   ├── NotFound                404
│   ├── MethodNotAllowed        405
│   ├── Conflict                409
│   │   ├── ActionNotAllowed    the pod's state does not allow it now
│   │   ├── IdempotencyInProgress
│   │   ├── LimitReached        pods, USD per hour or creates a minute of an agent
│   │   ├── NameInUse
│   │   ├── NotRunning          exec needs a running pod
│   │   ├── ProbableDuplicate
│   │   └── QuoteUsed
│   ├── QuoteExpired            410
│   ├── BodyTooLarge            413
│   ├── UnsupportedMediaType    415
│   ├── Invalid                 422, with `errors: [{pointer, message, did_you_mean?}]`
│   │   ├── ExceedsParent
│   │   ├── IdempotencyKeyReused
│   │   ├── NoOffer
│   │   └── NotSupported        the provider cannot do it, ever
│   ├── RateLimited             429
│   ├── Internal                500, shows nothing
│   ├── OAuthError              400 or 401 of /v1/token, /v1/introspect, /v1/revoke, in the words of their RFCs
│   ├── ProviderFailed          502, the provider answered with a fault
│   └── Unavailable             503
├── ProviderError               between an adapter and its callers, never answered as it stands
│   ├── Rejected                the provider refused and did nothing: `try_next_offer` says what now
│   ├── AmbiguousOutcome        nobody knows whether it happened: look the reference up
│   ├── Throttled               not done, try again after `wait` seconds
│   ├── CredentialRefused       the operator's credential is wrong, revoked or lacks a right
│   ├── InstanceNotFound        the provider knows no such instance (no proof that it is gone: DESIGN 7)
│   └── CannotDo                the provider has no such action
└── SetupError                  one line on stderr and an exit code: the installation is not usable as it is
```
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple

MANUAL: Final = "/docs/errors.md"
"""Where each error is explained, below the public URL."""


class GpubrokerError(Exception):
    """The root of all errors of this library."""


class Next(NamedTuple):
    """A call that helps, as problem documents carry it in `next`."""

    method: str
    path: str
    body: Mapping[str, object] | None = None

    def as_json(self) -> dict[str, object]:
        """Render it; a call without a body has no `body`."""
        called: dict[str, object] = {"method": self.method, "path": self.path}
        return called if self.body is None else called | {"body": self.body}


class Problem(GpubrokerError):
    """An answer that is an error. `more` are the members beside RFC 9457's own."""

    status: ClassVar[int] = 500
    slug: ClassVar[str] = "internal"
    title: ClassVar[str] = "Something failed here"
    retryable: ClassVar[bool] = False
    hint: ClassVar[str] = "Try again later; if it stays, give the operator the request_id."
    helps: ClassVar[tuple[Next, ...]] = ()
    """Calls that help whatever the detail is; `steps` of one problem stand in their place."""

    def __init__(
        self,
        detail: str = "",
        *,
        hint: str | None = None,
        steps: Sequence[Next] = (),
        more: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail or self.title)
        self.detail = detail or self.title
        self.said_hint = hint or self.hint
        self.steps = tuple(steps) or self.helps
        self.more = dict(more or {})
        self.headers = dict(headers or {})


class MalformedJson(Problem):
    """The body is not JSON."""

    status, slug, title = 400, "malformed_json", "The body is not valid JSON"
    hint = "Send one JSON object, encoded as UTF-8."


class Unauthenticated(Problem):
    """No credential, or one that is unknown, expired or revoked: which of these is not said."""

    status, slug, title = 401, "unauthenticated", "No valid credential"
    hint = "Send 'Authorization: Bearer <API key or JWT>' with a key that is neither expired nor revoked."


class BudgetExhausted(Problem):
    """A hold would exceed a budget on the path from the agent to its root."""

    status, slug, title = 402, "budget_exhausted", "The budget does not cover this"
    hint = "Ask for a shorter max_lifetime_seconds or a cheaper offer, or have the budget raised."
    helps = (Next("GET", "/v1/budgets"),)


class Forbidden(Problem):
    """The caller is known and may not do this."""

    status, slug, title = 403, "forbidden", "Not allowed"
    hint = "Use a key that has the scope or grant named in detail."
    helps = (Next("GET", "/v1/whoami"),)


class NotFound(Problem):
    """No such thing, or a thing of another tenant: the words are the same."""

    status, slug, title = 404, "not_found", "No such thing"
    hint = "Check the id; list what there is with the collection's GET."


class MethodNotAllowed(Problem):
    """The path exists, the method does not."""

    status, slug, title = 405, "method_not_allowed", "This path does not take this method"
    hint = "Use one of the methods in the Allow header."


class Conflict(Problem):
    """The request is right, but not in the state that things are in."""

    status, slug, title = 409, "conflict", "Not possible in the present state"
    hint = "Read the resource again and decide anew."


class ActionNotAllowed(Conflict):
    """The pod's state does not allow this action; `allowed_actions` are beside it."""

    slug, title = "action_not_allowed", "The pod's state does not allow this action"
    hint = "Use one of allowed_actions, or wait for the state to change with ?wait=."


class IdempotencyInProgress(Conflict):
    """A request with this Idempotency-Key is still running."""

    slug, title, retryable = "idempotency_in_progress", "A request with this Idempotency-Key is still running", True
    hint = "Send the same request again after Retry-After seconds."


class LimitReached(Conflict):
    """An agent's own limit (pods, USD per hour, creates a minute), not its budget."""

    slug, title = "limit_reached", "A limit of the agent or of one above it is reached"
    hint = "End a pod, wait, or have the limit raised; GET /v1/limits shows all of them."


class NameInUse(Conflict):
    """A live pod of the same agent has this name; it is beside it."""

    slug, title = "name_in_use", "A live pod of yours has this name"
    hint = "Use that pod, choose another name, or terminate that pod first."


class NotRunning(Conflict):
    """The pod is not running, so nothing can be executed in it."""

    slug, title = "not_running", "The pod is not running"
    hint = "Wait until it runs (GET the pod with ?wait=30&until=running), or start it."


class ProbableDuplicate(Conflict):
    """An equal request of the same agent made a pod within the last 120 seconds; it is beside it."""

    slug, title = "probable_duplicate", "An equal request made a pod a moment ago"
    hint = "Use that pod; to have another, send an Idempotency-Key or ?duplicate=allow."


class QuoteUsed(Conflict):
    """A quote makes one pod, and this one did."""

    slug, title = "quote_used", "This quote has made its pod"
    hint = "Use that pod, or ask for a new quote."


class QuoteExpired(Problem):
    """A quote's time is over."""

    status, slug, title = 410, "quote_expired", "This quote is past its time"
    hint = "Ask for a new quote with POST /v1/quotes."


class BodyTooLarge(Problem):
    """More than 1 MiB."""

    status, slug, title = 413, "body_too_large", "The body is larger than 1 MiB"
    hint = "Send less; put large inputs into the pod's disk or an object store."


class UnsupportedMediaType(Problem):
    """Another content type than JSON."""

    status, slug, title = 415, "unsupported_media_type", "Only application/json is taken here"
    hint = "Send JSON with 'Content-Type: application/json'."


class Invalid(Problem):
    """Something in the request is wrong; `errors` says what and where."""

    status, slug, title = 422, "invalid", "The request is not valid"
    hint = "Mend what errors[] names and send it again."


class ExceedsParent(Invalid):
    """A child asked for more than its parent has."""

    slug, title = "exceeds_parent", "A child cannot have more than its parent"
    hint = "Ask for at most what GET /v1/whoami shows of the parent."
    helps = (Next("GET", "/v1/whoami"),)


class IdempotencyKeyReused(Invalid):
    """The same Idempotency-Key came with another body or route."""

    slug, title = "idempotency_key_reused", "This Idempotency-Key was used for another request"
    hint = "Use a new Idempotency-Key for a new request."


class NoOffer(Invalid):
    """No live offer satisfies the request; `no_match` says why."""

    slug, title = "no_offer", "No offer satisfies this request"
    hint = "Loosen a filter that no_match.removed_by names, or take one of no_match.nearest."
    helps = (Next("GET", "/v1/offers"),)


class NotSupported(Invalid):
    """The provider of this pod or offer cannot do it, ever."""

    slug, title = "not_supported", "The provider cannot do this"
    hint = "Choose an offer whose supports lists it."


class RateLimited(Problem):
    """More requests a second than the plan allows."""

    status, slug, title, retryable = 429, "rate_limited", "Too many requests", True
    hint = "Wait Retry-After seconds."


class OAuthError(Problem):
    """What RFC 6749, 7009, 7662 and 8693 call an error: `{"error", "error_description"}`."""

    status, slug, title = 400, "invalid_request", "The token request is not valid"

    def __init__(self, error: str, detail: str) -> None:
        super().__init__(detail)
        self.error = error
        self.is_client_unknown = error == "invalid_client"


class Internal(Problem):
    """Anything unforeseen. The log has all of it, the answer nothing."""


class ProviderFailed(Problem):
    """The provider answered with a fault, or not in time."""

    status, slug, title, retryable = 502, "provider_failed", "The provider did not do it", True
    hint = "Try again in a few seconds; the pod itself is unharmed."


class Unavailable(Problem):
    """Something this needs is away for now."""

    status, slug, title, retryable = 503, "unavailable", "Not available for now", True
    hint = "Try again after Retry-After seconds; nothing was done."


class ProviderError(GpubrokerError):
    """What an adapter raises. `detail` never carries a credential."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(f"{code}: {detail}" if detail else code)
        self.code = code
        self.detail = detail


class Rejected(ProviderError):
    """The provider refused, and nothing was created or changed."""

    def __init__(self, code: str, detail: str = "", *, try_next_offer: bool = True) -> None:
        super().__init__(code, detail)
        self.try_next_offer = try_next_offer


class AmbiguousOutcome(ProviderError):
    """Nobody knows whether it happened. `maybe_id` is an id that the failed answer carried."""

    def __init__(self, code: str, detail: str = "", *, maybe_id: str | None = None) -> None:
        super().__init__(code, detail)
        self.maybe_id = maybe_id


class Throttled(ProviderError):
    """Not done; may be asked again after `wait` seconds."""

    def __init__(self, code: str, detail: str = "", *, wait: float = 5.0) -> None:
        super().__init__(code, detail)
        self.wait = wait


class CredentialRefused(ProviderError):
    """The operator's credential is wrong, revoked, or lacks a right."""


class InstanceNotFound(ProviderError):
    """The provider knows no such instance. One such answer is no proof that it is gone."""


class CannotDo(ProviderError):
    """The provider has no such action."""


class SetupError(GpubrokerError):
    """The installation cannot be used as it is. The command line prints it as one line and exits with `code`."""

    def __init__(self, line: str, *, code: int = 1) -> None:
        super().__init__(line)
        self.code = code


def describe(error: BaseException) -> str:
    """An error in a line for an operator: what it is, and what it says."""
    return f"{type(error).__name__} {error}".strip()
