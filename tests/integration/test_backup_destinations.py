"""`backup create` to a folder and to S3-compatible storage, its retention, and `backup fetch`."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.cli.exportnames import export_name, is_export
from progressdb_kms.cli.s3 import Bucket
from progressdb_kms.domain.errors import BackupInvalid, OperatorError, SettingsInvalid
from progressdb_kms.domain.keys import locate
from tests.cli.helpers import wait_until
from tests.integration.drill import Machine
from tests.integration.object_storage import BUCKET, SECRET, ObjectStorage

KEYS = 3
OLD = [export_name(day * 86_400, f"x_{day:016x}") for day in range(1, 4)]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Give a store with keys in it."""
    made = Machine(tmp_path_factory.mktemp("m") / "one")
    made.start_store()
    with made.service() as (kms, _):
        for number in range(KEYS):
            kms.create_dek_for_thread(f"room:{number}")
    yield made
    made.lose()


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStorage]:
    """Give storage to which the environment leads."""
    made = ObjectStorage(tmp_path)
    for name, value in made.environment().items():
        monkeypatch.setenv(name, value)
    yield made
    made.close()


def minds_sigterm(pid: int) -> bool:
    """Say whether a process catches SIGTERM (proc(5), SigCgt)."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) & 1 << (signal.SIGTERM - 1))


def is_talking(pid: int) -> bool:
    """Say whether a process that minds signals has begun to talk."""
    if not minds_sigterm(pid):
        return False  # its event loop has a socket of its own before it does
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            links.append(str(link.readlink()))
    return any(target.startswith("socket:") for target in links)


def create(machine: Machine, *words: object, code: int = 0) -> dict[str, Any]:
    """Run `backup create` and return its report."""
    done = machine.kms("backup", "create", "--config", machine.config, "--json", *words)
    assert done.returncode == code, done
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def failed(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line of a command that failed, which holds no secret."""
    assert done.returncode == 1, done
    assert SECRET not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith('{"audit"')]
    return line


def test_a_folder_keeps_the_latest(machine: Machine, tmp_path: Path) -> None:
    """Dated exports appear in the folder; older ones go beyond what is to be kept, nothing else does."""
    other = tmp_path / "progressdb-kms-notes.txt"
    other.write_text("mine")
    begun, stale = (tmp_path / f".{OLD[0]}.{digit * 16}" for digit in "01")
    for path in (begun, stale):
        path.write_bytes(b"half")
    os.utime(stale, (time.time() - 2 * 86_400,) * 2)
    for name in OLD:
        (tmp_path / name).write_bytes(b"an export of another day")
    report = create(machine, "--directory", tmp_path, "--keep", "2")
    file = Path(report["file"])
    assert file.parent == tmp_path
    assert is_export(file.name)
    assert report["export_id"] in file.name
    assert report["records"] == KEYS
    assert report["removed"] == OLD[:2]
    assert {path.name for path in tmp_path.iterdir()} == {file.name, OLD[2], other.name, begun.name}
    assert hashlib.sha256(file.read_bytes()).hexdigest() == report["sha256"]
    assert machine.kms("backup", "verify", file, "--config", machine.config).returncode == 0
    second = create(machine, "--directory", tmp_path)
    assert second["removed"] == []
    assert (tmp_path / OLD[2]).exists()


