"""A service under traffic while its store fails again and again; nothing but the store is ever mended."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.fault.rotation.history import CHANGES, History, Kind, Operation, Outcome, Violation, check_history
from tests.fault.rotation.traffic import Recorder, Traffic, note
from tests.fault.store.scenarios import Scenario
from tests.integration.world import LIMIT, PROMPT_STORE, Instance, World, eventually

KEYS = 200


class Campaign:
    """One run.

    Args:
        kind: The scenario.
        shim: The shim under stores that have one.

    Attributes:
        history: All that was seen.
        recoveries: Seconds from the store's first write after a fault to the service's.
    """

    def __init__(self, kind: type[Scenario], shim: Path) -> None:
        self.world = World()
        self.history = History()
        self.faults = 0
        self.recoveries: list[float] = []
        self._scenario = kind(self.world.root / "s", shim)
        self._late: Recorder | None = None
        self._service = self._instance("a")
        self._scenario.prepare(self._service)
        self._service.start()
        self._pid = self._service.pid
        self._recorder = Recorder(self.history, [self._service])
        sealed = self._recorder.preload(KEYS)
        # Destructions stay scheduled: what is destroyed can't be lost.
        self._traffic = Traffic(self.history, [self._service], sealed, lambda _key_id: None)

    def _instance(self, name: str) -> Instance:
        # With max_stale 0, "nothing succeeds after a disable" is a promise without exception.
        store = {"url": self._scenario.url, **PROMPT_STORE, **self._scenario.settings}
        return self.world.instance(name, cache={"max_stale": 0}, log={"level": "warning"}, store=store)

    def run(self, faults: int) -> None:
        """Let so many faults happen, each after the service works again."""
        self._wait_for_success(time.monotonic())
        while self.faults < faults:
            time.sleep(random.uniform(0.2, 0.8))
            self._scenario.break_it()
            self.faults += 1
            time.sleep(random.uniform(*self._scenario.hold))
            mended = self._scenario.mend()
            recovered = self._wait_for_success(mended)
            if not self._scenario.local:
                self.recoveries.append(recovered - mended)
            eventually(self._scenario.settled, "the store is as before")
            self._traffic.check()

    def _wait_for_success(self, since: float) -> float:
        def first() -> float:
            recent = self.history.operations[-5000:]
            return min((each.ended for each in recent if self._shows(each, since)), default=0.0)

        end = time.monotonic() + LIMIT
        while not (found := first()):
            assert time.monotonic() < end, "the service creates no keys"
            time.sleep(0.02)
        return found

    def _shows(self, each: Operation, since: float) -> bool:
        return (
            each.kind is Kind.CREATE
            and each.outcome is Outcome.OK
            and each.ended > since
            and self._scenario.concerns(each.key_id)
        )

    def finish(self) -> list[Violation]:
        """Stop the traffic and return what is broken, as an instance sees it that has nothing in memory."""
        self._traffic.end()
        eventually(lambda: self._service.probe("/readyz") == 200, "the service is ready")
        if self._service.pid != self._pid:
            note(self.history, "no restart needed", self._service.reasons())
        self._enable_all()
        self._late = Recorder(self.history, [self._instance("late").start()])
        before = len(self.history.operations)
        self._late.decrypt_all()
        for each in self.history.operations[before:]:
            if each.outcome is not Outcome.OK:
                note(self.history, "no acknowledged key is lost", f"{each.key_id}: {each.code}")
        for key_id in self.history.acknowledged():
            done = surely(partial(self._late.encrypt, key_id))
            if done.outcome is not Outcome.OK and done.code != "key_decrypt_only":
                note(self.history, "no acknowledged key is lost", f"{key_id}: {done.code}")
        return check_history(self.history)

    def _enable_all(self) -> None:
        """Give every key back to use, so that all that was sealed can be opened."""
        changed = {each.key_id for each in self.history.operations if each.kind in CHANGES}
        doomed = {each.key_id for each in self.history.operations if each.kind is Kind.SCHEDULE}
        for key_id in changed:
            if key_id in doomed:
                surely(partial(self._recorder.change, Kind.CANCEL, key_id))
            surely(partial(self._recorder.change, Kind.ENABLE, key_id))

    def close(self) -> None:
        """End every process."""
        self._traffic.abandon()
        self._recorder.close()
        if self._late is not None:
            self._late.close()
        for instance in self.world.instances:
            instance.kill()
        self._scenario.close()
        self.world.close()


def surely(operation: Callable[[], Operation]) -> Operation:
    """Return how an operation ended, asked for again while the store, which is mended, takes its time."""
    done: list[Operation] = []

    def told() -> bool:
        done.append(operation())
        return done[-1].outcome is not Outcome.MAYBE

    eventually(told, "an answer that is none of not now")
    return done[-1]


def report(campaign: Campaign, violations: list[Violation]) -> dict[str, Any]:
    """Return the figures of a run."""
    history, seconds = campaign.history, campaign.recoveries
    return {
        "faults": campaign.faults,
        "operations": len(history.operations),
        "answered 503 or not at all": sum(each.outcome is Outcome.MAYBE for each in history.operations),
        "acknowledged keys": len(history.acknowledged()),
        "ciphertexts": len(history.sealed()),
        "lost": sum(each.promise == "no acknowledged key is lost" for each in violations),
        "wrong": sum(each.promise == "ciphertexts decrypt" for each in violations),
        "violations": [f"{each.promise}: {each.text}" for each in violations],
        "recovery, median": round(statistics.median(seconds), 2) if seconds else None,
        "recovery, longest": round(max(seconds), 2) if seconds else None,
    }
