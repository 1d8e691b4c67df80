"""What holds bytes does not show them: a repr ends up in logs, tracebacks and failed tests."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

import progressdb_kms
from tests.integration.leaks import leaks

SHOWN = {
    "Anchor": "signed documents of the audit log",
    "AuditBatch": "audit records and signed documents",
    "Document": "a signed document of the audit log",
    "Ending": "digests and a seal",
    "Link": "the digest of a certificate's names",
    "Opening": "an audit record",
    "Parsed": "an audit record",
    "Record": "an audit record",
    "Request": "headers; its body is hidden",
    "Trim": "signed documents of the audit log",
}
"""Classes whose bytes anybody may see, and what these are."""
SECRET = b"tangerines in the moonlight, 32 b"


def holders() -> Iterator[type[Any]]:
    """Give each class of the package that has a field of bytes."""
    for module in pkgutil.walk_packages(progressdb_kms.__path__, "progressdb_kms."):
        if module.name.endswith("__main__"):
            continue
        found = importlib.import_module(module.name)
        for _, cls in inspect.getmembers(found, inspect.isclass):
            if cls.__module__ == module.name and any(holds_bytes(kind) for _, kind in fields(cls)):
                yield cls


def holds_bytes(kind: str) -> bool:
    """Tell by a type as it is written; a function that takes or gives bytes holds none."""
    return "bytes" in kind and "Callable" not in kind and "ClassVar" not in kind


def fields(cls: type[Any]) -> list[tuple[str, str]]:
    """Return name and type of each field, the type as it is written."""
    if dataclasses.is_dataclass(cls):
        return [(field.name, str(field.type)) for field in dataclasses.fields(cls)]
    if issubclass(cls, msgspec.Struct):
        return [
            (name, str(kind)) for base in reversed(cls.__mro__) for name, kind in _annotated(base).items()
        ]
    return []


def _annotated(cls: type[Any]) -> dict[str, object]:
    return {} if cls in {object, msgspec.Struct} else dict(vars(cls).get("__annotations__", {}))


@pytest.mark.parametrize("cls", sorted(set(holders()), key=repr))
def test_bytes_are_not_shown(cls: type[Any]) -> None:
    """Whatever bytes they are; a class whose bytes may be seen is on the list, with why."""
    values = {
        name: SECRET if holds_bytes(kind) else "" for name, kind in fields(cls) if "ClassVar" not in kind
    }
    thing: object
    if issubclass(cls, msgspec.Struct):
        thing = cls(**values)
    else:
        thing = object.__new__(cls)
        for name, value in values.items():
            object.__setattr__(thing, name, value)
    shown = leaks({"a field of bytes": SECRET}, {"repr": repr(thing).encode(), "str": str(thing).encode()})
    assert bool(shown) == (cls.__name__ in SHOWN), shown
