"""The commands of backups on a real store and service: what they do, say and return."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from progressdb_kms.domain.errors import WrappedKeyInvalid
from progressdb_kms.domain.keys import locate
from tests.integration.drill import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine with a store."""
    made = Machine(tmp_path / "one")
    made.start_store()
    yield made
    made.lose()


def test_damaged_key_is_restored_under_traffic(machine: Machine, tmp_path: Path) -> None:
    """`restore --file` puts a damaged key back while the service runs; a second run finds all healthy."""
    export = tmp_path / "e"
    with machine.service() as (kms, _):
        dek, other = kms.create_dek_for_thread("room:1"), kms.create_dek_for_thread("room:2")
        sealed = kms.encrypt_with_dek(dek.key_id, b"text").ciphertext
        assert machine.kms("backup", "create", "--config", machine.config, "--out", export).returncode == 0
    machine.ask("HSET", f"kms:{{{locate(dek.key_id)}}}:dek:{dek.key_id}", "wrapped", other.wrapped)
    with machine.service() as (kms, _):
        with pytest.raises(WrappedKeyInvalid):
            kms.decrypt_with_dek(dek.key_id, sealed)
        done = machine.kms("restore", "--config", machine.config, "--file", export, "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert (told["restored"], told["healthy"]) == ([dek.key_id], 1)
        assert kms.decrypt_with_dek(dek.key_id, sealed) == b"text"
    again = machine.kms("restore", "--config", machine.config, "--file", export)
    assert again.stdout == "restored 0, added 0, healthy 2, destroyed 0, refused 0\n"
    absent = machine.kms("restore", "--config", machine.config, "--file", export, "--key-id", "k_" + "A" * 28)
    assert absent.returncode == 3
    assert "not in the backup" in absent.stdout


def test_escrow_goes_along(machine: Machine, tmp_path: Path) -> None:
    """What is sealed to recovery keys is in the export, and in the store that is filled from it."""
    with machine.service() as (kms, _):
        kms.create_dek_for_thread("room:1")
    machine.ask("HSET", "kms:{ctl}:escrow", "1", b"sealed to a recovery key \xff")
    export = tmp_path / "e"
    assert machine.kms("backup", "create", "--config", machine.config, "--out", export).returncode == 0
    second = Machine(tmp_path / "two", machine.kek_file)
    second.start_store()
    try:
        assert second.kms("backup", "import", export, "--config", second.config).returncode == 0
        assert second.ask("HGET", "kms:{ctl}:escrow", "1") == b"sealed to a recovery key \xff"
    finally:
        second.lose()


def test_a_version_erased_since_the_export_is_retired_in_the_new_store_too(
    machine: Machine, tmp_path: Path
) -> None:
    """A store filled from the export that a version was retired on starts once it is retired there, too."""
    export, config = tmp_path / "e", ("--config", machine.config)
    with machine.service() as (kms, _):
        dek = kms.create_dek_for_thread("room:1")
        sealed = kms.encrypt_with_dek(dek.key_id, b"text").ciphertext
    rotated = machine.kms("rotate", *config)
    assert rotated.returncode == 0, rotated.stderr
    told = [json.loads(line) for line in rotated.stdout.splitlines()]
    (rotation_id,) = {line["rotation_id"] for line in told if "step" in line}
    for words in (
        ("backup", "purge", rotation_id, *config),
        ("backup", "create", *config, "--out", export),
        ("kek", "retire", 1, *config, "--export", export),
    ):
        done = machine.kms(*words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
    versions = yaml.safe_load(machine.kek_file.read_text())["versions"]
    machine.kek_file.write_text(yaml.safe_dump({"versions": {2: versions[2]}}))
    second = Machine(tmp_path / "two", machine.kek_file)
    second.start_store()
    try:
        config = ("--config", second.config)
        assert second.kms("backup", "import", export, *config).returncode == 0
        refused = second.kms("serve", *config)
        assert refused.returncode == 1
        assert "KEK version 1 (decrypt_only) is not loaded: add it, or retire it" in refused.stderr
        done = second.kms("kek", "retire", 1, *config, "--export", export)
        assert (done.returncode, "warning: KEK version 1" in done.stderr) == (0, True), done.stderr
        with second.service() as (kms, _):
            assert kms.decrypt_with_dek(dek.key_id, sealed) == b"text"
    finally:
        second.lose()


def test_refusals_are_one_line(machine: Machine, tmp_path: Path) -> None:
    """What can't be done is said in one line on standard error, with exit code 1 (2 for wrong usage)."""
    with machine.service() as (kms, _):
        kms.create_dek_for_thread("room:1")
    export = tmp_path / "e"
    assert machine.kms("backup", "create", "--config", machine.config, "--out", export).returncode == 0
    cut = tmp_path / "cut"
    cut.write_bytes(export.read_bytes()[:-1])
    config = ("--config", machine.config)
    for words, code, text in (
        (("kek", "retire", 1, *config, "--export", export), 1, "version 1 is active"),
        (("backup", "purge", "r_1_x", *config), 1, "no snapshot"),
        (("backup", "purge", *config), 2, "either ROTATION_ID or --older-than"),
        (("backup", "verify", cut), 1, "cut short"),
        (("backup", "verify", cut, *config), 1, "cut short"),
        (("backup", "verify", "r_1_x", *config), 1, "no snapshot"),
        (("backup", "import", cut, *config), 1, "cut short"),
        (("backup", "show", "x", *config), 1, "neither an export nor a snapshot"),
        (("backup", "export", "r_1_x", *config, "--out", tmp_path / "o"), 1, "no snapshot"),
        (("restore", *config), 2, "either --rotation ID or --file PATH"),
    ):
        done = machine.kms(*words)
        last = [line for line in done.stderr.splitlines() if line.startswith("progressdb-kms:")]
        assert (done.returncode, len(last)) == (code, 1), (words, done.stderr)
        assert text in last[0]
    assert not (tmp_path / "o").exists()
