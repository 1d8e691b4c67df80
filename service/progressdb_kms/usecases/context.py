"""What the use cases work with, put together once by whoever runs them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from progressdb_kms.usecases.calls import CallLog, Mode
from progressdb_kms.usecases.creation import Creation
from progressdb_kms.usecases.refusals import RefusalLog
from progressdb_kms.usecases.session import PolicyBook

if TYPE_CHECKING:
    from collections.abc import Callable

    from progressdb_kms.ports import AuditLog, BackupStore, KeyStore, Observer, RotationLedger
    from progressdb_kms.usecases.keks import KekBook
    from progressdb_kms.usecases.keycache import DekCache


def boottime() -> float:
    """Return seconds of CLOCK_BOOTTIME: it never jumps and goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits that use cases hold to, in bytes, items, days and seconds, and what is audited of calls."""

    plaintext_bytes: int = 2**20
    batch_items: int = 10_000
    waiting_days: int = 30
    audited_calls: Mode = "off"
    audit_interval: float = 60.0


@dataclass(frozen=True, slots=True)
class Kms:
    """The ports and the memory of one running key service.

    Attributes:
        store: Keeps the records.
        keks: KEK versions, loaded and registered.
        cache: Unwrapped DEKs.
        audit: Where decisions are written.
        observer: Who counts.
        backups: What is known of backups.
        ledger: What is known of rotations.
        policies: The policy in force.
        bounds: Limits.
        refusals: Where refusals gather for the audit log.
        calls: Where encryptions and decryptions do.
        creation: Makes keys, for all callers together.
        now: Gives Unix seconds.
        clock: Gives seconds of CLOCK_BOOTTIME.
        random: Gives that many bytes from a cryptographic generator (SP 800-90A, the kernel's).
    """

    store: KeyStore
    keks: KekBook
    cache: DekCache
    audit: AuditLog
    observer: Observer
    backups: BackupStore
    ledger: RotationLedger
    policies: PolicyBook = field(default_factory=PolicyBook)
    bounds: Bounds = field(default_factory=Bounds)
    now: Callable[[], float] = time.time
    clock: Callable[[], float] = boottime
    random: Callable[[int], bytes] = os.urandom
    refusals: RefusalLog = field(init=False)
    calls: CallLog = field(init=False)
    creation: Creation = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "refusals", RefusalLog(self.audit, self.clock))
        calls = CallLog(self.audit, self.bounds.audited_calls, self.bounds.audit_interval, self.clock)
        object.__setattr__(self, "calls", calls)
        object.__setattr__(self, "creation", Creation(self))
