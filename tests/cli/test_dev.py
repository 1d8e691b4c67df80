"""Dev mode: real processes, killed in every way that people kill them."""

from __future__ import annotations

import datetime as dt
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from progressdb_kms.cli import pki
from progressdb_kms.cli.dev.layout import open_layout
from progressdb_kms.client import open_sync_provider
from tests.cli.conftest import Command
from tests.cli.helpers import Dev, is_alive, start_dev, wait_until


def create(running: Dev, thread: str = "t") -> tuple[str, bytes]:
    """Make a key and encrypt "hello" under it."""
    with open_sync_provider(f"unix://{running.ready['unix']}", deadline=20, retries=20) as kms:
        dek = kms.create_dek_for_thread(thread)
        return dek.key_id, kms.encrypt_with_dek(dek.key_id, b"hello").ciphertext


def decrypt(running: Dev, message: tuple[str, bytes]) -> bytes:
    """Decrypt such a message."""
    with open_sync_provider(f"unix://{running.ready['unix']}", deadline=20, retries=20) as kms:
        return kms.decrypt_with_dek(*message)


def modes(directory: Path) -> dict[str, int]:
    """Return the modes of what is in a directory."""
    return {path.name: stat.S_IMODE(path.lstat().st_mode) for path in directory.iterdir()}


def test_ready_file(dev: Dev) -> None:
    """It says all that the others need, and stands in the directory as well."""
    ready = dev.ready
    assert ready == dev.ready_now()
    assert ready["url"].startswith("https://localhost:")
    assert ready["admin_url"].startswith("http://127.0.0.1:")
    assert ready["pid"] == dev.process.pid
    assert is_alive(ready["store_pid"])
    assert ready["redis_url"] == f"unix://{dev.directory}/redis/redis.sock"
    assert ready["unix"] == str(dev.directory / "kms.sock")
    for name in ("ca", "config", "kek_file"):
        assert Path(ready[name]).is_file()
    assert set(ready["clients"]) == {"server", "operator", "chat", "stranger"}
    for files in ready["clients"].values():
        assert Path(files["cert"]).is_file()
        assert Path(files["key"]).is_file()


def test_nothing_secret_is_open_to_others(dev: Dev) -> None:
    """Keys, policy, configuration and sockets are the owner's alone."""
    assert stat.S_IMODE(dev.directory.stat().st_mode) == 0o700
    found = modes(dev.directory)
    for name in ("kek.yaml", "audit.yaml", "policy.yaml", "config.yaml", "ready.json", "kms.sock"):
        assert found[name] == 0o600, name
    assert all(mode == 0o600 for name, mode in modes(dev.directory / "pki").items() if name.endswith(".key"))
    assert modes(dev.directory / "redis")["redis.sock"] == 0o700
    assert modes(dev.directory / "redis")["data"] == 0o700


def test_doctor_is_content_with_it(dev: Dev, kms: Command) -> None:
    """What dev makes is what doctor wants to see, but for its ports, which others may have here."""
    checks = kms("doctor", "--config", dev.ready["config"], "--json").json
    bad = [check for check in checks if check["result"] != "ok" and check["check"] not in {"listen", "admin"}]
    assert bad == []


def test_the_audit_log_is_chained(dev: Dev, kms: Command) -> None:
    """With a key made for it: the log verifies, for who has the public half alone as well."""
    create(dev)
    for key in ((), ("--public-key", dev.directory / "audit.pub")):
        report = kms("audit", "verify", "--config", dev.ready["config"], *key, "--json").json
        assert (report["intact"], len(report["chains"])) == (True, 1)
        assert report["records"] >= 3


def test_a_second_dev_is_refused(dev: Dev, kms: Command) -> None:
    """Two on one directory would write one store's files; the first one is not disturbed."""
    outcome = kms("dev", "--dir", dev.directory)
    assert outcome.code == 1
    assert "another dev runs on" in outcome.err
    assert outcome.err.count("\n") == 1
    assert dev.ready_now() == dev.ready


def test_kill_everything_and_start_again(tmp_path: Path) -> None:
    """After SIGKILL of service and store, the next run finds keys, KEK, certificates and configuration."""
    first = start_dev(tmp_path / "dev")
    message = create(first)
    kept = (
        "kek.yaml",
        "audit.yaml",
        "audit.pub",
        "policy.yaml",
        "config.yaml",
        "pki/ca.crt",
        "pki/kms.crt",
        "pki/server.crt",
    )
    before = [(tmp_path / "dev" / name).read_bytes() for name in kept]
    os.kill(first.ready["store_pid"], signal.SIGKILL)
    first.process.kill()
    first.process.wait()
    second = start_dev(tmp_path / "dev")
    assert decrypt(second, message) == b"hello"
    assert [(tmp_path / "dev" / name).read_bytes() for name in kept] == before
    assert second.stop() == 0


