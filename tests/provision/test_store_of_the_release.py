"""A release with a store of its own: passwords, TLS and the KEK in one run, before anything is mounted."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from progressdb_kms.audit.keyfile import load_audit_key, load_public_key
from progressdb_kms.domain.errors import ProvisionRefused, SettingsInvalid, StoreNotDurable
from tests.provision.cluster import Cluster
from tests.provision.conftest import Site
from tests.store.servers import ALWAYS, Server, free_port

ACL = """\
user default off
user kms on #{kms} ~kms:* &* +@all
user probe on #{probe} -@all +ping
"""
PASSWORDS = {"secret": "r-redis-auth", "users": ["kms", "probe"], "acl": ACL}


def sections(folder: Path, port: int) -> dict[str, Any]:
    """Return what makes everything that a store with TLS and users needs, and a KEK in it."""
    config = folder / "config.yaml"
    service = {
        "tls": {"cert": "a", "key": "b", "client_ca": "c"},
        "policy": "policy.yaml",
        "kek": {"path": "kek.yaml"},
        "store": {
            "url": f"rediss://localhost:{port}/0",
            "username": "kms",
            "password_file": "not-mounted-yet",
            "tls": {"ca": "nor-this", "cert": "nor-this", "key": "nor-this"},
        },
    }
    config.write_text(json.dumps(service))
    return {
        "passwords": PASSWORDS,
        "certificates": {
            "authorities": [{"name": "redis", "secret": "r-redis-ca", "common_name": "R Redis CA"}],
            "certificates": [
                {"secret": "r-redis-tls", "authority": "redis", "usage": "server", "dns": ["localhost"]},
                {
                    "secret": "r-redis-client",
                    "authority": "redis",
                    "usage": "client",
                    "dns": ["kms"],
                    "trust": ["redis"],
                },
            ],
        },
        "store": {
            "config": str(config),
            "wait": 600,
            "password": {"secret": "r-redis-auth", "key": "kms"},
            "ca": {"secret": "r-redis-client", "key": "ca.crt"},
            "cert": {"secret": "r-redis-client", "key": "tls.crt"},
            "key": {"secret": "r-redis-client", "key": "tls.key"},
        },
        "kek": {"secret": "r-kek", "management": "create"},
    }


def start_store(cluster: Cluster, folder: Path, port: int) -> Server:
    """Start a store as the chart's is: with users, TLS and client certificates from the Secrets."""
    folder.mkdir()
    for secret in ("r-redis-auth", "r-redis-tls", "r-redis-ca"):
        for name, value in cluster.data(secret).items():
            (folder / f"{secret}.{name}").write_bytes(value)
    options = {
        **ALWAYS,
        "tls-port": str(port),
        "tls-cert-file": str(folder / "r-redis-tls.tls.crt"),
        "tls-key-file": str(folder / "r-redis-tls.tls.key"),
        "tls-ca-cert-file": str(folder / "r-redis-ca.tls.crt"),
        "tls-auth-clients": "yes",
        "aclfile": str(folder / "r-redis-auth.users.acl"),
    }
    command = [
        "redis-server",
        "--port",
        "0",
        "--dir",
        str(folder),
        "--save",
        "",
        "--logfile",
        str(folder / "log"),
    ]
    words = [text for name, value in options.items() for text in (f"--{name}", value)]
    server = Server("redis", folder)
    server.process = subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL)
    return server


@pytest.fixture
def stores() -> Iterator[list[Server]]:
    """Stores of the test, ended after it."""
    made: list[Server] = []
    yield made
    for server in made:
        server.kill()


async def test_one_run_makes_all_that_the_store_and_the_kek_need(site: Site, stores: list[Server]) -> None:
    """The run makes passwords and certificates, waits until the store that needs them runs, and founds it."""
    port = free_port()
    running = asyncio.create_task(site.run(**sections(site.folder, port)))
    while ("kms", "r-redis-client") not in site.cluster.secrets:
        assert not running.done(), running.exception()
        await asyncio.sleep(0.02)
    stores.append(start_store(site.cluster, site.folder / "store", port))
    said = await running
    auth = site.cluster.data("r-redis-auth")
    folder = site.folder / "store"
    for name, value in site.cluster.data("r-redis-client").items():
        (folder / f"client.{name}").write_bytes(value)
    with redis.Redis(
        port=port,
        username="kms",
        password=auth["kms"].decode(),
        ssl=True,
        ssl_ca_certs=str(folder / "client.ca.crt"),
        ssl_certfile=str(folder / "client.tls.crt"),
        ssl_keyfile=str(folder / "client.tls.key"),
    ) as client:
        assert client.hget("kms:{ctl}:schema", "store_id") == site.cluster.data("r-kek")["store-id"]
    for value in (*auth.values(), site.cluster.data("r-redis-client")["tls.key"]):
        assert value.decode() not in "\n".join(said)
    assert re.fullmatch(rb"[A-Za-z0-9_-]{43}", auth["kms"])
    assert await site.run(**sections(site.folder, port)) == []


