"""Parts that the service and the commands share, and what each command works with."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import secrets
import sys
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

import structlog

from progressdb_kms import __version__
from progressdb_kms.audit.escrow import AuditedEscrowBox
from progressdb_kms.bootstrap.audit import command_audit, operator
from progressdb_kms.bootstrap.kek import kek_source, kek_stager
from progressdb_kms.bootstrap.storing import store_settings
from progressdb_kms.domain.errors import (
    KmsError,
    PolicyInvalid,
    RegistryLost,
    RotationRefused,
    SettingsInvalid,
    StoreNotDurable,
    StoreUnavailable,
)
from progressdb_kms.domain.policy import Policy, parse_policy
from progressdb_kms.files import Watch
from progressdb_kms.kek.escrow import Escrow, load_recipients
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.observability.logs import configure_logs
from progressdb_kms.observability.metrics import Metrics
from progressdb_kms.ports import RegistryView
from progressdb_kms.process import harden
from progressdb_kms.settings import Settings
from progressdb_kms.store.escrow_entries import decode_entry
from progressdb_kms.store.redis import RedisStore, open_store
from progressdb_kms.usecases.backup import inspect_export
from progressdb_kms.usecases.crew import Parts, Progress
from progressdb_kms.usecases.keks import KekBook, empty_store, require_store
from progressdb_kms.usecases.vault import Vault
from progressdb_kms.yamlfile import read_yaml

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from progressdb_kms.ports import AuditLog, KekSource
    from progressdb_kms.ports.escrow import SealedKek

log = structlog.get_logger(__name__)

STORE_ID: Final = re.compile(r"[0-9a-f]{32}")
"""The form of a store's id."""


