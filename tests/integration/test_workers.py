"""Several workers in one service: they share the work, end together, and one that dies costs nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.contract.wire_client import Client, b64, tcp_connect
from tests.integration.world import KEK_1, KEK_2, Instance, World, eventually, write_private
from tests.transport.pki import Ca

WORKERS = 2


def run(*arguments: str) -> str:
    """Run a command of ours and return what it prints; it has to succeed."""
    command = [sys.executable, "-m", "progressdb_kms.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def world(new_world: Callable[..., World]) -> World:
    """Run one service with two workers."""
    made = new_world()
    made.store.start()
    made.instance("a", workers=WORKERS, drain={"delay": 0.5, "timeout": 10}).start()
    return made


@pytest.fixture(autouse=True)
def _whole(service: Instance) -> None:
    """Wait until both workers serve, whatever the test before has done to one."""
    service.until("kms_workers", lambda count: count == WORKERS)


def opened(service: Instance, count: int) -> list[Client]:
    """Open connections, one after the other."""
    clients = [service.client("server") for _ in range(count)]
    for client in clients:
        client.get("/healthz").ok()
    return clients


def api_connections(service: Instance) -> list[int]:
    """Return how many connections each worker has beyond those to the store."""
    port = f":{service.port:04X}"
    found = []
    for pid in children(service.pid):
        inodes = set()
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = str(link.readlink())
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        found.append(sum(line[9] in inodes and line[3] == "01" and line[1].endswith(port) for line in lines))
    return sorted(found)


def test_connections_are_spread(service: Instance) -> None:
    """Each of two workers has its part of sixteen connections; a key made by one is used by the other."""
    eventually(lambda: api_connections(service) == [0, 0])
    clients = opened(service, 16)
    counts = api_connections(service)
    # Even on an idle machine; where both are busy a connection is taken by whoever comes to it.
    assert sum(counts) == 16
    assert counts[0] >= 4
    eventually(lambda: service.metric("kms_connections") == 16)
    key_id = clients[0].create("t:1")["key_id"]
    sealed = [client.encrypt(key_id, b"hello") for client in clients]
    for client, ciphertext in zip(reversed(clients), sealed, strict=True):
        assert client.decrypt(key_id, ciphertext) == b"hello"


def test_the_metrics_of_all_are_one(service: Instance) -> None:
    """Whoever answers, a request that any worker has answered is counted once; gauges have their rules."""
    # Of a route that nobody called before: what another worker has counted is told a second later.
    route = "/create_dek_batch"
    assert service.metric("kms_requests_total", route=route) == 0
    for number, client in enumerate(opened(service, 6)):
        client.post(route, {"items": [{"thread_id": f"t:{number}"}]}).ok()

    def all_counted() -> bool:
        return service.metric("kms_requests_total", route=route) == 6

    eventually(all_counted)
    for _ in range(8):
        assert all_counted()
        assert service.metric("kms_ready") == 1
        assert service.metric("kms_kek_versions_loaded") == 1
        assert service.metric("kms_store_reachable") == 1
        assert service.metric("kms_workers") == WORKERS


def test_a_reload_reaches_all(world: World, service: Instance) -> None:
    """Policy, KEK file and client CA of all workers follow their files."""
    policies = service.metric("kms_reloads_total", what="policy", result="ok")
    service.limit(concurrent=100)
    service.until("kms_reloads_total", lambda count: count == policies + WORKERS, what="policy", result="ok")
    service.limit()
    world.write_keks({1: KEK_1, 2: KEK_2})
    # The least of all workers.
    service.until("kms_kek_versions_loaded", lambda count: count == 2)
    write_private(world.client_ca_file, Ca("another CA").pem)
    service.until("kms_reloads_total", lambda count: count == WORKERS, what="tls", result="ok")
    for _ in range(8):
        with pytest.raises((OSError, ssl.SSLError)):
            service.client("server").get("/healthz")
    write_private(world.client_ca_file, world.ca.pem)
    service.until("kms_reloads_total", lambda count: count == 2 * WORKERS, what="tls", result="ok")
    opened(service, 4)


def test_limits_are_for_all_together(world: World) -> None:
    """Connections beyond limits.max_connections are closed, however they are spread."""
    small = world.instance("small", workers=WORKERS, limits={"max_connections": 6}).start()
    clients = opened(small, 6)
    for _ in range(4):
        with pytest.raises((OSError, HTTPException)):
            small.client("server").get("/healthz")
    clients[0].close()
    eventually(lambda: small.metric("kms_connections") == 5)
    opened(small, 1)
    small.stop()


def test_an_identity_gets_no_more_from_many_workers(service: Instance) -> None:
    """Its burst is shared out: over all workers it gets it once."""
    service.limit(operations_per_second=1, burst=20)
    clients = [service.client("server") for _ in range(16)]  # so many that each worker gets some
    key_id = service.client("operator").create("t:1")["key_id"]
    began = time.monotonic()
    statuses = [
        client.post("/encrypt", {"key_id": key_id, "plaintext": ""}).status
        for _ in range(10)
        for client in clients
    ]
    let_in = statuses.count(200)
    assert set(statuses) == {200, 429}
    # Each worker's part lets the last one in on what is left of one operation.
    assert 20 <= let_in <= 20 + WORKERS + (time.monotonic() - began)
    service.limit()


def test_a_killed_worker_costs_nothing_acknowledged(service: Instance) -> None:
    """The others serve, it comes back, keys that were answered are there, and no counter goes back."""
    clients = opened(service, 6)
    made = [client.create(f"t:{number}")["key_id"] for number, client in enumerate(clients)]
    route = "/create_dek_for_thread"
    service.until("kms_requests_total", lambda count: count >= len(made), route=route)
    counted = service.metric("kms_requests_total", route=route)
    restarts = service.metric("kms_worker_restarts_total")
    victim = children(service.pid)[0]
    os.kill(victim, signal.SIGKILL)
    # No call is tried again but on a connection that broke.
    for key_id in made:
        assert service.reasons() == ""
        assert service.probe("/livez") == 200
        assert service.client("server").encrypt(key_id, b"x")
        assert service.metric("kms_requests_total", route=route) >= counted
    service.until("kms_worker_restarts_total", lambda count: count == restarts + 1)
    service.until("kms_workers", lambda count: count == WORKERS)
    assert victim not in children(service.pid)
    assert service.logged("worker_ended")[-1]["why"] == "ended with SIGKILL"
    assert service.metric("kms_requests_total", route=route) >= counted


def test_a_worker_that_hangs_fails_the_probes(service: Instance) -> None:
    """Liveness and readiness name it, and are well again when it goes on."""
    victim = children(service.pid)[0]
    os.kill(victim, signal.SIGSTOP)
    try:
        # Connections that it took before it was stopped are not answered.
        eventually(lambda: prompt_probe(service, "/livez") == 503)
        assert prompt_probe(service, "/readyz") == 503
        assert f"process {victim}" in "".join(service.admin("/livez").json()["reasons"])
    finally:
        os.kill(victim, signal.SIGCONT)
    eventually(lambda: service.probe("/livez") == 200)
    eventually(lambda: service.probe("/readyz") == 200)


def prompt_probe(service: Instance, path: str) -> int:
    """Return the status of a probe, 0 where a stopped process has taken the connection."""
    connect = tcp_connect("127.0.0.1", service.admin_port)

    def impatient() -> socket.socket:
        sock = connect()
        sock.settimeout(1)
        return sock

    client = Client(impatient, "localhost")
    try:
        return client.get(path).status
    except OSError:
        return 0
    finally:
        client.close()


def test_a_worker_told_to_end_is_replaced(service: Instance) -> None:
    """SIGTERM to one worker drains that one; the service stays ready, and another takes its place."""
    victim = children(service.pid)[0]
    os.kill(victim, signal.SIGTERM)
    while victim in children(service.pid):
        assert service.reasons() == ""
    service.until("kms_workers", lambda count: count == WORKERS)
    opened(service, 4)


class Caller(threading.Thread):
    """Calls until told to stop; opens another connection only after an answer that closed the last one."""

    def __init__(self, target: Callable[[], Instance], key_id: str, stop: threading.Event) -> None:
        super().__init__()
        self.target, self.key_id, self.stop = target, key_id, stop
        self.statuses: list[int] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Call until told to stop or until a call fails."""
        body = b'{"key_id": "%s", "plaintext": "%s"}' % (self.key_id.encode(), b64(b"message").encode())
        try:
            client = self.target().client("server")
            while not self.stop.is_set():
                # Never sent again: a request that fails is a failure.
                answer = client._once("POST", "/encrypt", body, {"Content-Type": "application/json"})
                self.statuses.append(answer.status)
                if answer.headers.get("connection", "").lower() == "close":
                    client = self.target().client("server")
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test shows it
            self.failure = error


