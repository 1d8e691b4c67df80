"""What the use cases need from the outside, as Protocols.

Each method says which errors it raises; an adapter translates everything that its driver can raise into
one of them. All errors are from ``domain.errors``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from progressdb_kms.domain.errors import KmsError
    from progressdb_kms.domain.keyring import KekInfo
    from progressdb_kms.domain.keys import DekRecord, KeyState, NewDek, StateChange
    from progressdb_kms.ports.rotation import Lock


@dataclass(frozen=True, slots=True)
class KeyPage:
    """A page of a listing. ``cursor`` is opaque and None at the end; a record may appear twice."""

    records: tuple[DekRecord, ...]
    cursor: str | None


@dataclass(frozen=True, slots=True)
class Changes:
    """One whole read of the notices of state changes.

    Attributes:
        cursor: Where the next read goes on.
        key_ids: Keys that were noticed since the last read.
        complete: False where notices may have been trimmed unread: then nothing in memory can be trusted.
    """

    cursor: str
    key_ids: frozenset[str]
    complete: bool = True


class KeyStore(Protocol):
    """Keeps DEK records. Nothing that returns normally can be lost by a power cut.

    Every method may raise StoreUnavailable (no answer in time, or none that can be trusted); every writing
    method may raise StoreNotDurable (the store is set up so that an acknowledged write could be lost).
    """

    async def create(self, deks: Sequence[NewDek]) -> list[DekRecord | KmsError]:
        """Store new DEKs; one result each, in order.

        A record whose id exists already is returned as it is stored, unchanged (a replay), and only when
        it is durable. A key under an id of the older service is put into its thread's index in a step of its
        own, before its record is there. Per item: StaleKek where ``kek_version`` is below the slot's floor,
        StoreUnavailable where this item's fate is unknown.
        """

    async def rotate(self, dek: NewDek) -> DekRecord:
        """Store a thread's new DEK, and let those that are enabled only decrypt from now on, in one step.

        A disabled key of the thread can't be enabled to more than decrypt any more. Notices of the keys that
        change go first, as in ``change_state``. A record whose id exists is returned as it is, and nothing is
        changed (a replay). Only keys under ids of the older service that came before the new one are
        superseded in a further step, which a replay repeats.

        Raises:
            StaleKek: ``kek_version`` is below the slot's floor.
        """

    async def get(self, key_ids: Sequence[str]) -> list[DekRecord | None]:
        """Return the records, in order; None where there is none."""

    async def change_state(
        self, key_id: str, change: StateChange, *, now: int, destroy_at: int | None = None
    ) -> DekRecord:
        """Change a key's state by ``domain.keys.TRANSITIONS`` and return the record.

        Puts a notice into the change stream first and refuses, retrying by itself, when the notice is
        older than 2 s by the time the record would change. Repeating a change that has been made returns
        the record unchanged.

        Args:
            key_id: The key.
            change: What to do.
            now: Unix seconds.
            destroy_at: For SCHEDULE_DESTRUCTION, when it falls due, in Unix seconds.

        Raises:
            KeyNotFound: No such key.
            KeyDestroyed: It has been destroyed.
            InvalidTransition: The present state does not allow it; the detail names both.
        """

    async def rewrap(self, record: DekRecord, wrapped: bytes, kek_id: str, kek_version: int) -> bool:
        """Replace the blob if it still is ``record.wrapped``, and move the key in the census.

        Returns:
            False where the stored blob is another one by now; nothing was written.

        Raises:
            StaleKek: ``kek_version`` is below the slot's floor.
            KeyNotFound, KeyDestroyed: There is nothing to rewrap.
        """

    async def reserve_uses(self, uses: Mapping[str, int]) -> dict[str, int]:
        """Add to the encryption counts of keys, and return the new totals of those that exist."""

    async def list_keys(
        self, *, thread_id: str | None, state: KeyState | None, limit: int, cursor: str | None
    ) -> KeyPage:
        """Return up to about ``limit`` records (1 to 1,000).

        Raises:
            InvalidParameter: The cursor is not one of this listing's.
        """

    async def census(self) -> dict[int, int]:
        """Return the number of live wrapped DEKs by KEK version; versions without any are absent."""

    async def changes(self, cursor: str | None, wait: float) -> Changes:
        """Read the notices after ``cursor``, waiting up to ``wait`` seconds for one.

        With None: return at once, with the present end of the stream as cursor and no notices.
        """


@dataclass(frozen=True, slots=True)
class RegistryView:
    """The KEK registry as read at one moment.

    Attributes:
        store_id: Random name of this store's data, made with the registry.
        keks: What is known of each version.
        active: The version that new wraps use.
        revision: Changes with every change of the registry.
    """

    store_id: str
    keks: Mapping[int, KekInfo]
    active: int
    revision: int


class KekRegistry(Protocol):
    """Which KEK versions exist. Raises StoreUnavailable and StoreNotDurable as ``KeyStore`` does."""

    async def load(self) -> RegistryView | None:
        """Return the registry, None where the store holds neither registry nor keys.

        Raises:
            RegistryLost: There are keys but no registry, or its schema is of a newer release.
        """

    async def initialise(self, kek: KekInfo, store_id: str = "") -> RegistryView:
        """Make the registry with one active version, unless there is one; return what is there after.

        Args:
            kek: The version.
            store_id: Name of the store's data; empty for a random one.

        Raises:
            RegistryLost: As ``load``; or an import is filling the store.
        """

    async def stage(self, kek: KekInfo) -> RegistryView:
        """Register a version as staged; one that is registered with this check value is left as it is.

        Raises:
            KekMismatch: The version is registered with another check value.
        """

    async def activate(
        self, version: int, *, now: int, lock: Lock, live_since: float | None = None
    ) -> RegistryView:
        """Make a staged or decrypt-only version the active one, and the active one decrypt-only; once.

        Args:
            version: The version.
            now: Unix seconds.
            lock: The lead of the rotation.
            live_since: Refuse, in the same atomic step, if an instance whose heartbeat is no older than this
                (Unix seconds) has not loaded the version; None to ask for none.

        Raises:
            InstancesMissing: Such instances, by name.
            KekMismatch: The version is not registered, or retired.
            Fenced: The lock has been taken over.
        """

    async def retire(self, version: int, *, lock: Lock) -> RegistryView:
        """Mark a decrypt-only version as retired: nothing needs it any more.

        Args:
            version: The version.
            lock: Under which was checked that nothing does.

        Raises:
            RotationRefused: It is the active one, or staged.
            Fenced: The lock has been taken over: something may need the version by now.
        """

    async def reserve_wraps(self, version: int, count: int) -> int:
        """Add to the wrap count of a KEK version and return the new total."""

    async def wraps(self) -> dict[int, int]:
        """Return the wrap counts reserved so far, by version."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What an instance says of itself.

    Attributes:
        instance: Random name of the process.
        at: Unix seconds of the beat.
        started_at: Unix seconds.
        release: The package's version.
        kek_versions: KEK versions that are loaded and match the registry.
        active: The active version that the instance knows.
        policy_generation: Hex digest of the policy in force.
        revision: Of the registry that the instance knows; 0 of a release that did not say so.
    """

    instance: str
    at: float
    started_at: float
    release: str
    kek_versions: tuple[int, ...]
    active: int
    policy_generation: str
    revision: int = 0


class Heartbeats(Protocol):
    """Who is alive. Raises StoreUnavailable."""

    async def beat(self, heartbeat: Heartbeat) -> None:
        """Publish this instance's heartbeat; forget instances silent for a day."""

    async def leave(self, instance: str) -> None:
        """Forget this instance: it has stopped in order."""

    async def live(self) -> list[Heartbeat]:
        """Return the last heartbeat of each known instance."""


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """What a check of the store found.

    Attributes:
        reachable: The store answered.
        problems: Why acknowledged keys could be lost, one line each, saying what to change; empty is good.
        warnings: What an operator should know but may have chosen.
        facts: Findings for people: server, version, mode, appendfsync, maxmemory-policy, replicas.
    """

    reachable: bool
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


