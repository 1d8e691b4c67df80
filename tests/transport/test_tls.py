from __future__ import annotations

import asyncio
import datetime as dt
import socket
import ssl
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509

from progressdb_kms.settings import Limits
from tests.transport import pki
from tests.transport.pki import Ca, client_context

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.conftest import Serve

HOUR = dt.timedelta(hours=1)

# What is reported, and the alert (RFC 8446 6.2) that the client gets; certificates that are refused for their
# names or for having no usage have passed TLS, and their connections are just closed.
REFUSED: dict[str, tuple[str, str, Callable[[Ca], Any]]] = {
    "no certificate": ("no_certificate", "CERTIFICATE_REQUIRED", lambda _: None),
    "another CA": ("unknown_ca", "UNKNOWN_CA", lambda _: Ca("another").client()),
    "another CA of the same name": ("unknown_ca", "UNKNOWN_CA", lambda _: Ca().client()),
    "expired": ("expired", "CERTIFICATE_EXPIRED", lambda ca: ca.issue("late", not_after=pki.NOW - HOUR)),
    "not yet valid": (
        "not_yet_valid",
        "BAD_CERTIFICATE",
        lambda ca: ca.issue("x", not_before=pki.NOW + HOUR),
    ),
    "self-signed": ("self_signed", "UNKNOWN_CA", lambda _: pki.self_signed()),
    "server's usage": ("wrong_usage", "UNSUPPORTED_CERTIFICATE", lambda ca: ca.server()),
    "no usage": ("wrong_usage", "", lambda ca: ca.issue("any", usages=None)),
    "two names": ("identity", "", lambda ca: ca.issue("", (x509.DNSName("a"), x509.DNSName("b")))),
    "no name": ("identity", "", lambda ca: ca.issue(pki.organization("nameless"))),
}


@pytest.mark.parametrize("reason,alert,client", REFUSED.values(), ids=REFUSED)
async def test_refused_certificates(
    serve: Serve, reason: str, alert: str, client: Callable[[Ca], Any]
) -> None:
    """A client without a good certificate reaches no app; it is told why, and reported with its address."""
    running = await serve()
    told = ""
    peer = await running.connect(client(running.ca))
    address = "{}:{}".format(*peer.writer.get_extra_info("sockname"))
    peer.ask("/who")
    try:
        assert await peer.reader.read() == b""
    except ssl.SSLError as error:
        told = error.reason
    except ConnectionError:
        pass  # a connection that passed TLS may be reset
    assert told.endswith(alert)
    assert (await running.events.until("handshake"))[1:] == (reason, address)
    assert running.app.scopes == []
    assert running.server.connections == 0


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2])
async def test_tls_1_2_refused(serve: Serve, version: ssl.TLSVersion) -> None:
    """TLS 1.2 is not spoken, even with a good certificate."""
    running = await serve()
    context = client_context(running.ca, running.ca.client(), running.folder)
    context.maximum_version = version
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await running.connect(None, context=context)
    assert (await running.events.until("handshake"))[1] == "protocol"


async def test_plain_http_on_the_tls_port(serve: Serve) -> None:
    """Plain HTTP on the TLS port is refused as what it is."""
    running = await serve()
    peer = await running.plain_peer()
    peer.ask("/who")
    await peer.end()
    assert (await running.events.until("handshake"))[1] == "protocol"


async def test_a_peer_that_leaves_and_one_that_refuses_us(serve: Serve) -> None:
    """A peer that hangs up, or that does not trust the server, is counted, not taken for an attack."""
    running = await serve()
    peer = await running.plain_peer()
    await peer.close()
    assert (await running.events.until("handshake"))[1] == "other"
    running.events.seen.clear()
    with pytest.raises(ssl.SSLError):
        await running.connect(running.ca.client(), ca=Ca("distrustful"))
    assert (await running.events.until("handshake"))[1] == "other"


