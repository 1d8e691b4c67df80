"""Rotation of a thread's DEK: a new one for what will be encrypted, the older ones for what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.errors import KeyDestroyed, KmsError, StaleKek, StoreUnavailable
from progressdb_kms.domain.keys import (
    DEK_BYTES,
    UNIQUE_BYTES,
    DekRecord,
    KeyState,
    NewDek,
    check_idempotency_key,
    check_thread_id,
    derive_key_id,
    new_key_id,
)
from progressdb_kms.domain.policy import Permission
from progressdb_kms.ports import AuditEvent
from progressdb_kms.usecases.creation import remember

if TYPE_CHECKING:
    from progressdb_kms.usecases.context import Kms
    from progressdb_kms.usecases.session import Session

_ATTEMPTS: Final = 3
_OF_ROTATION: Final = "rotate-dek "
"""Put before an idempotency key, which never holds a space: a create with the same key makes another DEK."""


async def rotate_dek(
    kms: Kms, session: Session, thread_id: str, idempotency_key: str | None, request_id: str
) -> DekRecord:
    """Make a thread's next DEK; within a second, those that were enabled only decrypt.

    A thread without a DEK gets its first one.

    Args:
        kms: The service.
        session: Who asks; needs ``key:create`` and ``key:admin`` for the thread.
        thread_id: Which thread.
        idempotency_key: The same caller, key and thread rotate once, and find the same DEK again.
        request_id: For the audit log.

    Raises:
        InvalidThreadId, InvalidHeader, PermissionDenied: The caller's.
        KeyDestroyed: The DEK that this idempotency key made has been destroyed.
        ServiceError: Not now.
    """
    check_thread_id(thread_id)
    session.grants().require(Permission.CREATE, thread_id)
    session.grants().require(Permission.ADMIN, thread_id)
    if idempotency_key is None:
        key_id = new_key_id(thread_id, kms.random(UNIQUE_BYTES))
    else:
        given = check_idempotency_key(idempotency_key)
        key_id = derive_key_id(session.name, _OF_ROTATION + given, thread_id)
    names = (session.name, request_id, key_id, thread_id)
    await kms.audit.record([AuditEvent("key.rotate", "intent", *names)])
    try:
        record = await _store(kms, session, key_id, thread_id)
    except KmsError as error:
        await kms.audit.record([AuditEvent("key.rotate", "failed", *names, error.code)])
        raise
    await kms.audit.record([AuditEvent("key.rotate", "ok", *names)])
    return record


async def _store(kms: Kms, session: Session, key_id: str, thread_id: str) -> DekRecord:
    for _ in range(_ATTEMPTS):
        dek = kms.random(DEK_BYTES)
        version, kek_id, (blob,) = await kms.keks.wrap([dek], [(key_id, thread_id)])
        began = kms.clock()
        new = NewDek(key_id, thread_id, blob, kek_id, version, int(kms.now()), session.name)
        try:
            record = await kms.store.rotate(new)
        except StaleKek:
            await kms.keks.refresh()
            continue
        if record.state is KeyState.DESTROYED:
            raise KeyDestroyed("the key that this Idempotency-Key made has been destroyed")
        if record.wrapped == blob:  # ours and not an earlier call's: what it wraps is known
            remember(kms, record, dek, began)
        return record
    raise StoreUnavailable("the KEK is being rotated; try again")
