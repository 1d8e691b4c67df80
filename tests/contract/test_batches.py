"""Batch forms: order, an error per item, limits, idempotent creates, and every bit flip of a ciphertext."""

from __future__ import annotations

import secrets
from typing import Any

import pytest

from tests.contract.wire_client import Client, assert_item_error, assert_problem, b64, unb64

MOST = 10_000
UNKNOWN = "k_" + "A" * 28


def results(client: Client, path: str, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Send a batch and return its results, of which there must be one for each item."""
    answer = client.post(path, {"items": items}).ok()
    assert set(answer) == {"results"}
    found: list[dict[str, Any]] = answer["results"]
    assert len(found) == len(items)
    return found


def test_batches_keep_order_over_mixed_keys(wire: Client, thread_id: str) -> None:
    """Each result stands in its item's place, whichever of the keys the item names."""
    keys = [wire.create(f"{thread_id}-{n}")["key_id"] for n in range(3)]
    messages = [(keys[n % 3], secrets.token_bytes(n), secrets.token_bytes(n % 5)) for n in range(60)]
    sealed = results(
        wire, "/encrypt_batch", [{"key_id": k, "plaintext": b64(p), "aad": b64(a)} for k, p, a in messages]
    )
    assert all(set(item) == {"ciphertext", "key_version"} for item in sealed)
    assert [len(unb64(item["ciphertext"])) for item in sealed] == [28 + n for n in range(60)]
    opened = results(
        wire,
        "/decrypt_batch",
        [
            {"key_id": k, "ciphertext": item["ciphertext"], "aad": b64(a)}
            for (k, _, a), item in zip(messages, sealed, strict=True)
        ],
    )
    assert opened == [{"plaintext": b64(p)} for _, p, _ in messages]
    assert len({unb64(item["ciphertext"])[:12] for item in sealed}) == 60


def test_an_item_fails_alone(wire: Client, key_id: str) -> None:
    """A bad item gets an error in its place; its neighbours are served and the status is 200."""
    good = {"key_id": key_id, "plaintext": b64(b"good")}
    first, unknown, last = results(
        wire, "/encrypt_batch", [good, {"key_id": UNKNOWN, "plaintext": b64(b"x")}, good]
    )
    assert_item_error(unknown, "key_not_found")
    items = [
        {"key_id": key_id, "ciphertext": first["ciphertext"]},
        {"key_id": key_id, "ciphertext": b64(bytes(27))},
        {"key_id": key_id, "ciphertext": b64(bytes(40))},
        {"key_id": UNKNOWN, "ciphertext": first["ciphertext"]},
        {"key_id": key_id, "ciphertext": last["ciphertext"], "aad": b64(b"added")},
        {"key_id": key_id, "ciphertext": last["ciphertext"]},
    ]
    opened = results(wire, "/decrypt_batch", items)
    assert opened[0] == opened[5] == {"plaintext": b64(b"good")}
    assert_item_error(opened[1], "malformed_ciphertext")
    assert_item_error(opened[2], "authentication_failed")
    assert_item_error(opened[3], "key_not_found")
    assert_item_error(opened[4], "authentication_failed")


@pytest.mark.parametrize(
    "bad",
    [{"plaintext": "AAA"}, {"plaintext": 7}, {"surplus": 1}, {"plaintext": None}, {"key_id": 5}],
    ids=["unpadded", "number", "unknown-field", "null", "key-id-number"],
)
def test_an_item_of_the_wrong_shape_fails_alone(wire: Client, key_id: str, bad: dict[str, Any]) -> None:
    """Never all-or-nothing: an item that doesn't parse is that item's error."""
    good: dict[str, Any] = {"key_id": key_id, "plaintext": b64(b"good")}
    before, error, after = results(wire, "/encrypt_batch", [good, good | bad, good])
    assert_item_error(error, "invalid_field")
    assert "ciphertext" in before
    assert "ciphertext" in after


def test_an_oversized_plaintext_fails_alone(wire: Client, key_id: str) -> None:
    """The limit of 1 MiB holds for each item."""
    items = [{"key_id": key_id, "plaintext": b64(bytes(size))} for size in (1 << 20, (1 << 20) + 1)]
    fits, too_large = results(wire, "/encrypt_batch", items)
    assert len(unb64(fits["ciphertext"])) == (1 << 20) + 28
    assert_item_error(too_large, "plaintext_too_large")


@pytest.mark.parametrize("path", ["/encrypt_batch", "/decrypt_batch", "/create_dek_batch"])
def test_an_empty_batch_has_empty_results(wire: Client, path: str) -> None:
    """No items in, no results out, and that is a success."""
    assert results(wire, path, []) == []


@pytest.mark.parametrize("path", ["/encrypt_batch", "/decrypt_batch", "/create_dek_batch"])
def test_more_than_10_000_items_are_refused_whole(wire: Client, key_id: str, path: str) -> None:
    """10,001 items are 413 batch_too_large, and nothing of them is done."""
    item = {"thread_id": "t"} if path == "/create_dek_batch" else {"key_id": key_id, "plaintext": ""}
    assert_problem(wire.post(path, {"items": [item] * (MOST + 1)}), 413, "batch_too_large")


def test_10_000_items_are_served(wire: Client, key_id: str) -> None:
    """The limit itself is allowed."""
    sealed = results(wire, "/encrypt_batch", [{"key_id": key_id, "plaintext": ""}] * MOST)
    assert len({item["ciphertext"] for item in sealed}) == MOST


def test_a_batch_body_over_16_mib_is_413(server: Client, key_id: str) -> None:
    """A batch body is at most 16 MiB, and one below that is served."""
    item = {"key_id": key_id, "plaintext": b64(bytes(1 << 20))}
    assert len(results(server, "/encrypt_batch", [item] * 11)) == 11
    assert_problem(server.post("/encrypt_batch", {"items": [item] * 12}), 413, "body_too_large")


def test_every_bit_flip_of_a_ciphertext_fails(wire: Client, key_id: str) -> None:
    """No single-bit change of nonce, ciphertext or tag decrypts."""
    plaintext = secrets.token_bytes(37)
    ciphertext = wire.encrypt(key_id, plaintext, b"aad")
    flips = []
    for bit in range(len(ciphertext) * 8):
        changed = bytearray(ciphertext)
        changed[bit // 8] ^= 1 << bit % 8
        flips.append({"key_id": key_id, "ciphertext": b64(bytes(changed)), "aad": b64(b"aad")})
    sound = {"key_id": key_id, "ciphertext": b64(ciphertext), "aad": b64(b"aad")}
    *failed, opened = results(wire, "/decrypt_batch", [*flips, sound])
    assert opened == {"plaintext": b64(plaintext)}
    for item in failed:
        assert_item_error(item, "authentication_failed")


def test_every_truncation_of_a_ciphertext_fails(wire: Client, key_id: str) -> None:
    """Too short for nonce and tag is malformed; anything longer that lost its end is forged."""
    ciphertext = wire.encrypt(key_id, b"0123456789")
    items = [{"key_id": key_id, "ciphertext": b64(ciphertext[:size])} for size in range(len(ciphertext))]
    for size, item in enumerate(results(wire, "/decrypt_batch", items)):
        assert_item_error(item, "malformed_ciphertext" if size < 28 else "authentication_failed")


def test_create_batch_answers_like_create(wire: Client, thread_id: str) -> None:
    """Each result has the fields of a single create, a bad thread id being its item's error."""
    items = [
        {"thread_id": thread_id},
        {"thread_id": ""},
        {"thread_id": thread_id},
        {"thread_id": thread_id + "2"},
    ]
    first, bad, second, other = results(wire, "/create_dek_batch", items)
    for made in (first, second, other):
        assert set(made) == {"key_id", "wrapped", "kek_id", "kek_version", "key_version"}
        assert wire.decrypt(made["key_id"], wire.encrypt(made["key_id"], b"m")) == b"m"
    assert_item_error(bad, "invalid_thread_id")
    assert {first["key_version"], second["key_version"]} == {"1", "2"}
    assert other["key_version"] == "1"
    assert len({first["key_id"], second["key_id"], other["key_id"]}) == 3


def test_create_batch_is_idempotent_per_item(wire: Client, thread_id: str) -> None:
    """An item's idempotency_key acts as the header does for one create, within a batch and after it."""
    keyed = {"thread_id": thread_id, "idempotency_key": "i-1"}
    one, two, other, free = results(
        wire,
        "/create_dek_batch",
        [keyed, keyed, keyed | {"idempotency_key": "i-2"}, {"thread_id": thread_id}],
    )
    assert one == two
    assert len({one["key_id"], other["key_id"], free["key_id"]}) == 3
    assert results(wire, "/create_dek_batch", [keyed]) == [one]
    assert wire.create(thread_id, Idempotency_Key="i-1") == one


def test_batches_speak_msgpack(wire: Client, thread_id: str) -> None:
    """All three batch forms carry raw bytes in msgpack, errors in their places."""
    items: list[dict[str, Any]] = [{"thread_id": thread_id}]
    (made,) = wire.post_msgpack("/create_dek_batch", {"items": items}).msgpack()["results"]
    assert isinstance(made["wrapped"], bytes)
    key_id = made["key_id"]
    items = [{"key_id": key_id, "plaintext": b"\xff\x00"}, {"key_id": UNKNOWN, "plaintext": b""}]
    sealed, unknown = wire.post_msgpack("/encrypt_batch", {"items": items}).msgpack()["results"]
    assert_item_error(unknown, "key_not_found")
    items = [{"key_id": key_id, "ciphertext": sealed["ciphertext"]}]
    opened = wire.post_msgpack("/decrypt_batch", {"items": items}).msgpack()
    assert opened == {"results": [{"plaintext": b"\xff\x00"}]}


@pytest.mark.parametrize(
    "body",
    [{}, {"items": None}, {"items": {}}, {"items": "x"}, {"items": [], "more": 1}, [], "items"],
    ids=["missing", "null", "object", "string", "unknown-field", "array", "text"],
)
def test_a_batch_without_a_list_of_items_is_400(wire: Client, body: object) -> None:
    """The envelope itself must be {"items": [...]}."""
    assert_problem(wire.post("/encrypt_batch", body), 400, "invalid_field")
