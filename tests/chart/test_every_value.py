"""Every value has an effect: changed alone, it changes what is rendered."""

import json

import pytest

from tests.chart.rendering import CHART, at, template

PEM = f"-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VuAyEA{'A' * 43}=\n-----END PUBLIC KEY-----\n"
EXTERNAL = {
    "redis": {"enabled": False},
    "externalStore": {"url": "rediss://redis.example.com:6379/0", "secretName": "store"},
}
CERT_MANAGER = {"tls": {"mode": "certManager"}}
EXISTING = {
    "tls": {"mode": "existingSecret", "existingSecret": {"server": "s", "clientCa": "c"}},
    "redis": {"tls": {"mode": "generated"}},
}
WITH_CERTIFICATE = at(at(EXTERNAL, "externalStore.certKey", "a.crt"), "externalStore.keyKey", "a.key")
EXISTING_REDIS = {
    "redis": {"tls": {"mode": "existingSecret", "existingSecret": {"server": "s", "client": "c", "ca": "a"}}}
}
OWN_KEK = {"kek": {"management": "existing", "secretName": "mine"}}
S3 = {"backup": {"destination": "s3", "s3": {"url": "s3://bucket/kms"}}}
ISSUER = {"name": "clients", "kind": "Issuer", "group": "cert-manager.io"}
OWN_ISSUERS = {
    "tls": {
        "mode": "certManager",
        "certManager": {
            "client": {"issuerRef": ISSUER, "trustSecret": "t"},
            "redis": {"issuerRef": ISSUER, "trustSecret": "t"},
        },
    }
}
SHARED = {
    "tls": {
        "mode": "certManager",
        "certManager": {"server": {"issuerRef": ISSUER}, "client": {"issuerRef": ISSUER, "trustSecret": "t"}},
    }
}

# What a value needs to count, by path: the longest beginning that fits.
CONTEXT = {
    "autoscaling": {"autoscaling": {"enabled": True}},
    "autoscaling.enabled": {},
    "tls.clientCrl": {"tls": {"clientCrl": {"secretName": "lists"}}},
    "tls.certManager": CERT_MANAGER,
    "tls.certManager.client.trustSecret": OWN_ISSUERS,
    "tls.certManager.client.trustKey": OWN_ISSUERS,
    "tls.certManager.redis.trustSecret": OWN_ISSUERS,
    "tls.certManager.redis.trustKey": OWN_ISSUERS,
    "tls.certManager.client.issuerRef": at(CERT_MANAGER, "tls.certManager.client.trustSecret", "t"),
    "tls.certManager.redis.issuerRef": at(CERT_MANAGER, "tls.certManager.redis.trustSecret", "t"),
    "tls.existingSecret": EXISTING,
    "test.secretName": EXISTING,
    "redis.tls.existingSecret": EXISTING_REDIS,
    "externalStore": EXTERNAL,
    "externalStore.certKey": WITH_CERTIFICATE,
    "externalStore.keyKey": WITH_CERTIFICATE,
    "externalStore.attestedReason": at(
        at(EXTERNAL, "externalStore.durability", "attested"), "externalStore.attestedReason", "b"
    ),
    "externalStore.durability": at(EXTERNAL, "externalStore.attestedReason", "because"),
    "kek.secretName": OWN_KEK,
    "audit.key": {"audit": {"secretName": "mine"}},
    "kek.management": {"kek": {"secretName": "mine"}},
    "backup.s3": S3,
    "backup.destination": {"backup": {"s3": {"url": "s3://bucket/kms"}}},
    "monitoring.serviceMonitor.enabled": {},
    "monitoring.serviceMonitor": {"monitoring": {"serviceMonitor": {"enabled": True}}},
    "monitoring.prometheusRule.enabled": {},
    "monitoring.prometheusRule": {"monitoring": {"prometheusRule": {"enabled": True}}},
    "monitoring.dashboard.enabled": {},
    "monitoring.dashboard": {"monitoring": {"dashboard": {"enabled": True}}},
    "redis.enabled": {"externalStore": {"secretName": "store"}},
}
# These decide whether the rest is accepted at all: test_bad_values.py. And what a parent chart hands on.
ONLY_CHECKED = {"global", "externalStore.allowPlaintext", "tls.certManager.client.acknowledgeSharedIssuer"}

