"""The life of a DEK: made, read, rewrapped, disabled, destroyed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.domain.errors import (
    BatchTooLarge,
    InvalidField,
    KekUnavailable,
    KekUnreachable,
    KeyDestroyed,
    KeyNotFound,
    KmsError,
    StaleKek,
    StoreUnavailable,
    WrappedKeyInvalid,
)
from progressdb_kms.domain.keys import (
    DEK_BYTES,
    UNIQUE_BYTES,
    DekRecord,
    KeyState,
    NewDek,
    StateChange,
    check_idempotency_key,
    check_thread_id,
    derive_key_id,
    new_key_id,
)
from progressdb_kms.domain.policy import Permission
from progressdb_kms.ports import AuditEvent
from progressdb_kms.usecases.keycache import CachedDek
from progressdb_kms.usecases.loading import unwrap_records

if TYPE_CHECKING:
    from collections.abc import Sequence

    from progressdb_kms.ports import KeyPage
    from progressdb_kms.usecases.context import Kms
    from progressdb_kms.usecases.session import Session

_ATTEMPTS: Final = 3
"""Tries of a wrap that races with a rotation of the KEK, or of a rewrap that races with another."""
DAY: Final = 86_400


@dataclass(frozen=True, slots=True)
class Wanted:
    """A DEK that a caller asks for; with an idempotency key, the same one each time."""

    thread_id: str
    idempotency_key: str | None = None


async def create_deks(
    kms: Kms, session: Session, wanted: Sequence[Wanted | KmsError], request_id: str
) -> list[DekRecord | KmsError]:
    """Make DEKs, or find those that the same idempotency keys made before; one result each, in order.

    Returns only when what it returns can't be lost.

    Args:
        kms: The service.
        session: Who asks.
        wanted: What for; an error stays in its place.
        request_id: For the audit log.

    Raises:
        PermissionDenied: The caller may create no key at all.
        BatchTooLarge: Too many.
        ServiceError: Nothing could be made.
    """
    todo, results = _wanted(kms, session, wanted)
    made: list[tuple[DekRecord, bool]] = []
    if kms.audit.durable:
        await kms.audit.record([_told(session, request_id, "intent", each) for each in todo])
    failure: KmsError | None = None
    try:
        await _store_all(kms, session, todo, results, made)
    except KmsError as error:
        failure = error
    outcomes = [_told(session, request_id, "ok", record, "" if fresh else "replay") for record, fresh in made]
    if kms.audit.durable:
        for each in todo:
            result = results[each.number]
            if isinstance(result, KmsError):
                outcomes.append(_told(session, request_id, "failed", each, result.code))
    await kms.audit.record(outcomes)
    # With nothing made the caller gets the reason; else each item says for itself how it went.
    if failure is not None and not made:
        raise failure
    return results


def _told(
    session: Session, request_id: str, outcome: str, key: _Named | DekRecord, detail: str = ""
) -> AuditEvent:
    return AuditEvent("key.create", outcome, session.name, request_id, key.key_id, key.thread_id, detail)


class _Named(NamedTuple):
    """A DEK about to be made: its place among those wanted, and its names."""

    number: int
    key_id: str
    thread_id: str


def _named(kms: Kms, session: Session, number: int, want: Wanted | KmsError) -> _Named:
    if isinstance(want, KmsError):
        raise want
    thread_id = check_thread_id(want.thread_id)
    session.grants().require(Permission.CREATE, thread_id)
    if want.idempotency_key is None:
        return _Named(number, new_key_id(thread_id, kms.random(UNIQUE_BYTES)), thread_id)
    key = check_idempotency_key(want.idempotency_key)
    return _Named(number, derive_key_id(session.name, key, thread_id), thread_id)


def _wanted(
    kms: Kms, session: Session, wanted: Sequence[Wanted | KmsError]
) -> tuple[list[_Named], list[DekRecord | KmsError]]:
    """Return what is to be made, and the results so far."""
    grants = session.grants()
    if not grants.allows_some(Permission.CREATE):
        grants.require(Permission.CREATE)
    if len(wanted) > kms.bounds.batch_items:
        raise BatchTooLarge(f"a batch has at most {kms.bounds.batch_items} items, this one has {len(wanted)}")
    results: list[DekRecord | KmsError] = [StoreUnavailable()] * len(wanted)
    todo: list[_Named] = []
    for number, want in enumerate(wanted):
        try:
            todo.append(_named(kms, session, number, want))
        except KmsError as error:
            results[number] = error
    return todo, results


async def _store_all(
    kms: Kms,
    session: Session,
    todo: list[_Named],
    results: list[DekRecord | KmsError],
    made: list[tuple[DekRecord, bool]],
) -> None:
    """Store what is to do; fill in ``results``, and in ``made`` what was stored, even if an error ends it."""
    for _ in range(_ATTEMPTS):
        stale = []
        for entry, (result, fresh) in zip(todo, await _store_new(kms, session, todo), strict=True):
            results[entry.number] = result
            if isinstance(result, StaleKek):
                stale.append(entry)
            elif isinstance(result, DekRecord):
                made.append((result, fresh))
        if not stale:
            return
        # The KEK was rotated while this instance still knew the old one: learn the new one, wrap again.
        todo = stale
        await kms.keks.refresh()


async def _store_new(
    kms: Kms, session: Session, todo: Sequence[_Named]
) -> list[tuple[DekRecord | KmsError, bool]]:
    """Return each result, and whether this very call made the key."""
    if not todo:
        return []
    deks = [kms.random(DEK_BYTES) for _ in todo]
    names = [(entry.key_id, entry.thread_id) for entry in todo]
    version, kek_id, blobs = await kms.keks.wrap(deks, names)
    now = int(kms.now())
    began = kms.clock()
    new = [
        NewDek(
            key_id=entry.key_id,
            thread_id=entry.thread_id,
            wrapped=blob,
            kek_id=kek_id,
            kek_version=version,
            created_at=now,
            created_by=session.name,
        )
        for entry, blob in zip(todo, blobs, strict=True)
    ]
    stored = await kms.store.create(new)
    results: list[tuple[DekRecord | KmsError, bool]] = []
    for dek, blob, result in zip(deks, blobs, stored, strict=True):
        if not isinstance(result, DekRecord):
            results.append((result, False))
            continue
        if result.state is KeyState.DESTROYED:
            results.append((KeyDestroyed("the key that this Idempotency-Key made has been destroyed"), False))
            continue
        fresh = result.wrapped == blob
        if fresh:  # ours and not an earlier call's: what it wraps is known
            kms.cache.put(
                CachedDek(
                    key_id=result.key_id,
                    thread_id=result.thread_id,
                    cipher=AESGCM(dek),
                    state=result.state,
                    version=str(result.version),
                    loaded_at=began,
                )
            )
        results.append((result, fresh))
    return results


async def get_key(
    kms: Kms, session: Session, key_id: str, permission: Permission = Permission.READ
) -> DekRecord:
    """Return a key's record.

    Raises:
        PermissionDenied: The caller lacks ``permission`` for the key's thread.
        KeyNotFound: No such key.
        StoreUnavailable: Not now.
    """
    grants = session.grants()
    if not grants.allows_some(permission):
        grants.require(permission)
    (record,) = await kms.store.get([key_id])
    if record is None:
        raise KeyNotFound
    grants.require(permission, record.thread_id)
    return record


async def get_wrapped(kms: Kms, session: Session, key_id: str) -> DekRecord:
    """Return the record of a key that still has a wrapped DEK.

    Raises:
        KeyDestroyed: It has none any more.
        PermissionDenied, KeyNotFound, StoreUnavailable: As ``get_key``.
    """
    record = await get_key(kms, session, key_id)
    if record.state is KeyState.DESTROYED:
        raise KeyDestroyed
    return record


async def list_keys(
    kms: Kms,
    session: Session,
    *,
    thread_id: str | None,
    state: KeyState | None,
    limit: int,
    cursor: str | None,
) -> KeyPage:
    """Return a page of the keys that the caller may read; an empty page need not be the last.

    Raises:
        PermissionDenied: The caller may read none, or not this thread's.
        InvalidThreadId, InvalidParameter: A filter or the cursor is not valid.
        StoreUnavailable: Not now.
    """
    grants = session.grants()
    if thread_id is not None:
        grants.require(Permission.READ, check_thread_id(thread_id))
    elif not grants.allows_some(Permission.READ):
        grants.require(Permission.READ)
    page = await kms.store.list_keys(thread_id=thread_id, state=state, limit=limit, cursor=cursor)
    records = tuple(record for record in page.records if grants.allows(Permission.READ, record.thread_id))
    return type(page)(records, page.cursor)


async def change_state(
    kms: Kms,
    session: Session,
    key_id: str,
    change: StateChange,
    request_id: str,
    waiting_days: int | None = None,
) -> DekRecord:
    """Disable, enable, or schedule or cancel the destruction of a key, and return its record.

    Repeating a change that has been made is not an error. An intent is audited before, the outcome after.

    Args:
        kms: The service.
        session: Who asks; ``key:destroy`` for destruction, ``key:admin`` for the others.
        key_id: Which key.
        change: What to do.
        request_id: For the audit log.
        waiting_days: For SCHEDULE_DESTRUCTION, 7 to 30; None takes the configured one.

    Raises:
        InvalidField: The waiting period is out of range.
        PermissionDenied, KeyNotFound, KeyDestroyed, InvalidTransition, StoreUnavailable, StoreNotDurable.
    """
    destructive = change in {StateChange.SCHEDULE_DESTRUCTION, StateChange.CANCEL_DESTRUCTION}
    record = await get_key(kms, session, key_id, Permission.DESTROY if destructive else Permission.ADMIN)
    now = int(kms.now())
    destroy_at = None
    if change is StateChange.SCHEDULE_DESTRUCTION:
        days = kms.bounds.waiting_days if waiting_days is None else waiting_days
        if not 7 <= days <= 30:  # noqa: PLR2004 - the range that the API promises
            raise InvalidField("waiting_days must be 7 to 30")
        destroy_at = now + days * DAY
    action = f"key.{change}"
    await kms.audit.record([AuditEvent(action, "intent", session.name, request_id, key_id, record.thread_id)])
    try:
        changed = await kms.store.change_state(key_id, change, now=now, destroy_at=destroy_at)
    except KmsError as error:
        await kms.audit.record(
            [AuditEvent(action, "failed", session.name, request_id, key_id, record.thread_id, error.code)]
        )
        raise
    # Our own memory need not wait for our own notice.
    kms.cache.forget([key_id])
    await kms.audit.record([AuditEvent(action, "ok", session.name, request_id, key_id, record.thread_id)])
    return changed


async def rewrap(kms: Kms, session: Session, key_id: str, request_id: str) -> DekRecord:
    """Wrap a key's DEK under the active KEK version and return its record; nothing to do is fine.

    The new blob is unwrapped and compared before it replaces the old one, by compare-and-set.

    Raises:
        PermissionDenied: The caller lacks ``key:admin``.
        KeyNotFound, KeyDestroyed: There is nothing to rewrap.
        WrappedKeyInvalid: The stored blob does not unwrap; it is left as it is.
        ServiceError: Not now.
    """
    record = await get_key(kms, session, key_id, Permission.ADMIN)

    async def audited(outcome: str, detail: str) -> None:
        event = AuditEvent("key.rewrap", outcome, session.name, request_id, key_id, record.thread_id, detail)
        await kms.audit.record([event])

    if record.state is not KeyState.DESTROYED and record.kek_version == kms.keks.active:
        return record
    await audited("intent", "")
    try:
        rewrapped = await _rewrap(kms, record)
    except KmsError as error:
        await audited("failed", error.code)
        raise
    await audited("ok", f"kek {rewrapped.kek_version}")
    return rewrapped


async def _rewrap(kms: Kms, record: DekRecord) -> DekRecord:
    for _ in range(_ATTEMPTS):
        if record.state is KeyState.DESTROYED:
            raise KeyDestroyed
        if record.kek_version == kms.keks.active:
            return record
        (dek,) = await unwrap_records(kms, [record])
        if isinstance(dek, KmsError):
            raise dek
        version, kek_id, (blob,) = await kms.keks.wrap([dek], [(record.key_id, record.thread_id)])
        written = replace(record, wrapped=blob, kek_id=kek_id, kek_version=version)
        (check,) = await unwrap_records(kms, [written])
        if isinstance(check, (KekUnavailable, KekUnreachable)):
            raise check
        if check != dek:
            raise WrappedKeyInvalid("the new wrap does not unwrap to the same key; the old one was kept")
        try:
            if await kms.store.rewrap(record, blob, kek_id, version):
                return written
        except StaleKek:
            await kms.keks.refresh()
        (found,) = await kms.store.get([record.key_id])
        if found is None:
            raise KeyNotFound
        record = found
    raise StoreUnavailable("the key is being changed by others; try again")
