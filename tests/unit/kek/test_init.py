"""Making a KEK file: private, durable, and never over another."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.domain.errors import KekFileInvalid
from progressdb_kms.kek.atomic import replace_file, write_once
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.kek.init import init_kek_file


def names(directory: Path) -> list[str]:
    """Return what is in a directory."""
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def no_umask() -> Iterator[None]:
    """A umask that takes nothing away."""
    old = os.umask(0)
    yield
    os.umask(old)


async def test_makes_a_file_that_loads(tmp_path: Path, no_umask: None) -> None:
    """The file has mode 0600 in a 0700 directory and holds version 1 with the check value that was given."""
    path = tmp_path / "new" / "kek.yaml"
    value = init_kek_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert names(path.parent) == ["kek.yaml"]
    source = FileKekSource(path)
    assert source.versions() == {1}
    assert await source.matches(1, value)


def test_two_files_hold_two_keys(tmp_path: Path) -> None:
    """Each file has a key of its own."""
    assert init_kek_file(tmp_path / "a") != init_kek_file(tmp_path / "b")


def test_never_overwrites(tmp_path: Path) -> None:
    """An existing file, even an empty one or a dangling link, stays as it is."""
    path = tmp_path / "kek.yaml"
    path.write_text("")
    with pytest.raises(KekFileInvalid, match="never overwritten"):
        init_kek_file(path)
    assert path.read_text() == ""
    link = tmp_path / "link.yaml"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(KekFileInvalid, match="never overwritten"):
        init_kek_file(link)
    assert names(tmp_path) == ["kek.yaml", "link.yaml"]


def test_says_what_can_not_be_written(tmp_path: Path) -> None:
    """A directory that can't be made, or written, is named; nothing is left behind."""
    (tmp_path / "file").write_text("")
    with pytest.raises(KekFileInvalid, match="can't make the directory"):
        init_kek_file(tmp_path / "file" / "kek.yaml")
    with pytest.raises(KekFileInvalid, match="can't write"):
        init_kek_file(tmp_path / ("x" * 300))
    assert names(tmp_path) == ["file"]


def test_write_once_and_replace(tmp_path: Path, no_umask: None) -> None:
    """The one refuses a name that is taken, the other takes its place; both leave just the file."""
    path = tmp_path / "f"
    write_once(path, b"one", 0o644)
    with pytest.raises(FileExistsError):
        write_once(path, b"two", 0o600)
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"one", 0o644)
    replace_file(path, b"three", 0o600)
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"three", 0o600)
    assert names(tmp_path) == ["f"]
