"""The life of a DEK once it is made: read, rewrapped, disabled, destroyed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.errors import (
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
    DekRecord,
    KeyState,
    StateChange,
    check_thread_id,
)
from progressdb_kms.domain.policy import Permission
from progressdb_kms.ports import AuditEvent
from progressdb_kms.usecases.loading import unwrap_records

if TYPE_CHECKING:
    from progressdb_kms.ports import KeyPage
    from progressdb_kms.usecases.context import Kms
    from progressdb_kms.usecases.session import Session

_ATTEMPTS: Final = 3
"""Tries of a rewrap that races with another, or with a rotation of the KEK."""
DAY: Final = 86_400


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
