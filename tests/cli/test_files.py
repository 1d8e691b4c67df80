"""`kek init` and `pki`: the commands that make files."""

from __future__ import annotations

import stat
from pathlib import Path

from progressdb_kms.kek.file import FileKekSource
from tests.cli.conftest import Command


def test_kek_init(kms: Command, tmp_path: Path) -> None:
    """It makes a private file that loads, prints the key's public name and no key, and never overwrites."""
    path = tmp_path / "kek.yaml"
    made = kms("kek", "init", "--file", path)
    assert made.code == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert FileKekSource(path).versions() == {1}
    content = path.read_text()
    secret = content.split('"')[1]
    assert len(secret) == 64
    assert secret not in made.out + made.err
    again = kms("kek", "init", "--file", path)
    assert again.code == 1
    assert path.read_text() == content


def test_kek_init_json(kms: Command, tmp_path: Path) -> None:
    """As JSON it names the file, the version and the key's public name."""
    made = kms("kek", "init", "--file", tmp_path / "kek.yaml", "--json").json
    assert made.keys() == {"file", "version", "kek_id"}
    assert made["kek_id"].startswith("kek_")


def test_pki(kms: Command, tmp_path: Path) -> None:
    """The CA is made once; issue makes certificates under it, and says until when they are valid."""
    made = kms("pki", "init", "--dir", tmp_path / "pki", "--json").json
    assert Path(made["key"]).name == "ca.key"
    assert kms("pki", "init", "--dir", tmp_path / "pki").code == 1
    client = kms("pki", "issue", "--dir", tmp_path / "pki", "chat", "--days", "7")
    assert client.code == 0
    assert "valid until" in client.out
    words = ["--server", "--dns", "localhost", "--ip", "127.0.0.1", "--json"]
    server = kms("pki", "issue", "--dir", tmp_path / "pki", "kms", *words).json
    assert Path(server["cert"]).exists()
    assert sorted(path.name for path in (tmp_path / "pki").iterdir()) == [
        "ca.crt",
        "ca.key",
        "chat.crt",
        "chat.key",
        "kms.crt",
        "kms.key",
    ]
