"""values.yaml, its schema and the service's settings say the same."""

import json
import re

import msgspec
import pytest
import yaml

from progressdb_kms.settings import Settings
from scripts import chart_schema
from tests.chart.rendering import CHART, refusal

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = (CHART / "values.yaml").read_text()


def test_is_current():
    """values.schema.json is what scripts/chart_schema.py makes of values.yaml."""
    assert chart_schema.build(VALUES) == SCHEMA


def _differences(schema, values, path=""):
    if "description" in schema:
        return
    names = set(schema["properties"])
    yield from (f"{path}.{name}" for name in names ^ set(values))
    for name in names & set(values):
        yield from _differences(schema["properties"][name], values[name], f"{path}.{name}")


def test_every_value_has_an_entry_and_every_entry_a_value():
    """No value lacks an entry in the schema, no entry a value, none a description and the right default."""
    assert not list(_differences(SCHEMA, yaml.safe_load(VALUES)))


def _objects(schema, path=""):
    if isinstance(schema, dict):
        if schema.get("type") == "object" and "properties" in schema:
            yield path, schema
        for name, inner in schema.items():
            yield from _objects(inner, f"{path}/{name}")


def test_every_object_of_ours_is_closed():
    """Whatever has named fields takes no others, in lists as well."""
    assert not [path for path, schema in _objects(SCHEMA) if schema.get("additionalProperties") is not False]


def test_fields_of_clients_are_described():
    """Each field of a client says what it is for."""
    fields = SCHEMA["properties"]["clients"]["items"]["properties"]
    assert not [name for name, schema in fields.items() if name != "name" and not schema.get("description")]


def test_a_value_without_description_is_refused():
    """A new value without a `# --` comment can't get into the schema."""
    with pytest.raises(chart_schema.ValueProblem, match=r"extra has no description"):
        chart_schema.build(VALUES + "\nextra: 1\n")


def test_every_rule_of_the_schema_is_used():
    """No rule speaks of a value that is gone."""
    used = {chart_schema.rule_name(path) for path in chart_schema.descriptions(VALUES)}
    assert set(chart_schema.RULES) - used == set()


@pytest.mark.parametrize("section", ["limits", "cache", "drain", "destruction", "log"])
def test_settings_are_the_services_own(section):
    """`settings` has each setting of the service's sections, with the service's own default."""
    kind = next(field.type for field in msgspec.structs.fields(Settings) if field.name == section)
    expected = {
        re.sub("_(.)", lambda match: match[1].upper(), field.name): field.default
        for field in msgspec.structs.fields(kind)
    }
    assert yaml.safe_load(VALUES)["settings"][section] == expected


def test_an_unknown_key_is_refused():
    """A misspelt value is refused by name, at any depth."""
    assert "replicaCounts" in refusal({"replicaCounts": 3})
    assert "mod" in refusal({"tls": {"mod": "generated"}})
    assert "permission" in refusal({"clients": [{"name": "a", "permission": ["key:read"]}]})
