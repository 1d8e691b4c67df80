"""Who is refused, where, and that the operator can see it: handshake, certificate, permission."""

from __future__ import annotations

import datetime as dt
import json
import re
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from tests.contract.certificates import HOUR, SERVER, Issuer, identity_of, issuer_of, new_authority, subject
from tests.contract.dev_service import DevService
from tests.contract.wire_client import (
    TIMEOUT,
    Client,
    RawConnection,
    assert_item_error,
    assert_problem,
    b64,
    tls_context,
)

PATIENCE = 60.0
"""Seconds until a counter or a log line that the service writes after the fact must be there."""


@pytest.fixture
def issuer(service: DevService, tmp_path: Path) -> Issuer:
    """Give what issues certificates that the service trusts."""
    return issuer_of(service, tmp_path)


def refusals(admin: Client) -> dict[str, float]:
    """Return the handshake refusals counted so far, by reason."""
    text = admin.get("/metrics").body.decode()
    found = re.findall(r'^kms_tls_handshake_refusals_total\{reason="([^"]+)"\} (\S+)$', text, re.MULTILINE)
    return {reason: float(count) for reason, count in found}


def eventually(holds: Callable[[], bool]) -> bool:
    """Wait until `holds` does: the service counts and logs after the client has seen its refusal."""
    limit = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def knock(service: DevService, context: ssl.SSLContext) -> tuple[int, bytes]:
    """Connect, ask for /healthz, and return the local port and what came back until the connection ended.

    In TLS 1.3 a client thinks that it is through before the server has looked at its certificate, so
    only reading shows the refusal.
    """
    received = b""
    with socket.create_connection((service.host, service.port), timeout=TIMEOUT) as plain:
        port: int = plain.getsockname()[1]
        try:
            with context.wrap_socket(plain, server_hostname=service.host) as tls:
                tls.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                while data := tls.recv(65536):
                    received += data
        except (ssl.SSLError, ConnectionError):
            pass
    return port, received


def assert_refused_in_handshake(service: DevService, admin: Client, context: ssl.SSLContext) -> str:
    """Assert that no HTTP comes back, one refusal is counted and its peer logged; return its reason."""
    before = refusals(admin)
    port, received = knock(service, context)
    assert received == b""
    assert eventually(lambda: sum(refusals(admin).values()) >= sum(before.values()) + 1)
    after = refusals(admin)
    grown = [reason for reason, count in after.items() if count != before.get(reason, 0)]
    assert len(grown) == 1
    assert after[grown[0]] == before.get(grown[0], 0) + 1

    ports = [port]

    def logged() -> bool:
        lines = service.log_text().splitlines()
        if any(
            re.search(rf"(127\.0\.0\.1|::1)\D{{1,20}}({'|'.join(map(str, ports))})\b", line) for line in lines
        ):
            return True
        # One line a second for each reason and host: it may have been another's turn.
        ports.append(knock(service, context)[0])
        return False

    assert eventually(logged), f"no line of the log names one of the peer's ports {ports}"
    # Whoever counts next must not be told of these.
    assert eventually(lambda: sum(refusals(admin).values()) >= sum(before.values()) + len(ports))
    return grown[0]


def context_with(service: DevService, files: tuple[Path, Path] | None) -> ssl.SSLContext:
    """Return a context that trusts the service and presents these files."""
    cert, key = files or (None, None)
    return tls_context(Path(service.ready["ca"]), cert, key)


# the handshake


def test_a_flawless_certificate_of_the_issuer_gets_in(service: DevService, issuer: Issuer) -> None:
    """The control: what these tests issue is refused for its flaw and nothing else."""
    _, received = knock(service, context_with(service, issuer.issue()))
    assert received.startswith(b"HTTP/1.1 ")


def test_no_certificate_is_refused(service: DevService, admin: Client) -> None:
    """A client without a certificate does not get through the handshake."""
    assert_refused_in_handshake(service, admin, context_with(service, None))


def test_another_ca_is_refused(service: DevService, admin: Client, issuer: Issuer) -> None:
    """A certificate of a CA that the service doesn't trust."""
    other = new_authority(subject("another authority"))
    assert_refused_in_handshake(service, admin, context_with(service, issuer.issue(by=other)))


def test_a_ca_of_the_trusted_name_is_refused(service: DevService, admin: Client, issuer: Issuer) -> None:
    """A CA that has only the trusted one's name: what counts is the signature."""
    impostor = new_authority(issuer.authority.cert.subject)
    assert_refused_in_handshake(service, admin, context_with(service, issuer.issue(by=impostor)))


def test_a_self_signed_certificate_is_refused(service: DevService, admin: Client, issuer: Issuer) -> None:
    """A certificate that vouches for itself."""
    assert_refused_in_handshake(service, admin, context_with(service, issuer.issue(self_signed=True)))


