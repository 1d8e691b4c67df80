"""``backup create`` and ``backup fetch``: exports to where they are kept, and back."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from progressdb_kms.cli.destinations import Destination, Folder, thin_out
from progressdb_kms.cli.exportfiles import chunks_of, new_export
from progressdb_kms.cli.exportnames import export_name, is_export
from progressdb_kms.cli.operator import INCOMPLETE, RESUMABLE, Stopped, config_option, export_file, on_store
from progressdb_kms.cli.output import json_option, show_fields
from progressdb_kms.domain.errors import BackupInvalid, KmsError
from progressdb_kms.usecases import backup as usecase
from progressdb_kms.usecases.destruction import sweep
from progressdb_kms.usecases.vault import named

if TYPE_CHECKING:
    from progressdb_kms.cli.s3 import Bucket
    from progressdb_kms.domain.backup import ExportNote
    from progressdb_kms.rotation.kubernetes_events import Events
    from progressdb_kms.usecases.exportfile import Counts
    from progressdb_kms.usecases.keks import KekBook
    from progressdb_kms.usecases.vault import Vault

_SAMPLE: Final = 1000
"""Keys of a new export that are unwrapped before an older one may go."""

_endpoint: Callable[..., Any] = click.option(
    "--s3-endpoint", help="S3-compatible storage: https://host:port; else $AWS_ENDPOINT_URL_S3, else AWS."
)
_allow_http: Callable[..., Any] = click.option(
    "--s3-allow-http", is_flag=True, help="Accept an http:// endpoint: only where the network is encrypted."
)


@dataclass(frozen=True, slots=True)
class Made:
    """An export that was made.

    Attributes:
        note: What the store remembers of it.
        counts: What it holds.
        place: Its path or URL.
        damaged: Key ids of records that can't be read, or do not unwrap.
        removed: Names of older exports that were removed.
        trouble: Why older exports were not removed, if they should have been.
    """

    note: ExportNote
    counts: Counts
    place: str
    damaged: tuple[str, ...]
    removed: tuple[str, ...] = ()
    trouble: str = ""

    @property
    def sound(self) -> bool:
        """Whether all was in order."""
        return not (self.damaged or self.trouble)

    @property
    def summary(self) -> str:
        """What was done, and what to do, in one sentence."""
        said = [f"export {self.note.export_id} of {self.counts.records} keys is in {self.place}"]
        if self.removed:
            said.append(f"{len(self.removed)} older ones were removed")
        if self.damaged:
            said.append(
                f"but {len(self.damaged)} records are damaged: {named(self.damaged)}; put them back by"
                " progressdb-kms restore, from a rotation's snapshot or an older export"
            )
        if self.trouble:
            said.append(self.trouble)
        return "; ".join(said)


@click.command()
@config_option
@click.option("--out", type=export_file, help="The file to make; never overwritten.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder to put a dated export in.",
)
@click.option("--s3", "s3_url", metavar="s3://BUCKET/PREFIX", help="The same in S3-compatible storage.")
@click.option(
    "--keep",
    type=click.IntRange(1),
    help="Dated exports to keep: older ones are removed once the new one is verified.",
)
@_endpoint
@_allow_http
@json_option
def create(
    config: Path,
    out: Path | None,
    directory: Path | None,
    s3_url: str | None,
    keep: int | None,
    s3_endpoint: str | None,
    *,
    s3_allow_http: bool,
    as_json: bool,
) -> int:
    """Export all live keys to one file, while traffic goes on. First, keys that are due are destroyed.

    Exit code 3: the export was made, but some records in the store are damaged, or older exports could not
    be removed. While records are damaged nothing is removed: older exports may hold their only good copies.
    75: stopped by SIGTERM; run it again.
    """
    if sum(place is not None for place in (out, directory, s3_url)) != 1:
        raise click.UsageError("give one of --out FILE, --directory DIR and --s3 URL")
    if out is not None and keep is not None:
        raise click.UsageError("--keep goes with --directory or --s3")
    with _told_of(config) as events:
        if out is not None:
            made = _to_file(config, out)
        else:
            destination: Destination
            if directory is not None:
                destination = Folder(directory)
            else:
                destination = _bucket(s3_url or "", s3_endpoint, allow_http=s3_allow_http)
            made = _to_destination(config, destination, keep or 0)
        events.write("BackupCreated", made.summary, warning=not made.sound)
    return _report(made, as_json=as_json)


@click.command()
@click.option(
    "--s3",
    "s3_url",
    required=True,
    metavar="s3://BUCKET/PREFIX",
    help="The export, or the prefix whose latest export is meant.",
)
@click.option("--out", required=True, type=export_file, help="The file to make; never overwritten.")
@_endpoint
@_allow_http
@json_option
def fetch(s3_url: str, out: Path, s3_endpoint: str | None, *, s3_allow_http: bool, as_json: bool) -> None:
    """Fetch an export from S3-compatible storage, and check it.

    Structure and digest are checked, for which no KEK is needed; backup verify also checks the seal.
    """
    bucket = _bucket(s3_url, s3_endpoint, allow_http=s3_allow_http)
    name = bucket.name or max(filter(is_export, bucket.names()), default="")
    if not name:
        raise BackupInvalid(f"there is no export under {bucket.url()}")
    with new_export(out) as sink:
        bucket.fetch(name, sink.write)
        found = usecase.inspect_export(sink.written)
        sink.commit()
    show_fields(
        {
            "file": str(out),
            "from": bucket.url(name),
            "export_id": found.header.export_id,
            "created_at": found.header.created_at,
            "records": found.counts.records,
            "keks": {kek.version: kek.kek_id for kek in found.needed},
            "sha256": found.ending.sha256,
            "seal": "not checked (backup verify FILE --config)",
        },
        as_json=as_json,
    )


@contextmanager
def _told_of(config: Path) -> Iterator[Events]:
    """Give where the job's events go; a failure becomes one, and its line says what there is now.

    Raises:
        click.ClickException: The body failed.
        Stopped: By SIGTERM.
    """
    # Only here, as in cli.operator.
    from progressdb_kms.observability.logs import configure_logs  # noqa: PLC0415 - see above
    from progressdb_kms.rotation.kubernetes_events import pod_events  # noqa: PLC0415 - see above
    from progressdb_kms.settings import load_settings  # noqa: PLC0415 - see above

    settings = load_settings(config)
    configure_logs(settings.log.level, settings.log.format)
    events = pod_events("Backup", wanted=settings.rotation.events)
    # For what is done outside of on_store: what is half done is removed.
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield events
    except (SystemExit, Stopped):
        raise Stopped("stopped: there is no new export; run it again") from None
    except (KmsError, OSError) as error:
        if isinstance(error, KmsError):
            detail, code = error.detail, f" ({error.code})"
        else:
            detail, code = f"{error.filename or 'the export'}: {error.strerror or type(error).__name__}", ""
        if "older exports" not in detail:
            detail += (
                "; there is no new export, and older ones are as they were: mend this, then run it again"
            )
        events.write("BackupFailed", detail, warning=True)
        raise click.ClickException(detail + code) from error
    finally:
        events.close()


def _stop(_number: int, _frame: object) -> None:
    # No library takes it for an error that it might try again after.
    raise SystemExit(RESUMABLE)


def _bucket(url: str, endpoint: str | None, *, allow_http: bool) -> Bucket:
    # Only here: it needs the extra s3.
    from progressdb_kms.cli.s3 import Bucket  # noqa: PLC0415 - see above

    return Bucket(url, endpoint, allow_http=allow_http)


def _to_file(config: Path, out: Path) -> Made:
    async def action(vault: Vault, _: KekBook) -> tuple[ExportNote, Counts]:
        with new_export(out) as sink:
            await sweep(vault)
            return await usecase.export_live(vault, sink)

    note, counts = on_store(config, "backup create", action)
    return Made(note, counts, str(out), counts.damaged)


def _to_destination(config: Path, destination: Destination, keep: int) -> Made:
    export_id = usecase.new_export_id()
    name = export_name(time.time(), export_id)
    with destination.workplace() as folder:
        file = folder / name

        async def action(vault: Vault, _: KekBook) -> tuple[ExportNote, Counts, list[str]]:
            with new_export(file) as sink:
                await sweep(vault)
                note, counts = await usecase.export_live(vault, sink, export_id)
            _inspected, bad = await usecase.verify_export(vault.source, lambda: chunks_of(file), _SAMPLE)
            return note, counts, bad

        try:
            note, counts, bad = on_store(config, "backup create", action)
        except BaseException:
            # Whatever ended it: what is not known to be good must not count as an export that is kept.
            file.unlink(missing_ok=True)
            raise
        place = destination.deliver(file, note.sha256)
    damaged = tuple(dict.fromkeys([*counts.damaged, *bad]))
    if damaged and keep:
        trouble = "older exports were not removed: they may hold the only good copies of damaged records"
        return Made(note, counts, place, damaged, trouble=trouble)
    try:
        removed = tuple(thin_out(destination, name, keep))
    except (KmsError, OSError) as error:
        why = error.detail if isinstance(error, KmsError) else error.strerror
        return Made(note, counts, place, damaged, trouble=f"older exports could not be removed: {why}")
    return Made(note, counts, place, damaged, removed)


def _report(made: Made, *, as_json: bool) -> int:
    note, counts = made.note, made.counts
    fields: dict[str, Any] = {
        "file": made.place,
        "export_id": note.export_id,
        "records": counts.records,
        "tombstones": counts.tombstones,
        "kek_versions": sorted(counts.by_version),
        "damaged": list(made.damaged),
        "sha256": note.sha256,
        "removed": list(made.removed),
    }
    show_fields(fields, as_json=as_json)
    if made.sound:
        return 0
    click.echo(f"progressdb-kms: {made.summary}", err=True)
    return INCOMPLETE
