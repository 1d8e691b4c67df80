"""The file with the older service's master key."""

from __future__ import annotations

from pathlib import Path

import pytest

from progressdb_kms.domain.errors import KekFileInvalid
from progressdb_kms.kek.older import load_master_key
from tests.older_service import OlderService

older = OlderService()
KEY = older.create("t", raw=True)
HEX = older.master.hex()


def filled(form: str) -> str:
    """Return a text with the key in it: names of tests must be the same in each process."""
    return form.replace("HEX", HEX).replace("UPPER", HEX.upper()).replace("SHORT", HEX[:-1])


def written(folder: Path, text: str, mode: int = 0o600) -> Path:
    """Return a file."""
    path = folder / "master"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    "form",
    [
        "HEX",
        "UPPER\n",
        "master_key_hex: HEX\n",
        '# the older service\'s\nmaster_key_hex: "HEX"\n',
        "master_key: 'HEX'",
    ],
)
def test_forms(tmp_path: Path, form: str) -> None:
    """The digits alone, or as they stand in the older service's configuration."""
    assert load_master_key(written(tmp_path, filled(form))).unwrap(older.store[f"dek:{KEY}"]) == older.dek(
        KEY
    )


@pytest.mark.parametrize(
    "form",
    [
        "",
        "SHORT",
        "HEX0",
        "SHORTg",
        "HEX\nHEX",
        "master_key_hex: HEX\nsocket: x",
        '"HEX',
    ],
)
def test_other_forms_are_refused(tmp_path: Path, form: str) -> None:
    """What the file holds instead is not repeated."""
    with pytest.raises(KekFileInvalid, match="does not hold") as caught:
        load_master_key(written(tmp_path, filled(form)))
    assert HEX[:8] not in str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o700])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    """As with every file that holds a key."""
    with pytest.raises(KekFileInvalid, match="wider than a secret may be"):
        load_master_key(written(tmp_path, HEX, mode))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """With why it can't be read."""
    with pytest.raises(KekFileInvalid, match=r"can't read .*/none: No such file"):
        load_master_key(tmp_path / "none")
