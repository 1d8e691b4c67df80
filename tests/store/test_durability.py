"""A store that can lose an acknowledged key is recognised, each way, and nothing is written to it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from progressdb_kms.domain.errors import StoreNotDurable, StoreUnavailable
from progressdb_kms.domain.keys import DekRecord
from progressdb_kms.store.redis import RedisStore
from progressdb_kms.store.redis.durability import NodeFacts, assess
from progressdb_kms.store.settings import StoreSettings
from tests.store.conftest import new_dek
from tests.store.servers import Server, free_port
from tests.store.topologies import until

Start = Callable[..., Server]
Open = Callable[..., Any]


async def refusal(store: RedisStore) -> str:
    """Return why a create is refused for want of durability."""
    (result,) = await store.keys.create([new_dek()])
    assert isinstance(result, StoreNotDurable)
    return result.detail


@pytest.mark.parametrize(
    "kind, options, says",
    [
        ("redis", {"appendonly": "no"}, "set appendonly yes"),
        ("redis", {"appendfsync": "no"}, "set appendfsync always"),
        ("valkey", {"appendfsync": "no"}, "set appendfsync always"),
        ("redis", {"appendfsync": "everysec"}, "set appendfsync always"),
        ("valkey", {"appendfsync": "everysec"}, "set appendfsync always"),
        ("redis", {"no_appendfsync_on_rewrite": "yes"}, "no-appendfsync-on-rewrite is yes"),
        ("valkey", {"no_appendfsync_on_rewrite": "yes"}, "no-appendfsync-on-rewrite is yes"),
        ("redis", {"maxmemory_policy": "allkeys-lru"}, "set maxmemory-policy noeviction"),
        (
            "redis",
            {"maxmemory": "1gb", "maxmemory_policy": "volatile-ttl"},
            "set maxmemory-policy noeviction",
        ),
        ("redis", {"replicaof": "127.0.0.1 1"}, "points at a replica"),
    ],
)
async def test_unsafe_settings(own_server: Start, opened: Open, kind: str, options: dict, says: str) -> None:
    """Each setting that can lose a key is a problem that says what to change, and stops every write."""
    server = own_server(kind, **options)
    store = await opened(server.url)
    status = store.health.status
    assert status.reachable
    assert any(says in problem for problem in status.problems), status
    assert says in " ".join([await refusal(store), *status.problems])
    with pytest.raises(StoreNotDurable):
        await store.registry.reserve_wraps(1, 1)
    assert server.ask("DBSIZE") == 0


async def test_data_loss_can_be_accepted(own_server: Start, opened: Open) -> None:
    """With allow_data_loss the same store is served, with the problem as a warning."""
    store = await opened(own_server(appendonly="no").url, allow_data_loss=True)
    status = store.health.status
    assert status.problems == ()
    assert any("can be lost" in warning and "appendonly" in warning for warning in status.warnings)
    (result,) = await store.keys.create([new_dek()])
    assert isinstance(result, DekRecord)


@pytest.mark.parametrize(
    "change, back",
    [
        ({"appendfsync": "everysec"}, {"appendfsync": "always"}),
        ({"maxmemory_policy": "allkeys-lru"}, {"maxmemory_policy": "noeviction"}),
        ({"no_appendfsync_on_rewrite": "yes"}, {"no_appendfsync_on_rewrite": "no"}),
    ],
)
async def test_settings_changed_behind_our_back(
    own_server: Start, opened: Open, change: dict, back: dict
) -> None:
    """A CONFIG SET is found by the next check, which stops writes; undone, they go on."""
    server = own_server()
    store = await opened(server.url)
    assert isinstance((await store.keys.create([new_dek()]))[0], DekRecord)
    server.configure(**change)
    assert (await store.health.check()).problems
    await refusal(store)
    server.configure(**back)
    # Where the append-only file was off it is made first.
    until(lambda: "aof_rewrite_in_progress:0" in str(server.ask("INFO", "persistence")))
    assert not (await store.health.check()).problems
    assert isinstance((await store.keys.create([new_dek()]))[0], DekRecord)


async def test_append_only_file_switched_off_between_checks(own_server: Start, opened: Open) -> None:
    """Where the server has WAITAOF, not even a write right after the CONFIG SET is acknowledged."""
    server = own_server("valkey")
    store = await opened(server.url)
    assert isinstance((await store.keys.create([new_dek()]))[0], DekRecord)
    server.configure(appendonly="no")
    assert "appendonly is no" in await refusal(store)


@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_append_only_file_that_is_being_made(own_server: Start, opened: Open, kind: str) -> None:
    """Switched on while it runs it says yes at once, but its first rewrite must end to bring keys back."""
    server = own_server(kind, appendonly="no", rdb_key_save_delay="10000", enable_debug_command="yes")
    server.ask("DEBUG", "POPULATE", "150")
    early = await opened(server.url)
    server.ask("CONFIG", "SET", "appendonly", "yes")
    # Held, so that the rewrite lasts for as long as anybody looks.
    (child,) = server.children
    os.kill(child, signal.SIGSTOP)
    try:
        late = await opened(server.url)
        for store in (early, late):
            assert "is being made" in await refusal(store)
            assert (await store.health.check()).problems
    finally:
        os.kill(child, signal.SIGCONT)
    until(lambda: "aof_rewrite_in_progress:0" in str(server.ask("INFO", "persistence")))
    for store in (early, late):
        assert not (await store.health.check()).problems
        (made,) = await store.keys.create([new_dek()])
        assert isinstance(made, DekRecord)


async def test_restart_with_other_settings(own_server: Start, opened: Open) -> None:
    """The first write after a reconnect asks again, even if no check came in between."""
    server = own_server()
    store = await opened(server.url)
    assert isinstance((await store.keys.create([new_dek()]))[0], DekRecord)
    server.kill()
    server.options = {**server.options, "appendfsync": "everysec"}
    server.start()
    assert "appendfsync is everysec" in await refusal(store)


class TestHiddenConfig:
    """Managed servers forbid CONFIG: an ACL user without it stands for them."""

    LOGIN: ClassVar = {"username": "kms", "password": "s3cret"}

    def hide(self, server: Server, *forbidden: str) -> None:
        """Make a user that lacks some commands."""
        server.ask("ACL", "SETUSER", "kms", "on", ">s3cret", "~*", "&*", "+@all", *forbidden)

    async def test_append_only_file_is_off(self, own_server: Start, opened: Open) -> None:
        """INFO tells that it is off."""
        server = own_server("valkey", appendonly="no")
        self.hide(server, "-config")
        assert "appendonly is no" in await refusal(await opened(server.url, **self.LOGIN))

    @pytest.mark.parametrize("kind", ["redis", "valkey"])
    async def test_cannot_be_known(self, own_server: Start, opened: Open, kind: str) -> None:
        """Without CONFIG and a WAITAOF that can be trusted nobody knows, so it is a problem."""
        server = own_server(kind)
        self.hide(server, "-config")
        assert "hides CONFIG" in await refusal(await opened(server.url, **self.LOGIN))

    async def test_nothing_can_be_asked(self, own_server: Start, opened: Open) -> None:
        """Without INFO neither."""
        server = own_server("valkey")
        self.hide(server, "-config", "-info")
        assert "hides INFO" in await refusal(await opened(server.url, **self.LOGIN))

    async def test_attested(self, own_server: Start, opened: Open) -> None:
        """The operator's word is taken for what is hidden, and shows in every status."""
        server = own_server("redis")
        self.hide(server, "-config")
        attested = {"durability": "attested", "attested_reason": "contract 7 with the provider"}
        store = await opened(server.url, **attested, **self.LOGIN)
        assert store.health.status.problems == ()
        assert any("contract 7" in warning for warning in store.health.status.warnings)
        assert isinstance((await store.keys.create([new_dek()]))[0], DekRecord)

    @pytest.mark.parametrize("reason", ["", "  "])
    async def test_attested_without_a_reason(self, own_server: Start, opened: Open, reason: str) -> None:
        """An attestation that names nobody is none."""
        server = own_server("redis")
        self.hide(server, "-config")
        store = await opened(server.url, durability="attested", attested_reason=reason, **self.LOGIN)
        assert "without a reason" in await refusal(store)

    async def test_attested_against_better_knowledge(self, own_server: Start, opened: Open) -> None:
        """What can be asked is still asked."""
        server = own_server("redis", appendfsync="everysec")
        store = await opened(server.url, durability="attested", attested_reason="trust me")
        assert "appendfsync is everysec" in await refusal(store)


