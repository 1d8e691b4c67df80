"""Which client certificates are trusted: by their CAs, and by what these have revoked.

OpenSSL verifies each handshake against the client CAs. What it can't do is to judge the connections that are
open when the CAs or the revocations change, so that here a connection's verified chain is kept in a few bytes
and judged by the same rules at the handshake and after each reload. That is also why revocation is checked
here and not by OpenSSL, whose check besides refuses every client of a CA for which there is no list.
"""

from __future__ import annotations

import hashlib
import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from progressdb_kms.domain.errors import TlsInvalid
from progressdb_kms.transport.identity import UNREADABLE

_BLOCK: Final = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----", re.DOTALL)
# Extensions that change nothing in what is done here (RFC 5280 5.2, 5.3). Any other critical one is refused.
_KNOWN: Final = (x509.CRLNumber, x509.AuthorityKeyIdentifier, x509.IssuerAlternativeName, x509.FreshestCRL)
_KNOWN_ENTRY: Final = (x509.CRLReason, x509.InvalidityDate)
_DER: Final = 2  # _ssl.ENCODING_DER


@dataclass(frozen=True, slots=True)
class Link:
    """One certificate of a chain that TLS has verified.

    Attributes:
        name: Digest of its subject and public key: the same for a CA that was renewed with its key.
        serial: Its serial number.
        not_after: When it expires, in Unix seconds.
    """

    name: bytes
    serial: int
    not_after: float


Chain = tuple[Link, ...]
"""A verified chain, the client's certificate first."""


@dataclass(frozen=True, slots=True)
class CrlFacts:
    """A certificate revocation list; ``next_update`` in Unix seconds, infinite where it names none."""

    issuer: str
    next_update: float
    revoked: int


def link_of(certificate: x509.Certificate) -> Link:
    """Return what is kept of a certificate."""
    spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    subject = certificate.subject.public_bytes()
    digest = hashlib.sha256(len(subject).to_bytes(4, "big") + subject + spki).digest()
    return Link(digest, certificate.serial_number, certificate.not_valid_after_utc.timestamp())


def chain_of(connection: ssl.SSLObject) -> Chain:
    """Return the chain that OpenSSL verified for a connection's peer.

    Raises:
        ValueError: A certificate in it can't be read; the other errors of ``identity.UNREADABLE`` too.
    """
    return tuple(_link_of_der(der) for der in _verified(connection))


def _verified(connection: Any) -> list[bytes]:  # noqa: ANN401 - typeshed has this for newer versions only
    if hasattr(connection, "get_verified_chain"):  # Python 3.13
        chain: list[bytes] = connection.get_verified_chain()
        return chain
    # Since Python 3.10 the private object has what 3.13 made public.
    return [certificate.public_bytes(_DER) for certificate in connection._sslobj.get_verified_chain()]  # noqa: SLF001


@lru_cache(maxsize=256)
def _link_of_der(der: bytes) -> Link:
    return link_of(x509.load_der_x509_certificate(der))


class ClientTrust:
    """The CAs of the clients, and what they have revoked.

    Args:
        authorities: The CAs.
        crls: Their revocation lists; None where revocation is not used.
        require_current: Whether a list past its next update stops all handshakes.
    """

    def __init__(
        self,
        authorities: Iterable[x509.Certificate],
        crls: Iterable[tuple[Link, x509.CertificateRevocationList]] | None = None,
        *,
        require_current: bool = False,
    ) -> None:
        self._anchors: dict[bytes, float] = {}
        for link in map(link_of, authorities):
            self._anchors[link.name] = max(link.not_after, self._anchors.get(link.name, 0.0))
        self._checks = crls is not None
        self._current_until = float("inf")
        self._revoked: set[tuple[bytes, int]] = set()
        for issuer, crl in crls or ():
            self._revoked.update((issuer.name, entry.serial_number) for entry in crl)
            if require_current:
                self._current_until = min(self._current_until, _next_update(crl))

    def why_not(self, chain: Chain, now: float) -> str:
        """Return why a client with this chain is not to be trusted, or an empty string.

        Args:
            chain: As verified at its handshake, be it against these CAs or former ones.
            now: Unix seconds.

        Returns:
            One of expired, revoked, unknown_ca, no_crl (with lists in use, the certificate's issuer is not
            one of the CAs, so that nothing says what it has revoked), stale_crl; or an empty string.
        """
        anchor = next((at for at, link in enumerate(chain) if at and link.name in self._anchors), 0)
        if not anchor:
            return "unknown_ca"
        if self._anchors[chain[anchor].name] <= now or any(link.not_after <= now for link in chain[:anchor]):
            return "expired"
        if not self._checks:
            return ""
        if any((issuer.name, link.serial) in self._revoked for link, issuer in pairwise(chain)):
            return "revoked"
        if anchor > 1:
            return "no_crl"
        return "stale_crl" if self._current_until <= now else ""


