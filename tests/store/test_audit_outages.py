"""The chained audit log over a real server that dies, restarts, loses its data, or is not let in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from progressdb_kms.audit.reading import verify_store
from progressdb_kms.audit.trimming import Trimmer
from progressdb_kms.domain.errors import AuditUnavailable
from tests.store.auditing import KEY, PUBLIC, assert_whole, log_on, told, until_recorded, work_through
from tests.store.servers import Server
from tests.unit.audit.scene import Counts


async def test_a_server_that_dies_loses_nothing(
    own_server: Callable[..., Server], opened: Callable[..., Any]
) -> None:
    """Killed under load, twice: all that was acknowledged is there once, the chains are whole."""
    server = own_server()
    store = await opened(server.url, command_timeout=1.0)
    logs = [log_on(store, f"i{number}") for number in range(2)]
    acknowledged: list[int] = []

    async def outage() -> None:
        server.kill()
        await asyncio.sleep(0.2)
        server.start()

    for _ in range(2):
        await work_through(logs, acknowledged, outage)
    await assert_whole(store, logs, acknowledged)


async def test_a_store_that_was_restored_is_found_out(
    own_server: Callable[..., Server], opened: Callable[..., Any]
) -> None:
    """Its data taken back while a process lives: a new chain names what is missing."""
    server = own_server()
    store = await opened(server.url)
    log = log_on(store)
    await log.record([told(1, "intent"), told(1, "ok")])
    dump = {key: server.ask("DUMP", key) for key in server.ask("KEYS", "kms:{ctl}:audit*")}
    await log.record([told(2, "intent"), told(2, "ok")])
    for key, value in dump.items():
        server.ask("RESTORE", key, 0, value, "REPLACE")
    await until_recorded(log, 3)
    await log.close()
    report = await verify_store(store.audit, [KEY.verify])
    assert [(each.kind, each.first, each.last) for each in report.problems] == [("truncated", 4, 5)]


async def test_trimming_a_real_stream(own_server: Callable[..., Server], opened: Callable[..., Any]) -> None:
    """While records come from two processes; what stays is whole, for who has the public key alone too."""
    store = await opened(own_server().url)
    logs = [log_on(store, f"i{number}") for number in range(2)]
    trimmer = Trimmer(KEY, (), store.audit, 1000, Counts())
    for round_ in range(4):
        await asyncio.gather(
            *(log.record([told(number, "ok") for number in range(400)]) for log in logs),
            *([trimmer.run()] if round_ else []),
        )
    assert await trimmer.run() > 0
    assert (await store.audit.anchor()).length <= 1100
    for key in (KEY.verify, PUBLIC):
        assert (await verify_store(store.audit, [key])).problems == []
    for log in logs:
        await log.close()


async def test_a_user_without_the_right_commands_is_told(
    own_server: Callable[..., Server], opened: Callable[..., Any]
) -> None:
    """The error that refuses the change names the page that lists them."""
    server = own_server("valkey")
    server.ask("ACL", "SETUSER", "kms", "on", ">change-me", "~kms:*", "&*", "+@all", "-evalsha")
    store = await opened(server.url, username="kms", password="change-me")
    try:
        await log_on(store).record([told(1, "intent")])
    except AuditUnavailable as error:
        assert "docs/redis-acl.md" in error.detail  # noqa: PT017 - what the error says is what is tested
    else:
        raise AssertionError("it was recorded")
