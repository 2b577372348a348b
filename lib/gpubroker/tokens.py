"""Short-lived tokens: OAuth 2 client credentials, RFC 8693 exchange for delegation, introspection and revocation.

A token never has more than what it came from: its scopes are among that's, its end is not after that's, and its budget is
taken from that's as well. Who acts stands in `act`, who pays is the subject. What a token may do is decided at use, by its
row: revoking a key, a token or an agent ends all that came from it at once.
"""

from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

from gpubroker import config, errors, keys, signing, store
from gpubroker.errors import OAuthError
from gpubroker.ids import new_id
from gpubroker.money import parse_usd
from gpubroker.resources import SCOPES
from gpubroker.store import accounts
from gpubroker.store import tokens as rows
from gpubroker.times import now

CLIENT_CREDENTIALS: Final = "client_credentials"
EXCHANGE: Final = "urn:ietf:params:oauth:grant-type:token-exchange"
ACCESS_TOKEN: Final = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - a name
_TYPES: Final = frozenset({ACCESS_TOKEN, "urn:ietf:params:oauth:token-type:jwt", "urn:gpubroker:token-type:api-key"})
DEEPEST: Final = 4
"""So many `act` objects may be nested in each other."""
_LONGEST_AUDIENCE: Final = 200


Count = Callable[[store.Caller], Awaitable[None]]
"""Is told who it was that asked, to count the request."""


class Client(NamedTuple):
    """How the client of a token request says who it is: HTTP Basic, or `client_id` and `client_secret` in the form."""

    agent_id: str
    secret: str


class _Wanted(NamedTuple):
    """What is asked of a new token, checked as far as that goes without its origin."""

    scopes: list[str] | None
    audience: str
    seconds: int
    limit_micro: int | None


async def issue(form: Mapping[str, str], client: Client | None, count: Count) -> dict[str, object]:
    """Answer a token request. Raises OAuthError."""
    grant = form.get("grant_type")
    if grant == CLIENT_CREDENTIALS:
        return await _issue_for_client(form, client, count)
    if grant == EXCHANGE:
        return await _exchange(form, count)
    if grant is None:
        raise OAuthError("invalid_request", "grant_type is missing")
    raise OAuthError("unsupported_grant_type", f"grant_type is {CLIENT_CREDENTIALS} or {EXCHANGE}")


async def _issue_for_client(form: Mapping[str, str], client: Client | None, count: Count) -> dict[str, object]:
    if client is None or not keys.is_key(client.secret):
        raise OAuthError("invalid_client", "client_id is an agent's id, client_secret one of its API keys")
    wanted = _read_wanted(form)
    async with store.anonymous() as tx:
        caller = await _authenticate(tx, store.Credential(key_hash=keys.hash_key(client.secret)), "invalid_client")
        _check_client(client, caller)
        await count(caller)
        return await _issue(tx, caller, caller.agent_id, [caller.agent_id], wanted)


async def authenticate_client(client: Client) -> store.Credential:
    """The credential of a client that says who it is by id and secret. Raises OAuthError."""
    if not keys.is_key(client.secret):
        raise OAuthError("invalid_client", "client_secret is no API key")
    credential = store.Credential(key_hash=keys.hash_key(client.secret))
    async with store.anonymous() as tx:
        _check_client(client, await _authenticate(tx, credential, "invalid_client"))
    return credential


def _check_client(client: Client, caller: store.Caller) -> None:
    if caller.agent_id != client.agent_id:
        raise OAuthError("invalid_client", "the secret is not a key of this agent")


async def _exchange(form: Mapping[str, str], count: Count) -> dict[str, object]:
    """A token that is unacceptable, for whatever reason, is `invalid_request` (RFC 8693, section 2.2.2)."""
    subject_token = form.get("subject_token")
    if not subject_token:
        raise OAuthError("invalid_request", "subject_token is missing: a token or API key of whoever pays")
    for name in ("subject_token_type", "actor_token_type", "requested_token_type"):
        if form.get(name) and form[name] not in _TYPES:
            raise OAuthError("invalid_request", f"{name} is not known here; leave it out")
    wanted = _read_wanted(form)
    subject = await _read_token(subject_token)
    actor_token = form.get("actor_token")
    actor = await _read_token(actor_token) if actor_token else None
    async with store.anonymous() as tx:
        acting = None if actor is None else await _authenticate(tx, actor, "invalid_request")
        caller = await _authenticate(
            tx, subject, "invalid_request"
        )  # last: it decides which organisation this is about
        await count(caller)
        chain = list(caller.actors or (caller.agent_id,))
        if acting is None or acting.agent_id == chain[-1]:
            return await _issue(tx, caller, chain[-1], chain, wanted) | {"issued_token_type": ACCESS_TOKEN}
        if not await rows.may_act(tx.conn, caller.agent_id, acting.agent_id):
            raise OAuthError(
                "invalid_request", "the actor is neither the subject, nor below it, nor named by its may_act"
            )
        if len(chain) > DEEPEST:
            raise OAuthError("invalid_request", f"the delegation is {DEEPEST} deep already")
        answer = await _issue(tx, caller, acting.agent_id, [*chain, acting.agent_id], wanted)
    return answer | {"issued_token_type": ACCESS_TOKEN}


