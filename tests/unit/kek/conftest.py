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
def served_transit() -> Iterator[Transit]:
    """A transit engine, in whatever state the tests leave it."""
    with serving_transit() as engine:
        yield engine


@pytest.fixture
def transit(served_transit: Transit) -> Transit:
    """A transit engine in order."""
    served_transit.sealed = False
    served_transit.binds_aad = True
    served_transit.garbled = None
    served_transit.lease = 3600
    served_transit.tokens = {"root"}
    served_transit.min_decryption.clear()
    return served_transit


@pytest.fixture(scope="session")
def aws() -> Iterator[AwsKms]:
    """AWS KMS, and credentials for it."""
    os.environ.update(CREDENTIALS)
    with serving_aws() as kms:
        yield kms


@pytest.fixture
def engine(transit: Transit) -> Transit:
    """An engine with the key ``k``."""
    transit.keys.setdefault("k", [os.urandom(32)])
    return transit


@pytest.fixture
def keeper(engine: Transit, tmp_path: Path) -> VaultKeeper:
    """Its keeper, which logs in by a token."""
    return VaultKeeper(Vault(address=engine.address, token_file=private(tmp_path / "token", "root\n")))
