"""A batch's items, worked off together, come out as each of them would alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from progressdb_kms.domain import errors
from progressdb_kms.domain.errors import (
    InvalidField,
    KeyNotFound,
    KmsError,
    PermissionDenied,
    WrappedKeyInvalid,
)
from progressdb_kms.domain.keys import KeyState
from progressdb_kms.usecases.context import Bounds
from progressdb_kms.usecases.encryption import Miss, failed
from progressdb_kms.usecases.keycache import CachedDek
from progressdb_kms.usecases.messages import (
    MSGPACK,
    Decrypted,
    DecryptItem,
    Encrypted,
    EncryptItem,
    Failed,
    encode,
)
from tests.unit.helpers import World, labelled, make_world

LIMIT = 32
USES = 100
KEYS: dict[str, tuple[str, KeyState, bool]] = {
    "good": ("room:1", KeyState.ENABLED, False),
    "other": ("room:2", KeyState.ENABLED, False),
    "old": ("room:1", KeyState.DECRYPT_ONLY, False),
    "off": ("room:1", KeyState.DISABLED, False),
    "gone": ("room:1", KeyState.DESTROYED, False),
    "worn": ("room:1", KeyState.ENABLED, True),
    "worn and off": ("room:1", KeyState.DISABLED, True),
    "not ours": ("mail:1", KeyState.ENABLED, False),
    "not ours and off": ("mail:1", KeyState.DISABLED, False),
}
BROKEN: dict[str, KmsError] = {"unknown": KeyNotFound(), "forged": WrappedKeyInvalid()}


def cipher(key_id: str) -> AESGCM:
    """Return the cipher of a key."""
    return AESGCM(labelled(key_id))


def loaded() -> dict[str, CachedDek | KmsError]:
    """Return keys of all kinds, as if just fetched."""
    keys: dict[str, CachedDek | KmsError] = {
        key_id: CachedDek(
            key_id=key_id,
            thread_id=thread_id,
            cipher=cipher(key_id),
            state=state,
            version=key_id[0],
            loaded_at=0,
            uses_left=USES,
            exhausted=exhausted,
        )
        for key_id, (thread_id, state, exhausted) in KEYS.items()
    }
    return keys | BROKEN


def sealed(key_id: str, plaintext: bytes, aad: bytes) -> bytes:
    """Encrypt as the service would."""
    return b"n" * 12 + cipher(key_id).encrypt(b"n" * 12, plaintext, aad)


key_ids = st.one_of(st.sampled_from(["good", "other"]), st.sampled_from([*KEYS, *BROKEN]))
aads: st.SearchStrategy[Any] = st.sampled_from([b"", b"aad", None])
bad = st.sampled_from([InvalidField("7"), errors.DuplicateField()])
plaintexts = st.one_of(st.binary(max_size=LIMIT), st.sampled_from([b"x" * LIMIT, b"x" * (LIMIT + 1)]))
to_encrypt = st.lists(st.one_of(*[st.builds(EncryptItem, key_ids, plaintexts, aads)] * 4, bad), max_size=30)


@st.composite
def ciphertexts(draw: st.DrawFn) -> DecryptItem:
    """Make an item to decrypt: right, or of another key, or with other AAD, or damaged, or too short."""
    key_id, aad = draw(key_ids), draw(aads)
    whole = sealed(
        draw(st.sampled_from([key_id] * 4 + ["good"])), draw(st.binary(max_size=LIMIT)), aad or b""
    )
    if draw(st.integers(0, 3)) == 0:
        whole = whole[: draw(st.integers(0, len(whole)))]
    return DecryptItem(key_id, whole, draw(st.sampled_from([aad] * 4 + [b"x"])))


to_decrypt = st.lists(st.one_of(*[ciphertexts()] * 4, bad), max_size=30)


@pytest.fixture
async def room(tmp_path: Path) -> World:
    """Put a service together that takes small plaintexts and audits each call."""
    return await make_world(tmp_path, bounds=Bounds(plaintext_bytes=LIMIT, audited_calls="each"))


class Alone:
    """What single calls for the items give and leave behind."""

    def __init__(self, room: World, operation: str, items: list[Any]) -> None:
        hot = getattr(room.hot, operation)
        self.keys = loaded()
        self.results: list[Any] = []
        self.refused = 0
        self.done = []
        for item in items:
            if isinstance(item, KmsError):
                self.results.append(failed(item))
                continue
            try:
                answer = hot(room.session("room"), MSGPACK, MSGPACK, encode(MSGPACK, item), self.keys)
            except KmsError as error:
                self.results.append(failed(error))
                self.refused += isinstance(error, PermissionDenied)
            else:
                assert isinstance(answer, bytes)
                self.results.append(None)
                self.done.append((item.key_id, KEYS[item.key_id][0]))


class Together:
    """What a batch of the items gives and leaves behind."""

    def __init__(self, room: World, operation: str, items: list[Any]) -> None:
        room.watcher.counts.clear()
        room.kms.calls._events.clear()
        room.kms.refusals._kinds.clear()
        self.keys = loaded()
        self.results = getattr(room.hot, f"{operation}_items")(room.session("room"), items, self.keys)
        self.refused = sum(kind.count for kind in room.kms.refusals._kinds.values())
        self.done = [(event.key_id, event.thread_id) for event in room.kms.calls._events]
        self.counted = room.watcher.counts[operation]


def check(alone: Alone, together: Together) -> None:
    """Compare all but the messages."""
    errors_of = [result if isinstance(result, Failed) else None for result in together.results]
    assert errors_of == alone.results
    assert together.refused == alone.refused
    assert together.done == alone.done
    assert together.counted == len(alone.done)
    for key_id in KEYS:
        one, other = alone.keys[key_id], together.keys[key_id]
        assert isinstance(one, CachedDek)
        assert isinstance(other, CachedDek)
        assert other.uses_left == one.uses_left
        assert one.exhausted == other.exhausted


shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.fuzz
@shared
@given(items=to_encrypt)
@example(items=[])
@example(items=[InvalidField("7")])
@example(items=[EncryptItem("good", b"x" * (LIMIT + 1)), EncryptItem("not ours", b"x" * (LIMIT + 1))])
async def test_encryptions(room: World, items: list[Any]) -> None:
    """Results, errors, their order, uses, counts, refusals and audited calls are those of single calls."""
    alone, together = Alone(room, "encrypt", items), Together(room, "encrypt", items)
    check(alone, together)
    nonces = set()
    for item, result in zip(items, together.results, strict=True):
        if isinstance(result, Encrypted):
            nonces.add(result.ciphertext[:12])
            assert result.key_version == item.key_id[0]
            opened = cipher(item.key_id).decrypt(
                result.ciphertext[:12], result.ciphertext[12:], item.aad or None
            )
            assert opened == item.plaintext
    assert len(nonces) == len(together.done)


@pytest.mark.fuzz
@shared
@given(items=to_decrypt)
@example(items=[])
@example(items=[DecryptItem("good", b"x" * size) for size in range(30)])
@example(items=[DecryptItem(key_id, b"") for key_id in [*KEYS, *BROKEN]])
async def test_decryptions(room: World, items: list[Any]) -> None:
    """Likewise; what does not open is told from what can't be a ciphertext."""
    alone, together = Alone(room, "decrypt", items), Together(room, "decrypt", items)
    check(alone, together)
    for item, result in zip(items, together.results, strict=True):
        if isinstance(result, Decrypted):
            assert result.plaintext == cipher(item.key_id).decrypt(
                item.ciphertext[:12], item.ciphertext[12:], item.aad or None
            )


