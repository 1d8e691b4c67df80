from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from progressdb_kms.domain.errors import KekFileInvalid, OperatorError
from progressdb_kms.files import MAX_PRIVATE_BYTES, Watch, read_private
from tests.transport.conftest import eventually


def secret(folder: Path, mode: int, content: bytes = b"secret") -> Path:
    """Write a file with a mode."""
    path = folder / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_private_modes(tmp_path: Path, mode: int) -> None:
    """A file of the user's own, or of a group of the process, is read."""
    assert read_private(secret(tmp_path, mode)) == b"secret"


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o620, 0o610, 0o601, 0o700, 0o777, 0o4600])
def test_wider_modes(tmp_path: Path, mode: int) -> None:
    """Anything wider is refused with the mode and what to do, and without the content."""
    with pytest.raises(KekFileInvalid, match=rf"mode {mode:04o}.*chmod 600") as refused:
        read_private(secret(tmp_path, mode), error=KekFileInvalid)
    assert "\n" not in refused.value.detail
    assert refused.value.detail.count("secret") == 2  # the path and the word of the message


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to any group")
def test_a_foreign_group_is_refused(tmp_path: Path) -> None:
    """Readable by a group that the process is not in is readable by others."""
    path = secret(tmp_path, 0o440)
    os.chown(path, -1, 54321)
    with pytest.raises(OperatorError, match="mode 0440, but its group 54321"):
        read_private(path)
    path.chmod(0o400)
    assert read_private(path) == b"secret"


def test_a_secret_volume(tmp_path: Path) -> None:
    """The links that a Kubernetes Secret volume is made of are followed to the file that counts."""
    (tmp_path / "..1").mkdir()
    real = secret(tmp_path / "..1", 0o440)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "key").symlink_to("..data/secret")
    assert read_private(tmp_path / "key") == b"secret"
    real.chmod(0o444)
    with pytest.raises(OperatorError, match="mode 0444"):
        read_private(tmp_path / "key")


def test_not_a_file(tmp_path: Path) -> None:
    """Missing files, folders, FIFOs (without waiting for a writer) and huge files are refused."""
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path, why in ((tmp_path, "not a regular file"), (tmp_path / "fifo", "not a regular file")):
        with pytest.raises(OperatorError, match=why):
            read_private(path)
    with pytest.raises(OperatorError, match=r"can't read .*/none: No such file"):
        read_private(tmp_path / "none")
    with pytest.raises(OperatorError, match="over 1048576 bytes"):
        read_private(secret(tmp_path, 0o600, bytes(MAX_PRIVATE_BYTES + 1)))


class Calls:
    """Counts calls, and can fail."""

    def __init__(self) -> None:
        self.count = 0
        self.failing = False

    def reached(self, count: int) -> bool:
        """Tell whether there were so many calls."""
        return self.count == count

    async def __call__(self) -> None:
        """Note a call."""
        self.count += 1
        if self.failing:
            raise RuntimeError("broken")


async def test_watch_waits_until_a_change_settles(tmp_path: Path) -> None:
    """A change is told once, after a poll that finds nothing further; no change is not told."""
    file, other, calls = tmp_path / "a", tmp_path / "b", Calls()
    file.write_text("1")
    watch = Watch([file, other], calls)
    await watch.poll()
    await watch.poll()
    assert calls.count == 0
    file.write_text("22")
    await watch.poll()
    other.write_text("3")  # a second file of the same set, a moment later
    await watch.poll()
    assert calls.count == 0
    await watch.poll()
    await watch.poll()
    assert calls.count == 1


async def test_watch_sees_a_symlink_swap(tmp_path: Path) -> None:
    """A Secret volume's swap is a change though file, size and time look the same."""
    for number in "12":
        (tmp_path / number).mkdir()
        (tmp_path / number / "key").write_text(number)
        os.utime(tmp_path / number / "key", ns=(0, 0))
    (tmp_path / "..data").symlink_to("1")
    (tmp_path / "key").symlink_to("..data/key")
    calls = Calls()
    watch = Watch([tmp_path / "key"], calls)
    (tmp_path / "..new").symlink_to("2")
    (tmp_path / "..new").rename(tmp_path / "..data")
    await watch.poll()
    await watch.poll()
    assert calls.count == 1


async def test_watch_tells_removal_and_return(tmp_path: Path) -> None:
    """A file that goes, and one that comes, are changes."""
    file, calls = tmp_path / "a", Calls()
    watch = Watch([file], calls)
    for expected in (1, 2, 3):
        if file.exists():
            file.unlink()
        else:
            file.touch()
        await watch.poll()
        await watch.poll()
        assert calls.count == expected


async def test_watch_survives_a_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A callback that fails is logged, and the next change is still seen."""
    file, calls = tmp_path / "a", Calls()
    calls.failing = True
    watch = Watch([file], calls, interval=0.01)
    running = asyncio.create_task(watch.run())
    for expected in (1, 2):
        file.write_text("x" * expected)
        await eventually(partial(calls.reached, expected))
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    assert "reloading after a change" in caplog.text
