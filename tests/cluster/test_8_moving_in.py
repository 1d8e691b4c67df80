"""The keys of the older service, moved in by a Job as docs/moving-in.md shows it."""

from __future__ import annotations

import json
import os
import subprocess
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cluster.kube import ROOT, Feed
from tests.cluster.scene import Caller, Release
from tests.older_service import OlderService

pytestmark = pytest.mark.cluster

RECIPE: Final = ROOT / "deploy" / "examples" / "moving-in"


def upload(release: Release, export: bytes) -> None:
    """Put the export into the claim, through the recipe's pod."""
    kube = release.kube
    manifest = (RECIPE / "upload.yaml").read_text()
    assert manifest.count("progressdb-kms:0.1.0") == 1
    kube("apply", "-f", "-", stdin=Feed(manifest.replace("progressdb-kms:0.1.0", release.helm.image)))
    kube("wait", "--for=condition=Ready", "pod/moving-in-upload", "--timeout=240s")
    words = ("exec", "-i", "moving-in-upload", "--", "sh", "-c", "umask 077; cat > /moving-in/export.jsonl")
    kube(*words, stdin=Feed(export.decode()))
    kube("delete", "pod", "moving-in-upload")


def migrate(release: Release, name: str, *options: str) -> dict[str, Any]:
    """Run the recipe's Job, and return the counts that it printed."""
    done = subprocess.run(
        [RECIPE / "migrate-job", name, "--json", *options],
        env=os.environ | {"NAMESPACE": release.kube.namespace, "RELEASE": release.name},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    release.kube("create", "-f", "-", stdin=Feed(done.stdout))
    release.kube.wait_for_job(name)
    logs = release.kube.job_logs(name)
    # Among the audit records, which take a line each.
    told: dict[str, Any] = json.JSONDecoder().raw_decode(logs, logs.index("{\n"))[0]
    return {name: told[name] for name in ("mode", "read", "moved", "present", "refused", "complete")}


def decrypt(chat: Caller, key_id: str, ciphertext: bytes) -> subprocess.CompletedProcess[str]:
    """Let the client decrypt a message without AAD."""
    command = ("exec", "-i", chat.pod, "--", "progressdb-kms", "decrypt", "--key-id", key_id)
    return chat.kube.run(*command, stdin=Feed(b64encode(ciphertext).decode()))


def test_moving_in(release: Release, chat: Caller, tmp_path: Path, saw: Callable[[str], None]) -> None:
    """A dry run, then the move, and an older message decrypts by its key id; again, and nothing changes."""
    older = OlderService()
    key_id = older.create("room:older")
    for n in range(20):
        older.create(f"room:older-{n}", raw=n % 2 == 0)
    said = older.encrypt(key_id, b"said before the move")
    master = tmp_path / "master"
    master.write_text(f"master_key_hex: {older.master.hex()}\n")
    release.kube("create", "secret", "generic", "moving-in-master", f"--from-file=key={master}")
    upload(release, b"".join(older.lines(threads=True)))

    counts = {"read": 21, "moved": 21, "present": 0, "refused": 0, "complete": True}
    assert migrate(release, "migrate-dry-run", "--dry-run") == {"mode": "dry run", **counts}
    assert "(key_not_found)" in decrypt(chat, key_id, said).stderr
    assert migrate(release, "migrate") == {"mode": "move", **counts}
    opened = decrypt(chat, key_id, said)
    assert (opened.returncode, opened.stdout) == (0, "said before the move"), opened.stderr

    there = counts | {"moved": 0, "present": 21}
    assert migrate(release, "migrate-again") == {"mode": "move", **there}
    assert migrate(release, "migrate-verify", "--verify") == {"mode": "verify", **there}
    for what in (
        ("job", "migrate-dry-run", "migrate", "migrate-again", "migrate-verify"),
        ("secret", "moving-in-master"),
        ("pvc", "moving-in"),
    ):
        release.kube("delete", *what, "--timeout=120s")
    saw("21 keys moved by a Job after its dry run; an older message decrypts by its key id; again: 0 moved")