async def test_a_key_is_judged_once(room: World) -> None:
    """However many items name it: its state and the grants can't change in between."""
    asked: Counter[str | None] = Counter()
    session = room.session("room")
    grants = session.grants()
    kind = type(grants)
    counted = type("Grants", (kind,), {"require": lambda _, __, thread=None: asked.update([thread])})
    session._grants = counted(grants.identity, grants.allowed)
    for operation, item in (
        ("encrypt", EncryptItem("good", b"")),
        ("decrypt", DecryptItem("good", sealed("good", b"", b""))),
    ):
        getattr(room.hot, f"{operation}_items")(session, [item] * 20, loaded())
    assert asked == {"room:1": 2}


async def test_uses_that_are_not_reserved_are_asked_for(room: World) -> None:
    """Of keys that the caller may encrypt with, as many as the batch makes, and nothing is spent before."""
    keys = loaded()
    items = [EncryptItem(key_id, b"") for key_id in [*KEYS, *BROKEN]] * (USES + 1)
    assert room.hot.encrypt_items(room.session("room"), items, keys) == Miss(
        frozenset(), {"good": USES + 1, "other": USES + 1}
    )
    assert {key.uses_left for key in keys.values() if isinstance(key, CachedDek)} == {USES}


async def test_what_fails_in_the_middle_leaves_no_use_uncounted(room: World) -> None:
    """Uses are spent before the first message is encrypted: too many may be counted, never too few."""
    keys = loaded()
    nothing: Any = None  # which no reader lets through
    with pytest.raises(TypeError):
        room.hot.encrypt_items(
            room.session("room"), [EncryptItem("good", b""), EncryptItem("good", nothing)], keys
        )
    key = keys["good"]
    assert isinstance(key, CachedDek)
    assert key.uses_left == USES - 2
