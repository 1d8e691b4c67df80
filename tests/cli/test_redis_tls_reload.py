"""`redis-tls-reload` beside real servers: a renewed certificate is shown without a restart."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command
from tests.cli.helpers import LIMIT, wait_until
from tests.integration.world import write_private
from tests.store.servers import Server, free_port
from tests.transport.pki import CLIENT, Ca, Issued

PASSWORD = "p4ss-of-the-reloader"
ACL = "user reload on #{} resetkeys resetchannels -@all +config|set\nuser default on nopass ~* &* +@all\n"


class Mounted:
    """A Secret volume: files are links through `..data`, which is swapped for a new folder at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._number = 0

    def swap(self, files: dict[str, bytes]) -> None:
        """Replace all files."""
        self._number += 1
        fresh = self.folder / f"..{self._number}"
        fresh.mkdir()
        for name, content in files.items():
            (fresh / name).write_bytes(content)
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")
        (self.folder / "..new").symlink_to(fresh.name)
        (self.folder / "..new").replace(self.folder / "..data")


def files_of(issued: Issued, ca: Ca) -> dict[str, bytes]:
    """Return the files of a server's Secret."""
    return {"tls.crt": issued.pem, "tls.key": issued.key_pem, "ca.crt": ca.pem}


def stat(server: Server, name: str) -> bytes:
    """Return the calls of a command that the server has counted."""
    (line,) = [
        line for line in server.ask("INFO", "commandstats").splitlines() if line.startswith(name.encode())
    ]
    found: bytes = line.partition(b"calls=")[2].partition(b",")[0]
    return found


class Scene:
    """A server over TLS with its mounted files, and a reloader beside it."""

    def __init__(self, root: Path) -> None:
        self.ca = Ca("store CA")
        self.client = self.ca.issue("kms", usages=CLIENT)
        self.mounted = Mounted(root / "tls")
        self.first = self.ca.server()
        self.mounted.swap(files_of(self.first, self.ca))
        self.root = root
        acl = root / "users.acl"
        acl.write_text(ACL.format(hashlib.sha256(PASSWORD.encode()).hexdigest()))
        self.password = root / "password"
        self.password.touch(mode=0o600)
        self.password.write_text(f"{PASSWORD}\n")
        self.tls_port = free_port()
        folder = self.mounted.folder
        self.server = Server(
            "redis",
            root / "s",
            {
                "aclfile": str(acl),
                "tls-port": str(self.tls_port),
                "tls-cert-file": str(folder / "tls.crt"),
                "tls-key-file": str(folder / "tls.key"),
                "tls-ca-cert-file": str(folder / "ca.crt"),
                "tls-auth-clients": "yes",
            },
        )
        self.log = root / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *words: str) -> None:
        """Start the reloader."""
        command = [sys.executable, "-m", "progressdb_kms.cli", "redis-tls-reload"]
        command += ["--url", f"unix://{self.server.socket}", "--username", "reload", "--interval", "0.1"]
        command += ["--password-file", str(self.password), "--watch", str(self.mounted.folder), *words]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the records of one event."""
        whole = self.log.read_text().rpartition("\n")[0]
        records = [json.loads(line) for line in whole.splitlines()]
        return [record for record in records if record["event"] == event]

    def wait_for(self, event: str, count: int = 1) -> None:
        """Wait until an event was logged so often."""
        wait_until(lambda: self.alive and len(self.logged(event)) >= count, self.log)

    @property
    def alive(self) -> bool:
        """Whether the reloader runs."""
        assert self.process
        assert self.process.poll() is None, self.log.read_text()
        return True

    def shown(self, ca: Ca | None = None, client: Issued | None = None) -> int:
        """Connect over TLS, say PING, and return the serial number of the server's certificate."""
        context = ssl.create_default_context(cadata=(ca or self.ca).pem.decode())
        cert, key = (client or self.client).write(self.root, f"c{os.urandom(4).hex()}")
        context.load_cert_chain(cert, key)
        with (
            socket.create_connection(("127.0.0.1", self.tls_port), timeout=LIMIT) as sock,
            context.wrap_socket(sock, server_hostname="localhost") as tls,
        ):
            tls.sendall(b"PING\r\n")
            if tls.recv(100) != b"+PONG\r\n":
                raise ConnectionError("refused")
            return int(str((tls.getpeercert() or {})["serialNumber"]), 16)

    def close(self) -> None:
        """End both; the reloader has to end by SIGTERM with 0, having told no secret."""
        self.server.kill()
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            code = self.process.wait(LIMIT)
            text = self.log.read_text()
            assert code == 0, text
            assert PASSWORD not in text
            assert "PRIVATE KEY" not in text


