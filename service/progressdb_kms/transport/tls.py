"""The server's side of mutual TLS: what is loaded, from where, and how it is replaced while serving."""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from progressdb_kms.domain.errors import TlsInvalid
from progressdb_kms.files import read_private
from progressdb_kms.settings import Tls
from progressdb_kms.transport.alert import AlertingContext
from progressdb_kms.transport.events import TransportEvents
from progressdb_kms.transport.identity import UNREADABLE
from progressdb_kms.transport.trust import ClientTrust, CrlFacts, crl_facts, load_crls


@dataclass(frozen=True, slots=True)
class CaFacts:
    """A CA that client certificates may come from; ``not_after`` in Unix seconds."""

    subject: str
    not_after: float
    fingerprint: str


@dataclass(frozen=True, slots=True)
class TlsFacts:
    """What is loaded, for metrics, logs and ``doctor``. Nothing in it is secret.

    Attributes:
        subject: The server certificate's subject, RFC 4514.
        names: Its DNS names and IP addresses.
        not_after: When it expires, in Unix seconds.
        fingerprint: SHA-256 of it, lower-case hex.
        client_cas: The CAs of the clients.
        crls: Their revocation lists.
    """

    subject: str
    names: tuple[str, ...]
    not_after: float
    fingerprint: str
    client_cas: tuple[CaFacts, ...]
    crls: tuple[CrlFacts, ...] = ()


def build_context(tls: Tls) -> tuple[ssl.SSLContext, TlsFacts, ClientTrust]:
    """Load certificate, key, client CAs and their revocation lists into a fresh context.

    Each file is read once, and what was checked is what is loaded, even if the files change meanwhile.

    Raises:
        TlsInvalid: In one line: which file, what is wrong with it.
    """
    chain = _read(tls.cert)
    key = read_private(tls.key, error=TlsInvalid)
    certificates = _certificates(tls.cert, chain)
    authorities = _certificates(tls.client_ca, _read(tls.client_ca))
    _check_server(tls, certificates[0], key)
    _check_authorities(tls.client_ca, authorities)
    crls = None
    if tls.client_crl is not None:
        crls = load_crls(tls.client_crl, _read(tls.client_crl), authorities)
    trust = ClientTrust(authorities, crls, require_current=tls.require_current_crl)
    context = _context()
    try:
        _load_chain(context, chain.rstrip() + b"\n" + key)
    except OSError as error:
        raise TlsInvalid(f"{tls.cert} with {tls.key} can't be used: {_why(error)}") from error
    try:
        context.load_verify_locations(cadata=b"".join(ca.public_bytes(Encoding.DER) for ca in authorities))
    except OSError as error:
        raise TlsInvalid(f"{tls.client_ca} can't be used: {_why(error)}") from error
    facts = _facts(certificates[0], authorities, tuple(crl_facts(crl) for _, crl in crls or ()))
    return context, facts, trust


