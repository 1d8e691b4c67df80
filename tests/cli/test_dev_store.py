"""The store of dev mode where it does not do what it should."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import click
import pytest

from progressdb_kms.cli.dev import store as module
from progressdb_kms.cli.dev.store import DevStore
from tests.cli.helpers import is_alive


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose path leaves room for a socket, with characters that need quoting."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / 'a "b" \\c'
        path.mkdir()
        yield path


@pytest.fixture
async def store(place: Path) -> AsyncIterator[DevStore]:
    """A store that has been started."""
    started = DevStore(place, place / "s.sock")
    await started.start()
    yield started
    started.stop()


async def test_a_store_that_does_not_end_is_killed(store: DevStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process takes no SIGTERM; it must not outlive us all the same."""
    monkeypatch.setattr(module, "_STOP_LIMIT", 0.2)
    os.kill(store.pid, signal.SIGSTOP)
    store.stop()
    assert not is_alive(store.pid)


async def test_files_that_another_store_holds(
    store: DevStore, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the holder of the lock neither answers nor ends, no second store is started."""
    monkeypatch.setattr(module, "_STOP_LIMIT", 0.2)
    store.stop()
    with (place / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(click.ClickException, match="stop it first"):
            await store.start()
    await store.start()


async def test_no_store_is_installed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(module, "_embedded", lambda: None)
    with pytest.raises(click.ClickException, match="install redis-server"):
        await DevStore(place, place / "s.sock").start()


async def test_it_is_started_again_until_it_can_be(
    store: DevStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A start that fails is told and tried again."""
    monkeypatch.setattr(module, "_PAUSES", (0.0,))
    found, calls = shutil.which, 0

    def which(name: str) -> str | None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("no room")
        return found(name)

    monkeypatch.setattr(shutil, "which", which)
    restarted = asyncio.Event()
    keeper = asyncio.create_task(store.supervise(restarted.set))
    old = store.pid
    os.kill(old, signal.SIGKILL)
    await restarted.wait()
    keeper.cancel()
    assert store.pid != old
    assert is_alive(store.pid)
    assert "dev: no room" in capsys.readouterr().err


def test_the_embedded_program_is_found() -> None:
    """It can be run, and its package is not imported for that."""
    found = module._embedded()
    assert found is not None
    assert os.access(found, os.X_OK)
