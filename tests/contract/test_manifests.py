"""The rendered manifests: up to date, complete, and what Knative would accept."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gpubroker import bundle, config, events, manifests

HOME = bundle.home()


def load(path: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((HOME / path).read_text()))


def services() -> dict[str, dict[str, Any]]:
    (kustomization,) = load("knative/base/kustomization.yaml")
    files = [name for name in kustomization["resources"] if name.endswith(".yaml")]
    loaded = [document for name in files for document in load(f"knative/base/{name}")]
    return {each["metadata"]["name"]: each for each in loaded if each["apiVersion"] == "serving.knative.dev/v1"}


def test_the_files_are_what_would_be_rendered() -> None:
    assert manifests.differences(HOME) == []


def test_rendering_is_deterministic_and_marked(tmp_path: Path) -> None:
    first = manifests.render(tmp_path)
    assert first == manifests.render(tmp_path)
    for path, text in first.items():
        assert manifests.MARK in text.partition("\n")[0], path
        assert text.endswith("\n")


def test_differences_are_named_and_mended(tmp_path: Path) -> None:
    assert all(line.endswith("is missing") for line in manifests.differences(tmp_path))
    manifests.write(tmp_path)
    assert manifests.differences(tmp_path) == []

    (tmp_path / "eventing/broker.yaml").write_text("edited\n")
    left_over = tmp_path / "knative/base/gone.yaml"
    left_over.write_text(f"# {manifests.MARK}\nkind: Service\n")
    by_hand = tmp_path / "eventing/policies.yaml"
    by_hand.write_text("kind: EventPolicy\n")
    assert manifests.differences(tmp_path) == sorted(
        [f"{tmp_path}/eventing/broker.yaml is not what would be rendered", f"{left_over} is left over"]
    )

    manifests.write(tmp_path)
    assert manifests.differences(tmp_path) == []
    assert not left_over.exists()
    assert by_hand.exists()


def test_every_function_is_one_service() -> None:
    assert list(services()) == [function.name for function in bundle.FUNCTIONS]


@pytest.mark.parametrize("function", bundle.FUNCTIONS, ids=lambda function: function.name)
def test_a_service_is_as_the_bundle_says(function: bundle.Function) -> None:
    service = services()[function.name]
    template = service["spec"]["template"]
    (container,) = template["spec"]["containers"]
    annotations = template["metadata"]["annotations"]
    assert service["apiVersion"] == "serving.knative.dev/v1"
    assert container["args"] == ["serve", function.name]
    assert template["spec"]["containerConcurrency"] == function.concurrency
    assert template["spec"]["timeoutSeconds"] == function.timeout_seconds <= 600
    assert annotations["autoscaling.knative.dev/min-scale"] == "0"
    assert annotations["autoscaling.knative.dev/max-scale"] == str(function.max_scale)
    assert all(isinstance(value, str) for value in annotations.values())

    private = service["metadata"]["labels"].get("networking.knative.dev/visibility") == "cluster-local"
    assert private == (function.kind != "public"), "consumers and ticks are never reached from outside"
    short = annotations.get("autoscaling.knative.dev/window") == "10s"
    assert short == (function.kind == "tick"), "a tick a minute would keep it up for ever"
    assert ("envFrom" in container) == function.vendor_credentials
    assert template["spec"].get("automountServiceAccountToken", True) == function.vendor_credentials
    assert container["readinessProbe"]
    assert container["livenessProbe"]
    assert "cpu" not in container["resources"]["limits"], "a start is CPU alone"


def test_settings_come_from_secrets_and_config_maps() -> None:
    for service in services().values():
        (container,) = service["spec"]["template"]["spec"]["containers"]
        names = {entry["name"]: entry for entry in container["env"]}
        assert {"DATABASE_URL", "REDIS_URL", "GPUBROKER_OWNER", "GPUBROKER_SECRET_KEY", "K_SINK"} <= set(names)
        assert {name for name, entry in names.items() if "value" in entry} == {"GPUBROKER_START_SECONDS"}
        assert "secretKeyRef" in names["GPUBROKER_SECRET_KEY"]["valueFrom"]
        assert "secretKeyRef" in names["DATABASE_URL"]["valueFrom"]


def test_all_functions_at_their_largest_have_no_more_connections_than_the_database_is_said_to_allow() -> None:
    connections: dict[str, int] = {}
    for name, service in services().items():
        template = service["spec"]["template"]
        (container,) = template["spec"]["containers"]
        values = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
        most = int(template["metadata"]["annotations"]["autoscaling.knative.dev/max-scale"])
        assert most > 0, f"{name}: 0 is as many as there are requests"
        connections[name] = most * config.read(values).pool_size
    assert 0 < sum(connections.values()) <= bundle.MOST_CONNECTIONS, connections


def test_vendor_credentials_are_where_the_design_says() -> None:
    assert {function.name for function in bundle.FUNCTIONS if function.vendor_credentials} <= {
        "provisioning", "reconcile", "catalog", "exec",
    }  # fmt: skip


def test_the_broker_answers_first_and_buries_what_fails() -> None:
    (broker,) = load("eventing/broker.yaml")
    assert broker["metadata"]["name"] == "default"
    assert broker["metadata"]["annotations"]["messaging.knative.dev/async-handler"] == "true"
    delivery = broker["spec"]["delivery"]
    assert delivery["deadLetterSink"]["ref"]["name"] == "deadletter"
    assert delivery["retry"] >= 3
    assert delivery["backoffPolicy"] == "exponential"


def test_triggers_and_sources_name_services_that_are_there() -> None:
    triggers, sources = load("eventing/triggers.yaml"), load("eventing/sources.yaml")
    for resource in triggers:
        assert resource["spec"]["subscriber"]["ref"]["name"] == resource["metadata"]["name"]
    for resource in sources:
        assert resource["spec"]["sink"]["ref"]["name"] == resource["metadata"]["name"]
    assert {each["metadata"]["name"] for each in triggers} == {
        consumer for event in events.EVENTS for consumer in event.consumers
    }
    assert {each["metadata"]["name"] for each in sources} == {
        function.name for function in bundle.FUNCTIONS if function.kind == "tick"
    }
    assert {each["metadata"]["name"] for each in (*triggers, *sources)} <= set(services())


@pytest.mark.parametrize("event", events.EVENTS, ids=lambda event: event.what)
def test_schemas_are_valid_and_take_what_is_sent(event: events.EventType) -> None:
    schema = json.loads((HOME / f"eventing/schemas/{event.type}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"].endswith(event.type)
    sample = {
        "pod_id": "pod_1", "agent_id": "agt_1", "state": "running", "version": 1, "action": "stop", "instance_id": "i",
        "billed_until": "2026-01-01T00:00:00Z", "spent_usd": 2_390_000, "provider": "local", "account_id": "a",
        "reason": "r", "seen": 1, "changed": 1, "gone": 0, "price_usd_per_hour": 1, "expires_at": None,
            "by": "agt_2", "command": "provision", "command_id": "1", "command_source": "/ci",
            "code": None, "detail": None, "limit_usd": 2, "committed_usd": 1, "period": "day",
    }  # fmt: skip
    data = event.data.model_validate({k: v for k, v in sample.items() if k in event.data.model_fields})
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(data.model_dump(mode="json"))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({})
