"""The objects that make a pod, as the API takes them. Nothing here is sent: `gpubroker.providers.kubernetes` does that."""

import base64
import json
import math
import time
from collections.abc import Iterator
from typing import Any, Final

from gpubroker.cluster.client import Object
from gpubroker.cluster.rental import Terms, read_offer_id
from gpubroker.errors import Rejected
from gpubroker.providers.base import ProviderOffer, Spec

REF: Final = "gpubroker.io/ref"
OWNER: Final = "gpubroker.io/owner"
RUN: Final = "gpubroker.io/run"
CONTAINER: Final = "pod"
DISK: Final = "/workspace"
ACCOUNT: Final = "customer"
"""The ServiceAccount of every pod: it may do nothing, and no token of it is mounted."""
NOT_WHOLE: Final = "0"
"""A record's `whole` is the last run whose Job was made."""
_USER: Final = 1000
_GRACE_SECONDS: Final = 5
_CPU_REQUESTED: Final = 0.25
"""Cores are a share that is idle mostly; what counts is the GPU. More is used when it is free, up to the offer's."""


def labels(ref: str) -> dict[str, str]:
    """What every object of a pod carries."""
    return {"app.kubernetes.io/managed-by": "gpubroker", REF: ref, OWNER: ref.split("-")[1]}


def refuse_what_cannot_be(spec: Spec, ref: str) -> None:
    """Raise Rejected for what no cluster can run."""
    if spec.image is None:
        raise Rejected("image_required", "a pod of a cluster runs an image")
    if spec.ssh_public_key is not None:
        raise Rejected("ssh_not_supported", "pods of a cluster are reached by exec")
    if time.time() >= min(spec.hard_stop_at.timestamp(), int(ref.rpartition("-")[2], 36)):
        raise Rejected("hard_stop_passed", f"the hard stop of {ref} is over", try_next_offer=False)


def record(spec: Spec, offer: ProviderOffer, ref: str, terms: Terms) -> Object:
    """The record: what shall run, in which run it is, what is wanted of it."""
    data = {
        "pod": json.dumps(_pod(spec, offer, ref, terms)),
        "wanted": "running",
        "run": "1",
        "whole": NOT_WHOLE,
        "hard_stop": str(int(spec.hard_stop_at.timestamp())),
        "price_micro_h": str(offer.price_micro_h),
        "ports": json.dumps([[port.port, port.protocol] for port in spec.ports]),
    }
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": ref, "labels": labels(ref)}, "data": data}


def parts(spec: Spec, ref: str, record_uid: str, terms: Terms) -> Iterator[tuple[str, Object]]:
    """What belongs to the record, in the order in which it is made: the collection's path, and the object."""
    owned = {"labels": labels(ref), "ownerReferences": [_owner(ref, record_uid)]}
    if spec.env:
        secret = {
            "metadata": owned | {"name": ref},
            "type": "Opaque",
            "data": {n: _base64(v) for n, v in spec.env.items()},
        }
        yield "v1 secrets", secret
    if spec.registry_auth:
        yield "v1 secrets", _pull_secret(spec, ref, owned)
    if terms.storage_class:
        claim = {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": terms.storage_class,
            "resources": {"requests": {"storage": f"{max(spec.disk_gb, 1)}G"}},
        }
        yield "v1 persistentvolumeclaims", {"metadata": owned | {"name": ref}, "spec": claim}
    for port in spec.ports:
        protocol = "UDP" if port.protocol == "udp" else "TCP"
        service = {
            "type": terms.service_type,
            "selector": {REF: ref},
            "ports": [{"port": port.port, "targetPort": port.port, "protocol": protocol}],
        }
        yield "v1 services", {"metadata": owned | {"name": f"{ref}-{port.port}"}, "spec": service}
    if spec.ports:
        opened = [{"port": port.port, "protocol": "UDP" if port.protocol == "udp" else "TCP"} for port in spec.ports]
        policy = {
            "podSelector": {"matchLabels": {REF: ref}},
            "policyTypes": ["Ingress"],
            "ingress": [{"ports": opened}],
        }
        yield "networking.k8s.io/v1 networkpolicies", {"metadata": owned | {"name": ref}, "spec": policy}


