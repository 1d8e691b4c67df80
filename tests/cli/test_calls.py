"""The commands that call a running service."""

from __future__ import annotations

import base64
import io
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from progressdb_kms.client import open_sync_provider
from tests.cli.conftest import Command, Outcome
from tests.cli.helpers import Dev


@pytest.fixture
def call(kms: Command, dev: Dev) -> Command:
    """Run a command against the running service, as its operator."""
    return lambda *words: kms(*words, "--dev-dir", dev.directory)


@pytest.fixture
def thread() -> str:
    """A thread of the test's own."""
    return f"cli:{secrets.token_hex(8)}"


@pytest.fixture
def key_id(call: Command, thread: str) -> str:
    """A fresh key."""
    made: str = call("keys", "create", thread, "--json").json["key_id"]
    return made


def test_create_shows_names_and_no_key(call: Command, thread: str) -> None:
    """A created key is shown by its ids; the same idempotency key gives the same key."""
    made = call("keys", "create", thread, "--idempotency-key", "once")
    assert made.code == 0
    assert "wrapped" not in made.out
    again = call("keys", "create", thread, "--idempotency-key", "once", "--json").json
    assert again["key_id"] in made.out
    assert again["version"] == "1"


def test_list_and_show(call: Command, thread: str) -> None:
    """A listing is filtered by thread and state, limited, and says when there is more."""
    ids = {call("keys", "create", thread, "--json").json["key_id"] for _ in range(3)}
    listed = call("keys", "list", "--thread-id", thread, "--json")
    assert {key["key_id"] for key in listed.json} == ids
    assert listed.err == ""
    cut = call("keys", "list", "--thread-id", thread, "--limit", "2", "--json")
    assert len(cut.json) == 2
    assert "more than 2" in cut.err
    assert call("keys", "list", "--thread-id", thread, "--state", "disabled", "--json").json == []
    table = call("keys", "list", "--thread-id", thread).out
    assert all(f"{key_id}  {thread}" in table for key_id in ids)
    for key_id in ids:
        assert call("keys", "show", key_id, "--json").json["thread_id"] == thread
        assert key_id in call("keys", "show", key_id).out


def test_states(call: Command, key_id: str) -> None:
    """Each change shows the key in its new state."""
    for words, state in [
        (["disable"], "disabled"),
        (["enable"], "enabled"),
        (["schedule-destruction", "--waiting-days", "7"], "pending_destruction"),
        (["cancel-destruction"], "disabled"),
    ]:
        outcome = call("keys", *words, key_id, "--json")
        assert outcome.json["state"] == state
        assert call("keys", "show", key_id, "--json").json["state"] == state


def test_the_services_errors_are_one_line(call: Command, key_id: str) -> None:
    """The line has the service's words and its code."""
    call("keys", "disable", key_id)
    outcome = call("encrypt", "--key-id", key_id, "--in", "/dev/null")
    assert (outcome.code, outcome.out) == (1, "")
    assert "(key_disabled)" in outcome.err
    assert outcome.err.count("\n") == 1
    assert "(key_not_found)" in call("keys", "show", "k_" + "A" * 28).err


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Put `data` on standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize("message", [b"", bytes(range(256)) + b"\r\n"], ids=["empty", "bytes"])
def test_messages_through_pipes(dev: Dev, key_id: str, message: bytes) -> None:
    """Any bytes survive encrypt and decrypt through standard input and output."""

    def command(name: str, data: bytes) -> bytes:
        words = [
            sys.executable,
            "-m",
            "progressdb_kms.cli",
            name,
            "--key-id",
            key_id,
            "--dev-dir",
            str(dev.directory),
        ]
        done = subprocess.run(words, input=data, capture_output=True, check=True)
        assert done.stderr == b""
        return done.stdout

    sealed = command("encrypt", message)
    assert len(base64.b64decode(sealed, validate=False)) == len(message) + 28
    assert sealed.endswith(b"\n")
    assert command("decrypt", sealed) == message


