"""Settings: the only reader of the environment, read once, naming all that is missing at once.

Names without a prefix are the platforms' own (`DATABASE_URL`, `REDIS_URL`, `K_SINK`, `PORT`) or a vendor's credential;
all others begin `GPUBROKER_`. A secret may be a file: `<NAME>_FILE` holds its path. docs/settings.md lists them.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from gpubroker.errors import SetupError

_OWNER: Final = re.compile(r"[a-z0-9]{8}")
_SECRET_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Settings:
    """What this process was told. Secrets are in no repr."""

    database_url: str | None = field(default=None, repr=False)
    redis_url: str | None = field(default=None, repr=False)
    sink_url: str | None = None
    """Where events are published: the Broker's ingress, as `K_SINK`. None: only the ticks move things."""
    port: int = 8080
    owner: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    public_url: str = "http://127.0.0.1:8080"
    providers: tuple[str, ...] | None = None
    tick_seconds: int = 60
    stray_grace_seconds: int = 600
    pool_size: int = 4
    start_seconds: int = 0
    """How long a process that cannot use its database yet tries again before it ends."""
    variables: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    """The variables that this was read from, for the settings of single providers."""

    def variable(self, name: str) -> str | None:
        """Read a provider's own variable, or the file that `<NAME>_FILE` names. Empty counts as absent."""
        return _value(self.variables, name)

    def need(self, *names: str) -> None:
        """Raise SetupError, naming all of these variables that are missing."""
        missing = [name for name in names if not _value(self.variables, name)]
        if missing:
            msg = f"missing settings: {', '.join(missing)} (docs/settings.md says what they are)"
            raise SetupError(msg)


def _value(variables: Mapping[str, str], name: str) -> str | None:
    if variables.get(name):
        return variables[name]
    path = variables.get(f"{name}_FILE")
    if not path:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{name}_FILE: cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}"
        raise SetupError(msg) from None


def read(variables: Mapping[str, str]) -> Settings:
    """Make the settings from an environment. Raises SetupError that names everything wrong with it."""
    wrong: list[str] = []

    def number(name: str, default: int, least: int, most: int) -> int:
        text = _value(variables, name)
        if text is None:
            return default
        if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
            wrong.append(f"{name} must be a whole number from {least} to {most}")
            return default
        return int(text)

    owner, secret, listed = (
        _value(variables, n) for n in ("GPUBROKER_OWNER", "GPUBROKER_SECRET_KEY", "GPUBROKER_PROVIDERS")
    )
    if owner is not None and not _OWNER.fullmatch(owner):
        wrong.append("GPUBROKER_OWNER must be 8 characters of a-z and 0-9, as 'gpubroker bootstrap' printed it")
    if secret is not None and len(secret) < _SECRET_BYTES:
        wrong.append(f"GPUBROKER_SECRET_KEY must have at least {_SECRET_BYTES} characters of randomness")
    settings = Settings(
        database_url=_value(variables, "DATABASE_URL"),
        redis_url=_value(variables, "REDIS_URL"),
        sink_url=_value(variables, "K_SINK"),
        port=number("PORT", 8080, 0, 65535),
        owner=owner,
        secret_key=secret,
        public_url=(_value(variables, "GPUBROKER_PUBLIC_URL") or "http://127.0.0.1:8080").rstrip("/"),
        providers=None if listed is None else tuple(name.strip() for name in listed.split(",") if name.strip()),
        tick_seconds=number("GPUBROKER_TICK_SECONDS", 60, 1, 3600),
        stray_grace_seconds=number("GPUBROKER_STRAY_GRACE_SECONDS", 600, 0, 86400),
        pool_size=number("GPUBROKER_POOL_SIZE", 4, 1, 64),
        start_seconds=number("GPUBROKER_START_SECONDS", 0, 0, 3600),
        variables=dict(variables),
    )
    if wrong:
        raise SetupError("; ".join(wrong))
    return settings


_settings: Settings | None = None


def settings() -> Settings:
    """The settings of this process, read from the environment at the first call."""
    global _settings  # noqa: PLW0603 - the environment is read once per process
    if _settings is None:
        _settings = read(os.environ)
    return _settings


def use(changed: Settings) -> None:
    """Replace the settings of this process: the one-machine runtime and tests bring their own."""
    global _settings  # noqa: PLW0603 - as above
    _settings = changed


def forget_variables(*names: str) -> None:
    """Take variables out of the environment that a framework has written there and reads again."""
    for name in names:
        os.environ.pop(name, None)


def spare_plugins() -> None:
    """Let pydantic look for no plugins of its own: it would read what every installed package declares."""
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


def with_variables(base: Settings, **changes: str) -> Settings:
    """Read settings anew with some variables replaced."""
    return replace(read({**base.variables, **changes}))
