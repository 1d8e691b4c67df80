"""Alerts and the dashboard speak of metrics that exist."""

import json
import re

from tests.chart.rendering import CHART, ROOT, mode, objects, one

EVERYTHING = mode("certmanager")


def _documented():
    text = (ROOT / "docs" / "operations.md").read_text()
    return set(re.findall(r"`(kms_[a-z_]+)", text))


def _named(text):
    return {re.sub("_bucket$", "", name) for name in re.findall(r"\b(kms_[a-z_]+)", text)}


def test_alerts_name_documented_metrics():
    """Each alert has an expression over documented metrics, a severity, a summary and what to do."""
    rules = one("PrometheusRule", "", objects(EVERYTHING))["spec"]["groups"][0]["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 10
    for rule in rules:
        named = _named(rule["expr"])
        assert named or "kube_" in rule["expr"], rule["alert"]
        assert named <= _documented(), rule["alert"]
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]


def test_alerts_cover_what_the_operations_page_says_to_watch():
    """Every metric with an alert in docs/operations.md has one here."""
    rules = one("PrometheusRule", "", objects(EVERYTHING))["spec"]["groups"][0]["rules"]
    alerted = set().union(*(_named(rule["expr"]) for rule in rules))
    watched = {
        "kms_ready", "kms_store_reachable", "kms_store_problems", "kms_reload_failed",
        "kms_certificate_expiry_timestamp_seconds", "kms_wrapped_key_invalid_total",
        "kms_key_uses_high_total",
        "kms_kek_active_age_seconds", "kms_kek_census", "kms_rotation_running", "kms_rotation_quarantined",
        "kms_tls_handshake_refusals_total", "kms_requests_total",
    }  # fmt: skip
    assert watched <= alerted


def test_alerts_match_the_services_pods():
    """The pattern of pods in the expressions fits names that Deployments give, and no job's."""
    rules = one("PrometheusRule", "", objects(EVERYTHING))["spec"]["groups"][0]["rules"]
    [pattern] = re.findall(r'pod=~"([^"]+)"', rules[0]["expr"])
    assert re.fullmatch(pattern, "kms-progressdb-kms-7d4b9cbf6d-x2lvq")
    assert not re.fullmatch(pattern, "kms-progressdb-kms-rotate-29384756-abcde")


def test_the_dashboard_is_json_over_documented_metrics():
    """The dashboard parses, and each query names documented metrics."""
    data = one("ConfigMap", "-dashboard", objects(EVERYTHING))["data"]["progressdb-kms.json"]
    assert json.loads(data) == json.loads((CHART / "files" / "dashboard.json").read_text())
    panels = json.loads(data)["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    assert len(queries) > 20
    for query in queries:
        assert _named(query)
        assert _named(query) <= _documented() | {"kms_request_duration_seconds"}, query


def test_nothing_of_monitoring_by_default():
    """Kinds that a cluster may lack are only made when asked for."""
    assert not {item["kind"] for item in objects()} & {
        "ServiceMonitor",
        "PrometheusRule",
        "Certificate",
        "Issuer",
    }


def test_the_servicemonitor_finds_the_admin_port():
    """The ServiceMonitor selects the headless Service, and that the service's pods."""
    rendered = objects(EVERYTHING)
    monitor, service = one("ServiceMonitor", "", rendered), one("Service", "-admin", rendered)
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    labels = one("Deployment", "", rendered)["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
