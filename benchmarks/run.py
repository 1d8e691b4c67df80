"""Measure requests a second and CPU time a request over mTLS: create, encrypt and decrypt of 256 bytes.

The service has one core to itself; the load generator (bombardier 1.2.6) and the store share the other. A
bare Go server (``reference``) that does the same cryptography over the same TLS and JSON is the ceiling.
Runs are interleaved, so that noise of the machine meets all alike; medians, the spread and the ratios to
the reference are shown.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import signal
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from progressdb_kms.client import open_sync_provider

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE = Path(__file__).parent
TOOLS = HERE / ".tools"
GENERATOR = "github.com/codesenberg/bombardier@v1.2.6"
TICKS = os.sysconf("SC_CLK_TCK")
MESSAGE = b"m" * 256


@dataclass(frozen=True)
class Target:
    """A server that is measured: where it is, its process, and path and body of each operation."""

    name: str
    url: str
    pid: int
    requests: dict[str, tuple[str, Path]]


@dataclass(frozen=True)
class Sample:
    """One run: rates, times in microseconds, and answers that were not 200."""

    server: str
    operation: str
    connections: int
    per_second: float
    cpu_us: float
    p50_us: float
    p99_us: float
    failed: int


def main() -> int:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=5, help="length of one run")
    parser.add_argument("--runs", type=int, default=3, help="runs of each combination")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--operations", nargs="+", default=["create", "encrypt", "decrypt"])
    options = parser.parse_args()
    generator = find_generator()
    samples = []
    with service() as ready, tempfile.TemporaryDirectory() as bodies, reference(ready) as (url, pid):
        client = ready["clients"]["server"]
        targets = [
            Target("service", ready["url"], ready["pid"], write_bodies(ready, Path(bodies))),
            Target("reference", url, pid, reference_bodies(url, ready, Path(bodies))),
        ]
        for _ in range(options.runs):
            for connections in options.connections:
                for operation in options.operations:
                    for target in targets:
                        if operation in target.requests:
                            samples.append(
                                measure(generator, target, client, operation, connections, options.seconds)
                            )
                            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    report = ratios(samples) | {"samples": [asdict(sample) for sample in samples]}
    (results / "latest.json").write_text(json.dumps(report, indent=1) + "\n")
    print_table(samples)
    print("\n".join(f"{name}: {value:.2f}" for name, value in ratios(samples).items()))
    return 1 if any(sample.failed for sample in samples) else 0


def find_generator() -> Path:
    """Return the load generator, built by Go if it is not there."""
    found = shutil.which("bombardier") or shutil.which("bombardier", path=str(TOOLS))
    if found:
        return Path(found)
    if shutil.which("go") is None:
        sys.exit(
            f"the load generator is missing: install Go, or put bombardier on PATH (go install {GENERATOR})"
        )
    subprocess.run(["go", "install", GENERATOR], env={**os.environ, "GOBIN": str(TOOLS)}, check=True)
    return TOOLS / "bombardier"


@contextmanager
def service(program: Sequence[str] = ("-m", "progressdb_kms.cli")) -> Iterator[dict[str, Any]]:
    """Run a development instance, the service on the first core, its store on the second.

    Args:
        program: The command line, as Python is told of it.
    """
    with tempfile.TemporaryDirectory() as directory:
        ready_file = Path(directory) / "ready"
        command = [
            sys.executable,
            *program,
            "dev",
            "--dir",
            f"{directory}/dev",
            "--port",
            "0",
        ]
        command += ["--admin-port", "0", "--ready-file", str(ready_file)]
        with (Path(directory) / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not ready_file.exists():
                if process.poll() is not None:
                    sys.exit((Path(directory) / "log").read_text())
                time.sleep(0.05)
            ready = json.loads(ready_file.read_text())
            pin(ready["pid"], 0)
            pin(ready["store_pid"], 1)
            yield ready
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


@contextmanager
def reference(ready: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Build and run the bare Go server on the service's core; gives its URL and process id."""
    if shutil.which("go") is None:
        sys.exit("Go is missing: the reference server is built with it")
    TOOLS.mkdir(exist_ok=True)
    binary = TOOLS / "reference"
    subprocess.run(["go", "build", "-o", str(binary), "."], cwd=HERE / "reference", check=True)
    pki = Path(ready["ca"]).parent
    command = [str(binary), "-ca", ready["ca"], "-cert", str(pki / "kms.crt"), "-key", str(pki / "kms.key")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "GOMAXPROCS": "1"}
    )
    try:
        port = int((process.stdout or sys.exit("no output")).readline())
        pin(process.pid, 0)
        yield f"https://localhost:{port}", process.pid
    finally:
        process.kill()
        process.wait()


