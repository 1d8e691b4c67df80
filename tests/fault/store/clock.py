"""The wall clock of a service, which a test can move."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.fault.power import build_shim
from tests.integration.world import Instance

HOUR = 3600
SOURCE = Path(__file__).with_name("clock_jump.c")


class Clock:
    """A wall clock for services that are started with it.

    Args:
        folder: Where the shim and the offset are.
    """

    def __init__(self, folder: Path) -> None:
        self._offset = folder / "clock-offset"
        self._shim = build_shim(folder, SOURCE)
        self.jump(0)

    def give_to(self, instance: Instance) -> None:
        """Let an instance that is not started yet have this clock."""
        environment = {"LD_PRELOAD": str(self._shim), "CLOCK_JUMP_FILE": str(self._offset)}
        instance.python = (sys.executable, {**os.environ, **environment})

    def jump(self, seconds: int) -> None:
        """Set it so many seconds off the true time."""
        fresh = self._offset.with_suffix(".new")
        fresh.write_text(str(seconds))
        fresh.replace(self._offset)
