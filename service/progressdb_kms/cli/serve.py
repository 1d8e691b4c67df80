"""``serve`` runs the service in the foreground; ``openapi`` prints what it serves."""

from __future__ import annotations

from pathlib import Path

import click
import uvloop

from progressdb_kms.bootstrap import service
from progressdb_kms.bootstrap.supervisor import serve_with_workers
from progressdb_kms.settings import load_settings


@click.command()
@click.option(
    "--config", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Configuration file."
)
def serve(config: Path) -> int:
    """Serve until SIGTERM or SIGINT; requests under way are finished first."""
    settings = load_settings(config)
    if settings.workers > 1:
        return serve_with_workers(settings)
    return uvloop.run(service.serve(settings))


@click.command()
def openapi() -> None:
    """Print the OpenAPI document of the HTTP API."""
    # Only here: it brings rich, which serve does without.
    from progressdb_kms.cli.output import print_json  # noqa: PLC0415 - see above

    print_json(service.openapi())
