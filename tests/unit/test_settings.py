"""The configuration: defaults, and each mistake with what to change."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.bootstrap import expected_store
from progressdb_kms.domain.errors import SettingsInvalid
from progressdb_kms.settings import Settings, Store, load_settings, parse_settings, redact_url

BASE = Path("/etc/kms")


def document(**more: Any) -> dict[str, Any]:
    """Return the least configuration, changed as asked."""
    least: dict[str, Any] = {
        "tls": {"cert": "tls.crt", "key": "tls.key", "client_ca": "ca.crt"},
        "policy": "policy.yaml",
        "kek": {"path": "kek.yaml"},
        "store": {"url": "redis://localhost"},
    }
    return {name: value for name, value in (least | more).items() if value is not ...}


def test_defaults() -> None:
    """What an operator gets who says nothing."""
    settings = parse_settings(document(), BASE)
    every = "0.0.0.0"  # noqa: S104 - compared, not bound
    assert (settings.listen.host, settings.listen.port, settings.listen.unix) == (every, 8443, None)
    assert settings.admin.port == 9090
    assert settings.kek.source == "file"
    assert settings.store.durability == "checked"
    assert not settings.store.allow_data_loss
    assert (settings.limits.plaintext_bytes, settings.limits.batch_body_bytes) == (2**20, 16 * 2**20)
    assert (settings.limits.max_connection_age, settings.limits.batch_items) == (600, 10_000)
    assert (settings.cache.max_stale, settings.drain.delay, settings.destruction.waiting_days) == (30, 5, 30)
    assert (settings.log.level, settings.log.format) == ("info", "json")


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    """And absolute ones stay."""
    file = tmp_path / "kms.yaml"
    file.write_text(
        yaml.safe_dump(document(policy="/abs/policy.yaml", listen={"unix": {"path": "s", "allow_uids": [0]}}))
    )
    settings = load_settings(file)
    assert settings.kek.path == tmp_path / "kek.yaml"
    assert settings.policy == Path("/abs/policy.yaml")
    assert settings.listen.unix is not None
    assert settings.listen.unix.path == tmp_path / "s"


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"policy": ...}, "policy"),
        ({"policy": ""}, "must be a path"),
        ({"policy": 7}, "must be a path"),
        ({"kek": ...}, "kek"),
        ({"kek": {"path": "x", "source": "vault"}}, r"\$\.kek\.source"),
        ({"store": ...}, "store"),
        ({"storage": {}}, "unknown field `storage`"),
        ({"limits": {"body_byte": 1}}, r"unknown field `body_byte` - at `\$\.limits`"),
        ({"limits": {"header_bytes": 1}}, r"header_bytes"),
        ({"limits": {"batch_items": 0}}, r"batch_items"),
        ({"limits": {"body_timeout": 0}}, r"body_timeout"),
        ({"limits": {"body_timeout": "5s"}}, r"body_timeout"),
        ({"cache": {"max_stale": -1}}, r"max_stale"),
        ({"listen": {"port": 70000}}, r"port"),
        ({"listen": {"host": None}}, "needs a host, or a unix socket, or both"),
        ({"tls": ...}, "tls is missing"),
        ({"listen": {"unix": {"path": "s"}}}, "lets nobody in"),
        ({"listen": {"unix": {"path": "s", "mode": "999", "allow_uids": [0]}}}, "mode"),
        ({"store": {"url": "http://x"}}, "store.url must begin with"),
        ({"store": {"url": "redis:x"}}, "store.url must begin with"),
        ({"store": {"url": "redis://x", "durability": "hoped"}}, "durability"),
        ({"audit": {"directory": "log"}}, "audit.directory needs audit.key_file"),
        ({"audit": {"data_plane": "all"}}, "data_plane"),
        ({"store": {"url": "redis://x", "durability": "attested"}}, "attested_reason"),
        (
            {"store": {"url": "redis://x", "durability": "attested", "attested_reason": " "}},
            "attested_reason",
        ),
        ({"store": {"url": "rediss://x", "tls": {"ca": "ca", "cert": "c"}}}, "cert and key together"),
        ({"store": {"url": "redis://x", "min_replicas": 9}}, "min_replicas"),
        ({"destruction": {"waiting_days": 6}}, "waiting_days"),
        ({"destruction": {"waiting_days": 31}}, "waiting_days"),
        ({"log": {"level": "trace"}}, "level"),
    ],
)
def test_mistakes(changed: dict[str, Any], says: str) -> None:
    """Each is refused at start, and the message says where."""
    with pytest.raises(SettingsInvalid, match=says):
        parse_settings(document(**changed), BASE)


def test_the_id_of_the_store(tmp_path: Path) -> None:
    """It is read from its file; a file that is missing or holds something else is refused."""
    path = tmp_path / "store-id"
    settings = parse_settings(document(store={"url": "redis://x", "id_file": "store-id"}), tmp_path)
    with pytest.raises(SettingsInvalid, match=r"can't read store\.id_file"):
        expected_store(settings)
    for bad in (b"", b"AB" * 16, b"ab" * 15, b"\xff" * 32, b"ab" * 16 + b" cd"):
        path.write_bytes(bad)
        with pytest.raises(SettingsInvalid, match="32 hex digits"):
            expected_store(settings)
    path.write_text("ab" * 16 + "\n")
    assert expected_store(settings) == "ab" * 16
    assert expected_store(parse_settings(document(), tmp_path)) == ""


@pytest.mark.parametrize("bad", [None, [], "text", 7])
def test_what_is_no_mapping(bad: Any) -> None:
    """An empty file, a list."""
    with pytest.raises(SettingsInvalid, match="configuration: Expected `object`"):
        parse_settings(bad, BASE)


@pytest.mark.parametrize(
    "good",
    [
        {
            "listen": {"host": None, "unix": {"path": "s", "allow_gids": [7], "mode": "660", "group": "kms"}},
            "tls": ...,
        },
        {"store": {"url": "redis+sentinel://a,b/mymaster", "min_replicas": 1}},
        {"store": {"url": "rediss+cluster://a", "tls": {"ca": "ca", "cert": "c", "key": "k"}}},
        {"store": {"url": "unix:///run/redis.sock"}},
        {"store": {"url": "redis://x", "durability": "attested", "attested_reason": "AOF by contract"}},
        {"cache": {"max_stale": 0}},
        {"audit": {"key_file": "k", "previous_keys": ["a", "b"], "directory": "log", "stream": False}},
    ],
)
def test_what_is_allowed(good: dict[str, Any]) -> None:
    """A socket alone needs no certificates; each kind of store; no stale answers."""
    assert isinstance(parse_settings(document(**good), BASE), Settings)


def test_files_that_are_none(tmp_path: Path) -> None:
    """Missing, not text, not YAML: with the path, and the line where there is one."""
    with pytest.raises(SettingsInvalid, match=r"can't read .*missing.yaml: No such file"):
        load_settings(tmp_path / "missing.yaml")
    file = tmp_path / "kms.yaml"
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SettingsInvalid, match="not valid YAML"):
        load_settings(file)
    file.write_text("a: 1\nb: [")
    with pytest.raises(SettingsInvalid, match="not valid YAML at line 2"):
        load_settings(file)
    file.write_text("a: 1\nb: 2\na: 3")
    with pytest.raises(SettingsInvalid, match="not valid YAML at line 3: a key is given twice"):
        load_settings(file)
    file.write_text("a: !!python/object:os.system x")
    with pytest.raises(SettingsInvalid, match="not valid YAML"):
        load_settings(file)


@pytest.mark.parametrize(
    "url, shown",
    [
        ("redis://user:pass@host:6379/0", "redis://user:***@host:6379/0"),
        ("redis://:pass@host", "redis://:***@host"),
        ("rediss://host:6380", "rediss://host:6380"),
        ("redis+sentinel://u:p@a:1,b:2/name", "redis+sentinel://u:***@a:1,b:2/name"),
    ],
)
def test_a_stores_password_is_not_shown(url: str, shown: str) -> None:
    """Neither in a message nor in a repr."""
    assert redact_url(url) == shown
    assert "pass" not in repr(Store(url=url))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = ["listen", "admin", "tls", "policy", "kek", "store", "limits", "cache", "drain", "log"]


@given(st.dictionaries(st.sampled_from(SECTIONS), json_like, max_size=3))
def test_no_document_breaks_the_parser(changed: dict[str, Any]) -> None:
    """Whatever stands in the file: settings, or SettingsInvalid."""
    with contextlib.suppress(SettingsInvalid):
        assert isinstance(parse_settings(document(**changed), BASE), Settings)


def test_rotation_and_escrow() -> None:
    """A Secret to patch has to be named; recovery keys are paths, and none is said as `none`."""
    settings = parse_settings(document(), BASE)
    assert settings.escrow == "none"
    assert (settings.rotation.distribute, settings.kek.management) == ("patch", "file")
    kek = {"path": "kek.yaml", "management": "kubernetes"}
    with pytest.raises(SettingsInvalid, match=r"needs rotation\.kubernetes"):
        parse_settings(document() | {"kek": kek}, BASE)
    parse_settings(document() | {"kek": kek, "rotation": {"distribute": "external"}}, BASE)
    secret = {"namespace": "kms", "secret": "kek"}
    found = parse_settings(
        document() | {"kek": kek, "rotation": {"kubernetes": secret}}, BASE
    ).rotation.kubernetes
    assert found is not None
    assert found.key == "kek.yaml"
    mistakes: list[Any] = [{"recipients": []}, "off", {}, {"recipients": ["a"], "x": 1}]
    for bad in mistakes:
        with pytest.raises(SettingsInvalid):
            parse_settings(document() | {"escrow": bad}, BASE)
    escrow = parse_settings(document() | {"escrow": {"recipients": ["r.pub"]}}, BASE).escrow
    assert not isinstance(escrow, str)
    assert escrow.recipients == (BASE / "r.pub",)


@pytest.mark.parametrize("workers", [0, 65, "2", 1.5])
def test_impossible_numbers_of_workers(workers: object) -> None:
    """From 1 to 64."""
    with pytest.raises(SettingsInvalid, match="workers"):
        parse_settings(document(workers=workers), BASE)


@pytest.mark.parametrize(
    "section, name", [("limits", "max_connections"), ("limits", "max_handshakes"), ("cache", "max_keys")]
)
def test_what_workers_share_is_enough_for_each(section: str, name: str) -> None:
    """A limit of all together that would leave a worker nothing is refused."""
    parse_settings(document(workers=4, **{section: {name: 4}}), BASE)
    with pytest.raises(SettingsInvalid, match=rf"{section}\.{name} is for all 4 workers together"):
        parse_settings(document(workers=4, **{section: {name: 3}}), BASE)
