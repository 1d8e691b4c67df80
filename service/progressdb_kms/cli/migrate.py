"""``migrate``: moves the keys of the older service in."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from progressdb_kms.cli.exportfiles import new_export
from progressdb_kms.cli.operator import INCOMPLETE, config_option, on_store
from progressdb_kms.cli.output import json_option, show_fields
from progressdb_kms.domain.older import MAX_LINE_BYTES
from progressdb_kms.usecases.moving import Mode, Moved, Mover, Refused

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedReader

    from progressdb_kms.cli.exportfiles import ExportSink
    from progressdb_kms.usecases.keks import KekBook
    from progressdb_kms.usecases.vault import Vault

_SHOWN: Final = 20
"""Refused lines that are shown on standard error; ``--report`` has all."""
_file = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@config_option
@click.option(
    "--master-key-file",
    required=True,
    type=_file,
    help="The older service's master key: 64 hex digits, or its line master_key_hex; mode 0600.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and write nothing.")
@click.option("--verify", is_flag=True, help="Say whether the store has every key of FILE; write nothing.")
@click.option("--report", type=_file, help="Write each refused line and the counts to this new file.")
@click.option(
    "--threadless",
    metavar="PREFIX",
    default="",
    help="Give a key whose thread FILE does not tell the thread PREFIX<key_id>; else it is refused.",
)
@json_option
def migrate(
    file: Path,
    config: Path,
    master_key_file: Path,
    *,
    dry_run: bool,
    verify: bool,
    report: Path | None,
    threadless: str,
    as_json: bool,
) -> int:
    """Move the older service's keys in, from its export FILE (docs/moving-in.md), under the same key ids.

    Nothing that is in the store is ever replaced. What was interrupted is run again in the same way.
    """
    if dry_run and verify:
        raise click.UsageError("give either --dry-run or --verify")
    mode = Mode.VERIFY if verify else Mode.DRY_RUN if dry_run else Mode.MOVE
    with ExitStack() as stack:
        sink = stack.enter_context(new_export(report)) if report else None
        source = stack.enter_context(file.open("rb"))
        teller = _Teller(sink)

        async def action(vault: Vault, keks: KekBook) -> Moved:
            # Only here, where the process has been hardened.
            from progressdb_kms.kek.older import load_master_key  # noqa: PLC0415 - see above

            master = load_master_key(master_key_file)
            name = f"sha256 {_digest(source)}"
            return await Mover(vault, keks, master, teller.tell, prefix=threadless, mode=mode).run(
                _lines(source), name
            )

        moved = on_store(config, "migrate", action)
        fields: dict[str, Any] = {"mode": str(mode), **asdict(moved)}
        if sink is not None:
            sink.write(json.dumps(fields).encode() + b"\n")
            sink.commit()
    teller.end()
    show_fields(fields, as_json=as_json)
    return _ended(moved)


def _ended(moved: Moved) -> int:
    """Say what is wrong with the whole, and return the exit code."""
    if moved.unopened and moved.unopened == moved.refused == moved.read:
        click.echo("progressdb-kms: no key opens: is this the older service's master key?", err=True)
    if not moved.complete:
        click.echo(
            'progressdb-kms: the file does not end with {"keys": N} of its own number of keys: it is cut'
            " short or put together, and keys may be missing; export again",
            err=True,
        )
    return INCOMPLETE if moved.refused or not moved.complete else 0


class _Teller:
    """Tells of refused lines: the first ones on standard error, all in the report."""

    def __init__(self, sink: ExportSink | None) -> None:
        self._sink = sink
        self._told = 0

    def tell(self, refused: Refused) -> None:
        """Tell of one."""
        self._told += 1
        if self._told <= _SHOWN:
            name = f" ({refused.key_id})" if refused.key_id else ""
            click.echo(f"line {refused.line}{name}: {refused.reason}", err=True)
        if self._sink is not None:
            self._sink.write(json.dumps(asdict(refused), ensure_ascii=False).encode() + b"\n")

    def end(self) -> None:
        """Say how many more there are."""
        if self._told > _SHOWN:
            hint = "" if self._sink else ": --report FILE lists all"
            click.echo(f"and {self._told - _SHOWN} more lines{hint}", err=True)


def _digest(file: BufferedReader) -> str:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    return digest


def _lines(file: BufferedReader) -> Iterator[bytes]:
    """Yield a file's lines; of one that is too long its beginning, which is no line of an export."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES + 1)
