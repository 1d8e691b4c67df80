"""A machine for disaster drills: a store, a configuration and a service on it, that can all be lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import redis
import yaml

from progressdb_kms.cli.dev.layout import open_layout, prepare
from progressdb_kms.client import AdminClient, SyncKmsProvider, open_sync_provider
from progressdb_kms.domain.policy import Permission
from tests.cli.helpers import GOOD, listens, wait_until

EVERYTHING = tuple(str(permission) for permission in Permission)


class Machine:
    """A folder with everything in it.

    Args:
        folder: Where; it is made.
        kek_file: Copied in, where it is not a new machine's own.
        permissions: What this user may do.
    """

    def __init__(
        self, folder: Path, kek_file: Path | None = None, permissions: Sequence[str] = EVERYTHING
    ) -> None:
        self.folder = folder
        self.layout = open_layout(folder / "s")
        prepare(self.layout)
        if kek_file is not None:
            self.kek_file.unlink()
            shutil.copy(kek_file, self.kek_file)
        self.store_socket = folder / "store.sock"
        rules = [{"identities": [f"uid:{os.getuid()}"], "permissions": list(permissions)}]
        self.layout.policy.write_text(yaml.safe_dump({"rules": rules}))
        document = yaml.safe_load(self.config.read_text())
        document["store"]["url"] = f"unix://{self.store_socket}"
        document["listen"]["port"] = document["admin"]["port"] = 0
        self.config.write_text(yaml.safe_dump(document))
        self._store: subprocess.Popen[bytes] | None = None
        self._service: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.layout.config

    @property
    def kek_file(self) -> Path:
        """The KEK file."""
        return self.layout.kek_file

    @property
    def aof(self) -> bytes:
        """All that stands in the store's append-only files."""
        return b"".join(path.read_bytes() for path in sorted((self.folder / "appendonlydir").iterdir()))

    def belongs_to(self, store_id: str) -> None:
        """Write down which store the KEK belongs to."""
        (self.layout.directory / "store-id").write_text(store_id)
        document = yaml.safe_load(self.config.read_text())
        document["store"]["id_file"] = "store-id"
        self.config.write_text(yaml.safe_dump(document))

    def start_store(self) -> None:
        """Start the store."""
        command = ["redis-server", "--port", "0", "--unixsocket", str(self.store_socket), *GOOD]
        command += ["--rdbcompression", "no"]  # else a blob in a file could be there and not be found
        self._store = subprocess.Popen(
            [*command, "--dir", str(self.folder), "--logfile", str(self.folder / "store.log")]
        )
        wait_until(lambda: listens(self.store_socket))

    def pause(self) -> None:
        """Freeze the store: connections stay, answers stop."""
        assert self._store
        self._store.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let the store go on."""
        assert self._store
        self._store.send_signal(signal.SIGCONT)

    def ask(self, *command: str | int | bytes) -> object:
        """Run a command of the store."""
        with redis.Redis(unix_socket_path=str(self.store_socket), protocol=2) as client:
            client.response_callbacks.clear()
            return client.execute_command(*command)

    @contextmanager
    def service(self) -> Iterator[tuple[SyncKmsProvider, AdminClient]]:
        """Serve, and give clients that may do everything."""
        log = self.folder / "service.log"
        command = [sys.executable, "-m", "progressdb_kms.cli", "serve", "--config", str(self.config)]
        before = log.read_text().count("serving") if log.exists() else 0
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            wait_until(lambda: log.read_text().count("serving") > before or process.poll() is not None, log)
            assert process.poll() is None, log.read_text()
            url = f"unix://{self.layout.socket}"
            with open_sync_provider(url) as kms, AdminClient(url) as admin:
                yield kms, admin
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()

    def kms(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run a command of the package in a process of its own."""
        command = [sys.executable, "-m", "progressdb_kms.cli", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    def lose(self) -> None:
        """Kill the store and delete everything."""
        if self._store is not None:
            self._store.kill()
            self._store.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
