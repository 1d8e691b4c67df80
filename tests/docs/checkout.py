"""A checkout for commands that write into it: what git knows, by symbolic links, in a folder of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
_MADE_HERE: Final = frozenset({".git", ".dev", ".venv"})


def make_checkout(directory: Path) -> None:
    """Make it, with this interpreter's environment as the one that `make install` would build.

    Installing is left out: `.ci/run` does it first of all, and it would need a package index.
    """
    for path in ROOT.iterdir():
        if path.name not in _MADE_HERE:
            (directory / path.name).symlink_to(path)
    environment = directory / ".venv"
    environment.mkdir()
    (environment / "bin").symlink_to(Path(sys.executable).parent)
    (environment / ".installed").touch()


def reader(**more: str) -> dict[str, str]:
    """Return the environment of somebody who types commands: nothing of the make that runs these tests."""
    of_make = {"MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "ARGS"}
    return {name: value for name, value in os.environ.items() if name not in of_make} | more
