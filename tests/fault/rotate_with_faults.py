"""The `progressdb-kms` command with fault points, for tests: the package itself has none.

`PROGRESSDB_KMS_FAULT_POINT=name[:N]` ends this process by SIGKILL when the rotation job reaches that
transition for the Nth time (the first without N). `PROGRESSDB_KMS_LEASE` shortens leases, in seconds, so
that the next run need not wait for those of a killed one. `PROGRESSDB_KMS_LIVE` does so for the time for
which a silent instance counts as live, and `PROGRESSDB_KMS_PATIENCE` for the time for which a run goes on
while the store is away.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
from collections import Counter

from progressdb_kms.cli.app import run
from progressdb_kms.rotation import job
from progressdb_kms.usecases import crew

POINT = "PROGRESSDB_KMS_FAULT_POINT"
LEASE = "PROGRESSDB_KMS_LEASE"
LIVE = "PROGRESSDB_KMS_LIVE"
PATIENCE = "PROGRESSDB_KMS_PATIENCE"


def main() -> int:
    """Set the fault point, then run the command."""
    found = re.fullmatch(r"(.+?)(?::([0-9]+))?", os.environ.get(POINT, "-"))
    assert found
    name, number = found[1], int(found[2] or 1)
    seen: Counter[str] = Counter()

    def reached(point: str) -> None:
        seen[point] += 1
        if point == name and seen[point] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    job.REACHED = reached
    if LEASE in os.environ:
        crew.LEASE = float(os.environ[LEASE])  # type: ignore[misc] # Final for everyone else
        crew.RENEW = crew.LEASE / 4  # type: ignore[misc]
    if LIVE in os.environ:
        crew.LIVE = float(os.environ[LIVE])  # type: ignore[misc]
    if PATIENCE in os.environ:
        patience = float(os.environ[PATIENCE])
        job.Conduct = functools.partial(crew.Conduct, patience=patience)  # type: ignore[attr-defined,assignment]
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
