"""How long it takes to verify an audit log, with the MAC key and with the public key, and in what memory.

Writes a log of several chains to files as services do, and runs ``progressdb-kms audit verify`` over them.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from progressdb_kms.audit.files import AuditFiles
from progressdb_kms.audit.form import fields_of
from progressdb_kms.audit.keyfile import load_audit_key, new_audit_key
from progressdb_kms.domain.audit import CHECKPOINT, CLOSE, OPEN, Chain, Record
from progressdb_kms.ports import AuditEvent

CHAINS = 4
AT_ONCE = 500
CHECKPOINT_EVERY = 1000


def write_chain(folder: Path, chain: Chain, count: int) -> None:
    """Write one chain."""
    files = AuditFiles(folder, chain.name, 64 * 2**20)
    batch: list[Record] = [
        chain.control({"audit": OPEN, "at": 1.0, "outcome": "ok", "roster": 1, "chains": {}})
    ]
    for number in range(count):
        outcome, key_id = ("intent", "ok")[number % 2], f"k_AA{number // 2:026d}"
        event = AuditEvent(
            "key.create", outcome, "dns:chat.default.svc", f"{number // 2:032x}", key_id, "room:1"
        )
        batch.append(chain.append(fields_of(event, 1.7e9 + number / 1000, "0123456789abcdef")))
        if number % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1:
            batch.append(chain.control({"audit": CHECKPOINT, "at": 1.0, "outcome": "ok", "roster": 1}))
        if len(batch) >= AT_ONCE:
            files.write(batch)
            batch = []
    batch.append(chain.control({"audit": CLOSE, "at": 1.0, "outcome": "ok", "roster": 1}))
    files.write(batch)
    files.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    records = parser.parse_args().records
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, public, _ = new_audit_key()
        secret = folder / "audit.yaml"
        secret.touch(0o600)
        secret.write_bytes(text)
        (folder / "audit.pub").write_bytes(public)
        log = folder / "log"
        log.mkdir()
        began = time.perf_counter()
        for number in range(CHAINS):
            write_chain(log, Chain(load_audit_key(secret), f"chain{number}"), records // CHAINS)
        size = sum(path.stat().st_size for path in log.iterdir())
        print(f"written: {records} records, {size / 2**20:.0f} MiB, {time.perf_counter() - began:.1f} s")
        for option, path in (("--key", secret), ("--public-key", folder / "audit.pub")):
            command = [
                sys.executable,
                "-m",
                "progressdb_kms.cli",
                "audit",
                "verify",
                str(log),
                option,
                str(path),
            ]
            began = time.perf_counter()
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            print(
                f"verified with {option}: {time.perf_counter() - began:.1f} s"
                f" ({after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.1f} s of CPU),"
                f" at most {after.ru_maxrss / 1024:.0f} MiB: {done.stdout.splitlines()[-1]}"
            )


if __name__ == "__main__":
    main()
