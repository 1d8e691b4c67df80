"""Reads audit logs back: to verify them where they are, and to export them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from progressdb_kms.domain.audit import Roster, VerifyKey
from progressdb_kms.domain.auditreport import AuditReport
from progressdb_kms.domain.auditverify import AuditVerifier
from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.ports.audit import Anchor, AuditStore

_PAGE: Final = 1000
_TRIES: Final = 5


async def records_of(store: AuditStore, anchor: Anchor) -> AsyncIterator[list[bytes]]:
    """Yield the stream's records, in pages, up to where it was when the anchor was read."""
    after = "0-0"
    last = _place(anchor.last_id)
    while page := await store.page(after, _PAGE):
        lines = [line for entry_id, line in page if _place(entry_id) <= last]
        if lines:
            yield lines
        if len(lines) < len(page):
            return
        after = page[-1][0]


async def verify_store(store: AuditStore, keys: Sequence[VerifyKey]) -> AuditReport:
    """Verify the stream against its anchor.

    Raises:
        StoreUnavailable: The store does not answer, or is trimmed all the time.
    """
    for _ in range(_TRIES):
        anchor = await store.anchor()
        verifier = AuditVerifier(keys)
        for text in documents(anchor):
            verifier.anchor(text)
        number = 0
        async for lines in records_of(store, anchor):
            for line in lines:
                number += 1
                verifier.feed(line, "the store's stream", number)
        if _trims(await store.anchor()) == _trims(anchor):
            return verifier.finish()
    raise StoreUnavailable("the audit stream is being trimmed: try again")


def verify_files(
    paths: Iterable[Path], keys: Sequence[VerifyKey], anchor: Anchor | None, *, partial: bool
) -> AuditVerifier:
    """Feed files to a verifier, and the anchor before them; whoever calls finishes.

    Raises:
        OSError: A file can't be read.
    """
    verifier = AuditVerifier(keys, partial=partial)
    for text in documents(anchor) if anchor else ():
        verifier.anchor(text)
    for path in paths:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    verifier.feed(line.rstrip(b"\r\n"), str(path), number)
                elif line:
                    # Never acknowledged: what is fsynced ends with a newline.
                    verifier.report.note(
                        f"{path}:{number}: the last line is torn, by a crash or while being written"
                    )
    return verifier


def files_in(paths: Iterable[Path]) -> list[Path]:
    """Return the files, those of a directory in the order of their names."""
    found: list[Path] = []
    for path in paths:
        found += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return found


async def export(store: AuditStore, write: Callable[[bytes], object]) -> int:
    """Write anchor and records, one line each, and return the number of records.

    Raises:
        StoreUnavailable: The store does not answer, or has been trimmed meanwhile: begin anew.
        OSError: They can't be written.
    """
    anchor = await store.anchor()
    for text in documents(anchor):
        write(text + b"\n")
    count = 0
    async for lines in records_of(store, anchor):
        write(b"".join(line + b"\n" for line in lines))
        count += len(lines)
    if _trims(await store.anchor()) != _trims(anchor):
        raise StoreUnavailable("the audit stream has been trimmed meanwhile: try again")
    return count


def documents(anchor: Anchor) -> list[bytes]:
    """Return the anchor's signed documents."""
    return [text for text in (anchor.roster, *anchor.heads.values(), *anchor.floors.values()) if text]


def _trims(anchor: Anchor) -> int:
    try:
        return Roster.read(anchor.roster).trims
    except ValueError:
        return -1


def _place(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)