async def test_handshake_timeout(serve: Serve) -> None:
    """A peer that does not get on with its handshake is dropped and counted."""
    running = await serve(limits=Limits(handshake_timeout=0.2))
    peer = await running.plain_peer()
    await peer.end()
    assert (await running.events.until("handshake"))[1] == "timeout"


async def test_only_http_1_1_in_alpn_and_no_ticket(serve: Serve) -> None:
    """HTTP/2 is not negotiated, and no session ticket lets a client skip its certificate's verification."""
    running = await serve()
    context = client_context(running.ca, running.ca.client(), running.folder)
    context.set_alpn_protocols(["h2", "http/1.1"])
    peer = await running.connect(None, context=context)
    assert (await peer.get("/who")).status == 200
    tls = peer.writer.get_extra_info("ssl_object")
    assert tls.selected_alpn_protocol() == "http/1.1"
    assert tls.version() == "TLSv1.3"
    assert not tls.session.has_ticket


async def test_reload_gives_new_connections_the_new_set(serve: Serve) -> None:
    """After a reload new connections see the new certificate and CA; an open one that is trusted goes on."""
    running = await serve()
    old = await running.tls_peer()
    assert (await old.get("/who")).status == 200
    before = running.tls.facts.fingerprint

    other = Ca("new CA")
    other.server().write(running.folder, "server")
    running.files.client_ca.write_bytes(other.pem + running.ca.pem)
    assert await running.tls.reload()
    assert running.tls.facts.fingerprint != before
    assert running.events.seen[-1] == ("reloaded", "tls", True, "")

    new = await running.connect(other.client("new.svc"), ca=other)
    assert (await new.get("/who")).json["identity"] == "dns:new.svc"
    assert (await old.get("/who")).status == 200

    running.files.client_ca.write_bytes(other.pem)
    assert await running.tls.reload()
    await running.events.until("closed", "tls", "unknown_ca")
    assert await old.end() == b""
    assert (await new.get("/who")).status == 200

    stale = await running.connect(running.ca.client(), ca=other)
    await stale.end()
    assert (await running.events.until("handshake"))[1] == "unknown_ca"


async def test_broken_reload_keeps_the_last_good_set(serve: Serve) -> None:
    """A set that does not fit together is reported and changes nothing."""
    running = await serve()
    facts, context = running.tls.facts, running.tls.context
    running.files.cert.write_bytes(running.ca.server().pem)
    assert not await running.tls.reload()
    what, ok, detail = running.events.seen[-1][1:]
    assert (what, ok) == ("tls", False)
    assert str(running.files.key) in detail
    assert (running.tls.facts, running.tls.context) == (facts, context)
    assert (await (await running.tls_peer()).get("/who")).status == 200


async def test_handshake_cap_drops_the_oldest(serve: Serve) -> None:
    """Stalled handshakes do not keep a good client out: the oldest gives way, and is counted."""
    running = await serve(limits=Limits(max_handshakes=2, handshake_timeout=60))
    stalled = [await running.plain_peer() for _ in range(6)]
    good = await running.tls_peer()
    assert (await good.get("/who")).status == 200
    assert running.events.seen.count(("refused", "handshakes")) == 5
    for peer in stalled[:4]:
        await peer.end()
    await asyncio.sleep(0)
    assert not stalled[5].reader.at_eof()


async def test_handshakes_dropped_before_they_began(serve: Serve) -> None:
    """Where many connect at one moment, the dropped ones are closed at once, not after handshake_timeout."""
    running = await serve(limits=Limits(max_handshakes=1, handshake_timeout=60))
    assert running.server.tcp_address is not None
    with ExitStack() as stack:
        # Connected by the kernel while the event loop stands still, so that it accepts them all in one turn.
        socks = [stack.enter_context(socket.create_connection(running.server.tcp_address)) for _ in range(3)]
        for sock in socks[:2]:
            sock.settimeout(20)
            with suppress(ConnectionResetError):
                assert await asyncio.to_thread(sock.recv, 1) == b""
        assert running.events.seen == [("refused", "handshakes")] * 2
