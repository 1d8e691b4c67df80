"""A running development service, in the environment variables that a provider reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from progressdb_kms.client import SyncKmsProvider, open_sync_provider
from tests.client.devservice import running


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The ready file of a running development service."""
    with running(tmp_path_factory.mktemp("dev")) as ready:
        yield ready


@pytest.fixture
def environment(ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Name the service, and the server's certificate, in the environment; return what is named."""
    pair = ready["clients"]["server"]
    named = {
        "PROGRESSDB_KMS_ENDPOINT": ready["url"],
        "PROGRESSDB_KMS_CA": ready["ca"],
        "PROGRESSDB_KMS_CERT": pair["cert"],
        "PROGRESSDB_KMS_KEY": pair["key"],
    }
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    return named


@pytest.fixture
def kms(environment: dict[str, str]) -> Iterator[SyncKmsProvider]:
    """A provider for the service."""
    with open_sync_provider(deadline=20) as provider:
        yield provider
