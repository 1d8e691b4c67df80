"""The chart's tests need helm."""

import pytest

from tests.chart.rendering import HELM, ROOT


def pytest_collection_modifyitems(items):
    """Skip this folder's tests where helm is missing, and say so."""
    if HELM is None:
        for item in items:
            if item.path.is_relative_to(ROOT / "tests" / "chart"):
                item.add_marker(pytest.mark.skip(reason="helm is not on PATH: https://helm.sh"))
