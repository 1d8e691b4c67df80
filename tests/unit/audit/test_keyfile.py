"""Files of audit keys: what was made is read, and nothing else; nothing secret is ever shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from progressdb_kms.audit.keyfile import load_audit_key, load_public_key, new_audit_key
from progressdb_kms.domain.errors import AuditKeyInvalid


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A key's two files."""
    text, public, _ = new_audit_key()
    secret = tmp_path / "audit.yaml"
    secret.touch(0o600)
    secret.write_bytes(text)
    (tmp_path / "audit.pub").write_bytes(public)
    return secret, tmp_path / "audit.pub"


def test_both_halves_belong_together(files: tuple[Path, Path]) -> None:
    """The same name; only the secret half checks MACs."""
    key, public = load_audit_key(files[0]), load_public_key(files[1])
    assert key.key_id == public.key_id
    assert public.mac_key == b""
    assert public.signed(b"x", key.sign(b"x"))
    assert not public.signed(b"y", key.sign(b"x"))


@pytest.mark.parametrize(
    "text",
    ["", "audit_key_hex: abc", "master_key_hex: " + "ab" * 32, "audit_key_hex: " + "ab" * 33, "x" * 40],
)
def test_what_is_no_key_is_refused(files: tuple[Path, Path], text: str) -> None:
    """With the file's name and nothing of its text."""
    files[0].write_text(text)
    with pytest.raises(AuditKeyInvalid, match="audit_key_hex with 64 hex digits") as caught:
        load_audit_key(files[0])
    assert "abab" not in str(caught.value)


def test_a_key_that_others_can_read_is_refused(files: tuple[Path, Path]) -> None:
    """As a KEK file would be."""
    files[0].chmod(0o644)
    with pytest.raises(AuditKeyInvalid, match="0644"):
        load_audit_key(files[0])


def test_what_is_no_public_key_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The secret one given by mistake is not shown."""
    with pytest.raises(AuditKeyInvalid, match="not a public key") as caught:
        load_public_key(files[0])
    assert files[0].read_text().split()[-1] not in str(caught.value)
    with pytest.raises(AuditKeyInvalid, match="can't read"):
        load_public_key(tmp_path / "none")
