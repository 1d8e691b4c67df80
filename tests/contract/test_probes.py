"""The plain probe port: three paths and no more, and metrics that give nothing away."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.contract.dev_service import DevService
from tests.contract.wire_client import Client, b64


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_a_healthy_service_is_live_and_ready(admin: Client, path: str) -> None:
    """Both probes answer 200."""
    assert admin.get(path).status == 200


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "/"),
        ("GET", "/healthz"),
        ("GET", "/openapi.json"),
        ("GET", "/get_wrapped?key_id=k_1"),
        ("GET", "/v1/keys"),
        ("GET", "/v1/keks"),
        ("POST", "/create_dek_for_thread"),
        ("POST", "/encrypt"),
        ("POST", "/decrypt"),
        ("GET", "/metrics/"),
        ("GET", "/livez/x"),
        ("GET", "//metrics"),
        ("GET", "/debug"),
    ],
)
def test_nothing_else_is_served_without_tls(admin: Client, method: str, path: str) -> None:
    """Any other path is 404 on the probe port."""
    assert admin.request(method, path, b"{}" if method == "POST" else None).status == 404


def test_the_probe_paths_are_not_on_the_tls_port(operator: Client) -> None:
    """Metrics and probes live on the probe port alone."""
    for path in ("/livez", "/readyz", "/metrics"):
        assert operator.get(path).status == 404


def test_metrics_are_in_prometheus_text_format(admin: Client, server: Client, key_id: str) -> None:
    """The page parses, every family has a help text, and the requests just made are counted."""
    server.encrypt(key_id, b"m")
    answer = admin.get("/metrics")
    assert answer.status == 200
    assert answer.media_type in {"text/plain", "application/openmetrics-text"}
    families = {family.name: family for family in text_string_to_metric_families(answer.body.decode())}
    ours = {name: family for name, family in families.items() if name.startswith("kms_")}
    assert ours
    assert all(family.documentation for family in ours.values())
    assert all(re.fullmatch(r"kms_[a-z0-9_]+", name) for name in ours)
    counted = [sample for family in ours.values() for sample in family.samples if sample.labels.get("route")]
    assert any(sample.labels["route"].endswith("/encrypt") and sample.value > 0 for sample in counted)


def test_metrics_name_no_key_thread_identity_or_secret(
    admin: Client, server: Client, operator: Client, thread_id: str, service: DevService
) -> None:
    """After a round trip, a 404, a state change and a refusal the page holds none of what they were about."""
    made = server.create(thread_id)
    key_id = made["key_id"]
    ciphertext = server.encrypt(key_id, b"plain secret text", b"aad secret text")
    server.decrypt(key_id, ciphertext, b"aad secret text")
    operator.get(f"/v1/keys/{key_id}").ok()
    operator.post(f"/v1/keys/{key_id}/disable").ok()
    server.try_decrypt(key_id, ciphertext)
    page = admin.get("/metrics").body.decode()
    for secret in (
        thread_id,
        key_id,
        made["wrapped"],
        b64(ciphertext),
        b64(b"plain secret text"),
        "plain secret",
    ):
        assert secret not in page
    assert not re.search(r"k_[A-Z2-7]{28}", page)
    assert not any(kek in page for kek in keks(service))


def test_the_log_holds_no_secret(server: Client, service: DevService, thread_id: str) -> None:
    """Neither the KEK nor wrapped keys, plaintexts or ciphertexts get into the log."""
    made = server.create(thread_id)
    ciphertext = server.encrypt(made["key_id"], b"a plaintext that nobody logs")
    server.decrypt(made["key_id"], ciphertext)
    log = service.log_text()
    for secret in (made["wrapped"], b64(ciphertext), b64(b"a plaintext that nobody logs"), "nobody logs"):
        assert secret not in log
    assert not any(kek in log for kek in keks(service))


def keks(service: DevService) -> list[str]:
    """Return every hex key in the service's KEK file; there must be one, or the checks would be empty."""
    found = re.findall(r"\b[0-9a-fA-F]{64}\b", Path(service.ready["kek_file"]).read_text("utf-8"))
    assert found
    return found


def test_request_metrics_use_route_templates(admin: Client, operator: Client) -> None:
    """Unknown paths share one label, so that nobody can grow the metrics by asking for nonsense."""
    for n in range(5):
        operator.get(f"/nonsense-{n}")
        operator.get(f"/v1/keys/k_{n}")
    page = admin.get("/metrics").body.decode()
    assert "nonsense" not in page
    assert "k_3" not in page
