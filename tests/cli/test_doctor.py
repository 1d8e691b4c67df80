"""`doctor`: a healthy set-up passes, and each thing that an operator gets wrong is found and told."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from progressdb_kms.cli import pki
from progressdb_kms.cli.dev.layout import open_layout, prepare
from progressdb_kms.domain.audit import NOTHING, AuditKey, Chain, Record
from progressdb_kms.domain.keyring import KekInfo, KekState, check_value, kek_id_of
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.ports.audit import AuditBatch, Trim
from progressdb_kms.store.redis import open_store
from progressdb_kms.store.settings import StoreSettings
from tests.cli.conftest import Command
from tests.cli.helpers import GOOD, Dev, running_store


@dataclass
class Site:
    """A configuration with everything that it names, and the command over it."""

    directory: Path
    kms: Command

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.directory / "config.yaml"

    def set(self, *sections: str, **values: object) -> None:
        """Change values of a section of the configuration."""
        document = yaml.safe_load(self.config.read_text())
        section = document
        for name in sections:
            section = section[name]
        section.update(values)
        self.config.write_text(yaml.safe_dump(document))

    def find(self, name: str, result: str, text: str) -> None:
        """Run doctor both ways and expect this finding, with something to do about it."""
        found = self.kms("doctor", "--config", self.config, "--json")
        checks = found.json
        hits = [
            one for one in checks if (one["check"], one["result"]) == (name, result) and text in one["detail"]
        ]
        assert len(hits) == 1, checks
        assert hits[0].keys() == {"check", "result", "detail", "action"}
        fails = [one for one in checks if one["result"] == "fail"]
        assert found.code == (1 if fails else 0)
        lines = self.kms("doctor", "--config", self.config)
        assert lines.code == found.code
        assert len(lines.out.splitlines()) == len(checks)
        assert f"{result.upper():<4}  {name}: {hits[0]['detail']}" in lines.out
        if result == "fail":
            assert hits[0]["action"]
            # What is wrong with one thing is not told of another.
            assert len(fails) == 1, fails


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a durable and empty store."""
    with running_store(tmp_path_factory.mktemp("store"), *GOOD) as path:
        yield path


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A directory in which everything is right."""
    layout = open_layout(tmp_path_factory.mktemp("site") / "s")
    prepare(layout)
    document = yaml.safe_load(layout.config.read_text())
    document["store"]["url"] = f"unix://{store}"
    document["listen"]["port"] = document["admin"]["port"] = 0
    document["listen"]["unix"]["path"] = "kms.sock"
    layout.config.write_text(yaml.safe_dump(document))
    return layout.directory


@pytest.fixture
def site(healthy: Path, tmp_path: Path, kms: Command) -> Site:
    """A copy of it for one test to spoil."""
    return Site(shutil.copytree(healthy, tmp_path / "s"), kms)


def test_a_healthy_setup_passes(site: Site) -> None:
    """Every line is OK, none asks for anything, and the code is 0."""
    found = site.kms("doctor", "--config", site.config, "--json")
    assert found.code == 0
    assert {one["result"] for one in found.json} == {"ok"}
    assert {one["action"] for one in found.json} == {""}
    assert {"configuration", "kek file", "tls", "policy", "listen", "admin", "store", "kek registry"} <= {
        one["check"] for one in found.json
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [", "not valid YAML"),
        ("policy: p\nkek: {path: k}\nstore: {url: 'redis://x'}\nextra: 1\n", "extra"),
    ],
)
def test_configuration(site: Site, text: str, message: str) -> None:
    """A broken configuration is told, and nothing else is, as nothing else can be known."""
    site.config.write_text(text)
    site.find("configuration", "fail", message)


def test_kek_file_mode(site: Site) -> None:
    """A KEK file that others can read."""
    (site.directory / "kek.yaml").chmod(0o644)
    site.find("kek file", "fail", "0644")


def test_kek_file_format(site: Site) -> None:
    """A KEK file that is not one; its text is not shown."""
    (site.directory / "kek.yaml").write_text("master_key_hex: deadbeefdeadbeef\n")
    site.find("kek file", "fail", "64 hex digits")
    assert "deadbeef" not in site.kms("doctor", "--config", site.config).out


def test_kek_file_missing(site: Site) -> None:
    """A KEK file that is not there."""
    (site.directory / "kek.yaml").unlink()
    site.find("kek file", "fail", "No such file")


def test_key_of_another_certificate(site: Site) -> None:
    """Certificate and key that do not belong together."""
    shutil.copy(site.directory / "pki/server.key", site.directory / "pki/kms.key")
    site.find("tls", "fail", "is not the key of")


def test_key_that_others_can_read(site: Site) -> None:
    """A private key with a mode that is too wide."""
    (site.directory / "pki/kms.key").chmod(0o644)
    site.find("tls", "fail", "0644")


def test_certificate_missing(site: Site) -> None:
    """A certificate file that is not there."""
    (site.directory / "pki/kms.crt").unlink()
    site.find("tls", "fail", "kms.crt")


def test_certificate_expired(site: Site) -> None:
    """A server certificate that has expired."""
    pki.issue(site.directory / "pki", "kms", server=True, days=0)
    site.find("tls", "fail", "expired")


def test_certificate_expires_soon(site: Site) -> None:
    """A server certificate that expires within 14 days warns, and is no failure."""
    pki.issue(site.directory / "pki", "kms", server=True, days=13)
    site.find("server certificate", "warn", "expires on")


def test_client_certificate_as_servers(site: Site) -> None:
    """A certificate that is for clients only."""
    pki.issue(site.directory / "pki", "kms")
    site.find("tls", "fail", "serverAuth")


def self_signed(path: Path, *extensions: x509.ExtensionType) -> None:
    """Write a certificate of its own making with exactly these extensions, and its key beside it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "odd")])
    old = x509.load_pem_x509_certificate(path.read_bytes())
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(old.not_valid_before_utc).not_valid_after(old.not_valid_after_utc)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    path.with_suffix(".key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def test_certificate_without_names(site: Site) -> None:
    """A server certificate that names no host."""
    self_signed(site.directory / "pki/kms.crt", x509.ExtendedKeyUsage([x509.OID_SERVER_AUTH]))
    site.find("server certificate names", "fail", "no client accepts it")


def test_certificate_without_usage(site: Site) -> None:
    """A server certificate that does not say that it is one."""
    self_signed(site.directory / "pki/kms.crt", x509.SubjectAlternativeName([x509.DNSName("localhost")]))
    site.find("server certificate usage", "fail", "serverAuth")


def test_client_ca_is_no_ca(site: Site) -> None:
    """A client CA that is a leaf."""
    shutil.copy(site.directory / "pki/server.crt", site.directory / "pki/ca.crt")
    site.find("tls", "fail", "not a CA")


def test_client_ca_expired(site: Site, tmp_path: Path) -> None:
    """A client CA that has expired fails where it is the only one, and warns where it is not."""
    ca = site.directory / "pki/ca.crt"
    good, expired = ca.read_bytes(), pki.init_ca(tmp_path / "old", days=0).cert.read_bytes()
    ca.write_bytes(expired)
    site.find("tls", "fail", "every CA in it has expired")
    ca.write_bytes(good + expired)
    site.find("client CA CN=progressdb-kms development CA", "warn", "expired on")


def test_without_tls_there_is_nothing_to_check(site: Site) -> None:
    """A configuration for the Unix socket alone needs no certificates and no port."""
    site.set("listen", host=None)
    site.set(tls=None)
    site.find("tls", "ok", "Unix socket only")
    assert "  listen:" not in site.kms("doctor", "--config", site.config).out


@pytest.mark.parametrize(
    "text, message",
    [
        ("rules: []\n", "everyone is refused"),
        ("rules: [{identities: ['dns:a'], permissions: ['key:all']}]\n", "unknown permission"),
        ("rules: [\n", "not valid YAML"),
    ],
)
def test_policy(site: Site, text: str, message: str) -> None:
    """A policy that is broken, or grants nobody anything."""
    (site.directory / "policy.yaml").write_text(text)
    site.find("policy", "fail", message)


@pytest.mark.parametrize("section", ["listen", "admin"])
def test_port_in_use(site: Site, section: str) -> None:
    """A port that another program has."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        site.set(section, port=taken.getsockname()[1])
        site.find(section, "fail", "can't listen")


def test_port_in_use_by_the_service_itself(site: Site, dev: Dev) -> None:
    """While the service runs on the configuration, its own ports are no failure."""
    ports = {"listen": dev.ready["url"], "admin": dev.ready["admin_url"]}
    for section, url in ports.items():
        site.set(section, port=int(url.rpartition(":")[2]))
    site.find("listen", "ok", "the service runs")
    site.find("admin", "ok", "the service runs")


def test_directory_of_the_socket_is_missing(site: Site) -> None:
    """A Unix socket in a directory that is not there."""
    site.set("listen", "unix", path="none/kms.sock")
    site.find("listen.unix", "fail", "does not exist")


def test_path_of_the_socket_is_too_long(site: Site) -> None:
    """A Unix socket whose path the kernel does not take."""
    site.set("listen", "unix", path="x" * 108)
    site.find("listen.unix", "fail", "over 107 bytes")


def test_store_away(site: Site, tmp_path: Path) -> None:
    """A store that does not answer."""
    site.set("store", url=f"unix://{tmp_path}/none.sock")
    site.find("store", "fail", "does not answer")


def test_store_url_does_not_show_its_password(site: Site) -> None:
    """The URL is shown without the password in it."""
    site.set("store", url="redis://user:hunter2@127.0.0.1:1")
    site.find("store", "fail", "redis://user:***@127.0.0.1:1")
    assert "hunter2" not in site.kms("doctor", "--config", site.config).out


def test_store_password_file(site: Site) -> None:
    """A password file that is not there fails; one that others can read warns."""
    site.set("store", password_file="password")
    path = site.directory / "password"
    path.write_text("x")
    path.chmod(0o644)
    site.find("store.password_file", "warn", "0644")
    path.unlink()
    site.find("store", "fail", "password_file")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--appendonly", "no", "--appendfsync", "always"], "appendonly"),
        (["--appendonly", "yes", "--appendfsync", "no"], "appendfsync"),
        ([*GOOD, "--no-appendfsync-on-rewrite", "yes"], "no-appendfsync-on-rewrite"),
        ([*GOOD, "--maxmemory-policy", "allkeys-lru"], "noeviction"),
    ],
    ids=["no AOF", "no fsync", "no fsync on rewrite", "eviction"],
)
def test_store_that_can_lose_keys(site: Site, tmp_path: Path, words: list[str], message: str) -> None:
    """Each way in which an acknowledged key can be lost is a failure; allow_data_loss makes it a warning."""
    with running_store(tmp_path, *words) as path:
        site.set("store", url=f"unix://{path}")
        site.find("store durability", "fail", message)
        site.set("store", allow_data_loss=True)
        found = site.kms("doctor", "--config", site.config, "--json")
        assert found.code == 0
        assert any(one["result"] == "warn" and message in one["detail"] for one in found.json)


@pytest.fixture
def used_store(site: Site, tmp_path: Path) -> Iterator[Path]:
    """A store whose keys are under the site's KEK."""

    async def register(path: Path) -> None:
        store = await open_store(StoreSettings(f"unix://{path}"))
        source = FileKekSource(site.directory / "kek.yaml")
        value = await source.check_value(1)
        await store.health.check()
        await store.registry.initialise(
            KekInfo(1, kek_id_of(value), source.kind(1), source.source_key(1), value, KekState.ACTIVE, 1, 1)
        )
        await store.close()

    with running_store(tmp_path, *GOOD) as path:
        asyncio.run(register(path))
        site.set("store", url=f"unix://{path}")
        yield path


def test_kek_is_the_stores(site: Site, used_store: Path) -> None:
    """The loaded KEK is the one under which the store's keys are."""
    site.find("kek registry", "ok", "active version 1")


def test_kek_is_another_stores(site: Site, used_store: Path) -> None:
    """A KEK file that is in order and not the one of this store."""
    other = "0f" * 32
    (site.directory / "kek.yaml").write_text(f"master_key_hex: {other}\n")
    site.find("kek registry", "fail", "KEK version 1 is not the key")
    out = site.kms("doctor", "--config", site.config).out
    assert check_value(bytes.fromhex(other)) not in out


def test_kek_version_is_missing(site: Site, used_store: Path) -> None:
    """A KEK file that lacks the active version."""
    content = yaml.safe_load((site.directory / "kek.yaml").read_text())
    (site.directory / "kek.yaml").write_text(json.dumps({"versions": {2: content["versions"][1]}}))
    site.find("kek registry", "fail", "KEK version 1 (active) is not loaded")


def test_kek_belongs_to_a_store(site: Site, used_store: Path, store: Path) -> None:
    """An empty store, another store and an id that can't be read are found where store.id_file is set."""
    site.set("store", id_file="store-id")
    site.find("kek registry", "fail", "can't read store.id_file")
    (site.directory / "store-id").write_text("not an id\n")
    site.find("kek registry", "fail", "32 hex digits")
    (site.directory / "store-id").write_text("ab" * 16 + "\n")
    site.find("kek registry", "fail", f"belongs to store {'ab' * 16} (store.id_file)")
    site.set("store", url=f"unix://{store}")
    site.find("kek registry", "fail", "the store is empty, but this KEK belongs to store")


def audited(site: Site, **audit: object) -> Path:
    """Give the site an audit key; return its file."""
    key = site.directory / "audit" / "audit.yaml"
    assert site.kms("audit", "keygen", "--out", key.parent).code == 0
    document = yaml.safe_load(site.config.read_text())
    document["audit"] = {"key_file": str(key), **audit}
    site.config.write_text(yaml.safe_dump(document))
    return key


def test_audit_log(site: Site) -> None:
    """A healthy one, a key that others can read, a directory that is not there, and nothing but output."""
    key = audited(site)
    site.find("audit", "ok", "chained")
    site.find("audit anchor", "ok", "0 chains")
    audited_only = yaml.safe_load(site.config.read_text())
    site.set("audit", directory=str(site.directory / "none"))
    site.find("audit", "fail", "can't write to audit.directory")
    audited_only["audit"]["stream"] = False
    site.config.write_text(yaml.safe_dump(audited_only))
    site.find("audit", "warn", "standard output")
    key.chmod(0o644)
    site.find("audit", "fail", "0644")


def test_audit_anchor(site: Site) -> None:
    """What the store vouches for, changed or under another key."""
    audited(site)
    url = yaml.safe_load(site.config.read_text())["store"]["url"]

    async def put(text: bytes) -> None:
        store = await open_store(StoreSettings(url))
        batch = AuditBatch("c", (0, NOTHING), [Record(1, "m", "l", b"")], text, stream=False)
        await store.audit.commit(batch)
        await store.close()

    chain = Chain(AuditKey(b"1" * 32), "c")
    head = chain.head(chain.append({"audit": "x"}), 1.0)
    asyncio.run(put(head))
    try:
        site.find("audit anchor", "warn", "not configured")
    finally:
        asyncio.run(forget(url))


async def forget(url: str) -> None:
    """Take the chain out of the store, which other tests use too."""
    store = await open_store(StoreSettings(url))
    await store.audit.trim(Trim((b"", b"x"), {}, ["c"], ""))
    await store.audit.trim(Trim((b"x", b""), {}, ["c"], ""))
    await store.close()
