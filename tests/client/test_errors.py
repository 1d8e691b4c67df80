"""Answers that are errors, and what the caller gets for each."""

from __future__ import annotations

import re

import pytest

from progressdb_kms.client import (
    ConnectionFailed,
    KmsError,
    ProtocolViolation,
    RemoteError,
    TransportError,
    request_id_of,
)
from progressdb_kms.client.errors import REMOTE_CLASSES, ClientError, error_from
from progressdb_kms.client.plans import Plaintext
from progressdb_kms.client.protocol import Call, Reply, encode
from progressdb_kms.domain import errors as domain
from tests.client.faults import plain, raw, refuse
from tests.client.harness import Facade
from tests.client.standin import StandIn

TABLE = {
    400: "malformed_body duplicate_field invalid_field invalid_thread_id malformed_ciphertext "
    "invalid_parameter invalid_header kek_not_accepted",
    403: "certificate_expired",
    404: "key_not_found route_not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    408: "request_timeout",
    409: "key_disabled key_decrypt_only key_pending_destruction key_destroyed key_exhausted "
    "invalid_transition",
    413: "body_too_large plaintext_too_large batch_too_large",
    415: "unsupported_media_type",
    422: "authentication_failed wrapped_key_invalid",
    429: "too_many_requests",
    431: "headers_too_large",
    500: "internal_error",
    503: "store_unavailable store_not_durable kek_unavailable kek_unreachable overloaded deadline_exceeded"
    " not_ready",
}
CODES = [(status, code) for status, codes in TABLE.items() for code in codes.split()]


@pytest.mark.parametrize("status,code", CODES, ids=[code for _, code in CODES])
async def test_each_code_is_its_class(kms: Facade, standin: StandIn, status: int, code: str) -> None:
    """A problem becomes the error of its code, with the service's detail and the request's id."""
    standin.always = refuse(status, code)
    with pytest.raises(KmsError) as caught:
        await kms.encrypt_with_dek("k", b"m", headers={"X-Request-Id": "r-1"})
    assert type(caught.value) is domain.by_code()[code]
    assert caught.value.code == code
    assert caught.value.detail == f"detail of {code}"
    assert request_id_of(caught.value) == "r-1"


async def test_permission_denied_names_what_is_missing(kms: Facade, standin: StandIn) -> None:
    """The permission and the identity come along."""
    standin.always = refuse(403, "permission_denied", permission="key:encrypt", identity="dns:chat")
    with pytest.raises(domain.PermissionDenied) as caught:
        await kms.encrypt_with_dek("k", b"m")
    assert (caught.value.permission, caught.value.identity) == ("key:encrypt", "dns:chat")


async def test_an_unknown_code_is_kept(kms: Facade, standin: StandIn) -> None:
    """A newer service's code reaches the caller, and so does whether a retry helps."""
    standin.always = refuse(409, "key_on_holiday", retryable=True)
    with pytest.raises(RemoteError) as caught:
        await kms.encrypt_with_dek("k", b"m")
    assert caught.value.code == "key_on_holiday"
    assert caught.value.retryable
    assert caught.value.detail == "detail of key_on_holiday"


@pytest.mark.parametrize("code", ["connection_failed", "tls_failed", "kek_mismatch", "operator_error"])
def test_a_service_can_not_raise_the_clients_own_errors(code: str) -> None:
    """The client's and an operator's errors never come over the wire."""
    assert type(error_from(code, "d")) is RemoteError


def test_the_clients_codes_are_its_own() -> None:
    """No client-side class takes a code of the service's, by inheritance or by choice."""
    own = [cls for cls in domain._walk(KmsError) if issubclass(cls, ClientError)]
    codes = [cls.code for cls in own]
    assert len(set(codes)) == len(codes)
    assert not set(codes) & set(REMOTE_CLASSES)
    assert domain.by_code()["internal_error"] is domain.InternalError


def test_retryable_is_the_services_word() -> None:
    """It overrides the class's own."""
    assert not error_from("store_unavailable", "d", retryable=False).retryable
    assert error_from("store_unavailable", "d").retryable
    assert error_from("key_disabled", "d", retryable=True).retryable
    assert not domain.KeyDisabled.retryable


