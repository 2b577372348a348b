"""The provider `kubernetes` on a real cluster, beyond what every adapter keeps: disks that outlast a stop, slices of GPUs."""

import asyncio
import contextlib
import json
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.cluster import kit
from tests.cluster.conftest import Deployed, get, kubectl, until

from gpubroker import config
from gpubroker.errors import AmbiguousOutcome, ProviderError, Rejected
from gpubroker.ids import base36
from gpubroker.providers import base
from gpubroker.providers.kubernetes import Kubernetes

SLICE = "nvidia.com/mig-1g.10gb"
CLASS = "gpubroker-test"
VOLUME = """
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {{name: {name}}}
provisioner: kubernetes.io/no-provisioner
---
apiVersion: v1
kind: PersistentVolume
metadata: {{name: {name}}}
spec:
  capacity: {{storage: 10Gi}}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  storageClassName: {name}
  hostPath: {{path: {folder}}}
"""


def make_ref() -> str:
    """A reference of an installation of the test's own, so that no sweep of the deployed one has a say."""
    return f"gb-testtest-{secrets.token_hex(13)}-{base36(int(time.time()) + 900)}"


def make_spec(*command: str) -> base.Spec:
    hard_stop = datetime.now(UTC) + timedelta(minutes=15)
    return base.Spec("pod_1", command, kit.IMAGES["customer"], {}, (), 1, hard_stop)


async def await_life(adapter: Kubernetes, ref: str, *lives: base.Life, seconds: float = 60) -> base.Instance:
    deadline = time.monotonic() + seconds
    while (seen := await adapter.get(ref)).life not in lives:
        assert time.monotonic() < deadline, seen
        await asyncio.sleep(0.3)
    return seen


def play(settings: dict[str, str], story: Callable[[Kubernetes], Awaitable[None]]) -> None:
    """Tell a story with an adapter of its own, which uses the namespace that the deployed broker uses."""

    async def tell() -> None:
        adapter = Kubernetes.from_settings(config.read(settings))
        try:
            await story(adapter)
        finally:
            for instance in await adapter.list_managed("testtest"):
                await adapter.terminate(instance.id)
            await adapter.close()

    asyncio.run(tell())