def expected_store(settings: Settings) -> str:
    """Return the id of the store that the KEK belongs to, an empty string where none is configured.

    Raises:
        SettingsInvalid: ``store.id_file`` can't be read, or holds something else.
    """
    path = settings.store.id_file
    if path is None:
        return ""
    try:
        text = path.read_text("ascii").strip()
    except OSError as error:
        raise SettingsInvalid(f"can't read store.id_file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        text = ""
    if not STORE_ID.fullmatch(text):
        raise SettingsInvalid(f"store.id_file {path} does not hold a store's id, which is 32 hex digits")
    return text


def make_vault(
    store: RedisStore, source: KekSource, audit: AuditLog, owner: str, store_id: str = ""
) -> Vault:
    """Return what backups and destruction work with."""
    return Vault(
        keys=store.keys,
        backups=store.backups,
        destruction=store.destruction,
        ledger=store.rotation_ledger,
        slots=store.rotation_slots,
        registry=store.registry,
        source=source,
        audit=audit,
        owner=owner,
        release=__version__,
        store_id=store_id,
    )


@asynccontextmanager
async def open_vault(settings: Settings, command: str) -> AsyncIterator[tuple[Vault, KekBook]]:
    """Open the configured store and KEKs for an operator's command. Its audit records go to standard error.

    Args:
        settings: The configuration.
        command: Its name, for locks and the audit log.

    Raises:
        OperatorError: A file that it needs can't be used.
        KekMismatch: It is not the store that the KEKs belong to.
        StoreUnavailable: The store does not answer.
        StoreNotDurable: It could lose what is written to it.
    """
    configure_logs(settings.log.level, settings.log.format)
    for line in harden():
        log.debug("hardening", detail=line)
    source = kek_source(settings)
    store_id = expected_store(settings)
    owner = f"{operator(command)}, {secrets.token_hex(4)}"
    store = await open_store(store_settings(settings))
    try:
        status = store.health.status
        if not status.reachable:
            raise StoreUnavailable("the store does not answer: check store.url, and that it runs")
        if status.problems:
            raise StoreNotDurable("; ".join(status.problems))
        # A store without a readable registry is the command's own matter: an import may mend it.
        with suppress(RegistryLost):
            if (view := await store.registry.load()) is not None:
                require_store(view, store_id)
        keks = KekBook(source=source, registry=store.registry, observer=Metrics(), store_id=store_id)
        async with command_audit(settings, store, owner, Metrics(), sys.stderr) as audit:
            yield make_vault(store, source, audit, owner, store_id), keks
    finally:
        await store.close()


def load_policy(path: Path) -> tuple[Policy, str]:
    """Read the policy file and return it with the name of what it says.

    Raises:
        PolicyInvalid: Says what to change.
    """
    document = read_yaml(path, PolicyInvalid, "the policy")
    policy = parse_policy(document)
    return policy, hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


@asynccontextmanager
async def rotation_parts(settings: Settings, progress: Progress) -> AsyncIterator[Parts]:
    """Give what a rotation works with, over the service's own store and KEK source.

    Args:
        settings: The service's configuration.
        progress: Who is told how the run gets on.

    Raises:
        OperatorError: A file that it needs can't be used, or the store holds no registry yet, or it is not
            the store that the KEKs belong to.
        StoreUnavailable: The store does not answer.
    """
    configure_logs(settings.log.level, settings.log.format)
    for line in harden():
        log.warning("hardening", detail=line)
    metrics = Metrics()
    watch = Watch([settings.kek.path], lambda: _reload(source, keks))
    source = kek_source(settings)
    store_id = expected_store(settings)
    store = await open_store(store_settings(settings), observer=metrics)
    keks = KekBook(
        source=source,
        registry=store.registry,
        observer=metrics,
        look_again=source.reload,
        store_id=store_id,
    )
    try:
        view = await store.registry.load()
        if view is None:
            raise RotationRefused(
                empty_store(store_id)
                if store_id
                else "the store holds no KEK registry yet: start the service on it first"
            )
        require_store(view, store_id)
        await keks.refresh()
        recipients = () if settings.escrow == "none" else load_recipients(settings.escrow.recipients)
        watching = asyncio.create_task(watch.run())
        try:
            async with command_audit(settings, store, secrets.token_hex(8), metrics, sys.stdout) as audit:
                box = AuditedEscrowBox(store.escrow, audit, operator("rotate"), reads=False)
                escrow = Escrow(box, store.registry, source, recipients)
                yield Parts(
                    ledger=store.rotation_ledger,
                    slots=store.rotation_slots,
                    registry=store.registry,
                    heartbeats=store.heartbeats,
                    stager=kek_stager(settings, source, keks, escrow),
                    keks=keks,
                    progress=progress,
                    now=time.time,
                    census=store.keys.census,
                    audit=audit,
                )
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
    finally:
        await store.close()


def exported_escrow(
    chunks: Callable[[], Iterable[bytes]],
) -> tuple[Mapping[int, Sequence[SealedKek]], RegistryView]:
    """Return what an export's escrow holds, and its registry. Needs no KEK, and no store.

    Raises:
        BackupInvalid: The export is damaged.
    """
    found = inspect_export(chunks)
    keks = {kek.version: kek for kek in found.registry.keks}
    kept = {int(version): decode_entry(entry) for version, entry in found.registry.escrow.items()}
    return kept, RegistryView(found.header.store_id, keks, found.registry.active, 0)


async def read_escrow(
    settings: Settings, command: str
) -> tuple[Mapping[int, Sequence[SealedKek]], RegistryView]:
    """Return what the store's escrow holds, and its registry. Needs no KEK. It is audited.

    Args:
        settings: The service's configuration.
        command: Its name, for the audit log.

    Raises:
        AuditUnavailable: That it is read can't be written down.
        RegistryLost: The store holds no registry.
        BackupInvalid: An entry can't be read.
        StoreUnavailable: The store does not answer.
    """
    configure_logs(settings.log.level, settings.log.format)
    store = await open_store(store_settings(settings))
    try:
        view = await store.registry.load()
        if view is None:
            raise RegistryLost("the store holds no KEK registry")
        who = operator(command)
        async with command_audit(settings, store, who, Metrics(), sys.stderr) as audit:
            return await AuditedEscrowBox(store.escrow, audit, who, reads=True).load(), view
    finally:
        await store.close()


async def _reload(source: FileKekSource, keks: KekBook) -> None:
    try:
        source.reload(keks.required())
        await keks.refresh()
    except KmsError as error:
        log.warning("reload_failed", what="kek", detail=error.detail)
