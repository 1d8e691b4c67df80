"""``version``."""

from __future__ import annotations

import platform
import ssl
from importlib.metadata import version as installed

import click

from progressdb_kms import __version__
from progressdb_kms.cli.output import json_option, print_fields, print_json


@click.command()
@json_option
def version(*, as_json: bool) -> None:
    """Print the version, and the versions of what it stands on."""
    fields: dict[str, object] = {
        "progressdb-kms": __version__,
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "cryptography": installed("cryptography"),
        "hypercorn": installed("hypercorn"),
    }
    if as_json:
        print_json(fields)
    else:
        print_fields(fields)
