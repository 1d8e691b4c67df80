"""What ``doctor`` checks of the audit log."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING

from progressdb_kms.bootstrap import verify_keys
from progressdb_kms.cli.check import Check, Result
from progressdb_kms.domain.audit import VerifyKey, parse_document
from progressdb_kms.domain.errors import AuditKeyInvalid, KmsError
from progressdb_kms.settings import Settings

if TYPE_CHECKING:
    from progressdb_kms.store.redis import RedisStore


def check_audit(settings: Settings) -> Iterator[Check]:
    """Check keys and places of the audit log."""
    audit = settings.audit
    if audit.key_file is None:
        yield Check(
            "audit", Result.OK, "records are only printed: without audit.key_file nothing vouches for them"
        )
        return
    try:
        verify_keys(settings)
    except AuditKeyInvalid as error:
        yield Check("audit", Result.FAIL, error.detail, "mend the file (audit keygen makes one)")
        return
    directory = audit.directory
    if directory is not None and not (directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)):
        yield Check(
            "audit",
            Result.FAIL,
            f"this user can't write to audit.directory {directory}, so every change would be refused",
            f"make it, and let the service write there: mkdir -p {directory}",
        )
        return
    if not audit.stream and directory is None:
        yield Check(
            "audit",
            Result.WARN,
            "the log is chained, and whether its records are kept is up to who reads the standard output",
            "set audit.stream or audit.directory",
        )
        return
    yield Check("audit", Result.OK, "the log is chained, and a change is refused if it can't be written down")


async def check_anchor(settings: Settings, store: RedisStore) -> AsyncIterator[Check]:
    """Check that the anchor in the store is signed with a key that the configuration names."""
    try:
        keys = {key.key_id: key for key in verify_keys(settings)}
    except AuditKeyInvalid:
        return  # that has been told
    yield await _anchor(store, keys)


async def _anchor(store: RedisStore, keys: Mapping[str, VerifyKey]) -> Check:
    name = "audit anchor"
    try:
        anchor = await store.audit.anchor()
        texts = [text for text in (anchor.roster, *anchor.heads.values()) if text]
        bad = 0
        for text in texts:
            document = parse_document(text)
            if document.key_id not in keys:
                return Check(
                    name,
                    Result.WARN,
                    f"chains in the store are signed with key {document.key_id}, which is not configured",
                    "name its public half in audit.previous_keys, or they are never trimmed",
                )
            bad += not document.signed_by(keys[document.key_id])
    except ValueError:
        bad = 1
    except KmsError as error:
        return Check(name, Result.FAIL, error.detail, "mend the store")
    if bad:
        detail = "what the store vouches for of the audit log is not signed as it should be"
        return Check(name, Result.FAIL, detail, "somebody changed it: run audit verify")
    return Check(name, Result.OK, f"{len(anchor.heads)} chains and {anchor.length} records in the stream")
