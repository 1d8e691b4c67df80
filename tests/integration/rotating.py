"""Runs of the rotation job as processes of their own, and keys with messages to rotate under."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from progressdb_kms.domain.keys import ALL_TAGS
from progressdb_kms.store.redis.schema import LOCK_KEY
from tests.contract.wire_client import Client, b64, unb64
from tests.integration.world import LIMIT, Instance, World, eventually

ROOT = Path(__file__).parents[2]


class Job:
    """One `rotate` process.

    Args:
        instance: Whose configuration it takes.
        arguments: Further arguments.
        fault: Where it ends by SIGKILL, as `PROGRESSDB_KMS_FAULT_POINT` has it.
        stop: Where it gets SIGTERM instead.
        freeze: Where it gets SIGSTOP instead.
        lease: Seconds of its leases; None for those of production.
        environment: Further environment.
        module: What the process runs; the command, with fault points where they are asked for.
    """

    def __init__(
        self,
        instance: Instance,
        *arguments: str,
        fault: str = "",
        stop: str = "",
        freeze: str = "",
        lease: float | None = None,
        environment: Mapping[str, str] | None = None,
        module: str = "",
    ) -> None:
        self._log = instance.folder / f"rotate-{secrets.token_hex(4)}"
        everything = {**os.environ, **(environment or {})}
        point, sent = next(
            (found for found in ((stop, signal.SIGTERM), (freeze, signal.SIGSTOP)) if found[0]),
            (fault, signal.SIGKILL),
        )
        faulty = bool(point or lease)
        run = module or ("tests.fault.rotate_with_faults" if faulty else "progressdb_kms.cli")
        if faulty or module:
            everything["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "service")])
        if point:
            everything["PROGRESSDB_KMS_FAULT_POINT"] = point
            everything["PROGRESSDB_KMS_FAULT_SIGNAL"] = str(int(sent))
        if lease:
            everything["PROGRESSDB_KMS_LEASE"] = str(lease)
        with self._log.with_suffix(".out").open("wb") as out, self._log.with_suffix(".err").open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", run, "rotate", "--config", str(instance.config), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=everything,
                cwd=ROOT,
            )

    @property
    def text(self) -> str:
        """All that it has written so far."""
        return self._log.with_suffix(".out").read_text() + self._log.with_suffix(".err").read_text()

    @property
    def errors(self) -> str:
        """What it has written to standard error."""
        return self._log.with_suffix(".err").read_text()

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Return its JSON lines of one event."""
        whole = self._log.with_suffix(".out").read_text().rpartition("\n")[0]
        records = [json.loads(line) for line in whole.splitlines()]
        return [record for record in records if record.get("event") == event]

    def wait_for(self, event: str, **fields: object) -> None:
        """Wait until it has told of an event with these fields."""

        def told() -> bool:
            assert self.process.poll() is None, self.text
            return any(fields.items() <= line.items() for line in self.lines(event))

        eventually(told, f"{event} {fields}")

    def wait_frozen(self) -> None:
        """Wait until it is where it was to freeze."""
        stat = Path(f"/proc/{self.process.pid}/stat")

        def frozen() -> bool:
            assert self.process.poll() is None, self.text
            return stat.read_text().rpartition(")")[2].split()[0] == "T"

        eventually(frozen, "it has stopped")

    def exit_code(self) -> int:
        """Wait for its end."""
        try:
            return self.process.wait(2 * LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(self.text) from None

    def result(self, code: int = 0) -> dict[str, Any]:
        """Wait for its end, which must have this exit code, and return its last word."""
        got = self.exit_code()
        assert got == code, (got, self.text)
        return self.lines("result")[-1]


def rotate(instance: Instance, *arguments: str, **options: Any) -> dict[str, Any]:
    """Run the job to its end, which must be a clean one."""
    return Job(instance, *arguments, **options).result()


Sealed = list[tuple[str, bytes, bytes]]


def make_keys(client: Client, count: int) -> Sealed:
    """Make keys, and a message under each: key id, message, ciphertext."""
    names = [f"t-{secrets.token_hex(8)}" for _ in range(count)]
    items = [{"thread_id": name, "idempotency_key": name} for name in names]
    ids = [item["key_id"] for item in client.batch("/create_dek_batch", items)]
    messages = [secrets.token_bytes(40) for _ in ids]
    body = [{"key_id": k, "plaintext": b64(m)} for k, m in zip(ids, messages, strict=True)]
    sealed = client.batch("/encrypt_batch", body)
    return [(k, m, unb64(s["ciphertext"])) for k, m, s in zip(ids, messages, sealed, strict=True)]


def assert_readable(client: Client, sealed: Sealed) -> None:
    """Assert that each ciphertext decrypts to its message."""
    items = [{"key_id": key_id, "ciphertext": b64(ciphertext)} for key_id, _, ciphertext in sealed]
    results = client.batch("/decrypt_batch", items)
    assert [unb64(result["plaintext"]) for result in results] == [message for _, message, _ in sealed]


def stored_versions(world: World) -> dict[str, int]:
    """Return the number of records by the KEK version that their blob names; the census must agree."""
    records: dict[str, int] = {}
    for key in world.store.ask("KEYS", "kms:{??}:dek:*"):
        wrapped, version = world.store.ask("HMGET", key, "wrapped", "kek_version")
        assert int.from_bytes(wrapped[1:4], "big") == int(version)
        records[version.decode()] = records.get(version.decode(), 0) + 1
    census: dict[str, int] = {}
    for key in world.store.ask("KEYS", "kms:{??}:kek:*"):
        version = key.decode().rpartition(":")[2]
        census[version] = census.get(version, 0) + world.store.ask("SCARD", key)
    assert census == records
    return records


def let_lock_run_out(world: World) -> None:
    """Let a killed run's lock be as it is when its lease is over; its slots keep their leases."""
    assert world.store.ask("HGET", LOCK_KEY, "until")
    world.store.ask("HSET", LOCK_KEY, "until", 0)


def floors(world: World) -> set[bytes]:
    """Return the floors of all slots."""
    return {world.store.ask("HGET", f"kms:{{{tag}}}:ctl", "floor") for tag in ALL_TAGS}
