"""What the token endpoints take and answer, in the words of their RFCs."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from gpubroker.resources import Output


class TokenForm(BaseModel):
    """The fields of a token request: RFC 6749 client credentials, or RFC 8693 token exchange."""

    grant_type: str
    client_id: str | None = Field(default=None, description="The agent's id; or HTTP Basic.")
    client_secret: str | None = Field(default=None, description="One of the agent's API keys; or HTTP Basic.")
    subject_token: str | None = Field(default=None, description="A token or API key of whoever pays.")
    subject_token_type: str | None = None
    actor_token: str | None = Field(default=None, description="A token or API key of whoever acts; omitted: as before.")
    actor_token_type: str | None = None
    scope: str | None = None
    audience: str | None = None
    expires_in: int | None = Field(default=None, description="At most an hour.")
    budget_usd: str | None = Field(default=None, description="What may be held with this token and all made from it.")


class TokenAnswer(Output):
    """A token."""

    access_token: str = Field(repr=False)
    token_type: Literal["Bearer"]
    expires_in: int
    scope: str
    issued_token_type: str | None = None


class TokenQuestion(BaseModel):
    """A token or API key, and who asks: a bearer credential, HTTP Basic, or both fields here."""

    token: str
    token_type_hint: str | None = None
    client_id: str | None = None
    client_secret: str | None = None


class Introspection(Output):
    """RFC 7662. Only `active` when it is false."""

    active: bool
    scope: str | None = None
    sub: str | None = None
    client_id: str | None = None
    token_type: str | None = None
    org: str | None = None
    exp: int | None = None
    iat: int | None = None
    iss: str | None = None
    aud: str | None = None
    jti: str | None = None
    act: dict[str, Any] | None = None


class Revoked(Output):
    """RFC 7009 says nothing in its answer."""


class Jwks(Output):
    """RFC 7517."""

    keys: list[dict[str, Any]]


class ServerMetadata(Output):
    """RFC 8414."""

    issuer: str
    token_endpoint: str
    jwks_uri: str
    introspection_endpoint: str
    revocation_endpoint: str
    scopes_supported: list[str]
    response_types_supported: list[str]
    grant_types_supported: list[str]
    token_endpoint_auth_methods_supported: list[str]
    introspection_endpoint_auth_methods_supported: list[str]
    revocation_endpoint_auth_methods_supported: list[str]
    service_documentation: str
