"""A real cluster with Knative: any that KUBECONFIG names. Without one these tests skip.

They need the images that `.ci/cluster` builds, and deploy knative/overlays/quickstart once for all of them, into namespaces
that they delete first. On another cluster than the kit's, GPUBROKER_CLUSTER_INGRESS is where Knative's ingress answers.
"""

import base64
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.cluster import kit

OVERLAY = Path(__file__).parent / "overlay"
FUNCTIONS = (
    "auth",
    "offers",
    "pods",
    "exec",
    "usage",
    "provisioning",
    "metering",
    "reconcile",
    "catalog",
    "deadletter",
)


@pytest.fixture(autouse=True)
def _no_sockets_in_unit_tests() -> None:
    """Everything here is about sockets."""


def kubectl(*arguments: str, stdin: str | None = None, check: bool = True, timeout: float = 180) -> str:
    """Run kubectl and give what it prints."""
    done = subprocess.run(
        ["kubectl", *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=timeout
    )
    assert not check or done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
    return done.stdout if done.returncode == 0 else done.stdout + done.stderr


def get(*arguments: str) -> list[dict[str, Any]]:
    """Objects as they are."""
    found = json.loads(kubectl("get", *arguments, "-o", "json"))
    return found["items"] if found["kind"].endswith("List") else [found]


def until(what: str, condition: Callable[[], Any], seconds: float = 60, pause: float = 0.5) -> Any:
    """Wait for something to be true, with a deadline."""
    deadline = time.monotonic() + seconds
    while True:
        last = condition()
        if last:
            return last
        assert time.monotonic() < deadline, f"after {seconds} s still not: {what}"
        time.sleep(pause)


@dataclass
class Deployed:
    """The broker on the cluster, and an agent that calls it through the ingress."""

    ingress: str
    hosts: dict[str, str]
    key: str = field(default="", repr=False)

    def call(self, method: str, path: str, *, function: str | None = None, **arguments: Any) -> httpx.Response:
        """One request to the function that serves the path."""
        from gpubroker import bundle

        served = [f.name for f in bundle.FUNCTIONS if any(path.partition("?")[0].startswith(p) for p in f.paths)]
        headers = {"Host": self.hosts[function or served[0]], "Authorization": f"Bearer {self.key}"}
        headers |= arguments.pop("headers", {})
        return httpx.request(method, self.ingress + path, headers=headers, timeout=100, trust_env=False, **arguments)

    def json(self, method: str, path: str, status: int | tuple[int, ...] = 200, **arguments: Any) -> Any:
        answer = self.call(method, path, **arguments)
        assert answer.status_code in ((status,) if isinstance(status, int) else status), (
            f"{method} {path}: {answer.text}"
        )
        return answer.json()

    def rent(self, *, wait: str = "&wait=60&until=running", **request: Any) -> Any:
        """Ask for a pod of one GPU that runs what a customer runs."""
        body = {
            "image": kit.IMAGES["customer"],
            "requirements": {"gpu_count": 1},
            "max_lifetime_seconds": 900,
        } | request
        return self.json("POST", f"/v1/pods?duplicate=allow{wait}", (201, 202), json=body)

    def await_state(self, pod_id: str, *states: str, seconds: float = 90) -> Any:
        def reached() -> Any:
            answer = self.call("GET", f"/v1/pods/{pod_id}")
            pod = answer.json() if answer.status_code == 200 else {}
            return pod if pod.get("state") in states else None

        try:
            return until(f"{pod_id} is one of {states}", reached, seconds)
        except AssertionError as failure:
            raise AssertionError(f"{failure}\n{self.explain(pod_id)}") from None

    def explain(self, pod_id: str) -> str:
        """All that is known of a pod that does not become what it should: rows, objects, and what the functions said."""
        row = "SELECT state, state_reason, wanted, due_at, failures, turn, clock_timestamp() FROM pod WHERE id = "
        asked = [
            ("the pod", lambda: self.sql(f"{row}'{pod_id}';")),
            ("its instances", lambda: self.sql(f"SELECT row_to_json(i) FROM instance i WHERE pod_id = '{pod_id}';")),
            ("accounts", lambda: self.sql("SELECT provider, distrust_until, last_error FROM provider_account;")),
            ("listings", lambda: self.sql("SELECT row_to_json(l) FROM listing l ORDER BY began_at DESC LIMIT 5;")),
            ("objects", lambda: kubectl("-n", "gpubroker-pods", "get", "jobs,pods", "-o", "wide").splitlines()),
            ("functions", lambda: kubectl("-n", "gpubroker", "get", "pods", "-o", "wide").splitlines()),
            *(
                (f"{function} said", lambda function=function: read_logs(function))
                for function in ("reconcile", "provisioning")
            ),
        ]
        said: list[str] = []
        for what, ask in asked:
            try:
                said += [f"{what}:", *ask()]
            except (AssertionError, subprocess.SubprocessError) as error:
                said.append(f"{what} cannot be asked for: {error}")
        return "\n".join(said)

    def sql(self, query: str) -> list[str]:
        """Ask the database, as its owner."""
        said = kubectl(
            "-n", "gpubroker", "exec", "-i", "postgres-0", "--", "psql", "-h", "/var/run/postgresql", "-U", "gpubroker", "-AtqX",
            "-v", "ON_ERROR_STOP=1", "gpubroker", stdin=query,
        )  # fmt: skip
        return said.splitlines()

    def check_invariants(self) -> None:
        """No pod without its end, no instance that is nobody's, and money that adds up."""
        over = self.sql("SELECT agent_id FROM budget WHERE limit_micro IS NOT NULL AND committed_micro > limit_micro;")
        assert not over
        wrong = self.sql(
            """SELECT h.id, h.drawn_micro, coalesce(sum(l.amount_micro), 0) FROM hold h LEFT JOIN ledger l ON l.hold_id = h.id
               GROUP BY h.id HAVING h.drawn_micro <> coalesce(sum(l.amount_micro), 0);"""
        )
        assert not wrong
        twice = self.sql(
            """SELECT a.instance_id FROM usage_interval a JOIN usage_interval b
               ON a.instance_id = b.instance_id AND a.id < b.id AND a.during && b.during;"""
        )
        assert not twice
        live = set(self.sql("SELECT provider_instance_id FROM instance WHERE gone_at IS NULL;"))
        running = {
            each["metadata"]["labels"]["gpubroker.io/ref"]
            for each in get("pods", "-n", "gpubroker-pods")
            if each["status"]["phase"] in ("Pending", "Running") and not each["metadata"].get("deletionTimestamp")
        }
        assert running <= live, f"nobody's: {running - live}"


def read_logs(function: str) -> list[str]:
    """The last words of the pods that a function has now."""
    chosen = f"serving.knative.dev/service={function}"
    return kubectl(
        "-n", "gpubroker", "logs", "-l", chosen, "-c", "user-container", "--timestamps", "--tail=15", "--prefix", check=False
    ).splitlines()  # fmt: skip


@pytest.fixture(scope="session")
def cluster() -> str:
    """A cluster with Knative and what is needed to talk to it."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG names no cluster (../shared/cluster/up --knative brings one up; .ci/run does)")
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    if "serving.knative.dev" not in kubectl("api-versions", check=False):
        pytest.skip("the cluster that KUBECONFIG names cannot be reached, or has no Knative")
    return os.environ["KUBECONFIG"]


@pytest.fixture(scope="session")
def gpus(cluster: str) -> Iterator[int]:
    """GPUs to rent: the cluster's own, or on the kit pretended ones."""
    with kit.gpus(8):
        found = sum(int(node["status"]["allocatable"].get("nvidia.com/gpu", 0)) for node in get("nodes"))
        if not found:
            pytest.skip("the cluster has no GPUs, and is not the kit that can pretend to have them")
        yield found


@pytest.fixture(scope="session")
def broker(cluster: str, gpus: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """`kubectl apply -k` on an empty cluster, and a key."""
    kit.settle_network()
    # What sends events goes first: sent into a namespace that is going, they would be held for the next one's functions.
    with contextlib.suppress(subprocess.TimeoutExpired):
        kubectl("-n", "gpubroker", "delete", "pingsource,trigger,broker", "--all", check=False, timeout=120)
    kubectl("delete", "namespace", "gpubroker", "gpubroker-pods", "--ignore-not-found", timeout=600)
    with kit.volume("gpubroker", "data-postgres-0", tmp_path_factory):
        kubectl("apply", "-k", str(OVERLAY))
        password, cache = secrets.token_hex(16), secrets.token_hex(16)
        values = {
            "GPUBROKER_OWNER": secrets.token_hex(4),
            "GPUBROKER_SECRET_KEY": secrets.token_hex(32),
            "POSTGRES_PASSWORD": password,
            "REDIS_PASSWORD": cache,
            "DATABASE_URL": f"postgresql://gpubroker:{password}@postgres/gpubroker",
            "REDIS_URL": f"redis://:{cache}@valkey/0",
        }
        secret = ["create", "secret", "generic", "gpubroker", *(f"--from-literal={n}={v}" for n, v in values.items())]
        kubectl("-n", "gpubroker", *secret)
        kubectl("-n", "gpubroker", "wait", "--for=condition=Complete", "job/migrate", "--timeout=180s", timeout=200)
        kubectl("-n", "gpubroker", "wait", "--for=condition=Ready", "ksvc", "--all", "--timeout=240s", timeout=260)
        kubectl(
            "-n", "gpubroker", "wait", "--for=condition=Ready", "broker,trigger,pingsource", "--all", "--timeout=120s"
        )
        kubectl("-n", "gpubroker", "create", "job", "first-key", "--from=cronjob/bootstrap")
        kubectl("-n", "gpubroker", "wait", "--for=condition=Complete", "job/first-key", "--timeout=120s", timeout=140)
        made = json.loads(kubectl("-n", "gpubroker", "logs", "job/first-key"))
        kubectl("-n", "gpubroker", "delete", "job", "first-key")
        hosts = {
            each["metadata"]["name"]: each["status"]["url"].rpartition("//")[2]
            for each in get("ksvc", "-n", "gpubroker")
        }
        deployed = Deployed(os.environ.get("GPUBROKER_CLUSTER_INGRESS", "http://10.96.0.80"), hosts, made["key"]["key"])

        def has_offers() -> bool:
            answer = deployed.call("GET", "/v1/offers")
            return answer.status_code == 200 and bool(answer.json()["items"])

        until("there are offers", has_offers, 150, 2)
        yield deployed
        kubectl("delete", "namespace", "gpubroker", "gpubroker-pods", "--wait=false")


def read_secret(name: str, key: str) -> str:
    (found,) = get("secret", name, "-n", "gpubroker")
    return base64.b64decode(found["data"][key]).decode()
