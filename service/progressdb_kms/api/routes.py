"""The table of routes: limits are data.

A handler takes a ``Call`` and returns the answer's body, encoded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec

from progressdb_kms.api.models import (
    BackupList,
    ExportView,
    Health,
    KekList,
    KekView,
    KeyList,
    KeyView,
    RotationList,
    RotationView,
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
from progressdb_kms.usecases import dekrotation, lifecycle, rotationwatch
from progressdb_kms.usecases.encryption import Hot, failed
from progressdb_kms.usecases.lifecycle import Wanted
from progressdb_kms.usecases.messages import (
    BatchReader,
    CreatedDek,
    CreateItem,
    CreateRequest,
    Decrypted,
    DecryptItem,
    Encrypted,
    EncryptItem,
    Reader,
    Results,
    RewrappedDek,
    RewrapRequest,
    WrappedDek,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from progressdb_kms.domain.keys import DekRecord
    from progressdb_kms.ports import RotationLedger
    from progressdb_kms.usecases.context import Kms
    from progressdb_kms.usecases.loading import Loader
    from progressdb_kms.usecases.session import Session

PAGE_DEFAULT: Final = 100
PAGE_MAX: Final = 1000
_LIMIT: Final = re.compile(r"[1-9][0-9]{0,3}")

_CREATE: Final = Reader(CreateRequest)
_CREATE_BATCH: Final = BatchReader(CreateItem)
_REWRAP: Final = Reader(RewrapRequest)
_SCHEDULE: Final = Reader(ScheduleDestruction)


@dataclass(slots=True)
class Call:
    """One request, as far as a handler needs to know it."""

    kms: Kms
    hot: Hot
    loader: Loader
    rotations: RotationLedger
    session: Session
    request_id: str
    content_type: str
    accept: str
    body: bytes = field(repr=False)
    path: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, list[str]] = field(default_factory=dict)
    idempotency_keys: list[str] = field(default_factory=list)

    def answer(self, message: object) -> bytes:
        """Encode an answer as the caller accepts it."""
        return encode(self.accept, message)

    def parameters(self, *names: str) -> dict[str, str]:
        """Return the query parameters, each at most once and none but ``names``.

        Raises:
            InvalidParameter: Otherwise.
        """
        for name, values in self.query.items():
            if name not in names:
                raise InvalidParameter(
                    f"unknown query parameter; this route takes {', '.join(names) or 'none'}"
                )
            if len(values) > 1:
                raise InvalidParameter(f"{name} is given more than once")
        return {name: values[0] for name, values in self.query.items()}


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the API.

    Attributes:
        method: HTTP method.
        path: Path, with ``<name>`` for a part.
        handler: What answers.
        summary: One line for the documentation.
        permission: What the caller needs, None for any certificate that is let in.
        takes: Model of the body, None for none; ``batch_of`` the model of a batch's item.
        gives: Model of the answer.
        batch: The larger body limit applies.
        body_optional: An empty body is fine.
        parameters: Query parameters: name to schema.
        also: What the caller needs besides ``permission``; the handler sees to it.
    """

    method: str
    path: str
    handler: Callable[[Call], Awaitable[bytes]]
    summary: str
    permission: Permission | None
    gives: Any
    takes: Any = None
    batch: bool = False
    body_optional: bool = False
    parameters: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    idempotent_create: bool = False
    also: Permission | None = None


async def create_dek_for_thread(call: Call) -> bytes:
    """Make a DEK for a thread."""
    request = _CREATE.read(call.content_type, call.body)
    (result,) = await lifecycle.create_deks(
        call.kms, call.session, [Wanted(request.thread_id, _idempotency_key(call))], call.request_id
    )
    if isinstance(result, KmsError):
        raise result
    return call.answer(_created(result))


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
    return call.answer(_created(record))


async def create_dek_batch(call: Call) -> bytes:
    """Make many DEKs."""
    wanted = [
        item if isinstance(item, KmsError) else Wanted(item.thread_id, _given(item.idempotency_key))
        for item in _CREATE_BATCH.read(call.content_type, call.body, call.kms.bounds.batch_items)
    ]
    results = await lifecycle.create_deks(call.kms, call.session, wanted, call.request_id)
    for result in results:
        if isinstance(result, PermissionDenied):
            call.kms.refusals.note(result, "/create_dek_batch", call.request_id)
    return call.answer(Results([failed(r) if isinstance(r, KmsError) else _created(r) for r in results]))


def _given(key: str | msgspec.UnsetType | None) -> str | None:
    # An empty key is given, and refused: taken for none, each retry of its caller would make another DEK.
    return None if key is msgspec.UNSET else key


def _created(record: DekRecord) -> CreatedDek:
    return CreatedDek(
        record.key_id, record.wrapped, record.kek_id, str(record.kek_version), str(record.version)
    )