async def test_passwords_stay_and_the_acl_follows(site: Site) -> None:
    """A user more gets a password, the others keep theirs; another template is rendered with them."""
    await site.run(passwords=PASSWORDS)
    first = site.cluster.data("r-redis-auth")
    digest = hashlib.sha256(first["kms"]).hexdigest()
    assert f"user kms on #{digest} ~kms:* &* +@all\n" in first["users.acl"].decode()
    assert first["kms"] != first["probe"]
    more = {**PASSWORDS, "users": ["kms", "probe", "reload"], "acl": ACL + "user reload on #{reload}"}
    assert await site.run(passwords=more) == ["changed Secret kms/r-redis-auth: passwords were missing"]
    second = site.cluster.data("r-redis-auth")
    assert {name: second[name] for name in ("kms", "probe")} == {
        name: first[name] for name in ("kms", "probe")
    }
    assert (
        second["users.acl"]
        .decode()
        .endswith(f"user reload on #{hashlib.sha256(second['reload']).hexdigest()}\n")
    )
    assert await site.run(passwords=PASSWORDS) == [
        "changed Secret kms/r-redis-auth: the ACL file is another one now"
    ]
    assert site.cluster.data("r-redis-auth")["users.acl"] == first["users.acl"]
    site.cluster.put("r-redis-auth", {"kms": b"x"})
    with pytest.raises(ProvisionRefused, match="was not made by provision"):
        await site.run(passwords=PASSWORDS)


AUDIT = {"secret": "r-audit", "key": "mine.yaml"}


async def test_the_audit_key_is_made_once(site: Site, tmp_path: Path) -> None:
    """With its public half beside it; run again, beside others or over an operator's own, it stays."""
    said = await asyncio.gather(site.run(audit=AUDIT), site.run(audit=AUDIT))
    assert sorted(map(len, said)) == [0, 1]
    first = site.cluster.data("r-audit")
    for name, content in first.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    key = load_audit_key(tmp_path / "mine.yaml").verify
    assert load_public_key(tmp_path / "audit.pub").key_id == key.key_id
    assert await site.run(audit=AUDIT) == []
    assert site.cluster.data("r-audit") == first
    assert first["mine.yaml"].split()[1].decode() not in "\n".join(site.said)
    site.cluster.put("r-own", {"audit.yaml": b"an operator's"})
    assert await site.run(audit={"secret": "r-own"}) == []
    assert site.cluster.data("r-own") == {"audit.yaml": b"an operator's"}


async def test_an_audit_key_that_was_lost_is_not_replaced(site: Site) -> None:
    """A Secret without the key is refused, with what to do, and stays as it is."""
    site.cluster.put("r-audit", {"audit.pub": b"x"})
    with pytest.raises(ProvisionRefused, match=r"holds no audit key under mine\.yaml.*delete the Secret"):
        await site.run(audit=AUDIT)
    assert site.cluster.data("r-audit") == {"audit.pub": b"x"}
    with pytest.raises(SettingsInvalid, match="for the public half"):
        await site.run(audit={**AUDIT, "key": "audit.pub"})


async def test_a_store_that_could_lose_keys_gets_no_kek(
    site: Site, stores: list[Server], tmp_path: Path
) -> None:
    """A store without an append-only file is refused after the time to wait, before a KEK is made."""
    stores.append(Server("redis", tmp_path / "lossy", {"appendonly": "no"}).start())
    wanted = site.kek()
    site.point_at(stores[0].url)
    with pytest.raises(StoreNotDurable, match="appendonly"):
        await site.run(**wanted)
    assert not site.cluster.secrets


def command(site: Site, document: object, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command on a provisioning file."""
    file = site.folder / "provision.yaml"
    file.write_text(json.dumps(document))
    line = [sys.executable, "-m", "progressdb_kms.cli", "provision", "--config", str(file), *words]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_sigterm_ends_a_run_that_waits(site: Site) -> None:
    """A pod that is to go does not wait for the store any longer; its exit code says to run it again."""
    document = site.document(**site.kek(wait=3600))
    site.point_at("unix:///nowhere.sock")
    file = site.folder / "provision.yaml"
    file.write_text(json.dumps(document))
    line = [sys.executable, "-m", "progressdb_kms.cli", "provision", "--config", str(file)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("waiting for the store: ")
        process.terminate()
        assert process.wait(60) == 75
    assert not site.cluster.secrets


def test_the_command(site: Site, tmp_path: Path) -> None:
    """It says what it made; an error is one line, exit code 1, and is left where Kubernetes reads it."""
    log = tmp_path / "termination-log"
    done = command(site, site.document(passwords=PASSWORDS), "--termination-log", str(log))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "made Secret kms/r-redis-auth\nall is there\n"
    assert not log.exists()
    log.touch()
    site.cluster.refuse["GET"] = 403
    failed = command(site, site.document(passwords=PASSWORDS), "--termination-log", str(log))
    assert failed.returncode == 1
    assert failed.stderr.startswith(
        "progressdb-kms: Kubernetes does not let us get Secret kms/r-redis-auth: 403"
    )
    assert failed.stderr.count("\n") == 1
    assert log.read_text().strip() in failed.stderr
    wrong = command(site, site.document(unknown=1))
    assert wrong.returncode == 1
    assert "unknown field `unknown`" in wrong.stderr
