"""The table of routes: limits are data."""

from __future__ import annotations

from typing import Final

from progressdb_kms.api import handlers
from progressdb_kms.api.call import Route
from progressdb_kms.api.handlers import PAGE_DEFAULT, PAGE_MAX
from progressdb_kms.api.models import (
    AuditRecords,
    BackupList,
    Health,
    KekList,
    KeyList,
    KeyView,
    RotationList,
    RotationView,
    ScheduleDestruction,
)
from progressdb_kms.domain.keys import KeyState, StateChange
from progressdb_kms.domain.policy import Permission
from progressdb_kms.usecases.auditread import FILTERS
from progressdb_kms.usecases.messages import (
    CreatedDek,
    CreateItem,
    CreateRequest,
    Decrypted,
    DecryptItem,
    Encrypted,
    EncryptItem,
    RewrappedDek,
    RewrapRequest,
    WrappedDek,
)

_LIMIT_SCHEMA: Final = {"type": "integer", "minimum": 1, "maximum": PAGE_MAX, "default": PAGE_DEFAULT}
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
        handlers.create_dek_for_thread,
        "Make a data key for a thread",
        Permission.CREATE,
        CreatedDek,
        CreateRequest,
        idempotent_create=True,
    ),
    Route(
        "POST", "/encrypt", handlers.encrypt, "Encrypt a message", Permission.ENCRYPT, Encrypted, EncryptItem
    ),
    Route(
        "POST", "/decrypt", handlers.decrypt, "Decrypt a message", Permission.DECRYPT, Decrypted, DecryptItem
    ),
    Route(
        "GET",
        "/get_wrapped",
        handlers.get_wrapped,
        "Return a key's wrapped form",
        Permission.READ,
        WrappedDek,
        parameters={"key_id": _KEY_ID},
        required=frozenset({"key_id"}),
    ),
    Route(
        "POST",
        "/rewrap",
        handlers.rewrap,
        "Wrap a key under the active KEK",
        Permission.ADMIN,
        RewrappedDek,
        RewrapRequest,
    ),
    Route("GET", "/healthz", handlers.healthz, "Say that the service serves", None, Health),
    Route(
        "POST",
        "/create_dek_batch",
        handlers.create_dek_batch,
        "Make many data keys",
        Permission.CREATE,
        CreatedDek,
        CreateItem,
        batch=True,
    ),
    Route(
        "POST",
        "/encrypt_batch",
        handlers.encrypt_batch,
        "Encrypt many messages",
        Permission.ENCRYPT,
        Encrypted,
        EncryptItem,
        batch=True,
    ),
    Route(
        "POST",
        "/decrypt_batch",
        handlers.decrypt_batch,
        "Decrypt many messages",
        Permission.DECRYPT,
        Decrypted,
        DecryptItem,
        batch=True,
    ),
    Route(
        "GET",
        "/v1/keys",
        handlers.list_keys,
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
    Route("GET", "/v1/keys/<key_id>", handlers.get_key, "Show a key", Permission.READ, KeyView),
    *(
        Route(
            "POST",
            f"/v1/keys/<key_id>/{change}",
            handlers.state_change(change),
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
        handlers.list_keks,
        "Show KEK versions and how many keys each wraps",
        Permission.READ,
        KekList,
    ),
    Route(
        "GET",
        "/v1/rotations",
        handlers.list_rotations,
        "List rotations of the KEK, the latest first",
        None,
        RotationList,
        parameters={"limit": _LIMIT_SCHEMA},
    ),
    Route(
        "GET",
        "/v1/rotations/<rotation_id>",
        handlers.get_rotation,
        "Show a rotation of the KEK",
        None,
        RotationView,
    ),
    Route(
        "POST",
        "/v1/threads/<thread_id>/rotate-dek",
        handlers.rotate_dek,
        "Make a thread's next data key; its older ones only decrypt then",
        Permission.CREATE,
        CreatedDek,
        also=Permission.ADMIN,
        idempotent_create=True,
    ),
    Route(
        "GET",
        "/v1/backups",
        handlers.list_backups,
        "Show the snapshots in the store, and the exports that were made of it",
        Permission.READ,
        BackupList,
    ),
    Route(
        "GET",
        "/v1/audit",
        handlers.list_audit,
        "List the audit records that the store keeps, the oldest first",
        Permission.AUDIT,
        AuditRecords,
        parameters={
            "since": {"type": "string", "format": "date-time"},
            **{name: {"type": "string"} for name in FILTERS},
            "limit": _LIMIT_SCHEMA,
            "cursor": {"type": "string"},
        },
    ),
)
