"""Bad values are refused before anything is created, with what to do."""

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.chart.rendering import at, refusal, template

EXTERNAL = {
    "redis": {"enabled": False},
    "externalStore": {"url": "rediss://redis.example.com:6379/0", "secretName": "store"},
}
CERT_MANAGER = {"tls": {"mode": "certManager"}}
EXISTING = {
    "tls": {"mode": "existingSecret", "existingSecret": {"server": "s", "clientCa": "c"}},
    "redis": {"tls": {"mode": "generated"}},
}
CLUSTER_ISSUER = {"name": "shared", "kind": "ClusterIssuer", "group": "cert-manager.io"}
CHAT = {"name": "chat", "namespace": "chat"}
PRIVATE = (
    X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
)

# What can't work together: values, and what the message says to do.
COMBINATIONS = {
    "store twice": (at(EXTERNAL, "redis.enabled", True), "set redis.enabled: false, or leave the URL empty"),
    "no store": ({"redis": {"enabled": False}}, "externalStore.url is needed"),
    "password in URL": (
        at(EXTERNAL, "externalStore.url", "rediss://kms:secret@h:6379/0"),
        "put the password into the Secret",
    ),
    "no Secret of the store": (
        at(EXTERNAL, "externalStore.secretName", ""),
        "externalStore.secretName is needed",
    ),
    "store without TLS": (at(EXTERNAL, "externalStore.url", "redis://h:6379/0"), "use rediss://"),
    "store without CA": (at(EXTERNAL, "externalStore.caKey", ""), "externalStore.caKey is needed"),
    "certificate without key": (at(EXTERNAL, "externalStore.certKey", "tls.crt"), "give both, or neither"),
    "attested without a reason": (
        at(EXTERNAL, "externalStore.durability", "attested"),
        "needs externalStore.attestedReason",
    ),
    "Sentinel without replicas": (
        at(EXTERNAL, "externalStore.url", "rediss+sentinel://a:1,b:2/kms"),
        "externalStore.minReplicas must be at least 1",
    ),
    "Cluster without replicas": (
        at(EXTERNAL, "externalStore.url", "rediss+cluster://a:1,b:2"),
        "externalStore.minReplicas must be at least 1",
    ),
    "no server certificate": (
        {"tls": {"mode": "existingSecret"}, "redis": {"tls": {"mode": "generated"}}},
        "needs tls.existingSecret.server",
    ),
    "no client CA": (at(EXISTING, "tls.existingSecret.clientCa", ""), "needs tls.existingSecret.clientCa"),
    "store follows to existing": (
        {"tls": EXISTING["tls"]},
        "set redis.tls.mode: generated to have the store's certificates made",
    ),
    "certificate where none are made": (
        at(EXISTING, "clients", [{**CHAT, "certificate": True}]),
        "bring the client's certificate yourself",
    ),
    "shared issuer": (
        at(
            at(CERT_MANAGER, "tls.certManager.client.issuerRef", CLUSTER_ISSUER),
            "tls.certManager.client.trustSecret",
            "cas",
        ),
        "acknowledgeSharedIssuer: true",
    ),
    "issuer without trust": (
        at(CERT_MANAGER, "tls.certManager.client.issuerRef", {**CLUSTER_ISSUER, "kind": "Issuer"}),
        "needs tls.certManager.client.trustSecret",
    ),
    "one issuer for both": (
        {
            "tls": {
                "mode": "certManager",
                "certManager": {
                    "server": {"issuerRef": {**CLUSTER_ISSUER, "kind": "Issuer"}},
                    "client": {"issuerRef": {**CLUSTER_ISSUER, "kind": "Issuer"}, "trustSecret": "cas"},
                },
            }
        },
        "give clients a CA of their own",
    ),
    "issuer of the store without trust": (
        at(CERT_MANAGER, "tls.certManager.redis.issuerRef", CLUSTER_ISSUER),
        "needs tls.certManager.redis.trustSecret",
    ),
    "renewed at each run": ({"tls": {"generated": {"days": 20}}}, "must be less than tls.generated.days"),
    "outlives its CA": ({"tls": {"generated": {"caDays": 60}}}, "tls.generated.caDays must be at least"),
    "own KEK without a name": ({"kek": {"management": "existing"}}, "progressdb-kms kek init"),
    "external KEK without a name": ({"kek": {"management": "external"}}, "needs kek.secretName"),
    "one key for two things": ({"kek": {"key": "a", "storeIdKey": "a"}}, "must be two keys"),
    "S3 without a bucket": ({"backup": {"destination": "s3"}}, "needs backup.s3.url"),
    "fewest above most": (
        {"autoscaling": {"enabled": True, "minReplicas": 9}},
        "at least autoscaling.minReplicas",
    ),
    "two clients of one name": ({"clients": [CHAT, {**CHAT, "namespace": "b"}]}, "two are named chat"),
    "two clients of one identity": (
        {"clients": [CHAT, {"name": "b", "identity": "dns:chat.chat.svc"}]},
        "two have the identity dns:chat.chat.svc",
    ),
    "two clients of one Secret": (
        {"clients": [{**CHAT, "secretName": "x"}, {"name": "b", "namespace": "chat", "secretName": "x"}]},
        "two want the Secret chat/x",
    ),
    "the test's name": ({"clients": [{"name": "test"}]}, "give each a name of its own"),
    "a pattern with a certificate": (
        {"clients": [{"name": "a", "identity": "dns:*.chat.svc"}]},
        "name one identity, or set certificate: false",
    ),
    "lists required and none named": (
        {"tls": {"clientCrl": {"requireCurrent": True}}},
        "needs tls.clientCrl.secretName",
    ),
    "lists of a CA that makes none": (
        at(CERT_MANAGER, "tls.clientCrl.secretName", "lists"),
        "Take the client out of `clients` instead",
    ),
    "a digit first": ({"fullnameOverride": "1kms"}, "set fullnameOverride"),
    "body too small": ({"settings": {"limits": {"bodyBytes": 1048576}}}, "give it a third more and 1024"),
}


