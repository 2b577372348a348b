"""OpenAPI 3.1 of a function, made of the models that validate its requests and write its answers."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode

from gpubroker import __version__, config
from gpubroker.inputs import Nothing
from gpubroker.operations import Operation

Json = dict[str, Any]

_REF: Final = "#/components/schemas/{model}"
_COMMON: Final[Mapping[int, str]] = {
    401: "No credential, or one that is unknown, expired or revoked.",
    403: "The credential lacks a scope or a grant.",
    404: "No such thing, or another tenant's.",
    422: "Something in the request is wrong; errors[] says what and where.",
    429: "More requests a second than the plan allows.",
    500: "Something failed here.",
    503: "Something that this needs is away for now.",
}
_PROBLEM: Final[Json] = {
    "title": "Problem",
    "description": "An error (RFC 9457). `code` is explained in docs/errors.md.",
    "type": "object",
    "required": ["type", "title", "status", "detail", "code", "retryable", "request_id", "hint"],
    "properties": {
        "type": {"type": "string", "format": "uri-reference"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
        "retryable": {"type": "boolean"},
        "request_id": {"type": "string"},
        "hint": {"type": "string", "description": "What to do now."},
        "next": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["method", "path"],
                "properties": {"method": {"type": "string"}, "path": {"type": "string"}, "body": {"type": "object"}},
            },
        },
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["pointer", "message"],
                "properties": {
                    "pointer": {"type": "string"},
                    "message": {"type": "string"},
                    "did_you_mean": {"type": "string"},
                },
            },
        },
    },
}
_OAUTH_ERROR: Final[Json] = {
    "title": "OAuthError",
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}, "error_description": {"type": "string"}},
}
_SECURITY: Final[Json] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key or a JWT of POST /v1/token."},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def describe(name: str, operations: Sequence[Operation]) -> Json:
    """The document of one function."""
    schemas: Json = {"Problem": _PROBLEM, "OAuthError": _OAUTH_ERROR}
    paths: dict[str, Json] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _describe_operation(operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": f"GPUBROKER: {name}", "version": __version__},
        "servers": [{"url": config.settings().public_url}],
        "paths": paths,
        "components": {"schemas": dict(sorted(schemas.items())), "securitySchemes": _SECURITY},
    }


def _describe_operation(operation: Operation, schemas: Json) -> Json:
    described: Json = {
        "operationId": operation.handler.__name__,
        "summary": operation.summary,
        "parameters": [*_path_parameters(operation), *_query_parameters(operation, schemas)],
        "responses": _responses(operation, schemas),
        "security": [] if operation.open else [{"bearer": []}, {"key": []}],
    }
    if operation.scope:
        described["description"] = f"Needs the scope `{operation.scope}`."
    described["parameters"] += [
        {"name": name, "in": "header", "required": False, "description": what, "schema": {"type": "string"}}
        for name, what in operation.headers.items()
    ]
    if operation.idempotent:
        described["parameters"].append(
            {
                "name": "Idempotency-Key", "in": "header", "required": False,
                "description": "The same key and body answer with the same thing, whoever retries and whenever.",
                "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
            }
        )  # fmt: skip
    if operation.form is not None:
        schema = _schema(operation.form, "validation", schemas)
        described["requestBody"] = {
            "required": True,
            "content": {"application/x-www-form-urlencoded": {"schema": schema}},
        }
    elif operation.raw:
        content = {kind: {"schema": {"type": "array" if "batch" in kind else "object"}} for kind in operation.raw}
        described["requestBody"] = {"required": True, "content": content}
    elif operation.body is not Nothing:
        schema = _schema(operation.body, "validation", schemas)
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return described


def _path_parameters(operation: Operation) -> list[Json]:
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]


def _query_parameters(operation: Operation, schemas: Json) -> list[Json]:
    whole = _inline(operation.query, schemas)
    return [
        {
            "name": name,
            "in": "query",
            "required": name in whole.get("required", []),
            "schema": _plain({k: v for k, v in schema.items() if k not in ("description", "title", "default")}),
        }
        | ({"description": schema["description"]} if "description" in schema else {})
        for name, schema in whole.get("properties", {}).items()
    ]


def _plain(schema: Json) -> Json:
    """A query has no null: a parameter that may be left out is left out."""
    choices = [choice for choice in schema.get("anyOf", ()) if choice != {"type": "null"}]
    if not choices:
        return schema
    rest = {name: value for name, value in schema.items() if name != "anyOf"}
    return rest | (choices[0] if len(choices) == 1 else {"anyOf": choices})


def _responses(operation: Operation, schemas: Json) -> Json:
    answered: Json = {
        str(status): {"description": "As asked.", "content": _content(answer, schemas)}
        for status, answer in operation.answers.items()
    }
    if operation.form is not None:
        for status in (400, 401):
            content = {"application/json": {"schema": {"$ref": "#/components/schemas/OAuthError"}}}
            answered[str(status)] = {"description": "An error as OAuth 2 has them.", "content": content}
    refused = dict(_COMMON)
    if operation.method in ("POST", "PUT", "PATCH"):
        refused |= {400: "The body is not JSON.", 413: "The body is larger than 1 MiB.", 415: "The body is no JSON."}
    if operation.idempotent:
        refused[409] = "A request with this Idempotency-Key is still running, or the state does not allow it."
    for problem in operation.problems:
        refused.setdefault(problem.status, problem.title + ".")
    for status, meaning in sorted(refused.items()):
        content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
        answered.setdefault(str(status), {"description": meaning, "content": content})
    return answered


def _content(answer: object, schemas: Json) -> Json:
    if answer is str:
        return {"text/plain": {"schema": {"type": "string"}}, "text/event-stream": {"schema": {"type": "string"}}}
    content: Json = {"application/json": {"schema": _schema(answer, "serialization", schemas)}}
    if getattr(answer, "__name__", "") == "Statement":
        content["text/csv"] = {"schema": {"type": "string"}}
    return content


def _schema(
    model: Any,  # noqa: ANN401 - whatever pydantic can describe
    mode: JsonSchemaMode,
    schemas: Json,
) -> Json:
    whole = TypeAdapter[Any](model).json_schema(mode=mode, ref_template=_REF, schema_generator=_Names, by_alias=True)
    for name, schema in whole.pop("$defs", {}).items():
        schemas[name] = schema
    if "properties" not in whole:
        return whole
    name = str(whole.get("title") or getattr(model, "__name__", "Model")).replace("[", "_").replace("]", "")
    schemas[name] = whole
    return {"$ref": _REF.format(model=name)}


def _inline(model: type[BaseModel], schemas: Json) -> Json:
    whole = TypeAdapter[Any](model).json_schema(mode="validation", ref_template=_REF, by_alias=True)
    schemas |= whole.pop("$defs", {})
    return whole


class _Names(GenerateJsonSchema):
    """Component names without the marks of Python's generics."""

    def get_title_from_name(self, name: str) -> str:
        """Titles of fields say nothing that their names do not."""
        return name