async def _issue(
    tx: store.Transaction, origin: store.Caller, actor_id: str, actors: list[str], wanted: _Wanted
) -> dict[str, object]:
    scopes = _narrow(wanted.scopes, origin.scopes)
    issued_at = now().replace(microsecond=0)
    expires_at = issued_at + timedelta(seconds=wanted.seconds)
    first = await rows.first_expiry(tx.conn, origin.jti, origin.key_id, origin.path)
    if first is not None and first < expires_at:
        expires_at = first.astimezone(UTC).replace(microsecond=0)
    if wanted.limit_micro is not None and origin.jti is not None:
        room = await rows.find_least_room(tx.conn, origin.jti)
        if room is not None and wanted.limit_micro > room:
            raise OAuthError("invalid_request", "budget_usd is more than what is left of the token that it comes from")
    token = rows.TokenRow(
        jti=new_id("tok"),
        org_id=origin.org_id,
        agent_id=origin.agent_id,
        actor_id=actor_id,
        actors=actors,
        key_id=origin.key_id,
        parent_jti=origin.jti,
        scopes=scopes,
        limit_micro=wanted.limit_micro,
        expires_at=expires_at,
    )
    await rows.add_token(tx.conn, token)
    text = await signing.sign(tx.conn, _make_claims(token, wanted.audience, issued_at))
    return {
        "access_token": text,
        "token_type": "Bearer",
        "expires_in": max(0, int((expires_at - issued_at).total_seconds())),
        "scope": " ".join(scopes),
    }


def _make_claims(token: rows.TokenRow, audience: str, issued_at: datetime) -> dict[str, object]:
    claims: dict[str, object] = {
        "iss": config.settings().public_url,
        "sub": token.agent_id,
        "org": token.org_id,
        "scope": " ".join(token.scopes),
        "aud": audience,
        "jti": token.jti,
        "iat": int(issued_at.timestamp()),
        "exp": int(token.expires_at.timestamp()),
        "client_id": token.actor_id,
    }
    act = _nest(token.actors)
    return claims | ({"act": act} if act else {})


def _nest(actors: list[str]) -> dict[str, object] | None:
    """`act` as RFC 8693 nests it: who acts now outside, who acted before within. The subject is no actor."""
    act: dict[str, object] | None = None
    for actor in actors[1:]:
        outer: dict[str, object] = {"sub": actor}
        act = outer | ({"act": act} if act else {})
    return act


def _read_wanted(form: Mapping[str, str]) -> _Wanted:
    scopes = form["scope"].split() if form.get("scope") else None
    unknown = [scope for scope in scopes or () if scope not in SCOPES]
    if unknown:
        raise OAuthError("invalid_scope", f"there is no scope {unknown[0][:60]!r}")
    audience = form.get("audience") or config.settings().public_url
    if len(audience) > _LONGEST_AUDIENCE or not audience.isprintable():
        raise OAuthError("invalid_target", "audience is not a name that a token can carry")
    seconds = form.get("expires_in") or str(signing.LONGEST_SECONDS)
    if not (seconds.isascii() and seconds.isdigit() and len(seconds) < 10 and int(seconds) > 0):  # noqa: PLR2004 - digits
        raise OAuthError("invalid_request", "expires_in is a whole number of seconds")
    limit = None
    if form.get("budget_usd"):
        try:
            limit = parse_usd(form["budget_usd"])
        except ValueError as error:
            raise OAuthError("invalid_request", f"budget_usd {error}") from None
    return _Wanted(scopes, audience, min(int(seconds), signing.LONGEST_SECONDS), limit)


