"""Certificates for tests, made at test time."""

from __future__ import annotations

import datetime as dt
import ipaddress
import ssl
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = dt.datetime.now(dt.UTC).replace(microsecond=0)
DAY = dt.timedelta(days=1)
CLIENT = (ExtendedKeyUsageOID.CLIENT_AUTH,)
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
SERVER = (ExtendedKeyUsageOID.SERVER_AUTH,)


def common_name(*names: str) -> x509.Name:
    """Return a subject with these CNs."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])


def organization(name: str) -> x509.Name:
    """Return a subject without a CN."""
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, name)])


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, and files of them."""

    certificate: x509.Certificate
    key: Key

    @property
    def der(self) -> bytes:
        """The certificate in DER."""
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def pem(self) -> bytes:
        """The certificate in PEM."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The private key in PEM."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write certificate and key (0600); returns both paths."""
        cert, key = folder / f"{name}.crt", folder / f"{name}.key"
        cert.write_bytes(self.pem)
        key.touch(mode=0o600)
        key.write_bytes(self.key_pem)
        return cert, key


class Ca:
    """A certificate authority."""

    def __init__(self, name: str = "test CA", *, not_after: dt.datetime = NOW + 30 * DAY) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        subject = common_name(name)
        self.certificate = (
            _builder(subject, subject, self.key.public_key(), self.key.public_key(), NOW - 9 * DAY, not_after)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        """The CA's certificate in PEM."""
        return self.certificate.public_bytes(Encoding.PEM)

    def issue(
        self,
        subject: x509.Name | str = "",
        sans: tuple[x509.GeneralName, ...] = (),
        usages: tuple[x509.ObjectIdentifier, ...] | None = CLIENT,
        *,
        not_before: dt.datetime = NOW - 2 * DAY,
        not_after: dt.datetime = NOW + 2 * DAY,
        key: Key | None = None,
    ) -> Issued:
        """Issue a leaf certificate; ``subject`` may be just a CN."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        name = common_name(subject) if isinstance(subject, str) and subject else subject or x509.Name([])
        assert isinstance(name, x509.Name)
        issuer = self.certificate.subject
        builder = _builder(name, issuer, key.public_key(), self.key.public_key(), not_before, not_after)
        builder = builder.add_extension(_usage(ca=False), critical=True)
        if sans:
            builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=not name.rdns)
        if usages is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        return Issued(builder.sign(self.key, hashes.SHA256()), key)

    def crl(
        self,
        *revoked: Issued | x509.Certificate,
        next_update: dt.datetime = NOW + 30 * DAY,
        extension: tuple[x509.ExtensionType, bool] | None = None,
        key: ec.EllipticCurvePrivateKey | None = None,
    ) -> bytes:
        """Return a revocation list in PEM."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(NOW - 5 * DAY)
            .next_update(next_update)
            .add_extension(x509.CRLNumber(7), critical=False)
        )
        if extension is not None:
            builder = builder.add_extension(extension[0], critical=extension[1])
        for each in revoked:
            certificate = each.certificate if isinstance(each, Issued) else each
            entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number)
            builder = builder.add_revoked_certificate(entry.revocation_date(NOW - DAY).build())
        return builder.sign(key or self.key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def intermediate(self, name: str, *, key: ec.EllipticCurvePrivateKey | None = None) -> Ca:
        """Return a CA below this one."""
        below = Ca(name)
        below.key = key or below.key
        public = below.key.public_key()
        subject, issuer = below.certificate.subject, self.certificate.subject
        below.certificate = (
            _builder(subject, issuer, public, self.key.public_key(), NOW - 9 * DAY, NOW + 9 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        return below

    def server(self) -> Issued:
        """Issue a certificate for localhost."""
        sans = (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        return self.issue("server", sans, SERVER)

    def client(self, name: str = "chat.default.svc") -> Issued:
        """Issue a client certificate with a DNS name."""
        return self.issue("", (x509.DNSName(name),))


def self_signed() -> Issued:
    """Return a client certificate that nobody issued."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, public = common_name("self"), key.public_key()
    builder = _builder(name, name, public, public, NOW - DAY, NOW + DAY)
    builder = builder.add_extension(x509.ExtendedKeyUsage(CLIENT), critical=False)
    return Issued(builder.sign(key, hashes.SHA256()), key)


def client_context(ca: Ca, issued: Issued | None, folder: Path) -> ssl.SSLContext:
    """Return a client's TLS context that trusts ``ca`` and shows ``issued``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca.pem.decode())
    if issued is not None:
        context.load_cert_chain(*issued.write(folder, f"client-{issued.certificate.serial_number:x}"))
    return context


@cache
def shared_ca() -> Ca:
    """Return the CA that most tests use."""
    return Ca()


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
    signer: ec.EllipticCurvePublicKey,
    not_before: dt.datetime,
    not_after: dt.datetime,
) -> x509.CertificateBuilder:
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer)
    return builder.add_extension(authority, critical=False)


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
