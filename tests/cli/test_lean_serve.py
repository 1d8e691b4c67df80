"""What the service and the commands load: their memory and their start pay for every module."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import gc, sys
from progressdb_kms.cli.app import app
with app.make_context("progressdb-kms", ["version"]) as context:
    app.get_command(context, sys.argv[1])
print(*sorted({name.partition(".")[0] for name in sys.modules}))
print(gc.isenabled())
import rich.console, structlog
print(structlog.get_logger() is not None)
"""
NOT_NEEDED = {
    "boto3",
    "botocore",
    "httpcore",
    "kubernetes",
    "pkcs11",
    "pygments",
    "requests",
    "rich",
    "urllib3",
}
NEEDED = {"cryptography", "hypercorn", "prometheus_client", "quart", "redis", "structlog", "uvloop", "yaml"}


@pytest.mark.parametrize("command", ["serve", "dev"])
def test_the_service_loads_no_package_that_it_does_not_use(command: str) -> None:
    """Nothing of other commands, KEK sources or terminals; what is left out can be had later."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, command], capture_output=True, text=True, check=True)
    packages, collecting, later = done.stdout.splitlines()
    loaded = set(packages.split())
    assert loaded >= NEEDED
    assert loaded & NOT_NEEDED == set()
    assert (collecting, later) == ("True", "True")


OTHERS = """
import sys
from progressdb_kms.cli.app import app
with app.make_context("progressdb-kms", ["version"]) as context:
    for name in app.list_commands(context):
        if name not in ("dev", "openapi", "serve"):
            app.get_command(context, name)
import progressdb_kms.bootstrap
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_commands_load_nothing_that_serves() -> None:
    """Every other command, `rotate` and `backup` among them, starts without the frameworks."""
    done = subprocess.run([sys.executable, "-c", OTHERS], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert loaded >= {"click", "progressdb_kms", "redis", "structlog"}
    assert loaded & {"flask", "hypercorn", "quart", "werkzeug"} == set()
