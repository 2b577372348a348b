"""What `gpubroker dev` keeps in a folder: servers, schema, owner and secret key, and the settings made of them.

```
DIR/dev.lock     held by the one process that uses DIR
DIR/run.json     how to reach it, while it runs
DIR/secret.key   seals secrets at rest; lost with it are stored environments and signing keys
DIR/postgres/    data, password and log of the embedded PostgreSQL
DIR/valkey/      log of the embedded Valkey
DIR/pods/        pods of the provider `local`
```
"""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Final

from gpubroker import accounts, config
from gpubroker.config import Settings
from gpubroker.errors import SetupError
from gpubroker.local import processes
from gpubroker.local.servers import Postgres, Server, Valkey
from gpubroker.providers import registry
from gpubroker.store import claims, migrations

_DEFAULTS: Final = {
    "GPUBROKER_TICK_SECONDS": "5",
    "GPUBROKER_STRAY_GRACE_SECONDS": "0",
    "GPUBROKER_POOL_SIZE": "12",
}


class Installation:
    """One folder. `given` are the settings of the environment: what they name is used and not made."""

    def __init__(self, folder: Path, given: Settings) -> None:
        self.folder = folder
        self.servers: list[Server] = []
        self.settings = given
        self._lock: IO[str] | None = None
        self._database_url = given.database_url or ""
        self._redis_url = given.redis_url or ""
        self._secret_key = ""
        self._owner = ""

    def lock(self) -> None:
        """Take the folder for this process. Raises SetupError when another has it, or it cannot be written."""
        self._lock = processes.lock(self.folder / "dev.lock")
        (self.folder / "run.json").unlink(missing_ok=True)

    def start_postgres(self) -> None:
        """Start PostgreSQL unless DATABASE_URL names one."""
        if self.settings.database_url is None:
            is_new = not (self.folder / "postgres" / "data").exists()
            self._secret_key = self._read_secret(may_make=is_new)
            self._database_url = self._start(Postgres(self.folder / "postgres"))
        else:
            self._secret_key = self._read_secret(may_make=True)

    def start_valkey(self) -> None:
        """Start Valkey unless REDIS_URL names one."""
        if self.settings.redis_url is None:
            self._redis_url = self._start(Valkey(self.folder / "valkey"))

    def _start(self, server: Server) -> str:
        self.servers.append(server)
        return server.start()

    def _read_secret(self, *, may_make: bool) -> str:
        if self.settings.secret_key is not None:
            return self.settings.secret_key
        path = self.folder / "secret.key"
        try:
            if not path.exists():
                if not may_make:
                    msg = f"{path} is missing, and the data need it: bring it back, or move {self.folder} away"
                    raise SetupError(msg)
                _write_private(path, secrets.token_urlsafe(48) + "\n")
            return path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            msg = f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}"
            raise SetupError(msg) from None

    def migrate(self) -> list[str]:
        """Bring the schema up to date and learn the owner. Names the migrations that were applied."""
        applied = migrations.migrate(self._database_url)
        self._owner = accounts.install(self._database_url)
        given = self.settings.owner
        if given not in (None, self._owner):
            msg = f"GPUBROKER_OWNER is {given}, but the database belongs to {self._owner}: one of them is another's"
            raise SetupError(msg)
        if self.settings.database_url is None:
            self._release_claims()
        return applied

    def _release_claims(self) -> None:
        """Nobody but this process drives what is in a database of its own: what a killed one had claimed is due at once."""
        with migrations.connect(self._database_url) as conn:
            claims.release_all(conn, "local")

    def compose(self, url: str, sink_url: str) -> Settings:
        """Make the settings of all functions. Raises SetupError for what does not fit together."""
        given = self.settings
        others = [name for name in registry.enabled(given) if name != "local"]
        made = {
            "GPUBROKER_PROVIDERS": ",".join(given.providers or ("local", *others)),
            "GPUBROKER_LOCAL_DIR": str(self.folder / "pods"),
            "GPUBROKER_PUBLIC_URL": url,
            **_DEFAULTS,
            **{name: value for name, value in given.variables.items() if value},
            "DATABASE_URL": self._database_url,
            "REDIS_URL": self._redis_url,
            "GPUBROKER_OWNER": self._owner,
            "GPUBROKER_SECRET_KEY": self._secret_key,
            "K_SINK": sink_url,
        }
        self.settings = config.read(made)
        return self.settings

    def write_run(self, ready: Mapping[str, object]) -> None:
        """Tell other commands how to reach this process."""
        _write_private(self.folder / "run.json", json.dumps(ready, indent=2) + "\n")

    def forget_run(self) -> None:
        """Say that nothing runs any more."""
        (self.folder / "run.json").unlink(missing_ok=True)

    def stop(self) -> None:
        """Stop the servers."""
        for server in reversed(self.servers):
            server.stop()

    def unlock(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _write_private(path: Path, text: str) -> None:
    """Write a file that only we may read, whole or not at all. Raises SetupError."""
    made = path.with_name(f"{path.name}.new")
    try:
        made.unlink(missing_ok=True)
        made.touch(0o600)
        made.write_text(text, encoding="utf-8")
        made.rename(path)
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror}; free space or choose another folder with --data"
        raise SetupError(msg) from None