def test_an_expired_certificate_is_refused(service: DevService, admin: Client, issuer: Issuer) -> None:
    """A certificate of the right CA that has expired."""
    now = dt.datetime.now(dt.UTC)
    files = issuer.issue(not_before=now - 3 * HOUR, not_after=now - HOUR)
    assert_refused_in_handshake(service, admin, context_with(service, files))


def test_a_certificate_of_the_future_is_refused(service: DevService, admin: Client, issuer: Issuer) -> None:
    """A certificate of the right CA that is not valid yet."""
    now = dt.datetime.now(dt.UTC)
    files = issuer.issue(not_before=now + HOUR, not_after=now + 3 * HOUR)
    assert_refused_in_handshake(service, admin, context_with(service, files))


def test_a_certificate_for_servers_only_is_refused(
    service: DevService, admin: Client, issuer: Issuer
) -> None:
    """A certificate whose extended key usage lacks clientAuth."""
    assert_refused_in_handshake(service, admin, context_with(service, issuer.issue(usages=[SERVER])))


def test_tls_1_2_is_refused(service: DevService, admin: Client) -> None:
    """A valid client that speaks no more than TLS 1.2."""
    files = service.ready["clients"]["server"]
    context = context_with(service, (Path(files["cert"]), Path(files["key"])))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert_refused_in_handshake(service, admin, context)


def test_plain_http_on_the_tls_port_is_refused(service: DevService, admin: Client) -> None:
    """Plain HTTP gets no HTTP answer, and is counted."""
    before = sum(refusals(admin).values())
    with socket.create_connection((service.host, service.port), timeout=TIMEOUT) as plain:
        plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""
        try:
            while data := plain.recv(4096):
                received += data
        except ConnectionError:
            pass
    assert b"HTTP/" not in received
    assert eventually(lambda: sum(refusals(admin).values()) == before + 1)


def test_reasons_tell_the_refusals_apart(service: DevService, admin: Client, issuer: Issuer) -> None:
    """No certificate, an unknown CA and an expired certificate are counted under three reasons."""
    now = dt.datetime.now(dt.UTC)
    expired = issuer.issue(not_before=now - 3 * HOUR, not_after=now - HOUR)
    unknown = issuer.issue(by=new_authority(subject("another authority")))
    contexts = [context_with(service, files) for files in (None, expired, unknown)]
    assert len({assert_refused_in_handshake(service, admin, context) for context in contexts}) == 3


def test_tls_1_3_and_http_1_1_are_what_is_spoken(service: DevService) -> None:
    """The connection is TLS 1.3, ALPN http/1.1, though the client would take HTTP/2."""
    files = service.ready["clients"]["server"]
    context = context_with(service, (Path(files["cert"]), Path(files["key"])))
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection((service.host, service.port), timeout=TIMEOUT) as plain,
        context.wrap_socket(plain, server_hostname=service.host) as tls,
    ):
        assert tls.version() == "TLSv1.3"
        assert tls.selected_alpn_protocol() == "http/1.1"


def test_no_session_can_be_resumed(service: DevService) -> None:
    """The service gives no session tickets, so no connection outlives a revocation by one."""
    connection = RawConnection(service.tls("server"))
    with connection:
        connection.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.must_answer().status == 200
        assert isinstance(connection.socket, ssl.SSLSocket)
        session = connection.socket.session
        assert session is None or not session.has_ticket


def answered(service: DevService, files: tuple[Path, Path]) -> bytes:
    """Return what a client with these files gets for GET /healthz."""
    return knock(service, context_with(service, files))[1]


@pytest.mark.parametrize(
    "sans",
    [
        [x509.UniformResourceIdentifier("spiffe://dev/a"), x509.UniformResourceIdentifier("spiffe://dev/b")],
        [x509.DNSName("a.test"), x509.DNSName("b.test")],
    ],
    ids=["two-spiffe", "two-dns"],
)
def test_an_ambiguous_identity_is_refused(
    service: DevService, issuer: Issuer, sans: list[x509.GeneralName]
) -> None:
    """Several names of the type that identifies are nobody's: no request of theirs is served."""
    answer = answered(service, issuer.issue(sans=sans))
    assert b" 200 " not in answer.partition(b"\r\n")[0]


def test_a_certificate_without_key_usage_is_refused(service: DevService, issuer: Issuer) -> None:
    """A certificate that doesn't say clientAuth at all is no client's certificate."""
    answer = answered(service, issuer.issue(usages=[]))
    assert b" 200 " not in answer.partition(b"\r\n")[0]


# expiry while connected


