"""Certificates and trust in Secrets: what is written, from what is there. No I/O, the time is given.

An authority is made once and never again: whoever trusts it would have to be told. A leaf is issued anew
before it ends, or when it is not what is wanted. Trust is rendered anew each time.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.errors import ProvisionRefused, TlsInvalid
from progressdb_kms.provision.config import Authority as WantedAuthority
from progressdb_kms.provision.config import Certificate as WantedCertificate
from progressdb_kms.provision.secrets import OPAQUE, TLS, Change, Found
from progressdb_kms.transport.issuing import (
    Authority,
    is_for,
    is_issued_by,
    issue_leaf,
    load_authority,
    load_certificate,
    load_certificates,
    load_key,
    new_authority,
    new_key,
    pem,
    pem_key,
)

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

CERT: Final = "tls.crt"
KEY: Final = "tls.key"
CA: Final = "ca.crt"
WARN_DAYS: Final = 90
"""Days before an authority's end from which each run warns: leaves end with it."""


@dataclass(frozen=True, slots=True)
class Trusted:
    """An authority, and what else its bundles carry while it is replaced.

    Attributes:
        authority: Signs.
        certs: Its certificate, and those of the CAs that are trusted beside it.
    """

    authority: Authority
    certs: Sequence[x509.Certificate]


def authority_change(
    wanted: WantedAuthority, found: Found | None, labels: Mapping[str, str], now: dt.datetime
) -> Change | None:
    """Return the Secret of a new authority; None where there is one, which is never changed."""
    if found is not None:
        return None
    made = new_authority(wanted.common_name, new_key(), now, wanted.days)
    return Change(data={CERT: pem([made.cert]), KEY: pem_key(made.key)}, kind=TLS, labels=labels)


def read_authority(name: str, data: Mapping[str, bytes], now: dt.datetime) -> Trusted:
    """Return an authority from what its Secret holds.

    Raises:
        ProvisionRefused: It can't issue anything.
    """
    try:
        authority = load_authority(data.get(CERT, b""), data.get(KEY, b""), now)
        beside = load_certificates(data[CA]) if data.get(CA, b"").strip() else []
    except TlsInvalid as error:
        raise ProvisionRefused(
            f"{name} holds no usable CA ({error.detail}): put it back from a copy, or delete the Secret and"
            " run again for a new CA, under which all certificates are issued anew"
        ) from None
    return Trusted(authority, [authority.cert, *beside])


def expiry_warning(name: str, authority: Authority, now: dt.datetime) -> str:
    """Return what to say of an authority that ends soon, an empty string for one that does not."""
    end = authority.cert.not_valid_after_utc
    if end - now > dt.timedelta(days=WARN_DAYS):
        return ""
    return f"warning: the CA in {name} ends on {end:%Y-%m-%d}: replace it (docs/ca-rollover.md)"


def bundle_change(
    found: Found | None,
    certs: Iterable[x509.Certificate],
    labels: Mapping[str, str],
    *,
    keep_until: dt.datetime | None = None,
) -> Change | None:
    """Return what makes a bundle these certificates.

    Args:
        found: The bundle.
        certs: Whom to trust.
        labels: Of a Secret that is made.
        keep_until: The present time, to keep what the bundle held until it has expired; None to drop it.
    """
    wanted = list(certs)
    if found is not None and keep_until is not None:
        wanted += [cert for cert in _read(found.data.get(CA, b"")) if cert.not_valid_after_utc > keep_until]
    text = pem(wanted)
    if found is None:
        return Change(data={CA: text}, kind=OPAQUE, labels=labels)
    return None if found.data.get(CA) == text else Change("other CAs are trusted", {CA: text})


def leaf_change(
    wanted: WantedCertificate,
    found: Found | None,
    authority: Authority,
    trust: Sequence[x509.Certificate],
    labels: Mapping[str, str],
    *,
    now: dt.datetime,
    renew_before: int,
) -> Change | None:
    """Return what makes a Secret hold a good certificate, None where it does.

    Args:
        wanted: The certificate.
        found: Its Secret.
        authority: Signs it.
        trust: Whose certificates go beside it.
        labels: Of a Secret that is made.
        now: The time.
        renew_before: Days before its end at which it is renewed.

    Raises:
        ProvisionRefused: The key is to be kept and can't be read.
    """
    data = {} if found is None else found.data
    beside = {CA: pem(trust)} if trust else {}
    why = _renewal(wanted, data, authority, now, dt.timedelta(days=renew_before))
    if found is not None and not why:
        if all(data.get(name) == value for name, value in beside.items()):
            return None
        return Change("other CAs are trusted", beside)
    key = _key(wanted, found)
    cert = issue_leaf(authority, wanted.names, key.public_key(), now, wanted.days)
    issued = {CERT: pem([cert]), KEY: pem_key(key), **beside}
    if found is None:
        return Change(data=issued, kind=TLS, labels=labels)
    return Change(f"{why}; valid until {cert.not_valid_after_utc:%Y-%m-%d} now", issued)


def copy_change(
    found: Found | None,
    source: Mapping[str, bytes],
    trust: Sequence[x509.Certificate],
    labels: Mapping[str, str],
) -> Change | None:
    """Return what makes a Secret the same as another's certificate and key, None where it is."""
    wanted = {CERT: source[CERT], KEY: source[KEY]} | ({CA: pem(trust)} if trust else {})
    if found is None:
        return Change(data=wanted, kind=TLS, labels=labels)
    if all(found.data.get(name) == value for name, value in wanted.items()):
        return None
    return Change("its source has changed", wanted)


def _renewal(
    wanted: WantedCertificate,
    data: Mapping[str, bytes],
    authority: Authority,
    now: dt.datetime,
    before: dt.timedelta,
) -> str:
    """Return why a certificate is issued anew, an empty string where it is not."""
    try:
        cert, key = load_certificate(data.get(CERT, b"")), load_key(data.get(KEY, b""))
    except TlsInvalid:
        return "it could not be read"
    left = cert.not_valid_after_utc - now
    # Under a CA that ends soon no certificate lives longer: a new one each day would be no better.
    as_long_as_can_be = cert.not_valid_after_utc == authority.cert.not_valid_after_utc
    if left <= dt.timedelta(0) or (left < before and not as_long_as_can_be):
        return "it was to end soon"
    if cert.public_key() != key.public_key():
        return "certificate and key did not belong together"
    if not is_issued_by(cert, authority.cert):
        return "it was of another CA"
    if not is_for(cert, wanted.names):
        return "it was for other names"
    return ""


def _key(wanted: WantedCertificate, found: Found | None) -> ec.EllipticCurvePrivateKey:
    if not wanted.keep_key or found is None:
        return new_key()
    try:
        return load_key(found.data.get(KEY, b""))
    except TlsInvalid as error:
        raise ProvisionRefused(
            f"the key of {wanted.secret} is to be kept, but {KEY} {error.detail}: put it back, or delete the"
            " Secret for a new key, and pin that one"
        ) from None


def _read(data: bytes) -> list[x509.Certificate]:
    try:
        return load_certificates(data)
    except TlsInvalid:
        return []
