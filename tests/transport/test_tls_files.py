from __future__ import annotations

import datetime as dt
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from progressdb_kms.domain.errors import TlsInvalid
from progressdb_kms.settings import Tls
from progressdb_kms.transport.tls import build_context
from tests.transport import pki
from tests.transport.pki import Ca, client_context, shared_ca

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.conftest import Serve

HOUR = dt.timedelta(hours=1)


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    """Return a good set of files."""
    cert, key = shared_ca().server().write(tmp_path, "server")
    client_ca = tmp_path / "ca.pem"
    client_ca.write_bytes(shared_ca().pem)
    return Tls(cert=cert, key=key, client_ca=client_ca)


def test_facts(tls: Tls) -> None:
    """Names, expiry and fingerprints of what was loaded are known."""
    second = Ca("second CA", not_after=pki.NOW + 3 * HOUR)
    with tls.client_ca.open("ab") as file:
        file.write(second.pem)
    _, facts, _ = build_context(tls)
    assert (facts.subject, facts.names) == ("CN=server", ("localhost", "127.0.0.1"))
    assert facts.not_after == (pki.NOW + 2 * pki.DAY).timestamp()
    assert len(facts.fingerprint) == 64
    assert [ca.subject for ca in facts.client_cas] == ["CN=test CA", "CN=second CA"]
    assert facts.client_cas[1].not_after == (pki.NOW + 3 * HOUR).timestamp()


def test_a_chain_and_a_key_file_without_newlines(tls: Tls) -> None:
    """Files that do not end in a newline, and a chain of several certificates, are loaded."""
    tls.cert.write_bytes((tls.cert.read_bytes() + shared_ca().pem).rstrip())
    tls.key.write_bytes(tls.key.read_bytes().rstrip())
    build_context(tls)


def _encrypt(tls: Tls) -> None:
    key, issued = tls.key, shared_ca().server()
    tls.cert.write_bytes(issued.pem)
    key.write_bytes(
        issued.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    )


def _server(
    tls: Tls, not_before: dt.datetime = pki.NOW - pki.DAY, not_after: dt.datetime = pki.NOW + pki.DAY
) -> None:
    sans = (x509.DNSName("localhost"),)
    issued = shared_ca().issue("server", sans, pki.SERVER, not_before=not_before, not_after=not_after)
    tls.cert.write_bytes(issued.pem)
    tls.key.write_bytes(issued.key_pem)


def _client_as_server(tls: Tls) -> None:
    issued = shared_ca().client()
    tls.cert.write_bytes(issued.pem)
    tls.key.write_bytes(issued.key_pem)


def _weak(tls: Tls) -> None:
    key = rsa.generate_private_key(65537, 1024)  # noqa: S505 - that it is refused is the test
    issued = shared_ca().issue("server", (x509.DNSName("localhost"),), pki.SERVER, key=key)
    tls.cert.write_bytes(issued.pem)
    tls.key.write_bytes(issued.key_pem)


BROKEN: dict[str, tuple[str, str, Callable[[Tls], object]]] = {
    "no certificate": ("cert", "can't read", lambda tls: tls.cert.unlink()),
    "no key": ("key", "can't read", lambda tls: tls.key.unlink()),
    "no CA": ("client_ca", "can't read", lambda tls: tls.client_ca.unlink()),
    "empty certificate": ("cert", "no certificate in PEM", lambda tls: tls.cert.write_bytes(b"")),
    "damaged CA": (
        "client_ca",
        "no certificate in PEM",
        lambda tls: tls.client_ca.write_bytes(shared_ca().pem[:300]),
    ),
    "key as CA": (
        "client_ca",
        "no certificate in PEM",
        lambda tls: tls.client_ca.write_bytes(tls.key.read_bytes()),
    ),
    "damaged key": (
        "key",
        "no private key in PEM",
        lambda tls: tls.key.write_bytes(tls.key.read_bytes()[:60]),
    ),
    "open key": ("key", "mode 0644", lambda tls: tls.key.chmod(0o644)),
    "encrypted key": ("key", "is encrypted", _encrypt),
    "another's key": (
        "key",
        "is not the key of",
        lambda tls: tls.key.write_bytes(shared_ca().server().key_pem),
    ),
    "weak key": ("cert", "EE_KEY_TOO_SMALL", _weak),
    "expired": ("cert", "expired on", lambda tls: _server(tls, not_after=pki.NOW - HOUR)),
    "early": ("cert", "not valid before", lambda tls: _server(tls, not_before=pki.NOW + HOUR)),
    "client's": ("cert", "not for servers", _client_as_server),
    "leaf as CA": (
        "client_ca",
        "not a CA: CN=x",
        lambda tls: tls.client_ca.write_bytes(shared_ca().issue("x").pem),
    ),
    "expired CA": (
        "client_ca",
        "every CA in it has expired",
        lambda tls: tls.client_ca.write_bytes(Ca(not_after=pki.NOW - HOUR).pem),
    ),
}


@pytest.mark.parametrize("name,why,spoil", BROKEN.values(), ids=BROKEN)
def test_broken_sets(tls: Tls, name: str, why: str, spoil: Callable[[Tls], object]) -> None:
    """Each mistake is one line that names the file and says what is wrong, without its content."""
    spoil(tls)
    with pytest.raises(TlsInvalid) as refused:
        build_context(tls)
    assert why in refused.value.detail
    assert str(getattr(tls, name)) in refused.value.detail
    assert "\n" not in refused.value.detail
    assert "PRIVATE" not in refused.value.detail


def openssl(folder: Path, *arguments: str) -> None:
    """Run openssl, which operators make certificates with."""
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=30)


async def test_certificates_made_by_openssl(serve: Serve, tmp_path: Path) -> None:
    """A CA and a client certificate made with openssl's defaults pass the strict verification."""
    running = await serve()
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(
        tmp_path,
        "req",
        "-x509",
        *key,
        "-keyout",
        "own.key",
        "-out",
        "own.pem",
        "-subj",
        "/CN=own",
        "-days",
        "2",
    )
    openssl(tmp_path, "req", *key, "-keyout", "c.key", "-out", "c.csr", "-subj", "/CN=made-by-openssl")
    (tmp_path / "ext").write_text("extendedKeyUsage=clientAuth\nauthorityKeyIdentifier=keyid\n")
    signing = ("-CA", "own.pem", "-CAkey", "own.key", "-CAcreateserial", "-extfile", "ext", "-days", "2")
    openssl(tmp_path, "x509", "-req", "-in", "c.csr", "-out", "c.pem", *signing)
    running.files.client_ca.write_bytes((tmp_path / "own.pem").read_bytes())
    assert await running.tls.reload()
    context = client_context(running.ca, None, tmp_path)
    context.load_cert_chain(tmp_path / "c.pem", tmp_path / "c.key")
    peer = await running.connect(None, context=context)
    assert (await peer.get("/who")).json["identity"] == "cn:made-by-openssl"
