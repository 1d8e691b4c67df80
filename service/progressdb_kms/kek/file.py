"""The KEK file: YAML that holds the keys themselves.

Either ``master_key_hex: <64 hex digits>``, which is version 1, or ``versions: {1: <hex>, 2: <hex>}``.

No message of this module repeats anything that stands in the file but line and version numbers: a key put
in the wrong place (as a field's name, say) must not end up in a log. For the same reason the parser's own
errors, which quote the file, are never shown nor chained.
"""

from __future__ import annotations

import hmac
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import yaml

from progressdb_kms.domain.envelope import MAX_KEK_VERSION, NONCE_BYTES
from progressdb_kms.domain.errors import KekFileInvalid, KmsError
from progressdb_kms.domain.keyring import KEK_BYTES, Keyring, check_value
from progressdb_kms.files import read_private

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_HEX_KEY: Final = re.compile(rf"[0-9a-fA-F]{{{2 * KEK_BYTES}}}")
_VERSION: Final = re.compile(r"[1-9][0-9]{0,7}")
_HEAD: Final = """\
# Key-encryption keys by version. Whoever has this file and the store's data can read every message;
# whoever loses it can read none. Keep a copy in a safe place, and never change a version that is in use.
versions:
"""
_SHAPE: Final = "write either master_key_hex: <64 hex digits>, or versions: {1: <64 hex digits>, ...}"


class FileKekSource:
    """A ``ports.KekSource`` over a file that only the service may read.

    Args:
        path: The KEK file.

    Raises:
        KekFileInvalid: It can't be read, others can read it, or it is not of the form above.
    """

    name = "file"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keyring = load_keyring(path)

    def __repr__(self) -> str:
        return f"FileKekSource({str(self._path)!r}, versions={sorted(self.versions())})"

    @property
    def path(self) -> Path:
        """The KEK file."""
        return self._path

    def versions(self) -> frozenset[int]:
        """Return the versions that are loaded now."""
        return self._keyring.versions

    def export(self, version: int) -> bytes:
        """Return a loaded version's raw key, for its escrow alone.

        The key comes from the file, since nothing in memory gives it back, and only if it is the loaded one.

        Raises:
            KekUnavailable: Not loaded.
            KekFileInvalid: The file can't be read, or holds another key under this version by now.
        """
        value = self._keyring.check_value(version)
        key = read_keys(self._path).get(version)
        if key is None or not _same(check_value(key), value):
            raise KekFileInvalid(f"{self._path}: KEK version {version} is not the key that is loaded")
        return key

    def source_key(self, version: int) -> str:
        """Return the file's own name for a version: its number."""
        return str(version)

    async def check_value(self, version: int) -> str:
        """Return ``domain.keyring.check_value`` of a version.

        Raises:
            KekUnavailable: Not loaded.
        """
        return self._keyring.check_value(version)

    async def matches(self, version: int, check_value: str) -> bool:
        """Say whether the loaded key of ``version`` has this check value.

        Raises:
            KekUnavailable: Not loaded.
        """
        return _same(self._keyring.check_value(version), check_value)

    async def wrap(self, version: int, deks: Sequence[bytes], aads: Sequence[bytes]) -> list[bytes]:
        """Wrap raw DEKs, each under a fresh random nonce, and return the bodies (60 bytes each).

        Raises:
            KekUnavailable: Not loaded.
        """
        return self._keyring.wrap_all(version, deks, aads, os.urandom(NONCE_BYTES * len(deks)))

    async def unwrap(
        self, version: int, bodies: Sequence[bytes], aads: Sequence[bytes]
    ) -> list[bytes | KmsError]:
        """Return the raw DEKs, with WrappedKeyInvalid in the place of one that does not unwrap.

        Raises:
            KekUnavailable: Not loaded.
        """
        return self._keyring.unwrap_all(version, bodies, aads)

    async def seal(self, version: int, label: bytes, digest: bytes) -> bytes:
        """Return ``Keyring.seal`` of a version.

        Raises:
            KekUnavailable: Not loaded.
        """
        return self._keyring.seal(version, label, digest)

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
        fresh = load_keyring(self._path)
        for version, value in sorted(required.items()):
            if version not in fresh.versions:
                if version not in self._keyring.versions:
                    continue  # It is lost already: to refuse what else the file has brings nothing back.
                raise KekFileInvalid(
                    f"{self._path}: KEK version {version}, which stored keys need, is missing; put it back"
                )
            if not _same(fresh.check_value(version), value):
                raise KekFileInvalid(
                    f"{self._path}: KEK version {version} is another key than the one that stored keys need; "
                    "put the old one back, and give a new key a new number"
                )
        changed = _checks(fresh) != _checks(self._keyring)
        # A single assignment: calls under way keep the cipher that they have taken from the old keyring.
        self._keyring = fresh
        return changed


