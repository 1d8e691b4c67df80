"""Fuzz one target, guided by coverage; prints how many inputs were tried.

usage: python -m tests.fuzz.run TARGET SECONDS [FOLDER]

Needs atheris (``requirements/fuzz.txt``). Starts from the corpus in the tree; what it finds goes into a
folder of its own, and an input that breaks a promise is written to ``crash-...`` there.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore] # in make fuzz's environment only

with atheris.instrument_imports(include=["progressdb_kms", "h11", "yaml", "hypercorn.protocol.h11"]):
    from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


def main() -> None:
    """Run until the time is over or a promise breaks."""
    name, seconds = sys.argv[1], int(sys.argv[2])
    found = Path(sys.argv[3]) if sys.argv[3:] else Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    found.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={seconds}", "-print_final_stats=1", "-max_len=4096", "-timeout=60"]
    atheris.Setup(
        [sys.argv[0], *limits, f"-artifact_prefix={found}/", str(found), str(CORPUS / name)], TARGETS[name]
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
