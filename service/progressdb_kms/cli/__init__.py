"""The ``progressdb-kms`` command. Importing this needs nothing beyond the standard library."""

from __future__ import annotations

import sys
from typing import Final

_EXTRAS: Final = {"boto3": "s3", "botocore": "s3", "kubernetes": "kubernetes"}
"""Packages that only one extra brings."""


def main() -> None:
    """Run the command line and exit with its code.

    The base install is the client alone: there, this says what to install and exits 2.
    """
    try:
        from progressdb_kms.cli.app import run  # noqa: PLC0415 - needs the server extra
    except ModuleNotFoundError as error:
        sys.exit(missing(error))
    sys.exit(run(sys.argv[1:]))


def missing(error: ModuleNotFoundError) -> int:
    """Say in one line what to install, and return the exit code, 2.

    Raises:
        ModuleNotFoundError: The module is one of this package's own: that is a bug, not a missing extra.
    """
    if error.name is None or error.name.partition(".")[0] == "progressdb_kms":
        raise error
    package = error.name.partition(".")[0]
    extra = _EXTRAS.get(package, "server")
    sys.stderr.write(
        f"progressdb-kms: this command needs the package {package}: pip install 'progressdb-kms[{extra}]'\n"
    )
    return 2