def test_the_store_does_not_outlive_a_killed_dev(tmp_path: Path) -> None:
    """SIGKILL of the service alone takes the store along, and the next run finds its keys."""
    first = start_dev(tmp_path / "dev")
    message = create(first)
    first.process.kill()
    first.process.wait()
    wait_until(lambda: not is_alive(first.ready["store_pid"]), first.log)
    second = start_dev(tmp_path / "dev")
    assert second.ready["store_pid"] != first.ready["store_pid"]
    assert decrypt(second, message) == b"hello"
    assert second.stop() == 0


def test_a_killed_store_comes_back(tmp_path: Path) -> None:
    """SIGKILL of the store alone: it is started again, the ready file says so, and the service reconnects."""
    running = start_dev(tmp_path / "dev")
    message = create(running)
    for _ in range(2):
        old = running.ready_now()["store_pid"]
        os.kill(old, signal.SIGKILL)
        wait_until(lambda old=old: running.ready_now()["store_pid"] != old, running.log)
        assert decrypt(running, create(running)) == b"hello"
    assert decrypt(running, message) == b"hello"
    assert "the store has ended" in running.output
    assert running.stop() == 0


def test_ends_in_order(tmp_path: Path) -> None:
    """Ctrl-C ends the service first, then the store, and leaves no socket and no ready file."""
    running = start_dev(tmp_path / "dev")
    store = running.ready["store_pid"]
    assert os.getsid(store) == store != os.getsid(running.process.pid)
    assert running.stop(signal.SIGINT) == 0
    assert not is_alive(store)
    assert "ready.json" not in modes(tmp_path / "dev")
    assert "kms.sock" not in modes(tmp_path / "dev")
    assert not list(tmp_path.glob("*.ready"))
    assert "is now ready to exit" in (tmp_path / "dev/redis/redis.log").read_text()


def test_the_store_holds_its_lock(dev: Dev) -> None:
    """As long as the store lives, and by the store itself, so that no second one opens the same files."""
    with (dev.directory / "redis/lock").open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    held = [path.readlink() for path in Path(f"/proc/{dev.ready['store_pid']}/fd").iterdir()]
    assert dev.directory / "redis/lock" in held


def test_a_store_of_an_earlier_run_is_ended_first(tmp_path: Path) -> None:
    """One that lives on over the same files is shut down in order before a new one opens them."""
    first = start_dev(tmp_path / "dev")
    message = create(first)
    assert first.stop() == 0
    with (tmp_path / "dev/redis/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        config = tmp_path / "dev/redis/redis.conf"
        left = subprocess.Popen(["redis-server", config], pass_fds=[lock.fileno()])
    second = start_dev(tmp_path / "dev")
    assert left.wait(10) == 0
    assert decrypt(second, message) == b"hello"
    assert second.stop() == 0


def test_a_directory_with_a_long_path(tmp_path: Path) -> None:
    """Where a socket's path would be too long, sockets are in a short private directory, run after run."""
    directory = tmp_path / ("long name " * 12)
    with tempfile.TemporaryDirectory() as short:
        first = start_dev(directory, TMPDIR=short)
        message = create(first)
        sockets = Path(first.ready["unix"]).parent
        assert sockets.parent == Path(short)
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
        assert first.stop() == 0
        second = start_dev(directory, TMPDIR=short)
        assert second.ready["unix"] == first.ready["unix"]
        assert decrypt(second, message) == b"hello"
        assert second.stop() == 0


def test_a_short_directory_that_is_not_ours(
    tmp_path: Path, kms: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone else's directory, or one that others may enter, at the place of the short one is refused."""
    directory = tmp_path / ("x" * 120)
    with tempfile.TemporaryDirectory() as place:
        monkeypatch.setattr(tempfile, "tempdir", place)
        short = open_layout(directory).sockets
        short.chmod(0o755)
        assert "remove it" in kms("dev", "--dir", directory).err
        short.rmdir()
        short.symlink_to(tmp_path)
        assert "remove it" in kms("dev", "--dir", directory).err
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("y" * 60)))
    (tmp_path / ("y" * 60)).mkdir()
    assert "long paths" in kms("dev", "--dir", directory).err