def _why(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or "unknown reason"


class TlsHolder:
    """The context that new connections get, and which clients are trusted now.

    A connection keeps the context that it was accepted with, so replacing it is atomic. ``trust`` judges the
    open ones as well: ``replaced`` is called for that.

    Args:
        tls: The files.
        events: Told of each reload.

    Raises:
        TlsInvalid: The files can't be used.
    """

    def __init__(self, tls: Tls, events: TransportEvents) -> None:
        self._tls = tls
        self._events = events
        self.replaced: Callable[[], None] = lambda: None
        self.context, self.facts, self.trust = build_context(tls)

    async def reload(self) -> bool:
        """Load the files again, all or nothing; a broken set changes nothing and is reported.

        In a thread: a revocation list may have a hundred thousand entries.

        Returns:
            Whether the new set is in use.
        """
        try:
            loaded = await asyncio.to_thread(build_context, self._tls)
        except TlsInvalid as error:
            self._events.reloaded("tls", ok=False, detail=error.detail)
            return False
        self.context, self.facts, self.trust = loaded
        self.replaced()
        self._events.reloaded("tls", ok=True, detail="")
        return True


def _context() -> ssl.SSLContext:
    context = AlertingContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    # Set whole, as Python's defaults differ between versions. PARTIAL_CHAIN: what the operator put into
    # client_ca is trusted, be it a root or an intermediate, and nothing else is. Not X509_STRICT: it refuses
    # the CAs that `openssl req -x509` makes by default (no key usage), and what it adds to the checks that
    # always apply (CA flag, key usage where there is one, path length, dates, purpose) is form.
    context.verify_flags = (
        ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags.VERIFY_X509_TRUSTED_FIRST
    )
    # A ticket would let a client come back without its certificate being verified again.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
    context.set_alpn_protocols(["http/1.1"])
    return context


def _load_chain(context: ssl.SSLContext, pem: bytes) -> None:
    # OpenSSL's loader takes file names only. A memory file lets it read the very bytes that were checked.
    descriptor = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsInvalid(f"can't read {path}: {error.strerror}") from error


def _certificates(path: Path, pem: bytes) -> list[x509.Certificate]:
    try:
        certificates = x509.load_pem_x509_certificates(pem)
        for certificate in certificates:
            # Both are parsed only when asked for; asked here, a damaged part is this error and no later one.
            _ = certificate.extensions, certificate.public_key()
    except UNREADABLE:
        raise TlsInvalid(f"{path} holds no certificate in PEM, or a damaged one") from None
    return certificates


def _check_server(tls: Tls, certificate: x509.Certificate, key: bytes) -> None:
    try:
        public = load_pem_private_key(key, password=None).public_key()
    except TypeError:
        raise TlsInvalid(f"{tls.key} is encrypted; the service has no passphrase for it") from None
    except (ValueError, UnsupportedAlgorithm):
        raise TlsInvalid(f"{tls.key} holds no private key in PEM, or a damaged one") from None
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if public.public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise TlsInvalid(f"{tls.key} is not the key of the certificate {tls.cert}")
    now = time.time()
    if certificate.not_valid_after_utc.timestamp() <= now:
        raise TlsInvalid(f"{tls.cert} expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    if certificate.not_valid_before_utc.timestamp() > now:
        raise TlsInvalid(
            f"{tls.cert} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        )
    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return
    if ExtendedKeyUsageOID.SERVER_AUTH not in usages:
        raise TlsInvalid(f"{tls.cert} is not for servers (no serverAuth usage)")


def _check_authorities(path: Path, authorities: list[x509.Certificate]) -> None:
    for authority in authorities:
        try:
            is_ca = authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except x509.ExtensionNotFound:
            is_ca = False
        if not is_ca:
            # With partial chains a leaf in this file would be trusted by itself, past its issuer's expiry.
            raise TlsInvalid(
                f"{path} holds a certificate that is not a CA: {authority.subject.rfc4514_string()}"
            )
    newest = max(authority.not_valid_after_utc for authority in authorities)
    if newest.timestamp() <= time.time():
        raise TlsInvalid(f"{path}: every CA in it has expired, the last on {newest:%Y-%m-%d %H:%M} UTC")


def _facts(
    certificate: x509.Certificate, authorities: list[x509.Certificate], crls: tuple[CrlFacts, ...]
) -> TlsFacts:
    try:
        sans = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = [*sans.get_values_for_type(x509.DNSName), *map(str, sans.get_values_for_type(x509.IPAddress))]
    except x509.ExtensionNotFound:
        names = []
    return TlsFacts(
        subject=certificate.subject.rfc4514_string(),
        names=tuple(names),
        not_after=certificate.not_valid_after_utc.timestamp(),
        fingerprint=_fingerprint(certificate),
        client_cas=tuple(
            CaFacts(ca.subject.rfc4514_string(), ca.not_valid_after_utc.timestamp(), _fingerprint(ca))
            for ca in authorities
        ),
        crls=crls,
    )


def _fingerprint(certificate: x509.Certificate) -> str:
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()
