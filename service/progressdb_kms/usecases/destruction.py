"""Destruction of keys whose waiting period is over: blobs leave the store, its snapshots and its files.

What remains is a tombstone, and a record that names the exports that hold the key still: they lose it when
the KEK
that they need is retired and erased.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog

from progressdb_kms.domain.backup import Destruction, holding
from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.domain.keyring import KekState
from progressdb_kms.domain.keys import DekRecord
from progressdb_kms.ports import AuditEvent
from progressdb_kms.usecases.destroyer import Destroyer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from progressdb_kms.domain.backup import ExportNote
    from progressdb_kms.usecases.vault import Vault

log = structlog.get_logger(__name__)

LEASE: Final = 600.0
"""Seconds for which the right to destroy is taken: longer than a slot's keys and all rewrites take."""


@dataclass(slots=True)
class Swept:
    """What a sweep did.

    Attributes:
        destroyed: Key ids.
        files: Why append-only files could not be rewritten, one line a node; it is tried again by the next
            sweep.
        rewritten: Whether all files were rewritten.
    """

    destroyed: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    rewritten: bool = False


async def sweep(vault: Vault) -> Swept | None:
    """Destroy what is due; one instance at a time.

    May be killed anywhere and run again: a key stays due until it is destroyed, and the rewrite of the files
    stays owed until it is done.

    Returns:
        What was done; None where another instance is at it.

    Raises:
        StoreUnavailable, StoreNotDurable: Not now.
    """
    if not await vault.destruction.lease(vault.owner, LEASE):
        return None
    try:
        return await _sweep(vault)
    finally:
        with suppress(StoreUnavailable):  # it runs out by itself
            await vault.destruction.lease(vault.owner, 0)


async def _sweep(vault: Vault) -> Swept:
    swept = Swept()
    while True:
        due = await vault.destruction.due(int(vault.now()))
        before = len(swept.destroyed)
        if due:
            await vault.destruction.owe_rewrite()
            notes = await _notes(vault)
            destroyer = Destroyer(vault)
            for key_ids in due.values():
                swept.destroyed += await _slot(vault, key_ids, destroyer, notes)
        if len(swept.destroyed) == before:
            break
        await vault.destruction.lease(vault.owner, LEASE)
    if await vault.destruction.rewrite_owed():
        swept.files = await vault.destruction.rewrite_files()
        swept.rewritten = not swept.files
        for reason in swept.files:
            log.warning("aof_not_rewritten", detail=reason, action="destroyed keys may still stand in it")
    return swept


async def _notes(vault: Vault) -> list[ExportNote]:
    """Return the exports that can still be opened: all but those whose KEKs are all retired."""
    view = await vault.registry.load()
    keks = {} if view is None else view.keks
    retired = {version for version, kek in keks.items() if kek.state is KekState.RETIRED}
    return [
        note
        for note in await vault.backups.exports()
        if not note.kek_versions or set(note.kek_versions) - retired
    ]


async def _slot(
    vault: Vault, key_ids: Sequence[str], destroyer: Destroyer, notes: Sequence[ExportNote]
) -> list[str]:
    destroyed = []
    for record in await vault.backups.read(key_ids):
        if not isinstance(record, DekRecord):
            continue
        names = (vault.owner, "", record.key_id, record.thread_id)
        await vault.audit.record([AuditEvent("key.destroy", "intent", *names)])
        destruction = Destruction(record.key_id, int(vault.now()), holding(notes, record.created_at))
        if await destroyer.destroy(destruction):
            destroyed.append(record.key_id)
            await vault.audit.record([AuditEvent("key.destroy", "ok", *names)])
        else:
            await vault.audit.record([AuditEvent("key.destroy", "failed", *names, "not due any more")])
    return destroyed