@pytest.mark.parametrize("values,message", COMBINATIONS.values(), ids=COMBINATIONS)
def test_combinations_that_can_not_work(values, message):
    """A combination that can't work is refused with what to do."""
    assert message in refusal(values)


# What the schema alone refuses.
WRONG = {
    "tls.mode": "off",
    "tls.clientAuth": "optional",
    "tls.certManager.client.issuerRef": {"nam": "x"},
    "kek.management": "none",
    "kek.secretName": "Not_a_name",
    "replicaCount": 0,
    "image.digest": "latest",
    "image.pullPolicy": "Sometimes",
    "fullnameOverride": "a" * 37,
    "service.port": 70000,
    "podDisruptionBudget.maxUnavailable": 0,
    "clients": [{"namespace": "chat"}],
    "policy.rules": [{"permissions": ["key:read"]}],
    "policy.limits": [{"identities": ["cn:a"], "burst": 5}],
    "redis.maxmemory": "lots",
    "redis.appendfsync": "everysec",
    "redis.persistence.size": "big",
    "redis.persistence.enabled": False,
    "rotation.schedule": "every day",
    "rotation.verify": "none",
    "rotation.snapshot": False,
    "backup.keep": 0,
    "backup.destination": "ftp",
    "backup.s3.endpoint": "http://minio:9000",
    "settings.log.level": "loud",
    "settings.destruction.waitingDays": 1,
    "escrow.recipients": [PRIVATE],
    "externalStore.minReplicas": -1,
    "podSecurityContext.runAsUser": 0,
    "networkPolicy.apiServer.cidrs": ["anywhere"],
}


@pytest.mark.parametrize("path", WRONG)
def test_the_schema_names_what_is_wrong(path):
    """A wrong value is refused by its path; no value switches durability or client certificates off."""
    message = refusal(at({}, path, WRONG[path]))
    assert "meet the specifications of the schema" in message
    assert path.split(".", maxsplit=1)[0] in message


@pytest.mark.parametrize(
    "client",
    [
        {"name": "a", "permissions": ["key:everything"]},
        {"name": "a", "permissions": []},
        {"name": "a", "threadPrefixes": ["room"]},
        {"name": "a", "threadPrefixes": ["raum-ä"]},
        {"name": "a", "identity": "chat.svc"},
        {"name": "a", "identity": "uid:0"},
        {"name": "a", "spkiSha256": ["ABC"]},
        {"name": "A_b"},
        {"name": "a", "namespace": "not a namespace"},
    ],
)
def test_bad_clients(client):
    """A client that the policy would refuse is refused by the schema, before the service sees it."""
    assert "/clients/0" in refusal({"clients": [client]})


def test_gates_open():
    """What has to be acknowledged works once it is."""
    plain = at(EXTERNAL, "externalStore.url", "redis://h:6379/0")
    assert "redis://h:6379/0" in template(at(plain, "externalStore.allowPlaintext", True))
    shared = COMBINATIONS["shared issuer"][0]
    assert template(at(shared, "tls.certManager.client.acknowledgeSharedIssuer", True))
