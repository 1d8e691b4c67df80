"""The chat server: what is stored, what is read back, and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from examples.chat_server.cipher import BOUND, NO_KEY, UNBOUND, Envelope, aad
from examples.chat_server.keys import messages_prefix
from progressdb_kms.client import AdminClient, open_sync_provider
from tests.client.devservice import running
from tests.examples.chat import LIMIT, Chat, calls, eventually, fill, insider, kms_environment, options

SECRET = "attack at dawn"


def test_messages_come_back_and_only_ciphertext_is_stored(new_chat: Callable[..., Chat]) -> None:
    """Texts come back; database and log hold none of them; the metadata is as documented."""
    chat = new_chat()
    first, second = chat.post("one", SECRET), chat.post("one", "two")
    assert chat.messages("one") == [{"id": first, "text": SECRET}, {"id": second, "text": "two"}]
    assert chat.messages("one", f"?after={first}") == [{"id": second, "text": "two"}]
    assert chat.messages("one", "?limit=1") == [{"id": first, "text": SECRET}]
    assert chat.call("PUT", f"/threads/one/messages/{second}", {"text": SECRET + "!"})[0] == 200
    assert chat.texts("one") == [SECRET, SECRET + "!"]
    assert chat.call("PUT", f"/threads/one/messages/{'0' * 20}-000000", {"text": "x"})[0] == 404
    entries = chat.entries()
    assert not [key for key, value in entries.items() if SECRET.encode() in value]
    assert set(entries) == {"thread:one:meta", f"thread:one:msg:{first}", f"thread:one:msg:{second}"}
    kms = json.loads(entries["thread:one:meta"])["kms"]
    assert set(kms) == {"key_id", "wrapped_dek", "kek_id", "kek_version"}
    assert {each.key_id for each in chat.envelopes("one").values()} == {kms["key_id"]}
    chat.stop()
    for part in [SECRET, kms["wrapped_dek"]]:
        assert part not in chat.log.read_text()
    for file in chat.database.parent.glob("chat.db*"):
        assert SECRET.encode() not in file.read_bytes()


def test_listing_100_messages_is_one_call(chat: Chat, ready: dict[str, Any]) -> None:
    """A page of 100 messages costs one batch and no other request."""
    with insider(ready, chat.database) as keys:
        fill(keys, "page", 100)
    chat.messages("page")
    before = calls(ready)
    assert len(chat.texts("page")) == 100
    after = calls(ready)
    made = {
        route: after[route] - before.get(route, 0) for route in after if after[route] != before.get(route, 0)
    }
    assert made == {"/decrypt_batch": 1}


def test_a_moved_ciphertext_does_not_decrypt(chat: Chat) -> None:
    """A ciphertext in the place of another message or in another thread is an error; the rest reads."""
    one, two = chat.post("a", "first"), chat.post("a", "second")
    other = chat.post("b", "other")
    stored = chat.entries()
    chat.put(f"thread:a:msg:{two}", stored[f"thread:a:msg:{one}"])
    assert chat.messages("a") == [{"id": one, "text": "first"}, {"id": two, "error": "authentication_failed"}]
    chat.put(f"thread:b:msg:{other}", stored[f"thread:a:msg:{one}"])
    assert chat.messages("b") == [{"id": other, "error": "authentication_failed"}]
    # The same name of a message in a thread that has been given the first one's key.
    chat.put("thread:b:meta", stored["thread:a:meta"])
    chat.put(f"thread:b:msg:{one}", stored[f"thread:a:msg:{one}"])
    assert {"id": one, "error": "authentication_failed"} in chat.messages("b")


def test_a_planted_plaintext_is_not_shown(chat: Chat) -> None:
    """A plaintext, or bytes of any other form, put into an encrypted thread's messages is an error."""
    first, second = chat.post("p", "x"), chat.post("p", "y")
    chat.put(f"thread:p:msg:{first}", Envelope("", UNBOUND, b"planted").encode())
    chat.put(f"thread:p:msg:{second}", b"planted")
    assert [message["error"] for message in chat.messages("p")] == ["authentication_failed"] * 2


def test_messages_without_bound_aad_are_read_and_bound_by_a_rotation(
    chat: Chat, ready: dict[str, Any]
) -> None:
    """A message of the older service (AAD version 0) is read; a rotation binds it to its place."""
    chat.post("old", "new one")
    key_id = chat.rotation("old")["key_id"]
    with open_sync_provider(**options(ready)) as kms:
        sealed = kms.encrypt_with_dek(key_id, b"moved in").ciphertext
    chat.put("thread:old:msg:" + "0" * 20 + "-000000", Envelope(key_id, UNBOUND, sealed).encode())
    assert chat.texts("old") == ["moved in", "new one"]
    chat.rotation("old", "POST")
    chat.rotated("old")
    assert chat.texts("old") == ["moved in", "new one"]
    assert {each.aad_version for each in chat.envelopes("old").values()} == {BOUND}