def test_demo_twice(tmp_path: Path) -> None:
    """The first run shows a round trip and keeps its message, the second decrypts it; curl lines work."""
    first = start_dev(tmp_path / "dev", "--demo")
    first.wait_for("Ctrl-C ends it")
    assert "demo: decrypted: Hello" in first.output
    assert "earlier run" not in first.output
    lines = [line for line in first.output.splitlines() if line.startswith("curl ")]
    assert len(lines) == 5
    for line in lines:
        done = subprocess.run(f"{line} -sS --fail", shell=True, check=True, capture_output=True)  # noqa: S602 - as pasted
        assert done.stdout
    first.process.kill()
    first.process.wait()
    second = start_dev(tmp_path / "dev", "--demo")
    second.wait_for("Ctrl-C ends it")
    kept = json.loads((tmp_path / "dev/demo.json").read_text())
    assert f"the message of an earlier run, under key {kept['key_id']}: Hello" in second.output
    assert second.stop() == 0


def test_demo_says_when_the_old_message_is_lost(tmp_path: Path) -> None:
    """A message that no longer decrypts is told, and the service serves on."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/demo.json").write_text(json.dumps({"key_id": "k_" + "A" * 28, "ciphertext": "A" * 64}))
    running = start_dev(tmp_path / "dev", "--demo")
    running.wait_for("Ctrl-C ends it")
    assert "does not decrypt" in running.output
    assert running.stop() == 0


def test_expiring_certificates_are_renewed(tmp_path: Path) -> None:
    """At start, a leaf that expires within a day is issued anew under the same CA; others stay."""
    directory = tmp_path / "dev" / "pki"
    pki.init_ca(directory)
    pki.issue(directory, "server", days=1)
    pki.issue(directory, "operator", days=30)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    running = start_dev(tmp_path / "dev")
    after = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"server.crt", "server.key"}
    assert pki.is_usable(directory, "server", within=dt.timedelta(days=300))
    assert running.stop() == 0


def test_changes_of_the_configuration_are_kept(tmp_path: Path) -> None:
    """The configuration is its owner's: what it says is what runs, and it is not written again."""
    first = start_dev(tmp_path / "dev")
    assert first.stop() == 0
    config = tmp_path / "dev/config.yaml"
    text = config.read_text().replace("format: text", "format: json") + "limits:\n  plaintext_bytes: 3\n"
    config.write_text(text)
    second = start_dev(tmp_path / "dev")
    with (
        open_sync_provider(f"unix://{second.ready['unix']}") as kms,
        pytest.raises(Exception, match="plaintext"),
    ):
        kms.encrypt_with_dek(kms.create_dek_for_thread("t").key_id, b"hello")
    assert config.read_text() == text
    assert second.stop() == 0


def test_without_a_store_on_path_the_embedded_one_serves(tmp_path: Path) -> None:
    """Where PATH has neither redis-server nor valkey-server, the embedded package's is used, and stays."""
    first = start_dev(tmp_path / "dev", PATH="/nowhere")
    message = create(first)
    assert "valkey" in (tmp_path / "dev/redis/server").read_text()
    assert first.stop() == 0
    second = start_dev(tmp_path / "dev")
    assert "valkey" in Path(f"/proc/{second.ready['store_pid']}/cmdline").read_text()
    assert decrypt(second, message) == b"hello"
    assert second.stop() == 0


def fail_to_start(directory: Path, *arguments: str) -> str:
    """Run a dev that must not become ready; return its one line."""
    command = [sys.executable, "-m", "progressdb_kms.cli", "dev", "--dir", str(directory), "--port", "0"]
    done = subprocess.run(
        [*command, "--admin-port", "0", *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1, done.stderr
    assert "ready.json" not in modes(directory)
    return done.stderr.splitlines()[-1]


def test_a_store_that_can_not_start_is_told(tmp_path: Path) -> None:
    """The store's own last words are in the line."""
    (tmp_path / "dev/redis/data").mkdir(parents=True)
    (tmp_path / "dev/redis/data/appendonlydir").write_text("in the way")
    line = fail_to_start(tmp_path / "dev")
    assert "the store did not start" in line
    assert "redis.log" in line


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    """A start that fails after the store has been started takes the store along."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = fail_to_start(tmp_path / "dev", "--port", str(taken.getsockname()[1]))
    assert "can't listen" in line
    assert not (tmp_path / "dev/redis/redis.sock").exists()


def test_another_kek_is_refused(tmp_path: Path) -> None:
    """With a KEK file that is not the store's, the service does not start and says which version."""
    first = start_dev(tmp_path / "dev")
    assert first.stop() == 0
    (tmp_path / "dev/kek.yaml").unlink()
    assert "KEK version 1" in fail_to_start(tmp_path / "dev")


def test_a_ready_file_in_no_directory_is_refused(tmp_path: Path, kms: Command) -> None:
    """Before anything is made or started."""
    outcome = kms("dev", "--dir", tmp_path / "dev", "--ready-file", tmp_path / "none" / "file")
    assert outcome.code == 2
    assert not (tmp_path / "dev").exists()