def test_files(call: Command, key_id: str, tmp_path: Path) -> None:
    """From and to files, base64 or raw, with an AAD from a file."""
    message = bytes(range(256))
    (tmp_path / "in").write_bytes(message)
    (tmp_path / "aad").write_bytes(b"\xff\x00")
    aad = ["--aad-file", tmp_path / "aad", "--key-id", key_id]
    for raw in ([], ["--raw"]):
        sealed = call("encrypt", *aad, *raw, "--in", tmp_path / "in", "--out", tmp_path / "sealed")
        assert (sealed.code, sealed.out) == (0, "")
        opened = call("decrypt", *aad, *raw, "--in", tmp_path / "sealed", "--out", tmp_path / "out")
        assert (opened.code, opened.out) == (0, "")
        assert (tmp_path / "out").read_bytes() == message
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600
    assert len((tmp_path / "sealed").read_bytes()) == len(message) + 28


def test_aad_is_honoured(call: Command, key_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right AAD decrypts; a wrong or a missing one does not."""
    pipe(monkeypatch, b"hello")
    sealed = call("encrypt", "--key-id", key_id, "--aad", "one", "--json").json
    assert sealed["key_version"] == "1"
    text = sealed["ciphertext"].encode()

    def decrypt(*words: str) -> Outcome:
        pipe(monkeypatch, text[:20] + b"\n" + text[20:] + b"\n")
        return call("decrypt", "--key-id", key_id, *words, "--json")

    assert base64.b64decode(decrypt("--aad", "one").json["plaintext"]) == b"hello"
    for words in (["--aad", "two"], []):
        assert "(authentication_failed)" in decrypt(*words).err


def test_kek_status(call: Command, dev: Dev, key_id: str) -> None:
    """The census of the running service, as a table and as JSON."""
    census = call("kek", "status", "--json").json
    assert census["active"] == 1
    assert census["versions"][0]["deks"] >= 1
    assert census["versions"][0]["fingerprint"] in call("kek", "status").out


def test_tables_are_drawn_on_a_terminal(
    call: Command, key_id: str, thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal gets lines around the columns; a pipe gets columns that no width cuts."""
    plain = call("keys", "list", "--thread-id", thread).out
    assert len(plain.splitlines()) == 2
    monkeypatch.setenv("FORCE_COLOR", "1")
    drawn = call("keys", "list", "--thread-id", thread).out
    assert "│" in drawn
    assert "│" not in plain


def test_connection_by_options_and_by_environment(
    kms: Command, dev: Dev, key_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options name service and certificate, and so does the environment; the Unix socket needs none."""
    files = dev.ready["clients"]["operator"]
    words = [
        "--url",
        dev.ready["url"],
        "--ca",
        dev.ready["ca"],
        "--cert",
        files["cert"],
        "--key",
        files["key"],
    ]
    assert kms("keys", "show", key_id, *words).code == 0
    assert kms("keys", "show", key_id, "--url", f"unix://{dev.ready['unix']}").code == 0
    monkeypatch.setenv("PROGRESSDB_KMS_ENDPOINT", dev.ready["url"])
    monkeypatch.setenv("PROGRESSDB_KMS_CA", dev.ready["ca"])
    monkeypatch.setenv("PROGRESSDB_KMS_CERT", files["cert"])
    monkeypatch.setenv("PROGRESSDB_KMS_KEY", files["key"])
    assert kms("keys", "show", key_id).code == 0


def test_a_stranger_is_told_what_is_missing(kms: Command, dev: Dev) -> None:
    """A valid certificate without a grant is refused with permission and identity."""
    files = dev.ready["clients"]["stranger"]
    words = ["--dev-dir", dev.directory, "--cert", files["cert"], "--key", files["key"]]
    outcome = kms("keys", "create", "t", *words)
    assert outcome.code == 1
    assert "key:create" in outcome.err
    assert "dns:stranger" in outcome.err


def test_grants_of_the_dev_identities(dev: Dev) -> None:
    """`server` and the Unix socket's peer may work with keys but not change their states; both share keys."""
    files = dev.ready["clients"]["server"]
    with open_sync_provider(
        dev.ready["url"], ca=dev.ready["ca"], cert=files["cert"], key=files["key"]
    ) as kms:
        dek = kms.create_dek_for_thread("grants")
        sealed = kms.encrypt_with_dek(dek.key_id, b"x").ciphertext
    with open_sync_provider(f"unix://{dev.ready['unix']}") as kms:
        assert kms.decrypt_with_dek(dek.key_id, sealed) == b"x"
