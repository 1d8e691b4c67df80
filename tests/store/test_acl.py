"""The ACL user of ``docs/redis-acl.md``: what it lists is enough, and each of it is needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.domain.errors import KmsError
from progressdb_kms.domain.keys import DekRecord, KeyState, StateChange
from progressdb_kms.ports import Heartbeat
from progressdb_kms.store import redis as store_package
from progressdb_kms.store.redis import StoreSettings, open_store
from tests.store.conftest import new_dek, new_kek
from tests.store.servers import ALWAYS, Server

PAGE = Path(__file__).parents[2] / "docs" / "redis-acl.md"
CLUSTER_ONLY = {"asking", "cluster|info", "cluster|slots"}
REPLICAS_ONLY = {"wait"}


def documented() -> list[str]:
    """Return the words of the documented line."""
    return next(line for line in PAGE.read_text().splitlines() if line.startswith("SETUSER ")).split()


def set_user(server: Server) -> None:
    """Make the documented user."""
    unknown = {"+waitaof"} if server.kind == "redis" else set()
    server.ask("ACL", *[word for word in documented() if word not in unknown])


async def use_everything(store: Any) -> None:
    """Use each method of each port once, and let the server forget the scripts in between."""
    assert store.health.status.problems == ()
    view = await store.registry.initialise(new_kek())
    assert await store.registry.load() == view
    await store.registry.reserve_wraps(1, 1)
    assert await store.registry.wraps() == {1: 1}
    (record,) = await store.keys.create([new_dek()])
    assert isinstance(record, DekRecord)
    (replay,) = await store.keys.create([new_dek(key_id=record.key_id)])
    assert replay == record
    start = await store.keys.changes(None, 0)
    for change in (StateChange.DISABLE, StateChange.ENABLE, StateChange.SCHEDULE_DESTRUCTION):
        await store.keys.change_state(record.key_id, change, now=1, destroy_at=2)
    cancelled = await store.keys.change_state(record.key_id, StateChange.CANCEL_DESTRUCTION, now=1)
    assert cancelled.state is KeyState.DISABLED
    assert (await store.keys.changes(start.cursor, 1)).key_ids == {record.key_id}
    assert await store.keys.rewrap(cancelled, b"n" * 64, "kek_1", 1)
    await store.keys.reserve_uses({record.key_id: 1})
    for thread_id in (None, "room:1"):
        page = await store.keys.list_keys(thread_id=thread_id, state=None, limit=10, cursor=None)
        assert len(page.records) == 1
    assert await store.keys.census() == {1: 1}
    await store.heartbeats.beat(Heartbeat("i", 1e9, 1e9, "r", (1,), 1, ""))
    assert len(await store.heartbeats.live()) == 1
    await store.heartbeats.beat(Heartbeat("j", 2e9, 2e9, "r", (1,), 1, ""))
    await store.heartbeats.leave("j")


def test_no_command_is_forgotten() -> None:
    """What scripts and adapters send stands in one of the page's lines."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("SETUSER kms ")]
    allowed = {word[1:].partition("|")[0] for line in lines for word in line.split() if word.startswith("+")}
    source = Path(store_package.__file__).parent
    sent = set()
    for script in (source / "lua").glob("*.lua"):
        sent |= set(re.findall(r"redis\.p?call\('(\w+)'", script.read_text()))
    for module in source.glob("*.py"):
        sent |= set(re.findall(r"""\("([A-Z]{3,})[ "]""", module.read_text()))
    assert len(sent) > 30
    of_other_users = {"sentinel", "acl"}
    assert {command.lower() for command in sent} - allowed - of_other_users == set()


async def works(store: Any) -> bool:
    """Say whether everything can be used."""
    try:
        await use_everything(store)
    except (KmsError, AssertionError):
        return False
    return True


@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_line_is_enough(
    own_server: Callable[..., Server], opened: Callable[..., Any], kind: str
) -> None:
    """Everything works as the documented user, on a server that knows no script of ours yet."""
    server = own_server(kind)
    set_user(server)
    await use_everything(await opened(f"{server.url}?db=1", username="kms", password="change-me"))


async def test_line_is_needed(own_server: Callable[..., Server], opened: Callable[..., Any]) -> None:
    """Without any one of the commands something fails, with an error that names the page."""
    server = own_server("valkey")
    login = {"username": "kms", "password": "change-me", "command_timeout": 0.3}
    commands = [word[1:] for word in documented() if word.startswith("+")]
    assert len(commands) > 20
    for command in sorted(set(commands) - CLUSTER_ONLY - REPLICAS_ONLY):
        server.ask("FLUSHALL")
        server.ask("SCRIPT", "FLUSH")
        set_user(server)
        server.ask("ACL", "SETUSER", "kms", f"-{command}")
        store = await opened(f"{server.url}?db=1", **login)
        assert not await works(store), f"nothing needs {command}"


async def test_forbidden_command_is_explained(
    own_server: Callable[..., Server], opened: Callable[..., Any]
) -> None:
    """The error says where the right line is, and does not repeat what was asked."""
    server = own_server("valkey")
    set_user(server)
    server.ask("ACL", "SETUSER", "kms", "-hmget")
    store = await opened(server.url, username="kms", password="change-me")
    with pytest.raises(KmsError, match=r"docs/redis-acl\.md") as caught:
        await store.keys.get(["k_AAAAAAAAAAAAAAAAAAAAAAAAAAAA"])
    assert "k_AA" not in caught.value.detail


@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_the_default_user_may_be_switched_off(kind: str, tmp_path: Path) -> None:
    """With the documented line a restart loses nothing: append-only files are loaded as the default user."""
    (line,) = re.findall(r"`(user default off [^`]+)`", PAGE.read_text())[:1]
    file = tmp_path / "users.acl"
    file.write_text(f"{line}\nuser kms on >change-me ~* &* +@all\n")
    login: dict[str, Any] = {"username": "kms", "password": "change-me"}

    class Secured(Server):
        """Answers to nobody else."""

        def ask(self, *command: str | int | bytes, **_: Any) -> Any:
            """Run a command as that user."""
            return super().ask(*command, **login)

    server = Secured(kind, tmp_path / "server", {**ALWAYS, "aclfile": str(file)}).start()
    try:
        store = await open_store(StoreSettings(server.url, **login))
        await store.registry.initialise(new_kek())
        (record,) = await store.keys.create([new_dek("room:1")])
        await store.close()
        server.kill()
        server.start()
        store = await open_store(StoreSettings(server.url, **login))
        assert isinstance(record, DekRecord)
        assert await store.keys.get([record.key_id]) == [record]
        await store.close()
    finally:
        server.kill()
