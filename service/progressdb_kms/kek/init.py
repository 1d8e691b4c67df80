"""Makes a KEK file, and never overwrites one: without its KEK, every key in the store is lost."""

from __future__ import annotations

import os
from pathlib import Path

from progressdb_kms.domain.errors import KekFileInvalid
from progressdb_kms.domain.keyring import KEK_BYTES, check_value
from progressdb_kms.kek.atomic import write_once
from progressdb_kms.kek.keyfile import render_entries


def init_kek_file(path: Path) -> str:
    """Make a KEK file with one fresh random key as version 1, readable by its owner only.

    A missing directory is made, with mode 0700.

    Returns:
        The key's check value, which is not secret.

    Raises:
        KekFileInvalid: The file exists already, or can't be written.
    """
    key = os.urandom(KEK_BYTES)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KekFileInvalid(f"can't make the directory {path.parent}: {error.strerror}") from None
    try:
        write_once(path, render_entries({1: key}), 0o600)
    except FileExistsError:
        raise KekFileInvalid(
            f"{path} exists already and is never overwritten; choose another --file"
        ) from None
    except OSError as error:
        raise KekFileInvalid(f"can't write {path}: {error.strerror}") from None
    return check_value(key)
