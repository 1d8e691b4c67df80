"""Whole lives: keys, rotations of the KEK, rollbacks, backups, restores and losses, in any order.

Every command stops before each of its calls of the store, so that callers, other commands, kills and leases
that run out come in between anywhere. After each step every key decrypts what was encrypted with it, or is
destroyed for good, its state is the model's, nothing is wrapped below the floor, the census agrees, and no
KEK that anything needs is retired. At the end an operator can finish, rotate and retire whatever was left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from progressdb_kms.domain.keyring import KekState
from progressdb_kms.domain.rotation import Step
from progressdb_kms.store.redis import StoreSettings, open_store
from tests.store import life_house
from tests.store.conftest import VARIANTS, Harness, MemoryHarness, RedisHarness
from tests.store.life_backup_rules import BackupRules
from tests.store.life_key_rules import KeyRules
from tests.store.life_rotation_rules import RotationRules
from tests.store.servers import Server


class WholeLife(KeyRules, RotationRules, BackupRules):
    """All rules, and what an operator does at the end."""

    def set_in_order(self) -> None:
        """Finish what was begun, rotate, and retire every older version: nothing may stand in the way."""
        for actor in list(self.actors):
            self.end(actor)
        self.free_lock()
        rotation = self.run(self.store.rotation_ledger.current())
        if rotation is not None and rotation.step is Step.ROLLBACK:
            self.run(self.house.roll_back(self.gate(), "end"))
        elif rotation is not None:
            self.run(self.house.lead(self.gate(), "end"))
        self.run(self.house.lead(self.gate(), "end"))
        self.lowering = self.mending = True
        self.every_key_is_as_the_model_has_it()
        self.check_copies(self.view())
        for name in self.run(self.store.backups.snapshots()):
            self.run(self.house.purge(self.gate(), name, force=True))
        view = self.view()
        if self.damaged:
            return
        for version, kek in sorted(view.keks.items()):
            if kek.state is KekState.DECRYPT_ONLY:
                self.run(self.house.retire(self.gate(), version))
                self.run(self.house.erase(version))
        self.every_key_is_as_the_model_has_it()


@pytest.mark.fuzz
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_life_of_a_store(
    variant: str, servers: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each step of any order of steps, no key is lost, revived, or wrapped under a KEK that goes."""
    life_house.shrink(monkeypatch.setattr)

    def opened(runner: asyncio.Runner) -> Harness:
        if variant == "memory":
            return MemoryHarness()
        server = servers(variant)
        server.ask("FLUSHALL")
        return RedisHarness(server, runner.run(open_store(StoreSettings(server.url))))

    machine = type("WholeLifeOfVariant", (WholeLife,), {"open_harness": staticmethod(opened)})
    most = settings().max_examples
    run_state_machine_as_test(
        machine, settings=settings(max_examples=most if variant == "memory" else most // 5)
    )
