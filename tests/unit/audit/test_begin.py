"""What a service writes down when it starts, and what it says of its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.audit.chained import ChainedAuditLog
from progressdb_kms.audit.keyfile import new_audit_key
from progressdb_kms.audit.stdout import NoAuditLog, StdoutAuditLog
from progressdb_kms.bootstrap.audit import begin, make_audit, verify_keys
from progressdb_kms.domain.errors import AuditKeyInvalid
from progressdb_kms.settings import Settings, parse_settings
from tests.unit.audit.scene import Counts, Scene
from tests.unit.helpers import Trail


def settings(folder: Path, store: dict[str, Any] | None = None, **audit: Any) -> Settings:
    """Return a configuration."""
    document = {
        "tls": {"cert": "c", "key": "k", "client_ca": "a"},
        "policy": "p",
        "kek": {"path": "k"},
        "store": {"url": "redis://x", **(store or {})},
        "audit": audit,
    }
    return parse_settings(document, folder)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """An audit key."""
    path = tmp_path / "audit.yaml"
    path.touch(0o600)
    path.write_bytes(new_audit_key()[0])
    return path


async def test_an_operators_word_is_written_down(tmp_path: Path) -> None:
    """Why the store may be trusted unasked, and that it may lose data."""
    trail = Trail()
    word = {"durability": "attested", "attested_reason": "AOF by contract", "allow_data_loss": True}
    await begin(settings(tmp_path, word), trail, "i1")
    assert [(event.action, event.identity, event.detail) for event in trail.events] == [
        ("store.attested", "service i1", "AOF by contract"),
        ("store.data-loss-allowed", "service i1", ""),
    ]


async def test_nothing_is_written_where_nothing_is_taken_on_trust(tmp_path: Path) -> None:
    """A store that is asked itself needs no word."""
    trail = Trail()
    await begin(settings(tmp_path), trail, "i1")
    assert trail.events == []


def test_the_log_is_as_configured(tmp_path: Path, key_file: Path) -> None:
    """Chained with a key, printed without, nothing where neither is wanted."""
    scene = Scene()

    def made(**audit: Any) -> object:
        return make_audit(settings(tmp_path, **audit), scene.store, "i", Counts(), scene.output)

    assert isinstance(made(key_file=str(key_file)), ChainedAuditLog)
    assert isinstance(made(), StdoutAuditLog)
    assert isinstance(made(stdout=False), NoAuditLog)
    with pytest.raises(AuditKeyInvalid, match="none"):
        made(key_file="none")


async def test_a_store_that_is_away_does_not_keep_the_service_from_starting(
    tmp_path: Path, key_file: Path
) -> None:
    """Changes are refused until it is back; the word is written then."""
    scene = Scene()
    scene.store.down = True
    chosen = settings(tmp_path, {"allow_data_loss": True}, key_file=str(key_file))
    log = make_audit(chosen, scene.store, "i", Counts(), scene.output)
    assert isinstance(log, ChainedAuditLog)
    await begin(chosen, log, "i")
    scene.store.down = False
    await log.tick()
    await log.close()
    assert [b"store.data-loss-allowed" in line for line in scene.lines()] == [False, True, False]


def test_public_halves_of_earlier_keys_verify_too(tmp_path: Path, key_file: Path) -> None:
    """And are told apart from what is no key."""
    _, public, name = new_audit_key()
    (tmp_path / "old.pub").write_bytes(public)
    own, old = verify_keys(settings(tmp_path, key_file=str(key_file), previous_keys=["old.pub"]))
    assert (bool(own.mac_key), old.key_id, old.mac_key) == (True, name, b"")
    with pytest.raises(AuditKeyInvalid):
        verify_keys(settings(tmp_path, key_file=str(key_file), previous_keys=["audit.yaml"]))
