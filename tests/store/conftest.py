"""The stores under test: memory, Redis 7.0 and Valkey 8, each behind the same harness."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from progressdb_kms.domain.keyring import KekInfo, KekState
from progressdb_kms.domain.keys import KeyState, NewDek, StateChange, locate, new_key_id, slot_tag
from progressdb_kms.store.memory import MemoryStore
from progressdb_kms.store.redis import RedisStore, StoreSettings, open_store
from tests.store.servers import ALWAYS, Server

VARIANTS = ("memory", "redis", "valkey")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each contract test against all stores."""
    if "harness" in metafunc.fixturenames:
        metafunc.parametrize("harness", VARIANTS, indirect=True)


def new_dek(
    thread_id: str = "room:1", *, key_id: str = "", kek_version: int = 1, wrapped: bytes = b""
) -> NewDek:
    """Make up a DEK: to the store, a blob is 64 bytes."""
    return NewDek(
        key_id=key_id or new_key_id(thread_id, secrets.token_bytes(17)),
        thread_id=thread_id,
        wrapped=wrapped or secrets.token_bytes(64),
        kek_id="kek_0123456789abcdef",
        kek_version=kek_version,
        created_at=1_700_000_000,
        created_by="dns:chat.example",
    )


def new_kek(version: int = 1) -> KekInfo:
    """Make up what the registry knows of a KEK."""
    return KekInfo(version, f"kek_{version}", "file", str(version), "ab" * 32, KekState.STAGED, 1_700_000_000)


class Harness(Protocol):
    """A store, and what tests do behind its back."""

    @property
    def store(self) -> MemoryStore | RedisStore:
        """The store."""

    def set_floor(self, thread_id: str, version: int) -> None:
        """Set the least KEK version of a thread's slot."""

    def destroy(self, key_id: str) -> None:
        """Leave of a record what a destruction leaves."""

    def set_decrypt_only(self, key_id: str) -> None:
        """Supersede a key, as rotating the thread's DEK does."""

    def lose_all(self) -> None:
        """Lose all data, and stand before an empty store."""

    async def flood_notices(self) -> None:
        """Put more notices than one late reader can be told of."""


class MemoryHarness:
    """The memory store."""

    def __init__(self) -> None:
        self.store = MemoryStore()

    def set_floor(self, thread_id: str, version: int) -> None:
        """Set the least KEK version of a thread's slot."""
        self.store.set_floor(thread_id, version)

    def destroy(self, key_id: str) -> None:
        """Leave of a record what a destruction leaves."""
        records = self.store._records
        records[key_id] = replace(records[key_id], state=KeyState.DESTROYED, wrapped=b"")

    def set_decrypt_only(self, key_id: str) -> None:
        """Supersede a key, as rotating the thread's DEK does."""
        records = self.store._records
        records[key_id] = replace(records[key_id], state=KeyState.DECRYPT_ONLY)

    def lose_all(self) -> None:
        """Lose all data, and stand before an empty store."""
        self.store = MemoryStore()

    async def flood_notices(self) -> None:
        """Put more notices than one late reader can be told of."""
        dek = new_dek()
        await self.store.create([dek])
        for now in range(10_001):
            await self.store.change_state(dek.key_id, StateChange.DISABLE, now=now)


class RedisHarness:
    """A Redis store and its server."""

    def __init__(self, server: Server, store: RedisStore) -> None:
        self.server = server
        self.store = store

    def set_floor(self, thread_id: str, version: int) -> None:
        """Set the least KEK version of a thread's slot."""
        self.server.ask("HSET", f"kms:{{{slot_tag(thread_id)}}}:ctl", "floor", version)

    def destroy(self, key_id: str) -> None:
        """Leave of a record what a destruction leaves."""
        tag = locate(key_id)
        self.server.ask("HSET", f"kms:{{{tag}}}:dek:{key_id}", "state", "destroyed")
        self.server.ask("HDEL", f"kms:{{{tag}}}:dek:{key_id}", "wrapped")
        self.server.ask("SREM", f"kms:{{{tag}}}:kek:1", key_id)

    def set_decrypt_only(self, key_id: str) -> None:
        """Supersede a key, as rotating the thread's DEK does."""
        self.server.ask("HSET", f"kms:{{{locate(key_id)}}}:dek:{key_id}", "state", "decrypt_only")

    def lose_all(self) -> None:
        """Lose all data, and stand before an empty store."""
        self.server.ask("FLUSHALL")

    async def flood_notices(self) -> None:
        """Put more notices than one late reader can be told of."""
        add = "for n = 1, 5001 do redis.call('XADD', KEYS[1], '*', 'key_id', 'k') end"
        self.server.ask("EVAL", add, 1, "kms:{ctl}:changes")


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """Give the server of a variant, started once for all tests."""
    running: dict[str, Server] = {}

    def server_of(variant: str) -> Server:
        if variant not in running:
            running[variant] = Server(variant, tmp_path_factory.mktemp(variant), ALWAYS).start()
        return running[variant]

    yield server_of
    for server in running.values():
        server.kill()


@pytest.fixture
async def harness(request: pytest.FixtureRequest, servers: Callable[[str], Server]) -> AsyncIterator[Harness]:
    """Give an empty store of the variant that the test is run with."""
    if request.param == "memory":
        yield MemoryHarness()
        return
    server = servers(request.param)
    server.ask("FLUSHALL")
    store = await open_store(StoreSettings(server.url))
    assert store.health.status.problems == ()
    yield RedisHarness(server, store)
    await store.close()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Give what starts a server for one test alone, which may ruin it."""
    started: list[Server] = []

    def start(kind: str = "redis", port: int = 0, **options: str) -> Server:
        settings = {**ALWAYS, **{name.replace("_", "-"): value for name, value in options.items()}}
        started.append(Server(kind, tmp_path / f"server{len(started)}", settings, port).start())
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
async def opened() -> AsyncIterator[Callable[..., object]]:
    """Give what opens a store, to be closed after the test."""
    stores: list[RedisStore] = []

    async def make(url: str, **settings: object) -> RedisStore:
        stores.append(await open_store(StoreSettings(url, **settings)))  # type: ignore[arg-type] # checked by tests
        return stores[-1]

    yield make
    for store in stores:
        await store.close()
