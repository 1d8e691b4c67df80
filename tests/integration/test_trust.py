"""Client CAs roll and certificates are revoked under traffic, and no allowed client loses a request."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.integration.rolling import RATE, Traffic, gets_in
from tests.integration.world import Instance, World, eventually, issued_for, write_private
from tests.transport.pki import Ca

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(new_world: Callable[..., World]) -> World:
    """Run one service that is told what its client CA has revoked."""
    made = new_world()
    made.store.start()
    write_private(made.root / "crl.pem", made.ca.crl())
    made.instance("a", tls={**made.tls, "client_crl": str(made.root / "crl.pem")}).start()
    return made


def test_a_client_ca_rolls_under_traffic(world: World, service: Instance) -> None:
    """Old CA, both, new CA only: clients that have their new certificate in time notice nothing."""
    old, new = world.ca, Ca("the next CA")
    key_id = service.client("server").create("t:1")["key_id"]
    ca = old
    traffic = Traffic(lambda: service.client("server", ca), key_id)
    late = service.client("server")
    late.get("/healthz").ok()
    try:
        write_private(world.root / "crl.pem", old.crl() + new.crl())
        write_private(world.client_ca_file, new.pem + old.pem)
        eventually(lambda: gets_in(service, new), "both are trusted")
        ca = new
        traffic.renew()
        write_private(world.root / "crl.pem", new.crl())
        write_private(world.client_ca_file, new.pem)
        eventually(lambda: not gets_in(service, old), "the new one alone is trusted")
        eventually(lambda: gets_in(service, new), "the new one is trusted")
        before = traffic.answered
        eventually(lambda: traffic.answered > before + RATE // 5, "goes on")
    finally:
        traffic.stop()
    assert traffic.failed == []
    with pytest.raises(OSError, match=r".*"):
        late._once("GET", "/healthz", None, None)
    service.until("kms_connections_closed_total", lambda closed: closed >= 1, why="unknown_ca")
    write_private(world.root / "crl.pem", old.crl())
    write_private(world.client_ca_file, old.pem)
    eventually(lambda: gets_in(service), "the old one is trusted again")


def test_a_revocation_under_traffic(world: World, service: Instance) -> None:
    """The revoked client's open connection ends and no new one is made; others lose no request."""
    key_id = service.client("server").create("t:1")["key_id"]
    traffic = Traffic(lambda: service.client("server"), key_id)
    gone = service.client("gone")
    gone.get("/healthz").ok()
    try:
        write_private(world.root / "crl.pem", world.ca.crl(issued_for("gone", world.ca)))
        service.until("kms_connections_closed_total", lambda closed: closed == 1, why="revoked")
        with pytest.raises(OSError, match=r".*"):
            gone._once("GET", "/healthz", None, None)
        assert not gets_in(service, name="gone")
        assert service.metric("kms_tls_handshake_refusals_total", reason="revoked") >= 1
        assert service.metric("kms_revoked_certificates") == 1
        before = traffic.answered
        eventually(lambda: traffic.answered > before + RATE // 5, "goes on")
    finally:
        traffic.stop()
    assert traffic.failed == []