def _narrow(wanted: list[str] | None, origin: list[str]) -> list[str]:
    if wanted is None:
        return [scope for scope in SCOPES if scope in origin and scope != "admin"]
    beyond = [scope for scope in wanted if scope not in origin]
    if beyond:
        raise OAuthError("invalid_scope", f"not among the rights that this comes from: {' '.join(beyond)}")
    return [scope for scope in SCOPES if scope in wanted]


async def _read_token(text: str) -> store.Credential:
    if keys.is_key(text):
        return store.Credential(key_hash=keys.hash_key(text))
    return store.Credential(jti=str((await _read_claims(text, for_us=True))["jti"]))


async def _read_claims(text: str, *, for_us: bool) -> dict[str, Any]:
    try:
        return await signing.verify(text, for_us=for_us)
    except errors.Unauthenticated:
        raise OAuthError("invalid_request", "a token or key is unknown, expired or revoked") from None


async def _authenticate(tx: store.Transaction, credential: store.Credential, otherwise: str) -> store.Caller:
    try:
        return await store.authenticate(tx.conn, credential, None)
    except errors.Unauthenticated:
        raise OAuthError(otherwise, "a token or key is unknown, expired or revoked") from None


# RFC 7662 and 7009: for callers who say who they are


class _Meant(NamedTuple):
    """What a text that is a live token or key stands for. `claims` are a token's."""

    caller: store.Caller
    claims: dict[str, Any]


async def introspect(caller: store.Credential, text: str, count: Count) -> dict[str, object]:
    """What a token is and may do now, for whoever holds it or stands above its subject; else just that it is not active."""
    meant = await _find_meant(text)
    async with store.public(caller, None) as tx:
        await count(tx.known)
        if meant is None or not _may_see(tx, meant.caller):
            return {"active": False}
    stated: dict[str, object] = {
        "active": True,
        "scope": " ".join(meant.caller.scopes),
        "sub": meant.caller.agent_id,
        "client_id": (meant.caller.actors or [meant.caller.agent_id])[-1],
        "token_type": "Bearer",
        "org": meant.caller.org_id,
    }
    shown = ("exp", "iat", "iss", "aud", "jti", "act")
    return stated | {name: meant.claims[name] for name in shown if name in meant.claims}


async def _find_meant(text: str) -> _Meant | None:
    """Of any audience: whom a token is for asks here what it is worth."""
    try:
        is_key = keys.is_key(text)
        claims = {} if is_key else await _read_claims(text, for_us=False)
        credential = store.Credential(keys.hash_key(text)) if is_key else store.Credential(jti=str(claims["jti"]))
        async with store.anonymous() as tx:
            return _Meant(await _authenticate(tx, credential, "invalid_request"), claims)
    except OAuthError:
        return None


def _may_see(tx: store.Transaction, meant: store.Caller) -> bool:
    asking = tx.known
    return asking.org_id == meant.org_id and (asking.agent_id in meant.path or asking.agent_id in meant.actors[-1:])


async def revoke(caller: store.Credential, text: str, count: Count) -> None:
    """Revoke a token or key that the caller holds or that is of its subtree. Anything else changes nothing, and is not said."""
    meant = await _find_meant(text)
    async with store.public(caller, None) as tx:
        await count(tx.known)
        if meant is None:
            return
        if meant.caller.jti is not None:
            await rows.revoke_token(tx.conn, meant.caller.jti, tx.known.agent_id)
        elif meant.caller.key_id is not None and tx.known.agent_id in meant.caller.path:
            await accounts.revoke_key(tx.conn, meant.caller.key_id)


def describe_server() -> dict[str, object]:
    """RFC 8414: where this authorization server is and what it takes."""
    url = config.settings().public_url
    return {
        "issuer": url,
        "token_endpoint": f"{url}/v1/token",
        "jwks_uri": f"{url}/.well-known/jwks.json",
        "introspection_endpoint": f"{url}/v1/introspect",
        "revocation_endpoint": f"{url}/v1/revoke",
        "scopes_supported": list(SCOPES),
        "response_types_supported": [],
        "grant_types_supported": [CLIENT_CREDENTIALS, EXCHANGE],
        "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post", "none"],
        "introspection_endpoint_auth_methods_supported": ["bearer", "client_secret_basic", "client_secret_post"],
        "revocation_endpoint_auth_methods_supported": ["bearer", "client_secret_basic", "client_secret_post"],
        "service_documentation": f"{url}/docs/errors.md",
    }
