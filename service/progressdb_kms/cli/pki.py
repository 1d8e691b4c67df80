"""A certificate authority for development: one CA, and certificates for servers and clients.

ECDSA P-256, with the extensions that RFC 5280 asks for and that OpenSSL checks under X509_V_FLAG_X509_STRICT
(the default of ``ssl.create_default_context`` from Python 3.13 on). A client's name is a DNS SAN: its
identity is ``dns:<name>``. The CA's key lies beside it, unencrypted: not for production.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from progressdb_kms.domain.errors import TlsInvalid
from progressdb_kms.kek.atomic import replace_file, write_once

if TYPE_CHECKING:
    from collections.abc import Sequence

CA_DAYS: Final = 3650
LEAF_DAYS: Final = 90

_NAME: Final = re.compile(r"(?!.*\.\.)[a-z0-9_]([a-z0-9_.-]{0,62}[a-z0-9])?")
_DNS: Final = re.compile(r"(\*\.)?[a-zA-Z0-9_]([a-zA-Z0-9_.-]{0,251}[a-zA-Z0-9])?")
# Containers on one machine agree about the time, machines less so.
_CLOCK_SKEW: Final = dt.timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Issued:
    """Files of a certificate and of its private key, and when it expires."""

    cert: Path
    key: Path
    not_after: dt.datetime


@dataclass(frozen=True, slots=True)
class _Ca:
    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def init_ca(directory: Path, *, days: int = CA_DAYS) -> Issued:
    """Make a CA: ``ca.crt``, and ``ca.key`` with mode 0600. Never overwrites one.

    The key is written first. Where an earlier run ended between the two files, its key is taken up.

    Raises:
        TlsInvalid: There is a CA already, or half of one that can't be taken up.
        OSError: The files can't be written.
    """
    files = Issued(directory / "ca.crt", directory / "ca.key", _now() + dt.timedelta(days=days))
    if files.cert.exists():
        raise TlsInvalid(f"{files.cert} exists already and is never overwritten")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not files.key.exists():
        write_once(files.key, _pem(ec.generate_private_key(ec.SECP256R1())), 0o600)
    key = _load_key(files.key)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "progressdb-kms development CA")])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    cert = (
        _builder(name, name, key.public_key(), key.public_key(), files.not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    write_once(files.cert, cert.public_bytes(serialization.Encoding.PEM), 0o644)
    return files


def issue(
    directory: Path,
    name: str,
    *,
    server: bool = False,
    dns: Sequence[str] = (),
    ips: Sequence[str] = (),
    days: int = LEAF_DAYS,
) -> Issued:
    """Make a certificate and key, ``<name>.crt`` and ``<name>.key``, signed by the directory's CA.

    What is there under this name is replaced, each file by one rename.

    Args:
        directory: Holds ``ca.crt`` and ``ca.key``.
        name: 1 to 64 lower-case letters, digits, ``.``, ``-``, ``_``; a client's identity is ``dns:<name>``.
        server: For a server (usage serverAuth) instead of a client (clientAuth).
        dns: DNS names of a server; without any name or address, ``name`` is the only one.
        ips: IP addresses of a server.
        days: Until it expires; never later than the CA.

    Raises:
        TlsInvalid: No usable CA there, or a name that can't be one.
        OSError: The files can't be written.
    """
    if not _NAME.fullmatch(name) or name == "ca":
        raise TlsInvalid(
            "a certificate's name is 1 to 64 lower-case letters, digits, '.', '-', '_'; not 'ca'"
        )
    names = _alternative_names(name, server=server, dns=dns, ips=ips)
    ca = _load_ca(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    not_after = min(_now() + dt.timedelta(days=days), ca.cert.not_valid_after_utc)
    usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    cert = (
        _builder(subject, ca.cert.subject, key.public_key(), ca.key.public_key(), not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca.key, hashes.SHA256())
    )
    issued = Issued(directory / f"{name}.crt", directory / f"{name}.key", not_after)
    replace_file(issued.key, _pem(key), 0o600)
    replace_file(issued.cert, cert.public_bytes(serialization.Encoding.PEM), 0o644)
    return issued


def is_usable(directory: Path, name: str, *, within: dt.timedelta) -> bool:
    """Say whether ``<name>.crt`` and ``.key`` are a pair of this CA that is valid for longer than ``within``.

    Raises:
        TlsInvalid: No usable CA there.
    """
    ca = _load_ca(directory)
    try:
        cert = x509.load_pem_x509_certificate((directory / f"{name}.crt").read_bytes())
        key = _load_key(directory / f"{name}.key")
        cert.verify_directly_issued_by(ca.cert)
    except (OSError, ValueError, TypeError, InvalidSignature, TlsInvalid):
        return False
    return cert.public_key() == key.public_key() and cert.not_valid_after_utc > _now() + within


def _alternative_names(
    name: str, *, server: bool, dns: Sequence[str], ips: Sequence[str]
) -> list[x509.GeneralName]:
    if not server:
        if dns or ips:
            raise TlsInvalid("a client's only name is its own; --dns and --ip go with --server")
        return [x509.DNSName(name)]
    for entry in dns:
        if not _DNS.fullmatch(entry):
            raise TlsInvalid("a DNS name has letters, digits, '.', '-' and '_' only")
    try:
        addresses = [x509.IPAddress(ipaddress.ip_address(entry)) for entry in ips]
    except ValueError:
        raise TlsInvalid("an IP address is like 127.0.0.1 or ::1") from None
    return [*map(x509.DNSName, dns if dns or ips else [name]), *addresses]


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    not_after: dt.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder(issuer, subject, key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - _CLOCK_SKEW)
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


def _load_ca(directory: Path) -> _Ca:
    path = directory / "ca.crt"
    try:
        cert = x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise TlsInvalid(
            f"can't read {path}: {error.strerror}; make a CA with pki init --dir {directory}"
        ) from None
    except ValueError:
        raise TlsInvalid(f"{path} is not a PEM certificate") from None
    key = _load_key(directory / "ca.key")
    if cert.public_key() != key.public_key():
        raise TlsInvalid(f"ca.crt and ca.key in {directory} do not belong together")
    if cert.not_valid_after_utc <= _now():
        raise TlsInvalid(f"{path} has expired; remove it and ca.key, and make a new CA")
    return _Ca(cert, key)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    problem = "is not the unencrypted PEM key of an elliptic curve"
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise TlsInvalid(f"can't read {path}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise TlsInvalid(f"{path} {problem}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TlsInvalid(f"{path} {problem}")
    return key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC).replace(microsecond=0)