def test_a_certificate_that_expires_on_a_connection_is_cut_off(
    service: DevService, issuer: Issuer, thread_id: str
) -> None:
    """A connection that was good before ends with its certificate, and no new one is made."""
    server_cert = x509.load_pem_x509_certificate(
        Path(service.ready["clients"]["server"]["cert"]).read_bytes()
    )
    sans = None
    for extension in server_cert.extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            sans = list(extension.value)
    common = str(server_cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    ends = dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(seconds=6)
    cert, key = issuer.issue(common=common, sans=sans, not_after=ends)
    client = Client(service.tls_with(cert, key), service.host)
    try:
        client.create(thread_id)
        while dt.datetime.now(dt.UTC) < ends + dt.timedelta(seconds=1.1):
            time.sleep(0.05)
        with pytest.raises(OSError, match=r".*"):
            client.post("/create_dek_for_thread", {"thread_id": thread_id})
    finally:
        client.close()


# permissions


@pytest.mark.parametrize(
    "method, path, body, permission",
    [
        ("POST", "/create_dek_for_thread", {"thread_id": "t"}, "key:create"),
        ("POST", "/encrypt", {"key_id": "{key}", "plaintext": "AA=="}, "key:encrypt"),
        ("POST", "/decrypt", {"key_id": "{key}", "ciphertext": b64(bytes(40))}, "key:decrypt"),
        ("GET", "/get_wrapped?key_id={key}", None, "key:read"),
        ("POST", "/rewrap", {"key_id": "{key}"}, "key:admin"),
        ("GET", "/v1/keys", None, "key:read"),
        ("GET", "/v1/keys/{key}", None, "key:read"),
        ("POST", "/v1/keys/{key}/disable", None, "key:admin"),
        ("POST", "/v1/keys/{key}/enable", None, "key:admin"),
        ("POST", "/v1/keys/{key}/schedule-destruction", None, "key:destroy"),
        ("POST", "/v1/keys/{key}/cancel-destruction", None, "key:destroy"),
        ("GET", "/v1/keks", None, "key:read"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("/") else None,
)
def test_a_stranger_is_told_which_permission_is_missing(
    service: DevService,
    stranger: Client,
    key_id: str,
    method: str,
    path: str,
    body: dict[str, str] | None,
    permission: str,
) -> None:
    """A valid certificate without a grant: 403 naming the permission and the identity, on every route."""
    path = path.replace("{key}", key_id)
    if method == "POST":
        filled = body and {field: value.replace("{key}", key_id) for field, value in body.items()}
        answer = stranger.post(path, filled)
    else:
        answer = stranger.get(path)
    problem = assert_problem(answer, 403, "permission_denied")
    assert problem["permission"] == permission
    assert problem["identity"] == identity_of(Path(service.ready["clients"]["stranger"]["cert"]))
    assert not problem["retryable"]


def test_a_stranger_cannot_tell_a_key_from_none(stranger: Client, key_id: str) -> None:
    """Without a grant an unknown key is 403, too, or the answer would say which keys exist."""
    for key in (key_id, "k_" + "A" * 28):
        answer = stranger.post("/encrypt", {"key_id": key, "plaintext": "AA=="})
        assert_problem(answer, 403, "permission_denied")


@pytest.mark.parametrize(
    "path, item",
    [
        ("/create_dek_batch", {"thread_id": "t"}),
        ("/encrypt_batch", {"key_id": "k_" + "A" * 28, "plaintext": "AA=="}),
        ("/decrypt_batch", {"key_id": "k_" + "A" * 28, "ciphertext": b64(bytes(40))}),
    ],
)
def test_a_strangers_batch_is_refused(stranger: Client, path: str, item: dict[str, str]) -> None:
    """A batch without a grant does nothing, be it refused whole or item by item."""
    answer = stranger.post(path, {"items": [item]})
    if answer.status == 200:
        assert_item_error(answer.ok()["results"][0], "permission_denied")
    else:
        assert_problem(answer, 403, "permission_denied")


def test_the_unix_sockets_peer_is_its_uid(open_client: Callable[[str], Client], key_id: str) -> None:
    """Over the Unix socket the identity is uid:<n>, named in the refusal of what only operators may do."""
    answer = open_client("unix").post(f"/v1/keys/{key_id}/disable")
    problem = assert_problem(answer, 403, "permission_denied")
    assert problem["identity"] == f"uid:{Path('/proc/self').stat().st_uid}"


def test_a_refusal_is_logged_with_who_and_which_trace(service: DevService, stranger: Client) -> None:
    """A refused permission is written down with the identity that lacked it, request id and traceparent."""
    sent, trace = f"refused-{secrets.token_hex(8)}", secrets.token_hex(16)
    headers = {"X_Request_Id": sent, "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    identity = identity_of(Path(service.ready["clients"]["stranger"]["cert"]))

    def logged() -> bool:
        # Of refusals like this one a second, by whichever test, one is logged.
        stranger.post("/create_dek_for_thread", {"thread_id": "t"}, **headers)
        lines = service.log_text().splitlines()
        return any(sent in line and trace in line and identity in line for line in lines)

    assert eventually(logged)


def test_json_logs_are_a_record_a_line(tuned: DevService) -> None:
    """With log.format json a refusal is one JSON object with its fields by name."""
    sent = f"refused-{secrets.token_hex(8)}"

    def logged() -> bool:
        client = tuned.client("stranger")
        try:
            client.post("/create_dek_for_thread", {"thread_id": "t"}, X_Request_Id=sent)
        finally:
            client.close()
        records = [json.loads(line) for line in tuned.log_text().splitlines() if sent in line]
        return any({"event", "identity", "permission"} <= record.keys() for record in records)

    assert eventually(logged)


# grants for some threads only


@pytest.fixture
def narrow(tuned: DevService, tmp_path: Path) -> Iterator[Client]:
    """Give a client that is granted threads beginning with `room:` alone."""
    files = issuer_of(tuned, tmp_path).issue(sans=[x509.DNSName("narrow")])
    client = Client(tuned.tls_with(*files), tuned.host)
    yield client
    client.close()


def test_inside_the_granted_prefix_all_works(narrow: Client) -> None:
    """Create, encrypt, decrypt, read and list work for a thread inside the prefix."""
    key_id = narrow.create("room:1")["key_id"]
    assert narrow.decrypt(key_id, narrow.encrypt(key_id, b"m")) == b"m"
    narrow.get("/get_wrapped", {"key_id": key_id}).ok()
    shown = narrow.get("/v1/keys", {"thread_id": "room:1"}).ok()["keys"]
    assert key_id in {key["key_id"] for key in shown}


@pytest.mark.parametrize("thread", ["other:1", "room", "roomy:1", "Room:1", " room:1"])
def test_outside_the_granted_prefix_is_403(narrow: Client, tuned: DevService, thread: str) -> None:
    """A thread outside the prefix: 403 on every route, naming permission and identity."""
    outsider = tuned.client("operator")
    try:
        key_id = outsider.create(thread)["key_id"]
        ciphertext = outsider.encrypt(key_id, b"m")
    finally:
        outsider.close()
    attempts = {
        "key:create": [narrow.post("/create_dek_for_thread", {"thread_id": thread})],
        "key:encrypt": [narrow.post("/encrypt", {"key_id": key_id, "plaintext": "AA=="})],
        "key:decrypt": [narrow.try_decrypt(key_id, ciphertext)],
        "key:read": [
            narrow.get("/get_wrapped", {"key_id": key_id}),
            narrow.get(f"/v1/keys/{key_id}"),
            narrow.get("/v1/keys", {"thread_id": thread}),
        ],
        "key:admin": [narrow.post("/rewrap", {"key_id": key_id}), narrow.post(f"/v1/keys/{key_id}/disable")],
        "key:destroy": [narrow.post(f"/v1/keys/{key_id}/schedule-destruction")],
    }
    for permission, answers in attempts.items():
        for answer in answers:
            problem = assert_problem(answer, 403, "permission_denied")
            assert (problem["permission"], problem["identity"]) == (permission, "dns:narrow")


def test_a_list_shows_the_granted_threads_alone(narrow: Client, tuned: DevService) -> None:
    """Without a filter the list is refused, or holds no key outside the prefix on any page."""
    outsider = tuned.client("operator")
    try:
        outsider.create("other:3")
    finally:
        outsider.close()
    narrow.create("room:3")
    cursor: str | None = None
    threads: set[str] = set()
    while True:
        answer = narrow.get("/v1/keys", {"limit": "2"} | ({"cursor": cursor} if cursor else {}))
        if answer.status == 403:
            assert_problem(answer, 403, "permission_denied")
            return
        threads |= {key["thread_id"] for key in answer.ok()["keys"]}
        cursor = answer.ok()["cursor"]
        if not cursor:
            break
    assert "room:3" in threads
    assert all(thread.startswith("room:") for thread in threads)


def test_a_batch_is_narrowed_item_by_item(narrow: Client, tuned: DevService) -> None:
    """In a batch the items outside the prefix are refused and the others served."""
    inside, outside = narrow.post(
        "/create_dek_batch", {"items": [{"thread_id": "room:2"}, {"thread_id": "other:2"}]}
    ).ok()["results"]
    assert_item_error(outside, "permission_denied")
    foreign = tuned.client("operator")
    try:
        other = foreign.create("other:2")["key_id"]
    finally:
        foreign.close()
    items = [{"key_id": key, "plaintext": "AA=="} for key in (other, inside["key_id"])]
    refused, served = narrow.post("/encrypt_batch", {"items": items}).ok()["results"]
    assert_item_error(refused, "permission_denied")
    assert set(served) == {"ciphertext", "key_version"}
