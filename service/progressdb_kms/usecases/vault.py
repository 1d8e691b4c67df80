"""What backups, restores, retirements and destruction work with, and how they open wrapped keys."""

from __future__ import annotations

import hmac
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.envelope import parse_blob, wrap_aad
from progressdb_kms.domain.errors import (
    BackupInvalid,
    KekUnavailable,
    KmsError,
    WrappedKeyInvalid,
)
from progressdb_kms.domain.keyring import KEPT_ELSEWHERE, kek_id_of
from progressdb_kms.ports import AuditEvent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from progressdb_kms.domain.keyring import KekInfo
    from progressdb_kms.ports import (
        AuditLog,
        BackupStore,
        DestructionStore,
        KekRegistry,
        KekSource,
        KeyStore,
        RotationLedger,
        RotationStore,
    )


_NAMES_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Vault:
    """The ports.

    Attributes:
        owner: Name of this process, for locks and the audit log.
        release: The package's version, written into exports.
        store_id: Of the one store that the KEKs belong to; empty where that was never written down.
    """

    keys: KeyStore
    backups: BackupStore
    destruction: DestructionStore
    ledger: RotationLedger
    slots: RotationStore
    registry: KekRegistry
    source: KekSource
    audit: AuditLog
    owner: str
    release: str
    store_id: str = ""
    now: Callable[[], float] = time.time


@dataclass(frozen=True, slots=True)
class Sealed:
    """A wrapped key with the names that its wrap binds."""

    key_id: str
    thread_id: str
    wrapped: bytes = field(repr=False)


async def unwrap_all(source: KekSource, sealed: Sequence[Sealed]) -> list[bytes | KmsError]:
    """Unwrap keys, each under exactly the version that its blob names; an error in place of one that fails.

    Straight from the source, since a store that is being filled has no registry yet: whoever calls has
    compared the source's check values with a registry.

    Raises:
        KekUnreachable: Where a key is kept can't be asked, which says nothing of what it wraps.
    """
    results: list[bytes | KmsError] = [WrappedKeyInvalid()] * len(sealed)
    groups: dict[int, list[tuple[int, bytes, bytes]]] = {}
    for number, key in enumerate(sealed):
        try:
            blob = parse_blob(key.wrapped)
        except WrappedKeyInvalid as error:
            results[number] = error
            continue
        aad = wrap_aad(key.key_id, key.thread_id)
        groups.setdefault(blob.kek_version, []).append((number, blob.body, aad))
    for version, group in groups.items():
        opened: list[bytes | KmsError]
        try:
            opened = await source.unwrap(version, [item[1] for item in group], [item[2] for item in group])
        except KekUnavailable as error:
            opened = [error] * len(group)
        for (number, _, _), key_or_error in zip(group, opened, strict=True):
            results[number] = key_or_error
    return results


async def require_keks(source: KekSource, keks: Iterable[KekInfo], what: str) -> None:
    """Return if each of these versions is loaded and is the key that was registered.

    Raises:
        BackupInvalid: Names the KEKs that ``what`` needs and those that are loaded.
    """
    loaded = source.versions()
    problems = []
    for kek in keks:
        if kek.version not in loaded:
            problems.append(f"version {kek.version} must be {kek.kek_id} and is not loaded")
        elif not await source.matches(kek.version, kek.check_value):
            found = "another key"
            if source.kind(kek.version) not in KEPT_ELSEWHERE:
                found = kek_id_of(await source.check_value(kek.version))
            problems.append(f"version {kek.version} must be {kek.kek_id} and is {found}")
    if problems:
        raise BackupInvalid(
            f"{what} needs other KEKs than those that are loaded: {'; '.join(problems)}; nothing was changed"
        )


def same(one: bytes, other: bytes) -> bool:
    """Compare without telling by the time where the difference is."""
    return hmac.compare_digest(one, other)


def named(names: Sequence[str]) -> str:
    """Return some names for a message, and how many more there are."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def event(vault: Vault, action: str, outcome: str, detail: str) -> AuditEvent:
    """Return an audit event of an operator's command."""
    return AuditEvent(action, outcome, vault.owner, "", detail=detail)


@asynccontextmanager
async def audited(vault: Vault, action: str, detail: str) -> AsyncIterator[None]:
    """Write down that something is about to be done, and how it ended.

    Raises:
        AuditUnavailable: The first can't be made durable; the body has not run.
    """
    await vault.audit.record([event(vault, action, "intent", detail)])
    try:
        yield
    except KmsError as error:
        await vault.audit.record([event(vault, action, "failed", f"{detail}: {error.code}")])
        raise
    await vault.audit.record([event(vault, action, "ok", detail)])
