"""The embedded servers: they start, last, stop, and never outlive the process that started them."""

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
import redis
from tests.dev import LIB, started_at, wait_until

from gpubroker.errors import SetupError
from gpubroker.local.servers import Postgres, Valkey

NOBODY = 65534
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


PARENT = """
import sys, time
from pathlib import Path
from gpubroker.errors import SetupError
from gpubroker.local.servers import Postgres, Valkey
folder = Path(sys.argv[1])
try:
    postgres, valkey = Postgres(folder / "postgres"), Valkey(folder / "valkey")
    print(postgres.start(), valkey.start(), postgres.pid, valkey.pid, flush=True)
except SetupError as error:
    print("refused:", error, flush=True)
    sys.exit(1)
sys.stdin.read()
postgres.stop()
valkey.stop()
"""


@contextlib.contextmanager
def parent(folder: Path, *prefix: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A process of its own that has both servers, until its standard input is closed."""
    command = [*prefix, sys.executable, "-c", PARENT, str(folder)]
    environment = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "PYTHONPATH": str(LIB), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline().strip()
        yield process, [line] if line.startswith("refused:") else line.split()
    finally:
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def query(url: str, sql: str = "SELECT 1") -> object:
    with psycopg.connect(url, connect_timeout=5) as connection:
        row = connection.execute(sql).fetchone()  # type: ignore[arg-type]
        return row[0] if row else None


def test_postgres_keeps_its_data_over_a_restart(tmp_path: Path) -> None:
    with Postgres(tmp_path / "pg") as postgres:
        assert query(postgres.url) == 1
        assert query(postgres.url, "SHOW fsync") == "on"
        assert query(postgres.url, "SHOW server_encoding") == "UTF8"
        with psycopg.connect(postgres.url) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 'ü' AS text")
            connection.execute("CREATE EXTENSION btree_gist")
        first = postgres.pid
    assert first is not None
    assert started_at(first) is None
    with Postgres(tmp_path / "pg", durable=False) as postgres:
        assert query(postgres.url, "SELECT text FROM kept") == "ü"
        assert query(postgres.url, "SHOW fsync") == "off"


def test_only_who_knows_the_password_gets_in(tmp_path: Path) -> None:
    with Postgres(tmp_path / "pg", durable=False) as postgres, Valkey(tmp_path / "vk") as valkey:
        secret = tmp_path / "pg" / "password"
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "pg").stat().st_mode) == 0o700
        with pytest.raises(psycopg.OperationalError, match="password"):
            query(postgres.url.replace(secret.read_text().strip(), "guess"))
        with socket.create_connection(("127.0.0.1", valkey.port or 0)) as stranger:
            stranger.sendall(b"PING\r\n")
            assert stranger.recv(100).startswith(b"-NOAUTH")
        assert redis.Redis.from_url(valkey.url).ping()
        for pid in (postgres.pid, valkey.pid):
            words = Path("/proc", str(pid), "cmdline").read_bytes()
            assert secret.read_text().strip().encode() not in words
            assert valkey.url.split("@")[0].rpartition(":")[2].encode() not in words


def test_a_server_that_was_killed_comes_back_at_its_url(tmp_path: Path) -> None:
    for server in (Postgres(tmp_path / "pg", durable=False), Valkey(tmp_path / "vk")):
        with server:
            url, pid = server.url, server.pid or 0
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda server=server: not server.is_alive())
            assert server.start() == url
            assert server.pid != pid
            if isinstance(server, Postgres):
                assert query(url) == 1
            else:
                assert redis.Redis.from_url(url).ping()
            assert server.start() == url, "a server that runs is left alone"


def test_four_valkeys_at_once(tmp_path: Path) -> None:
    servers = [Valkey(tmp_path / str(number)) for number in range(4)]
    try:
        with ThreadPoolExecutor(4) as pool:
            urls = list(pool.map(Valkey.start, servers))
        assert len(set(urls)) == 4
        assert all(redis.Redis.from_url(url).ping() for url in urls)
    finally:
        for server in servers:
            server.stop()
    assert not any(server.is_alive() for server in servers)


def test_kill_9_of_the_parent_ends_both_cleanly(tmp_path: Path) -> None:
    with parent(tmp_path) as (process, said):
        pids = [int(word) for word in said[2:]]
        assert all(started_at(pid) for pid in pids)
        assert query(said[0]) == 1
        process.kill()
        process.wait()
        wait_until(lambda: not any(started_at(pid) for pid in pids))
    assert "database system is shut down" in (tmp_path / "postgres/log").read_text()
    with Postgres(tmp_path / "postgres") as postgres:
        assert query(postgres.url) == 1
    assert "was interrupted" not in (tmp_path / "postgres/log").read_text()


def test_what_a_killed_server_left_is_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "pg"
    with Postgres(folder, durable=False):
        pass
    # The pid of a process that is alive and no PostgreSQL: PostgreSQL itself would refuse to start.
    (folder / "data/postmaster.pid").write_text(f"{os.getpid()}\n{folder}/data\n1\n1\n\n127.0.0.1\n1 1\nready\n")
    (folder / "data.new-1").mkdir()
    with Postgres(folder, durable=False) as postgres:
        assert query(postgres.url) == 1


def test_a_server_that_outlived_its_parent_is_ended_first(tmp_path: Path) -> None:
    folder = tmp_path / "pg"
    with Postgres(folder, durable=False) as postgres:
        orphan = postgres.pid or 0
        # As if another process had it: the lock is let go, the server stays.
        postgres._lock.close()  # type: ignore[union-attr]
        with Postgres(folder, durable=False) as second:
            assert query(second.url) == 1
            assert started_at(orphan) is None


def test_one_process_at_a_time_uses_a_folder(tmp_path: Path) -> None:
    with (
        Postgres(tmp_path / "pg", durable=False),
        pytest.raises(SetupError, match=f"in use by process {os.getpid()}"),
    ):
        Postgres(tmp_path / "pg").start()


def test_data_of_another_version_are_refused_in_one_line(tmp_path: Path) -> None:
    with Postgres(tmp_path / "pg", durable=False):
        pass
    (tmp_path / "pg/data/PG_VERSION").write_text("9\n")
    with pytest.raises(SetupError, match=r"written by PostgreSQL 9, here is .*18") as raised:
        Postgres(tmp_path / "pg").start()
    assert "\n" not in str(raised.value)
    (tmp_path / "pg/data/PG_VERSION").write_text("18\n")
    with Postgres(tmp_path / "pg", durable=False):
        pass


@pytest.mark.skipif(not shutil.which("/usr/lib/postgresql/15/bin/initdb"), reason="the system has no PostgreSQL 15")
def test_data_of_the_systems_version_use_its_binaries(tmp_path: Path) -> None:
    folder = tmp_path / "pg"
    folder.mkdir()
    probe = Postgres(folder, durable=False)
    from gpubroker.local import processes, servers

    prefix, owner = processes.unprivileged("INT")
    probe._create(prefix, owner, Path("/usr/lib/postgresql/15/bin"))
    with probe:
        assert str(query(probe.url, "SHOW server_version")).startswith("15.")
        assert servers._major(Path("/usr/lib/postgresql/15/bin")) == "15"


def test_a_lost_password_is_said(tmp_path: Path) -> None:
    with Postgres(tmp_path / "pg", durable=False):
        pass
    (tmp_path / "pg/password").unlink()
    with pytest.raises(SetupError, match="password is missing"):
        Postgres(tmp_path / "pg").start()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for server in (Postgres(tmp_path / "file/pg"), Valkey(tmp_path / "file/vk")):
        with pytest.raises(SetupError, match="Not a directory") as raised:
            server.start()
        assert "\n" not in str(raised.value)


def test_deep_folders_with_spaces(tmp_path: Path) -> None:
    folder = tmp_path / ("a deep 'folder'" * 6) / ('with "quotes"' * 8)
    with Postgres(folder, durable=False) as postgres, Valkey(folder / "vk") as valkey:
        assert query(postgres.url) == 1
        assert redis.Redis.from_url(valkey.url).ping()


@AS_ROOT
def test_a_normal_user_can_run_them(tmp_path: Path) -> None:
    folder = Path("/tmp", f"gpubroker-test-{os.getpid()}")
    folder.mkdir(mode=0o700)
    os.chown(folder, NOBODY, NOBODY)
    prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
    try:
        with parent(folder, *prefix) as (process, said):
            assert query(said[0]) == 1
            pid = int(said[2])
            assert Path("/proc", str(pid)).stat().st_uid == NOBODY
            process.kill()
            process.wait()
            wait_until(lambda: started_at(pid) is None)
        folder.chmod(0o500)
        shutil.rmtree(folder / "postgres")
        with parent(folder, *prefix) as (process, said):
            assert "Permission denied" in said[0]
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


CONTAINER = """
import ctypes, os, sys
begin, done = os.pipe(), os.pipe()
outside = os.getpid()
if os.fork() == 0:
    os.read(begin[0], 1)
    for kind in ("uid", "gid"):
        open(f"/proc/{outside}/{kind}_map", "w").write("0 0 100000")
    os._exit(0)
assert ctypes.CDLL(None).unshare(0x10000000) == 0
os.write(begin[1], b"x")
assert os.wait()[1] == 0
open("/proc/sys/user/max_user_namespaces", "w").write("0")
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Runs a command as root of a user namespace in which no further ones can be made, as in most containers."""


@AS_ROOT
def test_root_without_user_namespaces_becomes_nobody(tmp_path: Path) -> None:
    container = [sys.executable, "-c", CONTAINER]
    if subprocess.run([*container, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("user namespaces cannot be made here")
    assert subprocess.run([*container, "unshare", "--user", "true"], capture_output=True, check=False).returncode != 0
    with Postgres(tmp_path / "postgres", durable=False):
        pass
    with parent(tmp_path, *container) as (process, said):
        assert query(said[0]) == 1
        pid = int(said[2])
        assert Path("/proc", str(pid)).stat().st_uid == NOBODY
        process.kill()
        process.wait()
        wait_until(lambda: started_at(pid) is None)
    with Postgres(tmp_path / "postgres", durable=False) as postgres:
        assert query(postgres.url) == 1, "root proper takes its files back"


@AS_ROOT
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    script = 'mount -t tmpfs -o size=8m none "$0" && exec "$@"'
    with parent(tmp_path, "unshare", "--mount", "sh", "-c", script, str(tmp_path)) as (_, said):
        assert said[0].startswith("refused:")
        assert "No space left on device" in said[0]


def test_a_port_taken_meanwhile_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The race that the wheel's wrapper loses, made certain: the first port found is taken."""
    from gpubroker.local import processes

    with socket.create_server(("127.0.0.1", 0)) as taken:
        for server in (Postgres(tmp_path / "pg", durable=False), Valkey(tmp_path / "vk")):
            real = processes.free_port
            ports = iter([taken.getsockname()[1], real()])
            monkeypatch.setattr(processes, "free_port", lambda ports=ports: next(ports))
            with server:
                assert server.port != taken.getsockname()[1]
            monkeypatch.setattr(processes, "free_port", real)


def test_without_binaries_it_says_what_to_do(tmp_path: Path) -> None:
    """Without site-packages there are no wheels; this machine's own servers may do instead."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from gpubroker.errors import SetupError\n"
        "from gpubroker.local import servers\n"
        "for server in (servers.Postgres, servers.Valkey):\n"
        "    try:\n"
        "        with server(Path(sys.argv[2], server.__name__)): print('system')\n"
        "    except SetupError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(LIB), str(tmp_path)], capture_output=True, text=True, check=True, env={}
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line == "system" or "pip install 'gpubroker[local]'" in line for line in lines)
