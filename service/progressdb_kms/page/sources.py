"""What the page reads from; whoever puts the service together fills it in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from progressdb_kms.api.answering import Api
    from progressdb_kms.domain.audit import VerifyKey
    from progressdb_kms.ports import Heartbeats, StoreStatus
    from progressdb_kms.usecases.rotationwatch import RotationWatch


@dataclass(frozen=True, slots=True)
class Expiry:
    """Something that expires.

    Attributes:
        what: Certificate, CA or revocation list, in words.
        name: Whose.
        at: Unix seconds; None for never.
    """

    what: str
    name: str
    at: float | None


@dataclass(frozen=True, slots=True)
class Sources:
    """What the page reads from.

    Attributes:
        api: What the API serves with.
        heartbeats: Tell which instances run.
        watch: Has counted the keys by KEK version; the page never counts them itself.
        expiries: Gives what expires, of what this instance has loaded.
        store: Gives the last finding about the store.
        unready: Gives why this instance is not ready.
        audit_keys: What audit records are verified with.
        audit_kept: Whether records are kept in the store.
        instance: Name of this process.
        release: The package's version.
    """

    api: Api
    heartbeats: Heartbeats
    watch: RotationWatch
    expiries: Callable[[], Sequence[Expiry]]
    store: Callable[[], StoreStatus]
    unready: Callable[[], Sequence[str]]
    audit_keys: Sequence[VerifyKey]
    audit_kept: bool
    instance: str
    release: str