def test_nothing_is_removed_while_records_are_damaged(tmp_path: Path) -> None:
    """An older export may hold a damaged record's only copy: it stays, and the run ends with 3."""
    machine = Machine(tmp_path / "one")
    machine.start_store()
    try:
        with machine.service() as (kms, _):
            dek, other = kms.create_dek_for_thread("room:1"), kms.create_dek_for_thread("room:2")
        folder = tmp_path / "backups"
        folder.mkdir()
        first = create(machine, "--directory", folder, "--keep", "1")
        machine.ask("HSET", f"kms:{{{locate(dek.key_id)}}}:dek:{dek.key_id}", "wrapped", other.wrapped)
        done = machine.kms(
            "backup", "create", "--config", machine.config, "--directory", folder, "--keep", "1"
        )
        assert done.returncode == 3, done
        assert dek.key_id in done.stderr
        assert "older exports were not removed" in done.stderr
        assert Path(first["file"]).exists()
        assert len(list(folder.iterdir())) == 2
    finally:
        machine.lose()


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["--directory", "/nowhere/at/all"], 1, "mount the volume"),
        ([], 2, "give one of"),
        (["--out", "x", "--directory", "."], 2, "give one of"),
        (["--out", "x", "--keep", "3"], 2, "--keep goes with"),
        (["--directory", ".", "--keep", "0"], 2, "range"),
        (["--s3", "s3://AKIA:word@bucket/x"], 1, "credentials come from the environment"),
        (["--s3", "https://bucket"], 1, "write --s3 s3://"),
        (["--s3", "s3://backups", "--s3-endpoint", "https://me:word@host"], 1, "without credentials"),
        (["--s3", "s3://backups", "--s3-endpoint", "http://minio.example:9000"], 1, "--s3-allow-http"),
    ],
)
def test_wrong_words(machine: Machine, words: list[str], code: int, said: str) -> None:
    """What can't be meant is refused before anything is done, without repeating what may be a password."""
    done = machine.kms("backup", "create", "--config", machine.config, *words)
    assert done.returncode == code
    assert said in done.stderr
    assert "word@" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_to_storage_and_back(machine: Machine, storage: ObjectStorage, tmp_path: Path) -> None:
    """An export is uploaded and read back, the oldest go, others' objects stay; fetched, it is the same."""
    for name in (*(f"kms/{name}" for name in OLD), "kms/notes.txt", OLD[0], f"kms/deeper/{OLD[0]}"):
        storage.put(name)
    report = create(machine, "--s3", f"s3://{BUCKET}/kms/", "--keep", "2")
    assert report["file"].startswith(f"s3://{BUCKET}/kms/progressdb-kms-")
    name = report["file"].rpartition("/")[2]
    assert report["removed"] == OLD[:2]
    assert set(storage.names()) == {
        *(f"kms/{kept}" for kept in (OLD[2], name)),
        "kms/notes.txt",
        OLD[0],
        f"kms/deeper/{OLD[0]}",
    }
    assert hashlib.sha256(storage.get(f"kms/{name}")).hexdigest() == report["sha256"]
    assert any(line.startswith(f"GET /{BUCKET}/kms/{name}") for line in storage.requests)
    out = tmp_path / "fetched"
    for url in (f"s3://{BUCKET}/kms", report["file"]):
        done = machine.kms("backup", "fetch", "--s3", url, "--out", out, "--json")
        assert done.returncode == 0, done
        assert json.loads(done.stdout)["sha256"] == report["sha256"]
        assert out.stat().st_mode & 0o777 == 0o600
        assert machine.kms("backup", "verify", out, "--config", machine.config).returncode == 0
        again = machine.kms("backup", "fetch", "--s3", url, "--out", out)
        assert "never overwritten" in failed(again)
        out.unlink()


def test_what_arrives_spoilt_is_no_backup(machine: Machine, storage: ObjectStorage, tmp_path: Path) -> None:
    """What reads back differently is removed again, and older ones stay; a spoilt fetch leaves no file."""
    good = create(machine, "--s3", f"s3://{BUCKET}/kms")
    before = storage.names()
    storage.spoil = True
    words = ["backup", "create", "--config", machine.config, "--s3", f"s3://{BUCKET}/kms", "--keep", "1"]
    assert "is not what was uploaded" in failed(machine.kms(*words))
    assert storage.names() == before
    out = tmp_path / "fetched"
    assert "damaged" in failed(machine.kms("backup", "fetch", "--s3", good["file"], "--out", out))
    assert not [path for path in tmp_path.iterdir() if "fetched" in path.name]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "GET"])
def test_refusals_of_the_storage(machine: Machine, storage: ObjectStorage, method: str) -> None:
    """What storage refuses is told by its code and what to do, in one line, without its words."""
    storage.put(f"kms/{OLD[0]}")
    storage.refuse[method] = "AccessDenied"
    done = machine.kms(
        *("backup", "create", "--config", machine.config, "--s3", f"s3://{BUCKET}/kms", "--keep", "1")
    )
    assert SECRET not in done.stdout + done.stderr
    assert "AccessDenied" in done.stderr
    assert "s3:DeleteObject" in done.stderr
    assert len([line for line in done.stderr.splitlines() if not line.startswith('{"audit"')]) == 1
    # Only where it could be uploaded and read back is it a backup, though older ones could not be removed.
    assert done.returncode == (3 if method == "DELETE" else 1)
    storage.refuse.clear()
    assert f"kms/{OLD[0]}" in storage.names()
    assert len(storage.names()) == (2 if method == "DELETE" else 1)