def load_crls(
    path: Path, pem: bytes, authorities: Iterable[x509.Certificate]
) -> list[tuple[Link, x509.CertificateRevocationList]]:
    """Return the revocation lists in a PEM file, each with the issuer that signed it (RFC 5280 6.3).

    Raises:
        TlsInvalid: There is none, or one is damaged, not by one of these CAs, or of a kind that is not taken.
    """
    blocks = _BLOCK.findall(pem)
    if not blocks:
        raise TlsInvalid(f"{path} holds no certificate revocation list in PEM")
    by_name: dict[x509.Name, list[x509.Certificate]] = {}
    for authority in authorities:
        by_name.setdefault(authority.subject, []).append(authority)
    return [_load(path, block, by_name) for block in blocks]


def _load(
    path: Path, block: bytes, by_name: Mapping[x509.Name, list[x509.Certificate]]
) -> tuple[Link, x509.CertificateRevocationList]:
    try:
        crl = x509.load_pem_x509_crl(block)
        who = crl.issuer.rfc4514_string()
        _require_understood(path, who, crl)
        for issuer in by_name.get(crl.issuer, []):
            if crl.is_signature_valid(issuer.public_key()):  # type: ignore[arg-type]
                _require_standing(path, crl, by_name)
                return link_of(issuer), crl
    except (*UNREADABLE, TypeError):
        raise TlsInvalid(f"{path} holds a damaged certificate revocation list") from None
    raise TlsInvalid(f"{path}: the revocation list of {who} is signed by none of the CAs in tls.client_ca")


def _require_understood(path: Path, who: str, crl: x509.CertificateRevocationList) -> None:
    # A list that speaks of a part of the certificates, or only of changes, would be taken for the whole.
    strange = _strange(crl.extensions, _KNOWN)
    for entry in crl:
        strange += _strange(entry.extensions, _KNOWN_ENTRY)
    if strange:
        raise TlsInvalid(
            f"{path}: the revocation list of {who} is a delta, partial or indirect one (critical extension"
            f" {strange[0]}); give the CA's whole list"
        )


def _strange(extensions: x509.Extensions, known: tuple[type[x509.ExtensionType], ...]) -> list[str]:
    return [
        each.oid.dotted_string for each in extensions if each.critical and not isinstance(each.value, known)
    ]


def _require_standing(
    path: Path, crl: x509.CertificateRevocationList, by_name: Mapping[x509.Name, list[x509.Certificate]]
) -> None:
    for authorities in by_name.values():
        for authority in authorities:
            found = crl.get_revoked_certificate_by_serial_number(authority.serial_number)
            if found is not None and authority.issuer == crl.issuer and authority.subject != authority.issuer:
                # As a trust anchor it would be trusted all the same.
                who = authority.subject.rfc4514_string()
                raise TlsInvalid(f"{path}: {who} in tls.client_ca is revoked; take it out there")


def crl_facts(crl: x509.CertificateRevocationList) -> CrlFacts:
    """Return what metrics, log and ``doctor`` show of a list."""
    return CrlFacts(crl.issuer.rfc4514_string(), _next_update(crl), len(crl))


def _next_update(crl: x509.CertificateRevocationList) -> float:
    moment = crl.next_update_utc
    return float("inf") if moment is None else moment.timestamp()
