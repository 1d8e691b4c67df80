"""Development certificates, checked by `ssl` itself with the strict rules of Python 3.13."""

from __future__ import annotations

import datetime as dt
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509

from progressdb_kms.cli.pki import Issued, init_ca, is_usable, issue
from progressdb_kms.domain.errors import TlsInvalid

STRICT = ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    """A directory with a CA."""
    init_ca(tmp_path / "pki")
    return tmp_path / "pki"


def handshake(pki: Path, server: Issued, client: Issued, name: str) -> dict[str, object]:
    """Connect client and server, both strict, and return the client's certificate as the server saw it."""
    contexts = []
    for purpose, own in ((ssl.Purpose.CLIENT_AUTH, server), (ssl.Purpose.SERVER_AUTH, client)):
        context = ssl.create_default_context(purpose, cafile=str(pki / "ca.crt"))
        context.load_cert_chain(own.cert, own.key)
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= STRICT
        contexts.append(context)
    one, other = socket.socketpair()
    seen: list[object] = []

    def serve() -> None:
        try:
            with contexts[0].wrap_socket(one, server_side=True) as stream:
                seen.append(stream.getpeercert())
                stream.sendall(b"x")
        except OSError as error:
            seen.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with contexts[1].wrap_socket(other, server_hostname=name) as stream:
            stream.recv(1)
    finally:
        other.close()
        thread.join()
    if isinstance(seen[0], OSError):
        raise seen[0]
    assert isinstance(seen[0], dict)
    return seen[0]


def test_certificates_pass_strict_verification(pki: Path) -> None:
    """A server and a client of this CA accept each other; the client's name is its DNS SAN."""
    server = issue(pki, "kms", server=True, dns=["localhost"], ips=["127.0.0.1", "::1"])
    client = issue(pki, "chat.default.svc")
    for name in ("localhost", "127.0.0.1", "::1"):
        seen = handshake(pki, server, client, name)
        assert seen["subjectAltName"] == (("DNS", "chat.default.svc"),)


def test_a_server_without_names_has_its_own(pki: Path) -> None:
    """Without --dns and --ip the name itself is the server's DNS name, and no other passes."""
    server, client = issue(pki, "kms", server=True), issue(pki, "chat")
    handshake(pki, server, client, "kms")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(pki, server, client, "localhost")


def test_a_client_is_no_server_and_a_server_no_client(pki: Path) -> None:
    """The extended key usage keeps the two apart."""
    server, client = issue(pki, "kms", server=True), issue(pki, "chat")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(pki, client, client, "chat")
    with pytest.raises(ssl.SSLError):
        handshake(pki, server, server, "kms")


def test_modes(pki: Path) -> None:
    """Private keys are their owner's alone; certificates are for all."""
    issued = issue(pki, "chat")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in pki.iterdir()}
    assert modes == {"ca.crt": 0o644, "ca.key": 0o600, "chat.crt": 0o644, "chat.key": 0o600}
    assert issued.not_after > dt.datetime.now(dt.UTC) + dt.timedelta(days=89)


def test_extensions(pki: Path) -> None:
    """Both have the extensions of RFC 5280 with their criticality."""
    issue(pki, "chat")
    for name, is_ca in (("ca.crt", True), ("chat.crt", False)):
        cert = x509.load_pem_x509_certificate((pki / name).read_bytes())
        basic = cert.extensions.get_extension_for_class(x509.BasicConstraints)
        usage = cert.extensions.get_extension_for_class(x509.KeyUsage)
        assert (basic.critical, basic.value.ca) == (True, is_ca)
        assert (usage.critical, usage.value.key_cert_sign, usage.value.digital_signature) == (
            True,
            is_ca,
            not is_ca,
        )
        own = cert.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
        issuer = cert.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        assert (own == issuer) == is_ca


def test_never_overwrites_a_ca(pki: Path) -> None:
    """A second init changes neither file."""
    before = [(pki / name).read_bytes() for name in ("ca.crt", "ca.key")]
    with pytest.raises(TlsInvalid, match="never overwritten"):
        init_ca(pki)
    assert [(pki / name).read_bytes() for name in ("ca.crt", "ca.key")] == before


