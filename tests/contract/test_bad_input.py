"""Bad input: each kind with its code, never a 500, and nothing of what was sent comes back or is logged.

Every bad value carries a marker. The answer must not contain it, and at the end of the module the
service's whole log must not contain any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from tests.contract.dev_service import DevService
from tests.contract.wire_client import (
    MSGPACK,
    Answer,
    Client,
    RawConnection,
    assert_item_error,
    assert_problem,
    b64,
)

MARK = "QzMarkQzMarkNeverRepeats"
"""24 characters, so that it is valid base64 as well and can stand in a binary field."""
UNKNOWN = "k_" + "A" * 28
MIB = 1 << 20


@dataclass
class Probe:
    """Sends what carries the marker and checks the refusal."""

    sent: int = 0
    log: Callable[[], str] = field(default=str)

    def refused(self, answer: Answer, status: int, code: str) -> dict[str, Any]:
        """Assert the problem, and that it repeats nothing of the value."""
        problem = assert_problem(answer, status, code)
        self.sent += 1
        assert MARK.encode() not in answer.body
        assert all(MARK not in value for value in answer.headers.values())
        return problem


@pytest.fixture(scope="module")
def probe(service: DevService) -> Iterator[Probe]:
    """Give the probe; when the module is done, the log must be free of every value sent."""
    watching = Probe(log=service.log_text)
    yield watching
    assert watching.sent
    assert "serving" in service.log_text(), "the log that is searched must be the log that is written"
    assert MARK not in service.log_text()
    assert b64(MARK.encode()) not in service.log_text()


def encrypt(key_id: str, **other: object) -> dict[str, object]:
    """Return an encrypt request with some fields replaced."""
    return {"key_id": key_id, "plaintext": b64(MARK.encode())} | other


# base64


@pytest.mark.parametrize(
    "text",
    [
        f"{MARK}!!!!",
        f"{MARK}QQ",
        f"{MARK}QQ=",
        f"{MARK}-_-_",
        f"{MARK}\nQUFB",
        f"{MARK} QUFB",
        f"{MARK}QUE=QUFB",
        f"{MARK}Q===",
        f"{MARK}é===",
    ],
    ids=[
        "alphabet", "unpadded", "half-padded", "url-safe", "newline", "space", "padding-inside",
        "one-character", "not-ascii",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["plaintext", "aad", "ciphertext"])
def test_base64_is_strict(server: Client, key_id: str, probe: Probe, name: str, text: str) -> None:
    """Invalid, unpadded or URL-safe base64 is 400 invalid_field in every binary field."""
    if name == "ciphertext":
        answer = server.post("/decrypt", {"key_id": key_id, "ciphertext": text})
    else:
        answer = server.post("/encrypt", encrypt(key_id, **{name: text}))
    probe.refused(answer, 400, "invalid_field")


# types and fields


@pytest.mark.parametrize(
    "path, body",
    [
        ("/encrypt", {"key_id": UNKNOWN, "plaintext": 7, "aad": MARK}),
        ("/encrypt", {"key_id": UNKNOWN, "plaintext": [MARK]}),
        ("/encrypt", {"key_id": UNKNOWN, "plaintext": {"x": MARK}}),
        ("/encrypt", {"key_id": UNKNOWN, "plaintext": None, "aad": MARK}),
        ("/encrypt", {"key_id": UNKNOWN, "plaintext": MARK, "aad": True}),
        ("/encrypt", {"key_id": [MARK], "plaintext": MARK}),
        ("/encrypt", {"key_id": UNKNOWN, "plaintext": MARK, "aad": 1.5}),
        ("/decrypt", {"key_id": UNKNOWN, "ciphertext": False, "aad": MARK}),
        ("/create_dek_for_thread", {"thread_id": {"x": MARK}}),
        ("/create_dek_for_thread", {"thread_id": 3}),
        ("/create_dek_for_thread", {"thread_id": None}),
        ("/rewrap", {"key_id": {MARK: MARK}}),
        ("/encrypt", [MARK]),
        ("/encrypt", MARK),
        ("/encrypt", 12),
        ("/encrypt", {MARK: MARK}),
        ("/encrypt", {"key_id": UNKNOWN, "plaintext": MARK, MARK: 1}),
        ("/decrypt", {"key_id": UNKNOWN, "ciphertext": MARK * 2, "plaintext": MARK}),
        ("/create_dek_for_thread", {"thread_id": "t", MARK: MARK}),
        ("/rewrap", {"key_id": UNKNOWN, MARK: MARK}),
        ("/encrypt", {"key_id": UNKNOWN}),
        ("/encrypt", {"plaintext": MARK}),
        ("/encrypt", {}),
        ("/decrypt", {"key_id": UNKNOWN, "aad": MARK}),
        ("/decrypt", {"ciphertext": MARK}),
        ("/create_dek_for_thread", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_types_unknown_and_missing_fields(
    operator: Client, probe: Probe, path: str, body: object
) -> None:
    """A field of the wrong type, too many or too few, is 400 invalid_field."""
    probe.refused(operator.post(path, body), 400, "invalid_field")


def test_a_missing_key_id_of_rewrap_is_400(operator: Client, probe: Probe) -> None:
    """/rewrap needs its key_id."""
    probe.refused(operator.post("/rewrap", {}), 400, "invalid_field")


@pytest.mark.parametrize(
    "body",
    [
        f'{{"key_id": "{UNKNOWN}", "plaintext": "", "plaintext": "{MARK}"}}',
        f'{{"key_id": "{UNKNOWN}", "plaintext": "{MARK}", "key_id": "{UNKNOWN}"}}',
        f'{{"key_id": "{UNKNOWN}", "plaintext": "{MARK}", "key_\\u0069d": "{UNKNOWN}"}}',
    ],
    ids=["other-value", "same-value", "escaped-name"],
)
def test_a_duplicate_field_is_400(server: Client, probe: Probe, body: str) -> None:
    """Two fields of one name are refused, for two readers could each see another."""
    probe.refused(server.post_raw("/encrypt", body.encode()), 400, "duplicate_field")


def test_a_duplicate_field_in_msgpack_is_400(server: Client, probe: Probe) -> None:
    """The same holds for a msgpack map."""
    pair = msgspec.msgpack.encode("plaintext") + msgspec.msgpack.encode(MARK.encode())
    body = b"\x83" + msgspec.msgpack.encode("key_id") + msgspec.msgpack.encode(UNKNOWN) + pair * 2
    probe.refused(server.post_raw("/encrypt", body, MSGPACK), 400, "duplicate_field")


# bodies that do not parse


def deep(opening: bytes, closing: bytes, levels: int = 100_000) -> bytes:
    """Return JSON nested deeper than any parser's stack."""
    return b'{"key_id": ' + opening * levels + b'"' + MARK.encode() + b'"' + closing * levels + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"key_id": "' + MARK.encode(),
        MARK.encode(),
        b'{"key_id": "' + UNKNOWN.encode() + b'", "plaintext": "' + MARK.encode() + b'"} x',
        b"\xef\xbb\xbf{}",
        b'{"key_id": "' + MARK.encode() + b'\xff\xfe", "plaintext": ""}',
        b'{"key_id": "' + MARK.encode() + b'\x00", "plaintext": ""}',
        b'{"key_id": "' + MARK.encode() + b'\\ud800", "plaintext": ""}',
        b'{"key_id": "' + MARK.encode() + b'", "plaintext": NaN}',
        b"\x00" * 64 + MARK.encode(),
    ],
    ids=[
        "empty", "open-brace", "cut-string", "bare-word", "trailing", "bom", "not-utf8", "raw-nul",
        "lone-surrogate", "nan", "nuls",
    ],
)  # fmt: skip
def test_a_body_that_is_not_json_is_400(server: Client, probe: Probe, body: bytes) -> None:
    """Broken, truncated or non-UTF-8 JSON is 400 malformed_body."""
    probe.refused(server.post_raw("/encrypt", body), 400, "malformed_body")


