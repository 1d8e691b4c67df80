"""The file with the older service's master key."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.errors import KekFileInvalid
from progressdb_kms.domain.older import MasterKey
from progressdb_kms.files import read_private

if TYPE_CHECKING:
    from pathlib import Path

_FORM: Final = re.compile(
    rb"\s*(?:#[^\n]*\n\s*)*(?:master_key(?:_hex)?:[ \t]*)?([\"']?)([0-9a-fA-F]{64})\1\s*"
)


def load_master_key(path: Path) -> MasterKey:
    """Read the older service's master key: 64 hex digits, alone or behind its ``master_key_hex:``.

    Raises:
        KekFileInvalid: It can't be read, others can read it, or it is of another form. Nothing of it is
            shown.
    """
    found = _FORM.fullmatch(read_private(path, error=KekFileInvalid))
    if found is None:
        raise KekFileInvalid(
            f"{path} does not hold the older service's master key: 64 hex digits, or the line master_key_hex"
            " of its configuration, and nothing else"
        )
    return MasterKey(bytes.fromhex(found[2].decode()))
