"""The contract of all providers, on a real cluster: the adapter `kubernetes` alone, without a broker."""

import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.cluster import kit
from tests.cluster.conftest import kubectl
from tests.providers.common import ProviderContract

from gpubroker import config
from gpubroker.providers import base
from gpubroker.providers.kubernetes import Kubernetes

CUSTOMERS = Path(__file__).parents[2] / "knative/customers"
NAMESPACE = "gpubroker-pods"


@pytest.fixture(scope="module")
def customers(cluster: str, gpus: int) -> Iterator[str]:
    """The namespace of customers' pods, as an installation has it; one that was made for this goes with it."""
    assert gpus
    was_there = kubectl("get", "namespace", NAMESPACE, "--ignore-not-found", "-o", "name") != ""
    kubectl("apply", "-k", str(CUSTOMERS))
    yield cluster
    if not was_there:
        kubectl("delete", "namespace", NAMESPACE, "--wait=false")


class TestKubernetes(ProviderContract):
    owner = secrets.token_hex(4)  # a broker that runs there as well ends nothing of another owner's
    image = kit.IMAGES["customer"]
    disk_gb = 1
    patience_seconds = 60
    pause_seconds = 0.2

    @classmethod
    def provider(cls) -> type[base.Provider]:
        return Kubernetes

    @pytest.fixture
    async def adapter(self, customers: str, anyio_backend: str) -> AsyncIterator[base.Provider]:
        adapter = Kubernetes.from_settings(
            config.read({"KUBECONFIG": customers, "GPUBROKER_KUBERNETES_PRICES": "*=1.00"})
        )
        yield adapter
        for instance in await adapter.list_managed(self.owner):
            await adapter.terminate(instance.id)
            await self.await_end(adapter, instance.id)
        await adapter.close()
