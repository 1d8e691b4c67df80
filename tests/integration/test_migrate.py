"""The older service's keys moved in by the command, and used over the real service."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.cli.operator import INCOMPLETE
from progressdb_kms.domain.errors import AuthenticationFailed, KeyDecryptOnly, KeyNotFound
from progressdb_kms.store.redis.schema import LOCK_KEY
from tests.integration.drill import Machine
from tests.older_service import FIRST_TIME, OlderService


class Export:
    """The older service, its export in a file, and its master key in another."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.older = OlderService()
        self.machine = machine
        self.file = folder / "export.jsonl"
        self.master = folder / "master"
        self.write_master(self.older.master)

    def write_master(self, key: bytes) -> None:
        """Write a master key, in the form of the older service's configuration."""
        self.master.touch(0o600)
        self.master.write_text(f"master_key_hex: {key.hex()}\n")

    def write(self, **options: Any) -> None:
        """Write the export."""
        self.file.write_bytes(b"".join(self.older.lines(**options)))

    def words(self, *more: object) -> tuple[object, ...]:
        """Return the command."""
        return (
            *("migrate", self.file, "--config", self.machine.config, "--master-key-file", self.master),
            *more,
        )

    def migrate(self, *more: object) -> subprocess.CompletedProcess[str]:
        """Run the command."""
        return self.machine.kms(*self.words(*more))

    def counts(self, *more: object, code: int = 0) -> dict[str, Any]:
        """Run the command and return what it prints."""
        done = self.migrate("--json", *more)
        assert done.returncode == code, done.stderr
        told = json.loads(done.stdout)
        assert isinstance(told, dict)
        return told


@pytest.fixture
def export(tmp_path: Path, machine: Machine) -> Export:
    """The older service beside the machine."""
    return Export(tmp_path, machine)


def test_old_messages_decrypt_by_the_same_key_id(export: Export) -> None:
    """With empty AAD, over the API, while the service runs; encryption, listing and rotate-dek work, too."""
    one, two = export.older.create("room:1"), export.older.create("room:2", raw=True)
    said = {key_id: export.older.encrypt(key_id, b"said under " + key_id.encode()) for key_id in (one, two)}
    export.write(threads=True)
    with export.machine.service() as (kms, admin):
        with pytest.raises(KeyNotFound):
            kms.decrypt_with_dek(one, said[one])
        assert export.counts()["moved"] == 2
        for key_id, ciphertext in said.items():
            assert kms.decrypt_with_dek(key_id, ciphertext) == b"said under " + key_id.encode()
            assert kms.decrypt_with_dek(key_id, ciphertext, b"") == b"said under " + key_id.encode()
            with pytest.raises(AuthenticationFailed):
                kms.decrypt_with_dek(key_id, ciphertext, b"room:1")
        sealed = kms.encrypt_with_dek(one, b"new", b"aad")
        assert (sealed.key_version, kms.decrypt_with_dek(one, sealed.ciphertext, b"aad")) == ("1", b"new")
        (info,) = admin.list_keys(thread_id="room:1")
        assert (info.key_id, info.created_by, info.created_at) == (one, "migration", FIRST_TIME)
        later = admin.rotate_dek("room:1")
        assert later.key_version == "2"
        with pytest.raises(KeyDecryptOnly):
            kms.encrypt_with_dek(one, b"new")
        assert kms.decrypt_with_dek(one, said[one]) == b"said under " + one.encode()
    assert export.counts("--verify")["present"] == 2


def test_rotation_backup_and_a_new_machine(export: Export, tmp_path: Path) -> None:
    """Moved keys go through a rotation of the KEK, a backup, the loss of everything, and an import."""
    key_id = export.older.create("room:1")
    said = export.older.encrypt(key_id, b"text")
    export.write()
    machine, backup = export.machine, tmp_path / "backup"
    assert export.counts()["moved"] == 1
    for words in (
        ("rotate", "--config", machine.config),
        ("backup", "create", "--config", machine.config, "--out", backup),
        ("backup", "verify", backup, "--config", machine.config),
    ):
        done = machine.kms(*words)
        assert done.returncode == 0, (words, done.stderr)
    assert export.counts("--verify")["present"] == 1
    second = Machine(tmp_path / "two", machine.kek_file)
    second.start_store()
    try:
        done = second.kms("backup", "import", backup, "--config", second.config)
        assert done.returncode == 0, done.stderr
        with second.service() as (kms, admin):
            assert kms.decrypt_with_dek(key_id, said) == b"text"
            assert [info.key_id for info in admin.list_keys(thread_id="room:1")] == [key_id]
    finally:
        second.lose()