@pytest.mark.parametrize("body", [deep(b"[", b"]"), deep(b'{"a":', b"}", 50_000)], ids=["arrays", "objects"])
def test_bottomless_json_is_400(server: Client, probe: Probe, body: bytes) -> None:
    """Nesting deeper than a stack fails on its first level, which has the wrong type, or on its depth."""
    answer = server.post_raw("/encrypt", body)
    code = "malformed_body" if b"malformed_body" in answer.body else "invalid_field"
    probe.refused(answer, 400, code)


@pytest.mark.parametrize("path", ["/encrypt_batch", "/decrypt_batch", "/create_dek_batch"])
@pytest.mark.parametrize("kind", ["array", "object", "msgpack"])
def test_bottomless_items_are_refused(server: Client, probe: Probe, path: str, kind: str) -> None:
    """Where a batch looks at its items one by one: an error for the item or the whole, never a crash."""
    if kind == "msgpack":
        nested = b"\x91" * 100_000 + msgspec.msgpack.encode(MARK)
        answer = server.post_raw(path, b"\x81\xa5items\x91" + nested, MSGPACK)
    else:
        opening, closing = (b"[", b"]") if kind == "array" else (b'{"a":', b"}")
        answer = server.post_raw(path, b'{"items": [%s]}' % deep(opening, closing, 50_000))
    if answer.status == 200:
        (item,) = answer.ok()["results"]
        assert_item_error(item, "invalid_field")
        assert MARK.encode() not in answer.body
    else:
        code = "malformed_body" if b"malformed_body" in answer.body else "invalid_field"
        probe.refused(answer, 400, code)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x82\xa6key_id",
        msgspec.msgpack.encode({"key_id": UNKNOWN, "plaintext": MARK.encode()}) + b"\x00",
        b"\x81\xa6key_id\xa2\xff\xfe",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa6key_id\xc6\xff\xff\xff\xff" + MARK.encode(),
    ],
    ids=["empty", "reserved", "cut", "trailing", "not-utf8", "huge-map", "huge-bytes"],
)
def test_a_body_that_is_not_msgpack_is_400(server: Client, probe: Probe, body: bytes) -> None:
    """The same in msgpack, lengths that lie included."""
    probe.refused(server.post_raw("/encrypt", body, MSGPACK), 400, "malformed_body")


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/jsonx",
        f"text/{MARK}",
        "multipart/form-data",
    ],
)
def test_another_content_type_is_415(server: Client, key_id: str, probe: Probe, content_type: str) -> None:
    """Only application/json and application/msgpack are read."""
    body = msgspec.json.encode(encrypt(key_id))
    probe.refused(server.post_raw("/encrypt", body, content_type), 415, "unsupported_media_type")


