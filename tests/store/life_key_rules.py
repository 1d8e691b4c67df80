"""What callers do: make keys, encrypt, decrypt, change states, while time passes and blobs are damaged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from progressdb_kms.domain.errors import (
    KekUnavailable,
    KeyDestroyed,
    KmsError,
    RotationRunning,
    StaleKek,
    StoreUnavailable,
    WrappedKeyInvalid,
)
from progressdb_kms.domain.keys import (
    MAY_DECRYPT,
    MAY_ENCRYPT,
    DekRecord,
    NewDek,
    StateChange,
    refusal,
    slot_tag,
)
from progressdb_kms.usecases.creation import Wanted, create_deks
from progressdb_kms.usecases.dekrotation import rotate_dek
from progressdb_kms.usecases.lifecycle import change_state, rewrap
from progressdb_kms.usecases.messages import Decrypted, DecryptItem, Encrypted, EncryptItem, Failed
from tests.store.life_base import DAY, LifeBase
from tests.store.life_house import TAGS, Instance
from tests.store.life_model import DESTROYED

THREADS = [
    *[name for name in (f"room:{n}" for n in range(20_000)) if slot_tag(name) == TAGS[0]][:2],
    *[name for name in (f"room:{n}" for n in range(20_000)) if slot_tag(name) == TAGS[1]][:1],
]
OLDER = [
    key_id
    for pair in zip(
        *[[name for name in (f"k_{n}" for n in range(60_000)) if slot_tag(name) == tag] for tag in TAGS],
        strict=False,
    )
    for key_id in pair
]
"""Ids of the older service, in the two slots by turns."""
numbers = st.integers(0, 1000)
which = st.integers(0, 1)


class KeyRules(LifeBase):
    """See the module."""

    @initialize(keys=st.integers(0, 3))
    def begin_with_keys(self, keys: int) -> None:
        """A store has some keys before anything happens to it."""
        for number in range(keys):
            self.create(THREADS[number], 0, None)

    @rule(thread=st.sampled_from(THREADS), instance=which, name=st.sampled_from([None, None, "a"]))
    def create(self, thread: str, instance: int, name: str | None) -> None:
        """An instance makes a key, or finds the one that the same name made before."""
        kms = self.house.instances[instance].kms
        session = self.house.instances[instance].session
        # Another name after a loss of the store: what was lost is not made again under its old id.
        wanted = Wanted(thread, name and f"{name}{self.losses}")
        (made,) = self.run(create_deks(kms, session, [wanted], "r"))
        if isinstance(made, DekRecord) and made.key_id in self.model.records:
            assert name
            return
        self.take_in(made, instance)

    @rule(thread=st.sampled_from(THREADS), instance=which)
    def rotate_thread(self, thread: str, instance: int) -> None:
        """A thread gets its next key; the others only decrypt from now on."""
        kms = self.house.instances[instance].kms
        made = self.tried(rotate_dek(kms, self.house.instances[instance].session, thread, None, "r"))
        if isinstance(made, DekRecord):
            self.model.supersede(thread, made.created_at)
        self.take_in(made, instance)

    @rule(thread=st.sampled_from(THREADS), number=st.integers(0, 3))
    def move_in(self, thread: str, number: int) -> None:
        """A key of the older service moves in, or is there already; another run may be holding the lock."""
        if self.turning_back():
            return
        # Other ids after a loss: an export of the older service would bring back even what was destroyed.
        key_id = OLDER[4 * self.losses + number]
        if key_id not in self.older.threads:
            self.older.create(thread, key_id=key_id, meta=False)
        lines = [self.older.line(key_id), b'{"keys": 1}']
        moved = self.tried(self.house.move_in(self.gate(), self.older.master, lines))
        if isinstance(moved, KmsError):
            assert isinstance(moved, RotationRunning)
            return
        assert (moved.read, moved.complete) == (1, True)
        assert moved.moved == (key_id not in self.model.records)
        assert not moved.refused or key_id in self.damaged
        if moved.moved:
            (made,) = self.run(self.store.keys.get([key_id]))
            names = (key_id, self.older.threads[key_id], made.wrapped, made.kek_id, made.kek_version)
            assert made == self.model.made(NewDek(*names, self.now, "migration"))
            self.said[key_id] = (b"moved", self.older.encrypt(key_id, b"moved"))

    def take_in(self, made: DekRecord | KmsError, instance: int) -> None:
        """Take a new key into the model and encrypt under it; none is made only while a rollback is on."""
        if isinstance(made, KeyDestroyed):
            return
        if isinstance(made, KmsError):
            assert isinstance(made, StaleKek | StoreUnavailable)
            assert self.turning_back()
            return
        names = (made.key_id, made.thread_id, made.wrapped, made.kek_id, made.kek_version)
        assert made == self.model.made(NewDek(*names, made.created_at, made.created_by))
        plaintext = made.key_id[-8:].encode()
        said = self.asked(self.house.instances[instance], EncryptItem(made.key_id, plaintext))
        assert isinstance(said, Encrypted)
        self.said[made.key_id] = (plaintext, said.ciphertext)

    def asked(self, instance: Instance, item: EncryptItem | DecryptItem) -> Any:
        """Return an instance's answer; one that knows too little of the KEKs gets it after its next look."""

        def attempt(loaded: Any) -> Any:
            if isinstance(item, EncryptItem):
                return instance.hot.encrypt_items(instance.session, [item], loaded)
            return instance.hot.decrypt_items(instance.session, [item], loaded)

        (answer,) = self.run(instance.loader.complete(attempt))
        if isinstance(answer, Failed) and answer.error.code == KekUnavailable.code:
            self.run(instance.kms.keks.refresh())
            (answer,) = self.run(instance.loader.complete(attempt))
        return answer

    @precondition(lambda self: self.model.records)
    @rule(key=numbers, instance=which)
    def encrypt_and_decrypt(self, key: int, instance: int) -> None:
        """A key encrypts and decrypts as its state has it, whatever is done to what wraps it."""
        key_id = self.pick(key)
        assert key_id
        state = self.model.records[key_id].state
        plaintext, ciphertext = self.said[key_id]
        broken = key_id in self.damaged and state is not DESTROYED
        for item, allowed in (
            (EncryptItem(key_id, b"x"), MAY_ENCRYPT),
            (DecryptItem(key_id, ciphertext), MAY_DECRYPT),
        ):
            answer = self.asked(self.house.instances[instance], item)
            if broken:
                assert answer.error.code == WrappedKeyInvalid.code
            elif state not in allowed:
                assert answer.error.code == refusal(state).code
            else:
                assert isinstance(answer, Encrypted) or answer == Decrypted(plaintext)

    @precondition(lambda self: self.model.records)
    @rule(key=numbers, change=st.sampled_from(StateChange), instance=which)
    def change(self, key: int, change: StateChange, instance: int) -> None:
        """A change of state."""
        key_id = self.pick(key)
        assert key_id
        asked = self.house.instances[instance]
        found = self.tried(change_state(asked.kms, asked.session, key_id, change, "r"))
        expected = self.model.change(key_id, change, now=self.now, destroy_at=self.now + 7 * DAY)
        if isinstance(expected, type):
            assert type(found) is expected
        else:
            assert replace(found, wrapped=b"", uses=0, kek_id="", kek_version=0) == replace(
                expected, wrapped=b"", uses=0, kek_id="", kek_version=0
            )

    @precondition(lambda self: self.model.records)
    @rule(key=numbers, instance=which)
    def rewrap(self, key: int, instance: int) -> None:
        """An operator has one key wrapped anew."""
        key_id = self.pick(key)
        assert key_id
        asked = self.house.instances[instance]
        found = self.tried(rewrap(asked.kms, asked.session, key_id, "r"))
        if isinstance(found, KeyDestroyed):
            assert self.model.records[key_id].state is DESTROYED
        elif isinstance(found, WrappedKeyInvalid):
            assert key_id in self.damaged
        elif isinstance(found, StoreUnavailable | StaleKek):
            assert self.turning_back()
        elif isinstance(found, KekUnavailable):
            self.run(asked.kms.keks.refresh())
        else:
            assert isinstance(found, DekRecord)

    @precondition(lambda self: self.model.records)
    @rule(key=numbers)
    def damage(self, key: int) -> None:
        """A disk turns a bit of a blob."""
        key_id = self.pick(key)
        assert key_id
        if (record := self.live().get(key_id)) is None or key_id in self.damaged:
            return
        bad = record.wrapped[:-1] + bytes([record.wrapped[-1] ^ 1])
        # Through the store, which won't have it where the key is to be rewrapped: that is no loss here.
        if self.tried(self.store.keys.rewrap(record, bad, record.kek_id, record.kek_version)) is True:
            self.damaged.add(key_id)

    @rule(days=st.sampled_from([1, 7, 8]))
    def time_passes(self, days: int) -> None:
        """Waiting periods run."""
        self.now += days * DAY

    @rule(instance=which)
    def look(self, instance: int) -> None:
        """An instance reads the registry."""
        self.run(self.house.instances[instance].kms.keks.refresh())
