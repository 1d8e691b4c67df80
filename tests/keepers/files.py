"""Files that only their owner may read."""

from __future__ import annotations

from pathlib import Path


def private(path: Path, text: str) -> Path:
    """Write a file that only its owner may read."""
    path.touch(0o600)
    path.write_text(text)
    return path
