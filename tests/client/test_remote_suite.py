"""The provider's promises, kept by the remote ones over TLS and a Unix socket, in both encodings."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from progressdb_kms.client.endpoint import Endpoint, TlsFiles, parse
from progressdb_kms.client.protocol import Encoding
from tests.client.harness import Clock, Facade, build
from tests.client.provider_suite import ProviderSuite
from tests.client.standin import StandIn


class TestOverTls(ProviderSuite):
    """Over mutual TLS."""

    @pytest.fixture(params=["json", "msgpack"])
    async def kms(
        self, request: pytest.FixtureRequest, kind: str, standin: StandIn, files: TlsFiles, clock: Clock
    ) -> AsyncIterator[Facade]:
        """A remote provider."""
        encoding: Encoding = request.param
        async with build(kind, Endpoint(standin.url, tls=files), clock, encoding=encoding) as kms:
            yield kms


class TestOverUnixSocket(ProviderSuite):
    """Over a Unix socket."""

    @pytest.fixture
    async def kms(self, kind: str, unix_standin: StandIn, clock: Clock) -> AsyncIterator[Facade]:
        """A remote provider."""
        async with build(kind, parse(unix_standin.url, TlsFiles()), clock) as kms:
            yield kms