class TestJudgement:
    """Findings that no server of the tests can be brought to, from what such a server says."""

    GOOD_INFO: ClassVar = {
        "redis_version": "7.0.15",
        "role": "master",
        "aof_enabled": "1",
        "run_id": "a" * 40,
        "maxmemory_policy": "noeviction",
        "connected_slaves": "0",
    }
    GOOD_CONFIG: ClassVar = {
        "appendonly": "yes",
        "appendfsync": "always",
        "no-appendfsync-on-rewrite": "no",
        "maxmemory-policy": "noeviction",
        "min-replicas-to-write": "0",
    }

    def judge(
        self,
        settings: StoreSettings | None = None,
        *,
        promotable: bool = False,
        config: dict | None = None,
        **info: str,
    ) -> tuple[str, ...]:
        """Return the problems of a good server with some differences."""
        facts = NodeFacts({**self.GOOD_INFO, **info}, {**self.GOOD_CONFIG, **(config or {})})
        return assess(facts, settings or StoreSettings("redis://x"), promotable=promotable).problems

    def test_good(self) -> None:
        """The base of these tests has no problem."""
        assert self.judge() == ()

    def test_failed_write(self) -> None:
        """A disk that refused the last write is a problem."""
        assert "last write to the append-only file failed" in self.judge(aof_last_write_status="err")[0]

    def test_old_server(self) -> None:
        """A server before 7.0 is refused by its version."""
        assert "Redis 6.2.14" in self.judge(redis_version="6.2.14")[0]

    @pytest.mark.parametrize(
        "info, trusted",
        [
            ({"redis_version": "7.0.15"}, False),
            ({"redis_version": "7.4.1"}, False),
            ({"redis_version": "7.2.4", "valkey_version": "8.1.8"}, False),
            ({"redis_version": "9.0.0", "valkey_version": "9.1.2"}, False),
            ({"redis_version": "8.0.0"}, True),
            ({"redis_version": "10.2.1"}, True),
        ],
    )
    def test_whose_confirmation_is_true(self, info: dict[str, str], trusted: bool) -> None:
        """An fsync once a second is enough where WAITAOF waits for it; else appendfsync must be known."""
        settings = StoreSettings("redis://x")
        everysec = {**self.GOOD_CONFIG, "appendfsync": "everysec"}
        seen = assess(NodeFacts({**self.GOOD_INFO, **info}, everysec), settings, promotable=False)
        assert (seen.problems == ()) is trusted
        hidden = assess(NodeFacts({**self.GOOD_INFO, **info}, None), settings, promotable=False)
        assert (hidden.problems == ()) is trusted
        assert hidden.slow is hidden.confirms

    @pytest.mark.parametrize(
        "min_replicas, least, count", [(0, "0", 2), (1, "0", 1), (0, "1", 1), (1, "1", 0)]
    )
    def test_replicas(self, min_replicas: int, least: str, count: int) -> None:
        """Where a replica can be promoted, both we and the server must insist on it."""
        settings = StoreSettings("redis://x", min_replicas=min_replicas)
        config = {"min-replicas-to-write": least}
        assert len(self.judge(settings, promotable=True, config=config)) == count
        assert self.judge(settings, promotable=False, config=config) == ()

    @pytest.mark.parametrize("visible", [True, False])
    def test_replicas_without_config(self, visible: bool) -> None:
        """Where CONFIG is forbidden, INFO tells whether min-replicas-to-write is set."""
        info = {**self.GOOD_INFO, "redis_version": "8.0.0"} | (
            {"min_slaves_good_slaves": "1"} if visible else {}
        )
        finding = assess(NodeFacts(info, None), StoreSettings("redis://x", min_replicas=1), promotable=True)
        assert (finding.problems == ()) is visible


@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_replica_confirms(own_server: Start, opened: Open, kind: str) -> None:
    """With a replica in step, a write that has to reach it is acknowledged."""
    primary = own_server(kind, free_port(), repl_diskless_sync_delay="0")
    replica = own_server(kind, replicaof=f"127.0.0.1 {primary.port}")
    until(lambda: b"state=online" in primary.ask("INFO", "replication"))
    store = await opened(primary.url, min_replicas=1)
    (record,) = await store.keys.create([new_dek()])
    assert isinstance(record, DekRecord)
    assert replica.ask("KEYS", f"*:dek:{record.key_id}")


async def test_too_few_replicas_confirm(own_server: Start, opened: Open) -> None:
    """A write that no replica has confirmed is not acknowledged."""
    store = await opened(own_server().url, min_replicas=1, wait_timeout=0.05, command_timeout=1.5)
    assert any("fewer than min_replicas" in warning for warning in store.health.status.warnings)
    (result,) = await store.keys.create([new_dek()])
    assert isinstance(result, StoreUnavailable)
    assert "did not confirm" in result.detail
