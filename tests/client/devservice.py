"""The real service in development mode, for as long as a test needs it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

START_LIMIT = 120.0
"""Seconds for the service to say that it is ready: a net for a hung one, never something that is measured."""


@contextmanager
def running(folder: Path, port: int = 0) -> Iterator[dict[str, Any]]:
    """Run a service; gives what its ready file says, and `process`, whose end the caller may have caused.

    Args:
        folder: For its data, which a second run finds again.
        port: Where it listens; 0 for any.
    """
    file, log = folder / "ready.json", folder / "log"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "progressdb_kms.cli", "dev", "--dir", str(folder / "dev")]
    command += ["--port", str(port), "--admin-port", "0", "--ready-file", str(file)]
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + START_LIMIT
        while not file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the service did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.05)
        yield json.loads(file.read_text()) | {"process": process}
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(START_LIMIT)