def load_keyring(path: Path) -> Keyring:
    """Read a KEK file.

    Raises:
        KekFileInvalid: It can't be read, others can read it, or it is not of the form above; one line that
            names the file and what to change, and never shows its text.
    """
    return Keyring(read_keys(path))


def read_keys(path: Path) -> dict[int, bytes]:
    """Read a KEK file and return the raw keys by version: for what stages, escrows and recovers them.

    Raises:
        KekFileInvalid: As ``load_keyring``.
    """
    return parse_keys(read_private(path, error=KekFileInvalid), str(path))


def parse_keys(data: bytes, name: str) -> dict[int, bytes]:
    """Return the raw keys by version of a KEK file's content.

    Args:
        data: The content.
        name: What to call it in a message.

    Raises:
        KekFileInvalid: It is not of the form above.
    """
    try:
        keys = _parse(data)
        Keyring(keys)
    except KekFileInvalid as error:
        raise KekFileInvalid(f"{name}: {error.detail}") from None
    return keys


def render_keys(keys: Mapping[int, bytes]) -> bytes:
    """Return the content of a KEK file with these versions."""
    # Quoted: a key of decimal digits only would be read as a number by other YAML tools.
    return (
        _HEAD + "".join(f'  {version}: "{key.hex()}"\n' for version, key in sorted(keys.items()))
    ).encode()


def _same(one: str, other: str) -> bool:
    # Bytes, since compare_digest takes no text beyond ASCII and a registry may hold anything.
    return hmac.compare_digest(one.encode(), other.encode())


def _checks(keyring: Keyring) -> dict[int, str]:
    return {version: keyring.check_value(version) for version in keyring.versions}


def _parse(data: bytes) -> dict[int, bytes]:
    """Return version to key, from the node graph.

    Not from constructed objects: YAML would make an integer of a key that happens to have decimal digits
    only, and would silently drop the first of two equal version numbers.
    """
    root = _compose(data)
    if not isinstance(root, yaml.MappingNode):
        raise KekFileInvalid(f"it is not a YAML mapping; {_SHAPE}")
    fields: dict[str, yaml.Node] = {}
    for name, value in root.value:
        if not isinstance(name, yaml.ScalarNode) or name.value not in {"master_key_hex", "versions"}:
            raise KekFileInvalid(f"line {_line(name)}: unknown field; {_SHAPE}")
        if name.value in fields:
            raise KekFileInvalid(f"line {_line(name)}: {name.value} is given twice")
        fields[name.value] = value
    if len(fields) != 1:
        problem = "it holds both master_key_hex and versions" if fields else "there is no KEK in it"
        raise KekFileInvalid(f"{problem}; {_SHAPE}")
    if "master_key_hex" in fields:
        return {1: _key(fields["master_key_hex"])}
    return _versions(fields["versions"])


def _versions(node: yaml.Node) -> dict[int, bytes]:
    if not isinstance(node, yaml.MappingNode):
        raise KekFileInvalid(f"line {_line(node)}: versions is not a mapping; {_SHAPE}")
    keys: dict[int, bytes] = {}
    for number, value in node.value:
        if not isinstance(number, yaml.ScalarNode) or not _VERSION.fullmatch(number.value):
            raise KekFileInvalid(
                f"line {_line(number)}: a version is a whole number from 1 to {MAX_KEK_VERSION}"
            )
        version = int(number.value)
        if version in keys:
            raise KekFileInvalid(f"line {_line(number)}: version {version} is given twice")
        keys[version] = _key(value)
    return keys


def _key(node: yaml.Node) -> bytes:
    if not isinstance(node, yaml.ScalarNode) or not _HEX_KEY.fullmatch(node.value):
        size = f"; this one has {len(node.value)} characters" if isinstance(node, yaml.ScalarNode) else ""
        raise KekFileInvalid(f"line {_line(node)}: a KEK is {2 * KEK_BYTES} hex digits{size}")
    return bytes.fromhex(node.value)


def _compose(data: bytes) -> yaml.Node | None:
    line = ""
    try:
        node: yaml.Node | None = yaml.compose(data, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
    except RecursionError:  # brackets nested thousands deep; still a broken file and not a dead service
        line = ": it is nested too deep"
    else:
        return node
    # Outside the handler, so that the parser's error, which quotes the file, is not this one's context.
    raise KekFileInvalid(f"it is not valid YAML{line}")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