async def encrypt(call: Call) -> bytes:
    """Encrypt a message."""
    return await call.loader.answer(call.hot.encrypt, call.session, call.content_type, call.accept, call.body)


async def decrypt(call: Call) -> bytes:
    """Decrypt a message."""
    return await call.loader.answer(call.hot.decrypt, call.session, call.content_type, call.accept, call.body)


async def encrypt_batch(call: Call) -> bytes:
    """Encrypt many messages."""
    return await call.loader.answer(
        call.hot.encrypt_batch, call.session, call.content_type, call.accept, call.body
    )


async def decrypt_batch(call: Call) -> bytes:
    """Decrypt many messages."""
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


def _changes(change: StateChange) -> Callable[[Call], Awaitable[bytes]]:
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


_LIMIT_SCHEMA: Final = {"type": "integer", "minimum": 1, "maximum": PAGE_MAX, "default": PAGE_DEFAULT}


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


_KEY_ID: Final = {"type": "string"}
_SUMMARIES: Final = {
    StateChange.DISABLE: "Refuse all use of a key until it is enabled again",
    StateChange.ENABLE: "Allow a disabled key again, as it was before",
    StateChange.SCHEDULE_DESTRUCTION: "Begin the waiting period after which a key is destroyed",
    StateChange.CANCEL_DESTRUCTION: "Cancel a scheduled destruction; the key is disabled then",
}

ROUTES: Final[tuple[Route, ...]] = (
    Route(
        "POST",
        "/create_dek_for_thread",
        create_dek_for_thread,
        "Make a data key for a thread",
        Permission.CREATE,
        CreatedDek,
        CreateRequest,
        idempotent_create=True,
    ),
    Route("POST", "/encrypt", encrypt, "Encrypt a message", Permission.ENCRYPT, Encrypted, EncryptItem),
    Route("POST", "/decrypt", decrypt, "Decrypt a message", Permission.DECRYPT, Decrypted, DecryptItem),
    Route(
        "GET",
        "/get_wrapped",
        get_wrapped,
        "Return a key's wrapped form",
        Permission.READ,
        WrappedDek,
        parameters={"key_id": _KEY_ID},
        required=frozenset({"key_id"}),
    ),
    Route(
        "POST",
        "/rewrap",
        rewrap,
        "Wrap a key under the active KEK",
        Permission.ADMIN,
        RewrappedDek,
        RewrapRequest,
    ),
    Route("GET", "/healthz", healthz, "Say that the service serves", None, Health),
    Route(
        "POST",
        "/create_dek_batch",
        create_dek_batch,
        "Make many data keys",
        Permission.CREATE,
        CreatedDek,
        CreateItem,
        batch=True,
    ),
    Route(
        "POST",
        "/encrypt_batch",
        encrypt_batch,
        "Encrypt many messages",
        Permission.ENCRYPT,
        Encrypted,
        EncryptItem,
        batch=True,
    ),
    Route(
        "POST",
        "/decrypt_batch",
        decrypt_batch,
        "Decrypt many messages",
        Permission.DECRYPT,
        Decrypted,
        DecryptItem,
        batch=True,
    ),
    Route(
        "GET",
        "/v1/keys",
        list_keys,
        "List keys",
        Permission.READ,
        KeyList,
        parameters={
            "thread_id": {"type": "string"},
            "state": {"type": "string", "enum": [str(state) for state in KeyState]},
            "limit": _LIMIT_SCHEMA,
            "cursor": {"type": "string"},
        },
    ),
    Route("GET", "/v1/keys/<key_id>", get_key, "Show a key", Permission.READ, KeyView),
    *(
        Route(
            "POST",
            f"/v1/keys/<key_id>/{change}",
            _changes(change),
            _SUMMARIES[change],
            Permission.DESTROY if "destruction" in change else Permission.ADMIN,
            KeyView,
            ScheduleDestruction if change is StateChange.SCHEDULE_DESTRUCTION else None,
            body_optional=True,
        )
        for change in StateChange
    ),
    Route(
        "GET",
        "/v1/keks",
        list_keks,
        "Show KEK versions and how many keys each wraps",
        Permission.READ,
        KekList,
    ),
    Route(
        "GET",
        "/v1/rotations",
        list_rotations,
        "List rotations of the KEK, the latest first",
        None,
        RotationList,
        parameters={"limit": _LIMIT_SCHEMA},
    ),
    Route(
        "GET", "/v1/rotations/<rotation_id>", get_rotation, "Show a rotation of the KEK", None, RotationView
    ),
    Route(
        "POST",
        "/v1/threads/<thread_id>/rotate-dek",
        rotate_dek,
        "Make a thread's next data key; its older ones only decrypt then",
        Permission.CREATE,
        CreatedDek,
        also=Permission.ADMIN,
        idempotent_create=True,
    ),
    Route(
        "GET",
        "/v1/backups",
        list_backups,
        "Show the snapshots in the store, and the exports that were made of it",
        Permission.READ,
        BackupList,
    ),
)
