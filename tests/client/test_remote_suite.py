"""The provider's promises, kept by the remote ones over TLS and a Unix socket.

In both encodings, and with calls that travel alone and together.
"""

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
        self,
        request: pytest.FixtureRequest,
        kind: str,
        coalesce: bool,
        standin: StandIn,
        files: TlsFiles,
        clock: Clock,
    ) -> AsyncIterator[Facade]:
        """A remote provider."""
        encoding: Encoding = request.param
        endpoint = Endpoint(standin.url, tls=files)
        async with build(kind, endpoint, clock, encoding=encoding, coalesce=coalesce) as kms:
            yield kms


class TestOverUnixSocket(ProviderSuite):
    """Over a Unix socket."""

    @pytest.fixture
    async def kms(self, kind: str, unix_standin: StandIn, clock: Clock) -> AsyncIterator[Facade]:
        """A remote provider."""
        async with build(kind, parse(unix_standin.url, TlsFiles()), clock) as kms:
            yield kms
