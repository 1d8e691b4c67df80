"""Readings and sealings of KEKs are written down before they happen."""

from __future__ import annotations

import pytest

from progressdb_kms.audit.escrow import AuditedEscrowBox
from progressdb_kms.domain.errors import AuditUnavailable, StoreUnavailable
from progressdb_kms.ports.escrow import SealedKek
from progressdb_kms.store.memory_escrow import MemoryEscrowBox
from tests.unit.helpers import Trail

SEALED = SealedKek("ab" * 32, b"secret sealed bytes")


class Refusing(Trail):
    """An audit log that can't be written."""

    async def record(self, _events: object) -> None:
        """Refuse."""
        raise AuditUnavailable


async def test_both_are_told() -> None:
    """With versions and recovery keys, never with what is sealed."""
    trail = Trail()
    box = AuditedEscrowBox(MemoryEscrowBox(), trail, "uid:0", reads=True)
    await box.save(1, [SEALED])
    assert await box.load() == {1: (SEALED,)}
    assert trail.said() == [
        ("kek.escrow", "intent"),
        ("kek.escrow", "ok"),
        ("kek.escrow-read", "intent"),
        ("kek.escrow-read", "ok"),
    ]
    assert "secret" not in repr(trail.events)
    assert trail.events[0].detail == "KEK version 1 to abababababababab"


async def test_a_rotation_does_not_tell_its_look_ups() -> None:
    """It reads the escrow only to see what is missing."""
    trail = Trail()
    await AuditedEscrowBox(MemoryEscrowBox(), trail, "uid:0", reads=False).load()
    assert trail.events == []


async def test_nothing_happens_untold() -> None:
    """Neither is done while the log can't be written."""
    inner = MemoryEscrowBox()
    box = AuditedEscrowBox(inner, Refusing(), "uid:0", reads=True)
    with pytest.raises(AuditUnavailable):
        await box.save(1, [SEALED])
    with pytest.raises(AuditUnavailable):
        await box.load()
    assert await inner.load() == {}


async def test_a_failure_is_told() -> None:
    """The store is away: the sealing failed."""

    class Away(MemoryEscrowBox):
        async def save(self, _version: int, _sealed: object) -> None:
            raise StoreUnavailable

    trail = Trail()
    with pytest.raises(StoreUnavailable):
        await AuditedEscrowBox(Away(), trail, "uid:0", reads=True).save(1, [SEALED])
    assert trail.said() == [("kek.escrow", "intent"), ("kek.escrow", "failed")]
