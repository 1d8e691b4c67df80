"""Certificates of a release: trusted by real TLS, renewed in time, authorities made once."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import socket
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from progressdb_kms.domain.errors import ProvisionRefused
from progressdb_kms.kek.kubernetes import MADE_BY
from progressdb_kms.provision import run as module
from progressdb_kms.transport.identity import identity_of
from progressdb_kms.transport.issuing import load_certificate, load_certificates, load_key
from tests.provision.conftest import Site
from tests.transport.pki import Ca

DAY = dt.timedelta(days=1)
WANTED: dict[str, Any] = {
    "renew_before": 30,
    "wait": 0,
    "authorities": [
        {"name": "server", "secret": "r-server-ca", "common_name": "R server CA"},
        {"name": "client", "secret": "r-client-ca", "common_name": "R client CA"},
    ],
    "bundles": [{"secret": "r-client-bundle", "authorities": ["client"]}],
    "certificates": [
        {
            "secret": "r-server-tls",
            "authority": "server",
            "usage": "server",
            "dns": ["r.kms.svc", "localhost"],
            "ip": ["127.0.0.1", "::1"],
        },
        {
            "secret": "chat",
            "namespace": "chat",
            "authority": "client",
            "usage": "client",
            "dns": ["chat.default.svc"],
            "keep_key": True,
            "trust": ["server"],
        },
        {
            "secret": "ops",
            "authority": "client",
            "usage": "client",
            "uri": ["spiffe://cluster.local/ns/ops/sa/x"],
            "trust": ["server"],
        },
    ],
}


def at(monkeypatch: pytest.MonkeyPatch, moment: dt.datetime) -> None:
    """Let runs take place at another time."""
    monkeypatch.setattr(module, "_now", lambda: moment.replace(microsecond=0))


def changed(**more: Any) -> dict[str, Any]:
    """Return what is wanted, with changes to its first level."""
    return {**WANTED, **more}


def leaf(number: int, **more: Any) -> dict[str, Any]:
    """Return what is wanted, with changes to one certificate."""
    leaves = list(WANTED["certificates"])
    leaves[number] = {**leaves[number], **more}
    return changed(certificates=leaves)


def write(data: dict[str, bytes], folder: Path) -> Path:
    """Write a Secret as a volume shows it."""
    folder.mkdir(exist_ok=True)
    for name, value in data.items():
        (folder / name).write_bytes(value)
    return folder


def handshake(server: Path, client_ca: Path, client: Path, name: str) -> bytes:
    """Connect both by the strict rules of Python 3.13; return the client's certificate in DER."""
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(client_ca / "ca.crt"))
    serving.load_cert_chain(server / "tls.crt", server / "tls.key")
    calling = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(client / "ca.crt"))
    calling.load_cert_chain(client / "tls.crt", client / "tls.key")
    for context in (serving, calling):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    one, other = socket.socketpair()
    seen: list[bytes] = []

    def serve() -> None:
        with contextlib.suppress(OSError), serving.wrap_socket(one, server_side=True) as stream:
            seen.append(stream.getpeercert(binary_form=True) or b"")
            stream.sendall(b"x")
        one.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with calling.wrap_socket(other, server_hostname=name) as stream:
            assert stream.recv(1) == b"x"
    finally:
        other.close()
        thread.join()
    return seen[0]


async def test_made_and_trusted(site: Site, tmp_path: Path) -> None:
    """What is made passes OpenSSL's strict checks and real handshakes; a second run changes nothing."""
    said = await site.run(certificates=WANTED)
    assert {line for line in said if line.startswith("made")} == {
        f"made Secret {name}"
        for name in (
            "kms/r-server-ca",
            "kms/r-client-ca",
            "kms/r-client-bundle",
            "kms/r-server-tls",
            "chat/chat",
            "kms/ops",
        )
    }
    server = write(site.cluster.data("r-server-tls"), tmp_path / "server")
    bundle = write(site.cluster.data("r-client-bundle"), tmp_path / "bundle")
    server_ca = write(site.cluster.data("r-server-ca"), tmp_path / "ca")
    assert site.cluster.data("r-client-bundle").keys() == {"ca.crt"}
    for name, namespace, identity in (
        ("chat", "chat", "dns:chat.default.svc"),
        ("ops", "kms", "spiffe://cluster.local/ns/ops/sa/x"),
    ):
        client = write(site.cluster.data(name, namespace), tmp_path / name)
        for host in ("r.kms.svc", "localhost", "127.0.0.1"):
            assert str(identity_of(handshake(server, bundle, client, host))) == identity
    for ca, cert, purpose in (
        (server_ca / "tls.crt", server / "tls.crt", "sslserver"),
        (bundle / "ca.crt", tmp_path / "chat" / "tls.crt", "sslclient"),
        (bundle / "ca.crt", tmp_path / "ops" / "tls.crt", "sslclient"),
    ):
        words = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", str(ca), str(cert)]
        done = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    types = {name[1]: secret["type"] for name, secret in site.cluster.secrets.items()}
    assert types.pop("r-client-bundle") == "Opaque"
    assert set(types.values()) == {"kubernetes.io/tls"}
    assert site.cluster.metadata("chat", "chat")["labels"] == {"part": "of"}
    before = site.cluster.revisions()
    assert await site.run(certificates=WANTED) == []
    assert site.cluster.revisions() == before


