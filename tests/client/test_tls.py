"""Mutual TLS: what is refused and what the caller is told, and certificates that are renewed."""

from __future__ import annotations

import logging
import shutil
import ssl
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from progressdb_kms.client import ConnectionFailed, EndpointInvalid, TlsFailed
from progressdb_kms.client.endpoint import Endpoint, TlsFiles
from progressdb_kms.client.tls import ClientTls, build_context
from tests.client.faults import drop
from tests.client.harness import Clock, Facade, Open, build
from tests.client.pki import Authority, Pair, private_pem
from tests.client.standin import Running, StandIn, server_context


@pytest.fixture
def own(authority: Authority, files: TlsFiles, tmp_path: Path) -> TlsFiles:
    """A client's files of the test's own, to be changed."""
    assert files.cert is not None
    assert files.key is not None
    pair = Pair(tmp_path / "client.crt", tmp_path / "client.key")
    shutil.copy(files.cert, pair.cert)
    shutil.copy(files.key, pair.key)
    return TlsFiles(Path(shutil.copy(authority.cert, tmp_path / "ca.crt")), pair.cert, pair.key)


def renew(authority: Authority, own: TlsFiles) -> None:
    """Put a new certificate and key in place of a client's, as its issuer would."""
    pair = authority.issue("chat-renewed")
    assert own.cert is not None
    assert own.key is not None
    pair.cert.replace(own.cert)
    pair.key.replace(own.key)


# refusals


async def test_no_client_certificate(open_kms: Open, standin: StandIn, files: TlsFiles) -> None:
    """A service that asks for one refuses; the error says what to give, and it is not tried again."""
    kms = open_kms(Endpoint(standin.url, tls=TlsFiles(files.ca)))
    with pytest.raises(TlsFailed, match="give cert and key"):
        await kms.health()


async def test_a_client_certificate_of_another_ca(
    open_kms: Open, standin: StandIn, files: TlsFiles, tmp_path: Path
) -> None:
    """The service does not trust it."""
    pair = Authority(tmp_path, "other").issue("chat")
    with pytest.raises(TlsFailed, match="does not trust the CA"):
        await open_kms(Endpoint(standin.url, tls=TlsFiles(files.ca, pair.cert, pair.key))).health()


async def test_an_expired_client_certificate(
    open_kms: Open, standin: StandIn, files: TlsFiles, authority: Authority
) -> None:
    """The error says to renew it."""
    pair = authority.issue("late", age=timedelta(days=2))
    with pytest.raises(TlsFailed, match="renew it"):
        await open_kms(Endpoint(standin.url, tls=TlsFiles(files.ca, pair.cert, pair.key))).health()


async def test_a_service_of_another_ca(
    open_kms: Open, standin: StandIn, files: TlsFiles, tmp_path: Path
) -> None:
    """The client does not trust it, and sends it nothing."""
    other = Authority(tmp_path, "other")
    with pytest.raises(TlsFailed, match="PROGRESSDB_KMS_CA"):
        await open_kms(Endpoint(standin.url, tls=TlsFiles(other.cert, files.cert, files.key))).health()
    assert standin.seen == []


async def test_a_service_of_another_name(open_kms: Open, authority: Authority, files: TlsFiles) -> None:
    """A certificate for another host is refused, though its CA is right."""
    pair = authority.issue("elsewhere.example", server=True)
    port_names = Running(StandIn(tls=server_context(pair, authority.cert)))
    with port_names as standin, pytest.raises(TlsFailed, match="issued for this host name"):
        await open_kms(Endpoint(standin.url, tls=files)).health()


async def test_an_older_tls(
    open_kms: Open, authority: Authority, service_pair: Pair, files: TlsFiles
) -> None:
    """TLS 1.2 is not spoken."""
    context = server_context(service_pair, authority.cert)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with Running(StandIn(tls=context)) as standin, pytest.raises(TlsFailed, match=r"TLS 1\.3"):
        await open_kms(Endpoint(standin.url, tls=files)).health()


async def test_a_port_without_tls(open_kms: Open, files: TlsFiles) -> None:
    """Plain HTTP on the other side is no service, and gets no request in the clear."""
    with Running(StandIn()) as standin:
        with pytest.raises((TlsFailed, ConnectionFailed)):
            await open_kms(Endpoint(standin.url, tls=files)).health()
        assert standin.seen == []


async def test_a_callers_own_tls_error_is_not_blamed(kms: Facade, standin: StandIn) -> None:
    """A connection that breaks while the caller is handling a TLS error of its own is just broken."""
    standin.always = drop
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata="no certificate")
    except ssl.SSLError:
        with pytest.raises(ConnectionFailed):
            await kms.health()


@pytest.mark.parametrize("given,hint", [(False, "give cert and key"), (True, "refuses the certificate")])
async def test_a_refusal_that_is_lost_is_hinted_at(
    open_kms: Open, authority: Authority, service_pair: Pair, files: TlsFiles, given: bool, hint: str
) -> None:
    """A connection that only breaks says what may be behind it, by what the client has."""
    context = server_context(service_pair, authority.cert)
    context.verify_mode = ssl.CERT_OPTIONAL
    with Running(StandIn(tls=context, always=drop)) as standin:
        own = files if given else TlsFiles(files.ca)
        with pytest.raises(ConnectionFailed, match=hint):
            await open_kms(Endpoint(standin.url, tls=own)).health()


# files


