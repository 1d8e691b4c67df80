"""The KEK file's form: YAML that holds keys themselves, and names of keys that are kept elsewhere.

Either ``master_key_hex: <64 hex digits>``, which is version 1, or ``versions: {1: <hex>, 2:
pkcs11:<label>}``. A version is one of

- 64 hex digits, a key;
- ``pkcs11:LABEL``, a key on the token of ``kek.pkcs11``;
- ``vault:KEY@VERSION``, a version of a key of the transit engine of ``kek.vault``;
- ``aws:ARN``, a key of AWS KMS.

No message of this module repeats anything that stands in the file but line and version numbers: a key put
in the wrong place (as a field's name, say) must not end up in a log. For the same reason the parser's own
errors, which quote the file, are never shown nor chained.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import yaml

from progressdb_kms.domain.envelope import MAX_KEK_VERSION
from progressdb_kms.domain.errors import KekFileInvalid
from progressdb_kms.domain.keyring import KEK_BYTES, Keyring
from progressdb_kms.files import read_private

if TYPE_CHECKING:
    from collections.abc import Mapping

_HEX_KEY: Final = re.compile(rf"[0-9a-fA-F]{{{2 * KEK_BYTES}}}")
_VERSION: Final = re.compile(r"[1-9][0-9]{0,7}")
_NAMES: Final = {
    # No label that looks like a key: names are not secret, and somebody may have put one in its place.
    "pkcs11": re.compile(rf"(?![0-9a-fA-F]{{{2 * KEK_BYTES}}}$)[ -~]{{1,255}}"),
    "vault": re.compile(r"[A-Za-z0-9_.-]{1,128}@[1-9][0-9]{0,8}"),
    # No alias: it may point to another key tomorrow.
    "aws": re.compile(r"arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]{12}:key/[A-Za-z0-9-]{1,64}"),
}
_FORMS: Final = "pkcs11:LABEL, vault:KEY@VERSION or aws:ARN (of a key, not of an alias)"
_HEAD: Final = """\
# Key-encryption keys by version. Whoever has this file and the store's data can read every message;
# whoever loses it can read none. Keep a copy in a safe place, and never change a version that is in use.
versions:
"""
_SHAPE: Final = "write either master_key_hex: <64 hex digits>, or versions: {1: <64 hex digits>, ...}"


@dataclass(frozen=True, slots=True)
class KeyName:
    """The name of a key that never leaves where it is kept; not secret.

    Attributes:
        kind: Where that is: ``pkcs11``, ``vault`` or ``aws``.
        name: Its name there.
    """

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


Entry = bytes | KeyName
"""What the file holds for a version: a raw key, or the name of one."""


def parse_key_name(text: str) -> KeyName:
    """Return the key that ``text`` names.

    Raises:
        KekFileInvalid: It is of none of the forms above; the text is not repeated.
    """
    kind, _, name = text.partition(":")
    form = _NAMES.get(kind)
    if form is None or not form.fullmatch(name):
        raise KekFileInvalid(f"a key that is kept elsewhere is named by {_FORMS}")
    return KeyName(kind, name)


def read_entries(path: Path) -> dict[int, Entry]:
    """Read a KEK file.

    Raises:
        KekFileInvalid: It can't be read, others can read it, or it is not of the form above; one line that
            names the file and what to change, and never shows its text.
    """
    return parse_entries(read_private(path, error=KekFileInvalid), str(path))


def parse_entries(data: bytes, name: str) -> dict[int, Entry]:
    """Return what a KEK file's content holds, by version.

    Args:
        data: The content.
        name: What to call it in a message.

    Raises:
        KekFileInvalid: It is not of the form above.
    """
    try:
        entries = _parse(data)
        if not entries:
            raise KekFileInvalid(f"there is no KEK in it; {_SHAPE}")  # noqa: TRY301 - as the errors of the others
        Keyring(raw_keys(entries))
        _require_different(entries)
    except KekFileInvalid as error:
        raise KekFileInvalid(f"{name}: {error.detail}") from None
    return entries


def raw_keys(entries: Mapping[int, Entry]) -> dict[int, bytes]:
    """Return the keys that the file itself holds."""
    return {version: entry for version, entry in entries.items() if isinstance(entry, bytes)}


def key_names(entries: Mapping[int, Entry]) -> dict[int, KeyName]:
    """Return the names of those that are kept elsewhere."""
    return {version: entry for version, entry in entries.items() if isinstance(entry, KeyName)}


def same_entry(one: Entry | None, other: Entry | None) -> bool:
    """Say whether two entries are the same, in a time that says nothing about a key."""
    if isinstance(one, bytes) and isinstance(other, bytes):
        return hmac.compare_digest(one, other)
    return one == other


def render_entries(entries: Mapping[int, Entry]) -> bytes:
    """Return the content of a KEK file with these versions."""
    # Quoted: a key of decimal digits only would be read as a number by other YAML tools.
    lines = [
        f'  {version}: "{entry.hex() if isinstance(entry, bytes) else _quoted(entry)}"\n'
        for version, entry in sorted(entries.items())
    ]
    return (_HEAD + "".join(lines)).encode()


def _quoted(name: KeyName) -> str:
    return str(name).replace("\\", "\\\\").replace('"', '\\"')


def _require_different(entries: Mapping[int, Entry]) -> None:
    seen: dict[KeyName, int] = {}
    for version, name in sorted(key_names(entries).items()):
        if not version <= MAX_KEK_VERSION:
            raise KekFileInvalid(f"KEK version {version} is not between 1 and {MAX_KEK_VERSION}")
        if name in seen:
            raise KekFileInvalid(f"KEK versions {seen[name]} and {version} are the same key")
        seen[name] = version


def _parse(data: bytes) -> dict[int, Entry]:
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


def _versions(node: yaml.Node) -> dict[int, Entry]:
    if not isinstance(node, yaml.MappingNode):
        raise KekFileInvalid(f"line {_line(node)}: versions is not a mapping; {_SHAPE}")
    entries: dict[int, Entry] = {}
    for number, value in node.value:
        if not isinstance(number, yaml.ScalarNode) or not _VERSION.fullmatch(number.value):
            raise KekFileInvalid(
                f"line {_line(number)}: a version is a whole number from 1 to {MAX_KEK_VERSION}"
            )
        version = int(number.value)
        if version in entries:
            raise KekFileInvalid(f"line {_line(number)}: version {version} is given twice")
        entries[version] = _entry(value)
    return entries


def _entry(node: yaml.Node) -> Entry:
    # What holds a colon is no key in hex, so nothing secret is taken for a name.
    if isinstance(node, yaml.ScalarNode) and ":" in node.value:
        try:
            return parse_key_name(node.value)
        except KekFileInvalid as error:
            raise KekFileInvalid(f"line {_line(node)}: {error.detail}") from None
    return _key(node)


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
