"""Single requests: create, encrypt and decrypt at several numbers of connections; and new connections."""

from __future__ import annotations

import base64
import json
import ssl
import urllib.request
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .cases import Case, Key, Scene, Values
from .machine import GENERATOR_CORE, cpu_seconds, two_cores
from .servers import client
from .tools import find_generator, output_of

MESSAGE = b"m" * 256
HANDSHAKE_CONNECTIONS = 16
OPERATIONS = ("create", "encrypt", "decrypt")


@dataclass(frozen=True)
class Request:
    """A request that a generator repeats: to which server, and what.

    Attributes:
        url: With the path.
        pid: The process whose CPU time is counted.
        body: File that holds the body.
        content_type: Of body and answer.
        keep: Keep connections open; else each request makes its own.
        client: Whose certificate.
    """

    url: str
    pid: int
    body: Path
    content_type: str = "application/json"
    keep: bool = True
    client: str = "server"


def single_cases(scene: Scene) -> list[Case]:
    """Return the cases of single requests, those of the service and of the reference side by side."""
    requests = single_requests(scene)
    return [
        Case(
            Key("single", operation, who, connections),
            partial(fire, scene, request, connections),
        )
        for connections in scene.connections
        for operation in OPERATIONS
        for (what, who), request in requests.items()
        if what == operation
    ]


def handshake_cases(scene: Scene) -> list[Case]:
    """Return the cases where each request makes a connection: a full handshake with both certificates."""
    requests = single_requests(scene)
    cases = []
    for who in ("service", "reference"):
        kept = requests["encrypt", who]
        fresh = replace(kept, keep=False)
        cases.append(
            Case(
                Key("handshakes", "encrypt on a new connection", who, HANDSHAKE_CONNECTIONS),
                partial(fire, scene, fresh, HANDSHAKE_CONNECTIONS),
            )
        )
    return cases


def single_requests(scene: Scene) -> dict[tuple[str, str], Request]:
    """Make a key and a ciphertext, and return the requests by operation and server."""
    ready, folder = scene.ready, scene.folder
    with client(ready) as kms:
        key_id = kms.create_dek_for_thread("bench:messages").key_id
        sealed = kms.encrypt_with_dek(key_id, MESSAGE).ciphertext
    create = _file(folder / "create", {"thread_id": "bench:creates"})
    encrypt = _file(folder / "encrypt", {"key_id": key_id, "plaintext": base64_of(MESSAGE)})
    decrypt = _file(folder / "decrypt", {"key_id": key_id, "ciphertext": base64_of(sealed)})
    theirs = _asked(scene, "/encrypt", encrypt)["ciphertext"]
    decrypt_theirs = _file(folder / "decrypt-reference", {"key_id": key_id, "ciphertext": theirs})
    url, pid = ready["url"], ready["pid"]
    there, their_pid = scene.reference_url, scene.reference_pid
    return {
        ("create", "service"): Request(f"{url}/create_dek_for_thread", pid, create),
        ("encrypt", "service"): Request(f"{url}/encrypt", pid, encrypt),
        ("encrypt", "reference"): Request(f"{there}/encrypt", their_pid, encrypt),
        ("decrypt", "service"): Request(f"{url}/decrypt", pid, decrypt),
        ("decrypt", "reference"): Request(f"{there}/decrypt", their_pid, decrypt_theirs),
    }


def fire(scene: Scene, request: Request, connections: int) -> Values:
    """Run the generator (bombardier) once against one route, over mutual TLS.

    Returns:
        Requests a second, the server's CPU time a request, median and 99th percentile, and how many answers
        were other than 2xx.
    """
    command = generator_command(scene, request, connections, scene.seconds)
    before = cpu_seconds(request.pid)
    said = output_of(command)
    spent = cpu_seconds(request.pid) - before
    return read_report(json.loads(said)["result"], spent)


def generator_command(
    scene: Scene, request: Request, connections: int, seconds: float, core: int | None = GENERATOR_CORE
) -> list[str]:
    """Return the command that repeats a request for some seconds, on one core or on any."""
    files = scene.ready["clients"][request.client]
    command = [str(find_generator()), "-m", "POST", "-f", str(request.body), "-k"]
    command += ["-H", f"Content-Type: {request.content_type}", "-H", f"Accept: {request.content_type}"]
    if not request.keep:
        # How the generator's fasthttp client is told to close; its -a is for the other client.
        command += ["-H", "Connection: close"]
    command += ["--cert", files["cert"], "--key", files["key"], "-c", str(connections), "-t", "30s"]
    # It refuses times below a second.
    length = ["-d", f"{round(seconds * 1000)}ms"] if seconds >= 1 else ["-n", str(2 * connections)]
    command += [*length, "-l", "-p", "r", "-o", "json", request.url]
    return ["taskset", "-c", str(core), *command] if two_cores() and core is not None else command


def read_report(report: dict[str, Any], spent: float) -> Values:
    """Return the figures of a generator's report and of the CPU seconds that the server spent meanwhile."""
    done = report["req2xx"]
    answered = sum(report[f"req{group}xx"] for group in range(1, 6)) + report["others"]
    percentiles = (report.get("latency") or {}).get("percentiles") or {}
    return {
        "per_second": done / report["timeTakenSeconds"],
        "cpu_us": spent / max(done, 1) * 1e6,
        "p50_us": percentiles.get("50", 0.0),
        "p99_us": percentiles.get("99", 0.0),
        "failed": answered - done,
    }


def base64_of(raw: bytes) -> str:
    """Return standard base64 (RFC 4648 section 4), as JSON bodies have it."""
    return base64.b64encode(raw).decode()


def _asked(scene: Scene, path: str, body: Path) -> dict[str, Any]:
    """Ask the reference once."""
    context = ssl.create_default_context(cafile=scene.ready["ca"])
    context.load_cert_chain(*scene.ready["clients"]["server"].values())
    request = urllib.request.Request(scene.reference_url + path, body.read_bytes())  # noqa: S310 - our own server
    with urllib.request.urlopen(request, context=context) as answer:  # noqa: S310 - likewise
        found: dict[str, Any] = json.load(answer)
        return found


def _file(path: Path, body: dict[str, str]) -> Path:
    path.write_text(json.dumps(body))
    return path
