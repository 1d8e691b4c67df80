"""`rotate`, `rotations`, `kek status` and `kek escrow` as an operator uses them."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from progressdb_kms.kek.keyfile import raw_keys, read_entries
from tests.cli.conftest import Command
from tests.cli.helpers import Dev, start_dev, wait_until


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    """Give a dev instance with escrow, on which the KEK was rotated once, on a terminal."""
    root = tmp_path_factory.mktemp("rotated")
    first = start_dev(root / "dev")
    config = Path(first.ready["config"])
    assert first.stop() == 0
    settings = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(settings | {"escrow": {"recipients": ["recovery/recovery.pub"]}}))
    made = command("kek", "escrow", "keygen", "--out", config.parent / "recovery", "--json")
    assert json.loads(made.stdout)["private"].endswith("recovery.key")
    dev = start_dev(root / "dev")
    terminal, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "progressdb_kms.cli", "rotate", "--config", str(config)],
        stdout=child,
        stderr=child,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "200"},
    )
    os.close(child)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    os.close(terminal)
    assert process.wait() == 0, shown.decode()
    (dev.directory / "shown").write_bytes(shown)
    yield dev
    assert dev.stop() == 0, dev.output


def command(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, since the job takes signals."""
    arguments = [sys.executable, "-m", "progressdb_kms.cli", *map(str, words)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


def test_a_terminal_sees_a_bar(rotated: Dev) -> None:
    """On a terminal each step is a bar, without JSON lines of progress, and escrow is not warned about."""
    shown = (rotated.directory / "shown").read_text()
    for text in ("distribute", "snapshot", "rewrap", "verify", "1024/1024", "keys/s", "outcome=clean"):
        assert text in shown, text
    assert '{"event"' not in shown
    assert "warning" not in shown


def test_kek_status_and_rotations(kms: Command, rotated: Dev) -> None:
    """The new version is active; the rotation is listed and shown, as a table and as JSON."""
    where = ("--dev-dir", rotated.directory)
    # The service reads the registry each second, and a rotation of a few keys may take no longer.
    wait_until(lambda: kms("kek", "status", *where, "--json").json["active"] == 2)
    status = kms("kek", "status", *where, "--json").json
    states = {version["version"]: version["state"] for version in status["versions"]}
    assert states == {1: "decrypt_only", 2: "active"}
    assert all(version["fingerprint"].startswith("kek_") for version in status["versions"])
    (rotation,) = kms("rotations", "list", *where, "--json").json
    assert rotation["outcome"] == "clean"
    assert rotation["rotation_id"] in kms("rotations", "list", *where).out
    shown = kms("rotations", "show", rotation["rotation_id"], *where)
    assert "complete" in shown.out
    assert kms("rotations", "show", rotation["rotation_id"], *where, "--json").json == rotation
    missing = kms("rotations", "show", "r_9_00000000", *where)
    assert missing.code == 1
    assert "No rotation has this id (rotation_not_found)" in missing.err


def test_escrow_gives_the_kek_file_back(kms: Command, rotated: Dev, tmp_path: Path) -> None:
    """What is sealed is listed; with the recovery key and without the KEK file, the same keys come back."""
    config, kek_file = rotated.ready["config"], Path(rotated.ready["kek_file"])
    listed = kms("kek", "escrow", "list", "--config", config, "--json").json
    assert [(row["version"], len(row["recipients"])) for row in listed] == [(1, 1), (2, 1)]
    assert listed[0]["recipients"][0] in kms("kek", "escrow", "list", "--config", config).out
    recovery = rotated.directory / "recovery" / "recovery.key"
    out = tmp_path / "kek.yaml"
    words = ("kek", "escrow", "recover", "--config", config, "--recovery-key", recovery, "--out", out)
    kept = shutil.move(kek_file, tmp_path / "away")
    try:
        done = kms(*words)
        again = kms(*words)
    finally:
        shutil.move(kept, kek_file)
    assert done.code == 0, done.err
    assert out.stat().st_mode & 0o777 == 0o600
    assert read_entries(out) == read_entries(kek_file)
    assert again.code == 1
    assert "never overwritten" in again.err
    assert not [key.hex() for key in raw_keys(read_entries(out)).values() if key.hex() in done.out + done.err]
    export = tmp_path / "export"
    assert kms("backup", "create", "--config", config, "--out", export).code == 0
    from_export = tmp_path / "third.yaml"
    words_of_export = ("--export", export, "--recovery-key", recovery, "--out", from_export)
    assert kms("kek", "escrow", "recover", *words_of_export).code == 0
    assert read_entries(from_export) == read_entries(kek_file)
    assert kms("kek", "escrow", "recover", "--config", config, *words_of_export).code == 2
    as_json = kms(*words[:-1], tmp_path / "second.yaml", "--json").json
    assert as_json == {"file": str(tmp_path / "second.yaml"), "versions": [1, 2], "missing": []}


def test_another_recovery_key_gives_nothing(kms: Command, rotated: Dev, tmp_path: Path) -> None:
    """A key that nothing is sealed to recovers nothing and writes nothing."""
    made = kms("kek", "escrow", "keygen", "--out", tmp_path / "other")
    assert "recovery.pub" in made.out
    out = tmp_path / "kek.yaml"
    words = ("--config", rotated.ready["config"], "--recovery-key", tmp_path / "other" / "recovery.key")
    refused = kms("kek", "escrow", "recover", *words, "--out", out)
    assert refused.code == 1
    assert "nothing is escrowed" in refused.err
    assert not out.exists()
    unwritable = tmp_path / "no" / "such" / "kek.yaml"
    recovery = rotated.directory / "recovery" / "recovery.key"
    words = ("--config", rotated.ready["config"], "--recovery-key", recovery)
    assert "can't write" in kms("kek", "escrow", "recover", *words, "--out", unwritable).err


@pytest.mark.parametrize(
    "words, text",
    [
        (("--dry-run", "--worker"), "exclude each other"),
        (("--verify", "some"), "all, or sample=N"),
        (("--verify", "sample=0"), "all, or sample=N"),
        (("--batch", "0"), "--batch"),
        (("--batch", "1001"), "--batch"),
    ],
)
def test_wrong_usage(kms: Command, rotated: Dev, words: tuple[str, ...], text: str) -> None:
    """What can't be meant is refused with 2 before anything is opened."""
    outcome = kms("rotate", "--config", rotated.ready["config"], *words)
    assert outcome.code == 2
    assert text in outcome.err


def test_a_sample_is_verified(rotated: Dev) -> None:
    """--verify sample=N, --batch and --max-rate are taken; a second run brings version 3."""
    words = ("rotate", "--config", rotated.ready["config"], "--verify", "sample=5", "--batch", "10")
    done = command(*words, "--max-rate", "1000000", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = [line for line in map(json.loads, done.stdout.splitlines()) if line.get("event") == "result"]
    assert result["target_version"] == 3


def test_what_is_missing_is_one_line(rotated: Dev, tmp_path: Path) -> None:
    """A store without registry, and a wrong recovery key file, are one line and exit 1."""
    config = tmp_path / "config.yaml"
    settings = yaml.safe_load(Path(rotated.ready["config"]).read_text())
    settings["store"]["url"] = rotated.ready["redis_url"] + "?db=1"
    settings["kek"]["path"] = rotated.ready["kek_file"]
    settings["policy"] = str(rotated.directory / "policy.yaml")
    config.write_text(yaml.safe_dump(settings))
    empty = command("rotate", "--config", config)
    assert empty.returncode == 1
    assert "start the service on it first" in empty.stderr.splitlines()[-1]
    listed = command("kek", "escrow", "list", "--config", config)
    assert listed.returncode == 1
    assert "holds no KEK registry" in listed.stderr
    settings["store"]["url"] = rotated.ready["redis_url"]
    settings["escrow"]["recipients"] = [rotated.ready["kek_file"]]
    config.write_text(yaml.safe_dump(settings))
    wrong = command("rotate", "--config", config)
    assert wrong.returncode == 1
    assert "is not a public key" in wrong.stderr.splitlines()[-1]
