"""Who is at the other end: from a client certificate, or from the kernel on a Unix socket."""

from __future__ import annotations

import hashlib
import socket
import struct
from typing import TYPE_CHECKING, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from progressdb_kms.domain.identity import Identity, IdentityKind

if TYPE_CHECKING:
    from progressdb_kms.settings import UnixListen

MAX_NAME = 255
# What ``cryptography`` raises for a certificate that it can't take, at the latest when a part is asked for.
UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


class IdentityRefused(Exception):
    """The peer proved nothing that can be taken as a name.

    Attributes:
        reason: For metrics: identity, wrong_usage, peer_uid, or one of ``ClientTrust.why_not``.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def identity_of(der: bytes) -> Identity:
    """Return the identity in a client certificate that TLS has already verified.

    The name is, in this order, the SPIFFE URI SAN, the DNS SAN, or the CN. A type of name that occurs twice
    would let the issuer's mistake choose the identity, so it is refused rather than resolved by position.

    Args:
        der: The certificate in DER.

    Raises:
        IdentityRefused: No name, several of the chosen type, one that is not printable or over 255
            characters, or no clientAuth usage (RFC 5280 4.2.1.12; an absent extension means any usage, which
            here is none: a server's certificate must not work as a client's).
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        usages = _extension(certificate, x509.ExtendedKeyUsage)
        kind, name = _name(certificate)
        spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except UNREADABLE as error:
        raise IdentityRefused("identity", "the certificate can't be read") from error
    if usages is None or ExtendedKeyUsageOID.CLIENT_AUTH not in usages:
        raise IdentityRefused("wrong_usage", "the certificate is not for clients (no clientAuth usage)")
    return Identity(kind, name, hashlib.sha256(spki).hexdigest(), certificate.not_valid_after_utc.timestamp())


def peer_identity(sock: socket.socket, listen: UnixListen) -> Identity:
    """Return the identity of a Unix socket's peer, as the kernel knows it (SO_PEERCRED, unix(7)).

    Raises:
        IdentityRefused: Neither its user nor its primary group is let in.
    """
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    _, uid, gid = struct.unpack("iII", credentials)
    if uid not in listen.allow_uids and gid not in listen.allow_gids:
        raise IdentityRefused("peer_uid", f"uid {uid} with gid {gid} is not let in")
    return Identity(IdentityKind.UID, str(uid))


def _name(certificate: x509.Certificate) -> tuple[IdentityKind, str]:
    sans = _extension(certificate, x509.SubjectAlternativeName)
    uris = sans.get_values_for_type(x509.UniformResourceIdentifier) if sans else []
    spiffe = [uri for uri in uris if uri.lower().startswith("spiffe:")]
    if spiffe:
        # One URI in all: the X.509-SVID standard (section 2) allows no other beside it.
        return IdentityKind.SPIFFE, _checked(_only(uris, "URI SANs")[len("spiffe:") :])
    dns = sans.get_values_for_type(x509.DNSName) if sans else []
    if dns:
        return IdentityKind.DNS, _checked(_only(dns, "DNS SANs")).lower()
    common = [str(a.value) for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if not common:
        raise IdentityRefused("identity", "the certificate names nobody: no SPIFFE or DNS SAN, no CN")
    return IdentityKind.CN, _checked(_only(common, "CNs"))


def _only(names: list[str], what: str) -> str:
    if len(names) != 1:
        raise IdentityRefused("identity", f"the certificate has {len(names)} {what}; one is needed")
    return names[0]


def _checked(name: str) -> str:
    if not name or len(name) > MAX_NAME:
        raise IdentityRefused("identity", f"the certificate's name is empty or over {MAX_NAME} characters")
    # Control, format and other invisible characters: such a name can look like another one in a log.
    if not name.isprintable():
        raise IdentityRefused("identity", "the certificate's name has characters that can't be printed")
    return name


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