def reference_bodies(url: str, ready: dict[str, Any], directory: Path) -> dict[str, tuple[str, Path]]:
    """Return the reference's operations: the same message, sealed by itself."""
    context = ssl.create_default_context(cafile=ready["ca"])
    context.load_cert_chain(*ready["clients"]["server"].values())
    request = urllib.request.Request(f"{url}/encrypt", (directory / "encrypt").read_bytes())  # noqa: S310 - our own server
    with urllib.request.urlopen(request, context=context) as answer:  # noqa: S310 - likewise
        sealed = json.load(answer)["ciphertext"]
    key_id = json.loads((directory / "encrypt").read_text())["key_id"]
    file = directory / "decrypt-reference"
    file.write_text(json.dumps({"key_id": key_id, "ciphertext": sealed}))
    return {"encrypt": ("/encrypt", directory / "encrypt"), "decrypt": ("/decrypt", file)}


def pin(pid: int, core: int) -> None:
    """Keep all threads of a process on one core, where the machine has two."""
    if (os.cpu_count() or 1) > 1:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


def write_bodies(ready: dict[str, Any], directory: Path) -> dict[str, tuple[str, Path]]:
    """Make a key and a ciphertext, and write the body of each operation into a file."""
    client = ready["clients"]["server"]
    with open_sync_provider(ready["url"], ca=ready["ca"], cert=client["cert"], key=client["key"]) as kms:
        key_id = kms.create_dek_for_thread("bench:messages").key_id
        sealed = kms.encrypt_with_dek(key_id, MESSAGE).ciphertext

    def b64(raw: bytes) -> str:
        return base64.b64encode(raw).decode()

    bodies = {
        "create": ("/create_dek_for_thread", {"thread_id": "bench:creates"}),
        "encrypt": ("/encrypt", {"key_id": key_id, "plaintext": b64(MESSAGE)}),
        "decrypt": ("/decrypt", {"key_id": key_id, "ciphertext": b64(sealed)}),
    }
    files = {}
    for operation, (path, body) in bodies.items():
        file = directory / operation
        file.write_text(json.dumps(body))
        files[operation] = (path, file)
    return files


def measure(
    generator: Path, target: Target, client: dict[str, str], operation: str, connections: int, seconds: int
) -> Sample:
    """Run the generator once against one route."""
    path, body = target.requests[operation]
    command = [str(generator), "-m", "POST", "-f", str(body), "-H", "Content-Type: application/json", "-k"]
    command += ["--cert", client["cert"], "--key", client["key"], "-c", str(connections), "-d", f"{seconds}s"]
    command += ["-l", "-p", "r", "-o", "json", target.url + path]
    if (os.cpu_count() or 1) > 1:
        command = ["taskset", "-c", "1", *command]
    before = cpu_seconds(target.pid)
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["result"]
    spent = cpu_seconds(target.pid) - before
    done = report["req2xx"]
    answered = sum(report[f"req{group}xx"] for group in range(1, 6)) + report["others"]
    return Sample(
        server=target.name,
        operation=operation,
        connections=connections,
        per_second=done / report["timeTakenSeconds"],
        cpu_us=spent / max(done, 1) * 1e6,
        p50_us=report["latency"]["percentiles"]["50"],
        p99_us=report["latency"]["percentiles"]["99"],
        failed=answered - done,
    )


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def print_table(samples: list[Sample]) -> None:
    """Print medians, with the lowest and the highest rate of the runs."""
    print("| operation | connections | server | req/s (min to max) | CPU us/req | p50 us | p99 us | failed |")
    print("|---|---|---|---|---|---|---|---|")
    for key in dict.fromkeys((sample.operation, sample.connections, sample.server) for sample in samples):
        operation, connections, server = key
        group = [s for s in samples if (s.operation, s.connections, s.server) == key]
        rates = [s.per_second for s in group]
        cpu, p50, p99 = (
            statistics.median(getattr(s, name) for s in group) for name in ("cpu_us", "p50_us", "p99_us")
        )
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        print(
            f"| {operation} | {connections} | {server} | {statistics.median(rates):,.0f} ({spread})"
            f" | {cpu:.0f} | {p50:,.0f} | {p99:,.0f} | {sum(s.failed for s in group)} |"
        )


def ratios(samples: list[Sample]) -> dict[str, float]:
    """Return the reference's CPU time over the service's, and the service's p99 over the reference's."""
    found = {}
    for operation in ("encrypt", "decrypt"):
        for field, name in (("cpu_us", f"{operation}_vs_go"), ("p99_us", f"{operation}_p99_vs_go")):
            ours, theirs = (
                [
                    getattr(s, field)
                    for s in samples
                    if (s.server, s.operation, s.connections) == (server, operation, 16)
                ]
                for server in ("service", "reference")
            )
            if ours and theirs:
                ratio = statistics.median(ours) / statistics.median(theirs)
                found[name] = ratio if field == "p99_us" else 1 / ratio
    return found


if __name__ == "__main__":
    sys.exit(main())