def test_encryption_off_stores_plaintext_and_refuses_encrypted_threads(
    chat: Chat, new_chat: Callable[..., Chat]
) -> None:
    """With encryption off a thread is plain; an encrypted one is neither read nor written nor deleted."""
    chat.post("secret", SECRET)
    off = new_chat(chat.database, CHAT_ENCRYPTION="off")
    off.post("plain", "open")
    assert off.texts("plain") == ["open"]
    assert {each.key_id for each in off.envelopes("plain").values()} == {""}
    before = off.entries("thread:secret:")
    for method, path in [
        ("POST", "/threads/secret/messages"),
        ("GET", "/threads/secret/messages"),
        ("DELETE", "/threads/secret"),
    ]:
        assert off.call(method, path, {"text": "x"}) == (409, {"error": "thread_is_encrypted"})
    assert off.entries("thread:secret:") == before
    # Switched on, the first message encrypts the thread, and all that was there.
    chat.post("plain", "closed")
    assert chat.texts("plain") == ["open", "closed"]
    key_id = chat.rotated("plain")["key_id"]
    assert {each.key_id for each in chat.envelopes("plain").values()} == {key_id}
    assert chat.texts("plain") == ["open", "closed"]
    assert off.call("POST", "/threads/plain/messages", {"text": "x"})[0] == 409


def test_a_typo_does_not_switch_encryption_off(tmp_path: Path, ready: dict[str, Any]) -> None:
    """With anything but on and off, or with no KMS named, the server does not start."""
    for environment in [{**kms_environment(ready), "CHAT_ENCRYPTION": "of"}, {}]:
        chat = Chat(tmp_path, tmp_path / "chat.db", environment).launch()
        try:
            assert chat.process
            assert chat.process.wait(LIMIT) != 0
        finally:
            chat.kill()


def test_embedded_provider_serves(tmp_path: Path) -> None:
    """The embedded provider does for development: post, list, rotate, delete."""
    chat = Chat(tmp_path, tmp_path / "chat.db", {"PROGRESSDB_KMS_ENDPOINT": "embedded:"}).start()
    try:
        chat.post("e", "hello")
        old = chat.rotation("e")["key_id"]
        chat.rotation("e", "POST")
        assert chat.rotated("e")["key_id"] != old
        assert chat.texts("e") == ["hello"]
        assert chat.call("DELETE", "/threads/e")[0] == 202
        eventually(lambda: not chat.entries(), "the thread is deleted")
    finally:
        chat.kill()


def test_unix_socket_serves(tmp_path: Path, ready: dict[str, Any]) -> None:
    """PROGRESSDB_KMS_ENDPOINT may be a socket's path."""
    chat = Chat(tmp_path, tmp_path / "chat.db", {"PROGRESSDB_KMS_ENDPOINT": ready["unix"]}).start()
    try:
        chat.post("u", "hello")
        assert chat.texts("u") == ["hello"]
    finally:
        chat.kill()


def test_without_the_kms_nothing_is_stored(tmp_path: Path) -> None:
    """While the KMS is away all is 503 with Retry-After, and nothing is stored; then it goes on."""
    with running(tmp_path) as ready:
        port = int(ready["url"].rpartition(":")[2])
        chat = Chat(tmp_path, tmp_path / "chat.db", kms_environment(ready)).start()
        first = chat.post("t", "hello")
    try:
        before = chat.entries()
        for method, path in [
            ("POST", "/threads/t/messages"),
            ("PUT", f"/threads/t/messages/{first}"),
            ("GET", "/threads/t/messages"),
            ("PUT", "/threads/new"),
        ]:
            status, headers, answer = chat.request(method, path, {"text": SECRET})
            assert (status, answer, headers["retry-after"]) == (503, {"error": "try_again"}, "1")
        after = chat.entries()
        del after["thread:new:meta"]
        assert after == before
        # Marked now, carried out when the KMS is back, whatever happens to the server in between.
        assert chat.call("DELETE", "/threads/t")[0] == 202
        chat.kill()
        with running(tmp_path, port) as ready, AdminClient(**options(ready, "operator")) as operator:
            chat.start()
            eventually(lambda: not chat.entries("thread:t:"), "the thread is deleted")
            assert [key.state for key in operator.list_keys("chat:t")] == ["pending_destruction"]
            chat.stop()
    finally:
        chat.kill()


