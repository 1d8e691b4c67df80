"""The handlers: each takes a ``Call`` and returns the answer's body, encoded."""

from __future__ import annotations

import re
from operator import attrgetter
from typing import TYPE_CHECKING, Final

import msgspec

from progressdb_kms.api.call import Answer, Call
from progressdb_kms.api.longbatch import LONG_BYTES, answer_in_slices, with_turns
from progressdb_kms.api.models import (
    AuditRecords,
    BackupList,
    ExportView,
    Health,
    KekList,
    KekView,
    KeyList,
    RotationList,
    ScheduleDestruction,
    SnapshotView,
    rfc3339,
    rotation_view,
    view_of,
)
from progressdb_kms.domain.errors import (
    InvalidHeader,
    InvalidParameter,
    KekNotAccepted,
    KmsError,
    PermissionDenied,
)
from progressdb_kms.domain.keys import KeyState, StateChange
from progressdb_kms.domain.policy import Permission
from progressdb_kms.usecases import auditread, dekrotation, lifecycle, rotationwatch
from progressdb_kms.usecases.batches import BatchReader
from progressdb_kms.usecases.creation import Order, Result, Wanted, create_deks, order_of
from progressdb_kms.usecases.encryption import DECRYPT_BATCH, ENCRYPT_BATCH, failed
from progressdb_kms.usecases.messages import (
    CreatedDek,
    CreateItem,
    CreateRequest,
    Reader,
    Results,
    RewrappedDek,
    RewrapRequest,
    WrappedDek,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from msgspec import Struct

    from progressdb_kms.usecases.context import Kms
    from progressdb_kms.usecases.session import Session


def _lengths(field: str) -> Callable[[Iterable[Struct]], int]:
    """Return a function that adds up the lengths of a field of many items."""
    get = attrgetter(field)
    return lambda items: sum(map(len, map(get, items)))


PAGE_DEFAULT: Final = 100
PAGE_MAX: Final = 1000
_LIMIT: Final = re.compile(r"[1-9][0-9]{0,3}")

_CREATE: Final = Reader(CreateRequest)
_CREATE_BATCH: Final = BatchReader(CreateItem)
_ENCRYPT_WEIGHT: Final = _lengths("plaintext")
_DECRYPT_WEIGHT: Final = _lengths("ciphertext")
_REWRAP: Final = Reader(RewrapRequest)
_SCHEDULE: Final = Reader(ScheduleDestruction)


async def create_dek_for_thread(call: Call) -> bytes:
    """Make a DEK for a thread."""
    order = create_request(
        call.kms, call.session, call.content_type, call.body, _idempotency_key(call), call.request_id
    )
    return created(call.accept, await call.kms.creation.make((order,)))


def create_request(
    kms: Kms, session: Session, content_type: str, body: bytes, idempotency_key: str | None, request_id: str
) -> Order:
    """Return the order that a request to make one DEK gives.

    Raises:
        KmsError: The body or the key is not in order, or the caller may not.
    """
    wanted = Wanted(_CREATE.read(content_type, body).thread_id, idempotency_key)
    return order_of(kms, session, wanted, request_id)


def created(accept: str, results: list[Result] | Exception) -> bytes:
    """Return the answer to a request to make one DEK.

    Raises:
        KmsError: It was not made.
    """
    (result,) = (results,) if isinstance(results, Exception) else results
    if isinstance(result, Exception):
        raise result
    return encode(accept, CreatedDek.of(result))


def _idempotency_key(call: Call) -> str | None:
    if len(call.idempotency_keys) > 1:
        raise InvalidHeader("Idempotency-Key is given more than once")
    return call.idempotency_keys[0] if call.idempotency_keys else None


async def rotate_dek(call: Call) -> bytes:
    """Make a thread's next DEK."""
    call.parameters()
    record = await dekrotation.rotate_dek(
        call.kms, call.session, call.path["thread_id"], _idempotency_key(call), call.request_id
    )
    return call.answer(CreatedDek.of(record))


async def create_dek_batch(call: Call) -> bytes:
    """Make many DEKs."""
    limit = call.kms.bounds.batch_items
    items: Sequence[CreateItem | KmsError | msgspec.Raw]
    if len(call.body) > LONG_BYTES:
        items = await with_turns(_CREATE_BATCH.begin(call.content_type, call.body, limit))
    else:
        items = _CREATE_BATCH.read(call.content_type, call.body, limit)
    wanted = [_wanted(_CREATE_BATCH.item(call.content_type, item)) for item in items]
    call.session.charge(len(wanted) - 1)
    results = await create_deks(call.kms, call.session, wanted, call.request_id)
    for result in results:
        if isinstance(result, PermissionDenied):
            call.kms.refusals.note(result, "/create_dek_batch", call.request_id)
    return call.answer(Results([failed(r) if isinstance(r, KmsError) else CreatedDek.of(r) for r in results]))


def _wanted(item: CreateItem | KmsError) -> Wanted | KmsError:
    return item if isinstance(item, KmsError) else Wanted(item.thread_id, item.once)


async def encrypt(call: Call) -> bytes:
    """Encrypt a message."""
    return await call.loader.answer(call.hot.encrypt, call.session, call.content_type, call.accept, call.body)


async def decrypt(call: Call) -> bytes:
    """Decrypt a message."""
    return await call.loader.answer(call.hot.decrypt, call.session, call.content_type, call.accept, call.body)


async def encrypt_batch(call: Call) -> Answer:
    """Encrypt many messages."""
    if len(call.body) > LONG_BYTES:
        return await answer_in_slices(call, ENCRYPT_BATCH, call.hot.encrypt_items, _ENCRYPT_WEIGHT)
    return await call.loader.answer(
        call.hot.encrypt_batch, call.session, call.content_type, call.accept, call.body
    )


async def decrypt_batch(call: Call) -> Answer:
    """Decrypt many messages."""
    if len(call.body) > LONG_BYTES:
        return await answer_in_slices(call, DECRYPT_BATCH, call.hot.decrypt_items, _DECRYPT_WEIGHT)
    return await call.loader.answer(
        call.hot.decrypt_batch, call.session, call.content_type, call.accept, call.body
    )


async def get_wrapped(call: Call) -> bytes:
    """Return a wrapped DEK."""
    key_id = call.parameters("key_id").get("key_id")
    if key_id is None:
        raise InvalidParameter("key_id is missing")
    record = await lifecycle.get_wrapped(call.kms, call.session, key_id)
    return call.answer(WrappedDek(record.wrapped, record.kek_id, str(record.kek_version)))


async def rewrap(call: Call) -> bytes:
    """Wrap a DEK under the active KEK."""
    request = _REWRAP.read(call.content_type, call.body)
    if request.new_kek_hex is not msgspec.UNSET:
        raise KekNotAccepted("leave new_kek_hex out: a KEK never travels; the rotation brings the new one")
    record = await lifecycle.rewrap(call.kms, call.session, request.key_id, call.request_id)
    return call.answer(RewrappedDek(record.key_id, record.wrapped, record.kek_id, str(record.kek_version)))


async def healthz(call: Call) -> bytes:
    """Say that the service serves."""
    return call.answer(Health("ok"))


async def list_keys(call: Call) -> bytes:
    """List keys."""
    given = call.parameters("thread_id", "state", "limit", "cursor")
    try:
        state = KeyState(given["state"]) if "state" in given else None
    except ValueError:
        raise InvalidParameter(f"state is one of {', '.join(KeyState)}") from None
    page = await lifecycle.list_keys(
        call.kms,
        call.session,
        thread_id=given.get("thread_id"),
        state=state,
        limit=_limit(given),
        cursor=given.get("cursor"),
    )
    return call.answer(KeyList([view_of(record) for record in page.records], page.cursor))


def _limit(given: Mapping[str, str]) -> int:
    limit = given.get("limit", str(PAGE_DEFAULT))
    if not _LIMIT.fullmatch(limit) or int(limit) > PAGE_MAX:
        raise InvalidParameter(f"limit is 1 to {PAGE_MAX}")
    return int(limit)


async def get_key(call: Call) -> bytes:
    """Show a key."""
    call.parameters()
    return call.answer(view_of(await lifecycle.get_key(call.kms, call.session, call.path["key_id"])))


def state_change(change: StateChange) -> Callable[[Call], Awaitable[bytes]]:
    """Return the handler that makes one change of a key's state."""

    async def handler(call: Call) -> bytes:
        days = None
        if change is StateChange.SCHEDULE_DESTRUCTION and call.body:
            wanted = _SCHEDULE.read(call.content_type, call.body).waiting_days
            days = None if wanted is msgspec.UNSET else wanted
        key_id = call.path["key_id"]
        record = await lifecycle.change_state(call.kms, call.session, key_id, change, call.request_id, days)
        return call.answer(view_of(record))

    return handler


async def list_keks(call: Call) -> bytes:
    """Show KEK versions with their census."""
    call.parameters()
    call.session.grants().require(Permission.READ)
    keks = call.kms.keks
    census = await call.kms.store.census()
    wraps = await keks.wraps()
    view = keks.view
    return call.answer(
        KekList(
            str(view.active),
            [
                KekView(
                    version=str(version),
                    kek_id=kek.kek_id,
                    state=str(kek.state),
                    source=kek.source,
                    deks=census.get(version, 0),
                    wraps=wraps.get(version, 0),
                    created_at=rfc3339(kek.created_at),
                    activated_at=None if kek.activated_at is None else rfc3339(kek.activated_at),
                    loaded=version in keks.usable,
                )
                for version, kek in sorted(view.keks.items())
            ],
        )
    )


async def list_rotations(call: Call) -> bytes:
    """List rotations."""
    limit = _limit(call.parameters("limit"))
    found = await rotationwatch.list_rotations(call.rotations, call.session, limit)
    return call.answer(RotationList([rotation_view(rotation) for rotation in found]))


async def get_rotation(call: Call) -> bytes:
    """Show a rotation."""
    call.parameters()
    found = await rotationwatch.get_rotation(call.rotations, call.session, call.path["rotation_id"])
    return call.answer(rotation_view(found))


async def list_audit(call: Call) -> bytes:
    """List audit records."""
    given = call.parameters("since", "limit", "cursor", *auditread.FILTERS)
    page = await auditread.audit_page(
        call.audit,
        call.session,
        since=given.get("since"),
        cursor=given.get("cursor"),
        limit=_limit(given),
        filters={name: given[name] for name in auditread.FILTERS if name in given},
    )
    return call.answer(AuditRecords(page.lines, page.cursor))


async def list_backups(call: Call) -> bytes:
    """Show snapshots and exports."""
    call.parameters()
    call.session.grants().require(Permission.READ)
    snapshots = []
    for rotation_id, manifests in sorted((await call.kms.backups.snapshots()).items()):
        rotation = await call.kms.ledger.get(rotation_id)
        counts = [manifest.count for manifest in manifests.values()]
        finished = rotation.finished_at if rotation is not None else None
        snapshots.append(
            SnapshotView(
                rotation_id=rotation_id,
                slots=len(counts),
                records=sum(count for count in counts if count >= 0),
                unsealed=sum(count < 0 for count in counts),
                finished_at=None if finished is None else rfc3339(finished),
            )
        )
    exports = [
        ExportView(
            export_id=note.export_id,
            kind=str(note.kind),
            began_at=rfc3339(note.began_at),
            finished_at=None if note.finished_at is None else rfc3339(note.finished_at),
            rotation_id=note.rotation_id,
            records=note.records,
            tombstones=note.tombstones,
            sha256=note.sha256,
            kek_versions=[str(version) for version in note.kek_versions],
        )
        for note in await call.kms.backups.exports()
    ]
    return call.answer(BackupList(snapshots, exports))
