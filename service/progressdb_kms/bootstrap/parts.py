"""Parts that the service and the commands share, and what each command works with."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import structlog

from progressdb_kms import __version__
from progressdb_kms.audit.escrow import AuditedEscrowBox
from progressdb_kms.bootstrap.audit import command_audit, operator
from progressdb_kms.bootstrap.storing import store_settings
from progressdb_kms.domain.errors import (
    KmsError,
    PolicyInvalid,
    RegistryLost,
    RotationRefused,
    StoreNotDurable,
    StoreUnavailable,
)
from progressdb_kms.domain.policy import Policy, parse_policy
from progressdb_kms.files import Watch
from progressdb_kms.kek.escrow import Escrow, load_recipients
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.kek.staging import ExternalKekStager, FileKekStager
from progressdb_kms.observability.logs import configure_logs
from progressdb_kms.observability.metrics import Metrics
from progressdb_kms.ports import RegistryView
from progressdb_kms.process import harden
from progressdb_kms.settings import Settings
from progressdb_kms.store.escrow_entries import decode_entry
from progressdb_kms.store.redis import RedisStore, open_store
from progressdb_kms.usecases.backup import inspect_export
from progressdb_kms.usecases.crew import Parts, Progress
from progressdb_kms.usecases.keks import KekBook
from progressdb_kms.usecases.vault import Vault
from progressdb_kms.yamlfile import read_yaml

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from progressdb_kms.ports import AuditLog, KekSource, KekStager
    from progressdb_kms.ports.escrow import SealedKek

log = structlog.get_logger(__name__)


def kek_source(settings: Settings) -> FileKekSource:
    """Return the configured KEK source.

    Raises:
        KekFileInvalid: It can't be used.
    """
    return FileKekSource(settings.kek.path)


def make_vault(store: RedisStore, source: KekSource, audit: AuditLog, owner: str) -> Vault:
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
    )


@asynccontextmanager
async def open_vault(settings: Settings, command: str) -> AsyncIterator[tuple[Vault, KekBook]]:
    """Open the configured store and KEKs for an operator's command. Its audit records go to standard error.

    Args:
        settings: The configuration.
        command: Its name, for locks and the audit log.

    Raises:
        OperatorError: A file that it needs can't be used.
        StoreUnavailable: The store does not answer.
        StoreNotDurable: It could lose what is written to it.
    """
    configure_logs(settings.log.level, settings.log.format)
    for line in harden():
        log.debug("hardening", detail=line)
    source = kek_source(settings)
    owner = f"{operator(command)}, {secrets.token_hex(4)}"
    store = await open_store(store_settings(settings))
    try:
        status = store.health.status
        if not status.reachable:
            raise StoreUnavailable("the store does not answer: check store.url, and that it runs")
        if status.problems:
            raise StoreNotDurable("; ".join(status.problems))
        keks = KekBook(source=source, registry=store.registry, observer=Metrics())
        async with command_audit(settings, store, owner, Metrics(), sys.stderr) as audit:
            yield make_vault(store, source, audit, owner), keks
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
        OperatorError: A file that it needs can't be used, or the store holds no registry yet.
        StoreUnavailable: The store does not answer.
    """
    configure_logs(settings.log.level, settings.log.format)
    for line in harden():
        log.warning("hardening", detail=line)
    metrics = Metrics()
    watch = Watch([settings.kek.path], lambda: _reload(source, keks))
    source = kek_source(settings)
    store = await open_store(store_settings(settings), observer=metrics)
    keks = KekBook(source=source, registry=store.registry, observer=metrics, look_again=source.reload)
    try:
        if await store.registry.load() is None:
            raise RotationRefused("the store holds no KEK registry yet: start the service on it first")
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
                    stager=_kek_stager(settings, source, keks, escrow),
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


def _kek_stager(settings: Settings, source: FileKekSource, keks: KekBook, escrow: Escrow) -> KekStager:
    rotation = settings.rotation
    if rotation.distribute == "external":
        return ExternalKekStager(source, keks.required, escrow, rotation.wait)
    if settings.kek.management == "file" or rotation.kubernetes is None:
        return FileKekStager(source, keks.required, escrow)
    # Needs the extra `kubernetes`, which nothing else does.
    try:
        from progressdb_kms.kek.kubernetes import KubernetesKekStager, SecretRef  # noqa: PLC0415 - see above
    except ModuleNotFoundError:
        raise RotationRefused(
            "kek.management kubernetes needs another package: pip install 'progressdb-kms[kubernetes]'"
        ) from None

    ref = SecretRef(rotation.kubernetes.namespace, rotation.kubernetes.secret, rotation.kubernetes.key)
    return KubernetesKekStager(ref, source, keks.required, escrow, rotation.wait)
