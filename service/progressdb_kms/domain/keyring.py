"""KEK versions held in memory, their check values, and the registry's record of a KEK."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from progressdb_kms.domain.envelope import MAX_KEK_VERSION, NONCE_BYTES, unwrap, wrap
from progressdb_kms.domain.errors import KekFileInvalid, KekUnavailable, KmsError, WrappedKeyInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KEK_BYTES: Final = 32
KEPT_ELSEWHERE: Final = frozenset({"pkcs11", "vault", "aws"})
"""Kinds of sources that never show a key: nothing is said of one there that is not the right one."""
_CHECK_LABEL: Final = b"progressdb-kms/kek-check/v1"
_SEAL_LABEL: Final = b"progressdb-kms/kek-seal/v1"


class KekState(StrEnum):
    """States of a KEK version. Exactly one version is active: new wraps use it."""

    STAGED = "staged"
    ACTIVE = "active"
    DECRYPT_ONLY = "decrypt_only"
    RETIRED = "retired"


@dataclass(frozen=True, slots=True)
class KekInfo:
    """What the registry says of one KEK version; nothing in it is secret.

    Attributes:
        version: Registry-wide number, from 1.
        kek_id: Name that answers carry, at most 64 bytes.
        source: Kind of source that holds it: ``file``, ``pkcs11``, ``vault`` or ``aws``.
        source_key: The source's own name for it.
        check_value: What ``KekSource.check_value`` gave when it was registered.
        state: Present state.
        created_at: Unix seconds of registration.
        activated_at: Unix seconds of activation, None before.
    """

    version: int
    kek_id: str
    source: str
    source_key: str
    check_value: str
    state: KekState
    created_at: int
    activated_at: int | None = None


def check_value(key: bytes) -> str:
    """Return the check value of a KEK in hex: HMAC-SHA256 of a fixed label under the key (RFC 2104).

    It tells two keys apart and says nothing about either. The version is not in it, so that one key put
    under two numbers is recognised.
    """
    return hmac.new(key, _CHECK_LABEL, hashlib.sha256).hexdigest()


def kek_id_of(value: str) -> str:
    """Return the public name of a KEK from its check value."""
    return f"kek_{value[:16]}"


def sealing_key(secret: bytes) -> bytes:
    """Return the key for seals that belongs to a uniform secret of 32 bytes, and says nothing about it.

    A key of its own, so that no seal can ever be an input or output of a wrap. The secret is uniform
    already, so only the second half of HKDF (RFC 5869, 3.3) is needed.
    """
    return HKDFExpand(hashes.SHA256(), KEK_BYTES, _SEAL_LABEL).derive(secret)


def seal_under(key: bytes, label: bytes, digest: bytes) -> bytes:
    """Return HMAC-SHA256 (RFC 2104) over label and digest under a key from ``sealing_key``."""
    return hmac.new(key, len(label).to_bytes(4, "big") + label + digest, hashlib.sha256).digest()


class Keyring:
    """KEK versions with their ciphers. Immutable: a reload makes a new one.

    Args:
        keys: Version to 32-byte key.

    Raises:
        KekFileInvalid: A bad length or version, or one key under two versions.
    """

    __slots__ = ("_checks", "_ciphers", "_sealing")

    def __init__(self, keys: Mapping[int, bytes]) -> None:
        self._ciphers: dict[int, AESGCM] = {}
        self._checks: dict[int, str] = {}
        self._sealing: dict[int, bytes] = {}
        for version, key in sorted(keys.items()):
            if not 1 <= version <= MAX_KEK_VERSION:
                raise KekFileInvalid(f"KEK version {version} is not between 1 and {MAX_KEK_VERSION}")
            if len(key) != KEK_BYTES:
                raise KekFileInvalid(f"KEK version {version} has {len(key)} bytes instead of {KEK_BYTES}")
            value = check_value(key)
            for other, known in self._checks.items():
                if hmac.compare_digest(known, value):
                    raise KekFileInvalid(f"KEK versions {other} and {version} are the same key")
            self._ciphers[version] = AESGCM(key)
            self._checks[version] = value
            self._sealing[version] = sealing_key(key)

    def __repr__(self) -> str:
        return f"Keyring(versions={list(self._ciphers)})"

    @property
    def versions(self) -> frozenset[int]:
        """The versions that are loaded."""
        return frozenset(self._ciphers)

    def check_value(self, version: int) -> str:
        """Return the check value of a loaded version.

        Raises:
            KekUnavailable: Not loaded.
        """
        self.cipher(version)
        return self._checks[version]

    def cipher(self, version: int) -> AESGCM:
        """Return the cipher of a loaded version.

        Raises:
            KekUnavailable: Not loaded.
        """
        try:
            return self._ciphers[version]
        except KeyError:
            raise KekUnavailable(f"KEK version {version} is not loaded; add it to the KEK file") from None

    def wrap_all(
        self, version: int, deks: Sequence[bytes], aads: Sequence[bytes], nonces: bytes
    ) -> list[bytes]:
        """Wrap raw DEKs and return the bodies, 60 bytes each.

        Args:
            version: The KEK.
            deks: Raw DEKs.
            aads: What each wrap binds.
            nonces: ``NONCE_BYTES`` fresh random bytes for each DEK. One random string for a whole batch:
                slices of it are as independent as separate draws.

        Raises:
            KekUnavailable: Not loaded.
        """
        cipher = self.cipher(version)
        return [
            wrap(cipher, nonces[at * NONCE_BYTES : (at + 1) * NONCE_BYTES], dek, aad)
            for at, (dek, aad) in enumerate(zip(deks, aads, strict=True))
        ]

    def unwrap_all(
        self, version: int, bodies: Sequence[bytes], aads: Sequence[bytes]
    ) -> list[bytes | KmsError]:
        """Return raw DEKs, with WrappedKeyInvalid in the place of one that does not unwrap.

        Raises:
            KekUnavailable: Not loaded.
        """
        cipher = self.cipher(version)
        results: list[bytes | KmsError] = []
        for body, aad in zip(bodies, aads, strict=True):
            try:
                results.append(unwrap(cipher, body, aad))
            except WrappedKeyInvalid as error:
                results.append(error)
        return results

    def seal(self, version: int, label: bytes, digest: bytes) -> bytes:
        """Return HMAC-SHA256 (RFC 2104) over label and digest under a key derived from a loaded version.

        Raises:
            KekUnavailable: Not loaded.
        """
        self.cipher(version)
        return seal_under(self._sealing[version], label, digest)
