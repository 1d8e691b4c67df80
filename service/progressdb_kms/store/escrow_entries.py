"""How the store writes down sealed KEKs: a version's entry is a JSON list of ``{recipient, sealed}``."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence

from progressdb_kms.domain.errors import BackupInvalid
from progressdb_kms.ports.escrow import SealedKek


def encode_entry(sealed: Sequence[SealedKek]) -> str:
    """Return the entry of one KEK version."""
    return json.dumps(
        [{"recipient": item.recipient, "sealed": base64.b64encode(item.sealed).decode()} for item in sealed],
        separators=(",", ":"),
    )


def decode_entry(entry: bytes | str) -> tuple[SealedKek, ...]:
    """Return what an entry holds.

    Raises:
        BackupInvalid: It can't be read.
    """
    try:
        return tuple(
            SealedKek(str(item["recipient"]), base64.b64decode(item["sealed"], validate=True))
            for item in json.loads(entry)
        )
    except (ValueError, KeyError, TypeError, binascii.Error):
        raise BackupInvalid("an entry of the escrow can't be read: damaged, or of a newer release") from None
