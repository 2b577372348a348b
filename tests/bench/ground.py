"""What the measurements stand on: PostgreSQL and Valkey of their own, a schema, organisations with their keys."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql
from tests.bench.served import cores
from tests.factories import SECRET_KEY

from gpubroker import accounts, config
from gpubroker.local.servers import Postgres, Valkey
from gpubroker.store import migrations

ORGANISATIONS = 8
"""So many, since one of the plan enterprise may ask 1,000 times a second."""


@dataclass(frozen=True, slots=True)
class Ground:
    """`variables` are what a function's process is told; `keys` are one of each organisation."""

    variables: dict[str, str]
    keys: list[str]

    @property
    def database_url(self) -> str:
        return self.variables["DATABASE_URL"]


@contextmanager
def prepared(folder: Path) -> Generator[Ground]:
    """Servers with the durability that `gpubroker dev` gives them, on the cores that are not measured."""
    with Postgres(folder / "postgres") as postgres, Valkey(folder / "valkey") as valkey:
        for server in (postgres, valkey):
            os.sched_setaffinity(server.pid or 0, cores()[1])
        migrations.migrate(postgres.url)
        made = [
            accounts.bootstrap(postgres.url, f"bench-{n}", 10**9, "total", "enterprise", new_key=False)
            for n in range(ORGANISATIONS)
        ]
        variables = {
            "DATABASE_URL": postgres.url,
            "REDIS_URL": valkey.url,
            "GPUBROKER_OWNER": made[0].owner,
            "GPUBROKER_SECRET_KEY": SECRET_KEY,
        }
        config.use(config.read(variables))
        yield Ground(variables, [each.key.key or "" for each in made])


@contextmanager
def database(ground: Ground, name: str) -> Generator[str]:
    """A further, empty database with the schema."""
    url = ground.database_url.rpartition("/")[0] + f"/{name}"
    with psycopg.connect(ground.database_url, autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        migrations.migrate(url)
        yield url
        conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