def test_takes_up_the_key_of_an_interrupted_init(pki: Path) -> None:
    """Where only the key was written, the certificate is made for that key."""
    before = (pki / "ca.key").read_bytes()
    (pki / "ca.crt").unlink()
    init_ca(pki)
    assert (pki / "ca.key").read_bytes() == before
    issue(pki, "chat")
    assert is_usable(pki, "chat", within=dt.timedelta(0))


def test_issue_replaces_a_leaf(pki: Path) -> None:
    """A second issue gives a new pair and leaves no other file."""
    first = issue(pki, "chat").cert.read_bytes()
    assert issue(pki, "chat").cert.read_bytes() != first
    assert sorted(path.name for path in pki.iterdir()) == ["ca.crt", "ca.key", "chat.crt", "chat.key"]


@pytest.mark.parametrize(
    "name", ["ca", "", "../x", "a/b", "A", "a..b", ".a", "a.", "-a", "x" * 65, "a\nb", "é"]
)
def test_names_that_can_not_be_one_are_refused(pki: Path, name: str) -> None:
    """A name is a DNS name and a file's name; the CA's own is taken."""
    with pytest.raises(TlsInvalid, match="name is 1 to 64"):
        issue(pki, name)
    assert sorted(path.name for path in pki.iterdir()) == ["ca.crt", "ca.key"]


def test_what_a_server_can_not_be_called(pki: Path) -> None:
    """Bad names and addresses are refused, and a client has none but its own."""
    with pytest.raises(TlsInvalid, match="DNS name"):
        issue(pki, "kms", server=True, dns=["a b"])
    with pytest.raises(TlsInvalid, match="IP address"):
        issue(pki, "kms", server=True, ips=["300.1.1.1"])
    with pytest.raises(TlsInvalid, match="--server"):
        issue(pki, "chat", dns=["localhost"])


def test_a_leaf_never_outlives_its_ca(tmp_path: Path) -> None:
    """The expiry is cut to the CA's."""
    ca = init_ca(tmp_path, days=10)
    assert issue(tmp_path, "chat", days=90).not_after == ca.not_after


@pytest.mark.parametrize(
    "damage", ["missing", "garbage", "key missing", "other key", "expired", "key garbage"]
)
def test_an_unusable_ca_is_named(pki: Path, tmp_path: Path, damage: str) -> None:
    """Each way in which a CA can be broken is told in one line."""
    crt, key = pki / "ca.crt", pki / "ca.key"
    if damage == "missing":
        crt.unlink()
    elif damage == "garbage":
        crt.write_text("x")
    elif damage == "key missing":
        key.unlink()
    elif damage == "other key":
        key.write_bytes(init_ca(tmp_path / "other").key.read_bytes())
    elif damage == "expired":
        crt.unlink()
        init_ca(pki, days=0)
    else:
        key.write_text("x")
    with pytest.raises(TlsInvalid, match=r"ca\.crt|ca\.key") as caught:
        issue(pki, "chat")
    assert "\n" not in str(caught.value)


def test_is_usable_finds_what_has_to_be_made_anew(pki: Path, tmp_path: Path) -> None:
    """Missing, expiring, mismatched or foreign certificates are not usable."""
    day = dt.timedelta(days=1)
    assert not is_usable(pki, "chat", within=day)
    issue(pki, "chat", days=1)
    assert not is_usable(pki, "chat", within=day)
    issue(pki, "chat", days=2)
    assert is_usable(pki, "chat", within=day)
    (pki / "chat.key").write_bytes(issue(pki, "other").key.read_bytes())
    assert not is_usable(pki, "chat", within=day)
    init_ca(tmp_path / "foreign")
    issue(tmp_path / "foreign", "chat")
    for suffix in ("crt", "key"):
        (pki / f"chat.{suffix}").write_bytes((tmp_path / "foreign" / f"chat.{suffix}").read_bytes())
    assert not is_usable(pki, "chat", within=day)
