"""Moving in: keys of the older service, from its export into the store, under the ids that they have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.errors import BackupInvalid, InternalError, InvalidThreadId, KmsError
from progressdb_kms.domain.keys import DekRecord, KeyState, NewDek, check_thread_id
from progressdb_kms.domain.older import End, MasterKey, OlderKey, parse_line
from progressdb_kms.ports import Damaged
from progressdb_kms.usecases.exclusive import exclusive
from progressdb_kms.usecases.vault import Sealed, event, same, unwrap_all

if TYPE_CHECKING:
    from progressdb_kms.usecases.keks import KekBook
    from progressdb_kms.usecases.vault import Vault

BATCH: Final = 500
"""Lines that are worked on at a time: what the memory holds of a file of any size."""
CREATED_BY: Final = "migration"


class Mode(StrEnum):
    """What is done about a key of the file."""

    MOVE = "move"
    DRY_RUN = "dry run"
    """Say what moving would do."""
    VERIFY = "verify"
    """Say whether the store has it, and as the same DEK."""


@dataclass(slots=True)
class Moved:
    """What became of a file's lines.

    Attributes:
        read: Lines that are to be keys; each counts in one of those below as well.
        moved: Keys that were not in the store and are now; in a dry run, would be.
        present: Keys that the store has already, as the same DEK.
        destroyed: Keys that were moved earlier, and have been destroyed since; they stay so.
        refused: Lines that were not moved, or keys that the store has otherwise or, verifying, has not.
        unopened: Those of the refused that the master key does not open.
        complete: Whether the file ends as it should, with the number of its lines.
    """

    read: int = 0
    moved: int = 0
    present: int = 0
    destroyed: int = 0
    refused: int = 0
    unopened: int = 0
    complete: bool = False

    def counts(self) -> str:
        """Return the counts for a log."""
        return (
            f"read {self.read}, moved {self.moved}, present {self.present}, destroyed {self.destroyed},"
            f" refused {self.refused}"
        )


@dataclass(frozen=True, slots=True)
class Refused:
    """A line that was not moved.

    Attributes:
        line: Its number, from 1.
        key_id: Its key, empty where the line does not say.
        reason: Why.
    """

    line: int
    key_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Opened:
    """A key of the file with its raw DEK."""

    line: int
    key: OlderKey
    dek: bytes

    def __repr__(self) -> str:
        return f"_Opened(line={self.line})"


class Mover:
    """Moves keys in.

    Args:
        vault: The store.
        keks: Wraps under the active version.
        master: What the older service wrapped under.
        tell: Takes each refused line.
        prefix: Put before the id of a key whose thread nobody knows, to make a thread of its own for it;
            empty to refuse such keys.
        mode: What to do.
    """

    def __init__(
        self,
        vault: Vault,
        keks: KekBook,
        master: MasterKey,
        tell: Callable[[Refused], object],
        *,
        prefix: str = "",
        mode: Mode = Mode.MOVE,
    ) -> None:
        self._vault = vault
        self._keks = keks
        self._master = master
        self._tell = tell
        self._prefix = prefix
        self._mode = mode
        self._report = Moved()
        self._ended: int | None = None
        self._disorder = False

    async def run(self, lines: Iterable[bytes], name: str) -> Moved:
        """Work through an export; every key that is reported as moved or present is durable.

        It writes nothing that is there, so that it can be run again, after a kill too, and goes on.

        Args:
            lines: The export's; one that is too long has to be cut at ``MAX_LINE_BYTES`` and a bit more.
            name: What the file is called in the audit log.

        Raises:
            RotationRunning: A rotation or another such command is running.
            StaleKek, KekUnavailable: The KEKs changed; run it again.
            StoreUnavailable, StoreNotDurable, AuditUnavailable: Not now; run it again.
        """
        if self._mode is not Mode.MOVE:
            return await self._work(lines)
        record = self._vault.audit.record
        async with exclusive(self._vault.ledger, self._vault.owner):
            await record([event(self._vault, "key.migrate", "intent", name)])
            try:
                report = await self._work(lines)
            except KmsError as error:
                detail = f"{name}: {error.code}; {self._report.counts()}"
                await record([event(self._vault, "key.migrate", "failed", detail)])
                raise
            await record([event(self._vault, "key.migrate", "ok", f"{name}; {report.counts()}")])
        return report

    async def _work(self, lines: Iterable[bytes]) -> Moved:
        numbered = enumerate(lines, 1)
        while batch := list(islice(numbered, BATCH)):
            await self._batch(list(self._opened(batch)))
        self._report.complete = self._ended == self._report.read and not self._disorder
        return self._report

    def _opened(self, lines: Iterable[tuple[int, bytes]]) -> Iterator[_Opened]:
        """Yield the keys of some lines that the master key opens; tell of the others."""
        for number, line in lines:
            if not line.strip():
                continue
            self._disorder |= self._ended is not None
            key: OlderKey | End | None = None
            try:
                key = parse_line(line)
                if isinstance(key, End):
                    self._ended = key.keys
                    continue
                self._report.read += 1
                yield _Opened(number, self._placed(key), self._open(key))
            except KmsError as error:
                self._report.read += key is None
                self._refuse(number, key.key_id if isinstance(key, OlderKey) else "", error.detail)

    def _open(self, key: OlderKey) -> bytes:
        try:
            return self._master.unwrap(key.wrapped)
        except KmsError:
            self._report.unopened += 1
            raise

    def _placed(self, key: OlderKey) -> OlderKey:
        if key.thread_id:
            return key
        if not self._prefix:
            raise BackupInvalid(
                "nothing tells its thread: export with the server's data, or say --threadless"
            )
        try:
            thread_id = check_thread_id(self._prefix + key.key_id)
        except InvalidThreadId as error:
            raise BackupInvalid(error.detail) from None
        return OlderKey(key.key_id, thread_id, key.wrapped, key.created_at)

    async def _batch(self, keys: list[_Opened]) -> None:
        missing: list[_Opened] = []
        present: list[tuple[_Opened, DekRecord]] = []
        records = await self._vault.backups.read([each.key.key_id for each in keys])
        for each, record in zip(keys, records, strict=True):
            if record is None:
                missing.append(each)
            elif isinstance(record, Damaged):
                self._refuse(each.line, each.key.key_id, f"its record can't be read: {record.reason}")
            else:
                present.append((each, record))
        if self._mode is Mode.VERIFY:
            for each in missing:
                self._refuse(each.line, each.key.key_id, "the store does not have it")
        elif self._mode is Mode.DRY_RUN:
            self._report.moved += len(missing)
        else:
            present = await self._create(missing, present)
        await self._compare(present)

    async def _create(
        self, missing: list[_Opened], present: list[tuple[_Opened, DekRecord]]
    ) -> list[tuple[_Opened, DekRecord]]:
        """Store keys that are missing, and return those that were there, which are durable by now."""
        # What is there is asked for once more by a call that only answers when it is durable: it may be what
        # a run that was killed has just written.
        new = [*await self._wrapped(missing), *(_again(each, record) for each, record in present)]
        found: list[tuple[_Opened, DekRecord]] = []
        keys = [*missing, *(each for each, _ in present)]
        for number, (each, dek, result) in enumerate(
            zip(keys, new, await self._vault.keys.create(new), strict=True)
        ):
            if isinstance(result, InternalError):
                self._refuse(each.line, each.key.key_id, "the store has it under another thread")
            elif isinstance(result, KmsError):
                raise result
            elif number < len(missing) and result.wrapped == dek.wrapped:
                self._report.moved += 1
            else:
                found.append((each, result))
        return found

    async def _wrapped(self, keys: list[_Opened]) -> list[NewDek]:
        if not keys:
            return []
        names = [(each.key.key_id, each.key.thread_id) for each in keys]
        version, kek_id, blobs = await self._keks.wrap([each.dek for each in keys], names)
        sealed = [Sealed(*name, blob) for name, blob in zip(names, blobs, strict=True)]
        for each, check in zip(keys, await unwrap_all(self._vault.source, sealed), strict=True):
            if not isinstance(check, bytes) or not same(check, each.dek):
                raise BackupInvalid(
                    f"the new wrap of {each.key.key_id} does not unwrap to the same key; it was not written"
                )
        now = int(self._vault.now())
        return [
            NewDek(*name, blob, kek_id, version, each.key.created_at or now, CREATED_BY)
            for each, name, blob in zip(keys, names, blobs, strict=True)
        ]

    async def _compare(self, present: list[tuple[_Opened, DekRecord]]) -> None:
        """Count keys that the store has, if they are the same; nothing is ever written over another."""
        sealed = [Sealed(record.key_id, record.thread_id, record.wrapped) for _, record in present]
        for (each, record), dek in zip(present, await unwrap_all(self._vault.source, sealed), strict=True):
            reason = ""
            if record.thread_id != each.key.thread_id:
                reason = "the store has it under another thread"
            elif record.state is KeyState.DESTROYED:
                self._report.destroyed += 1
                continue
            elif not isinstance(dek, bytes):
                reason = f"the store has it, and it does not unwrap there: {dek.detail}"
            elif not same(dek, each.dek):
                reason = "the store has another key under this id, which was left as it is"
            if reason:
                self._refuse(each.line, each.key.key_id, reason)
            else:
                self._report.present += 1

    def _refuse(self, line: int, key_id: str, reason: str) -> None:
        self._report.refused += 1
        self._tell(Refused(line, key_id, reason))


def _again(each: _Opened, record: DekRecord) -> NewDek:
    """Return what a create takes to find a record as it is."""
    names = (record.key_id, each.key.thread_id, record.wrapped, record.kek_id, record.kek_version)
    return NewDek(*names, record.created_at, record.created_by)
