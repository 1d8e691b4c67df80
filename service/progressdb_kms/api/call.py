"""What a handler is given, and how a route is written down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from progressdb_kms.domain.errors import InvalidParameter
from progressdb_kms.domain.policy import Permission
from progressdb_kms.usecases.encryption import Hot
from progressdb_kms.usecases.messages import encode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from progressdb_kms.ports import RotationLedger
    from progressdb_kms.ports.audit import AuditStore
    from progressdb_kms.usecases.context import Kms
    from progressdb_kms.usecases.loading import Loader
    from progressdb_kms.usecases.session import Session


Answer: TypeAlias = "bytes | list[bytes]"
"""An answer's body; a long one in pieces, so that nobody has to put it together in one go."""


@dataclass(slots=True)
class Call:
    """One request, as far as a handler needs to know it."""

    kms: Kms
    hot: Hot
    loader: Loader
    rotations: RotationLedger
    audit: AuditStore
    session: Session
    request_id: str
    content_type: str
    accept: str
    body: bytes = field(repr=False)
    path: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, list[str]] = field(default_factory=dict)
    idempotency_keys: list[str] = field(default_factory=list)

    def answer(self, message: object) -> bytes:
        """Encode an answer as the caller accepts it."""
        return encode(self.accept, message)

    def parameters(self, *names: str) -> dict[str, str]:
        """Return the query parameters, each at most once and none but ``names``.

        Raises:
            InvalidParameter: Otherwise.
        """
        for name, values in self.query.items():
            if name not in names:
                raise InvalidParameter(
                    f"unknown query parameter; this route takes {', '.join(names) or 'none'}"
                )
            if len(values) > 1:
                raise InvalidParameter(f"{name} is given more than once")
        return {name: values[0] for name, values in self.query.items()}


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the API.

    Attributes:
        method: HTTP method.
        path: Path, with ``<name>`` for a part.
        handler: What answers.
        summary: One line for the documentation.
        permission: What the caller needs, None for any certificate that is let in.
        takes: Model of the body, or of a batch's item; None for no body.
        gives: Model of the answer.
        batch: The larger body limit applies.
        body_optional: An empty body is fine.
        parameters: Query parameters: name to schema.
        required: Those that must be given.
        idempotent_create: Takes an Idempotency-Key.
        also: What the caller needs besides ``permission``; the handler sees to it.
    """

    method: str
    path: str
    handler: Callable[[Call], Awaitable[Answer]]
    summary: str
    permission: Permission | None
    gives: Any
    takes: Any = None
    batch: bool = False
    body_optional: bool = False
    parameters: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    idempotent_create: bool = False
    also: Permission | None = None
