"""The bundle: every function once. Services, Triggers, the gateway of `dev` and the tests are all made from this.

A function is a folder `functions/<name>/main.py` with a functions-framework `aio.http` function of the same name.
"""

from pathlib import Path
from typing import Final, Literal, NamedTuple

from gpubroker.errors import SetupError


class Function(NamedTuple):
    """One function. `paths` are prefixes of its public paths, unique over the bundle.

    `concurrency` is requests at once per instance, `timeout_seconds` the longest that one may take, `memory_limit` what
    an instance may use.
    """

    name: str
    kind: Literal["public", "consumer", "tick"]
    summary: str
    paths: tuple[str, ...] = ()
    vendor_credentials: bool = False
    max_scale: int = 10
    concurrency: int = 80
    timeout_seconds: int = 60
    memory_limit: str = "512Mi"
    schedule: str | None = None
    """Cron line of its PingSource."""


MOST_CONNECTIONS: Final = 300
"""What all functions together may open at the database, at their largest: it, or the pooler before it, must allow so many."""

FUNCTIONS: Final = (
    Function(
        "auth", "public", "agents, keys, tokens",
        paths=(
            "/v1/agents", "/v1/keys", "/v1/whoami", "/v1/token", "/v1/introspect", "/v1/revoke",
            "/.well-known/jwks.json", "/.well-known/oauth-authorization-server",
        ),
    ),
    Function("offers", "public", "search of what can be rented", paths=("/v1/offers", "/v1/gpus", "/v1/quotes", "/v1/providers")),
    Function(
        "pods", "public", "what is wanted: create, act, wait",
        paths=("/v1/pods",), timeout_seconds=90,
    ),
    Function(
        "exec", "public", "logs of a pod and commands in it",
        paths=("/v1/logs", "/v1/exec"), vendor_credentials=True, timeout_seconds=330,
    ),
    Function(
        "usage", "public", "what was used, spent and may be spent",
        paths=("/v1/usage", "/v1/budgets", "/v1/statements", "/v1/limits", "/v1/plans", "/v1/subscription"),
    ),
    Function("intake", "public", "commands that come as CloudEvents", paths=("/v1/intake",), max_scale=4, timeout_seconds=90),
    Function(
        "provisioning", "consumer", "makes what is wanted true, one step at a time",
        vendor_credentials=True, concurrency=40, timeout_seconds=300,
    ),
    Function("metering", "consumer", "bills what ran", max_scale=5),
    Function(
        "reconcile", "tick", "expiry, due pods, the sweep, events that nobody got",
        vendor_credentials=True, max_scale=2, timeout_seconds=300, schedule="* * * * *",
    ),
    Function(
        "catalog", "tick", "refreshes the offers of every provider",
        vendor_credentials=True, max_scale=2, timeout_seconds=300, schedule="* * * * *",
        memory_limit="1Gi",  # a vendor's listing may have 64 MiB, and takes seven times that when it is read
    ),
    Function("deadletter", "consumer", "records what could not be delivered", max_scale=2),
)  # fmt: skip

BY_NAME: Final = {function.name: function for function in FUNCTIONS}


def function(name: str) -> Function:
    """Find a function of the bundle. Raises SetupError naming all that there are."""
    try:
        return BY_NAME[name]
    except KeyError:
        msg = f"there is no function '{name}'; there are: {', '.join(BY_NAME)}"
        raise SetupError(msg, code=2) from None


def home() -> Path:
    """The folder that holds functions/ and eventing/: the checkout, or in an installed wheel the package's own copy."""
    package = Path(__file__).resolve().parent
    checkout = package.parents[1]
    return checkout if (checkout / "functions").is_dir() else package / "bundle"


def source(name: str) -> Path:
    """The `main.py` of a function."""
    return home() / "functions" / function(name).name / "main.py"
