"""``audit``: keys of the audit log, its verification, and what it says."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from progressdb_kms.cli.connection import Connection, connection_options
from progressdb_kms.cli.operator import INCOMPLETE, config_option, export_file
from progressdb_kms.cli.output import json_option, print_json, print_table

if TYPE_CHECKING:
    from progressdb_kms.domain.audit import VerifyKey
    from progressdb_kms.domain.auditreport import AuditReport
    from progressdb_kms.settings import Settings

_COLUMNS = ("at", "action", "outcome", "identity", "key_id", "thread_id", "detail", "request_id")
_SHOWN = 100
_file = click.Path(path_type=Path, dir_okay=False)


@click.group()
def audit() -> None:
    """The audit log: who did what to which key."""


@audit.command()
@click.option(
    "--out",
    "directory",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for audit.yaml and audit.pub.",
)
@json_option
def keygen(directory: Path, *, as_json: bool) -> None:
    """Make an audit key and its public half. Never overwrites."""
    # Only here, and below likewise: `audit show` needs none of it.
    from progressdb_kms.audit.keyfile import KEY_NAME, PUBLIC_NAME, new_audit_key  # noqa: PLC0415 - see above
    from progressdb_kms.domain.errors import AuditKeyInvalid  # noqa: PLC0415 - see above
    from progressdb_kms.kek.atomic import write_once  # noqa: PLC0415 - see above

    text, public, name = new_audit_key()
    secret_file, public_file = directory / KEY_NAME, directory / PUBLIC_NAME
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_once(secret_file, text, 0o600)
        write_once(public_file, public, 0o644)
    except FileExistsError:
        raise AuditKeyInvalid(f"{directory} holds an audit key already, which is never overwritten") from None
    except OSError as error:
        raise AuditKeyInvalid(f"can't write into {directory}: {error.strerror}") from None
    if as_json:
        print_json({"key_id": name, "key_file": str(secret_file), "public": str(public_file)})
    else:
        click.echo(
            f"{name}: {secret_file} goes into audit.key_file; give {public_file} to whoever verifies. Keep a"
            " copy of the first: without it the log can be verified by its signatures only."
        )


@audit.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--config", type=_file, help="The service's configuration: its store's anchor, its keys.")
@click.option("--key", "key_files", multiple=True, type=_file, help="An audit key (audit.yaml).")
@click.option("--public-key", "public_files", multiple=True, type=_file, help="The public half of one.")
@click.option("--partial", is_flag=True, help="The files are not all: what they lack is only noted.")
@json_option
def verify(
    paths: tuple[Path, ...],
    config: Path | None,
    key_files: tuple[Path, ...],
    public_files: tuple[Path, ...],
    *,
    partial: bool,
    as_json: bool,
) -> int:
    """Verify the audit log: the store's own, or exports, files and directories of them.

    Finds what was removed, changed, reordered, duplicated or cut off, and says where; then the exit code is
    3. Without PATHS, the stream in the store of --config is verified against the store's anchor; with both,
    the files are held against it. With public keys alone nobody's secret is needed: a change is then located
    between two signed records.
    """
    from progressdb_kms.settings import load_settings  # noqa: PLC0415 - see above

    if config is None and not paths:
        raise click.UsageError("give files to verify, or --config for the store's own log")
    if partial and not paths:
        raise click.UsageError("--partial is for files")
    settings = None if config is None else load_settings(config)
    keys = _keys(settings, key_files, public_files)
    report = _verified(paths, settings, keys, partial=partial)
    if as_json:
        print_json(
            {
                "intact": report.intact,
                "records": report.records,
                "unchained": report.unchained,
                "problems": report.problem_count,
                "found": [problem._asdict() for problem in report.problems],
                "chains": [asdict(chain) for chain in report.chains],
                "notes": report.notes,
            }
        )
    else:
        _print(report)
    return 0 if report.intact else INCOMPLETE


def _keys(
    settings: Settings | None, key_files: tuple[Path, ...], public_files: tuple[Path, ...]
) -> list[VerifyKey]:
    from progressdb_kms import bootstrap  # noqa: PLC0415 - see above
    from progressdb_kms.audit.keyfile import load_audit_key, load_public_key  # noqa: PLC0415 - see above

    keys = [load_public_key(path) for path in public_files]
    keys += [load_audit_key(path).verify for path in key_files]
    if settings is not None and not keys:
        keys += bootstrap.verify_keys(settings)
    if not keys:
        raise click.UsageError("give --key or --public-key, or a --config that names audit.key_file")
    return keys


def _verified(
    paths: tuple[Path, ...], settings: Settings | None, keys: list[VerifyKey], *, partial: bool
) -> AuditReport:
    from progressdb_kms import bootstrap  # noqa: PLC0415 - see above
    from progressdb_kms.audit.reading import files_in, verify_files  # noqa: PLC0415 - see above

    if settings is None:
        return verify_files(files_in(paths), keys, None, partial=partial).finish()
    if not paths:
        return asyncio.run(bootstrap.verify_audit(settings, keys))
    # The anchor first: a log that is being written only goes on behind it.
    anchor = asyncio.run(bootstrap.read_anchor(settings))
    verifier = verify_files(files_in(paths), keys, anchor, partial=partial)
    return verifier.finish(later=asyncio.run(bootstrap.read_anchor(settings)).roster)


def _print(report: AuditReport) -> None:
    for problem in report.problems[:_SHOWN]:
        where = f"{problem.where}: " if problem.where else ""
        chain = f"chain {problem.chain}: " if problem.chain else ""
        click.echo(f"{where}{problem.kind}: {chain}{problem.detail}")
    if report.problem_count > _SHOWN:
        click.echo(f"and {report.problem_count - _SHOWN} more")
    for note in report.notes[:_SHOWN]:
        click.echo(f"note: {note}")
    closed = sum(chain.closed for chain in report.chains)
    click.echo(
        f"{report.records} records in {len(report.chains)} chains ({closed} closed): "
        + ("intact" if report.intact else f"{report.problem_count} problems")
    )


@audit.command()
@config_option
@click.option("--out", required=True, type=export_file, help="The file to make; never overwritten.")
@json_option
def export(config: Path, out: Path, *, as_json: bool) -> None:
    """Write the store's audit log with its anchor to a file, for audit verify. It is itself audited."""
    from progressdb_kms import bootstrap  # noqa: PLC0415 - see above
    from progressdb_kms.cli.exportfiles import new_export  # noqa: PLC0415 - see above
    from progressdb_kms.observability.metrics import Metrics  # noqa: PLC0415 - see above
    from progressdb_kms.settings import load_settings  # noqa: PLC0415 - see above

    digest = hashlib.sha256()
    settings = load_settings(config)
    with new_export(out) as sink:

        def write(data: bytes) -> None:
            sink.write(data)
            digest.update(data)

        count = asyncio.run(bootstrap.export_audit(settings, Metrics(), sys.stderr, write))
        sink.commit()
    if as_json:
        print_json({"file": str(out), "records": count, "sha256": digest.hexdigest()})
    else:
        click.echo(f"{out}: {count} records, sha256 {digest.hexdigest()}")


@audit.command()
@click.option("--since", help="From this time on, RFC 3339.")
@click.option("--action", help="Only this action: key.disable, refused, ...")
@click.option("--identity", help="Only what this caller asked for.")
@click.option("--key-id", help="Only on this key.")
@click.option("--thread-id", help="Only on this thread's keys.")
@connection_options
@json_option
def show(
    since: str | None,
    action: str | None,
    identity: str | None,
    key_id: str | None,
    thread_id: str | None,
    connection: Connection,
    *,
    as_json: bool,
) -> None:
    """Show the records that the running service's store keeps, the oldest first; with --json as they are."""
    with connection.admin() as service:
        found = service.audit(
            since=since, action=action, identity=identity, key_id=key_id, thread_id=thread_id
        )
        if as_json:
            for record in found:
                click.echo(record.line)
            return
        rows = ([_when(record.at), *(getattr(record, name) for name in _COLUMNS[1:])] for record in found)
        print_table(_COLUMNS, rows)


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
