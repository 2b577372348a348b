"""A vendor's own API description, held against each request of ours and each answer of its simulator."""

import functools
import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

SPECS = Path(__file__).resolve().parents[4] / "shared" / "providers" / "specs"
_FORMATS = jsonschema.FormatChecker(())
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@_FORMATS.checks("date-time", raises=ValueError)
def _is_moment(value: object) -> bool:
    return not isinstance(value, str) or datetime.fromisoformat(value).tzinfo is not None


def _modernise(node: Any) -> Any:
    """OpenAPI 3.0 says `nullable` and boolean `exclusiveMinimum` where JSON Schema has types and numbers."""
    if isinstance(node, list):
        return [_modernise(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _modernise(value) for key, value in node.items()}
    if node.pop("nullable", False) is True:
        return {"anyOf": [node, {"type": "null"}]}
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(node.get(exclusive), bool) and node.pop(exclusive):
            node[exclusive] = node.pop(bound)
    return node


@functools.cache
def load(name: str) -> "Description | None":
    """The description of that file; None where the shared folder is not there."""
    path = SPECS / name
    if not path.exists():
        return None
    text = path.read_text()
    raw = json.loads(text) if name.endswith(".json") else yaml.load(text, _LOADER)
    return Description(raw if str(raw.get("openapi", "")).startswith("3.1") else _modernise(raw))


class Description:
    """Paths, parameters and schemas of an OpenAPI document. `prefix` is what its paths lack of the base URL's path."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self._checked: dict[tuple[object, ...], list[str]] = {}
        self._registry = Registry().with_resource("spec:", Resource.from_contents(document, DRAFT202012))
        self._paths = [
            (re.compile(re.sub(r"\\\{[^/]+?\\\}", "[^/]+", re.escape(path)).rstrip("/") + "/?"), path)
            for path in sorted(document["paths"], key=lambda path: path.count("{"))
        ]

    def find(self, path: str) -> str | None:
        """The path of the document that this one is."""
        return next((template for pattern, template in self._paths if pattern.fullmatch(path)), None)

    def resolve(self, node: Mapping[str, Any]) -> Mapping[str, Any]:
        while "$ref" in node:
            target: Any = self.document
            for part in node["$ref"].removeprefix("#/").split("/"):
                target = target[part.replace("~1", "/").replace("~0", "~")]
            node = target
        return node

    def complaints(self, value: object, schema: Mapping[str, Any]) -> list[str]:
        """What is wrong with a value."""
        validator = jsonschema.Draft202012Validator(
            schema, registry=self._registry, _resolver=self._registry.resolver("spec:"), format_checker=_FORMATS
        )
        return [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(value)]

    def check_request(self, method: str, path: str, query: Mapping[str, list[str]], body: Any) -> list[str]:
        """What is wrong with a request: path, method, query, body."""
        template = self.find(path)
        item = self.document["paths"].get(template, {})
        operation = item.get(method.lower())
        if operation is None:
            return [f"{method} {path} is not in the description"]
        found: list[str] = []
        parameters = [self.resolve(p) for p in [*item.get("parameters", []), *operation.get("parameters", [])]]
        known = {p["name"]: p for p in parameters if p["in"] == "query"}
        found += [f"query {name} is unknown" for name in query if name not in known and f"{name}[]" not in known]
        found += [f"query {name} is missing" for name, p in known.items() if p.get("required") and name not in query]
        for name, values in query.items():
            if name in known and "schema" in known[name]:
                found += self._check_text(values, known[name])
        return found + self._check_body(operation.get("requestBody"), body)

    def _check_body(self, described: Mapping[str, Any] | None, body: Any) -> list[str]:
        if described is None:
            return [] if body is None else ["the request has a body"]
        described = self.resolve(described)
        if body is None:
            return ["the request has no body"] if described.get("required") else []
        schema = described["content"].get("application/json", {}).get("schema")
        return self.complaints(body, schema) if schema else []

    def _check_text(self, values: list[str], parameter: Mapping[str, Any]) -> list[str]:
        schema = self.resolve(parameter["schema"])
        kind = schema.get("type")
        if kind == "array":
            texts = values if parameter.get("explode", True) else ",".join(values).split(",")
            return self.complaints(list(texts), parameter["schema"])
        read = {"integer": int, "number": float, "boolean": {"true": True, "false": False}.__getitem__}.get(
            str(kind), str
        )
        try:
            return self.complaints(read(values[-1]), parameter["schema"])
        except (ValueError, KeyError):
            return [f"query {parameter['name']}={values[-1]} is no {kind}"]

    def check_answer(self, method: str, path: str, status: int, content_type: str, body: bytes) -> list[str]:
        """What is wrong with an answer."""
        template = self.find(path)
        key = (method, template, status, content_type, body)
        if key not in self._checked:
            self._checked[key] = self._check_answer(method, path, template, status, content_type, body)
        return self._checked[key]

    def _check_answer(
        self, method: str, path: str, template: str | None, status: int, content_type: str, body: bytes
    ) -> list[str]:
        operation = self.document["paths"].get(template, {}).get(method.lower())
        if operation is None:
            return []
        responses = operation["responses"]
        described = responses.get(str(status)) or responses.get(f"{status // 100}XX") or responses.get("default")
        if described is None:
            return [f"{method} {path} never answers {status}"]
        content = self.resolve(described).get("content", {})
        if not content or not body:
            return [f"{method} {path} {status}: it has a body"] if body and not content and status == 204 else []
        kind = content_type.partition(";")[0]
        if kind not in content:
            return [f"{method} {path} {status}: {kind} is none of {', '.join(content)}"]
        schema = content[kind].get("schema")
        return self.complaints(json.loads(body), schema) if schema and kind.endswith("json") else []