def job(made: Object, run: int) -> Object:
    """The Job of one run. Its deadline is the hard stop: a Job's can be moved, a Pod's cannot."""
    ref, data = made["metadata"]["name"], made["data"]
    names = labels(ref) | {RUN: str(run)}
    return {
        "metadata": {
            "name": job_name(ref, run),
            "labels": names,
            "ownerReferences": [_owner(ref, made["metadata"]["uid"])],
        },
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": max(1, int(data["hard_stop"]) - math.floor(time.time())),
            "template": {"metadata": {"labels": names}, "spec": json.loads(data["pod"])},
        },
    }


def job_name(ref: str, run: int) -> str:
    """Each run has a Job of its own: one that ended cannot be started again."""
    return f"{ref}-r{run}"


def _pod(spec: Spec, offer: ProviderOffer, ref: str, terms: Terms) -> Object:
    kind = read_offer_id(offer)
    memory = f"{round(offer.ram_gb * 1000)}M"
    limits = {"cpu": f"{round(offer.vcpus * 1000)}m", "memory": memory, kind.resource: str(offer.gpu_count)}
    requests = limits | {"cpu": f"{max(10, round(offer.vcpus * 1000 * _CPU_REQUESTED))}m"}
    disk: Object = (
        {"persistentVolumeClaim": {"claimName": ref}}
        if terms.storage_class
        else {"emptyDir": {"sizeLimit": f"{max(spec.disk_gb, 1)}G"}}
    )
    container: Object = {
        "name": CONTAINER,
        "image": spec.image,
        "imagePullPolicy": "IfNotPresent",
        "env": [
            {"name": "HOME", "value": DISK},
            {"name": "GPUBROKER_POD_ID", "value": spec.pod_id},
            {"name": "GPUBROKER_POD_REF", "value": ref},
            *({"name": f"GPUBROKER_PORT_{port.port}", "value": str(port.port)} for port in spec.ports),
        ],
        "resources": {"limits": limits, "requests": requests},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "disk", "mountPath": DISK}],
    }
    if spec.command:
        container["command"] = list(spec.command)
    if spec.env:
        container["envFrom"] = [{"secretRef": {"name": ref}}]
    pod: Object = {
        "restartPolicy": "Never",
        "serviceAccountName": ACCOUNT,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
        "volumes": [{"name": "disk", **disk}],
    }
    if kind.product != "GPU":
        pod["nodeSelector"] = {"nvidia.com/gpu.product": kind.product}
    if kind.region != "cluster":
        pod.setdefault("nodeSelector", {})["topology.kubernetes.io/region"] = kind.region
    if terms.runtime_class:
        pod["runtimeClassName"] = terms.runtime_class
    if spec.registry_auth:
        pod["imagePullSecrets"] = [{"name": f"{ref}-pull"}]
    return pod


def _pull_secret(spec: Spec, ref: str, owned: dict[str, Any]) -> Object:
    auth = dict(spec.registry_auth or {})
    first = (spec.image or "").partition("/")[0]
    registry = auth.get("registry") or (first if "." in first or ":" in first else "https://index.docker.io/v1/")
    entry = {"username": auth.get("username", ""), "password": auth.get("password", "")}
    config = {"auths": {registry: entry | {"auth": _base64(f"{entry['username']}:{entry['password']}")}}}
    data = {".dockerconfigjson": _base64(json.dumps(config))}
    return {"metadata": owned | {"name": f"{ref}-pull"}, "type": "kubernetes.io/dockerconfigjson", "data": data}


def _owner(ref: str, uid: str) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "name": ref, "uid": uid}


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
