"""Policy and certificates are replaced under a running service, and no connection is dropped."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from cryptography import x509

from tests.contract.wire_client import Client, assert_problem
from tests.integration.world import POLICY, Instance, World, eventually, write_private
from tests.transport.pki import Ca


@contextmanager
def same_connection(client: Client) -> Iterator[Client]:
    """Hold the client to the connection that it has."""
    client.get("/healthz").ok()
    before = client._connection.sock
    yield client
    assert client._connection.sock is before


def test_a_grant_that_is_taken_away_is_gone_on_an_open_connection(service: Instance) -> None:
    """So is one that comes back; a broken policy in between changes nothing but the alert."""
    with (
        same_connection(service.client("server")) as server,
        same_connection(service.client("operator")) as operator,
    ):
        key_id = server.create("t:1")["key_id"]
        body = {"key_id": key_id, "plaintext": ""}

        write_private(service.policy, json.dumps({"rules": POLICY["rules"][1:]}))
        eventually(lambda: server.post("/encrypt", body).status == 403)
        refusal = server.post("/create_dek_for_thread", {"thread_id": "t:1"})
        problem = assert_problem(refusal, 403, "permission_denied")
        assert problem["identity"] == "dns:server"
        operator.encrypt(key_id, b"message")

        write_private(service.policy, 'rules: [{identities: ["dns:*"], permissions: [key:everything]}]')
        service.until("kms_reload_failed", lambda failed: failed == 1, what="policy")
        assert_problem(server.post("/encrypt", body), 403, "permission_denied")
        operator.encrypt(key_id, b"message")
        assert service.probe("/readyz") == 200

        write_private(service.policy, json.dumps(POLICY))
        eventually(lambda: server.post("/encrypt", body).status == 200)
        assert service.metric("kms_reload_failed", what="policy") == 0


def serial(service: Instance) -> int:
    """Return the serial number of the certificate that a new connection is shown."""
    client = service.client("server")
    client.get("/healthz").ok()
    sock = client._connection.sock
    assert isinstance(sock, ssl.SSLSocket)
    der = sock.getpeercert(binary_form=True)
    client.close()
    assert der
    return x509.load_der_x509_certificate(der).serial_number


def test_a_new_server_certificate_is_shown_to_new_connections(world: World, service: Instance) -> None:
    """The open one goes on; a certificate that does not fit its key keeps the last good pair."""
    with same_connection(service.client("server")) as client:
        key_id = client.create("t:1")["key_id"]
        old, fresh, stray = serial(service), world.ca.server(), world.ca.server()
        fresh.write(world.root, "service")
        eventually(lambda: serial(service) == fresh.certificate.serial_number)
        assert old != fresh.certificate.serial_number
        assert service.metric("kms_reload_failed", what="tls") == 0

        (world.root / "service.crt").write_bytes(stray.pem)
        service.until("kms_reload_failed", lambda failed: failed == 1, what="tls")
        assert serial(service) == fresh.certificate.serial_number

        stray.write(world.root, "service")
        eventually(lambda: serial(service) == stray.certificate.serial_number)
        assert service.metric("kms_reload_failed", what="tls") == 0
        client.encrypt(key_id, b"message")


def test_a_new_client_ca_decides_about_new_connections(world: World, service: Instance) -> None:
    """Clients of the new CA get in, those of the old one are refused and counted, and cut off."""
    other = Ca("the next CA")

    def gets_in(ca: Ca) -> bool:
        client = service.client("server", ca)
        try:
            return client.get("/healthz").status == 200
        except OSError:  # a refusal shows as an alert or as a reset
            return False
        finally:
            client.close()

    client = service.client("server")
    client.get("/healthz").ok()
    before = client._connection.sock
    assert (gets_in(world.ca), gets_in(other)) == (True, False)
    write_private(world.client_ca_file, other.pem)
    eventually(lambda: gets_in(other))
    refusals = service.metric("kms_tls_handshake_refusals_total")
    assert not gets_in(world.ca)
    assert service.metric("kms_tls_handshake_refusals_total") == refusals + 1
    assert service.logged("handshake_refused")[-1]["peer"].startswith("127.0.0.1:")
    write_private(world.client_ca_file, other.pem + world.ca.pem)
    eventually(lambda: gets_in(world.ca))
    assert gets_in(other)
    client.get("/healthz").ok()
    assert client._connection.sock is not before
