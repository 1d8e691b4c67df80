"""Sealed KEKs over every store."""

from __future__ import annotations

import pytest

from progressdb_kms.domain.errors import BackupInvalid
from progressdb_kms.ports.escrow import SealedKek
from tests.store.conftest import Harness, RedisHarness

ONE, TWO = SealedKek("aa" * 32, b"\x00\xff sealed"), SealedKek("bb" * 32, b"another")


async def test_keeps_what_is_sealed(harness: Harness) -> None:
    """What was saved comes back, a later save in place of the earlier, other versions untouched."""
    box = harness.store.escrow
    assert await box.load() == {}
    await box.save(1, [ONE])
    await box.save(2, [TWO])
    await box.save(1, [ONE, TWO])
    assert await box.load() == {1: (ONE, TWO), 2: (TWO,)}


async def test_a_damaged_entry_is_an_error(harness: Harness) -> None:
    """An entry that can't be read is not taken for nothing."""
    if not isinstance(harness, RedisHarness):
        return
    harness.server.ask("HSET", "kms:{ctl}:escrow", "1", "{")
    with pytest.raises(BackupInvalid):
        await harness.store.escrow.load()
