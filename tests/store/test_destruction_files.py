"""After a destruction: append-only files of the primary and of its replicas, and servers that forbid it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from progressdb_kms.domain.backup import Destruction
from progressdb_kms.domain.keys import StateChange
from progressdb_kms.ports import Destroyed
from progressdb_kms.store.redis import RedisStore
from tests.store.conftest import new_dek
from tests.store.servers import Server, free_port

Open = Callable[..., object]


def _files(server: Server) -> bytes:
    folder = Path(server.folder) / "appendonlydir"
    return b"".join(path.read_bytes() for path in folder.iterdir())


async def _destroy(store: RedisStore) -> bytes:
    """Make a key and destroy it; return its blob."""
    dek = new_dek()
    await store.keys.create([dek])
    past = int(time.time()) - 5
    await store.keys.change_state(dek.key_id, StateChange.SCHEDULE_DESTRUCTION, now=past, destroy_at=past)
    await store.destruction.owe_rewrite()
    assert await store.destruction.destroy(Destruction(dek.key_id, past + 5)) is Destroyed.DONE
    return dek.wrapped


async def test_replicas_rewrite_theirs_too(own_server: Callable[..., Server], opened: Open) -> None:
    """The blob leaves the files of the primary and of its replica."""
    primary = own_server(port=free_port(), rdbcompression="no")
    replica = own_server(port=free_port(), rdbcompression="no", replicaof=f"127.0.0.1 {primary.port}")
    store = await opened(primary.url, min_replicas=1)  # type: ignore[misc] # the fixture's own
    end = time.monotonic() + 20
    while b"state=online" not in primary.ask("INFO", "replication"):
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
    blob = await _destroy(store)
    assert blob in _files(primary)
    assert blob in _files(replica)
    assert await store.destruction.rewrite_owed()
    assert await store.destruction.rewrite_files() == []
    assert blob not in _files(primary)
    assert blob not in _files(replica)
    assert not await store.destruction.rewrite_owed()


async def test_forbidden_rewrite_stays_owed(own_server: Callable[..., Server], opened: Open) -> None:
    """A server that forbids it is named, and it is tried again later."""
    server = own_server(rdbcompression="no")
    server.ask("ACL", "SETUSER", "default", "-bgrewriteaof")
    store = await opened(server.url)  # type: ignore[misc] # the fixture's own
    blob = await _destroy(store)
    (reason,) = await store.destruction.rewrite_files()
    assert "BGREWRITEAOF is forbidden here" in reason
    assert await store.destruction.rewrite_owed()
    server.ask("ACL", "SETUSER", "default", "+bgrewriteaof")
    assert await store.destruction.rewrite_files() == []
    assert blob not in _files(server)
