"""What providers return. Wrapped keys and ciphertexts stay out of ``repr``, so that a log can't hold them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CreatedDek:
    """A DEK that has just been made, and is durable.

    Attributes:
        key_id: The handle to encrypt and decrypt with.
        wrapped: The DEK under the KEK; of no use without the service.
        kek_id: Name of that KEK; empty where an older service does not say.
        kek_version: Its version; empty likewise.
        key_version: The DEK's number within its thread; empty likewise.
    """

    key_id: str
    wrapped: bytes = field(repr=False)
    kek_id: str = ""
    kek_version: str = ""
    key_version: str = ""


@dataclass(frozen=True, slots=True)
class Encrypted:
    """An encrypted message.

    Attributes:
        ciphertext: ``nonce(12) | ciphertext | tag(16)``.
        key_version: The DEK's number within its thread; empty where an older service does not say.
    """

    ciphertext: bytes = field(repr=False)
    key_version: str = ""


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A DEK as it is stored.

    Attributes:
        wrapped: The DEK under the KEK.
        kek_id: Name of that KEK; empty where an older service does not say.
        kek_version: Its version; empty likewise.
    """

    wrapped: bytes = field(repr=False)
    kek_id: str = ""
    kek_version: str = ""


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """A DEK after it has been wrapped again; see ``Wrapped`` for the fields."""

    key_id: str
    wrapped: bytes = field(repr=False)
    kek_id: str = ""
    kek_version: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    """The service is serving: what else it says of itself is for people."""

    status: str = "ok"


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key's metadata. Times are RFC 3339 strings.

    Attributes:
        key_id: The key.
        thread_id: The thread that it belongs to.
        version: Its number within the thread, from 1.
        state: ``enabled``, ``decrypt_only``, ``disabled``, ``pending_destruction`` or ``destroyed``.
        kek_id: Name of the KEK that wraps it.
        kek_version: Version of that KEK.
        created_at: When it was made.
        created_by: Identity that made it.
        changed_at: Last change of its state.
        destroy_at: When a pending destruction falls due.
        uses: Encryptions reserved so far.
    """

    key_id: str
    thread_id: str
    version: int
    state: str
    kek_id: str
    kek_version: int
    created_at: str
    created_by: str
    changed_at: str | None = None
    destroy_at: str | None = None
    uses: int = 0


@dataclass(frozen=True, slots=True)
class KekStatus:
    """A KEK version as the registry and the answering instance know it. Times are RFC 3339 strings.

    Attributes:
        version: Registry-wide number.
        kek_id: Its public name.
        state: ``staged``, ``active``, ``decrypt_only`` or ``retired``.
        source: Where its bytes come from: ``file``.
        deks: Live keys wrapped under it.
        wraps: Wraps made under it so far.
        created_at: When it was registered.
        activated_at: When it became active.
        loaded: Whether the instance that answered has it.
    """

    version: int
    kek_id: str
    state: str
    source: str = ""
    deks: int = 0
    wraps: int = 0
    created_at: str | None = None
    activated_at: str | None = None
    loaded: bool = False


@dataclass(frozen=True, slots=True)
class KekCensus:
    """All KEK versions; ``active`` is the one that new keys are wrapped under."""

    active: int
    keks: list[KekStatus]


@dataclass(frozen=True, slots=True)
class RotationInfo:
    """A rotation of the KEK. Times are RFC 3339 strings.

    Attributes:
        rotation_id: Its name.
        source_version: The KEK version that was active before.
        target_version: The one that it brings.
        step: What is to be done next, or how it ended.
        outcome: ``running``, ``clean``, ``incomplete`` or ``rolled_back``.
        counts: Records dealt with so far, by name.
        started_at: When it began.
        finished_at: When it ended, None while it runs.
    """

    rotation_id: str
    source_version: int
    target_version: int
    step: str
    outcome: str
    counts: dict[str, int]
    started_at: str | None = None
    finished_at: str | None = None


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A rotation's snapshot in the store. Times are RFC 3339 strings.

    Attributes:
        rotation_id: Whose.
        slots: Slots that have a part of it.
        records: Copies in those parts that are sealed.
        unsealed: Slots whose part is not sealed.
        finished_at: When the rotation was finished; None while it runs, or where it is not known any more.
    """

    rotation_id: str
    slots: int
    records: int
    unsealed: int
    finished_at: str | None = None


@dataclass(frozen=True, slots=True)
class RotationInfos:
    """The latest rotations, newest first."""

    rotations: list[RotationInfo]


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """A file that was exported. Times are RFC 3339 strings.

    Attributes:
        export_id: Its name.
        kind: ``live`` or ``rotation``.
        began_at: When it was begun.
        records: Wrapped keys in it.
        tombstones: Records of destroyed keys in it.
        sha256: Of the file; empty where the export was interrupted.
        kek_versions: What its wrapped keys need.
        finished_at: When it was finished; None where it was interrupted.
        rotation_id: Whose snapshot it is, for that kind.
    """

    export_id: str
    kind: str
    began_at: str
    records: int
    tombstones: int
    sha256: str
    kek_versions: list[str]
    finished_at: str | None = None
    rotation_id: str = ""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """A record of the audit log.

    Attributes:
        action: What was done: ``key.create``, ``refused``, ...
        at: When, in Unix seconds.
        outcome: ``intent``, ``ok``, ``failed`` or ``refused``.
        identity: Who asked.
        instance: The process that wrote it.
        key_id: The key, if one is named.
        thread_id: Its thread, if known.
        request_id: Which request.
        detail: Error code, permission, counts.
        chain: Its chain.
        seq: Its number in the chain.
        line: The record, byte for byte as it was written: what ``audit verify`` checks.
    """

    action: str
    at: float
    outcome: str
    identity: str = ""
    instance: str = ""
    key_id: str = ""
    thread_id: str = ""
    request_id: str = ""
    detail: str = ""
    chain: str = ""
    seq: int = 0
    line: str = ""


@dataclass(frozen=True, slots=True)
class BackupList:
    """Snapshots in the store, and exports that were made of it."""

    snapshots: list[SnapshotInfo]
    exports: list[ExportInfo]
