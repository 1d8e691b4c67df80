"""The machine is gone: what the export and the KEK file bring back."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.client import AdminClient, SyncKmsProvider
from progressdb_kms.domain.errors import (
    KeyDecryptOnly,
    KeyDestroyed,
    KeyDisabled,
    KeyPendingDestruction,
    KmsError,
)
from progressdb_kms.domain.keys import locate
from tests.integration.drill import Machine

KEYS = 500


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    """Machines of the test, all gone after it."""
    made: list[Machine] = []
    yield made
    for machine in made:
        machine.lose()


def _make_due(machine: Machine, key_id: str) -> None:
    """Let a scheduled destruction be due now: no test can wait seven days."""
    tag = locate(key_id)
    past = int(time.time()) - 10
    machine.ask("HSET", f"kms:{{{tag}}}:dek:{key_id}", "destroy_at", past)
    machine.ask("ZADD", f"kms:{{{tag}}}:due", past, key_id)


def _fill(kms: SyncKmsProvider, admin: AdminClient) -> tuple[dict[str, tuple[bytes, bytes]], dict[str, str]]:
    """Make keys with a ciphertext each, and put some of them into other states; return both by key id."""
    threads = [f"room:{number}" for number in range(KEYS)]
    deks = [dek for dek in kms.create_deks_for_threads(threads) if not isinstance(dek, KmsError)]
    assert len(deks) == KEYS
    texts = {dek.key_id: f"text {number}".encode() for number, dek in enumerate(deks)}
    sealed = kms.encrypt_many([(key_id, text, b"aad") for key_id, text in texts.items()])
    messages = {
        key_id: (one.ciphertext, text)
        for (key_id, text), one in zip(texts.items(), sealed, strict=True)
        if not isinstance(one, KmsError)
    }
    assert len(messages) == KEYS
    states = dict.fromkeys(texts, "enabled")
    for dek in deks[:5]:
        states[dek.key_id] = admin.disable(dek.key_id).state
    for number, dek in enumerate(deks[5:10], 5):
        new = kms.rotate_dek(threads[number])
        assert new.key_version == "2"
        states[dek.key_id] = "decrypt_only"
        states[new.key_id] = "enabled"
        messages[new.key_id] = (kms.encrypt_with_dek(new.key_id, b"new", b"aad").ciphertext, b"new")
    for dek in deks[10:20]:
        states[dek.key_id] = admin.schedule_destruction(dek.key_id, waiting_days=7).state
    return messages, states


def _check(
    kms: SyncKmsProvider,
    admin: AdminClient,
    messages: dict[str, tuple[bytes, bytes]],
    states: dict[str, str],
) -> None:
    """Every key is in its state; every ciphertext decrypts, once its key is allowed to."""
    assert {key.key_id: key.state for key in admin.list_keys(limit=1000)} == states
    resting = {
        "disabled": KeyDisabled,
        "pending_destruction": KeyPendingDestruction,
        "destroyed": KeyDestroyed,
    }
    ciphertexts = [(key_id, ciphertext, b"aad") for key_id, (ciphertext, _) in messages.items()]
    for (key_id, _, _), result in zip(ciphertexts, kms.decrypt_many(ciphertexts), strict=True):
        if states[key_id] in resting:
            assert isinstance(result, resting[states[key_id]])
        else:
            assert result == messages[key_id][1]
    for key_id, state in states.items():
        if state == "pending_destruction":
            admin.cancel_destruction(key_id)
        if state in {"disabled", "pending_destruction"}:
            admin.enable(key_id)
    for key_id, (ciphertext, text) in messages.items():
        if states[key_id] in {"disabled", "pending_destruction"}:
            assert kms.decrypt_with_dek(key_id, ciphertext, b"aad") == text
        if states[key_id] == "decrypt_only":
            with pytest.raises(KeyDecryptOnly):
                kms.encrypt_with_dek(key_id, b"more")


def test_everything_comes_back_from_export_and_kek_file(tmp_path: Path, machines: list[Machine]) -> None:
    """Machine gone, export and KEK file left: every ciphertext decrypts, and every state is what it was."""
    first = Machine(tmp_path / "first")
    machines.append(first)
    first.start_store()
    with first.service() as (kms, admin):
        messages, states = _fill(kms, admin)
        for key_id in [key_id for key_id, state in states.items() if state == "pending_destruction"][:3]:
            _make_due(first, key_id)
            states[key_id] = "destroyed"
        # The daily job destroys what is due, then exports, while the service runs.
        export = tmp_path / "daily.export"
        done = first.kms("backup", "create", "--config", first.config, "--out", export, "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert (told["records"], told["tombstones"]) == (KEYS + 2, 3)
    kept = tmp_path / "kek.yaml"
    shutil.copy(first.kek_file, kept)
    first.lose()

    assert first.kms("backup", "verify", export).returncode == 0
    second = Machine(tmp_path / "second", kept)
    machines.append(second)
    second.start_store()
    verified = second.kms("backup", "verify", export, "--config", second.config)
    assert verified.returncode == 0, verified.stderr
    done = second.kms("backup", "import", export, "--config", second.config, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["added"] == KEYS + 5
    again = second.kms("backup", "import", export, "--config", second.config)
    assert again.returncode == 1
    assert "backup_invalid" in again.stderr
    with second.service() as (kms, admin):
        _check(kms, admin, messages, states)
        assert kms.create_dek_for_thread("room:5").key_version == "3"


def test_export_under_another_kek_is_refused(tmp_path: Path, machines: list[Machine]) -> None:
    """With another KEK file the import says which KEKs it needs and has, and the store stays empty."""
    first, second = Machine(tmp_path / "first"), Machine(tmp_path / "second")
    machines += [first, second]
    first.start_store()
    second.start_store()
    with first.service() as (kms, admin):
        kms.create_dek_for_thread("room:1")
        kek_id = admin.keks().keks[0].kek_id
        export = tmp_path / "e"
        assert first.kms("backup", "create", "--config", first.config, "--out", export).returncode == 0
    done = second.kms("backup", "import", export, "--config", second.config)
    assert done.returncode == 1
    assert f"version 1 must be {kek_id} and is kek_" in done.stderr
    assert second.ask("DBSIZE") == 0


def test_destroyed_key_is_in_no_file(tmp_path: Path, machines: list[Machine]) -> None:
    """A destroyed key's blob is gone from the store and from its append-only files; its tombstone stays."""
    machine = Machine(tmp_path / "one")
    machines.append(machine)
    machine.start_store()
    with machine.service() as (kms, admin):
        dek, other = kms.create_dek_for_thread("room:1"), kms.create_dek_for_thread("room:2")
        sealed = kms.encrypt_with_dek(dek.key_id, b"secret").ciphertext
        export = tmp_path / "e"
        assert machine.kms("backup", "create", "--config", machine.config, "--out", export).returncode == 0
        admin.schedule_destruction(dek.key_id, waiting_days=7)
        early = machine.kms("keys", "destroy-due", "--config", machine.config)
        assert (early.returncode, early.stdout) == (0, "destroyed 0 keys\n")
        _make_due(machine, dek.key_id)
        assert dek.wrapped in machine.aof
        done = machine.kms("keys", "destroy-due", "--config", machine.config)
        assert (done.returncode, done.stdout) == (0, "destroyed 1 keys\n"), done.stderr
        assert dek.wrapped not in machine.aof
        assert other.wrapped in machine.aof
        with pytest.raises(KeyDestroyed):
            kms.decrypt_with_dek(dek.key_id, sealed)
        assert admin.get_key(dek.key_id).state == "destroyed"
        written = machine.ask("HGET", f"kms:{{{locate(dek.key_id)}}}:destroyed", dek.key_id)
        assert isinstance(written, bytes)
        (held,) = json.loads(written)["held_by"]
        assert held["sha256"] == admin.backups().exports[0].sha256 != ""