@pytest.fixture
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Give a server, not started, and its files."""
    made = Scene(tmp_path_factory.mktemp("r"))
    yield made
    made.close()


def test_a_renewed_certificate_is_shown(scene: Scene) -> None:
    """After the Secret's swap new connections see the new certificate and the new CA; open ones go on."""
    scene.server.start()
    scene.start()
    scene.wait_for("certificates_applied")
    assert scene.shown() == scene.first.certificate.serial_number
    renewed = scene.ca.server()
    with socket.socket(socket.AF_UNIX) as opened:
        opened.connect(str(scene.server.socket))
        scene.mounted.swap(files_of(renewed, scene.ca))
        scene.wait_for("certificates_applied", 2)
        opened.sendall(b"PING\r\n")
        assert opened.recv(100) == b"+PONG\r\n"
    assert scene.shown() == renewed.certificate.serial_number
    assert scene.logged("certificates_applied")[-1]["expires"].startswith(
        renewed.certificate.not_valid_after_utc.date().isoformat()
    )
    other = Ca("another CA")
    scene.mounted.swap(files_of(renewed, other))
    scene.wait_for("certificates_applied", 3)
    assert scene.shown(client=other.issue("kms", usages=CLIENT)) == renewed.certificate.serial_number
    with pytest.raises(OSError, match=r".*"):
        scene.shown()


def test_the_server_may_come_later(scene: Scene) -> None:
    """A server that is away is tried again: the order of starts does not matter, nor does a restart."""
    scene.start()
    scene.wait_for("certificates_not_applied")
    assert "does not answer" in scene.logged("certificates_not_applied")[0]["detail"]
    scene.server.start()
    scene.wait_for("certificates_applied")
    scene.server.kill()
    renewed = scene.ca.server()
    before = len(scene.logged("certificates_not_applied"))
    scene.mounted.swap(files_of(renewed, scene.ca))
    scene.wait_for("certificates_not_applied", before + 1)
    scene.server.start()
    scene.wait_for("certificates_applied", 2)
    assert scene.shown() == renewed.certificate.serial_number


def test_a_broken_set_changes_nothing_and_is_mended(scene: Scene) -> None:
    """A key that belongs to another certificate is refused by the server, and taken once mended."""
    scene.server.start()
    scene.start()
    scene.wait_for("certificates_applied")
    renewed = scene.ca.server()
    scene.mounted.swap(files_of(renewed, scene.ca) | {"tls.key": scene.first.key_pem})
    scene.wait_for("certificates_not_applied")
    assert "do they belong together" in scene.logged("certificates_not_applied")[-1]["detail"]
    assert scene.shown() == scene.first.certificate.serial_number
    scene.mounted.swap(files_of(renewed, scene.ca) | {"tls.crt": b"half of a fi"})
    wait_until(lambda: "not a certificate" in scene.logged("certificates_not_applied")[-1]["detail"])
    scene.mounted.swap(files_of(renewed, scene.ca))
    scene.wait_for("certificates_applied", 2)
    assert scene.shown() == renewed.certificate.serial_number


