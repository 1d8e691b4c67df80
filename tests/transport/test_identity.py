from __future__ import annotations

import hashlib
from contextlib import suppress

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.transport.identity import IdentityRefused, identity_of
from tests.transport import pki
from tests.transport.pki import common_name, shared_ca

URI, DNS = x509.UniformResourceIdentifier, x509.DNSName
SPIFFE = URI("spiffe://cluster.local/ns/chat/sa/server")

NAMES = {
    "spiffe before dns": ("spiffe://cluster.local/ns/chat/sa/server", "cn", (DNS("a.svc"), SPIFFE)),
    "dns before cn": ("dns:a.svc", "cn", (DNS("a.svc"),)),
    "dns lower-cased": ("dns:chat.svc", "", (DNS("Chat.SVC"),)),
    "other URIs ignored": ("dns:a.svc", "", (URI("https://a/"), URI("https://b/"), DNS("a.svc"))),
    "cn": ("cn:Chat Server", "Chat Server", ()),
    "cn beside an IP": ("cn:chat", "chat", (x509.RFC822Name("a@b"),)),
    "cn like a uid": ("cn:uid:0", "uid:0", ()),
    "cn like a spiffe": ("cn:spiffe://x/y", "spiffe://x/y", ()),
    "longest dns": ("dns:" + "a" * 255, "", (DNS("a" * 255),)),
}

REFUSED = {
    "two spiffe": ("", (SPIFFE, URI("spiffe://b/c"))),
    "spiffe and another URI": ("", (SPIFFE, URI("https://a/"))),
    "two dns, though equal": ("", (DNS("a.svc"), DNS("a.svc"))),
    "two dns, though a cn": ("cn", (DNS("a.svc"), DNS("b.svc"))),
    "two cn": (common_name("a", "b"), ()),
    "no name": (pki.organization("o"), ()),
    "empty dns": ("cn", (DNS(""),)),
    "NUL": ("", (DNS("a.svc\0.evil"),)),
    "newline": ("a\nb", ()),
    "right-to-left mark": ("a\u202eb", ()),
    "no-break space": ("a\u00a0b", ()),
    "over-long": ("", (DNS("a" * 256),)),
}


@pytest.mark.parametrize("expected,subject,sans", NAMES.values(), ids=NAMES)
def test_names(expected: str, subject: str, sans: tuple[x509.GeneralName, ...]) -> None:
    """The first kind of name that a certificate has is its identity."""
    assert str(identity_of(shared_ca().issue(subject, sans).der)) == expected


@pytest.mark.parametrize("subject,sans", REFUSED.values(), ids=REFUSED)
def test_refused_names(subject: str | x509.Name, sans: tuple[x509.GeneralName, ...]) -> None:
    """What is ambiguous, missing or not printable is nobody's name."""
    with pytest.raises(IdentityRefused) as refused:
        identity_of(shared_ca().issue(subject, sans).der)
    assert refused.value.reason == "identity"
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("usages", [None, pki.SERVER, (ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)])
def test_refused_usages(usages: tuple[x509.ObjectIdentifier, ...] | None) -> None:
    """Without clientAuth, spelled out, a certificate is no client's."""
    with pytest.raises(IdentityRefused) as refused:
        identity_of(shared_ca().issue("a", usages=usages).der)
    assert refused.value.reason == "wrong_usage"


def test_clientauth_among_others() -> None:
    """A certificate for both ends is a client's too."""
    assert str(identity_of(shared_ca().issue("a", usages=pki.SERVER + pki.CLIENT).der)) == "cn:a"


def test_key_and_expiry() -> None:
    """The identity carries the hash of the public key, and when the certificate ends."""
    issued = shared_ca().issue("a")
    found = identity_of(issued.der)
    spki = issued.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert found.spki_sha256 == hashlib.sha256(spki).hexdigest()
    assert found.not_after == (pki.NOW + 2 * pki.DAY).timestamp()


@given(st.data())
def test_damaged_certificates(data: st.DataObject) -> None:
    """Whatever is done to a certificate's bytes, it is a name or a refusal, never another error."""
    der = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        der[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))
    with suppress(IdentityRefused):
        assert identity_of(bytes(der)).name


GOOD = shared_ca().issue("cn", (SPIFFE, DNS("a.svc"))).der