def test_no_request_fails_while_all_workers_drain(world: World) -> None:
    """SIGTERM under load: callers move to another service and lose nothing; the exit code is 0."""
    first = world.instance("first", workers=WORKERS, drain={"delay": 4, "timeout": 10}).launch()
    second = world.instance("second").start()
    first.wait_ready()
    first.until("kms_workers", lambda count: count == WORKERS)
    key_id = first.client("server").create("t:1")["key_id"]
    stop = threading.Event()
    target = [first]
    callers = [Caller(lambda: target[0], key_id, stop) for _ in range(8)]
    for caller in callers:
        caller.start()
    try:
        eventually(lambda: all(len(caller.statuses) > 20 or caller.failure for caller in callers))
        workers = children(first.pid)
        assert first.process
        first.process.send_signal(signal.SIGTERM)
        eventually(lambda: first.probe("/readyz") == 503)
        # A cluster takes notice some time later.
        time.sleep(0.5)
        target[0] = second
        assert first.process.wait(30) == 0
        seen = [len(caller.statuses) for caller in callers]
        eventually(
            lambda: all(
                caller.failure or len(caller.statuses) > count + 5
                for caller, count in zip(callers, seen, strict=True)
            )
        )
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert first.exit_code() == 0
    assert [caller.failure for caller in callers] == [None] * len(callers)
    assert {status for caller in callers for status in caller.statuses} == {200}
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert len(first.logged("draining")) == WORKERS


