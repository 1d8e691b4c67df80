"""What the client needs installed, and what its package offers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import progressdb_kms.client

SERVICE = Path(progressdb_kms.client.__file__).parents[2]

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in {allowed!r}:
            return None
        raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Blocker())
import progressdb_kms.client as client
client.open_sync_provider("unix:///nowhere").close()
client.open_provider("unix:///nowhere")
client.AdminClient("unix:///nowhere").close()
loaded = {{name.partition(".")[0] for name in sys.modules}} - set(sys.stdlib_module_names)
print(*sorted(loaded & {server!r}))
print(*sorted(name for name in sys.modules if name.startswith("progressdb_kms.") and ".client" not in name))
"""
# msgspec and httpcore with what httpcore brings.
ALLOWED = {"progressdb_kms", "msgspec", "httpcore", "h11", "anyio", "certifi", "idna", "sniffio"}
SERVER = {"cryptography", "quart", "hypercorn", "redis", "yaml", "click", "rich", "structlog", "uvloop"}


def test_the_client_needs_the_base_wheel_alone() -> None:
    """A fresh interpreter imports and opens it with all other packages blocked, and only domain modules."""
    program = BLOCKED.format(allowed=ALLOWED, server=SERVER)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(SERVICE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    server, modules = done.stdout.splitlines()
    assert server == ""
    assert modules == "progressdb_kms.domain progressdb_kms.domain.errors"


def test_all_is_there() -> None:
    """Every public name exists, once, in order."""
    names = progressdb_kms.client.__all__
    assert names == sorted(names, key=lambda name: (name.lower() == name, name))
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(progressdb_kms.client, name)
