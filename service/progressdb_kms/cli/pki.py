"""A certificate authority for development: one CA, and certificates for servers and clients.

A client's name is a DNS SAN: its identity is ``dns:<name>``. The CA's key lies beside it,
unencrypted: not for production.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.errors import TlsInvalid
from progressdb_kms.kek.atomic import replace_file, write_once
from progressdb_kms.transport.issuing import (
    Authority,
    Names,
    is_issued_by,
    issue_leaf,
    load_certificate,
    load_key,
    new_authority,
    new_key,
    pem,
    pem_key,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography.hazmat.primitives.asymmetric import ec

CA_DAYS: Final = 3650
LEAF_DAYS: Final = 90

_NAME: Final = re.compile(r"(?!.*\.\.)[a-z0-9_]([a-z0-9_.-]{0,62}[a-z0-9])?")
_DNS: Final = re.compile(r"(\*\.)?[a-zA-Z0-9_]([a-zA-Z0-9_.-]{0,251}[a-zA-Z0-9])?")


@dataclass(frozen=True, slots=True)
class Issued:
    """Files of a certificate and of its private key, and when it expires."""

    cert: Path
    key: Path
    not_after: dt.datetime


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
        write_once(files.key, pem_key(new_key()), 0o600)
    ca = new_authority("progressdb-kms development CA", _load_key(files.key), _now(), days)
    write_once(files.cert, pem([ca.cert]), 0o644)
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
    names = _names(name, server=server, dns=dns, ips=ips)
    ca = _load_ca(directory)
    key = new_key()
    cert = issue_leaf(ca, names, key.public_key(), _now(), days)
    issued = Issued(directory / f"{name}.crt", directory / f"{name}.key", cert.not_valid_after_utc)
    replace_file(issued.key, pem_key(key), 0o600)
    replace_file(issued.cert, pem([cert]), 0o644)
    return issued


def is_usable(directory: Path, name: str, *, within: dt.timedelta) -> bool:
    """Say whether ``<name>.crt`` and ``.key`` are a pair of this CA that is valid for longer than ``within``.

    Raises:
        TlsInvalid: No usable CA there.
    """
    ca = _load_ca(directory)
    try:
        cert = load_certificate((directory / f"{name}.crt").read_bytes())
        key = _load_key(directory / f"{name}.key")
    except (OSError, TlsInvalid):
        return False
    if not is_issued_by(cert, ca.cert):
        return False
    return cert.public_key() == key.public_key() and cert.not_valid_after_utc > _now() + within


def _names(name: str, *, server: bool, dns: Sequence[str], ips: Sequence[str]) -> Names:
    if not server:
        if dns or ips:
            raise TlsInvalid("a client's only name is its own; --dns and --ip go with --server")
        return Names("client", name, (name,))
    for entry in dns:
        if not _DNS.fullmatch(entry):
            raise TlsInvalid("a DNS name has letters, digits, '.', '-' and '_' only")
    try:
        for entry in ips:
            ipaddress.ip_address(entry)
    except ValueError:
        raise TlsInvalid("an IP address is like 127.0.0.1 or ::1") from None
    return Names("server", name, tuple(dns if dns or ips else [name]), tuple(ips))


def _load_ca(directory: Path) -> Authority:
    path = directory / "ca.crt"
    try:
        cert = load_certificate(path.read_bytes())
    except OSError as error:
        raise TlsInvalid(
            f"can't read {path}: {error.strerror}; make a CA with pki init --dir {directory}"
        ) from None
    except TlsInvalid as error:
        raise TlsInvalid(f"{path} {error.detail}") from None
    key = _load_key(directory / "ca.key")
    if cert.public_key() != key.public_key():
        raise TlsInvalid(f"ca.crt and ca.key in {directory} do not belong together")
    if cert.not_valid_after_utc <= _now():
        raise TlsInvalid(f"{path} has expired; remove it and ca.key, and make a new CA")
    return Authority(cert, key)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        return load_key(path.read_bytes())
    except OSError as error:
        raise TlsInvalid(f"can't read {path}: {error.strerror}") from None
    except TlsInvalid as error:
        raise TlsInvalid(f"{path} {error.detail}") from None


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC).replace(microsecond=0)
