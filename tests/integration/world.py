"""A store and services on it, each a process of its own, set up and seen as an operator would."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from prometheus_client.parser import text_string_to_metric_families

from tests.contract.wire_client import Answer, Client, Connect, tcp_connect, tls_connect, tls_context
from tests.store.servers import ALWAYS, Server, free_port
from tests.transport.pki import Ca, Issued

T = TypeVar("T")

LIMIT = 90.0
"""Seconds after which what never comes true fails a test. A net, never something that is measured."""
KEK_1 = bytes(range(32)).hex()
KEK_2 = bytes(range(100, 132)).hex()
KEK_3 = bytes(range(50, 82)).hex()
EVERYTHING = [
    "key:create",
    "key:encrypt",
    "key:decrypt",
    "key:read",
    "key:destroy",
    "key:admin",
    "rotation:run",
    "audit:read",
]
POLICY = {
    "rules": [
        {"identities": ["dns:server"], "permissions": EVERYTHING[:4]},
        {"identities": ["dns:operator"], "permissions": EVERYTHING},
    ]
}


def eventually(check: Callable[[], T], what: str = "") -> T:
    """Return the first truthy result of `check`."""
    end = time.monotonic() + LIMIT
    while True:
        result = check()
        if result:
            return result
        assert time.monotonic() < end, f"never came true: {what or check}; last seen {result!r}"
        time.sleep(0.05)


PROMPT_STORE: Final = {"command_timeout": 1.0}
"""Store settings of an instance whose store is taken away; others bear a busy disk for longer."""


def write_private(path: Path, text: str | bytes, mode: int = 0o600) -> None:
    """Replace a file as a deployment tool does: whole, with its mode, under the same name."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(text if isinstance(text, bytes) else text.encode())
    fresh.chmod(mode)
    fresh.replace(path)


def kek_text(keks: Mapping[int, str]) -> str:
    """Return a KEK file with these versions."""
    return json.dumps({"versions": keks})


def without_delay(connect: Connect) -> Connect:
    """Return what connects likewise, but never holds a request's second part back for an acknowledgement."""

    def prompt() -> socket.socket:
        sock = connect()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    return prompt