@pytest.mark.parametrize("which", ["ca", "cert", "key"])
@pytest.mark.parametrize("fault", ["missing", "garbage"])
def test_a_file_that_can_not_be_used_is_named(own: TlsFiles, which: str, fault: str) -> None:
    """The error names the file and its variable, and nothing of its content."""
    path: Path = getattr(own, which)
    path.unlink()
    if fault == "garbage":
        path.write_text("SECRET-MARK")
    with pytest.raises(EndpointInvalid) as caught:
        build_context(own)
    assert str(path) in str(caught.value)
    assert f"PROGRESSDB_KMS_{which.upper()}" in str(caught.value)
    assert "SECRET-MARK" not in str(caught.value)


def test_a_key_of_another_certificate(own: TlsFiles) -> None:
    """Certificate and key have to belong together."""
    assert own.key is not None
    own.key.write_bytes(private_pem(ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(EndpointInvalid, match="do not belong together"):
        build_context(own)


def test_an_encrypted_key(own: TlsFiles) -> None:
    """Nobody is asked for a password on a terminal."""
    assert own.key is not None
    own.key.write_bytes(private_pem(ec.generate_private_key(ec.SECP256R1()), b"password"))
    with pytest.raises(EndpointInvalid, match="encrypted"):
        build_context(own)


def test_a_key_may_stand_in_the_certificates_file(own: TlsFiles) -> None:
    """One PEM file with both is enough."""
    assert own.cert is not None
    assert own.key is not None
    own.cert.write_bytes(own.cert.read_bytes() + own.key.read_bytes())
    build_context(TlsFiles(own.ca, own.cert))


def test_the_context_is_strict(files: TlsFiles) -> None:
    """TLS 1.3, certificates required, host names checked against SANs alone."""
    context = build_context(files)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_3
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert not context.hostname_checks_common_name
    assert context.cert_store_stats()["x509_ca"] == 1


def test_without_a_ca_the_systems_are_trusted() -> None:
    """A service may have a public certificate."""
    context = build_context(TlsFiles())
    assert context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED


# renewal


async def test_a_renewed_certificate_is_used(
    open_kms: Open, standin: StandIn, authority: Authority, own: TlsFiles, clock: Clock
) -> None:
    """From the next look on, calls travel over new connections with the new certificate."""
    kms = open_kms(Endpoint(standin.url, tls=own))
    await kms.health()
    renew(authority, own)
    await kms.health()
    clock.now += 1
    await kms.health()
    await kms.health()
    first, early, late, again = [request.serial for request in standin.seen]
    assert first == early != late == again
    assert len(standin.connections) == 2


async def test_a_renewal_fails_no_call_under_way(
    standin: StandIn, authority: Authority, own: TlsFiles, clock: Clock
) -> None:
    """A call that began with the old certificate finishes on its connection."""
    release, waiting = threading.Event(), threading.Event()

    def wait(_: object) -> bool:
        waiting.set()
        return release.wait(10)

    provider = build("sync", Endpoint(standin.url, tls=own), clock, deadline=10).provider
    standin.faults.append(wait)
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(provider.health()))
    thread.start()
    assert waiting.wait(10)
    renew(authority, own)
    clock.now += 1
    provider.health()
    release.set()
    thread.join()
    provider.close()
    assert len(results) == 1
    assert standin.seen[0].serial != standin.seen[1].serial


@pytest.mark.parametrize("fault", ["missing", "half-written", "of-another-key"])
async def test_a_broken_renewal_keeps_the_last_good_set(
    open_kms: Open,
    standin: StandIn,
    authority: Authority,
    own: TlsFiles,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    """It is logged once and tried again, until the set is whole."""
    kms = open_kms(Endpoint(standin.url, tls=own))
    await kms.health()
    assert own.cert is not None
    if fault == "missing":
        own.cert.unlink()
    elif fault == "half-written":
        own.cert.write_bytes(own.cert.read_bytes()[:100])
    else:
        authority.issue("chat-other").cert.replace(own.cert)
    with caplog.at_level(logging.WARNING, "progressdb_kms.client"):
        for _ in range(3):
            clock.now += 1
            await kms.health()
    assert len(caplog.records) == 1
    assert "are not used" in caplog.text
    assert "PRIVATE KEY" not in caplog.text
    renew(authority, own)
    clock.now += 1
    await kms.health()
    assert len({request.serial for request in standin.seen[:-1]}) == 1
    assert standin.seen[-1].serial != standin.seen[0].serial


def test_a_swapped_link_is_a_renewal(
    authority: Authority, own: TlsFiles, clock: Clock, tmp_path: Path
) -> None:
    """A Secret volume changes by the swap of one symbolic link, and the files' own paths stay."""
    versions = [tmp_path / "v1", tmp_path / "v2"]
    for folder in versions:
        folder.mkdir()
        pair = authority.issue("chat-linked")
        pair.cert.replace(folder / "tls.crt")
        pair.key.replace(folder / "tls.key")
    data = tmp_path / "data"
    data.symlink_to(versions[0])
    tls = ClientTls(TlsFiles(own.ca, data / "tls.crt", data / "tls.key"), clock)
    before = tls.context()
    fresh = tmp_path / "fresh"
    fresh.symlink_to(versions[1])
    fresh.replace(data)
    assert tls.context() is before
    clock.now += 1
    assert tls.context() is not before


def test_unchanged_files_keep_their_context(own: TlsFiles, clock: Clock) -> None:
    """Nothing is rebuilt, and no connection lost, without a change."""
    tls = ClientTls(own, clock)
    before = tls.context()
    clock.now += 1000
    assert tls.context() is before
