"""Whatever happens to processes and store: the log is whole, and nothing acknowledged is missing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.audit.reading import verify_store
from progressdb_kms.audit.trimming import Trimmer
from progressdb_kms.domain.audit import VerifyKey
from progressdb_kms.domain.errors import AuditUnavailable
from tests.unit.audit.scene import KEY, Scene, event

pytestmark = pytest.mark.fuzz
PUBLIC = VerifyKey.of(KEY.verify.public)
STEPS = (
    "change",
    "together",
    "refusal",
    "down",
    "up",
    "lose",
    "tick",
    "later",
    "restart",
    "kill",
    "trim",
    "open",
)


class Story:
    """Two processes on one store."""

    def __init__(self, directory: Path) -> None:
        self.scene = Scene(directory)
        self.logs = [self.scene.log("i0"), self.scene.log("i1")]
        self.acknowledged: set[str] = set()
        self.number = 0
        self.trimmed = False

    async def step(self, which: int, what: str) -> None:
        """Do one thing."""
        await getattr(self, f"_{what}")(which)

    async def _together(self, which: int) -> None:
        await asyncio.gather(*(self._change(each) for each in (which, which, 0, 1)))

    async def _refusal(self, which: int) -> None:
        self.number += 1
        await self.logs[which].record([event(self.number, "refused", "refused")])

    async def _down(self, _: int) -> None:
        self.scene.store.down = True

    async def _up(self, _: int) -> None:
        self.scene.store.down = False

    async def _lose(self, _: int) -> None:
        self.scene.store.lose_answer = True

    async def _tick(self, which: int) -> None:
        await self.logs[which].tick()

    async def _later(self, _: int) -> None:
        self.scene.now += 61

    async def _restart(self, which: int) -> None:
        await self.logs[which].close()
        await self._kill(which)

    async def _kill(self, which: int) -> None:
        self.logs[which] = self.scene.log(f"i{which}")

    async def _trim(self, _: int) -> None:
        scene = self.scene
        gone = await Trimmer(KEY, (), scene.store, 10, scene.counts, lambda: scene.now).run()
        self.trimmed = self.trimmed or gone > 0

    async def _open(self, which: int) -> None:
        with contextlib.suppress(AuditUnavailable):
            await self.logs[which].open()

    async def _change(self, which: int) -> None:
        log = self.logs[which]
        self.number += 1
        number = self.number
        try:
            await log.record([event(number, "intent")])
        except AuditUnavailable:
            return
        self.acknowledged.add(f"r{number}")
        await log.record([event(number)])

    async def end(self) -> None:
        """Bring all to an end, and judge."""
        scene = self.scene
        scene.store.down = scene.store.lose_answer = False
        for log in self.logs:
            await log.tick()
            await log.close()
        for key in (KEY.verify, PUBLIC):
            report = await verify_store(scene.store, [key])
            assert report.problems == [], report.problems
        assert scene.counts.told["conflict"] == 0
        assert scene.counts.told["trim refused"] == 0
        report = await scene.verify_directory()
        # What was anchored last of all may be forgotten, and its files are still there.
        assert {problem.kind for problem in report.problems} <= ({"missing_chain"} if self.trimmed else set())
        if not self.trimmed:
            lines = map(json.loads, scene.lines())
            assert self.acknowledged <= {line.get("request_id") for line in lines}


@given(steps=st.lists(st.tuples(st.integers(0, 1), st.sampled_from(STEPS)), max_size=60))
def test_any_story_ends_well(steps: list[tuple[int, str]]) -> None:
    """Changes, outages, lost answers, kills, restarts and trims of two processes."""

    async def tell() -> None:
        with tempfile.TemporaryDirectory() as name:
            story = Story(Path(name))
            for which, what in steps:
                await story.step(which, what)
            await story.end()

    asyncio.run(tell())
