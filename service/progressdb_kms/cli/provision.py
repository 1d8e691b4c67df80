"""``provision``: the first start in a cluster, and the renewal of its certificates."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from pathlib import Path
from typing import Final

import click

from progressdb_kms.domain.errors import KmsError
from progressdb_kms.process import harden

STOPPED: Final = 75
"""Exit code (EX_TEMPFAIL): stopped by SIGTERM, to be run again."""


@click.command()
@click.option(
    "--config",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="What to make (docs/provisioning.md).",
)
@click.option(
    "--termination-log",
    default="/dev/termination-log",
    show_default=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where Kubernetes reads why it failed; left alone where it is not there.",
)
def provision(config: Path, termination_log: Path) -> int:
    """Make the Secrets of a release that are missing, and renew certificates that are due.

    Never makes a KEK for a store that has data, nor a second CA. Safe to run again, and beside another run.
    Exit codes: 0 all is there; 1 an error; 75 stopped by SIGTERM, to be run again.
    """
    # It makes and reads keys: no core dump of it. What the kernel does not allow, the service's log says.
    harden()
    try:
        asyncio.run(_run(config))
    except asyncio.CancelledError:
        return STOPPED
    except KmsError as error:
        if termination_log.exists():
            with suppress(OSError):
                termination_log.write_text(f"{error.detail}\n")
        raise
    click.echo("all is there")
    return 0


async def _run(config: Path) -> None:
    # Only here: needs the extra `kubernetes`, which few commands do.
    from progressdb_kms.provision.config import load_config  # noqa: PLC0415 - see above
    from progressdb_kms.provision.run import run  # noqa: PLC0415 - see above

    task = asyncio.current_task()
    if task is not None:
        # The first process of a container is not ended by a signal that it has no handler for.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await run(load_config(config), click.echo)
