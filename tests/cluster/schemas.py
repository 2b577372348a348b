"""Takes the schemas of the kinds that we use from a cluster with Knative, for the checks without one.

`KUBECONFIG=... python tests/cluster/schemas.py` writes tests/contract/kubernetes-schemas.json anew.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.contract.test_deployment import SCHEMAS, documents


def read(api_version: str) -> dict[str, Any]:
    path = f"/openapi/v3/{'apis/' if '/' in api_version else 'api/'}{api_version}"
    return json.loads(subprocess.run(["kubectl", "get", "--raw", path], capture_output=True, check=True).stdout)


def convert(schema: Any) -> Any:
    """OpenAPI's schema as JSON Schema: no descriptions, unknown fields refused."""
    if isinstance(schema, list):
        return [convert(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {
        name: convert(value)
        for name, value in schema.items()
        if name
        in (
            "type",
            "items",
            "enum",
            "required",
            "oneOf",
            "anyOf",
            "additionalProperties",
            "minimum",
            "maximum",
            "pattern",
        )
    }
    if "$ref" in schema:
        return {"$ref": f"#/definitions/{schema['$ref'].rpartition('/')[2]}"}
    if len(schema.get("allOf", [])) == 1:
        return convert(schema["allOf"][0])
    if "properties" in schema:
        kept["properties"] = {name: convert(value) for name, value in schema["properties"].items() if name != "status"}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept.setdefault("additionalProperties", False)
    if schema.get("nullable") and isinstance(kept.get("type"), str):
        kept["type"] = [kept["type"], "null"]
    return kept


def references(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return set().union(*map(references, schema))
    if not isinstance(schema, dict):
        return set()
    own = {schema["$ref"].rpartition("/")[2]} if "$ref" in schema else set()
    return own.union(*map(references, schema.values()))


def main() -> None:
    found: dict[str, Any] = {}
    for api_version in sorted({document["apiVersion"] for _, document in documents()}):
        schemas = read(api_version)["components"]["schemas"]
        kinds = {document["kind"] for _, document in documents() if document["apiVersion"] == api_version}
        for kind in sorted(kinds):
            (name,) = [
                name
                for name, schema in schemas.items()
                for gvk in schema.get("x-kubernetes-group-version-kind", [])
                if f"{gvk['group']}/{gvk['version']}".lstrip("/") == api_version and gvk["kind"] == kind
            ]
            found[f"{api_version} {kind}"] = {"$ref": f"#/definitions/{name}"}
            waiting = {name}
            while waiting:
                name = waiting.pop()
                if name not in found:
                    found[name] = convert(schemas[name])
                    waiting |= references(found[name])
    SCHEMAS.write_text(json.dumps(found, sort_keys=True, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    sys.stdout.write(f"{len(found)} schemas, {SCHEMAS.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
