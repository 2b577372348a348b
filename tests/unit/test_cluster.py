"""Kubernetes, as far as it is rules: GPUs of nodes, what states mean, objects that may be made, positions in a log."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from gpubroker import config, gpus
from gpubroker.cluster import client, journal, objects, rental, states
from gpubroker.errors import CredentialRefused, InstanceNotFound, ProviderError, Rejected, SetupError, Throttled
from gpubroker.providers.base import Port, ProviderOffer, Spec

NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)
REF = "gb-ownerown-0123456789abcdefghjkmnpqrs-zzzzzz"
H100 = "NVIDIA-H100-80GB-HBM3"


def terms(**variables: str) -> rental.Terms:
    return rental.read_terms(config.read({f"GPUBROKER_KUBERNETES_{name}": value for name, value in variables.items()}))


def node(name: str = "n1", *, product: str = H100, mib: int = 81559, ready: bool = True, **has: str) -> Any:
    return {
        "metadata": {"name": name, "labels": {"nvidia.com/gpu.product": product, "nvidia.com/gpu.memory": str(mib)}},
        "spec": {},
        "status": {
            "allocatable": {"cpu": "63500m", "memory": "500Gi"} | {f"nvidia.com/{k}": v for k, v in has.items()},
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


def user(count: int, on: str = "n1", resource: str = "nvidia.com/gpu", phase: str = "Running") -> Any:
    limits = {"resources": {"limits": {resource: str(count), "cpu": "1"}}}
    return {"spec": {"nodeName": on, "containers": [limits]}, "status": {"phase": phase}}


def offers(nodes: list[Any], pods: list[Any] | None = None, prices: str = "*=2.00") -> dict[str, ProviderOffer]:
    return {offer.provider_offer_id: offer for offer in rental.list_offers(terms(PRICES=prices), nodes, pods or [])}


# What is rented out


def test_a_node_is_offered_in_every_size_that_fits_on_it() -> None:
    found = offers([node(gpu="8")])
    assert [offer.gpu_count for offer in found.values()] == [1, 2, 4, 8]
    whole = found[f"nvidia.com/gpu:{H100}:8"]
    assert (whole.price_micro_h, whole.availability) == (16_000_000, "low")
    assert (whole.vcpus, whole.ram_gb) == (50.8, 429.5)
    assert gpus.recognise(whole.gpu or "", whole.vram_gb).name == "H100 SXM"  # type: ignore[union-attr]


def test_what_any_pod_of_the_cluster_uses_is_not_there() -> None:
    nodes = [node(gpu="4"), node("n2", gpu="4")]
    used = [user(3), user(1, on="n2"), user(4, on="n2", phase="Succeeded")]
    by_count = {offer.gpu_count: offer.availability for offer in offers(nodes, used).values()}
    assert by_count == {1: "high", 2: "low", 4: "none"}


def test_what_a_cordoned_or_dead_node_has_is_not_to_be_had() -> None:
    cordoned = node("n2", gpu="2")
    cordoned["spec"]["unschedulable"] = True
    assert {offer.availability for offer in offers([cordoned, node(ready=False, gpu="2")]).values()} == {"none"}


@pytest.mark.parametrize(
    ("resource", "product", "name"),
    [
        ("mig-1g.10gb", H100, f"{H100} mig-1g.10gb"),
        ("gpu", f"{H100}-MIG-1g.10gb", f"{H100}-MIG-1g.10gb"),
        ("gpu.shared", H100, f"{H100} gpu.shared"),
        ("gpu", f"{H100}-SHARED", f"{H100}-SHARED"),
    ],
)
def test_a_part_of_a_gpu_is_no_gpu(resource: str, product: str, name: str) -> None:
    has = node(product=product, **{resource: "7"})
    assert offers([has], prices="*=2.00, h100=3.00") == {}, "it has a price of its own or none"
    word = "shared" if "shared" in name.lower() else "mig-1g.10gb"
    (only,) = offers([has], prices=f"*=2.00, {word}=0.40").values()
    assert (only.gpu, only.gpu_count, only.price_micro_h) == (name, 1, 400_000)
    assert gpus.recognise(name, only.vram_gb) is None
    if "mig" in word:
        assert only.vram_gb == 10


def test_a_price_is_that_of_the_nearest_name() -> None:
    def price(prices: str) -> int | None:
        return next((offer.price_micro_h for offer in offers([node(gpu="1")], prices=prices).values()), None)

    assert price("*=1, h100=2, h100 sxm=3") == 3_000_000
    assert price("h100=2, *=1") == 2_000_000
    assert price("a100=2, *=1.5") == 1_500_000
    assert price(f"{H100}=4, h100 sxm=3") == 4_000_000
    assert price("a100=2") is None
    assert price("") is None


@pytest.mark.parametrize("prices", ["h100", "h100=", "=2", "h100=free", "h100=-1", "h100=0"])
def test_wrong_prices_are_said(prices: str) -> None:
    with pytest.raises(SetupError, match="GPUBROKER_KUBERNETES_PRICES"):
        terms(PRICES=prices)


def test_wrong_settings_are_said() -> None:
    for name, value in {"SERVICE_TYPE": "Magic", "DISK_GB": "0"}.items():
        with pytest.raises(SetupError, match=name):
            terms(**{name: value})


def test_quantities() -> None:
    assert [float(rental.quantity(text)) for text in ("1500m", "2", "1Ki", "1k", "0.5", "x")] == [
        1.5,
        2,
        1024,
        1000,
        0.5,
        0,
    ]


# What is made


def spec(**changes: Any) -> Spec:
    made = Spec(
        pod_id="pod_1", command=("python", "x.py"), image="ghcr.io/a/b:1", env={"TOKEN": "hunter2"},
        ports=(Port(8000, "http"), Port(53, "udp")), disk_gb=20, hard_stop_at=datetime.now(UTC) + timedelta(hours=1),
    )  # fmt: skip
    return replace(made, **changes)


def made(asked: Spec, chosen: rental.Terms) -> tuple[Any, list[tuple[str, Any]], Any]:
    offer = next(iter(offers([node(gpu="2")]).values()))
    record = objects.record(asked, offer, REF, chosen)
    record["metadata"]["uid"] = "uid-1"
    return record, list(objects.parts(asked, REF, "uid-1", chosen)), objects.job(record, 1)


def test_a_pod_has_no_rights_no_token_and_only_what_it_asked_for() -> None:
    record, parts, job = made(spec(), terms())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": H100}
    assert 3500 < job["spec"]["activeDeadlineSeconds"] <= 3600
    assert job["spec"]["backoffLimit"] == 0
    assert "hunter2" not in json.dumps([record, job]), "what is secret is in the Secret alone"
    assert [name for name, _ in parts] == [
        "v1 secrets",
        "v1 services",
        "v1 services",
        "networking.k8s.io/v1 networkpolicies",
    ]
    for each in [job, *(part for _, part in parts)]:
        assert each["metadata"]["ownerReferences"][0]["uid"] == "uid-1", "it goes with the record"
        assert each["metadata"]["labels"][objects.REF] == REF
        assert len(each["metadata"]["name"]) <= 63
    assert parts[-1][1]["spec"]["ingress"] == [
        {"ports": [{"port": 8000, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}]}
    ]


def test_a_disk_is_kept_where_there_is_a_storage_class() -> None:
    _, parts, job = made(spec(ports=(), env={}), terms(STORAGE_CLASS="fast"))
    ((collection, claim),) = parts
    assert (collection, claim["spec"]["storageClassName"]) == ("v1 persistentvolumeclaims", "fast")
    assert job["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": REF}
    assert "stop" in terms(STORAGE_CLASS="fast").supports
    assert "stop" not in terms().supports


def test_a_private_registry_gets_its_login() -> None:
    _, parts, job = made(spec(registry_auth={"username": "u", "password": "p"}), terms())
    pull = next(part for name, part in parts if part.get("type") == "kubernetes.io/dockerconfigjson")
    import base64

    logins = json.loads(base64.b64decode(pull["data"][".dockerconfigjson"]))["auths"]
    assert logins["ghcr.io"]["username"] == "u"
    assert job["spec"]["template"]["spec"]["imagePullSecrets"] == [{"name": pull["metadata"]["name"]}]


@pytest.mark.parametrize(
    "changes",
    [{"image": None}, {"ssh_public_key": "ssh-ed25519 A"}, {"hard_stop_at": datetime(2020, 1, 1, tzinfo=UTC)}],
    ids=["no image", "ssh", "late"],
)
def test_what_cannot_run_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(Rejected):
        objects.refuse_what_cannot_be(spec(**changes), REF)


# What states mean


LONG_AGO = datetime(2026, 11, 22, 11, tzinfo=UTC)
JUST_NOW = datetime(2026, 11, 22, 11, 57, tzinfo=UTC)


def state(pod: Any = None, job: Any = None, events: Any = (), made: datetime = LONG_AGO, **data: str) -> states.State:
    kept = {"wanted": "running", "run": "1", "hard_stop": "1795000000", "price_micro_h": "1", "ports": "[]"} | data
    record = {"metadata": {"name": REF, "creationTimestamp": made.isoformat()}, "data": kept}
    return states.State(record, job, [pod] if pod else [], (), events)


def pod(
    age: int = 5, run: str = "1", phase: str = "Pending", container: Any = None, conditions: Any = (), **status: Any
) -> Any:
    since = (NOW - timedelta(seconds=age)).isoformat().replace("+00:00", "Z")
    containers = [{"state": container}] if container else []
    return {
        "metadata": {"name": "p", "labels": {objects.RUN: run}, "creationTimestamp": since},
        "status": {"phase": phase, "conditions": list(conditions), "containerStatuses": containers, **status},
    }


def deleted(pod: Any) -> Any:
    return pod | {"metadata": pod["metadata"] | {"deletionTimestamp": "2026-11-22T11:59:55Z"}}


def job(kind: str = "Failed", reason: str = "DeadlineExceeded") -> Any:
    condition = {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": "2026-11-22T11:59:00Z"}
    return {"metadata": {"name": "j"}, "status": {"conditions": [condition]}}


def not_pulled(times: int, age: int) -> Any:
    first = (NOW - timedelta(seconds=age)).isoformat().replace("+00:00", "Z")
    return {
        "type": "Warning",
        "reason": "Failed",
        "message": "Failed to pull image: no",
        "count": times,
        "firstTimestamp": first,
    }


ENDED = {"startedAt": "2026-11-22T11:58:00Z", "finishedAt": "2026-11-22T11:59:00Z"}
WARNING = {"type": "Warning", "reason": "FailedCreate", "message": "exceeded quota"}
PULLS = {"waiting": {"reason": "ImagePullBackOff", "message": "x"}}
LOST = [{"type": "Ready", "status": "Unknown"}]
UNSCHEDULABLE = [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes: Insufficient nvidia.com/gpu"}]
TAKEN = [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drained"}]
RUNNING = {"running": {"startedAt": "2026-11-22T11:59:30Z"}}


def ended(code: int, reason: str) -> Any:
    return {"terminated": ENDED | {"exitCode": code, "reason": reason}}


@pytest.mark.parametrize(
    ("seen", "life", "said"),
    [
        (state(), "interrupted", "its Job was deleted"),
        (state(made=JUST_NOW, whole="0"), "starting", None),
        (state(whole="0"), "failed", "its create was cut off"),
        (state(made=NOW - timedelta(seconds=5)), "starting", None),
        (state(made=JUST_NOW), "interrupted", "its Job was deleted"),
        (state(run="2", whole="0", since=LONG_AGO.isoformat()), "interrupted", "its Job was deleted"),
        (state(made=JUST_NOW, whole="1"), "interrupted", "its Job was deleted"),
        (state(run="2", whole="1", since=JUST_NOW.isoformat()), "starting", None),
        (state(run="2", whole="1", since=LONG_AGO.isoformat()), "interrupted", "its Job was deleted"),
        (state(run="2", whole="2", since=JUST_NOW.isoformat()), "interrupted", "its Job was deleted"),
        (state(job={"metadata": {"name": "j"}}), "starting", None),
        (state(job={"metadata": {"name": "j"}}, events=[WARNING]), "starting", "FailedCreate: exceeded quota"),
        (state(pod(conditions=UNSCHEDULABLE)), "starting", "Unschedulable: 0/1 nodes"),
        (state(pod(90, conditions=UNSCHEDULABLE)), "failed", "Unschedulable: 0/1 nodes"),
        (state(pod(90, run="2", conditions=UNSCHEDULABLE), run="2"), "starting", "Unschedulable"),
        (state(pod(container={"waiting": {"reason": "ContainerCreating"}})), "starting", None),
        (state(pod(container={"waiting": {"reason": "ErrImagePull", "message": "none"}})), "starting", "ErrImagePull: none"),
        (state(pod(900, container={"waiting": {"reason": "ContainerCreating"}})), "starting", None),
        (state(pod(900, container=PULLS), events=[not_pulled(4, 150)]), "failed", "ImagePull"),
        (state(pod(900, container=PULLS), events=[not_pulled(4, 60)]), "starting", "ImagePull"),
        (state(pod(900, container=PULLS), events=[not_pulled(1, 150)]), "starting", "ImagePull"),
        (state(pod(900, container=PULLS)), "starting", "ImagePull"),
        (state(pod(container={"waiting": {"reason": "InvalidImageName", "message": "x"}})), "failed", "InvalidImageName"),
        (state(pod(phase="Running", container=RUNNING)), "running", None),
        (state(pod(phase="Running", container=RUNNING, conditions=LOST)), "unknown", "its node"),
        (state(pod(phase="Succeeded", container=ended(0, "Completed"))), "stopped", None),
        (state(pod(phase="Failed", container=ended(7, "Error"))), "stopped", None),
        (state(pod(phase="Failed", container=ended(137, "OOMKilled"))), "stopped", "OOMKilled"),
        (state(deleted(pod(phase="Failed", container=ended(143, "Error")))), "interrupted", "its pod was deleted"),
        (state(deleted(pod(phase="Running", container=RUNNING))), "stopping", None),
        (state(pod(phase="Failed", reason="Evicted", message="low on disk")), "interrupted", "Evicted: low on disk"),
        (state(pod(phase="Failed", container=ended(143, "Error"), conditions=TAKEN)), "interrupted", "EvictionByEvictionAPI"),
        (state(pod(phase="Failed", reason="UnexpectedAdmissionError", message="none")), "failed", "UnexpectedAdm"),
        (state(job=job()), "gone", "its hard stop"),
        (state(pod(phase="Running", container=RUNNING), job()), "terminating", None),
        (state(pod(phase="Running", container=RUNNING), job("FailureTarget")), "terminating", None),
        (state(pod(phase="Failed", container=ended(143, "Error")), job("FailureTarget")), "terminating", None),
        (state(pod(phase="Failed", container=ended(143, "Error")), job()), "gone", "its hard stop"),
        (state(job=job(reason="BackoffLimitExceeded")), "interrupted", "its pod was deleted"),
        (state(wanted="stopped"), "stopped", None),
        (state(pod(phase="Running", container=RUNNING), wanted="stopped"), "stopping", None),
        (state(wanted="gone"), "gone", None),
        (state(pod(phase="Running", container=RUNNING), wanted="gone"), "terminating", None),
        (state(pod(run="1", phase="Running", container=RUNNING), {"metadata": {"name": "j"}}, run="2"), "starting", None),
    ],
)  # fmt: skip
def test_what_a_state_means(seen: states.State, life: str, said: str | None) -> None:
    stands = states.judge(seen, NOW)
    assert stands.life == life
    assert stands.reason == said if said is None else said in (stands.reason or "")


def test_a_record_without_a_job_is_the_beginning_of_a_create_for_a_while() -> None:
    begun = state(made=JUST_NOW, whole="0")
    assert not states.is_whole(begun, NOW)
    assert states.is_whole(begun._replace(job=job()), NOW)
    assert states.is_whole(state(made=JUST_NOW, whole="1"), NOW)
    assert states.is_whole(state(made=JUST_NOW), NOW), "a record of before there was such a note"
    assert states.is_whole(state(whole="0"), NOW), "nobody sends it again any more"


def test_an_end_has_its_times_and_its_code() -> None:
    stands = states.judge(state(pod(phase="Failed", container=ended(7, "Error"))), NOW)
    assert (stands.exit_code, stands.started_at, stands.ended_at) == (
        7, datetime(2026, 11, 22, 11, 58, tzinfo=UTC), datetime(2026, 11, 22, 11, 59, tzinfo=UTC),
    )  # fmt: skip


def test_endpoints_are_those_that_are_reached_from_outside() -> None:
    def services(kind: str, **more: Any) -> list[Any]:
        return [
            {
                "spec": {"type": kind, "clusterIP": "10.0.0.1", "ports": [{"port": 8000, "nodePort": 31000}]},
                "status": more,
            }
        ]

    running = state(pod(phase="Running", container=RUNNING, hostIP="192.0.2.1"), ports='[[8000, "http"]]')
    (by_node,) = states.present(running._replace(services=services("NodePort")), None).endpoints
    assert (by_node.host, by_node.external_port, by_node.url) == ("192.0.2.1", 31000, "http://192.0.2.1:31000")
    (named,) = states.present(running._replace(services=services("NodePort")), "gpu.example.org").endpoints
    assert named.host == "gpu.example.org"
    assert states.present(running._replace(services=services("LoadBalancer")), None).endpoints == ()
    balancer = services("LoadBalancer", loadBalancer={"ingress": [{"ip": "198.51.100.1"}]})
    (balanced,) = states.present(running._replace(services=balancer), None).endpoints
    assert (balanced.host, balanced.external_port) == ("198.51.100.1", 8000)


# The log


def log(*lines: tuple[int, str]) -> bytes:
    return b"".join(f"2026-11-22T12:00:{second:02}.123456789Z {text}".encode() for second, text in lines)


WHOLE = log((1, "one\n"), (1, "two\n"), (3, "three\n"), (3, "four\n"), (9, "end"))


def after_second(raw: bytes, after: int | None) -> bytes:
    """What the API answers to `sinceTime`."""
    text = journal.since(after)
    return (
        raw
        if text is None
        else b"".join(line for line in raw.splitlines(keepends=True) if line[:19].decode() >= text[:19])
    )


@pytest.mark.parametrize("limit", [1, 3, 5, 1000])
def test_a_log_is_read_in_parts_without_a_byte_lost_or_twice(limit: int) -> None:
    got, position = b"", 0
    for _ in range(40):
        page = journal.read(after_second(WHOLE, position), position, limit)
        assert page.starts_at >= position
        got += page.data
        position = page.starts_at + len(page.data)
    assert got == b"one\ntwo\nthree\nfour\nend"
    assert position < 10**18, "Last-Event-ID has at most 18 digits"


def test_the_last_bytes_of_a_log_and_what_follows_them() -> None:
    page = journal.read(WHOLE, None, 7)
    assert page.data == b"our\nend"
    after = page.starts_at + len(page.data)
    assert journal.read(after_second(WHOLE, after), after, 100).data == b""
    longer = WHOLE + b"\n" + log((9, "more\n"), (12, "last\n"))
    assert journal.read(after_second(longer, after), after, 100).data == b"\nmore\nlast\n"


def test_a_rotation_loses_nothing_that_is_younger() -> None:
    position = journal.read(WHOLE, None, 3).starts_at
    rotated = log((9, "end\n"), (10, "new\n"))
    assert journal.read(after_second(rotated, position), position, 100).data == b"end\nnew\n"


# Refusals


@pytest.mark.parametrize(
    ("status", "body", "kind", "code"),
    [
        (404, {"message": "not found"}, InstanceNotFound, "not_found"),
        (401, {}, CredentialRefused, "forbidden"),
        (403, {"message": 'User "x" cannot list resource "pods"'}, CredentialRefused, "forbidden"),
        (403, {"message": "exceeded quota: customers"}, Rejected, "quota_exceeded"),
        (403, {"message": "violates PodSecurity"}, Rejected, "refused"),
        (409, {"reason": "AlreadyExists"}, Rejected, "alreadyexists"),
        (422, {"reason": "Invalid"}, Rejected, "invalid"),
        (429, {}, Throttled, "throttled"),
        (500, {"reason": "InternalError"}, ProviderError, "internalerror"),
    ],
)
def test_a_refusal_says_what_may_be_concluded(
    status: int, body: dict[str, str], kind: type[ProviderError], code: str
) -> None:
    error = client._fail(status, json.dumps(body))
    assert (type(error) is kind or isinstance(error, kind), error.code) == (True, code)
    assert type(client._fail(502, "<html>")) is ProviderError
