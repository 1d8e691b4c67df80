"""The program of docs/moving-in over the older service's databases, and the migration of what it writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.integration.drill import Machine
from tests.older_service import OlderService, b64

ROOT: Final = Path(__file__).resolve().parents[2]
MODULE: Final = Path(__file__).parent / "pebble"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("go") is None, reason="Go is missing: the export program is not tested"),
]


def go(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the go command, with the module versions of go.sum and no others."""
    # -trimpath like the tools that .ci/run builds, so that the standard library is compiled once for all.
    flags = "-mod=readonly -buildvcs=false -trimpath"
    settings = {"GOFLAGS": flags, "GOTOOLCHAIN": "local", "GOWORK": "off"}
    return subprocess.run(
        ["go", *arguments],
        cwd=folder,
        env={**os.environ, **settings, "CGO_ENABLED": "0"},
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with ``export``, the program of the documentation, and ``seed``, of this test."""
    folder = tmp_path_factory.mktemp("older")
    for name in ("go.mod", "go.sum"):
        shutil.copy(MODULE / name, folder)
    for name, source in (("export", ROOT / "docs" / "moving-in" / "main.go"), ("seed", MODULE / "main.go")):
        (folder / name).mkdir()
        shutil.copy(source, folder / name)
    had = go(folder, "mod", "download", "github.com/cockroachdb/pebble")
    if had.returncode:
        pytest.skip(f"the module of Pebble is not to be had: {had.stderr.strip()[-500:]}")
    (folder / "bin").mkdir()
    built = go(folder, "build", "-o", "bin/", "./export", "./seed")
    assert built.returncode == 0, built.stderr[-4_000:]
    return folder / "bin"


def write(programs: Path, directory: Path, entries: Mapping[str, bytes]) -> None:
    """Write a database of Pebble."""
    lines = "".join(json.dumps({"name": name, "value": b64(value)}) + "\n" for name, value in entries.items())
    subprocess.run([programs / "seed", directory], input=lines, text=True, check=True, timeout=60)


def read_export(text: bytes) -> list[object]:
    """Return the lines of an export."""
    return [json.loads(line) for line in text.splitlines()]


def test_from_pebble_to_this_service(programs: Path, machine: Machine, tmp_path: Path) -> None:
    """Both layouts of a wrapped key come over whole, and what was written under them decrypts."""
    older = OlderService()
    keys = [
        older.create("room:1"),
        older.create("room:2", raw=True),
        older.create("room:3", meta=False),
        older.create("room:4", raw=True, meta=False),
    ]
    said = {key_id: older.encrypt(key_id, f"said in {older.threads[key_id]}".encode()) for key_id in keys}
    around = {"dej:x": b"?", "dek": b"?", "dekmeta:k_0": b"{}", "dfk:x": b"?"}
    write(programs, tmp_path / "kms.db", older.store | around)
    threads = {
        f"thread:{thread_id}:meta": json.dumps({"title": "t", "kms": {"key_id": key_id}}).encode()
        for key_id, thread_id in older.threads.items()
    }
    other = {"thread:room:1:msg:1-1": b"\0\1", "thread:room:5:meta": b'{"title": "plain"}'}
    write(programs, tmp_path / "server.db", threads | other)

    def export(*databases: str) -> bytes:
        command = [programs / "export", *(tmp_path / name for name in databases)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=60).stdout

    exported = export("kms.db", "server.db")
    assert read_export(exported) == read_export(b"".join(older.lines(threads=True)))
    assert read_export(export("kms.db")) == read_export(b"".join(older.lines()))

    file, master = tmp_path / "export.jsonl", tmp_path / "master"
    file.write_bytes(exported)
    master.touch(0o600)
    master.write_text(older.master.hex())
    words = ("migrate", file, "--config", machine.config, "--master-key-file", master, "--json")
    done = machine.kms(*words)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["read"], told["moved"], told["complete"]) == (4, 4, True)
    with machine.service() as (kms, _):
        for key_id, ciphertext in said.items():
            text = f"said in {older.threads[key_id]}".encode()
            assert kms.decrypt_with_dek(key_id, ciphertext) == text
