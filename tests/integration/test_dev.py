"""`gpubroker dev`: all functions in one process, and the command as a whole, from its start to kill -9."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from tests.dev import Dev, bootstrap, dev, pids_of, started_at, wait_until

from gpubroker.bundle import Function
from gpubroker.errors import SetupError
from gpubroker.local.gateway import Gateway, Internal, load

# All functions in one process

MAIN = """
import functions_framework.aio
from starlette.responses import JSONResponse, Response

WHO = "{name}"

@functions_framework.aio.http
async def {name}(request):
    path = request.url.path
    if path == "/healthz":
        return Response(status_code={health})
    if path == "/openapi/{name}.json":
        schemas = {{"{name}": {{}}}}
        return JSONResponse({{"openapi": "3.1.0", "paths": {{"/v1/{name}": {{}}}}, "components": {{"schemas": schemas}}}})
    answer = {{"who": WHO, "path": path, "method": request.method, "query": str(request.query_params)}}
    return JSONResponse(answer | {{"body": (await request.body()).decode()}})
"""

FUNCTIONS = (
    Function("first", "public", "", paths=("/v1/pods", "/v1/keys")),
    Function("second", "public", "", paths=("/v1/pods/special", "/v1/gpus")),
    Function("worker", "consumer", ""),
)


def make(folder: Path, name: str, text: str | None = None, *, health: int = 200) -> Path:
    source = folder / name / "main.py"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(text or MAIN.format(name=name, health=health))
    return source


def load_all(folder: Path, **health: int) -> dict[str, Any]:
    return load({f.name: make(folder, f.name, health=health.get(f.name, 200)) for f in FUNCTIONS})


def call(app: Any, method: str, path: str, **more: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, **more)

    return asyncio.run(once())


def test_functions_of_one_process_do_not_meet(tmp_path: Path) -> None:
    path, modules = list(sys.path), set(sys.modules)
    apps = load_all(tmp_path)
    for name, app in apps.items():
        assert call(app, "GET", "/").json()["who"] == name
    assert sys.path == path
    assert "main" not in set(sys.modules) - modules
    assert not {"FUNCTION_TARGET", "FUNCTION_SIGNATURE_TYPE"} & set(os.environ)


def test_a_function_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"gone cannot be loaded: .*doesn't exist"):
        load({"gone": tmp_path / "gone/main.py"})
    with pytest.raises(SetupError, match="expected to contain a function named 'other'"):
        load({"other": make(tmp_path, "first")})


@pytest.mark.parametrize(
    ("path", "who"),
    [
        ("/v1/pods", "first"), ("/v1/pods/", "first"), ("/v1/pods/pod_1/events", "first"), ("/v1/keys/1", "first"),
        ("/v1/pods/special", "second"), ("/v1/pods/special/x", "second"), ("/v1/pods/specialist", "first"),
        ("/v1/gpus", "second"), ("/openapi/second.json/x", "second"),
        ("/v1/podsx", "first"), ("/", "first"), ("/nothing", "first"), ("/worker", "first"), ("/broker", "first"),
    ],
)  # fmt: skip
def test_the_gateway_routes_by_whole_segments(tmp_path: Path, path: str, who: str) -> None:
    gateway = Gateway(load_all(tmp_path), FUNCTIONS)
    answer = call(gateway, "POST", f"{path}?a=1", content="text").json()
    assert answer == {"who": who, "path": path, "method": "POST", "body": "text", "query": "a=1"}


def test_the_gateway_is_healthy_when_all_functions_are(tmp_path: Path) -> None:
    assert call(Gateway(load_all(tmp_path), FUNCTIONS), "GET", "/healthz").status_code == 200
    answer = call(Gateway(load_all(tmp_path, worker=503, second=500), FUNCTIONS), "GET", "/healthz")
    assert answer.status_code == 503
    assert answer.json()["functions"] == ["second", "worker"]


def test_the_gateway_merges_openapi(tmp_path: Path) -> None:
    merged = call(Gateway(load_all(tmp_path), FUNCTIONS), "GET", "/openapi.json").json()
    assert merged == {
        "openapi": "3.1.0",
        "paths": {"/v1/first": {}, "/v1/second": {}},
        "components": {"schemas": {"first": {}, "second": {}}},
    }
    assert call(Gateway(load_all(tmp_path), FUNCTIONS), "GET", "/openapi/second.json").status_code == 200


def test_the_internal_host_reaches_every_service_at_its_root(tmp_path: Path) -> None:
    apps = load_all(tmp_path)
    internal = Internal(apps, apps["first"])
    answer = call(internal, "POST", "/worker", content="event").json()
    assert (answer["who"], answer["path"], answer["body"]) == ("worker", "/", "event")
    assert call(internal, "GET", "/worker/x/y").json()["path"] == "/x/y"
    assert call(internal, "POST", "/broker").json()["who"] == "first"
    assert call(internal, "POST", "/nobody").status_code == 404


# The command


def refusal(data: Path, *words: str, port: int = 0, **environment: str) -> str:
    """What a `dev` that cannot be says, in its last line; nothing on stdout, no traceback, exit code 1."""
    it = Dev(data, *words, port=port, **environment)
    try:
        assert it.process.wait(20) == 1, it.said()
        assert it.first_line() == ""
        assert "Traceback" not in it.said()
        return it.said().splitlines()[-1]
    finally:
        it.process.kill()
        it.process.communicate()
        it.log.close()


def test_dev_from_start_to_end_and_again(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with dev(data, "--json") as it:
        ready = it.ready()
        url = ready["url"]
        assert set(ready) == {"event", "url", "port", "pid", "data", "owner", "database_url", "redis_url"}
        assert (ready["event"], ready["pid"], ready["data"]) == ("ready", it.process.pid, str(data))
        assert url == f"http://127.0.0.1:{ready['port']}"
        run = data / "run.json"
        assert stat.S_IMODE(run.stat().st_mode) == 0o600
        assert json.loads(run.read_text()) == ready
        assert stat.S_IMODE((data / "secret.key").stat().st_mode) == 0o600
        assert stat.S_IMODE(data.stat().st_mode) == 0o700

        assert httpx.get(f"{url}/healthz").status_code == 200
        for path in ("/nothing", "/provisioning", "/reconcile", "/deadletter", "/broker", "/v1/podsx"):
            answer = httpx.post(f"{url}{path}", json={})
            assert answer.status_code == 404, path
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["code"] == "not_found"
        with psycopg.connect(ready["database_url"]) as connection:
            assert connection.execute("SELECT owner FROM installation").fetchone() == (ready["owner"],)

        assert refusal(data) == f"gpubroker: {data} is in use by process {it.process.pid}"
        assert f"cannot listen on 127.0.0.1:{ready['port']}" in refusal(tmp_path / "other", port=ready["port"])
        assert not (tmp_path / "other").exists(), "the port is tried before anything else"

        servers = it.servers()
        assert len(servers) == 2
        assert it.tell(signal.SIGTERM) == 0
        assert not any(started_at(pid) for pid in servers)
        assert not run.exists()
        assert it.first_line() == "", "one line on stdout"

    with dev(data, "--json") as it:
        again = it.ready()
        assert again["owner"] == ready["owner"]
        servers = it.servers()
        it.process.kill()
        it.process.wait()
        wait_until(lambda: not any(started_at(pid) for pid in servers))

    key = (data / "secret.key").read_text()
    (data / "secret.key").unlink()
    assert "secret.key is missing" in refusal(data)
    (data / "secret.key").write_text(key)


def test_servers_that_die_come_back_but_not_for_ever(tmp_path: Path) -> None:
    with dev(tmp_path / "data") as it:
        found = re.fullmatch(
            r"gpubroker ready at (\S+) \(first key: gpubroker bootstrap --data \S+\)\n", it.first_line()
        )
        assert found, it.said()
        for pid in it.servers():
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: f"(process {pid}) died; starting it again" in it.said())
            wait_until(lambda: httpx.get(f"{found[1]}/healthz", timeout=10).status_code == 200, 15)
        until = time.monotonic() + 20
        while it.process.poll() is None and time.monotonic() < until:
            for pid in it.servers()[1:]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        assert it.process.returncode == 1
        assert re.match(r"gpubroker: Valkey (dies again and again|does not start)", it.said().splitlines()[-1])


def test_a_signal_while_it_starts_ends_it(tmp_path: Path) -> None:
    for number, reached in ((signal.SIGTERM, "postgres/lock"), (signal.SIGINT, "valkey/lock")):
        data = tmp_path / number.name
        with dev(data) as it:
            wait_until(lambda data=data, reached=reached: (data / reached).exists())
            assert it.tell(number) == 0
            assert it.first_line() == ""
            assert "Traceback" not in it.said()
            wait_until(lambda: not any(started_at(pid) for pid in it.servers()))


def test_servers_that_are_given_are_used(tmp_path: Path) -> None:
    with dev(tmp_path / "one", "--json") as one:
        first = one.ready()
        given = {"DATABASE_URL": first["database_url"], "REDIS_URL": first["redis_url"]}
        key = (tmp_path / "one/secret.key").read_text().strip()
        with dev(tmp_path / "two", "--json", GPUBROKER_SECRET_KEY=key, **given) as two:
            second = two.ready()
            assert (second["owner"], second["database_url"]) == (first["owner"], first["database_url"])
            assert two.servers() == []
            assert not (tmp_path / "two/secret.key").exists()
            assert two.tell(signal.SIGTERM) == 0
        assert "belongs to" in refusal(tmp_path / "two", GPUBROKER_OWNER="aaaaaaaa", **given)
        with psycopg.connect(first["database_url"]) as connection:
            connection.execute("INSERT INTO migration VALUES (9999, 'later', 'x', 9999)")
        assert "newer version" in refusal(tmp_path / "two", **given)


def test_wrong_set_ups_are_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    away = f"postgresql://u:secret@127.0.0.1:{port}/x"
    line = refusal(tmp_path / "a", DATABASE_URL=away, REDIS_URL="redis://127.0.0.1:1")
    assert "database cannot be reached" in line
    assert "secret" not in line
    assert "GPUBROKER_TICK_SECONDS must be" in refusal(tmp_path / "b", GPUBROKER_TICK_SECONDS="often")
    assert "GPUBROKER_LOCAL_VCPUS must be" in refusal(tmp_path / "c", GPUBROKER_LOCAL_VCPUS="many")
    (tmp_path / "file").touch()
    assert "cannot make the folder" in refusal(tmp_path / "file/data")
    if os.geteuid() == 0 and shutil.which("setpriv"):
        folder = tmp_path / "closed"
        folder.mkdir()
        (folder / "dev.lock").mkdir()
        assert "cannot write in" in refusal(folder)


def make_pod(data: Path, ready: dict[str, Any]) -> tuple[httpx.Client, dict[str, Any]]:
    """A pod of this machine that runs, and a client with its key."""
    client = httpx.Client(base_url=ready["url"], headers={"Authorization": f"Bearer {bootstrap(data)}"}, timeout=30)
    assert client.get("/v1/offers").json()["items"], "offers are there when it is ready"
    body = {"requirements": {"provider": "local"}, "command": ["sleep", "600"], "max_lifetime_seconds": 300}
    answer = client.post("/v1/pods?wait=20&until=running", json=body)
    assert answer.json()["state"] == "running", answer.text
    return client, answer.json()


def test_pods_stay_and_are_listed_or_are_ended_first(tmp_path: Path) -> None:
    data = tmp_path / "data"
    supervisors: set[int] = set()
    try:
        with dev(data, "--json") as it:
            client, pod = make_pod(data, it.ready())
            with contextlib.closing(client), ThreadPoolExecutor(2) as waiting:
                for path in (f"/v1/pods/{pod['id']}?wait=60&until=settled", f"/v1/logs/{pod['id']}?follow=true"):
                    waiting.submit(client.get, path)
                time.sleep(0.3)
                assert it.tell(signal.SIGTERM) == 0, "requests that wait hold nothing up"
            assert f"{pod['provider_instance_id']}: running, hard stop 20" in it.said()
            assert "Traceback" not in it.said(), it.said()
            supervisors = pids_of(data / "pods")
            assert supervisors
        with dev(data, "--json", "--end-pods") as it:
            it.ready()
            assert supervisors <= pids_of(data / "pods")
            assert it.tell(signal.SIGTERM, 20) == 0
            assert "pods that go on" not in it.said()
            wait_until(lambda: not pids_of(data / "pods"))
    finally:
        for pid in supervisors & pids_of(data / "pods"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