def test_a_refusal_of_the_kms_is_no_plaintext_either(
    new_chat: Callable[..., Chat], ready: dict[str, Any]
) -> None:
    """An identity without a grant gets a 500 that tells users nothing, and stores no message."""
    chat = new_chat(**kms_environment(ready, "stranger"))
    status, headers, answer = chat.request("POST", "/threads/t/messages", {"text": SECRET})
    assert (status, answer) == (500, {"error": "encryption_failed"})
    assert "retry-after" not in headers
    assert not chat.entries(messages_prefix("t"))
    assert "permission_denied" in chat.log.read_text()


def test_deleting_a_thread_destroys_its_keys(chat: Chat, operator: AdminClient) -> None:
    """A deleted thread's keys await destruction, its messages are gone; one of the same name starts anew."""
    for number in range(3):
        chat.post("gone", f"text {number}")
    chat.rotation("gone", "POST")
    chat.rotated("gone")
    assert chat.call("DELETE", "/threads/gone")[0] == 202
    assert chat.call("GET", "/threads/gone/messages")[0] == 404
    eventually(lambda: not chat.entries("thread:gone:"), "the thread is deleted")
    assert not chat.entries("job:")
    states = [key.state for key in operator.list_keys("chat:gone")]
    assert states == ["pending_destruction"] * 2
    chat.post("gone", "anew")
    assert chat.texts("gone") == ["anew"]


def test_admin_routes_need_the_token(chat: Chat, new_chat: Callable[..., Chat]) -> None:
    """Without the token, or where none is set, nobody rotates or looks."""
    chat.post("t", "x")
    open_one = new_chat(chat.database, CHAT_ADMIN_TOKEN="")
    for method in ("GET", "POST"):
        for server, header in [(chat, "Bearer wrong"), (chat, ""), (open_one, "Bearer "), (open_one, "")]:
            headers = {"Authorization": header} if header else {}
            assert server.request(method, "/admin/threads/t/rotation", None, headers)[0] == 403


def test_bad_bodies_are_refused(chat: Chat) -> None:
    """What is no text, or too long, is 400."""
    texts = ["", 1, "\ud800", "x" * 65_537, "\xfc" * 40_000, None]
    bodies: list[object] = [None, [], {}, *({"text": text} for text in texts)]
    for body in bodies:
        assert chat.call("POST", "/threads/bad/messages", body)[0] == 400
    assert not chat.entries("thread:bad")


def test_bad_thread_ids_are_refused(chat: Chat) -> None:
    """A name that could reach into another thread's keys is 404."""
    before = chat.entries()
    for path in ["a%3Ab", "%20", "a" * 129, "%C3%BC", "a%0A"]:
        assert chat.call("POST", f"/threads/{path}/messages", {"text": "x"})[0] == 404
    assert chat.entries() == before


def test_a_key_rotated_at_the_kms_is_replaced(chat: Chat, operator: AdminClient) -> None:
    """An operator's `keys rotate` lets the old key only decrypt: the server takes a new one and migrates."""
    chat.post("op", "before")
    old = chat.rotation("op")["key_id"]
    operator.rotate_dek("chat:op")
    eventually(lambda: chat.post("op", "after") and chat.rotation("op")["key_id"] != old, "a new key")
    chat.rotated("op")
    assert operator.get_key(old).state == "pending_destruction"
    texts = chat.texts("op")
    assert (texts[0], set(texts[1:])) == ("before", {"after"})


names = st.text(st.characters(codec="utf-8"), max_size=8)


@given(names, names, names, names)
def test_aad_is_unambiguous(thread: str, message: str, other_thread: str, other_message: str) -> None:
    """Two places have the same AAD only if they are the same place."""
    same = (thread, message) == (other_thread, other_message)
    assert (aad(BOUND, thread, message) == aad(BOUND, other_thread, other_message)) == same


def test_aad_is_frozen() -> None:
    """The encoding never changes: stored messages need it."""
    expected = b"\x01" + struct.pack(">I", 1) + b"t" + struct.pack(">I", 2) + b"mk"
    assert (aad(BOUND, "t", "mk"), aad(UNBOUND, "t", "mk")) == (expected, b"")


@given(st.text(st.characters(codec="ascii"), max_size=40), st.sampled_from([UNBOUND, BOUND]), st.binary())
def test_envelopes_round_trip(key_id: str, version: int, body: bytes) -> None:
    """An envelope is read as it was written, and cut short or lengthened in its head it is no other key's."""
    envelope = Envelope(key_id, version, body)
    assert Envelope.decode(envelope.encode()) == envelope


@given(st.binary())
def test_any_bytes_are_an_envelope_or_none(stored: bytes) -> None:
    """Reading never fails, and what is read is written the same."""
    envelope = Envelope.decode(stored)
    assert envelope.key_id == NO_KEY or envelope.encode() == stored
