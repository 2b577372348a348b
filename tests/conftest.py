"""Fixtures: real PostgreSQL and Valkey, a database of its own per test, time that can be moved.

The servers come from an explicit URL (GPUBROKER_TEST_DATABASE_URL, GPUBROKER_TEST_REDIS_URL), else from a Docker engine
that has the images, else from the embedded wheels.
"""

import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest
from tests.dev import Running, broker_of_its_own
from tests.factories import SECRET_KEY, World

from gpubroker import accounts, adapters, config, outbox, rates, signing, store
from gpubroker.local.servers import Postgres, Valkey
from gpubroker.store import migrations

IMAGES = {"postgres": "postgres:17-alpine", "valkey": "valkey/valkey:8-alpine"}


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_sockets_in_unit_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "/unit/" in str(request.path):
        import socket

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("a unit test opened a socket")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket.socket, "bind", refuse)


def _docker_has(image: str) -> bool:
    if shutil.which("docker") is None:
        return False
    return (
        subprocess.run(["docker", "image", "inspect", image], capture_output=True, check=False, timeout=20).returncode
        == 0
    )


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    given = os.environ.get("GPUBROKER_TEST_DATABASE_URL")
    if given:
        yield given
    elif _docker_has(IMAGES["postgres"]):
        from testcontainers.community.postgres import PostgresContainer

        with PostgresContainer(IMAGES["postgres"], driver=None) as container:
            yield container.get_connection_url()
    else:
        with Postgres(tmp_path_factory.mktemp("postgres"), durable=False) as server:
            yield server.url


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    given = os.environ.get("GPUBROKER_TEST_REDIS_URL")
    if given:
        yield given
    elif _docker_has(IMAGES["valkey"]):
        from testcontainers.community.redis import RedisContainer

        with RedisContainer(IMAGES["valkey"]) as container:
            yield f"redis://{container.get_container_host_ip()}:{container.get_exposed_port(6379)}/0"
    else:
        with Valkey(tmp_path_factory.mktemp("valkey")) as server:
            yield server.url


def at_database(url: str, name: str) -> str:
    """The same server, another database."""
    return re.sub(r"(://[^/]+/)[^?]*", rf"\g<1>{name}", url)


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A `gpubroker dev` that the tests of a process share: nothing of it is theirs alone but what they make."""
    with broker_of_its_own(tmp_path_factory.mktemp("dev") / "data") as running:
        yield running


_MOVABLE_CLOCK = """
CREATE TABLE clock (shift interval NOT NULL, frozen timestamptz);
INSERT INTO clock VALUES ('0', NULL);
GRANT SELECT ON clock TO gpubroker_public, gpubroker_worker;
CREATE OR REPLACE FUNCTION instant() RETURNS timestamptz LANGUAGE sql VOLATILE AS
  'SELECT coalesce(frozen, clock_timestamp()) + shift FROM clock';
"""


@pytest.fixture(scope="session")
def template(postgres_url: str) -> str:
    """A migrated database with an owner and a clock that can be moved; tests get copies of it."""
    name = f"gpubroker_template_{os.getpid()}"
    with psycopg.connect(postgres_url, autocommit=True) as conn:
        conn.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        conn.execute(f"CREATE DATABASE {name}")
    url = at_database(postgres_url, name)
    migrations.migrate(url)
    accounts.install(url)
    with psycopg.connect(url) as conn:
        conn.execute(_MOVABLE_CLOCK)
    return name


@pytest.fixture
def database_url(postgres_url: str, template: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """A database of the test's own."""
    name = f"gb_{os.getpid()}_{abs(hash(request.node.nodeid)) % 10**9}"
    with psycopg.connect(postgres_url, autocommit=True) as conn:
        conn.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        conn.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        yield at_database(postgres_url, name)
        conn.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def world(database_url: str, tmp_path: Path, anyio_backend: str) -> AsyncIterator[World]:
    """The broker in this process: every function's app, a simulated provider, an organisation with a root key."""
    with psycopg.connect(database_url) as conn:
        (owner,) = conn.execute("SELECT owner FROM installation").fetchone() or ("",)
    before = config.settings() if config._settings else None
    config.use(
        config.read(
            {
                "DATABASE_URL": database_url,
                "GPUBROKER_OWNER": owner,
                "GPUBROKER_SECRET_KEY": SECRET_KEY,
                "GPUBROKER_POOL_SIZE": "8",
                "GPUBROKER_PROVIDERS": "",
                "GPUBROKER_LOCAL_DIR": str(tmp_path / "pods"),
            }
        )
    )
    made = World(database_url, owner)
    try:
        await made.open()
        yield made
    finally:
        await made.close()
        await outbox.close()
        await rates.limiter.close()
        await adapters.close()
        await store.close()
        signing.forget_keys()
        config.use(before or config.read({}))
