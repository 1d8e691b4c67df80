"""Escrow: each KEK version sealed to recovery public keys, so that a lost KEK source is not the end of all.

Sealing is HPKE (RFC 9180, base mode) with DHKEM(X25519, HKDF-SHA256), HKDF-SHA256 and AES-256-GCM. Its
``info`` binds a label, the store, the version and the KEK's check value: what was sealed for another store
or version does not open, and cannot be passed off as this one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from progressdb_kms.domain.errors import BackupInvalid, KekFileInvalid, RegistryLost
from progressdb_kms.domain.keyring import KekState, check_value
from progressdb_kms.files import read_private
from progressdb_kms.kek.atomic import write_once
from progressdb_kms.ports.escrow import EscrowBox, SealedKek

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from progressdb_kms.ports import KekRegistry, RegistryView

_SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_LABEL: Final = b"progressdb-kms/kek-escrow/v1"
PRIVATE_NAME: Final = "recovery.key"
PUBLIC_NAME: Final = "recovery.pub"


@dataclass(frozen=True, slots=True)
class Recipient:
    """A recovery public key and its fingerprint."""

    fingerprint: str
    key: X25519PublicKey


class Exporter(Protocol):
    """A KEK source that can show raw keys for their escrow."""

    def exportable(self) -> frozenset[int]:
        """Return the loaded versions whose raw keys it can show."""

    def export(self, version: int) -> bytes:
        """Return a loaded version's raw key."""


def fingerprint(key: X25519PublicKey) -> str:
    """Return SHA-256 of the key's SubjectPublicKeyInfo (DER) in hex."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def load_recipients(paths: Sequence[Path]) -> tuple[Recipient, ...]:
    """Read recovery public keys.

    Raises:
        KekFileInvalid: A file can't be read, is no X25519 public key in PEM, or a key is given twice.
    """
    found: dict[str, Recipient] = {}
    for path in paths:
        try:
            key = serialization.load_pem_public_key(path.read_bytes())
        except OSError as error:
            raise KekFileInvalid(f"can't read the recovery key {path}: {error.strerror}") from None
        except ValueError:
            # Perhaps the private key, put here by mistake: nothing of it may be shown.
            raise KekFileInvalid(f"{path} is not a public key in PEM (see kek escrow keygen)") from None
        if not isinstance(key, X25519PublicKey):
            raise KekFileInvalid(f"{path} is not an X25519 public key (see kek escrow keygen)")
        recipient = Recipient(fingerprint(key), key)
        if recipient.fingerprint in found:
            raise KekFileInvalid(f"{path} is a recovery key that is given already")
        found[recipient.fingerprint] = recipient
    return tuple(found.values())


def load_recovery_key(path: Path) -> X25519PrivateKey:
    """Read a recovery private key, which only its owner may be able to read.

    Raises:
        KekFileInvalid: It can't be read, others can read it, or it is no X25519 private key in PEM.
    """
    data = read_private(path, error=KekFileInvalid)
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError):
        raise KekFileInvalid(f"{path} is not an unencrypted private key in PEM") from None
    if not isinstance(key, X25519PrivateKey):
        raise KekFileInvalid(f"{path} is not an X25519 private key")
    return key


def make_recovery_key(directory: Path) -> str:
    """Make a recovery key pair, ``recovery.key`` (0600) and ``recovery.pub``; never over existing files.

    Returns:
        The public key's fingerprint.

    Raises:
        KekFileInvalid: A file exists already, or can't be written.
    """
    private = X25519PrivateKey.generate()
    public = private.public_key()
    secret = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    shown = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_once(directory / PRIVATE_NAME, secret, 0o600)
        write_once(directory / PUBLIC_NAME, shown, 0o644)
    except FileExistsError:
        raise KekFileInvalid(
            f"{directory} holds a recovery key already, which is never overwritten"
        ) from None
    except OSError as error:
        raise KekFileInvalid(f"can't write into {directory}: {error.strerror}") from None
    return fingerprint(public)


def seal(key: bytes, recipient: Recipient, store_id: str, version: int) -> SealedKek:
    """Seal a KEK to a recovery key."""
    info = _info(store_id, version, check_value(key))
    return SealedKek(recipient.fingerprint, _SUITE.encrypt(key, recipient.key, info))


class Escrow:
    """Keeps every loaded KEK version sealed to every recovery key.

    Args:
        box: Where it is kept.
        registry: Says which versions there are, and of which store.
        source: Shows the raw keys.
        recipients: The recovery keys; none switches escrow off.
    """

    def __init__(
        self, box: EscrowBox, registry: KekRegistry, source: Exporter, recipients: Sequence[Recipient]
    ) -> None:
        self._box = box
        self._registry = registry
        self._source = source
        self._recipients = recipients

    async def complete(self, version: int = 0) -> int:
        """Seal what is not sealed yet: ``version``, and every registered version that is loaded.

        A key that never leaves where it is kept can't be sealed: its copy is that place's own matter.

        Returns:
            The number of recovery keys that ``version`` is sealed to; where none is given, of those that
            every version that can be sealed is sealed to.

        Raises:
            RegistryLost: The store has no registry.
            KekFileInvalid: A key can't be read from its source.
            BackupInvalid: What is kept can't be read.
            StoreUnavailable, StoreNotDurable: Not now.
        """
        if not self._recipients:
            return 0
        view = await self._registry.load()
        if view is None:
            raise RegistryLost("the store has no registry of KEKs")
        kept = await self._box.load()
        registered = {kek.version for kek in view.keks.values() if kek.state is not KekState.RETIRED}
        exportable = self._source.exportable()
        for number in sorted((registered | {version}) & exportable):
            have = list(kept.get(number, ()))
            known = {item.recipient for item in have}
            missing = [item for item in self._recipients if item.fingerprint not in known]
            if missing:
                key = self._source.export(number)
                have += [seal(key, item, view.store_id, number) for item in missing]
                await self._box.save(number, have)
        return len(self._recipients) if version in exportable or not version else 0


def recover(
    kept: Mapping[int, Sequence[SealedKek]], view: RegistryView, private: X25519PrivateKey
) -> dict[int, bytes]:
    """Open what is sealed to a recovery key, and return raw keys by version.

    Args:
        kept: What the escrow holds.
        view: The registry of the same store: its name and the check values.
        private: The recovery key.

    Raises:
        BackupInvalid: Nothing is sealed to this key, or an entry does not open, or opens to another key than
            the registered one.
    """
    mine = fingerprint(private.public_key())
    found: dict[int, bytes] = {}
    for version, sealed in sorted(kept.items()):
        kek = view.keks.get(version)
        for item in sealed:
            if item.recipient != mine or kek is None:
                continue
            try:
                key = _SUITE.decrypt(item.sealed, private, _info(view.store_id, version, kek.check_value))
            except (InvalidTag, ValueError):
                raise BackupInvalid(
                    f"the escrow of KEK version {version} does not open: damaged, or of another store"
                ) from None
            if check_value(key) != kek.check_value:
                raise BackupInvalid(f"the escrow of KEK version {version} holds another key")
            found[version] = key
    if not found:
        raise BackupInvalid(f"nothing is escrowed to this recovery key ({mine[:16]}...): see kek escrow list")
    return found


def _info(store_id: str, version: int, value: str) -> bytes:
    """Return HPKE's info: each part with its length before it, so that no two read the same."""
    parts = (_LABEL, store_id.encode(), version.to_bytes(4, "big"), value.encode())
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)
