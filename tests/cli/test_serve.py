"""`serve`: the service over a configuration file, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import yaml

from progressdb_kms.cli.dev.layout import open_layout, prepare
from progressdb_kms.client import open_sync_provider
from tests.cli.helpers import GOOD, running_store, wait_until


def test_serves_until_sigterm(tmp_path: Path) -> None:
    """It serves what the configuration says, and ends in order with code 0 on SIGTERM."""
    layout = open_layout(tmp_path / "s")
    prepare(layout)
    log = tmp_path / "log"
    with running_store(tmp_path, *GOOD) as store:
        document = yaml.safe_load(layout.config.read_text())
        document["store"]["url"] = f"unix://{store}"
        document["listen"]["port"] = document["admin"]["port"] = 0
        layout.config.write_text(yaml.safe_dump(document))
        command = [sys.executable, "-m", "progressdb_kms.cli", "serve", "--config", str(layout.config)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            wait_until(lambda: "serving" in log.read_text() or process.poll() is not None, log)
            with open_sync_provider(f"unix://{layout.socket}") as kms:
                dek = kms.create_dek_for_thread("t")
                sealed = kms.encrypt_with_dek(dek.key_id, b"hello").ciphertext
                assert kms.decrypt_with_dek(dek.key_id, sealed) == b"hello"
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()
    assert not layout.socket.exists()