async def test_the_other_authority_is_not_trusted(site: Site, tmp_path: Path) -> None:
    """A server's certificate is no client's: the CAs are separate."""
    await site.run(certificates=WANTED)
    server = write(site.cluster.data("r-server-tls"), tmp_path / "server")
    bundle = write(site.cluster.data("r-client-bundle"), tmp_path / "bundle")
    wrong = write(
        {**site.cluster.data("r-server-tls"), "ca.crt": site.cluster.data("r-server-ca")["tls.crt"]},
        tmp_path / "wrong",
    )
    with pytest.raises(ssl.SSLError):
        handshake(server, bundle, wrong, "localhost")


async def test_renewed_in_time_and_no_earlier(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves are renewed from `renew_before` on, a pinned client keeps its key, no authority changes."""
    await site.run(certificates=WANTED)
    first = {name: site.cluster.data(name[1], name[0]) for name in site.cluster.secrets}
    end = load_certificate(first["kms", "r-server-tls"]["tls.crt"]).not_valid_after_utc
    at(monkeypatch, end - 30 * DAY - dt.timedelta(minutes=1))
    assert await site.run(certificates=WANTED) == []
    at(monkeypatch, end - 29 * DAY)
    said = await site.run(certificates=WANTED)
    assert len(said) == 3
    assert all("it was to end soon; valid until" in line for line in said)
    second = {name: site.cluster.data(name[1], name[0]) for name in site.cluster.secrets}
    assert {name for name in first if first[name] != second[name]} == {
        ("kms", "r-server-tls"),
        ("chat", "chat"),
        ("kms", "ops"),
    }
    assert second["chat", "chat"]["tls.key"] == first["chat", "chat"]["tls.key"]
    assert second["kms", "ops"]["tls.key"] != first["kms", "ops"]["tls.key"]
    assert load_certificate(second["kms", "ops"]["tls.crt"]).not_valid_after_utc == end + 61 * DAY
    assert await site.run(certificates=WANTED) == []


@pytest.mark.parametrize(
    "more",
    [
        {"dns": ["chat.other.svc"]},
        {"common_name": "chat"},
        {"dns": [], "common_name": "chat.default.svc"},
        {"authority": "server"},
        {"usage": "server"},
    ],
)
async def test_other_names_are_issued_anew(site: Site, more: dict[str, Any]) -> None:
    """A certificate that is not what is wanted any more is replaced; one that is, is not."""
    await site.run(certificates=WANTED)
    before = site.cluster.revisions()
    said = await site.run(certificates=leaf(1, **more))
    assert len(said) == 1
    assert {name for name, at in site.cluster.revisions().items() if before[name] != at} == {("chat", "chat")}
    assert await site.run(certificates=leaf(1, **more)) == []


@pytest.mark.parametrize("damage", [{"tls_crt": b""}, {"tls_crt": b"x"}, {"tls_key": b""}])
async def test_a_damaged_leaf_is_issued_anew(site: Site, damage: dict[str, bytes]) -> None:
    """As one does by hand to renew it: its certificate is emptied."""
    await site.run(certificates=WANTED)
    site.cluster.set("ops", "kms", **damage)
    await site.run(certificates=WANTED)
    data = site.cluster.data("ops")
    assert load_certificate(data["tls.crt"]).public_key() == load_key(data["tls.key"]).public_key()


async def test_a_pinned_key_is_never_replaced(site: Site) -> None:
    """With its key damaged, a client whose key is to be kept is refused, and told what to do."""
    await site.run(certificates=WANTED)
    key = site.cluster.data("chat", "chat")["tls.key"]
    site.cluster.set("chat", "chat", tls_crt=b"")
    await site.run(certificates=WANTED)
    assert site.cluster.data("chat", "chat")["tls.key"] == key
    site.cluster.set("chat", "chat", tls_key=b"x")
    with pytest.raises(ProvisionRefused, match="pin that one"):
        await site.run(certificates=WANTED)


async def test_a_ca_is_replaced_without_a_gap(site: Site, tmp_path: Path) -> None:
    """As docs/ca-rollover.md tells: first trusted beside the old one, then signing, then alone."""
    await site.run(certificates=WANTED)
    old = site.cluster.data("r-server-ca")
    await site.run(
        certificates=changed(
            authorities=[
                *WANTED["authorities"],
                {"name": "next", "secret": "next", "common_name": "next CA"},
            ]
        )
    )
    new = site.cluster.data("next")
    site.cluster.set("r-server-ca", ca_crt=new["tls.crt"])
    said = await site.run(certificates=WANTED)
    assert sorted(line.partition(":")[0] for line in said) == [
        "changed Secret chat/chat",
        "changed Secret kms/ops",
    ]
    trusted = site.cluster.data("chat", "chat")["ca.crt"]
    assert trusted == old["tls.crt"] + new["tls.crt"]
    site.cluster.set("r-server-ca", tls_crt=new["tls.crt"], tls_key=new["tls.key"], ca_crt=old["tls.crt"])
    await site.run(certificates=WANTED)
    assert site.cluster.data("chat", "chat")["ca.crt"] == new["tls.crt"] + old["tls.crt"]
    server = write(site.cluster.data("r-server-tls"), tmp_path / "server")
    bundle = write(site.cluster.data("r-client-bundle"), tmp_path / "bundle")
    # A client that has seen the first step only accepts the new server.
    client = write({**site.cluster.data("chat", "chat"), "ca.crt": trusted}, tmp_path / "chat")
    handshake(server, bundle, client, "localhost")
    site.cluster.set("r-server-ca", ca_crt=b"")
    await site.run(certificates=WANTED)
    assert site.cluster.data("chat", "chat")["ca.crt"] == new["tls.crt"]


async def test_a_ca_near_its_end_warns_and_an_expired_one_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves end with their CA and are not renewed each day for it; after its end all is refused."""
    short = [{**authority, "days": 100} for authority in WANTED["authorities"]]
    wanted = changed(authorities=short)
    assert not any("warning" in line for line in await site.run(certificates=wanted))
    now = module._now()
    at(monkeypatch, now + 75 * DAY)
    said = await site.run(certificates=wanted)
    assert sum("warning: the CA in Secret kms/r-server-ca ends on" in line for line in said) == 1
    end = load_certificate(site.cluster.data("r-server-ca")["tls.crt"]).not_valid_after_utc
    assert load_certificate(site.cluster.data("ops")["tls.crt"]).not_valid_after_utc == end
    said = await site.run(certificates=wanted)
    assert all("warning" in line for line in said)
    at(monkeypatch, end)
    with pytest.raises(ProvisionRefused, match=r"the CA has expired.*delete the Secret"):
        await site.run(certificates=wanted)


@pytest.mark.parametrize("damage", [{"tls_crt": b"x"}, {"tls_key": b""}, {"tls_key": b"x"}])
async def test_an_authority_is_never_made_again(site: Site, damage: dict[str, bytes]) -> None:
    """A Secret that holds no usable CA is refused and left as it is."""
    await site.run(certificates=WANTED)
    site.cluster.set("r-client-ca", "kms", **damage)
    before = site.cluster.data("r-client-ca")
    with pytest.raises(ProvisionRefused, match="Secret kms/r-client-ca holds no usable CA"):
        await site.run(certificates=WANTED)
    assert site.cluster.data("r-client-ca") == before


async def test_what_others_made_is_not_changed(site: Site) -> None:
    """A leaf's or bundle's name that somebody else's Secret has is refused; a CA of theirs signs."""
    for name, data in (("ops", {"tls.crt": b"x"}), ("r-client-bundle", {"ca.crt": b"x"})):
        site.cluster.put(name, data)
        with pytest.raises(ProvisionRefused, match=f"Secret kms/{name} was not made by provision"):
            await site.run(certificates=WANTED)
        assert site.cluster.data(name) == data
        del site.cluster.secrets["kms", name]
    ca = await own_authority(site)
    await site.run(certificates=WANTED)
    assert load_certificate(site.cluster.data("ops")["tls.crt"]).issuer == ca.subject
    assert MADE_BY not in site.cluster.metadata("r-client-ca")["annotations"]


async def own_authority(site: Site) -> x509.Certificate:
    """Put a CA into the cluster as an operator would."""
    await site.run(certificates=changed(certificates=[], bundles=[]))
    data = site.cluster.data("r-client-ca")
    site.cluster.secrets.clear()
    site.cluster.put("r-client-ca", data)
    return load_certificate(data["tls.crt"])


@pytest.mark.parametrize("writes", range(1, 7))
async def test_killed_after_any_write_and_run_again(site: Site, writes: int) -> None:
    """Wherever a run ends, the next one goes on; nothing that was made is made again."""
    site.cluster.writes_left = writes
    with contextlib.suppress(ProvisionRefused):
        await site.run(certificates=WANTED)
    site.cluster.writes_left = None
    made = site.cluster.revisions()
    assert len(made) == writes
    await site.run(certificates=WANTED)
    assert len(site.cluster.secrets) == 6
    assert site.cluster.revisions().items() >= made.items()
    assert await site.run(certificates=WANTED) == []


async def test_two_at_once_agree(site: Site, tmp_path: Path) -> None:
    """Runs at the same time leave certificates that belong together."""
    await asyncio.gather(*(site.run(certificates=WANTED) for _ in range(4)))
    assert len([line for line in site.said if line.startswith("made")]) == 6
    server = write(site.cluster.data("r-server-tls"), tmp_path / "server")
    bundle = write(site.cluster.data("r-client-bundle"), tmp_path / "bundle")
    client = write(site.cluster.data("chat", "chat"), tmp_path / "chat")
    handshake(server, bundle, client, "localhost")
    assert await site.run(certificates=WANTED) == []


COPIES: dict[str, Any] = {
    "wait": 0,
    "bundles": [{"secret": "bundle", "secrets": [{"secret": "ca", "key": "tls.crt"}]}],
    "copies": [
        {
            "from": "source",
            "secret": "chat",
            "namespace": "chat",
            "trust": [{"secret": "ca", "key": "tls.crt"}],
        }
    ],
}


async def test_certificates_of_others_are_handed_over(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy follows its source; a bundle takes a new CA up and keeps the old one until it has expired."""
    with pytest.raises(ProvisionRefused, match="there is no Secret kms/ca"):
        await site.run(certificates=COPIES)
    old, new = Ca("one"), Ca("two")
    site.cluster.put("ca", {"tls.crt": old.pem})
    with pytest.raises(ProvisionRefused, match="there is no Secret kms/source"):
        await site.run(certificates=COPIES)
    site.cluster.put("source", {"tls.crt": b"certificate", "tls.key": b"key", "ca.crt": b"leaf's"})
    await site.run(certificates=COPIES)
    assert site.cluster.data("chat", "chat") == {
        "tls.crt": b"certificate",
        "tls.key": b"key",
        "ca.crt": old.pem,
    }
    assert await site.run(certificates=COPIES) == []
    site.cluster.set("source", tls_crt=b"renewed")
    site.cluster.set("ca", tls_crt=new.pem)
    await site.run(certificates=COPIES)
    assert site.cluster.data("chat", "chat") == {"tls.crt": b"renewed", "tls.key": b"key", "ca.crt": new.pem}
    assert site.cluster.data("bundle")["ca.crt"] == new.pem + old.pem
    at(monkeypatch, old.certificate.not_valid_after_utc)
    await site.run(certificates=COPIES)
    assert load_certificates(site.cluster.data("bundle")["ca.crt"]) == [new.certificate]


async def test_sources_are_waited_for(site: Site) -> None:
    """A Secret that something else makes may come later, within the time to wait."""
    site.cluster.put("source", {"tls.crt": b"certificate", "tls.key": b"key"})
    waiting = 0

    def arrive(_method: str, name: tuple[str, str]) -> None:
        nonlocal waiting
        waiting += name == ("kms", "ca")
        if waiting == 2 and ("kms", "ca") not in site.cluster.secrets:
            site.cluster.put("ca", {"tls.crt": Ca("one").pem})

    site.cluster.before = arrive
    said = await site.run(certificates={**COPIES, "wait": 600})
    assert said[0] == "waiting for tls.crt of Secret kms/ca"
    assert ("chat", "chat") in site.cluster.secrets
