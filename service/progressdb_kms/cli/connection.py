"""How a command finds the running service: by options, a dev directory, or the environment."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from progressdb_kms.client import AdminClient, SyncKmsProvider, open_sync_provider

_file = click.Path(path_type=Path, dir_okay=False)


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the service is and what we show it; what is None comes from the environment.

    Attributes:
        url: ``https://host:port`` or ``unix:///path``.
        ca: CA of the service's certificate.
        cert: Client certificate.
        key: Its key.
    """

    url: str | None
    ca: Path | None
    cert: Path | None
    key: Path | None

    def provider(self) -> SyncKmsProvider:
        """Open the client for keys and messages, to be closed by the caller."""
        return open_sync_provider(self.url, ca=self.ca, cert=self.cert, key=self.key)

    def admin(self) -> AdminClient:
        """Open the client for key states, to be closed by the caller."""
        return AdminClient(self.url, ca=self.ca, cert=self.cert, key=self.key)


def connection_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the connection options, and a ``connection`` made of them."""

    @click.option(
        "--url", "--endpoint", "url", help="https://host:port or unix:///path; else $PROGRESSDB_KMS_ENDPOINT."
    )
    @click.option("--ca", type=_file, help="CA of the service's certificate; else $PROGRESSDB_KMS_CA.")
    @click.option("--cert", type=_file, help="Client certificate; else $PROGRESSDB_KMS_CERT.")
    @click.option("--key", type=_file, help="Its key; else $PROGRESSDB_KMS_KEY.")
    @click.option(
        "--dev-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Directory of a running dev instance: all of the above from there, as operator.",
    )
    @functools.wraps(command)
    def with_connection(
        *args: Any,  # noqa: ANN401 - whatever the command takes
        url: str | None,
        ca: Path | None,
        cert: Path | None,
        key: Path | None,
        dev_dir: Path | None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        given = Connection(url, ca, cert, key)
        return command(*args, connection=given if dev_dir is None else _of_dev(given, dev_dir), **kwargs)

    return with_connection


def _of_dev(given: Connection, directory: Path) -> Connection:
    path = directory / "ready.json"
    try:
        ready = json.loads(path.read_text())
    except FileNotFoundError:
        raise click.ClickException(
            f"no dev instance runs on {directory}; start one: progressdb-kms dev --dir {directory}"
        ) from None
    except ValueError:
        raise click.ClickException(f"{path} is not JSON") from None
    files = ready["clients"]["operator"]
    return Connection(
        url=given.url or ready["url"] or f"unix://{ready['unix']}",
        ca=given.ca or Path(ready["ca"]),
        cert=given.cert or Path(files["cert"]),
        key=given.key or Path(files["key"]),
    )