@pytest.mark.parametrize("place", ["upload", "folder"])
def test_sigterm_leaves_nothing_half_done(
    machine: Machine, storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A backup that is stopped ends with 75, says so in its last line, and leaves neither object nor file."""
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setenv("TMPDIR", str(spool))
    where: list[object] = ["--s3", f"s3://{BUCKET}/kms"] if place == "upload" else ["--directory", spool]
    storage.go_on.clear()
    if place == "folder":
        machine.pause()
    words = [
        sys.executable,
        "-m",
        "progressdb_kms.cli",
        "backup",
        "create",
        "--config",
        machine.config,
        *where,
    ]
    process = subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, text=True)
    try:
        if place == "upload":
            wait_until(lambda: any(line.startswith("PUT") for line in storage.requests))
        else:
            wait_until(lambda: is_talking(process.pid))
        process.send_signal(signal.SIGTERM)
    finally:
        storage.go_on.set()
        if place == "folder":
            machine.resume()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1] == "progressdb-kms: stopped: there is no new export; run it again"
    assert list(spool.iterdir()) == []
    assert storage.names() == []


def test_sigterm_stops_what_works_on_the_store(machine: Machine) -> None:
    """Also the first process of a container, which no signal ends by itself, can be told to stop."""
    machine.pause()
    words = [sys.executable, "-m", "progressdb_kms.cli", "backup", "list", "--config", machine.config]
    process = subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: is_talking(process.pid))
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        machine.resume()
    assert (process.returncode, errors) == (75, "progressdb-kms: stopped: run it again\n")


def test_storage_that_can_not_be_used(
    machine: Machine, storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No bucket, no export, no trust, nobody there, no credentials: each is a line that says what to do."""
    out = tmp_path / "f"

    def fetch(url: str) -> str:
        return failed(machine.kms("backup", "fetch", "--s3", url, "--out", out))

    assert "there is no such bucket" in fetch("s3://another-bucket/kms")
    assert "there is no such object" in fetch(f"s3://{BUCKET}/kms/{OLD[0]}")
    assert f"there is no export under s3://{BUCKET}/kms/" in fetch(f"s3://{BUCKET}/kms")
    with monkeypatch.context() as patch:
        patch.delenv("AWS_CA_BUNDLE")
        assert "AWS_CA_BUNDLE" in fetch(f"s3://{BUCKET}/kms")
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        assert "no credentials" in fetch(f"s3://{BUCKET}/kms")
    storage.close()
    assert "does not answer" in fetch(f"s3://{BUCKET}/kms")
    storage.close = lambda: None  # type: ignore[method-assign] # it is closed


def test_a_large_export_goes_in_parts(storage: ObjectStorage, tmp_path: Path) -> None:
    """A file above the size of a part is uploaded in parts and read back whole."""
    content = secrets.token_bytes(12 * 2**20)
    digest = hashlib.sha256(content).hexdigest()
    bucket = Bucket(f"s3://{BUCKET}", part=5 * 2**20)
    with bucket.workplace() as folder:
        file = folder / OLD[0]
        file.write_bytes(content)
        assert bucket.deliver(file, digest) == f"s3://{BUCKET}/{OLD[0]}"
    assert not folder.exists()
    assert sum("partNumber=" in line for line in storage.requests) == 3
    assert storage.get(OLD[0]) == content
    got: list[bytes] = []
    bucket.fetch(OLD[0], got.append)
    assert b"".join(got) == content
    storage.requests.clear()
    with bucket.workplace() as folder:
        file = folder / OLD[1]
        file.write_bytes(content)
        with pytest.raises(BackupInvalid):
            bucket.deliver(file, "0" * 64)
    assert storage.names() == [OLD[0]]


def test_plain_http_is_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An http:// endpoint elsewhere needs a word, given by the option or by the environment."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    Bucket(f"s3://{BUCKET}", "http://127.0.0.1:9")
    Bucket(f"s3://{BUCKET}", "http://minio.example:9000", allow_http=True)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://minio.example:9000")
    with pytest.raises(SettingsInvalid, match="--s3-allow-http"):
        Bucket(f"s3://{BUCKET}")
    with pytest.raises(OperatorError, match="write --s3-endpoint"):
        Bucket(f"s3://{BUCKET}", "ftp://host")