class Instance:
    """One `serve` process with a configuration of its own.

    Args:
        world: The store, certificates and KEK that it shares with the others.
        name: Name of its folder.
        config: Sections that differ from the usual, merged one level deep.
        user: User (and group) id that it runs under; None for the test's own.

    Attributes:
        python: Interpreter and environment, where they are not the test's own.
        module: What the process runs.
    """

    python: tuple[str, dict[str, str]] | None = None
    module = "progressdb_kms.cli"

    def __init__(
        self, world: World, name: str, config: Mapping[str, object], user: int | None = None
    ) -> None:
        self.world = world
        self.folder = world.root / name
        self.folder.mkdir()
        self.user = user
        self.port, self.admin_port = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._clients: list[Client] = []
        self._terminated = False
        self.policy = self.folder / "policy.yaml"
        self.policy.write_text(json.dumps(POLICY))
        document: dict[str, Any] = {
            "listen": {"host": "127.0.0.1", "port": self.port},
            "admin": {"host": "127.0.0.1", "port": self.admin_port},
            "tls": world.tls,
            "policy": str(self.policy),
            "kek": {"path": str(world.kek_file)},
            "store": {"url": world.store.url, "command_timeout": 5.0},
            "drain": {"delay": 0.1, "timeout": 10},
        }
        for section, values in config.items():
            merged = {**document.get(section, {}), **values} if isinstance(values, Mapping) else values
            document[section] = merged
        self.workers: int = document.get("workers", 1)
        self.config = self.folder / "config.yaml"
        self.config.write_text(json.dumps(document))

    @property
    def pid(self) -> int:
        """Process id."""
        assert self.process
        return self.process.pid

    @property
    def err(self) -> Path:
        """Where its logs go."""
        return self.folder / "stderr"

    @property
    def out(self) -> Path:
        """Where its audit records go."""
        return self.folder / "stdout"

    def launch(self) -> Instance:
        """Start the process and return at once."""
        python, environment = self.python or (sys.executable, dict(os.environ))
        identity: dict[str, Any] = {}
        if self.user is not None:
            identity = {"user": self.user, "group": self.user, "extra_groups": []}
        with self.out.open("ab") as out, self.err.open("ab") as err:
            self.process = subprocess.Popen(
                [python, "-m", self.module, "serve", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                cwd=self.folder,
                **identity,
            )
        return self

    def wait_ready(self) -> Instance:
        """Return when `/readyz` says yes."""
        eventually(lambda: self.probe("/readyz") == 200, f"{self.folder.name} is ready")
        return self

    def start(self) -> Instance:
        """Start it and return when it is ready."""
        return self.launch().wait_ready()

    def exit_code(self) -> int:
        """Wait for an end that was not asked for and return the exit code."""
        assert self.process
        code = self.process.wait(LIMIT)
        self._forget()
        return code

    def terminate(self) -> None:
        """Close the clients, send SIGTERM, and return at once."""
        # A connection that its client leaves open is waited for.
        for client in self._clients:
            client.close()
        if self.process is not None and not self._terminated:
            self.process.send_signal(signal.SIGTERM)
            self._terminated = True

    def stop(self) -> None:
        """End it by SIGTERM; its exit code must be 0."""
        if self.process is None:
            return
        self.terminate()
        try:
            code = self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._forget()
        assert code == 0, (code, self.err.read_text()[-3000:])

    def kill(self) -> None:
        """End it by SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self._forget()

    def _forget(self) -> None:
        self.process = None
        self._terminated = False
        for client in self._clients:
            client.close()
        self._clients.clear()

    def pause(self) -> None:
        """Freeze it."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after `pause`."""
        os.kill(self.pid, signal.SIGCONT)

    def client(self, name: str, ca: Ca | None = None) -> Client:
        """Return a new client with a certificate for this name, closed with the instance."""
        cert, key = self.world.certificate(name, ca)
        context = tls_context(self.world.ca_file, cert, key)
        connect = without_delay(tls_connect("localhost", self.port, context))
        self._clients.append(Client(connect, f"localhost:{self.port}"))
        return self._clients[-1]

    def admin(self, path: str) -> Answer:
        """GET a path of the probe port."""
        client = Client(tcp_connect("127.0.0.1", self.admin_port), "localhost")
        try:
            return client.get(path)
        finally:
            client.close()

    def probe(self, path: str) -> int:
        """Return the status of a probe, 0 where nobody listens yet; the process must live."""
        assert self.process
        assert self.process.poll() is None, self.err.read_text()[-3000:]
        try:
            return self.admin(path).status
        except OSError:
            return 0

    def reasons(self) -> str:
        """Return why it is not ready, an empty text where it is."""
        return "; ".join(self.admin("/readyz").json().get("reasons", []))

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples with these labels; 0 where there is none."""
        page = self.admin("/metrics").body.decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def until(self, name: str, holds: Callable[[float], bool], **labels: str) -> None:
        """Wait until this holds for a metric."""
        eventually(lambda: holds(self.metric(name, **labels)), f"{name} {labels}")

    def wait_logged(self, event: str) -> None:
        """Wait until an event has been logged."""
        eventually(lambda: self.logged(event), event)

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the log's records of one event."""
        return [record for record in self.records() if record.get("event") == event]

    def records(self) -> list[dict[str, Any]]:
        """Return all of the log's records."""
        return [json.loads(line) for line in self.err.read_text().splitlines() if line.startswith("{")]

    def limit(self, **fields: object) -> None:
        """Give dns:server these limits in the policy, or none, and wait until they count."""
        before = self.metric("kms_reloads_total", what="policy")
        limits = [{"identities": ["dns:server"], **fields}] if fields else []
        write_private(self.policy, json.dumps({**POLICY, "limits": limits}))
        # Each worker reads the file by itself.
        self.until("kms_reloads_total", lambda count: count >= before + self.workers, what="policy")

    def warm(self, key_id: str) -> Client:
        """Use a key until it is served from memory; return the client that did."""
        client = self.client("server")

        def from_memory() -> bool:
            before = self.metric("kms_key_cache_lookups_total")
            answer = client.post("/encrypt", {"key_id": key_id, "plaintext": ""})
            if answer.status == 503:
                return False  # a busy disk holds up its store
            answer.ok()
            return self.metric("kms_key_cache_lookups_total") == before

        eventually(from_memory, "key in memory")
        return client


class World:
    """A store, and certificates and a KEK for the services on it.

    Args:
        owner: User id that owns all files; None for the test's own.
        kind: `redis` or `valkey`.
        options: The store's settings.
    """

    def __init__(
        self, *, owner: int | None = None, kind: str = "redis", options: Mapping[str, str] = ALWAYS
    ) -> None:
        # Not below pytest's own folder: paths of Unix sockets are short, and others may not enter there.
        # Beside it, for it may be in memory.
        self.root = Path(tempfile.mkdtemp(prefix="kms-it-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")))
        self.owner = owner
        self.store = Server(kind, self.root / "store", {"unixsocketperm": "777", **options})
        self.instances: list[Instance] = []
        self.ca = shared_ca()
        self.ca_file = self.root / "server-ca.crt"
        self.ca_file.write_bytes(self.ca.pem)
        self.client_ca_file = self.root / "client-ca.crt"
        self.client_ca_file.write_bytes(self.ca.pem)
        cert, key = self.ca.server().write(self.root, "service")
        self.tls = {"cert": str(cert), "key": str(key), "client_ca": str(self.client_ca_file)}
        self.kek_file = self.root / "kek.yaml"
        self.write_keks({1: KEK_1})

    def write_keks(self, keks: Mapping[int, str]) -> None:
        """Replace the KEK file."""
        write_private(self.kek_file, kek_text(keks))

    def certificate(self, name: str, ca: Ca | None = None) -> tuple[Path, Path]:
        """Return the files of a client certificate with this DNS name."""
        issued = issued_for(name, ca or self.ca)
        stem = f"client-{name}-{issued.certificate.serial_number:x}"
        if (self.root / f"{stem}.key").exists():
            return self.root / f"{stem}.crt", self.root / f"{stem}.key"
        return issued.write(self.root, stem)

    def instance(self, name: str, *, user: int | None = None, **config: object) -> Instance:
        """Make an instance, not started."""
        self.instances.append(Instance(self, name, config, user))
        if self.owner is not None:
            for path in (self.root, *self.root.rglob("*")):
                os.chown(path, self.owner, self.owner, follow_symlinks=False)
        return self.instances[-1]

    def keys(self) -> dict[bytes, bytes]:
        """Return all that the store holds, by key, as DUMP shows it."""
        return {key: self.store.ask("DUMP", key) for key in sorted(self.store.ask("KEYS", "*"))}

    def terminate(self) -> None:
        """Send SIGTERM to the services and return at once."""
        for instance in self.instances:
            instance.terminate()

    def close(self) -> None:
        """End everything; services that still run must end with 0."""
        try:
            for instance in self.instances:
                instance.stop()
        finally:
            for instance in self.instances:
                instance.kill()
            self.store.kill()
            shutil.rmtree(self.root)


@functools.cache
def shared_ca() -> Ca:
    """Return the CA that services and clients of all worlds have."""
    return Ca("integration CA")


@functools.cache
def issued_for(name: str, ca: Ca) -> Issued:
    """Return a client certificate, the same one each time."""
    return ca.client(name)


def launch_all(instances: Iterable[Instance]) -> None:
    """Start instances side by side and wait for all."""
    started = [instance.launch() for instance in instances]
    for instance in started:
        instance.wait_ready()
