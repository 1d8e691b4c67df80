"""What the use cases need from the outside, as Protocols.

Each method says which errors it raises; an adapter translates everything that its driver can raise into
one of them. All errors are from ``domain.errors``. ``ports.service`` is what serving needs,
``ports.rotation`` and ``ports.backup`` what rotations, backups and destruction need besides.
"""

from progressdb_kms.ports.backup import (
    BackupStore,
    Damaged,
    Destroyed,
    DestructionStore,
    Extras,
    Imported,
    Resealed,
)
from progressdb_kms.ports.rotation import (
    Claim,
    KekStager,
    Lock,
    Manifest,
    Quarantined,
    RotationLedger,
    RotationStore,
    SlotPage,
    StoredBlob,
    Swap,
    SwapResult,
)
from progressdb_kms.ports.service import (
    AuditEvent,
    AuditLog,
    Changes,
    Heartbeat,
    Heartbeats,
    KekRegistry,
    KekSource,
    KeyPage,
    KeyStore,
    Observer,
    RegistryView,
    StoreHealth,
    StoreStatus,
)

__all__ = [
    "AuditEvent",
    "AuditLog",
    "BackupStore",
    "Changes",
    "Claim",
    "Damaged",
    "Destroyed",
    "DestructionStore",
    "Extras",
    "Heartbeat",
    "Heartbeats",
    "Imported",
    "KekRegistry",
    "KekSource",
    "KekStager",
    "KeyPage",
    "KeyStore",
    "Lock",
    "Manifest",
    "Observer",
    "Quarantined",
    "RegistryView",
    "Resealed",
    "RotationLedger",
    "RotationStore",
    "SlotPage",
    "StoreHealth",
    "StoreStatus",
    "StoredBlob",
    "Swap",
    "SwapResult",
]
