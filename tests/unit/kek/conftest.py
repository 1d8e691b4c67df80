"""Places that keep KEKs: a token in software, and stand-ins over HTTP for services."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.kek.vault import VaultKeeper
from progressdb_kms.settings.kek import Vault
from tests.keepers.aws import CREDENTIALS, AwsKms, serving_aws
from tests.keepers.files import private
from tests.keepers.softhsm import SoftHsm, make_token
from tests.keepers.transit import Transit, serving_transit


@pytest.fixture(scope="session")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> SoftHsm:
    """One token for all tests: a PKCS#11 library is initialised once in a process."""
    token = make_token(tmp_path_factory.mktemp("hsm"))
    os.environ["SOFTHSM2_CONF"] = str(token.conf)
    return token


@pytest.fixture(scope="session")
def transit() -> Iterator[Transit]:
    """A transit engine."""
    with serving_transit() as engine:
        yield engine


@pytest.fixture(scope="session")
def aws() -> Iterator[AwsKms]:
    """AWS KMS, and credentials for it."""
    os.environ.update(CREDENTIALS)
    with serving_aws() as kms:
        yield kms


@pytest.fixture
def engine(transit: Transit) -> Transit:
    """An engine in order, with the key ``k``."""
    transit.sealed = False
    transit.binds_aad = True
    transit.garbled = None
    transit.lease = 3600
    transit.tokens = {"root"}
    transit.keys.setdefault("k", [os.urandom(32)])
    return transit


@pytest.fixture
def keeper(engine: Transit, tmp_path: Path) -> VaultKeeper:
    """Its keeper, which logs in by a token."""
    return VaultKeeper(Vault(address=engine.address, token_file=private(tmp_path / "token", "root\n")))
