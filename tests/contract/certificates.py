"""Client certificates made at test time: flawless but for the one flaw that a test asks for."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.contract.dev_service import DevService

HOUR = dt.timedelta(hours=1)
CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
SERVER = ExtendedKeyUsageOID.SERVER_AUTH


@dataclass(frozen=True)
class Authority:
    """A certificate authority: its certificate and private key."""

    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def subject(common: str) -> x509.Name:
    """Return a subject with this common name."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def new_authority(owner: x509.Name) -> Authority:
    """Make a self-signed CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = dt.datetime.now(dt.UTC)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    cert = (
        x509.CertificateBuilder(owner, owner, key.public_key(), 7, now - HOUR, now + HOUR)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    return Authority(cert, key)


class Issuer:
    """Writes client certificates, flawless but for what a test asks otherwise."""

    def __init__(self, authority: Authority, folder: Path) -> None:
        self.authority = authority
        self.folder = folder
        self._made = 0

    def issue(
        self,
        *,
        by: Authority | None = None,
        self_signed: bool = False,
        not_before: dt.datetime | None = None,
        not_after: dt.datetime | None = None,
        usages: list[x509.ObjectIdentifier] | None = None,
        common: str = "issued-by-test",
        sans: list[x509.GeneralName] | None = None,
    ) -> tuple[Path, Path]:
        """Return the files of a new certificate and its key; `usages=[]` leaves the extension out."""
        key = ec.generate_private_key(ec.SECP256R1())
        authority = by or self.authority
        owner = subject(common)
        now = dt.datetime.now(dt.UTC)
        builder = x509.CertificateBuilder(
            owner if self_signed else authority.cert.subject,
            owner,
            key.public_key(),
            x509.random_serial_number(),
            not_before or now - HOUR,
            not_after or now + HOUR,
        )
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        usages = [CLIENT] if usages is None else usages
        if usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if sans:
            builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
        signer = key if self_signed else authority.key
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        cert = builder.add_extension(identifier, critical=False).sign(signer, hashes.SHA256())
        self._made += 1
        cert_file, key_file = self.folder / f"{self._made}.crt", self.folder / f"{self._made}.key"
        cert_file.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return cert_file, key_file


def issuer_of(service: DevService, folder: Path) -> Issuer:
    """Return what issues certificates under the development CA that `service` trusts."""
    pki = service.directory / "pki"
    key = serialization.load_pem_private_key((pki / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return Issuer(Authority(x509.load_pem_x509_certificate((pki / "ca.crt").read_bytes()), key), folder)


def identity_of(cert: Path) -> str:
    """Return the typed identity that the design gives a certificate: SPIFFE URI, else DNS name, else CN."""
    parsed = x509.load_pem_x509_certificate(cert.read_bytes())
    try:
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    for uri in names.get_values_for_type(x509.UniformResourceIdentifier):
        if uri.startswith("spiffe://"):
            return uri if uri.startswith("spiffe:") else f"spiffe:{uri}"
    for dns in names.get_values_for_type(x509.DNSName):
        return f"dns:{dns}"
    return f"cn:{parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value!s}"
