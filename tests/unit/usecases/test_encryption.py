"""The hot functions: pure over memory, each refusal with its error, batches in order."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.domain import errors
from progressdb_kms.domain.keys import KeyState, StateChange
from progressdb_kms.usecases.context import Bounds
from progressdb_kms.usecases.encryption import Miss
from progressdb_kms.usecases.keycache import USES_BLOCK, CachedDek
from progressdb_kms.usecases.messages import JSON, MSGPACK
from tests.unit.helpers import World, labelled, make_world

NONE = b"\x00" * 40


def b64(data: bytes) -> str:
    """Return base64."""
    return base64.b64encode(data).decode()


async def test_a_round_trip(world: World) -> None:
    """What was encrypted is decrypted; the version is a string, the sizes are nonce and tag more."""
    key_id = await world.key()
    sealed = await world.encrypt(key_id, b"hello")
    assert sealed["key_version"] == "1"
    assert len(base64.b64decode(sealed["ciphertext"])) == 5 + 28
    assert await world.decrypt(key_id, sealed["ciphertext"]) == {"plaintext": b64(b"hello")}
    assert world.watcher.counts["encrypt"] == world.watcher.counts["decrypt"] == 1


async def test_a_hot_key_needs_no_store(world: World) -> None:
    """Once in memory a key encrypts and decrypts without any call to the store, and without an await."""
    key_id = await world.key()
    world.store.calls.clear()
    body = msgspec.json.encode({"key_id": key_id, "plaintext": b"hello"})
    answer = world.hot.encrypt(world.session(), JSON, JSON, body, {})
    assert isinstance(answer, bytes)
    sealed = msgspec.json.decode(answer)["ciphertext"]
    body = msgspec.msgpack.encode({"key_id": key_id, "ciphertext": base64.b64decode(sealed)})
    answer = world.hot.decrypt(world.session(), MSGPACK, MSGPACK, body, {})
    assert isinstance(answer, bytes)
    assert msgspec.msgpack.decode(answer) == {"plaintext": b"hello"}
    assert not world.store.calls


async def test_a_cold_key_is_a_miss(world: World) -> None:
    """What is not in memory is named, not fetched."""
    body = msgspec.json.encode({"key_id": "k_X", "plaintext": b""})
    assert world.hot.encrypt(world.session(), JSON, JSON, body, {}) == Miss(frozenset({"k_X"}), {})
    body = msgspec.json.encode({"items": [{"key_id": k, "plaintext": b""} for k in ("k_X", "k_Y", "k_X")]})
    assert world.hot.encrypt_batch(world.session(), JSON, JSON, body, {}) == Miss(
        frozenset({"k_X", "k_Y"}), {}
    )
    assert not world.store.calls["get"]


async def test_nonces_are_fresh(world: World) -> None:
    """The same message twice, alone or in one batch, never has the same nonce."""
    key_id = await world.key()
    item = {"key_id": key_id, "plaintext": b"same"}
    sealed = [(await world.encrypt(key_id, b"same"))["ciphertext"] for _ in range(3)]
    batch = await world.answer(world.hot.encrypt_batch, {"items": [item] * 20})
    sealed += [result["ciphertext"] for result in batch["results"]]
    assert len({base64.b64decode(text)[:12] for text in sealed}) == 23


async def test_aad_is_honoured(world: World) -> None:
    """Right AAD decrypts; wrong, missing or added AAD does not; null, empty and absent are the same."""
    key_id = await world.key()
    bound = (await world.encrypt(key_id, aad=b"thread"))["ciphertext"]
    free = (await world.encrypt(key_id))["ciphertext"]
    assert await world.decrypt(key_id, bound, aad=b"thread")
    for wrong in ({"aad": b"other"}, {}, {"aad": None}, {"aad": b""}):
        with pytest.raises(errors.AuthenticationFailed):
            await world.decrypt(key_id, bound, **wrong)
    for nothing in ({}, {"aad": None}, {"aad": b""}):
        assert await world.decrypt(key_id, free, **nothing)
    with pytest.raises(errors.AuthenticationFailed):
        await world.decrypt(key_id, free, aad=b"added")


async def test_a_ciphertext_belongs_to_its_key(world: World) -> None:
    """Moved to another key it is forged."""
    one, other = await world.key(), await world.key()
    sealed = (await world.encrypt(one))["ciphertext"]
    with pytest.raises(errors.AuthenticationFailed):
        await world.decrypt(other, sealed)
    with pytest.raises(errors.MalformedCiphertext):
        await world.decrypt(one, b"short")


@pytest.mark.parametrize("operation", ["encrypt", "decrypt", "encrypt_batch", "decrypt_batch"])
async def test_who_has_no_grant_learns_nothing(world: World, operation: str) -> None:
    """Refused before the body is read and before the store is asked, whether the key exists or not."""
    await world.key()
    world.store.calls.clear()
    with pytest.raises(errors.PermissionDenied) as refused:
        await world.loader.answer(
            getattr(world.hot, operation), world.session("stranger"), JSON, JSON, b"not json"
        )
    assert refused.value.permission == f"key:{operation.partition('_')[0]}"
    assert refused.value.identity == "dns:stranger"
    assert not world.store.calls


async def test_a_grant_for_a_prefix_ends_there(world: World) -> None:
    """A key of another thread is refused to who is granted some threads only."""
    inside, outside = await world.key("room:1"), await world.key("mail:1")
    sealed = (await world.encrypt(inside, name="room"))["ciphertext"]
    assert await world.decrypt(inside, sealed, name="room")
    with pytest.raises(errors.PermissionDenied, match="other threads"):
        await world.encrypt(outside, name="room")
    with pytest.raises(errors.PermissionDenied, match="other threads"):
        await world.decrypt(outside, NONE, name="room")


async def put(world: World, state: KeyState, *, exhausted: bool = False) -> str:
    """Put a key in this state into memory."""
    key = CachedDek(
        key_id="k",
        thread_id="room:1",
        cipher=AESGCM(labelled("dek")),
        state=state,
        version="4",
        loaded_at=world.clock(),
        exhausted=exhausted,
    )
    world.cache.put(key)
    return "k"


@pytest.mark.parametrize(
    "state, encrypts, decrypts",
    [
        (KeyState.ENABLED, None, None),
        (KeyState.DECRYPT_ONLY, errors.KeyDecryptOnly, None),
        (KeyState.DISABLED, errors.KeyDisabled, errors.KeyDisabled),
        (KeyState.PENDING_DESTRUCTION, errors.KeyPendingDestruction, errors.KeyPendingDestruction),
        (KeyState.DESTROYED, errors.KeyDestroyed, errors.KeyDestroyed),
    ],
)
async def test_states(world: World, state: KeyState, encrypts: Any, decrypts: Any) -> None:
    """Each state allows what it allows, alone and in a batch."""
    key_id = await put(world, state)
    sealed = bytes(12) + AESGCM(labelled("dek")).encrypt(bytes(12), b"hi", None)
    for refused, hot, item in (
        (encrypts, "encrypt", {"key_id": key_id, "plaintext": b""}),
        (decrypts, "decrypt", {"key_id": key_id, "ciphertext": sealed}),
    ):
        batch = await world.answer(getattr(world.hot, f"{hot}_batch"), {"items": [item]})
        if refused is None:
            assert await world.answer(getattr(world.hot, hot), item)
            assert "error" not in batch["results"][0]
        else:
            with pytest.raises(refused):
                await world.answer(getattr(world.hot, hot), item)
            assert batch["results"][0]["error"]["code"] == refused.code


async def test_a_worn_key_only_decrypts(world: World) -> None:
    """At the limit of uses encryption is refused for good, decryption is not."""
    key_id = await put(world, KeyState.ENABLED, exhausted=True)
    with pytest.raises(errors.KeyExhausted):
        await world.encrypt(key_id)
    with pytest.raises(errors.AuthenticationFailed):
        await world.decrypt(key_id, NONE)
    assert not world.store.calls["reserve_uses"]


async def test_plaintext_has_a_limit_and_may_be_empty(tmp_path: Path) -> None:
    """The limit is counted in bytes of plaintext, not of base64."""
    world = await make_world(tmp_path, bounds=Bounds(plaintext_bytes=100))
    key_id = await world.key()
    for size in (0, 1, 100):
        sealed = (await world.encrypt(key_id, b"x" * size))["ciphertext"]
        assert await world.decrypt(key_id, sealed) == {"plaintext": b64(b"x" * size)}
    with pytest.raises(errors.PlaintextTooLarge, match="at most 100 bytes, this one has 101"):
        await world.encrypt(key_id, b"x" * 101)


async def test_a_batch_keeps_order_and_errors_in_place(world: World) -> None:
    """One bad item is an error where it stands; the others are done."""
    good, gone, mail = await world.key(), await world.key(), await world.key("mail:1")
    await world.store.change_state(gone, StateChange.DISABLE, now=0)
    world.cache.forget([gone])
    items: list[Any] = [
        {"key_id": good, "plaintext": b"0"},
        {"key_id": gone, "plaintext": b"1"},
        {"key_id": "k_" + "A" * 28, "plaintext": b"2"},
        {"key_id": good, "plaintext": "not base64!"},
        7,
        {"key_id": mail, "plaintext": b"5"},
        {"key_id": good, "plaintext": b"6", "aad": b"x"},
        {"key_id": "nonsense", "plaintext": b"7"},
    ]
    results = (await world.answer(world.hot.encrypt_batch, {"items": items}, "room"))["results"]
    codes = [result.get("error", {}).get("code") for result in results]
    missing = ["key_not_found"]
    assert codes == [
        None,
        "key_disabled",
        *missing,
        "invalid_field",
        "invalid_field",
        "permission_denied",
        None,
        *missing,
    ]
    assert set(results[1]["error"]) == {"code", "detail", "retryable"}
    sealed = [
        {"key_id": good, "ciphertext": results[6]["ciphertext"], "aad": b"x"},
        {"key_id": good, "ciphertext": results[6]["ciphertext"]},
        {"key_id": good, "ciphertext": results[0]["ciphertext"]},
        {"key_id": good, "ciphertext": b""},
        {"key_id": mail, "ciphertext": NONE},
        [],
    ]
    results = (await world.answer(world.hot.decrypt_batch, {"items": sealed}, "room"))["results"]
    assert results[0] == {"plaintext": b64(b"6")}
    assert results[2] == {"plaintext": b64(b"0")}
    assert [result.get("error", {}).get("code") for result in results] == [
        None,
        "authentication_failed",
        None,
        "malformed_ciphertext",
        "permission_denied",
        "invalid_field",
    ]
    assert world.watcher.counts["encrypt"] == world.watcher.counts["decrypt"] == 2


async def test_an_empty_batch_is_fine(world: World) -> None:
    """Nothing asked, nothing answered."""
    for hot in (world.hot.encrypt_batch, world.hot.decrypt_batch):
        assert await world.answer(hot, {"items": []}) == {"results": []}


async def test_a_batch_has_a_limit(tmp_path: Path) -> None:
    """One item too many refuses the whole."""
    world = await make_world(tmp_path, bounds=Bounds(batch_items=2))
    for hot in (world.hot.encrypt_batch, world.hot.decrypt_batch):
        with pytest.raises(errors.BatchTooLarge):
            await world.answer(hot, {"items": [1, 2, 3]})


async def test_uses_are_reserved_in_blocks_before_they_are_spent(world: World) -> None:
    """The first few go unreserved; then a block at a time is in the store before it is used."""
    key_id = await world.key()
    items = {"items": [{"key_id": key_id, "plaintext": b""}] * 200}
    await world.answer(world.hot.encrypt_batch, items)
    assert world.store.calls["reserve_uses"] == 0
    for _ in range(20):
        await world.answer(world.hot.encrypt_batch, items)
    assert world.store.calls["reserve_uses"] == 1
    (record,) = await world.store.get([key_id])
    assert record is not None
    assert record.uses == 200 + USES_BLOCK


@pytest.mark.parametrize("batch", [False, True])
async def test_the_unauthorised_wear_no_key_out(world: World, batch: bool) -> None:
    """Whoever may not encrypt with a key can't make the store count uses of it."""
    key_id = await world.key("mail:1")
    held = world.cache.lookup(key_id)
    assert held is not None
    held.spend(held.uses_left)
    item = {"key_id": key_id, "plaintext": b""}
    if batch:
        answer = await world.answer(world.hot.encrypt_batch, {"items": [item] * 3}, "room")
        assert {result["error"]["code"] for result in answer["results"]} == {"permission_denied"}
    else:
        with pytest.raises(errors.PermissionDenied):
            await world.encrypt(key_id, name="room")
    assert world.store.calls["reserve_uses"] == 0
