"""The recipe for Django, on a real service and a real SQLite file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def test_the_recipe_keeps_its_promises(ready: dict[str, Any], tmp_path: Path) -> None:
    """Round trip, one provider for each process, plain text refused, moved ciphertexts, 503."""
    pair = ready["clients"]["server"]
    arguments = [str(tmp_path), ready["ca"], pair["cert"], pair["key"], ready["url"]]
    done = subprocess.run(
        [sys.executable, "-m", "tests.recipes.django_run", *arguments],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
