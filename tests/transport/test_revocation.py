"""Client certificates that are revoked, expire, or lose their CA, at the handshake and while connected."""

from __future__ import annotations

import datetime as dt
import time
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from progressdb_kms.domain.errors import TlsInvalid
from progressdb_kms.settings import Tls
from progressdb_kms.transport.tls import build_context
from progressdb_kms.transport.trust import ClientTrust, link_of
from tests.transport import pki
from tests.transport.conftest import eventually
from tests.transport.pki import Ca, client_context, shared_ca

if TYPE_CHECKING:
    from pathlib import Path

    from tests.transport.conftest import Peer, Running, Serve

HOUR = dt.timedelta(hours=1)


async def _refused(running: Running, peer: Peer, reason: str) -> None:
    peer.ask("/who")
    await peer.end()
    assert (await running.events.until("handshake"))[1] == reason
    assert running.app.scopes == []


async def test_a_revoked_certificate_gets_in_nowhere(serve: Serve) -> None:
    """A client whose certificate is on its CA's list reaches no app; others of that CA do."""
    ca = shared_ca()
    revoked = ca.client("gone.svc")
    running = await serve(crl=ca.crl(revoked))
    await _refused(running, await running.connect(revoked), "revoked")
    assert (await (await running.tls_peer()).get("/who")).status == 200


async def test_a_reload_closes_what_it_revokes_and_nothing_else(serve: Serve) -> None:
    """An open connection, idle or in the middle of a request, ends when its certificate is revoked."""
    ca = shared_ca()
    running = await serve(crl=ca.crl())
    revoked = ca.client("gone.svc")
    idle, busy, halfway = [await running.connect(revoked) for _ in range(3)]
    other = await running.tls_peer()
    for peer in (idle, busy, halfway, other):
        assert (await peer.get("/who")).status == 200
    busy.ask("/wait")
    halfway.send(b"POST /who HTTP/1.1\r\nhost:")
    await running.app.waiting.wait()

    assert running.files.client_crl is not None
    running.files.client_crl.write_bytes(ca.crl(revoked))
    assert await running.tls.reload()
    for peer in (idle, busy, halfway):
        assert await peer.end() == b""
    assert (await other.get("/who")).status == 200
    await eventually(lambda: running.events.seen.count(("closed", "tls", "revoked")) == 3)
    assert running.server.connections == 1


async def test_a_connection_ends_with_its_certificate(serve: Serve) -> None:
    """A certificate that expires takes its connection along, without a reload."""
    running = await serve()
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=2)
    peer = await running.connect(running.ca.issue("brief", not_after=soon))
    assert (await peer.get("/who")).status == 200
    assert await peer.end() == b""
    await running.events.until("closed", "tls", "expired")


async def test_a_broken_list_keeps_the_last_good_one(serve: Serve) -> None:
    """A list that can't be used changes nothing: what was revoked stays so, and it is reported."""
    ca = shared_ca()
    revoked = ca.client("gone.svc")
    running = await serve(crl=ca.crl(revoked))
    assert running.files.client_crl is not None
    running.files.client_crl.write_bytes(b"nonsense")
    assert not await running.tls.reload()
    assert running.events.seen[-1][1:3] == ("tls", False)
    await _refused(running, await running.connect(revoked), "revoked")


async def test_an_issuer_without_a_list_in_reach(serve: Serve, tmp_path: Path) -> None:
    """With lists in use, a CA that only its client shows is refused, as nothing says what it has revoked."""
    ca = shared_ca()
    below = ca.intermediate("below")
    issued = below.client()
    cert, key = issued.write(tmp_path, "below")
    cert.write_bytes(issued.pem + below.pem)
    context = client_context(ca, None, tmp_path)
    context.load_cert_chain(cert, key)

    running = await serve(crl=ca.crl())
    await _refused(running, await running.connect(None, context=context), "no_crl")
    running.files.client_ca.write_bytes(ca.pem + below.pem)
    assert await running.tls.reload()
    peer = await running.connect(None, context=context)
    assert (await peer.get("/who")).status == 200


