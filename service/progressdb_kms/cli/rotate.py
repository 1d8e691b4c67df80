"""``rotate``: the rotation job, by hand or from a CronJob."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final

import click
import uvloop
from rich.console import Console

from progressdb_kms.domain.errors import KmsError
from progressdb_kms.observability.logs import configure_logs
from progressdb_kms.rotation.job import Options, run
from progressdb_kms.rotation.kubernetes_events import Herald, pod_events
from progressdb_kms.rotation.progress import Bar, JsonLines, Reporter
from progressdb_kms.rotation.summary import summary
from progressdb_kms.settings import load_settings

_INDEX: Final = "JOB_COMPLETION_INDEX"


def _sample(_ctx: click.Context, _param: click.Parameter, value: str) -> int:
    """Return 0 for ``all`` and N for ``sample=N``."""
    if value == "all":
        return 0
    found = re.fullmatch(r"sample=([1-9][0-9]{0,9})", value)
    if found is None:
        raise click.BadParameter("write all, or sample=N")
    return int(found[1])


@click.command()
@click.option(
    "--config",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The service's configuration file.",
)
@click.option("--dry-run", is_flag=True, help="Print the census and what a run would do; change nothing.")
@click.option("--resume-only", is_flag=True, help="Finish an unfinished rotation; begin none.")
@click.option("--worker", is_flag=True, help="Share the work of the rotation that another run leads.")
@click.option(
    "--indexed",
    is_flag=True,
    help="In an Indexed Job of Kubernetes: lead where JOB_COMPLETION_INDEX is 0, else be a worker.",
)
@click.option(
    "--join-wait",
    type=click.FloatRange(1),
    default=600,
    show_default=True,
    help="Seconds that a worker of --indexed waits for a rotation that somebody leads.",
)
@click.option(
    "--rollback", is_flag=True, help="Turn the latest rotation back: its KEK version is bad or lost."
)
@click.option("--batch", type=click.IntRange(1, 1000), help="Records in one call of the store.")
@click.option("--max-rate", type=click.IntRange(0), help="Records a second at most, 0 for no bound.")
@click.option(
    "--verify",
    default="all",
    show_default=True,
    callback=_sample,
    metavar="all|sample=N",
    help="Records to read back.",
)
@click.option("--wait", type=click.FloatRange(0), help="Seconds to wait for live instances.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines on a terminal too.")
def rotate(  # noqa: PLR0913 - one parameter an option
    config: Path,
    batch: int | None,
    max_rate: int | None,
    verify: int,
    wait: float | None,
    join_wait: float,
    *,
    dry_run: bool,
    resume_only: bool,
    worker: bool,
    indexed: bool,
    rollback: bool,
    as_json: bool,
) -> int:
    """Bring a new KEK version and wrap every key under it.

    Run again after any interruption, it goes on where it was. Exit codes: 0 clean; 3 ended, but some keys
    could not be dealt with; 4 another run leads; 75 stopped by SIGTERM, to be run again; 1 an error.
    """
    if sum((dry_run, resume_only, worker, rollback)) > 1:
        raise click.UsageError("--dry-run, --resume-only, --worker and --rollback exclude each other")
    if indexed:
        if dry_run or worker or rollback:
            raise click.UsageError("--indexed goes with --resume-only alone of these options")
        worker = _completion_index() > 0
    options = Options(
        resume_only=resume_only and not worker,
        worker=worker,
        rollback=rollback,
        dry_run=dry_run,
        batch=batch,
        max_rate=max_rate,
        verify_sample=verify,
        wait=wait,
        join_wait=join_wait if indexed else 0,
    )
    settings = load_settings(config)
    # So that what is logged before the run sets its logs up looks like the rest.
    configure_logs(settings.log.level, settings.log.format)
    herald = Herald(_reporter(as_json=as_json), pod_events("Rotate", wanted=settings.rotation.events))
    try:
        code = uvloop.run(run(settings, options, herald))
    except KmsError as error:
        # The last line is what Kubernetes keeps of a pod that failed: it has to say what to do.
        known = "again" in error.detail
        what_to_do = "" if known else "; what was done is kept: run rotate again once this is mended"
        raise click.ClickException(f"{error.detail}{what_to_do} ({error.code})") from error
    if code and herald.result is not None:
        click.echo(f"progressdb-kms: {summary(herald.result)}", err=True)
    return code


def _completion_index() -> int:
    """Return the number that Kubernetes gives each pod of an Indexed Job."""
    text = os.environ.get(_INDEX, "")
    if not (text.isascii() and text.isdigit()):
        raise click.UsageError(
            f"--indexed needs {_INDEX}, which Kubernetes sets in a Job with completionMode Indexed"
        )
    return int(text)


def _reporter(*, as_json: bool) -> Reporter:
    if as_json or not sys.stdout.isatty():
        return JsonLines(sys.stdout)
    return Bar(Console())
