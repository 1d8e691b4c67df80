"""Who a caller is: what its certificate, or its Unix socket's peer, proved."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class IdentityKind(StrEnum):
    """The source of a name. Policy globs match within one kind, so that a CN of ``uid:0`` is nobody."""

    SPIFFE = "spiffe"
    DNS = "dns"
    CN = "cn"
    UID = "uid"


@dataclass(frozen=True, slots=True)
class Identity:
    """A proven name.

    Attributes:
        kind: Where the name comes from.
        name: The name without its kind: ``chat.default.svc``, ``//trust.domain/path`` for SPIFFE, ``1000``.
        spki_sha256: Lower-case hex SHA-256 of the certificate's SubjectPublicKeyInfo; empty on a Unix socket.
        not_after: When the certificate expires, in Unix seconds; None on a Unix socket.
    """

    kind: IdentityKind
    name: str
    spki_sha256: str = ""
    not_after: float | None = None

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"