@pytest.mark.parametrize("required", [False, True])
async def test_a_list_past_its_next_update(serve: Serve, required: bool) -> None:
    """It still says who is revoked; where a current one is required, nobody gets in until there is one."""
    ca = shared_ca()
    revoked = ca.client("gone.svc")
    stale = ca.crl(revoked, next_update=pki.NOW - HOUR)
    running = await serve(crl=stale, require_current_crl=required)
    if required:
        await _refused(running, await running.tls_peer(), "stale_crl")
    else:
        assert (await (await running.tls_peer()).get("/who")).status == 200
        peer = await running.connect(revoked)
        await peer.end()
        assert (await running.events.until("handshake"))[1] == "revoked"


def _refusals() -> dict[str, tuple[str, bytes]]:
    ca = shared_ca()
    point = x509.IssuingDistributionPoint(
        full_name=None,
        relative_name=None,
        only_contains_user_certs=True,
        only_contains_ca_certs=False,
        only_some_reasons=None,
        indirect_crl=False,
        only_contains_attribute_certs=False,
    )
    good = ca.crl()
    return {
        "empty": ("no certificate revocation list", b""),
        "a certificate": ("no certificate revocation list", ca.pem),
        "damaged": ("damaged", good[:60] + b"AAAA" + good[64:]),
        "a stranger's": ("signed by none of the CAs", Ca("stranger").crl()),
        "the name of ours, another key": (
            "signed by none of the CAs",
            ca.crl(key=ec.generate_private_key(ec.SECP256R1())),
        ),
        "delta": ("whole list", ca.crl(extension=(x509.DeltaCRLIndicator(3), True))),
        "partial": ("whole list", ca.crl(extension=(point, True))),
        "the second of two": ("signed by none", good + Ca("stranger").crl()),
    }


@pytest.mark.parametrize("says,pem", _refusals().values(), ids=_refusals())
def test_lists_that_are_not_taken(tls: Any, says: str, pem: bytes) -> None:
    """A list that would be believed wrongly, or in part, is refused in a line that names the file."""
    tls.client_crl.write_bytes(pem)
    with pytest.raises(TlsInvalid, match=says) as caught:
        build_context(tls)
    assert str(tls.client_crl) in caught.value.detail


@pytest.fixture
def tls(tmp_path: Path) -> Any:
    """Return a set of files whose list is to be written."""
    cert, key = shared_ca().server().write(tmp_path, "server")
    client_ca = tmp_path / "ca.pem"
    client_ca.write_bytes(shared_ca().pem)
    return Tls(cert=cert, key=key, client_ca=client_ca, client_crl=tmp_path / "crl.pem")


def test_a_revoked_ca_must_leave_the_bundle(tls: Any) -> None:
    """A CA that another one has revoked would be trusted all the same, as what it is: so that is refused."""
    below = shared_ca().intermediate("below")
    tls.client_ca.write_bytes(shared_ca().pem + below.pem)
    tls.client_crl.write_bytes(shared_ca().crl(below.certificate))
    with pytest.raises(TlsInvalid, match=r"CN=below in tls\.client_ca is revoked"):
        build_context(tls)


def test_serials_are_an_issuers_own() -> None:
    """The same serial number of another CA is another certificate."""
    one, two = Ca("one"), Ca("two")
    crl = x509.load_pem_x509_crl(one.crl(one.client()))
    serial = next(iter(crl)).serial_number
    trust = ClientTrust([one.certificate, two.certificate], [(link_of(one.certificate), crl)])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "same")])
    leaf = link_of(two.issue(name).certificate)
    same = type(leaf)(leaf.name, serial, leaf.not_after)
    assert trust.why_not((same, link_of(two.certificate)), time.time()) == ""
    assert trust.why_not((same, link_of(one.certificate)), time.time()) == "revoked"


def test_a_ca_that_was_renewed_with_its_key_is_the_same() -> None:
    """Connections survive a CA certificate's renewal, up to the new one's expiry."""
    old = Ca("ca", not_after=pki.NOW + HOUR)
    renewed = old.intermediate("ca", key=old.key).certificate
    chain = (link_of(old.issue("x", not_after=pki.NOW + 20 * pki.DAY).certificate), link_of(old.certificate))
    trust = ClientTrust([renewed])
    assert trust.why_not(chain, time.time()) == ""
    assert trust.why_not(chain, time.time() + 10 * 86400) == "expired"
