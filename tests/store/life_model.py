"""A key's life as the documents have it: the model that the state machines hold the stores to."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from progressdb_kms.domain.errors import InvalidTransition, KeyDestroyed, KmsError
from progressdb_kms.domain.keys import DekRecord, KeyState, NewDek, StateChange
from progressdb_kms.ports.backup import Destroyed

ENABLED, DECRYPT_ONLY = KeyState.ENABLED, KeyState.DECRYPT_ONLY
DISABLED, PENDING, DESTROYED = KeyState.DISABLED, KeyState.PENDING_DESTRUCTION, KeyState.DESTROYED
USABLE = frozenset({ENABLED, DECRYPT_ONLY})


class KeyModel:
    """Keys as they ought to be. It shares no code with a store: what both do wrong alike would stay hidden.

    Attributes:
        records: By key id, in the order in which they were made.
    """

    def __init__(self) -> None:
        self.records: dict[str, DekRecord] = {}

    def made(self, dek: NewDek) -> DekRecord:
        """Take in a new key, and return its record."""
        siblings = [each.version for each in self.records.values() if each.thread_id == dek.thread_id]
        record = DekRecord(
            dek.key_id,
            dek.thread_id,
            dek.wrapped,
            dek.kek_id,
            dek.kek_version,
            1 + max(siblings, default=0),
            ENABLED,
            dek.created_at,
            dek.created_by,
        )
        self.records[dek.key_id] = record
        return record

    def supersede(self, thread_id: str, at: int) -> None:
        """Let a thread's keys only decrypt, since it is about to get its next one."""
        for key_id, known in self.records.items():
            if known.thread_id == thread_id and known.state is ENABLED:
                self.records[key_id] = replace(known, state=DECRYPT_ONLY, changed_at=at)
            elif known.thread_id == thread_id and known.state in {DISABLED, PENDING}:
                self.records[key_id] = replace(known, resume_state=DECRYPT_ONLY)

    def change(
        self, key_id: str, change: StateChange, *, now: int, destroy_at: int
    ) -> DekRecord | type[KmsError]:
        """Change a key's state, and return its record or the error that the change must raise."""
        known = self.records[key_id]
        if known.state is DESTROYED:
            return KeyDestroyed
        resume = known.state if known.state in USABLE else known.resume_state
        to, repeated = {
            StateChange.DISABLE: (DISABLED if known.state is not PENDING else None, DISABLED),
            StateChange.ENABLE: (known.resume_state if known.state is DISABLED else None, known.state),
            StateChange.SCHEDULE_DESTRUCTION: (PENDING, PENDING),
            StateChange.CANCEL_DESTRUCTION: (DISABLED if known.state is PENDING else None, DISABLED),
        }[change]
        if change is StateChange.ENABLE and known.state in USABLE:
            return known
        if change is not StateChange.ENABLE and known.state is repeated:
            return known
        if to is None:
            return InvalidTransition
        if change is StateChange.ENABLE:
            resume = ENABLED
        self.records[key_id] = replace(
            known,
            state=to,
            resume_state=resume,
            changed_at=now,
            destroy_at=destroy_at if to is PENDING else None,
        )
        return self.records[key_id]

    def due(self, key_id: str, now: int) -> bool:
        """Say whether a key's waiting is over."""
        known = self.records[key_id]
        return known.state is PENDING and known.destroy_at is not None and known.destroy_at <= now

    def destroy(self, key_id: str, now: int) -> Destroyed:
        """Destroy a key that is due, and return what the store must say."""
        known = self.records[key_id]
        if known.state is not DESTROYED and not self.due(key_id, now):
            return Destroyed.NOT_DUE
        if known.state is not DESTROYED:
            self.records[key_id] = replace(
                known, state=DESTROYED, wrapped=b"", changed_at=now, destroy_at=None, resume_state=ENABLED
            )
        return Destroyed.DONE

    def rewrapped(self, key_id: str, wrapped: bytes, kek_id: str, kek_version: int) -> None:
        """Put another blob in a key's place."""
        self.records[key_id] = replace(
            self.records[key_id], wrapped=wrapped, kek_id=kek_id, kek_version=kek_version
        )

    def used(self, key_id: str, count: int) -> int:
        """Count encryptions, and return the new total."""
        known = self.records[key_id]
        self.records[key_id] = replace(known, uses=known.uses + count)
        return known.uses + count

    def census(self) -> dict[int, int]:
        """Return the number of wrapped keys by KEK version."""
        return dict(Counter(record.kek_version for record in self.records.values() if record.wrapped))