@pytest.fixture
def storage(broker: Deployed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A storage class with one volume, a folder of this machine."""
    if not kit.is_here():
        pytest.skip("only on the kit a volume is a folder of this machine")
    folder = tmp_path_factory.mktemp("disk")
    kit.open_to_pods(folder, 1000)
    made = VOLUME.format(name=CLASS, folder=folder)
    kubectl("apply", "-f", "-", stdin=made)
    yield CLASS
    kubectl("delete", "--wait=false", "-f", "-", stdin=made, check=False)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def cut_off(adapter: Kubernetes, collection: str) -> Iterator[None]:
    """Nothing can be added to a collection meanwhile."""
    call = adapter.cluster.call

    async def cut(method: str, path: str, *arguments: Any, **query: Any) -> Any:
        if (method, path.rpartition("/")[2]) == ("POST", collection):
            raise ProviderError("cut_off", "the caller is gone")
        return await call(method, path, *arguments, **query)

    adapter.cluster.call = cut
    try:
        yield
    finally:
        adapter.cluster.call = call


def test_a_stopped_pod_keeps_its_disk(storage: str, cluster: str) -> None:
    async def story(adapter: Kubernetes) -> None:
        offer = next(each for each in await adapter.list_offers() if each.gpu_count == 1)
        assert "stop" in offer.supports
        ref = make_ref()
        script = "echo run >> /workspace/runs; wc -l < /workspace/runs; sleep 600"
        await adapter.create(make_spec("sh", "-c", script), offer, ref)
        await await_life(adapter, ref, "running")
        await adapter.stop(ref)
        stopped = await await_life(adapter, ref, "stopped")
        assert stopped.billing == "none"
        until("its pod is gone", lambda: not get("pods", "-n", "gpubroker-pods", "-l", f"gpubroker.io/ref={ref}"), 30)
        await adapter.start(ref)
        await await_life(adapter, ref, "running")
        ran = await adapter.exec(ref, ["cat", "/workspace/runs"], stdin=None, timeout_seconds=10)
        assert ran.stdout == b"run\nrun\n"
        await adapter.start(ref)  # as a driver that was not told would: it runs already
        await adapter.stop(ref)
        await await_life(adapter, ref, "stopped")
        with cut_off(adapter, "jobs"), pytest.raises(ProviderError):
            await adapter.start(ref)
        cut = await adapter.get(ref)
        assert (cut.life, cut.is_whole) == ("starting", False)
        await asyncio.gather(*(adapter.start(ref) for _ in range(2)))
        assert (await await_life(adapter, ref, "running")).is_whole
        ran = await adapter.exec(ref, ["cat", "/workspace/runs"], stdin=None, timeout_seconds=10)
        assert ran.stdout == b"run\nrun\nrun\n"
        await adapter.terminate(ref)
        await await_life(adapter, ref, "gone")
        claims = ["persistentvolumeclaims", "-n", "gpubroker-pods", "-l", f"gpubroker.io/ref={ref}"]
        until("its claim is gone", lambda: not get(*claims), 30)

    settings = {"KUBECONFIG": cluster, "GPUBROKER_KUBERNETES_STORAGE_CLASS": storage}
    play(settings | {"GPUBROKER_KUBERNETES_PRICES": "*=1.00"}, story)


def test_a_create_that_was_cut_off_is_completed_by_the_same_reference(cluster: str, broker: Deployed) -> None:
    del broker

    async def story(adapter: Kubernetes) -> None:
        offer = next(each for each in await adapter.list_offers() if each.gpu_count == 1)
        ref, spec = make_ref(), replace(make_spec("sleep", "600"), env={"A": "1"}, ports=(base.Port(8000, "http"),))
        with cut_off(adapter, "jobs"), pytest.raises(AmbiguousOutcome):
            await adapter.create(spec, offer, ref)
        for seen in (await adapter.get(ref), *await adapter.find_by_ref(ref), *await adapter.list_managed("testtest")):
            assert (seen.id, seen.life, seen.status, seen.is_whole) == (ref, "starting", "Incomplete", False)
        await asyncio.gather(*(adapter.create(spec, offer, ref) for _ in range(2)))
        assert (await await_life(adapter, ref, "running")).is_whole
        assert len(get("jobs", "-n", "gpubroker-pods", "-l", f"gpubroker.io/ref={ref}")) == 1
        kubectl("-n", "gpubroker-pods", "delete", "job", f"{ref}-r1")
        await adapter.create(spec, offer, ref)
        assert not get("jobs", "-n", "gpubroker-pods", "-l", f"gpubroker.io/ref={ref}"), (
            "what was whole is not made again"
        )
        await adapter.terminate(ref)
        with pytest.raises(Rejected):
            await adapter.create(spec, offer, ref)
        await await_life(adapter, ref, "gone")

    play({"KUBECONFIG": cluster, "GPUBROKER_KUBERNETES_PRICES": "*=1.00"}, story)


@pytest.fixture
def slices(broker: Deployed) -> Iterator[int]:
    """A node that has slices of GPUs, counted and scheduled, beside its whole ones."""
    if not kit.is_here():
        pytest.skip("only on the kit a node may be said to have slices")
    (node,) = get("nodes")
    patch = ["patch", "node", node["metadata"]["name"], "--subresource=status", "--type=merge", "-p"]
    kubectl(*patch, json.dumps({"status": {name: {SLICE: "3"} for name in ("capacity", "allocatable")}}))
    yield 3
    kubectl(*patch, json.dumps({"status": {name: {SLICE: "0"} for name in ("capacity", "allocatable")}}))


def test_a_slice_is_rented_by_its_own_name_and_price(slices: int, cluster: str) -> None:
    async def story(adapter: Kubernetes) -> None:
        async def find() -> base.ProviderOffer:
            return next(each for each in await adapter.list_offers() if SLICE in each.provider_offer_id)

        offer = await find()
        assert (offer.gpu_count, offer.vram_gb, offer.price_micro_h, offer.availability) == (1, 10, 400_000, "medium")
        refs = [make_ref() for _ in range(slices)]
        for ref in refs:
            await adapter.create(make_spec("sleep", "600"), offer, ref)
            await await_life(adapter, ref, "running")
        assert (await find()).availability == "none"
        (pod,) = get("pods", "-n", "gpubroker-pods", "-l", f"gpubroker.io/ref={refs[0]}")
        assert pod["spec"]["containers"][0]["resources"]["limits"][SLICE] == "1"

    play({"KUBECONFIG": cluster, "GPUBROKER_KUBERNETES_PRICES": "mig-1g.10gb=0.40"}, story)
