"""The OpenAPI 3.1 description, made from the table of routes and the models, so that it can't lie."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from progressdb_kms import __version__
from progressdb_kms.api.call import Route
from progressdb_kms.api.problems import PROBLEM_JSON, STATUS, Problem
from progressdb_kms.api.routes import ROUTES
from progressdb_kms.domain.envelope import MESSAGE_OVERHEAD
from progressdb_kms.domain.keys import THREAD_ID_MAX_BYTES
from progressdb_kms.usecases.messages import JSON, MSGPACK, Failed

if TYPE_CHECKING:
    from progressdb_kms.settings import Limits

_THREAD_ID: Final = {
    "minLength": 1,
    "maxLength": THREAD_ID_MAX_BYTES,
    # The limit counts bytes of UTF-8, which a schema can't say: maxLength counts characters.
    "pattern": r"^[^\x00-\x1f\x7f-\x9f]+$",
    "description": f"1 to {THREAD_ID_MAX_BYTES} bytes of UTF-8 without control characters",
}
_REF: Final = "#/components/schemas/{name}"
_BASE64: Final = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"


def openapi_document(limits: Limits) -> dict[str, Any]:
    """Return the description of the API as it is served under ``limits``."""
    models = {route.takes for route in ROUTES if route.takes} | {route.gives for route in ROUTES}
    _, schemas = msgspec.json.schema_components(
        [*sorted(models, key=lambda m: m.__name__), Failed, Problem], ref_template=_REF
    )
    _refine(schemas, limits)
    paths: dict[str, Any] = {}
    for route in ROUTES:
        path = re.sub(r"<(\w+)>", r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, path, limits)
    paths["/openapi.json"] = {
        "get": {
            "operationId": "openapi",
            "summary": "Describe this API",
            "responses": {
                "200": {"description": "This document", "content": {JSON: {"schema": {"type": "object"}}}}
            }
            | _errors(),
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "progressdb-kms",
            "version": __version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "Keeps one data key per conversation; encrypts and decrypts. Bodies"
            " are JSON with base64 (RFC 4648 section 4, padded) or msgpack with raw bytes. The caller"
            " is known by its client certificate. Error codes: "
            + ", ".join(f"{code} ({status})" for code, status in STATUS.items())
            + ".",
        },
        "security": [{"mutualTLS": []}],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"mutualTLS": {"type": "mutualTLS"}}},
    }


def _refine(schemas: dict[str, Any], limits: Limits) -> None:
    for schema in schemas.values():
        for field in schema.get("properties", {}).values():
            for kind in (field, *field.get("anyOf", ())):
                if kind.get("contentEncoding") == "base64":
                    kind["pattern"] = _BASE64
    schemas["DecryptItem"]["properties"]["ciphertext"]["minLength"] = 4 * -(-MESSAGE_OVERHEAD // 3)
    for name in ("CreateRequest", "CreateItem"):
        schemas[name]["properties"]["thread_id"] |= _THREAD_ID
    schemas["CreateItem"]["properties"]["idempotency_key"] |= {
        "description": "1 to 255 visible ASCII characters"
    }
    schemas["EncryptItem"]["properties"]["plaintext"] |= {
        "description": f"Base64 of up to {limits.plaintext_bytes} bytes; empty is valid"
    }
    days = schemas["ScheduleDestruction"]["properties"]["waiting_days"]
    days |= {"minimum": 7, "maximum": 30}
    # Refused by name whatever it holds, so it is no part of what may be sent.
    schemas["RewrapRequest"]["properties"].pop("new_kek_hex", None)


def _operation(route: Route, path: str, limits: Limits) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", **(_THREAD_ID if name == "thread_id" else {"minLength": 1})},
        }
        for name in re.findall(r"<(\w+)>", route.path)
    ]
    parameters += [
        {"name": name, "in": "query", "required": name in route.required, "schema": schema}
        for name, schema in route.parameters.items()
    ]
    if route.idempotent_create:
        parameters.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
                "description": "A retry with the same key, whenever it comes, finds the same data key",
            }
        )
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{path}").strip("_"),
        "summary": route.summary,
        "responses": {"200": {"description": "Done", "content": _content(_answer_schema(route))}} | _errors(),
    }
    if parameters:
        operation["parameters"] = parameters
    if route.permission is not None:
        needed = " and ".join(f"`{name}`" for name in (route.permission, route.also) if name)
        operation["description"] = f"Needs {needed}."
    if route.takes is not None:
        schema = _schema(route.takes)
        if route.batch:
            schema = {
                "type": "object",
                "required": ["items"],
                "additionalProperties": False,
                "properties": {"items": {"type": "array", "maxItems": limits.batch_items, "items": schema}},
            }
        # msgpack carries byte strings where JSON has base64, which a JSON schema can't say.
        operation["requestBody"] = {
            "required": not route.body_optional,
            "description": f"Or {MSGPACK}, with byte strings in place of base64.",
            "content": {JSON: {"schema": schema}},
        }
    return operation


def _answer_schema(route: Route) -> dict[str, Any]:
    if not route.batch:
        return _schema(route.gives)
    item = {"anyOf": [_schema(route.gives), _schema(Failed)]}
    return {
        "type": "object",
        "required": ["results"],
        "properties": {"results": {"type": "array", "items": item}},
    }


def _schema(model: Any) -> dict[str, Any]:  # noqa: ANN401 - a Struct class
    return {"$ref": _REF.format(name=model.__name__)}


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {JSON: {"schema": schema}}


def _errors() -> dict[str, Any]:
    return {
        "default": {
            "description": "A problem (RFC 9457); `code` says which",
            "content": {PROBLEM_JSON: {"schema": _schema(Problem)}},
        }
    }
