"""The description says what is served: every route, every reference, every code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from progressdb_kms.api.models import rfc3339
from progressdb_kms.api.openapi import openapi_document
from progressdb_kms.api.problems import STATUS
from progressdb_kms.api.routes import ROUTES
from progressdb_kms.settings import Limits

DOCUMENT = openapi_document(Limits())


def references(node: Any) -> Iterator[str]:
    """Yield every $ref."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_it_is_json() -> None:
    """Nothing in it but what JSON has."""
    assert json.loads(json.dumps(DOCUMENT)) == DOCUMENT
    assert DOCUMENT["openapi"] == "3.1.0"


def test_every_reference_resolves() -> None:
    """And every schema is used."""
    found = set(references(DOCUMENT))
    schemas = {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}
    assert found <= schemas


def test_every_route_is_described() -> None:
    """Method, path, parameters, body and permission of each row of the table."""
    described = {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    table = {(route.method, re.sub(r"<(\w+)>", r"{\1}", route.path)) for route in ROUTES}
    assert described == table | {("GET", "/openapi.json")}
    for route in ROUTES:
        operation = DOCUMENT["paths"][re.sub(r"<(\w+)>", r"{\1}", route.path)][route.method.lower()]
        assert operation["summary"]
        assert ("requestBody" in operation) == (route.takes is not None)
        named = {parameter["name"] for parameter in operation.get("parameters", [])}
        assert named >= set(route.parameters) | set(re.findall(r"<(\w+)>", route.path))
        assert ("Idempotency-Key" in named) == route.idempotent_create
        assert (str(route.permission) in operation.get("description", "")) == (route.permission is not None)
        assert {"200", "default"} == set(operation["responses"])


def test_operations_have_names_of_their_own() -> None:
    """Generators of clients make functions of them."""
    ids = [
        operation["operationId"] for methods in DOCUMENT["paths"].values() for operation in methods.values()
    ]
    assert len(set(ids)) == len(ids)


def test_it_names_every_code() -> None:
    """With its status."""
    for code, status in STATUS.items():
        assert f"{code} ({status})" in DOCUMENT["info"]["description"]


def test_it_says_the_limits_that_are_served() -> None:
    """Limits come from the configuration."""
    limits = Limits(batch_items=7, plaintext_bytes=99)
    document = openapi_document(limits)
    schema = document["paths"]["/encrypt_batch"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    assert schema["properties"]["items"]["maxItems"] == 7
    assert (
        "99 bytes"
        in document["components"]["schemas"]["EncryptItem"]["properties"]["plaintext"]["description"]
    )


def test_a_kek_is_no_part_of_what_may_be_sent() -> None:
    """new_kek_hex is known only so that it can be refused."""
    assert set(DOCUMENT["components"]["schemas"]["RewrapRequest"]["properties"]) == {"key_id"}


def test_times_are_utc() -> None:
    """RFC 3339 with a Z."""
    assert rfc3339(0) == "1970-01-01T00:00:00Z"
    assert rfc3339(1.9) == "1970-01-01T00:00:01Z"
