"""The `progressdb-kms` command with fault points, for tests: the package itself has none.

`PROGRESSDB_KMS_FAULT_POINT=name[:N]` ends this process by SIGKILL when the rotation job reaches that
transition for the Nth time (the first without N), or sends it `PROGRESSDB_KMS_FAULT_SIGNAL`, a number.

Times of production are replaced, in seconds: by `PROGRESSDB_KMS_LEASE` that of leases, so that the next run
need not wait for those of a killed one; by `PROGRESSDB_KMS_LIVE` that for which a silent instance counts as
live; by `PROGRESSDB_KMS_PATIENCE` that for which a run goes on while the store is away; by
`PROGRESSDB_KMS_PAUSE` that for which a KEK that could not be asked is not asked again.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
from collections import Counter

from progressdb_kms.cli.app import run
from progressdb_kms.kek import hidden
from progressdb_kms.rotation import job
from progressdb_kms.usecases import crew

POINT = "PROGRESSDB_KMS_FAULT_POINT"
SIGNAL = "PROGRESSDB_KMS_FAULT_SIGNAL"
LEASE = "PROGRESSDB_KMS_LEASE"
LIVE = "PROGRESSDB_KMS_LIVE"
PATIENCE = "PROGRESSDB_KMS_PATIENCE"
PAUSE = "PROGRESSDB_KMS_PAUSE"


def main() -> int:
    """Set the fault point, then run the command."""
    found = re.fullmatch(r"(.+?)(?::([0-9]+))?", os.environ.get(POINT, "-"))
    assert found
    name, number = found[1], int(found[2] or 1)
    number_sent = int(os.environ.get(SIGNAL, signal.SIGKILL))
    seen: Counter[str] = Counter()

    def reached(point: str) -> None:
        seen[point] += 1
        if point == name and seen[point] == number:
            os.kill(os.getpid(), number_sent)

    job.REACHED = reached
    if LEASE in os.environ:
        crew.LEASE = float(os.environ[LEASE])  # type: ignore[misc] # Final for everyone else
        crew.RENEW = crew.LEASE / 4  # type: ignore[misc]
    if LIVE in os.environ:
        crew.LIVE = float(os.environ[LIVE])  # type: ignore[misc]
    if PAUSE in os.environ:
        hidden.PAUSE = float(os.environ[PAUSE])  # type: ignore[misc]
    if PATIENCE in os.environ:
        patience = float(os.environ[PATIENCE])
        job.Conduct = functools.partial(crew.Conduct, patience=patience)  # type: ignore[attr-defined,assignment]
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