# thread ids


@pytest.mark.parametrize(
    "thread",
    [
        "",
        MARK + "x" * 256,
        MARK + "é" * 117,
        f"{MARK}\x00",
        f"{MARK}\n",
        f"{MARK}\x1b[2J",
        f"{MARK}\x7f",
        f"{MARK}\x85",
    ],
    ids=["empty", "over-long", "over-long-in-bytes", "nul", "newline", "escape", "delete", "c1-control"],
)
def test_an_invalid_thread_id_is_400(wire: Client, probe: Probe, thread: str) -> None:
    """Empty, over 256 bytes of UTF-8, or with control characters: 400 invalid_thread_id."""
    assert not MARK.isspace()
    probe.refused(wire.post("/create_dek_for_thread", {"thread_id": thread}), 400, "invalid_thread_id")


# ciphertexts and plaintexts


@pytest.mark.parametrize("size", [0, 1, 12, 18, 27])
def test_a_truncated_ciphertext_is_malformed(wire: Client, key_id: str, probe: Probe, size: int) -> None:
    """Less than nonce and tag is no ciphertext: 400 malformed_ciphertext."""
    ciphertext = MARK.encode()[:size].ljust(size, b"x")
    probe.refused(wire.try_decrypt(key_id, ciphertext), 400, "malformed_ciphertext")