def test_a_renewed_password_is_read(scene: Scene) -> None:
    """A wrong password, and a right that is missing, are named; the file is read again at each try."""
    scene.server.start()
    scene.server.ask("ACL", "SETUSER", "reload", "resetpass", ">other")
    scene.start()
    scene.wait_for("certificates_not_applied")
    assert "refused the login" in scene.logged("certificates_not_applied")[-1]["detail"]
    scene.server.ask("ACL", "SETUSER", "reload", "-config|set", ">another")
    write_private(scene.password, "another")
    wait_until(
        lambda: "needs +config|set" in scene.logged("certificates_not_applied")[-1]["detail"], scene.log
    )
    scene.server.ask("ACL", "SETUSER", "reload", "+config|set")
    scene.wait_for("certificates_applied")


def test_clients_of_the_server_may_have_a_ca_elsewhere(scene: Scene) -> None:
    """`--ca` names the CA of the server's clients, and it is watched too."""
    bundle = scene.root / "bundle.crt"
    bundle.write_bytes(scene.ca.pem)
    scene.server.start()
    scene.start("--ca", str(bundle))
    scene.wait_for("certificates_applied")
    other = Ca("clients")
    write_private(bundle, other.pem)
    scene.wait_for("certificates_applied", 2)
    assert scene.shown(client=other.issue("kms", usages=CLIENT)) == scene.first.certificate.serial_number


@pytest.mark.parametrize("kind", ["redis", "valkey"])
def test_a_changed_user_is_loaded(scene: Scene, kind: str) -> None:
    """`--acl` names the server's ACL file: a change is loaded, what is broken or the same is not."""
    acl = scene.root / "users.acl"
    acl.write_text(acl.read_text().replace("+config|set", "+config|set +acl|load"))
    options = scene.server.options if kind == "redis" else {"aclfile": str(acl)}
    scene.server = Server(kind, scene.root / "s", options).start()
    scene.start("--acl", str(acl))
    scene.wait_for("users_applied")
    good = acl.read_text()
    write_private(acl, good + "user kms on nopass ~kms:* -@all +get +nosuchcommand\n")
    scene.wait_for("users_not_applied")
    assert "which line is wrong" in scene.logged("users_not_applied")[-1]["detail"]
    assert b"kms" not in scene.server.ask("ACL", "USERS")
    write_private(acl, good + "user kms on nopass ~kms:* -@all +get\n")
    scene.wait_for("users_applied", 2)
    assert b"kms" in scene.server.ask("ACL", "USERS")
    loads = stat(scene.server, "cmdstat_acl|load")
    acl.touch()
    scene.mounted.swap(files_of(scene.ca.server(), scene.ca))
    scene.wait_for("certificates_applied", 2)
    assert stat(scene.server, "cmdstat_acl|load") == loads


def test_valkey_takes_it_too(scene: Scene) -> None:
    """The same user and the same command are what Valkey takes, and its settings name the files."""
    scene.server = Server("valkey", scene.root / "s", {"aclfile": str(scene.root / "users.acl")}).start()
    scene.start()
    scene.wait_for("certificates_applied")
    found = scene.server.ask("CONFIG", "GET", "tls-cert-file")
    assert found[1].decode() == str(scene.mounted.folder / "tls.crt")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"--url": "rediss://localhost"}, "write unix:///"),
        ({"--password-file": "/nowhere"}, "can't read /nowhere"),
    ],
)
def test_what_can_never_work_ends_at_once(
    kms: Command, scene: Scene, change: dict[str, str], said: str
) -> None:
    """A URL that is no socket, or a password file that is missing, ends the command in one line."""
    words = {
        "--url": "unix:///s",
        "--username": "reload",
        "--password-file": str(scene.password),
        "--watch": str(scene.mounted.folder),
    } | change
    outcome = kms("redis-tls-reload", *(word for pair in words.items() for word in pair))
    assert outcome.code == 1
    assert said in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_a_password_that_others_can_read_is_refused(kms: Command, scene: Scene) -> None:
    """The password's file has to be as private as a KEK file."""
    scene.password.chmod(0o644)
    folder = scene.mounted.folder
    words = [
        "--url",
        "unix:///s",
        "--username",
        "reload",
        "--password-file",
        scene.password,
        "--watch",
        folder,
    ]
    outcome = kms("redis-tls-reload", *words)
    assert outcome.code == 1
    assert "0644" in outcome.err
