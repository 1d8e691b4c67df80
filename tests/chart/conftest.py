"""The chart's tests need helm."""

import pytest

from tests.chart.rendering import HELM, ROOT


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark this folder's tests `chart`; skip them where helm is missing, and say so."""
    for item in items:
        if item.path.is_relative_to(ROOT / "tests" / "chart"):
            item.add_marker(pytest.mark.chart)
            if HELM is None:
                item.add_marker(pytest.mark.skip(reason="helm is not on PATH: https://helm.sh"))