def test_a_forged_ciphertext_is_422(wire: Client, key_id: str, probe: Probe) -> None:
    """Something long enough that was never encrypted here: 422 authentication_failed."""
    probe.refused(wire.try_decrypt(key_id, MARK.encode() * 3), 422, "authentication_failed")


def test_an_over_limit_plaintext_is_413(wire: Client, key_id: str, probe: Probe) -> None:
    """More than 1 MiB of plaintext: 413 plaintext_too_large."""
    text = b64(MARK.encode() * (MIB // len(MARK) + 1))
    probe.refused(wire.post("/encrypt", encrypt(key_id, plaintext=text)), 413, "plaintext_too_large")


def test_an_over_large_body_is_413(server: Client, probe: Probe) -> None:
    """A body over its route's limit: 413 body_too_large, here a create of 4 MiB."""
    body = b'{"thread_id": "' + MARK.encode() * (4 * MIB // len(MARK)) + b'"}'
    probe.refused(server.post_raw("/create_dek_for_thread", body), 413, "body_too_large")


def test_an_over_large_body_is_refused_by_its_announcement(
    raw: Callable[[], RawConnection], service: DevService, probe: Probe
) -> None:
    """Content-Length alone is enough: the answer comes though not one byte of the body does."""
    connection = raw()
    connection.send(
        f"POST /encrypt HTTP/1.1\r\nHost: {service.host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {1 << 30}\r\n\r\n".encode()
    )
    probe.refused(connection.must_answer("POST"), 413, "body_too_large")


def test_an_over_large_chunked_body_is_413(
    raw: Callable[[], RawConnection], service: DevService, probe: Probe
) -> None:
    """Without an announcement the bytes are counted as they come."""
    connection = raw()
    connection.send(
        f"POST /create_dek_for_thread HTTP/1.1\r\nHost: {service.host}\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n".encode()
    )
    chunk = (MARK.encode() * (MIB // len(MARK))).ljust(MIB, b"x")
    for _ in range(4):
        connection.send(b"%x\r\n%s\r\n" % (len(chunk), chunk))
    connection.send(b"0\r\n\r\n")
    probe.refused(connection.must_answer("POST"), 413, "body_too_large")


# keys


@pytest.mark.parametrize(
    "key_id",
    [
        UNKNOWN,
        MARK,
        "",
        "k_",
        "k_1",
        f"k_{MARK}",
        "k_" + "a" * 28,
        "k_" + "1" * 28,
        "k_" + "A" * 4000,
        "../k",
        "k_\x00",
    ],
    ids=["unknown", "word", "empty", "prefix", "old", "marker", "lower", "alphabet", "long", "path", "nul"],
)
def test_an_unknown_key_is_404(operator: Client, probe: Probe, key_id: str) -> None:
    """A key id that names nothing, well formed or not, is 404 key_not_found on every route that takes one."""
    probe.refused(operator.post("/encrypt", encrypt(key_id)), 404, "key_not_found")
    ciphertext = b64(MARK.encode() * 2)
    answer = operator.post("/decrypt", {"key_id": key_id, "ciphertext": ciphertext})
    probe.refused(answer, 404, "key_not_found")
    probe.refused(operator.post("/rewrap", {"key_id": key_id}), 404, "key_not_found")
    probe.refused(operator.get("/get_wrapped", {"key_id": key_id}), 404, "key_not_found")


def test_a_disabled_key_is_409(operator: Client, server: Client, thread_id: str, probe: Probe) -> None:
    """A disabled key neither encrypts nor decrypts: 409 key_disabled."""
    key_id = server.create(thread_id)["key_id"]
    ciphertext = server.encrypt(key_id, MARK.encode())
    operator.post(f"/v1/keys/{key_id}/disable").ok()
    probe.refused(server.post("/encrypt", encrypt(key_id)), 409, "key_disabled")
    probe.refused(server.try_decrypt(key_id, ciphertext), 409, "key_disabled")


# query parameters, paths, headers


@pytest.mark.parametrize(
    "query",
    [
        "/get_wrapped",
        f"/get_wrapped?{MARK}={MARK}",
        f"/get_wrapped?key_id={UNKNOWN}&key_id={MARK}",
        f"/get_wrapped?key_id={UNKNOWN}&{MARK}=1",
        f"/v1/keys?limit={MARK}",
        f"/v1/keys?limit=0&thread_id={MARK}",
        "/v1/keys?limit=-1",
        "/v1/keys?limit=1001",
        "/v1/keys?limit=1e2",
        "/v1/keys?limit=99999999999999999999999",
        "/v1/keys?limit=%EF%BC%95",
        f"/v1/keys?cursor={MARK}",
        "/v1/keys?cursor=%00",
        f"/v1/keys?state={MARK}",
        f"/v1/keys?{MARK}=1",
        "/v1/keys?limit=1&limit=2",
        f"/v1/keys?state=enabled&thread_id={MARK}%ff",
    ],
)
def test_a_bad_query_parameter_is_400(operator: Client, probe: Probe, query: str) -> None:
    """Missing, unknown, repeated or ill-formed parameters: 400 invalid_parameter."""
    probe.refused(operator.get(query), 400, "invalid_parameter")


def test_a_list_of_an_invalid_thread_is_400(operator: Client, probe: Probe) -> None:
    """A thread id that no create would take is refused as a filter, too."""
    probe.refused(operator.get(f"/v1/keys?thread_id={MARK}%00"), 400, "invalid_thread_id")
    probe.refused(operator.get(f"/v1/keys?thread_id={MARK * 20}"), 400, "invalid_thread_id")


@pytest.mark.parametrize(
    "path", [f"/{MARK}", f"/v1/{MARK}/x", f"/encrypt/{MARK}", f"/%00{MARK}", f"//{MARK}"]
)
def test_an_unknown_path_is_not_echoed(server: Client, probe: Probe, path: str) -> None:
    """A path that is no route is 404 route_not_found and stays out of the answer and the log."""
    probe.refused(server.get(path), 404, "route_not_found")


@pytest.mark.parametrize("value", [f"{MARK} {MARK}", f"{MARK}<script>", MARK * 20, f"{MARK}\u00e9"])
def test_an_ill_formed_request_id_is_not_echoed(server: Client, key_id: str, value: str) -> None:
    """A request id that could forge a log line is refused or replaced by one of ours, never repeated."""
    answer = server.post("/encrypt", {"key_id": key_id, "plaintext": ""}, X_Request_Id=value)
    if answer.status != 200:
        assert_problem(answer, 400, "invalid_header")
    assert answer.headers["x-request-id"]
    assert MARK not in answer.headers["x-request-id"]
    assert MARK.encode() not in answer.body


def test_an_ill_formed_traceparent_does_not_harm(server: Client, key_id: str) -> None:
    """A traceparent that is none is ignored, as W3C Trace Context asks (section 3.2.2)."""
    answer = server.post("/encrypt", {"key_id": key_id, "plaintext": ""}, traceparent=f"00-{MARK}")
    assert answer.status == 200


def test_nothing_sent_by_this_module_is_in_the_log(probe: Probe) -> None:
    """The log so far holds no marker; the end of the module looks once more."""
    assert MARK not in probe.log()