class StoreHealth(Protocol):
    """The store's fitness to be trusted with keys."""

    async def check(self) -> StoreStatus:
        """Ask the store now. Never raises: not reachable is an answer."""

    @property
    def status(self) -> StoreStatus:
        """The last finding."""


class KekSource(Protocol):
    """Holds KEKs and wraps under them; some sources never show key bytes.

    ``body`` is what stands behind the blob's header (``domain.envelope``).
    """

    def versions(self) -> frozenset[int]:
        """Return the versions that are loaded now."""

    def kind(self, version: int) -> str:
        """Return what kind of place keeps a version: ``file``, ``pkcs11``, ``vault`` or ``aws``."""

    def source_key(self, version: int) -> str:
        """Return the source's own name for a version, not secret."""

    async def check_value(self, version: int) -> str:
        """Return the check value to register for a version.

        Raises:
            KekUnavailable: Not loaded, or not to be had where it is kept.
            KekUnreachable: That does not answer; nothing is known of the key.
        """

    async def matches(self, version: int, check_value: str) -> bool:
        """Say whether the loaded key of ``version`` is the one that was registered.

        Raises:
            KekUnavailable: Not loaded, or not to be had where it is kept.
            KekUnreachable: That does not answer; nothing is known of the key.
        """

    async def wrap(self, version: int, deks: Sequence[bytes], aads: Sequence[bytes]) -> list[bytes]:
        """Wrap raw DEKs and return the bodies.

        Raises:
            KekUnavailable: Not loaded, or not to be had where it is kept.
            KekUnreachable: That does not answer; nothing is known of the key.
        """

    async def unwrap(
        self, version: int, bodies: Sequence[bytes], aads: Sequence[bytes]
    ) -> list[bytes | KmsError]:
        """Return the raw DEKs; WrappedKeyInvalid in the place of one that does not unwrap.

        Raises:
            KekUnavailable: Not loaded, or not to be had where it is kept.
            KekUnreachable: That does not answer; nothing is known of the key.
        """

    async def seal(self, kek: KekInfo, label: bytes, digest: bytes) -> bytes:
        """Return a MAC of 32 bytes over ``digest`` under a key that only whoever has a KEK can derive.

        Args:
            kek: The KEK, as it was registered.
            label: What is sealed; a seal under one label is none under another.
            digest: What to seal.

        Raises:
            KekUnavailable: Not loaded, or not to be had where it is kept.
            KekUnreachable: That does not answer; nothing is known of the key.
        """


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """A decision on a key or a refusal. Holds names only.

    Attributes:
        action: ``key.create``, ``key.disable``, ``key.rewrap``, ``refused``, ...
        outcome: ``intent``, ``ok``, ``failed`` or ``refused``.
        identity: Who asked.
        request_id: Which request.
        key_id: The key, if one is named.
        thread_id: Its thread, if known.
        detail: Error code or permission.
    """

    action: str
    outcome: str
    identity: str
    request_id: str
    key_id: str = ""
    thread_id: str = ""
    detail: str = ""


class AuditLog(Protocol):
    """Where decisions are written down."""

    @property
    def durable(self) -> bool:
        """Whether an intent can't be lost once ``record`` has returned; then creates are announced too."""

    async def record(self, events: Sequence[AuditEvent]) -> None:
        """Write events, in order.

        Raises:
            AuditUnavailable: There is an intent among them and it can't be made durable: don't make the
            change.
        """


class Observer(Protocol):
    """What use cases tell the metrics. Cheap and never failing."""

    def dek_uses(self, operation: str, count: int) -> None:
        """Count encryptions or decryptions under DEKs."""

    def cache(self, outcome: str, count: int = 1) -> None:
        """Count key look-ups: ``hit``, ``miss`` or ``stale`` (served while the store was away)."""

    def uses_warning(self, kind: str) -> None:
        """Count keys (``dek``) and KEK versions (``kek``) seen above the warning threshold of uses."""

    def wrapped_key_invalid(self) -> None:
        """Count stored keys that did not unwrap: an alert."""
