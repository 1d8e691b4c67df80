"""Issuing certificates: authorities, and leaves for servers and clients under them.

ECDSA P-256, with the extensions that RFC 5280 asks for and that OpenSSL checks under X509_V_FLAG_X509_STRICT
(the default of ``ssl.create_default_context`` from Python 3.13 on): keyUsage, subject and authority key
identifiers.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from progressdb_kms.domain.errors import TlsInvalid
from progressdb_kms.transport.identity import UNREADABLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_COMMON_NAME: Final = 64
"""Characters of a common name (RFC 5280, ub-common-name)."""
_USAGES: Final = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}
# Containers on one machine agree about the time, machines less so.
_CLOCK_SKEW: Final = dt.timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA: its certificate and its private key."""

    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class Names:
    """Whom a certificate is for.

    Attributes:
        usage: For a server (serverAuth) or a client (clientAuth).
        common_name: Of the subject; empty for none.
        dns: DNS names (SAN).
        ips: IP addresses (SAN), in text.
        uris: URIs (SAN).
    """

    usage: Literal["server", "client"]
    common_name: str = ""
    dns: tuple[str, ...] = ()
    ips: tuple[str, ...] = ()
    uris: tuple[str, ...] = ()

    @property
    def alternative(self) -> list[x509.GeneralName]:
        """The subject alternative names."""
        return [
            *map(x509.DNSName, self.dns),
            *(x509.IPAddress(ipaddress.ip_address(ip)) for ip in self.ips),
            *map(x509.UniformResourceIdentifier, self.uris),
        ]


def new_key() -> ec.EllipticCurvePrivateKey:
    """Return a fresh private key."""
    return ec.generate_private_key(ec.SECP256R1())


def new_authority(
    common_name: str, key: ec.EllipticCurvePrivateKey, now: dt.datetime, days: int
) -> Authority:
    """Return a CA that may issue leaves only, valid for so many days."""
    subject = _subject(common_name)
    cert = (
        _builder(subject, subject, key.public_key(), key.public_key(), now, now + dt.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Authority(cert, key)


def issue_leaf(
    authority: Authority, names: Names, key: ec.EllipticCurvePublicKey, now: dt.datetime, days: int
) -> x509.Certificate:
    """Return a certificate for a key, valid for so many days and never longer than its CA."""
    not_after = min(now + dt.timedelta(days=days), authority.cert.not_valid_after_utc)
    builder = (
        _builder(
            _subject(names.common_name),
            authority.cert.subject,
            key,
            authority.key.public_key(),
            now,
            not_after,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([_USAGES[names.usage]]), critical=False)
    )
    if names.alternative:
        # Critical where the subject is empty (RFC 5280 4.2.1.6).
        builder = builder.add_extension(
            x509.SubjectAlternativeName(names.alternative), critical=not names.common_name
        )
    return builder.sign(authority.key, hashes.SHA256())


def is_for(cert: x509.Certificate, names: Names) -> bool:
    """Say whether a certificate is for these names, no more and no fewer, and for this usage."""
    try:
        extensions = cert.extensions
        usages = list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        found = list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound as error:
        if error.oid != x509.SubjectAlternativeName.oid:
            return False
        found = []
    except UNREADABLE:
        return False
    return (
        usages == [_USAGES[names.usage]]
        and set(found) == set(names.alternative)
        and cert.subject == _subject(names.common_name)
    )


def is_issued_by(cert: x509.Certificate, authority: x509.Certificate) -> bool:
    """Say whether a CA signed a certificate."""
    try:
        cert.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def load_authority(cert: bytes, key: bytes, now: dt.datetime) -> Authority:
    """Return a CA from PEM.

    Raises:
        TlsInvalid: One of them can't be read, they do not belong together, or it has expired.
    """
    made = Authority(load_certificate(cert), load_key(key))
    if made.cert.public_key() != made.key.public_key():
        raise TlsInvalid("certificate and key of the CA do not belong together")
    if made.cert.not_valid_after_utc <= now:
        raise TlsInvalid("the CA has expired")
    return made


def load_certificate(data: bytes) -> x509.Certificate:
    """Return the first certificate of a PEM text.

    Raises:
        TlsInvalid: There is none.
    """
    try:
        return x509.load_pem_x509_certificate(data)
    except UNREADABLE:
        raise TlsInvalid("is not a PEM certificate") from None


def load_certificates(data: bytes) -> list[x509.Certificate]:
    """Return all certificates of a PEM text.

    Raises:
        TlsInvalid: There is none, or one can't be read.
    """
    try:
        return x509.load_pem_x509_certificates(data)
    except UNREADABLE:
        raise TlsInvalid("is not a PEM bundle of certificates") from None


def load_key(data: bytes) -> ec.EllipticCurvePrivateKey:
    """Return a private key from PEM.

    Raises:
        TlsInvalid: It is not the unencrypted key of an elliptic curve.
    """
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        # Outside the handler: the parser's error is no context of this one.
        raise TlsInvalid("is not the unencrypted PEM key of an elliptic curve")
    return key


def pem(certs: Iterable[x509.Certificate]) -> bytes:
    """Return certificates in PEM, one after the other, each once."""
    unique: Sequence[bytes] = list(
        dict.fromkeys(cert.public_bytes(serialization.Encoding.PEM) for cert in certs)
    )
    return b"".join(unique)


def pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key in PEM (PKCS #8), unencrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    now: dt.datetime,
    not_after: dt.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder(issuer, subject, key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
