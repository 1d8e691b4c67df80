"""``doctor``: checks a configuration before, or while, the service runs on it."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Final

import click

from progressdb_kms.cli.check import Check, Result
from progressdb_kms.cli.checks import run_checks
from progressdb_kms.cli.output import json_option, print_json

_COLOURS: Final = {Result.OK: "green", Result.WARN: "yellow", Result.FAIL: "red"}


@click.command()
@click.option(
    "--config", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Configuration file."
)
@json_option
def doctor(config: Path, *, as_json: bool) -> int:
    """Check a configuration and all that it names: one line each, with what to do. Exits 1 on any FAIL."""
    return asyncio.run(_report(config, as_json=as_json))


async def _report(config: Path, *, as_json: bool) -> int:
    found = []
    async for check in run_checks(config):
        found.append(check)
        if not as_json:
            _print(check)
    if as_json:
        print_json([asdict(check) for check in found])
    return int(any(check.result is Result.FAIL for check in found))


def _print(check: Check) -> None:
    word = click.style(f"{check.result.upper():<4}", fg=_COLOURS[check.result])
    line = f"{word}  {check.check}: {check.detail}"
    click.echo(f"{line} -> {check.action}" if check.action else line)
