"""A new KEK version in the KEK file: added whole, never over what is there."""

# ruff: noqa: ASYNC240 - a test may wait for a small file
from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from progressdb_kms.domain.errors import KekFileInvalid, RotationRefused
from progressdb_kms.domain.keyring import check_value
from progressdb_kms.kek.escrow import Escrow
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.kek.keyfile import parse_entries, raw_keys, render_entries
from progressdb_kms.kek.staging import ExternalKekStager, FileKekStager, add_version
from progressdb_kms.store.memory import MemoryStore
from progressdb_kms.store.memory_escrow import MemoryEscrowBox

KEY = bytes(range(32))
OTHER = bytes(range(1, 33))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a KEK file with version 1."""
    file = tmp_path / "kek.yaml"
    file.write_bytes(render_entries({1: KEY}))
    file.chmod(0o600)
    return file


def required() -> Mapping[int, str]:
    """Return what stored keys need."""
    return {1: check_value(KEY)}


def escrow(source: FileKekSource) -> Escrow:
    """Return an escrow that is off."""
    return Escrow(MemoryEscrowBox(), MemoryStore(), source, ())


def stager(path: Path) -> FileKekStager:
    """Return a stager over a file."""
    source = FileKekSource(path)
    return FileKekStager(source, required, escrow(source))


async def test_adds_a_version_and_loads_it(path: Path) -> None:
    """The new version is random, in the file and loaded; the old one is untouched."""
    source = FileKekSource(path)
    await FileKekStager(source, required, escrow(source)).stage(2)
    assert source.versions() == {1, 2}
    keys = raw_keys(parse_entries(path.read_bytes(), "x"))
    assert keys[1] == KEY
    assert len(keys[2]) == 32
    await FileKekStager(source, required, escrow(source)).stage(3)
    assert parse_entries(path.read_bytes(), "x")[2] == keys[2]


async def test_adopts_a_version_that_is_there(path: Path) -> None:
    """What a killed run, or an operator, has added is taken, and the file not written again."""
    path.write_bytes(render_entries({1: KEY, 2: OTHER}))
    before = path.stat()
    await stager(path).stage(2)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert parse_entries(path.read_bytes(), "x")[2] == OTHER


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
async def test_keeps_mode_and_owner(path: Path, mode: int) -> None:
    """The file that takes the old one's place has its mode and owner."""
    path.chmod(mode)
    if os.geteuid() == 0:
        os.chown(path, 4321, os.getegid())
    owner = (path.stat().st_uid, path.stat().st_gid)
    await stager(path).stage(2)
    status = path.stat()
    assert status.st_mode & 0o7777 == mode
    assert (status.st_uid, status.st_gid) == owner
    assert [entry.name for entry in path.parent.iterdir()] == ["kek.yaml"]


async def test_a_short_file_becomes_one_of_versions(path: Path) -> None:
    """`master_key_hex` is version 1 of the new file."""
    path.write_text(f"master_key_hex: {KEY.hex()}\n")
    await stager(path).stage(2)
    document = yaml.safe_load(path.read_text())
    assert document.keys() == {"versions"}
    assert document["versions"][1] == KEY.hex()
    assert document["versions"].keys() == {1, 2}


async def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    """Where the path is a link, its target is what changes."""
    link = tmp_path / "link.yaml"
    link.symlink_to(path)
    await stager(link).stage(2)
    assert link.is_symlink()
    assert parse_entries(path.read_bytes(), "x").keys() == {1, 2}


async def test_nothing_is_added_to_a_wrong_file(path: Path) -> None:
    """A file that holds another key under a needed version is refused and left as it is."""
    made = stager(path)
    path.write_bytes(render_entries({1: OTHER}))
    with pytest.raises(KekFileInvalid, match="another key"):
        await made.stage(2)
    assert parse_entries(path.read_bytes(), "x") == {1: OTHER}


@pytest.mark.parametrize("content", [b"", b"versions:\n  1: 00", b"- x"])
async def test_a_broken_file_is_left_as_it_is(path: Path, content: bytes) -> None:
    """An empty or half-written file is an error that shows none of it."""
    made = stager(path)
    path.write_bytes(content)
    with pytest.raises(KekFileInvalid):
        await made.stage(2)
    assert path.read_bytes() == content


def test_a_file_that_cannot_be_written_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a way to write, the refusal says which settings there are."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("progressdb_kms.kek.staging.replace_file", fail)
    with pytest.raises(RotationRefused, match=r"Read-only.*kubernetes.*external"):
        add_version(path, 2)
    assert parse_entries(path.read_bytes(), "x") == {1: KEY}


async def test_external_never_writes(path: Path) -> None:
    """With `distribute: external` a missing version is refused, and one that appears is taken."""
    source = FileKekSource(path)
    with pytest.raises(RotationRefused, match=r"version 2 is not in .*external"):
        await ExternalKekStager(source, required, escrow(source), 0).stage(2)
    assert parse_entries(path.read_bytes(), "x") == {1: KEY}
    waiting = asyncio.create_task(ExternalKekStager(source, required, escrow(source), 60).stage(2))
    await asyncio.sleep(0)
    path.write_bytes(render_entries({1: KEY, 2: OTHER}))
    await waiting
    assert source.versions() == {1, 2}
    assert await ExternalKekStager(source, required, escrow(source), 60).escrow(2) == 0
    assert await stager(path).escrow(2) == 0