@pytest.mark.parametrize(
    "status,text,error",
    [
        (400, b"invalid base64", domain.InvalidField),
        (401, b"who are you", domain.PermissionDenied),
        (403, b"no", domain.PermissionDenied),
        (404, b"key not found", domain.KeyNotFound),
        (404, b"404 page not found\n", domain.RouteNotFound),
        (405, b"", domain.MethodNotAllowed),
        (409, b"no", domain.StateConflict),
        (413, b"", domain.BodyTooLarge),
        (422, b"", domain.AuthenticationFailed),
        (429, b"", domain.TooManyRequests),
        (500, b"boom", domain.InternalError),
        (500, b"cipher: message authentication failed", domain.AuthenticationFailed),
        (503, b"starting", domain.NotReady),
        (418, b"teapot", RemoteError),
        (302, b"", ProtocolViolation),
        (201, b"{}", ProtocolViolation),
    ],
)
async def test_a_plain_error_is_read_by_its_status(
    kms: Facade, standin: StandIn, status: int, text: bytes, error: type[KmsError]
) -> None:
    """The older service, or a proxy, answers text; its words are in the detail, with the status."""
    standin.always = plain(status, text)
    with pytest.raises(KmsError) as caught:
        await kms.decrypt_with_dek("k", b"m")
    assert type(caught.value) is error
    assert str(status) in caught.value.detail
    if status >= 400:
        assert text.decode().strip() in caught.value.detail


async def test_a_foreign_text_is_cut_and_cleaned(kms: Facade, standin: StandIn) -> None:
    """It can't forge lines of a log, or fill one."""
    standin.always = plain(418, b"a\r\nb\x1b[31m\xff" + b"x" * 9999)
    with pytest.raises(RemoteError) as caught:
        await kms.health()
    assert caught.value.code == "http_418"
    assert re.fullmatch(r"a  b \[31m\S+x+ \(status 418\)", caught.value.detail)
    assert len(caught.value.detail) < 600


@pytest.mark.parametrize(
    "content",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nnot json",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[1, 2, 3]",
        b'HTTP/1.1 200 OK\r\nContent-Length: 19\r\n\r\n{"plaintext": "a"} ',
        b'HTTP/1.1 200 OK\r\nContent-Length: 22\r\n\r\n{"ciphertext": "YWJj"}',
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/msgpack\r\nContent-Length: 1\r\n\r\n\xc1",
    ],
    ids=["no-http", "no-json", "wrong-type", "bad-base64", "wrong-field", "empty", "bad-msgpack"],
)
async def test_garbage_is_a_protocol_violation(kms: Facade, standin: StandIn, content: bytes) -> None:
    """An answer that can't be understood is said to be so, without its content."""
    standin.always = raw(content)
    with pytest.raises(ProtocolViolation) as caught:
        await kms.decrypt_with_dek("k", b"c" * 28)
    assert "YWJj" not in str(caught.value)
    assert "OpenSSH" not in str(caught.value)


async def test_unknown_members_are_ignored(kms: Facade, standin: StandIn) -> None:
    """The contract grows by addition."""
    standin.always = plain(200, b'{"plaintext": "YWJj", "new": {"deep": [1]}}')
    assert await kms.decrypt_with_dek("k", b"c" * 28) == b"abc"


def test_the_tree_is_as_drawn() -> None:
    """Callers catch TransportError for anything between them and the service."""
    assert issubclass(ConnectionFailed, TransportError)
    assert ConnectionFailed.retryable
    assert issubclass(TransportError, ClientError)
    assert issubclass(ClientError, KmsError)


async def test_headers_travel(kms: Facade, standin: StandIn) -> None:
    """Traceparent and a request id of the caller's are sent; the client names itself."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await kms.health(headers={"traceparent": trace, "X-Request-Id": "mine"})
    headers = standin.seen[0].headers
    assert headers["traceparent"] == trace
    assert headers["x-request-id"] == "mine"
    assert headers["user-agent"].startswith("progressdb-kms-client/")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "other"},
        {"Content-Length": "0"},
        {"X-A": "a\r\nX-B: b"},
        {"X A": "a"},
        {"idempotency-key": "a"},
    ],
)
async def test_headers_of_the_clients_own_are_refused(kms: Facade, standin: StandIn, headers) -> None:
    """Nothing can be smuggled through them."""
    with pytest.raises(domain.InvalidHeader):
        await kms.health(headers=headers)
    assert standin.seen == []


@pytest.mark.parametrize("token", ["", "a\nb", "é"])
async def test_an_idempotency_key_that_is_no_header_is_refused(kms: Facade, standin: StandIn, token) -> None:
    """Before anything is sent."""
    with pytest.raises(domain.InvalidHeader):
        await kms.create_dek_for_thread("t", idempotency_key=token)
    assert standin.seen == []


def test_requests_and_answers_hide_their_content() -> None:
    """What a traceback or a log may show of them holds no plaintext, ciphertext or wrapped key."""
    call = Call("POST", "/encrypt", Plaintext, {"key_id": "k", "plaintext": b"SECRET"})
    shown = [call, encode(call, "json", {}), Reply(200, {}, b"SECRET"), Plaintext(b"SECRET")]
    assert "SECRET" not in repr(shown)
    assert "U0VDUkVU" not in repr(shown)
