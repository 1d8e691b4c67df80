"""The audit log of the service and of commands, as configured."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

import structlog

from progressdb_kms import __version__
from progressdb_kms.audit.chained import ChainedAuditLog, Sinks
from progressdb_kms.audit.keyfile import load_audit_key, load_public_key
from progressdb_kms.audit.reading import export, verify_store
from progressdb_kms.audit.stdout import NoAuditLog, StdoutAuditLog
from progressdb_kms.audit.trimming import Trimmer
from progressdb_kms.bootstrap.storing import store_settings
from progressdb_kms.domain.errors import AuditUnavailable, KmsError, StoreUnavailable
from progressdb_kms.observability.logs import configure_logs
from progressdb_kms.ports import AuditEvent
from progressdb_kms.store.redis import open_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from typing import TextIO

    from progressdb_kms.audit.pipes import PatientStream
    from progressdb_kms.domain.audit import VerifyKey
    from progressdb_kms.domain.auditreport import AuditReport
    from progressdb_kms.ports import AuditLog
    from progressdb_kms.ports.audit import Anchor, AuditObserver, AuditStore
    from progressdb_kms.settings import Settings
    from progressdb_kms.store.redis import RedisStore

log = structlog.get_logger(__name__)

TICK_EVERY: Final = 1.0
TRIM_EVERY: Final = 60


def make_audit(
    settings: Settings,
    store: AuditStore,
    instance: str,
    observer: AuditObserver,
    output: TextIO | PatientStream,
) -> AuditLog:
    """Return the configured audit log; one that is a ``ChainedAuditLog`` has to be closed.

    Args:
        settings: The configuration.
        store: Where chains are anchored.
        instance: Name of this process.
        observer: Told what is written.
        output: Where records are printed.

    Raises:
        AuditKeyInvalid: A key can't be read.
    """
    audit = settings.audit
    if audit.key_file is None:
        return StdoutAuditLog(instance, output) if audit.stdout else NoAuditLog()
    sinks = Sinks(
        stream=audit.stream,
        directory=audit.directory,
        file_bytes=audit.file_bytes,
        output=output if audit.stdout else None,
    )
    key = load_audit_key(audit.key_file)
    return ChainedAuditLog(key, instance, store, sinks, observer, __version__, known=previous_keys(settings))


def previous_keys(settings: Settings) -> tuple[VerifyKey, ...]:
    """Return the public halves of keys that were used before.

    Raises:
        AuditKeyInvalid: One can't be read.
    """
    return tuple(load_public_key(path) for path in settings.audit.previous_keys)


def verify_keys(settings: Settings) -> tuple[VerifyKey, ...]:
    """Return all keys that the configuration names, for verifying.

    Raises:
        AuditKeyInvalid: One can't be read.
    """
    path = settings.audit.key_file
    own = () if path is None else (load_audit_key(path).verify,)
    return (*own, *previous_keys(settings))


@asynccontextmanager
async def command_audit(
    settings: Settings, store: RedisStore, instance: str, observer: AuditObserver, output: TextIO
) -> AsyncIterator[AuditLog]:
    """Give a command its audit log, and close it after."""
    audit = make_audit(settings, store.audit, instance, observer, output)
    try:
        yield audit
    finally:
        if isinstance(audit, ChainedAuditLog):
            await audit.close()


async def begin(settings: Settings, audit: AuditLog, instance: str) -> None:
    """Open a service's chain, and write down what was taken on an operator's word. Says how sure the log is.

    What can't be written now is no reason not to start: changes are refused until it can.
    """
    if not isinstance(audit, ChainedAuditLog):
        log.warning(
            "audit_unchained",
            detail="audit records are only printed, and nothing vouches for them",
            action="make a key (audit keygen) and set audit.key_file",
        )
    else:
        if not settings.audit.stream and settings.audit.directory is None:
            log.warning(
                "audit_only_printed",
                detail="the audit log is chained and anchored; whether its records are kept is up to whoever"
                " reads the standard output",
                action="set audit.stream or audit.directory",
            )
        with suppress(AuditUnavailable):
            await audit.open()
    store, who = settings.store, f"service {instance}"
    events = []
    if store.durability == "attested":
        events.append(AuditEvent("store.attested", "ok", who, "", detail=store.attested_reason))
    if store.allow_data_loss:
        events.append(AuditEvent("store.data-loss-allowed", "ok", who, ""))
    await audit.record(events)


async def keep_up(settings: Settings, audit: AuditLog, store: AuditStore, observer: AuditObserver) -> None:
    """Retry, sign and trim, until cancelled."""
    if not isinstance(audit, ChainedAuditLog) or settings.audit.key_file is None:
        return
    key = load_audit_key(settings.audit.key_file)
    trimmer = Trimmer(key, previous_keys(settings), store, settings.audit.stream_records, observer)
    seconds = 0
    while True:
        await asyncio.sleep(TICK_EVERY)
        seconds += 1
        try:
            await audit.tick()
            if seconds % TRIM_EVERY == 0:
                gone = await (trimmer.run() if settings.audit.stream else trimmer.forget_old())
                if gone:
                    detail = f"count={gone} {'records' if settings.audit.stream else 'chains'}"
                    await audit.record([AuditEvent("audit.trim", "ok", "service", "", detail=detail)])
        except KmsError as error:
            log.info("audit_upkeep_failed", detail=error.detail)
        except Exception:  # a bug must not end what keeps the log signed: say so, and go on
            log.exception("audit_upkeep_broken")


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[RedisStore]:
    configure_logs(settings.log.level, settings.log.format)
    store = await open_store(store_settings(settings))
    try:
        if not store.health.status.reachable:
            raise StoreUnavailable("the store does not answer: check store.url, and that it runs")
        yield store
    finally:
        await store.close()


async def verify_audit(settings: Settings, keys: Sequence[VerifyKey]) -> AuditReport:
    """Verify the store's stream against its anchor.

    Raises:
        StoreUnavailable: Not now.
    """
    async with _opened(settings) as store:
        return await verify_store(store.audit, keys)


async def read_anchor(settings: Settings) -> Anchor:
    """Return what the store vouches for.

    Raises:
        StoreUnavailable: Not now.
    """
    async with _opened(settings) as store:
        return await store.audit.anchor()


async def export_audit(
    settings: Settings, observer: AuditObserver, output: TextIO, write: Callable[[bytes], object]
) -> int:
    """Write anchor and records of the store, and return the number of records. It is itself audited.

    Raises:
        StoreUnavailable: Not now.
        AuditUnavailable: That it is exported can't be written down.
        OSError: It can't be written.
    """
    who = operator("audit export")
    async with _opened(settings) as store, command_audit(settings, store, who, observer, output) as audit:
        await audit.record([AuditEvent("audit.export", "intent", who, "")])
        count = await export(store.audit, write)
        await audit.record([AuditEvent("audit.export", "ok", who, "", detail=f"{count} records")])
        return count


def operator(command: str) -> str:
    """Return how the audit log names whoever runs a command here."""
    return f"{command} by uid:{os.getuid()} on {socket.gethostname()}, process {os.getpid()}"
