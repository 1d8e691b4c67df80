"""YAML files that people write: policy, configuration, what to provision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import yaml

if TYPE_CHECKING:
    from collections.abc import Hashable

    from progressdb_kms.domain.errors import OperatorError

T = TypeVar("T")


class _Strict(yaml.SafeLoader):
    """Refuses a key given twice: YAML 1.2 forbids it, and PyYAML takes the last in silence."""

    def construct_mapping(
        self,
        node: yaml.MappingNode,
        deep: bool = False,  # noqa: FBT001, FBT002 - PyYAML's signature
    ) -> dict[Hashable, Any]:
        """Construct a mapping whose scalar keys are all different."""
        seen: set[str] = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode):
                if name.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, "given twice", name.start_mark)
                seen.add(name.value)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path, error: type[OperatorError], what: str) -> Any:  # noqa: ANN401 - whatever the file holds
    """Read a YAML file strictly.

    Args:
        path: The file.
        error: What to raise.
        what: How messages call it.

    Raises:
        OperatorError: ``error``: can't be read, not UTF-8, not valid YAML, or a key is given twice; names the
            line and shows nothing of the file.
    """
    try:
        return yaml.load(path.read_bytes(), Loader=_Strict)  # noqa: S506 - a SafeLoader, made stricter
    except OSError as failure:
        raise error(f"can't read {what} {path}: {failure.strerror}") from failure
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as failure:
        mark = getattr(failure, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        twice = ": a key is given twice" if getattr(failure, "problem", "") == "given twice" else ""
        raise error(f"{what} {path} is not valid YAML{where}{twice}") from None


def typed(document: Any, kind: type[T], base: Path, error: type[OperatorError], what: str) -> T:  # noqa: ANN401 - as read_yaml
    """Check a document against its model; relative paths become relative to ``base``.

    Args:
        document: As YAML gave it.
        kind: The model.
        base: A folder.
        error: What to raise.
        what: How messages call it.

    Raises:
        OperatorError: ``error``: says what is wrong, and where.
    """

    def decode(wanted: type, value: object) -> object:
        if wanted is Path and isinstance(value, str) and value:
            return base / value
        raise ValueError("must be a path")

    try:
        return msgspec.convert(document, kind, dec_hook=decode)
    except msgspec.ValidationError as failure:
        raise error(f"{what}: {failure}") from None