# Another value where the type alone does not tell a good one.
OTHER = {
    "clients": [{"name": "chat", "namespace": "chat"}],
    "policy.rules": [{"identities": ["cn:x"], "permissions": ["key:read"]}],
    "policy.limits": [{"identities": ["cn:x"], "concurrent": 3}],
    "escrow.recipients": [PEM],
    "imagePullSecrets": [{"name": "pull"}],
    "topologySpreadConstraints": [
        {"maxSkew": 2, "topologyKey": "rack", "whenUnsatisfiable": "DoNotSchedule"}
    ],
    "tolerations": [{"operator": "Exists"}],
    "redis.tolerations": [{"operator": "Exists"}],
    "tls.extraNames": ["kms.example.com"],
    "tls.extraIPs": ["10.1.2.3"],
    "tls.mode": "certManager",
    "tls.certManager.server.issuerRef": ISSUER,
    "tls.certManager.client.issuerRef": ISSUER,
    "tls.certManager.redis.issuerRef": ISSUER,
    "kek.management": "existing",
    "kek.pkcs11": {"module": "/hsm/lib.so", "token": "kms", "pin_file": "/hsm/pin"},
    "kek.vault": {"address": "https://vault.example.com", "kubernetes": {"role": "kms"}},
    "kek.aws": {"timeout": 3},
    "redis.tls.mode": "certManager",
    "redis.enabled": False,
    "externalStore.url": "rediss://another.example.com:6379/0",
    "externalStore.caKey": "another.crt",
    "externalStore.networkPolicyTo": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
    "backup.s3.networkPolicyTo": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
    "backup.s3.url": "s3://another/kms",
    "backup.s3.endpoint": "https://s3.example.com",
    "networkPolicy.extraClients": [{"namespaceSelector": {"matchLabels": {"team": "a"}}}],
    "networkPolicy.extraEgress": [{"ports": [{"port": 4317}]}],
    "podDisruptionBudget.maxUnavailable": "50%",
    "rotation.verify": "sample=1000",
    "rotation.schedule": "1 2 3 4 5",
    "backup.schedule": "1 2 3 4 5",
    "tls.generated.schedule": "1 2 3 4 5",
    "redis.maxmemory": "2gb",
    "redis.autoAofRewriteMinSize": "128mb",
    "settings.limits.bodyBytes": 2097153,
    "autoscaling.behavior": {"scaleDown": {"stabilizationWindowSeconds": 1}},
    "backup.pvc.accessModes": ["ReadWriteMany"],
    "redis.persistence.accessModes": ["ReadWriteMany"],
}


def leaves(schema, path=""):
    """Yield path and schema of each value that is described."""
    if "description" in schema:
        yield path, schema
    else:
        for name, inner in schema["properties"].items():
            yield from leaves(inner, f"{path}.{name}" if path else name)


LEAVES = dict(leaves(json.loads((CHART / "values.schema.json").read_text())))


def another(path, schema):
    """Return a value for ``path`` that is valid and not the default."""
    default = schema["default"]
    if path in OTHER:
        return OTHER[path]
    choices = schema.get("enum", [True, False] if isinstance(default, bool) else [])
    if choices:
        return next(value for value in choices if value != default)
    if isinstance(default, int | float):
        return default - 1 if default > schema.get("minimum", 1) else default + 1
    if isinstance(default, str):
        return another_string(default, schema.get("pattern", ""))
    if isinstance(default, dict):
        return {"other": "x"}
    return {"integer": [1234], "string": ["10.0.0.0/8"], "object": [{"name": "other"}]}[
        schema["items"]["type"]
    ]


def another_string(default, pattern):
    """Return another string of the form that ``pattern`` asks for."""
    if "sha256" in pattern:
        return f"sha256:{'a' * 64}"
    if "Ki" in pattern:
        return "3Gi"
    if "(h|m|s|ms)" in pattern or "(ms|s|m|h)" in pattern:
        return "17s"
    return "europe" if default != "europe" else "other"


def context(path):
    """Return the values under which the one at ``path`` counts."""
    fitting = [prefix for prefix in CONTEXT if path == prefix or path.startswith(f"{prefix}.")]
    return CONTEXT[max(fitting, key=len)] if fitting else {}


@pytest.mark.parametrize("path", [path for path in LEAVES if path not in ONLY_CHECKED])
def test_changes_what_is_rendered(path):
    """Each value, changed alone where it counts, changes the manifests."""
    base = context(path)
    if path == "redis.enabled":
        changed = at(at(base, path, False), "externalStore.url", "rediss://h:1/0")
    else:
        changed = at(base, path, another(path, LEAVES[path]))
    assert template(changed) != template(base)


def test_only_checked_values_are_accepted():
    """The values that only open a gate are in the chart, and change nothing else."""
    assert set(LEAVES) >= ONLY_CHECKED
    assert template({"global": {"a": 1}}) == template()
