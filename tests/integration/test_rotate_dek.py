"""Rotation of a thread's DEK through the API, the clients and the command."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.client import AdminClient, SyncKmsProvider, open_provider
from progressdb_kms.domain.errors import InvalidThreadId, KeyDecryptOnly, PermissionDenied
from tests.integration.drill import EVERYTHING, Machine

SETTLED = 1.2
"""Seconds after which a change counts on every instance, also on the one that made it."""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with a store."""
    made = Machine(tmp_path_factory.mktemp("m") / "one")
    made.start_store()
    yield made
    made.lose()


@pytest.fixture(scope="module")
def clients(machine: Machine) -> Iterator[tuple[SyncKmsProvider, AdminClient]]:
    """Clients of a running service."""
    with machine.service() as both:
        yield both


def test_any_thread_id_can_be_rotated(clients: tuple[SyncKmsProvider, AdminClient]) -> None:
    """Whatever stands in a thread_id travels in the path unharmed; the old key only decrypts then."""
    kms, admin = clients
    rotated = []
    for thread_id in ("room:1", "a/b", "/a//b/", "ü ?#%&+", "x/rotate-dek", "k" * 256):
        old = kms.create_dek_for_thread(thread_id)
        sealed = kms.encrypt_with_dek(old.key_id, b"text").ciphertext
        new = kms.rotate_dek(thread_id)
        assert (new.key_version, admin.get_key(new.key_id).thread_id) == ("2", thread_id)
        rotated.append((old, sealed, new))
    time.sleep(SETTLED)
    for old, sealed, new in rotated:
        assert kms.decrypt_with_dek(old.key_id, sealed) == b"text"
        with pytest.raises(KeyDecryptOnly):
            kms.encrypt_with_dek(old.key_id, b"more")
        assert kms.encrypt_with_dek(new.key_id, b"more").key_version == "2"


def test_idempotency_key_rotates_once(clients: tuple[SyncKmsProvider, AdminClient]) -> None:
    """A retry finds the same key; a create with the same word makes another one and supersedes none."""
    kms, admin = clients
    one = kms.rotate_dek("idem", idempotency_key="word")
    assert admin.rotate_dek("idem", "word") == one
    assert kms.create_dek_for_thread("idem", idempotency_key="word").key_id != one.key_id
    assert admin.get_key(one.key_id).state == "enabled"


def test_bad_thread_id_is_refused(clients: tuple[SyncKmsProvider, AdminClient]) -> None:
    """A thread_id that a create refuses is refused here too."""
    with pytest.raises(InvalidThreadId):
        clients[0].rotate_dek("k" * 257)


def test_command_rotates(clients: tuple[SyncKmsProvider, AdminClient], machine: Machine) -> None:
    """`keys rotate` prints the new key."""
    clients[0].create_dek_for_thread("cli")
    url = f"unix://{machine.layout.socket}"
    done = machine.kms("keys", "rotate", "cli", "--url", url, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == "2"


def test_backups_are_listed(
    clients: tuple[SyncKmsProvider, AdminClient], machine: Machine, tmp_path: Path
) -> None:
    """GET /v1/backups and `backup list` and `show` name an export with its digest."""
    done = machine.kms("backup", "create", "--config", machine.config, "--out", tmp_path / "e", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["sha256"] in [export.sha256 for export in clients[1].backups().exports]
    listed = machine.kms("backup", "list", "--config", machine.config, "--json")
    assert told["export_id"] in [note["export_id"] for note in json.loads(listed.stdout)["exports"]]
    shown = machine.kms("backup", "show", told["export_id"], "--config", machine.config, "--json")
    assert json.loads(shown.stdout)["sha256"] == told["sha256"]
    again = machine.kms("backup", "create", "--config", machine.config, "--out", tmp_path / "e")
    assert (again.returncode, "never overwritten" in again.stderr) == (1, True)
    assert (tmp_path / "e").stat().st_mode & 0o777 == 0o600


async def test_embedded_provider_rotates() -> None:
    """The embedded provider rotates too."""
    async with open_provider("embedded:") as kms:
        old = await kms.create_dek_for_thread("a/b")
        new = await kms.rotate_dek("a/b")
        assert new.key_version == "2"
        with pytest.raises(KeyDecryptOnly):
            await kms.encrypt_with_dek(old.key_id, b"x")


@pytest.mark.parametrize("missing", ["key:create", "key:admin"])
def test_rotating_needs_both_permissions(tmp_path: Path, missing: str) -> None:
    """Whoever may create and not administer, or the other way round, can't rotate."""
    machine = Machine(tmp_path / "m", permissions=[name for name in EVERYTHING if name != missing])
    machine.start_store()
    try:
        with machine.service() as (kms, _), pytest.raises(PermissionDenied, match=missing):
            kms.rotate_dek("room:1")
    finally:
        machine.lose()