def test_killed_in_the_middle(export: Export) -> None:
    """What a killed run has written stays; the next one moves the rest, and every key opens."""
    keys = [export.older.create(f"room:{n % 50}") for n in range(8_000)]
    export.write()
    command = [sys.executable, "-m", "progressdb_kms.cli", *map(str, export.words())]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not int(export.machine.ask("DBSIZE")) > 2_000:  # type: ignore[call-overload] # a number
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    # As when the killed run's lease is over.
    export.machine.ask("HSET", LOCK_KEY, "until", "0")
    done = export.migrate("--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["read"], told["refused"], told["complete"]) == (8_000, 0, True)
    assert 0 < told["present"] < 8_000
    assert told["moved"] == 8_000 - told["present"]
    assert export.counts("--verify")["present"] == 8_000
    with export.machine.service() as (kms, _):
        for key_id in keys[:: len(keys) // 20]:
            assert kms.decrypt_with_dek(key_id, export.older.encrypt(key_id, b"text")) == b"text"


def test_dry_run_writes_nothing(export: Export, tmp_path: Path) -> None:
    """Not a byte of the store changes, nor by a verification; the exit code says what is missing."""
    export.older.create("room:1")
    export.write()
    machine = export.machine

    def held() -> dict[bytes, object]:
        names = machine.ask("KEYS", "*")
        assert isinstance(names, list)
        return {name: machine.ask("DUMP", name) for name in names}

    before = held()
    report = tmp_path / "report"
    assert export.counts("--dry-run", "--report", report)["moved"] == 1
    assert json.loads(report.read_text())["mode"] == "dry run"
    assert export.counts("--verify", code=INCOMPLETE)["refused"] == 1
    assert held() == before


def test_refused_lines_are_reported(export: Export, tmp_path: Path) -> None:
    """Each with its number and reason: 20 on standard error, all in the report, which is private."""
    for n in range(3):
        export.older.create(f"room:{n}")
    export.older.create("x", raw=True)
    export.write(extra=[b"{}\n", b'{"key_id": "k_1"' + b" " * 200_000 + b"}\n"] * 15)
    report = tmp_path / "report"
    done = export.migrate("--report", report, "--json")
    assert done.returncode == INCOMPLETE
    told = json.loads(done.stdout)
    assert (told["read"], told["moved"], told["refused"], told["complete"]) == (34, 3, 31, True)
    errors = [line for line in done.stderr.splitlines() if re.match(r"line \d+", line)]
    assert len(errors) == 20
    assert errors[0] == "line 2: the line has other members than key_id, dek, dekmeta and thread_id"
    assert "and 11 more lines" in done.stderr
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [line["line"] for line in lines[:-1]] == [*range(2, 32), 34]
    assert "nothing tells its thread" in lines[-2]["reason"]
    assert lines[-1] == told
    assert report.stat().st_mode & 0o777 == 0o600
    again = export.migrate("--report", report)
    assert (again.returncode, "never overwritten" in again.stderr) == (1, True)
    assert export.counts("--threadless", "older:", code=INCOMPLETE)["moved"] == 1


def test_a_wrong_master_key_is_named(export: Export) -> None:
    """Nothing is moved, and the likely cause is said; a file that others can read is not used at all."""
    export.older.create("room:1")
    export.write()
    export.write_master(os.urandom(32))
    done = export.migrate()
    assert done.returncode == INCOMPLETE
    assert "no key opens: is this the older service's master key?" in done.stderr
    export.write_master(export.older.master)
    export.master.chmod(0o644)
    done = export.migrate()
    assert (done.returncode, "wider than a secret may be" in done.stderr) == (1, True)
    assert export.machine.ask("KEYS", "kms:*:dek:*") == []
    export.master.chmod(0o600)
    assert export.counts()["moved"] == 1


def test_a_file_that_is_cut_short_is_told(export: Export) -> None:
    """What it holds is moved; the exit code and a sentence say that there may be more."""
    for n in range(2):
        export.older.create(f"room:{n}")
    export.write()
    export.file.write_bytes(b"".join(export.file.read_bytes().splitlines(keepends=True)[:1]))
    done = export.migrate()
    assert (done.returncode, "it is cut short" in done.stderr) == (INCOMPLETE, True)
    export.write()
    assert export.counts()["moved"] == 1


def test_wrong_usage(export: Export) -> None:
    """One line each; a store without a registry is not founded by it."""
    export.write()
    done = export.migrate("--dry-run", "--verify")
    assert (done.returncode, "either --dry-run or --verify" in done.stderr) == (2, True)
    done = export.migrate("--report", export.file)
    assert (done.returncode, "never overwritten" in done.stderr) == (1, True)
    export.machine.ask("FLUSHALL")
    done = export.migrate()
    assert (done.returncode, "the store is empty" in done.stderr) == (1, True)


def test_nothing_secret_is_printed(export: Export, tmp_path: Path) -> None:
    """Neither master key, DEK nor wrap is in any output or report, no key in the store's files."""
    good, bad = export.older.create("room:1"), export.older.create("room:2", raw=True)
    export.older.store[f"dek:{bad}"] = export.older.store[f"dek:{bad}"][:-1] + b"\0"
    export.write(threads=True, extra=[b'{"key_id": "k_1", "dek": "' + os.urandom(9).hex().encode() + b'"}\n'])
    report = tmp_path / "report"
    done = export.migrate("--report", report, "--json")
    assert done.returncode == INCOMPLETE
    output = done.stdout + done.stderr + report.read_text()
    for secret in (export.older.master, export.older.dek(good), *export.older.store.values()):
        assert secret.hex()[:16] not in output
        assert secret not in export.machine.aof
        assert json.loads(export.older.line(good))["dek"][:24] not in output
    assert export.older.dek(bad) not in export.machine.aof
