"""The wire contract to the letter: names, shapes, status 200, standard base64, over mTLS and Unix socket."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.dev_service import DevService, start_dev
from tests.contract.wire_client import JSON, MSGPACK, Client, RawConnection, assert_problem, b64, unb64

NONCE = 12
TAG = 16
WRAPPED = 4 + NONCE + 32 + TAG
KEY_ID = re.compile(r"k_[A-Z2-7]{28}")
MIB = 1 << 20


def test_create_answers_exactly_the_old_clients_fields(wire: Client, thread_id: str) -> None:
    """A create gives key_id, wrapped, kek_id, kek_version and key_version, versions being strings."""
    made = wire.create(thread_id)
    assert set(made) == {"key_id", "wrapped", "kek_id", "kek_version", "key_version"}
    assert KEY_ID.fullmatch(made["key_id"])
    assert len(unb64(made["wrapped"])) == WRAPPED
    assert isinstance(made["kek_id"], str)
    assert made["kek_id"]
    assert re.fullmatch(r"[1-9][0-9]*", made["kek_version"])
    assert made["key_version"] == "1"


def test_key_id_begins_with_the_tag_of_its_thread(wire: Client, thread_id: str) -> None:
    """The two characters after `k_` are base32 of SHA-256(thread_id), by which a key id finds its slot."""
    tag = base64.b32encode(hashlib.sha256(thread_id.encode()).digest())[:2].decode()
    assert wire.create(thread_id)["key_id"][2:4] == tag


def test_wrapped_blob_header_names_the_kek_version(wire: Client, thread_id: str) -> None:
    """Byte 0 is the format, bytes 1 to 3 the KEK version, big-endian."""
    made = wire.create(thread_id)
    blob = unb64(made["wrapped"])
    assert blob[0] == 1
    assert int.from_bytes(blob[1:4], "big") == int(made["kek_version"])


def test_each_create_makes_a_new_key_of_the_next_version(wire: Client, thread_id: str) -> None:
    """Without an Idempotency-Key every call makes a new key; earlier ones stay usable."""
    made = [wire.create(thread_id) for _ in range(3)]
    assert len({key["key_id"] for key in made}) == 3
    assert len({key["wrapped"] for key in made}) == 3
    assert [key["key_version"] for key in made] == ["1", "2", "3"]
    for key in made:
        body = {"key_id": key["key_id"], "plaintext": b64(b"m")}
        assert wire.post("/encrypt", body).ok()["key_version"] == key["key_version"]


@pytest.mark.parametrize("size", [0, 1, 16, 256, 65_537, MIB], ids=str)
def test_encrypt_and_decrypt_a_plaintext_of_size(wire: Client, key_id: str, size: int) -> None:
    """Any plaintext from empty to 1 MiB makes nonce, ciphertext and tag, and comes back."""
    plaintext = secrets.token_bytes(size)
    sealed = wire.post("/encrypt", {"key_id": key_id, "plaintext": b64(plaintext)}).ok()
    assert set(sealed) == {"ciphertext", "key_version"}
    assert sealed["key_version"] == "1"
    ciphertext = unb64(sealed["ciphertext"])
    assert len(ciphertext) == NONCE + size + TAG
    opened = wire.post("/decrypt", {"key_id": key_id, "ciphertext": sealed["ciphertext"]}).ok()
    assert set(opened) == {"plaintext"}
    assert unb64(opened["plaintext"]) == plaintext


def test_a_plaintext_over_a_mebibyte_is_too_large(wire: Client, key_id: str) -> None:
    """One byte more than 1 MiB is 413 plaintext_too_large."""
    answer = wire.post("/encrypt", {"key_id": key_id, "plaintext": b64(bytes(MIB + 1))})
    assert_problem(answer, 413, "plaintext_too_large")


def test_every_message_has_a_fresh_nonce(wire: Client, key_id: str) -> None:
    """The same plaintext under the same key never makes the same nonce or ciphertext."""
    made = [wire.encrypt(key_id, b"same") for _ in range(50)]
    assert len({blob[:NONCE] for blob in made}) == 50
    assert len({blob[NONCE:] for blob in made}) == 50


def test_get_wrapped_gives_what_create_gave(wire: Client, thread_id: str) -> None:
    """The blob, KEK id and KEK version are those that the create returned, and no more."""
    made = wire.create(thread_id)
    wrapped = wire.get("/get_wrapped", {"key_id": made["key_id"]}).ok()
    assert wrapped == {name: made[name] for name in ("wrapped", "kek_id", "kek_version")}


def test_rewrap_over_mtls_answers_the_shape_and_keeps_the_key(
    operator: Client, server: Client, thread_id: str
) -> None:
    """A rewrap returns key_id, wrapped, kek_id, kek_version; get_wrapped agrees; the data still opens."""
    made = server.create(thread_id)
    ciphertext = server.encrypt(made["key_id"], b"before")
    answer = operator.post("/rewrap", {"key_id": made["key_id"]}).ok()
    assert set(answer) == {"key_id", "wrapped", "kek_id", "kek_version"}
    assert answer["key_id"] == made["key_id"]
    assert len(unb64(answer["wrapped"])) == WRAPPED
    shown = server.get("/get_wrapped", {"key_id": made["key_id"]}).ok()
    assert shown == {name: answer[name] for name in ("wrapped", "kek_id", "kek_version")}
    assert server.decrypt(made["key_id"], ciphertext) == b"before"


@pytest.mark.parametrize("client", ["operator", "unix"])
def test_rewrap_refuses_a_kek_that_travels(
    open_client: Callable[[str], Client], key_id: str, client: str
) -> None:
    """A request with new_kek_hex is refused whoever sends it, and the KEK is not echoed."""
    kek = secrets.token_hex(32)
    answer = open_client(client).post("/rewrap", {"key_id": key_id, "new_kek_hex": kek})
    if client == "unix" and answer.status == 403:
        assert_problem(answer, 403, "permission_denied")
    else:
        assert_problem(answer, 400, "kek_not_accepted")
    assert kek.encode() not in answer.body


def test_healthz_is_200(wire: Client) -> None:
    """GET /healthz answers 200 while the service serves."""
    assert wire.get("/healthz").status == 200


@pytest.mark.parametrize(
    "thread",
    ["t", "x" * 256, "thread:1/ü-漢-🙂 with spaces", "ü" * 128, '{"quoted": "\\"}', "k_1"],
    ids=["one-byte", "256-bytes", "unicode", "256-bytes-utf8", "json-in-it", "like-a-key-id"],
)
def test_thread_ids_of_1_to_256_bytes_of_utf8(wire: Client, operator: Client, thread: str) -> None:
    """A thread id is any UTF-8 of 1 to 256 bytes without control characters, kept as it came."""
    key_id = wire.create(thread)["key_id"]
    assert operator.get(f"/v1/keys/{key_id}").ok()["thread_id"] == thread


def test_json_with_a_charset_parameter_is_json(wire: Client, thread_id: str) -> None:
    """`application/json; charset=utf-8` is accepted as the JSON that it is."""
    body = f'{{"thread_id": "{thread_id}"}}'.encode()
    wire.post_raw("/create_dek_for_thread", body, "application/json; charset=utf-8").ok()


# AAD


def test_right_aad_decrypts(wire: Client, key_id: str) -> None:
    """What was encrypted with AAD decrypts with the same AAD."""
    aad = secrets.token_bytes(300)
    assert wire.decrypt(key_id, wire.encrypt(key_id, b"bound", aad), aad) == b"bound"


@pytest.mark.parametrize(
    "used, offered",
    [(b"right", b"wrong"), (b"right", None), (b"right", b""), (None, b"added"), (b"right", b"right\x00")],
    ids=["wrong", "missing", "empty-for-some", "added", "longer"],
)
def test_other_aad_is_422(wire: Client, key_id: str, used: bytes | None, offered: bytes | None) -> None:
    """Wrong, missing, emptied, added or longer AAD fails authentication."""
    ciphertext = wire.encrypt(key_id, b"bound", used)
    assert_problem(wire.try_decrypt(key_id, ciphertext, offered), 422, "authentication_failed")


def test_empty_aad_equals_absent_aad(wire: Client, key_id: str) -> None:
    """An absent AAD means an empty one, in both directions."""
    assert wire.decrypt(key_id, wire.encrypt(key_id, b"m", b""), None) == b"m"
    assert wire.decrypt(key_id, wire.encrypt(key_id, b"m", None), b"") == b"m"


def test_a_ciphertext_moved_to_another_key_is_422(wire: Client, thread_id: str) -> None:
    """A ciphertext opens under its own key alone, even within one thread."""
    first, second = wire.create(thread_id)["key_id"], wire.create(thread_id)["key_id"]
    ciphertext = wire.encrypt(first, b"mine")
    assert_problem(wire.try_decrypt(second, ciphertext), 422, "authentication_failed")


# msgpack


def test_msgpack_carries_raw_bytes_both_ways(wire: Client, thread_id: str) -> None:
    """With Content-Type and Accept of msgpack every binary field is bytes, not base64."""
    made = wire.post_msgpack("/create_dek_for_thread", {"thread_id": thread_id}).msgpack()
    assert set(made) == {"key_id", "wrapped", "kek_id", "kek_version", "key_version"}
    assert isinstance(made["wrapped"], bytes)
    assert len(made["wrapped"]) == WRAPPED
    key_id = made["key_id"]
    sealed = wire.post_msgpack("/encrypt", {"key_id": key_id, "plaintext": b"\x00raw", "aad": b"a"}).msgpack()
    assert set(sealed) == {"ciphertext", "key_version"}
    assert len(sealed["ciphertext"]) == NONCE + 4 + TAG
    opened = wire.post_msgpack(
        "/decrypt", {"key_id": key_id, "ciphertext": sealed["ciphertext"], "aad": b"a"}
    )
    assert opened.msgpack() == {"plaintext": b"\x00raw"}
    assert wire.decrypt(key_id, sealed["ciphertext"], b"a") == b"\x00raw"
    wrapped = wire.get("/get_wrapped", {"key_id": key_id}, Accept=MSGPACK).msgpack()
    assert wrapped == {name: made[name] for name in ("wrapped", "kek_id", "kek_version")}


def test_rewrap_speaks_msgpack(operator: Client, key_id: str) -> None:
    """/rewrap, too, answers raw bytes in msgpack."""
    answer = operator.post_msgpack("/rewrap", {"key_id": key_id}).msgpack()
    assert set(answer) == {"key_id", "wrapped", "kek_id", "kek_version"}
    assert isinstance(answer["wrapped"], bytes)


@pytest.mark.parametrize("accept", [JSON, "*/*", "application/*", "text/html, application/json;q=0.5"])
def test_accept_chooses_json(wire: Client, key_id: str, accept: str) -> None:
    """A msgpack request may ask for JSON; a range that contains JSON is served JSON where it was sent."""
    body = {"key_id": key_id, "plaintext": b64(b"m")}
    assert len(unb64(wire.post("/encrypt", body, Accept=accept).ok()["ciphertext"])) == NONCE + 1 + TAG


def test_content_type_and_accept_may_differ(wire: Client, thread_id: str) -> None:
    """JSON in and msgpack out, and msgpack in and JSON out."""
    out = wire.post("/create_dek_for_thread", {"thread_id": thread_id}, Accept=MSGPACK)
    assert len(out.msgpack()["wrapped"]) == WRAPPED
    into = wire.post_msgpack("/create_dek_for_thread", {"thread_id": thread_id}, Accept=JSON)
    assert len(unb64(into.ok()["wrapped"])) == WRAPPED


def test_problems_stay_problem_json_for_a_msgpack_client(wire: Client, key_id: str) -> None:
    """An error answers application/problem+json whatever was asked for."""
    answer = wire.post_msgpack("/decrypt", {"key_id": key_id, "ciphertext": bytes(64)})
    assert_problem(answer, 422, "authentication_failed")


def test_an_accept_that_nothing_satisfies_is_406(wire: Client, key_id: str) -> None:
    """A client that takes neither JSON nor msgpack is told so."""
    answer = wire.post("/encrypt", {"key_id": key_id, "plaintext": b64(b"m")}, Accept="text/html")
    assert_problem(answer, 406, "not_acceptable")


# request ids, methods, routes


def test_request_id_is_echoed(wire: Client, thread_id: str) -> None:
    """X-Request-Id comes back as it was sent, on success and in a problem."""
    sent = f"req-{secrets.token_hex(8)}"
    answer = wire.post("/create_dek_for_thread", {"thread_id": thread_id}, X_Request_Id=sent)
    assert answer.headers["x-request-id"] == sent
    refused = wire.post("/create_dek_for_thread", {}, X_Request_Id=sent)
    assert assert_problem(refused, 400, "invalid_field")["request_id"] == sent


def test_request_id_is_made_where_none_came(wire: Client, thread_id: str) -> None:
    """Without X-Request-Id each answer gets one of its own."""
    made = {
        wire.post("/create_dek_for_thread", {"thread_id": thread_id}).headers["x-request-id"] for _ in "12"
    }
    assert len(made) == 2
    assert all(made)


def test_an_unknown_route_is_404(wire: Client) -> None:
    """A path that is no route is a problem of its own code."""
    assert_problem(wire.get("/nothing/here"), 404, "route_not_found")


@pytest.mark.parametrize(
    "method, path, allowed",
    [
        ("GET", "/create_dek_for_thread", "POST"),
        ("PUT", "/encrypt", "POST"),
        ("DELETE", "/decrypt", "POST"),
        ("POST", "/get_wrapped?key_id=k_1", "GET"),
        ("POST", "/healthz", "GET"),
        ("DELETE", "/v1/keys", "GET"),
    ],
)
def test_a_wrong_method_is_405_and_names_the_right_one(
    wire: Client, method: str, path: str, allowed: str
) -> None:
    """A known path with another method is 405 with an Allow header (RFC 9110, 15.5.6)."""
    answer = wire.request(method, path)
    assert_problem(answer, 405, "method_not_allowed")
    assert allowed in [name.strip() for name in answer.headers["allow"].split(",")]


def test_answers_are_not_to_be_stored(wire: Client, key_id: str) -> None:
    """No answer with key material or plaintext may be kept by a cache on its way."""
    ciphertext = wire.encrypt(key_id, b"m")
    assert wire.try_decrypt(key_id, ciphertext).headers["cache-control"] == "no-store"
    assert wire.get("/get_wrapped", {"key_id": key_id}).headers["cache-control"] == "no-store"


# Idempotency-Key


def test_fifty_concurrent_creates_with_one_key_make_one(service: DevService, thread_id: str) -> None:
    """The same identity, Idempotency-Key and thread give one key though fifty connections ask at once."""
    body = json.dumps({"thread_id": thread_id}).encode()
    head = "POST /create_dek_for_thread HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Idempotency-Key: order-1\r\nContent-Length: {len(body)}\r\n\r\n"
    connect = service.tls("server")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(RawConnection(connect)) for _ in range(50)]
        for connection in opened:
            connection.send(head.encode() + body)
        answers = [connection.must_answer("POST").ok() for connection in opened]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0]["key_version"] == "1"


def test_kill_9_loses_no_key_and_no_idempotency(tmp_path: Path) -> None:
    """After SIGKILL of service and store a new start finds the key, opens its data and replays its create."""
    first = start_dev(tmp_path / "state", tmp_path / "first.log")
    client = first.client("server")
    try:
        made = client.create("t", Idempotency_Key="order-1")
        ciphertext = client.encrypt(made["key_id"], b"before", b"aad")
    finally:
        first.kill()
        client.close()
    second = start_dev(tmp_path / "state", tmp_path / "second.log")
    client = second.client("server")
    try:
        assert client.decrypt(made["key_id"], ciphertext, b"aad") == b"before"
        assert client.create("t", Idempotency_Key="order-1") == made
        assert client.create("t", Idempotency_Key="order-2")["key_version"] == "2"
    finally:
        client.close()
        code = second.stop()
    assert code == 0, second.log_text()


def test_another_thread_or_idempotency_key_is_another_dek(wire: Client, thread_id: str) -> None:
    """The replay finds its key by thread and Idempotency-Key together."""
    made = wire.create(thread_id, Idempotency_Key="once")
    assert wire.create(thread_id, Idempotency_Key="once") == made
    assert wire.create(thread_id, Idempotency_Key="twice")["key_id"] != made["key_id"]
    assert wire.create(thread_id + "-b", Idempotency_Key="once")["key_id"] != made["key_id"]
    assert wire.create(thread_id)["key_id"] != made["key_id"]


def test_another_identity_with_the_same_idempotency_key_is_another_dek(
    open_client: Callable[[str], Client], thread_id: str
) -> None:
    """One caller can't reach another's key by guessing its Idempotency-Key."""
    names = ("server", "operator", "unix")
    made = [open_client(name).create(thread_id, Idempotency_Key="shared") for name in names]
    assert len({key["key_id"] for key in made}) == 3


def test_a_replay_after_a_rewrap_finds_the_same_key(server: Client, operator: Client, thread_id: str) -> None:
    """A retry that comes after a rewrap gets the same key, in its present wrapping."""
    made = server.create(thread_id, Idempotency_Key="early")
    rewrapped = operator.post("/rewrap", {"key_id": made["key_id"]}).ok()
    again = server.create(thread_id, Idempotency_Key="early")
    assert again["key_id"] == made["key_id"]
    assert again["key_version"] == made["key_version"]
    assert again["wrapped"] == rewrapped["wrapped"]


@pytest.mark.parametrize("value", ["", "x" * 300, "tab\there"], ids=["empty", "long", "tab"])
def test_an_ill_formed_idempotency_key_is_refused(wire: Client, thread_id: str, value: str) -> None:
    """Rather than silently ignored: the caller believes that its retry is safe."""
    answer = wire.post("/create_dek_for_thread", {"thread_id": thread_id}, Idempotency_Key=value)
    assert_problem(answer, 400, "invalid_header")