def test_workers_end_with_their_supervisor(world: World, tmp_path: Path) -> None:
    """A supervisor that is killed leaves no worker behind: they drain, and give their addresses back."""
    path = tmp_path / "s"
    listen = {"unix": {"path": str(path), "allow_uids": [os.getuid()]}}
    orphaned = world.instance("orphaned", workers=WORKERS, listen=listen).start()
    orphaned.until("kms_workers", lambda count: count == WORKERS)
    workers = children(orphaned.pid)
    assert len(workers) == WORKERS
    orphaned.kill()
    eventually(lambda: not any(alive(pid) for pid in workers))
    assert len(orphaned.logged("stopped")) == WORKERS
    assert not path.exists()
    orphaned.start().stop()


def alive(pid: int) -> bool:
    """Say whether a process runs; one that has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def lines(instance: Instance) -> list[str]:
    """Return what was written to standard error beside the log."""
    return [line for line in instance.err.read_text().splitlines() if not line.startswith("{")]


def test_what_every_worker_refuses_is_said_once(world: World) -> None:
    """A policy that can't be read ends all with exit code 1 and one line, as with one process."""
    broken = world.instance("broken", workers=WORKERS)
    broken.policy.write_text("rules: [")
    assert broken.launch().exit_code() == 1
    (line,) = lines(broken)
    assert line.startswith("progressdb-kms: ")
    assert line.endswith("(policy_invalid)")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_port_in_use_is_refused(world: World, service: Instance, workers: int) -> None:
    """Another service on the same port never gets some of the connections: it does not start."""
    listen = {"port": service.port}
    other = world.instance(f"other-{workers}", workers=workers, listen=listen)
    assert other.launch().exit_code() == 1
    (line,) = lines(other)
    assert f"listen: can't listen on 127.0.0.1 port {service.port}: Address already in use" in line


@pytest.mark.parametrize("what", ["policy", "kek"])
def test_a_worker_that_can_not_start_again_is_tried_again(world: World, what: str) -> None:
    """With broken files a killed worker stays away, the other serves, and mended files bring it back."""
    kek_file = world.root / f"own-kek-{what}.yaml"
    write_private(kek_file, world.kek_file.read_text())
    tried = world.instance(f"tried-{what}", workers=WORKERS, kek={"path": str(kek_file)}).start()
    tried.until("kms_workers", lambda count: count == WORKERS)
    path = tried.policy if what == "policy" else kek_file
    good = path.read_text()
    write_private(path, "][")
    os.kill(children(tried.pid)[0], signal.SIGKILL)
    eventually(lambda: len(tried.logged("worker_ended")) >= 3)
    assert tried.probe("/readyz") == 200
    assert tried.client("server").create("t:1")
    write_private(path, good)
    tried.until("kms_workers", lambda count: count == WORKERS)
    tried.stop()


def test_each_worker_has_its_own_audit_chain(world: World, tmp_path: Path) -> None:
    """Records of all workers, in one pipe and in one folder, verify; each is an instance of its own."""
    run("audit", "keygen", "--out", str(tmp_path / "key"))
    key = tmp_path / "key" / "audit.yaml"
    folder = tmp_path / "audit"
    folder.mkdir()
    audited = world.instance(
        "audited", workers=WORKERS, audit={"key_file": str(key), "directory": str(folder)}
    ).start()
    audited.until("kms_workers", lambda count: count == WORKERS)
    clients = opened(audited, 6)
    for number in range(5):
        for client in clients:
            client.create(f"t:{number}")
    audited.stop()
    chains = {file.name.split("-")[1] for file in folder.iterdir()}
    assert len(chains) == WORKERS
    records = [json.loads(line) for line in audited.out.read_text().splitlines()]
    assert {record["chain"] for record in records if "chain" in record} >= chains
    run("audit", "verify", "--config", str(audited.config), str(audited.out))
