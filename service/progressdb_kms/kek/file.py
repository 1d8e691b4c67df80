"""The KEK source: what the KEK file holds or names."""

from __future__ import annotations

import hmac
import os
from pathlib import Path
from typing import TYPE_CHECKING

from progressdb_kms.domain.envelope import NONCE_BYTES
from progressdb_kms.domain.errors import KekFileInvalid, KmsError
from progressdb_kms.domain.keyring import KekInfo, Keyring, check_value
from progressdb_kms.kek.keyfile import key_names, raw_keys, read_entries

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from progressdb_kms.kek.hidden import HiddenKeks
    from progressdb_kms.kek.keyfile import KeyName


class FileKekSource:
    """A ``ports.KekSource`` over a file that only the service may read.

    Keys that the file holds are used here; those that it names are used where they are kept.

    Args:
        path: The KEK file.
        keepers: Where keys are that the file names, by kind.

    Raises:
        KekFileInvalid: It can't be read, others can read it, it is not of the form of ``kek.keyfile``, or
        names a
            key of a kind that there is no keeper for.
    """

    def __init__(self, path: Path, keepers: Mapping[str, HiddenKeks] | None = None) -> None:
        self._path = path
        self._keepers = keepers or {}
        self._loaded = self._load()

    def __repr__(self) -> str:
        return f"FileKekSource({str(self._path)!r}, versions={sorted(self.versions())})"

    @property
    def path(self) -> Path:
        """The KEK file."""
        return self._path

    def versions(self) -> frozenset[int]:
        """Return the versions that are loaded now."""
        keyring, names = self._loaded
        return keyring.versions | names.keys()

    def exportable(self) -> frozenset[int]:
        """Return the loaded versions whose keys the file holds."""
        return self._loaded[0].versions

    def export(self, version: int) -> bytes:
        """Return a loaded version's raw key, for its escrow alone.

        The key comes from the file, since nothing in memory gives it back, and only if it is the loaded one.

        Raises:
            KekUnavailable: Not loaded, or not one that the file holds.
            KekFileInvalid: The file can't be read, or holds another key under this version by now.
        """
        value = self._loaded[0].check_value(version)
        key = raw_keys(read_entries(self._path)).get(version)
        if key is None or not _same(check_value(key), value):
            raise KekFileInvalid(f"{self._path}: KEK version {version} is not the key that is loaded")
        return key

    def kind(self, version: int) -> str:
        """Return ``file`` for a key that the file holds, else the kind of its keeper."""
        name = self._loaded[1].get(version)
        return "file" if name is None else name.kind

    def source_key(self, version: int) -> str:
        """Return the name of a version's key where it is kept; in the file that is its number."""
        name = self._loaded[1].get(version)
        return str(version) if name is None else name.name

    async def check_value(self, version: int) -> str:
        """Return ``domain.keyring.check_value`` of a version, or a canary (``kek.hidden``).

        Raises:
            KekUnavailable: Not loaded, or not to be had where it is kept.
        """
        keyring, names = self._loaded
        if version in names:
            keeper, name = self._kept(names[version])
            return await keeper.check_value(name)
        return keyring.check_value(version)

    async def matches(self, version: int, check_value: str) -> bool:
        """Say whether the loaded key of ``version`` has this check value.

        Raises:
            KekUnavailable: Not loaded, or not to be had where it is kept.
        """
        keyring, names = self._loaded
        if version in names:
            keeper, name = self._kept(names[version])
            return await keeper.matches(name, check_value)
        return _same(keyring.check_value(version), check_value)

    async def wrap(self, version: int, deks: Sequence[bytes], aads: Sequence[bytes]) -> list[bytes]:
        """Wrap raw DEKs, each under a fresh random nonce, and return the bodies: here of 60 bytes each.

        Raises:
            KekUnavailable: Not loaded, or not to be had where it is kept.
        """
        keyring, names = self._loaded
        if version in names:
            keeper, name = self._kept(names[version])
            return await keeper.wrap(name, deks, aads)
        return keyring.wrap_all(version, deks, aads, os.urandom(NONCE_BYTES * len(deks)))

    async def unwrap(
        self, version: int, bodies: Sequence[bytes], aads: Sequence[bytes]
    ) -> list[bytes | KmsError]:
        """Return the raw DEKs, with WrappedKeyInvalid in the place of one that does not unwrap.

        Raises:
            KekUnavailable: Not loaded, or not to be had where it is kept.
        """
        keyring, names = self._loaded
        if version in names:
            keeper, name = self._kept(names[version])
            return await keeper.unwrap(name, bodies, aads)
        return keyring.unwrap_all(version, bodies, aads)

    async def seal(self, kek: KekInfo, label: bytes, digest: bytes) -> bytes:
        """Return ``domain.keyring.seal_under`` a key that only whoever has this KEK can derive.

        Raises:
            KekUnavailable: Not loaded, or not to be had where it is kept.
        """
        keyring, names = self._loaded
        if kek.version in names:
            keeper, name = self._kept(names[kek.version])
            return await keeper.seal(name, kek.check_value, label, digest)
        return keyring.seal(kek.version, label, digest)

    def reload(self, required: Mapping[int, str]) -> bool:
        """Read the file again and take it whole, or keep what is loaded.

        Args:
            required: Version to check value of every version that stored keys may still need (all but
                retired ones).

        Returns:
            Whether anything changed.

        Raises:
            KekFileInvalid: It is broken, changes a required version, or lacks one that is loaded. What was
                loaded stays.
        """
        fresh, names = self._load()
        before, names_before = self._loaded
        for version, value in sorted(required.items()):
            if version not in fresh.versions | names.keys():
                if version not in before.versions | names_before.keys():
                    continue  # It is lost already: to refuse what else the file has brings nothing back.
                raise KekFileInvalid(
                    f"{self._path}: KEK version {version}, which stored keys need, is missing; put it back"
                )
            # Whether the key of a name is the right one, only its keeper can say: ``matches`` asks.
            if version in names:
                same = version not in before.versions and names_before.get(version) in {None, names[version]}
            else:
                same = _same(fresh.check_value(version), value)
            if not same:
                raise KekFileInvalid(
                    f"{self._path}: KEK version {version} is another key than the one that stored keys need; "
                    "put the old one back, and give a new key a new number"
                )
        changed = _checks(fresh) != _checks(before) or names != names_before
        # A single assignment: calls under way keep the cipher that they have taken from the old keyring.
        self._loaded = fresh, names
        return changed

    def _load(self) -> tuple[Keyring, dict[int, KeyName]]:
        entries = read_entries(self._path)
        names = key_names(entries)
        for version, name in sorted(names.items()):
            if name.kind not in self._keepers:
                raise KekFileInvalid(
                    f"{self._path}: KEK version {version} is kept by {name.kind}, and the configuration does"
                    f" not say where that is: add kek.{name.kind}"
                )
        return Keyring(raw_keys(entries)), names

    def _kept(self, name: KeyName) -> tuple[HiddenKeks, KeyName]:
        return self._keepers[name.kind], name


def _same(one: str, other: str) -> bool:
    # Bytes, since compare_digest takes no text beyond ASCII and a registry may hold anything.
    return hmac.compare_digest(one.encode(), other.encode())


def _checks(keyring: Keyring) -> dict[int, str]:
    return {version: keyring.check_value(version) for version in keyring.versions}
