"""The shim under stores whose power is cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.power import build_shim


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the compiled shim."""
    return build_shim(tmp_path_factory.mktemp("shim"))
