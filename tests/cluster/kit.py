"""What only the kit of ../shared/cluster can do: pretend GPUs, volumes of this machine, an API server that is killed."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HOME = Path(__file__).parents[3] / "shared/cluster"
RUN = Path(os.environ.get("GPUBROKER_CLUSTER_HOME", Path.home() / ".cache/gpubroker-cluster")) / "run"
IMAGES = {name: f"kit.local/{name}:test" for name in ("gpubroker", "postgres", "valkey", "customer")}


def is_here() -> bool:
    """KUBECONFIG names the kit's own cluster."""
    return HOME.is_dir() and os.environ.get("KUBECONFIG", "").startswith(str(RUN))


@contextlib.contextmanager
def gpus(count: int) -> Iterator[None]:
    """GPUs that are counted and scheduled, for as long as this lasts."""
    if not is_here():
        yield
        return
    subprocess.run([HOME / "fake-gpus", str(count)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run([HOME / "fake-gpus", "0"], check=False, capture_output=True)


def settle_network() -> None:
    """Tell Knative that there is no mesh, as docs/operate.md advises, and have its data plane begin with that.

    Else it tries a Service's address while kube-proxy is about to tell it to the node. Such a connection leaves the machine,
    whose gateway answers 404 to whatever is asked over it, and the activator keeps it: seen to hold a request up for 87 s.
    """
    if not is_here():
        return
    patch = ["patch", "configmap", "config-network", "--type=merge", "-p"]
    told = _knative(*patch, '{"data":{"mesh-compatibility-mode":"disabled"}}')
    if "no change" in told:
        return
    deployments = ["deployment/activator", "deployment/autoscaler"]
    _knative("rollout", "restart", *deployments)
    for deployment in deployments:
        _knative("rollout", "status", deployment, "--timeout=120s")


def _knative(*arguments: str) -> str:
    command = ["kubectl", "-n", "knative-serving", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=130).stdout


def open_to_pods(folder: Path, user: int) -> None:
    """Make a folder one that a pod's user owns and reaches."""
    for parent in [folder, *folder.parents]:
        if parent.stat().st_mode & 0o005 != 0o005 and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    shutil.chown(folder, user, user)


@contextlib.contextmanager
def volume(namespace: str, claim: str, folders: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of this machine for a claim: the kit has no storage class."""
    if not is_here():
        yield
        return
    folder = folders.mktemp("volume")
    open_to_pods(folder, 70)
    name = f"{namespace}-{claim}"
    manifest = f"""
apiVersion: v1
kind: PersistentVolume
metadata: {{name: {name}}}
spec:
  capacity: {{storage: 10Gi}}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  claimRef: {{namespace: {namespace}, name: {claim}}}
  hostPath: {{path: {folder}}}
"""
    subprocess.run(
        ["kubectl", "delete", "pv", name, "--ignore-not-found"], check=False, capture_output=True, timeout=60
    )
    subprocess.run(["kubectl", "apply", "-f", "-"], input=manifest, text=True, check=True, capture_output=True)
    yield
    subprocess.run(["kubectl", "delete", "pv", name, "--wait=false"], check=False, capture_output=True)


def build(name: str, dockerfile: str, folder: Path) -> str:
    """Build an image from a folder and give it to the cluster. Gives its name."""
    (folder / "Dockerfile").write_text(dockerfile)
    command = [HOME / "image", "build", "-f", folder / "Dockerfile", "-t", name, folder]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return name


def restart_api_server() -> None:
    """Kill it and bring it back, as its supervisor would."""
    pid = int((RUN / "pids/apiserver").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():  # `up` starts none while one is there, however dead; its memory takes a moment
        assert time.monotonic() < deadline, f"{pid} was killed and is still there"
        time.sleep(0.05)
    subprocess.run([HOME / "up", "--knative"], check=True, capture_output=True, timeout=300)
