"""Write values.schema.json of the chart from its values.yaml, or check with --check that it is current.

Names, defaults and descriptions (the ``# --`` comments) come from values.yaml alone, so that no value can
lack an entry and no entry a value. What a default can't say (choices, bounds, forms, the fields of list
items) stands in ``RULES`` here, by the value's path. Every object of ours is closed.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, Final

import yaml

CHART: Final = Path(__file__).parent.parent / "deploy" / "helm" / "progressdb-kms"

Schema = dict[str, Any]


def text(pattern: str = "", **more: Any) -> Schema:  # noqa: ANN401 - any keyword of JSON Schema
    """Return the schema of a string, anchored as a whole."""
    return {"type": "string", **({"pattern": f"^(?:{pattern})$"} if pattern else {}), **more}


def number(minimum: float, maximum: float | None = None, kind: str = "integer") -> Schema:
    """Return the schema of a bounded number."""
    return {"type": kind, "minimum": minimum, **({} if maximum is None else {"maximum": maximum})}


def choice(*values: str) -> Schema:
    """Return the schema of one of ``values``."""
    return {"type": "string", "enum": list(values)}


def closed(properties: dict[str, Schema], required: tuple[str, ...] = ()) -> Schema:
    """Return the schema of an object with these fields and no others."""
    schema: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    return {**schema, "required": list(required)} if required else schema


def listed(items: Schema, least: int = 0, *, unique: bool = True) -> Schema:
    """Return the schema of a list."""
    return {"type": "array", "items": items, "minItems": least, "uniqueItems": unique}


LABEL: Final = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
NAME: Final = rf"{LABEL}(\.{LABEL})*"
HOST: Final = rf"(\*\.)?{NAME}"
KEY: Final = r"[-._a-zA-Z0-9]+"
QUANTITY: Final = r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi|E|Ei)?"
DURATION: Final = r"([0-9]+(\.[0-9]+)?(h|m|s|ms))+"
CIDR: Final = r"[0-9a-fA-F.:]+/[0-9]{1,3}"
# Macros, and five fields; whether 31 February ever comes is the API server's business.
CRON: Final = (
    r"@(yearly|annually|monthly|weekly|daily|midnight|hourly)|[-0-9A-Za-z*/,?]+( +[-0-9A-Za-z*/,?]+){4}"
)
REDIS_SIZE: Final = r"(0|[1-9][0-9]*)([kmgKMG][bB]?)?"
PEM: Final = r"-----BEGIN PUBLIC KEY-----[\sA-Za-z0-9+/=]+-----END PUBLIC KEY-----\s*"
IDENTITY: Final = r"dns:[-a-z0-9.*]+|spiffe://[^\s]+|cn:\S.{0,63}"
# As domain/policy.py: a prefix must end in a delimiter, or `room:1` would also be the beginning of `room:10`.
PREFIX: Final = r".*[^\p{L}\p{N}]"
PERMISSIONS: Final = (
    "key:create",
    "key:encrypt",
    "key:decrypt",
    "key:read",
    "key:destroy",
    "key:admin",
    "rotation:run",
    "audit:read",
)

# Objects of Kubernetes itself, which the API server checks.
OPEN: Final[Schema] = {"type": "object"}
OPEN_LIST: Final[Schema] = {"type": "array", "items": {"type": "object"}}
STRINGS: Final[Schema] = {"type": "object", "additionalProperties": {"type": "string"}}
NULLABLE_ID: Final[Schema] = {"type": ["integer", "null"], "minimum": 1, "maximum": 2**31 - 1}
PORTS: Final = listed(number(1, 65535), 1)
TIMES: Final = number(0, 86400, "number")
POSITIVE: Final = {"type": "number", "exclusiveMinimum": 0, "maximum": 86400}
SECRET: Final = text(rf"({NAME})?", maxLength=253)
ISSUER: Final = closed(
    {"name": text(rf"({NAME})?"), "kind": text("[A-Za-z]+"), "group": text(NAME)}, ("name", "kind", "group")
)
_PATH: Final = text("/.+")
_CALL: Final = {"timeout": {"type": "number", "exclusiveMinimum": 0, "maximum": 86400}}
PKCS11: Final = closed({"module": _PATH, "token": text(".{1,32}"), "pin_file": _PATH, **_CALL})
VAULT: Final = closed(
    {
        "address": text("https?://.+"),
        "mount": text(),
        "namespace": text(),
        "ca": _PATH,
        "token_file": _PATH,
        "kubernetes": closed({"role": text(".+"), "mount": text(), "jwt_file": _PATH}, ("role",)),
        **_CALL,
    }
)
AWS: Final = closed({"endpoint": text("https?://.+"), **_CALL})
MODES: Final = ("generated", "certManager", "existingSecret")
PERMISSION_LIST: Final = listed(choice(*PERMISSIONS), 1)
PIN_LIST: Final = listed(text("[0-9a-f]{64}"))
CLIENT: Final = closed(
    {
        "name": text(
            LABEL, maxLength=40, description="Name, also of its Secret: `<fullname>-client-<name>`."
        ),
        "namespace": text(
            rf"({LABEL})?", maxLength=63, description="Namespace it runs in (must exist); else the release's."
        ),
        "identity": text(
            rf"({IDENTITY})?",
            description=(
                "What its certificate says: `dns:...`, `spiffe://...` or `cn:...`;"
                " else `dns:<name>.<namespace>.svc`."
            ),
        ),
        "permissions": {
            **PERMISSION_LIST,
            "description": "What it may do; else `key:create`, `key:encrypt`, `key:decrypt`.",
        },
        "threadPrefixes": {
            **listed(text(PREFIX)),
            "description": "Only for thread ids that begin so; each ends in a delimiter.",
        },
        "secretName": {**SECRET, "description": "Secret for its certificate, in its namespace."},
        "pinned": {"type": "boolean", "description": "Keep its key when the certificate is renewed."},
        "certificate": {
            "type": "boolean",
            "description": "`false`: it brings a certificate of its own.",
        },
        "spkiSha256": {**PIN_LIST, "description": "One of these public keys as well."},
        "podLabels": {**STRINGS, "description": "Only pods with these labels may connect."},
    },
    ("name",),
)
RULE: Final = closed(
    {
        "identities": listed(text(IDENTITY), 1),
        "spki_sha256": PIN_LIST,
        "permissions": PERMISSION_LIST,
        "thread_prefixes": listed(text(PREFIX), 1),
    },
    ("permissions",),
) | {"anyOf": [{"required": ["identities"]}, {"required": ["spki_sha256"]}]}

AMOUNT: Final = number(1, 1_000_000_000)
LIMIT: Final = closed(
    {
        "identities": listed(text(IDENTITY), 1),
        "operations_per_second": AMOUNT,
        "burst": AMOUNT,
        "concurrent": AMOUNT,
    },
    ("identities",),
) | {
    "anyOf": [{"required": ["operations_per_second"]}, {"required": ["concurrent"]}],
    "dependencies": {"burst": ["operations_per_second"]},
}

# By the end of a value's path; `*` stands for (a part of) one name. The longest that fits counts.
RULES: Final[dict[str, Schema]] = {
    "global": OPEN,
    "nameOverride": text(rf"({LABEL})?", maxLength=63),
    "fullnameOverride": text(rf"({LABEL})?", maxLength=36),
    "clusterDomain": text(NAME),
    "commonLabels": STRINGS,
    "commonAnnotations": STRINGS,
    "image.repository": text(r"[-a-z0-9._/:]+"),
    "image.tag": text(r"[-a-zA-Z0-9._]*", maxLength=128),
    "image.digest": text("(sha256:[0-9a-f]{64})?"),
    "image.pullPolicy": choice("Always", "IfNotPresent", "Never"),
    "imagePullSecrets": listed(closed({"name": text(NAME)}, ("name",))),
    "replicaCount": number(1, 100),
    "workers": number(1, 64),
    "autoscaling.*Replicas": number(1, 100),
    "autoscaling.targetCPUUtilizationPercentage": number(1, 1000),
    "autoscaling.behavior": OPEN,
    "podDisruptionBudget.maxUnavailable": {"anyOf": [number(1), text("[1-9][0-9]?%")]},
    "service.type": choice("ClusterIP", "NodePort", "LoadBalancer"),
    "service.port": number(1, 65535),
    "podSecurityContext.*": NULLABLE_ID,
    "*Probe.*": number(1, 86400),
    "minReadySeconds": number(0, 3600),
    "revisionHistoryLimit": number(0, 100),
    # Of every kind of pod.
    "resources": OPEN,
    "affinity": OPEN,
    "nodeSelector": STRINGS,
    "annotations": STRINGS,
    "labels": STRINGS,
    "namespaceLabels": STRINGS,
    "podLabels": STRINGS,
    "podAnnotations": STRINGS,
    "tolerations": OPEN_LIST,
    "topologySpreadConstraints": OPEN_LIST,
    "extraEnv": OPEN_LIST,
    "extraVolumes": OPEN_LIST,
    "extraVolumeMounts": OPEN_LIST,
    "size": text(QUANTITY),
    "storageClassName": SECRET,
    "accessModes": listed(choice("ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany"), 1),
    "clients": listed(CLIENT),
    "policy.rules": listed(RULE),
    "policy.limits": listed(LIMIT),
    "tls.clientCrl.secretName": SECRET,
    "tls.clientCrl.key": text(KEY),
    "tls.mode": choice(*MODES),
    "tls.extraNames": listed(text(HOST)),
    "tls.extraIPs": listed(text("[0-9a-fA-F.:]+")),
    "tls.generated.caDays": number(30, 36500),
    "tls.generated.days": number(2, 825),
    "tls.generated.renewBeforeDays": number(1, 365),
    "tls.certManager.privateKey.algorithm": choice("ECDSA", "RSA"),
    "tls.certManager.privateKey.size": {"type": "integer", "enum": [256, 384, 521, 2048, 3072, 4096]},
    "tls.certManager.*.issuerRef": ISSUER,
    "tls.certManager.*.trustSecret": SECRET,
    "tls.certManager.*.trustKey": text(KEY),
    "tls.certManager.*uration": text(DURATION),
    "tls.certManager.*enewBefore": text(DURATION),
    "tls.existingSecret.*": SECRET,
    "tls.existingSecret.clientCaKey": text(KEY),
    "kek.management": choice("create", "existing", "external"),
    "kek.secretName": SECRET,
    "kek.key": text(KEY),
    "kek.storeIdKey": text(rf"({KEY})?"),
    "kek.pkcs11": PKCS11,
    "kek.vault": VAULT,
    "kek.aws": AWS,
    "escrow.recipients": listed(text(PEM)),
    "audit.secretName": SECRET,
    "audit.key": text(KEY),
    "audit.streamRecords": number(1000, 100_000_000),
    "audit.dataPlane": choice("off", "counted", "each"),
    "audit.dataPlaneInterval": POSITIVE,
    "redis.maxmemory": text(REDIS_SIZE),
    "redis.autoAofRewritePercentage": number(1, 10000),
    "redis.autoAofRewriteMinSize": text(REDIS_SIZE),
    "redis.maxclients": number(16, 1_000_000),
    "redis.existingAuthSecret": SECRET,
    "redis.tls.mode": choice("", *MODES),
    "redis.tls.existingSecret.*": SECRET,
    "redis.tls.existingSecret.caKey": text(KEY),
    "redis.terminationGracePeriodSeconds": number(1, 86400),
    "externalStore.url": text(r"((rediss?(\+sentinel|\+cluster)?)://[^\s]+)?"),
    "externalStore.secretName": SECRET,
    "externalStore.passwordKey": text(KEY),
    "externalStore.*Key": text(rf"({KEY})?"),
    "externalStore.durability": choice("checked", "attested"),
    "externalStore.minReplicas": number(0, 5),
    "store.*Timeout": POSITIVE,
    "schedule": text(CRON),
    "timeZone": text("[A-Za-z]+([-+_/A-Za-z0-9]*)"),
    "activeDeadlineSeconds": number(60, 604800),
    "backoffLimit": number(0, 100),
    "startingDeadlineSeconds": number(60, 86400),
    "*JobsHistoryLimit": number(0, 100),
    "rotation.parallelism": number(1, 64),
    "rotation.wait": TIMES,
    "rotation.batch": number(1, 1000),
    "rotation.maxRate": number(0, 10_000_000),
    "rotation.verify": text("all|sample=[1-9][0-9]{0,9}"),
    "backup.keep": number(1, 10000),
    "backup.destination": choice("pvc", "s3"),
    "backup.pvc.existingClaim": SECRET,
    "backup.s3.url": text(r"(s3://[^/\s]+(/[^\s]*)?)?"),
    "backup.s3.endpoint": text(r"(https://[^\s]+)?"),
    "backup.s3.secretName": SECRET,
    "backup.s3.spoolSize": text(QUANTITY),
    "bootstrap.wait": number(1, 3600),
    "settings.limits.*": POSITIVE,
    "settings.limits.maxConnections": number(1, 10_000_000),
    "settings.limits.maxHandshakes": number(1, 10_000_000),
    "settings.limits.batchItems": number(1, 100_000),
    "settings.limits.headerBytes": number(1024, 65536),
    "settings.limits.bodyBytes": number(1024, 64 * 2**20),
    "settings.limits.batchBodyBytes": number(1024, 64 * 2**20),
    "settings.limits.plaintextBytes": number(1, 16 * 2**20),
    "settings.cache.maxKeys": number(1, 10_000_000),
    "settings.cache.ttl": POSITIVE,
    "settings.cache.maxStale": TIMES,
    "settings.drain.delay": TIMES,
    "settings.drain.timeout": POSITIVE,
    "settings.destruction.waitingDays": number(7, 30),
    "settings.log.level": choice("debug", "info", "warning", "error"),
    "settings.log.format": choice("json", "text"),
    "cidrs": listed(text(CIDR)),
    "ports": PORTS,
    "networkPolicyTo": OPEN_LIST,
    "networkPolicy.extraClients": OPEN_LIST,
    "networkPolicy.extraEgress": OPEN_LIST,
    "serviceMonitor.interval": text("[0-9]+(ms|s|m|h)"),
    "serviceMonitor.scrapeTimeout": text("[0-9]+(ms|s|m|h)"),
    "prometheusRule.kekMaxAgeDays": number(1, 3650),
    "prometheusRule.rotationStuckHours": number(1, 720),
    "prometheusRule.backupMaxAgeHours": number(1, 720),
    "prometheusRule.certificateDays": number(1, 365),
    "prometheusRule.alertLabels": STRINGS,
    "test.secretName": SECRET,
}


def rule_name(path: str) -> str | None:
    """Return the name of the rule for the value at ``path``, the longest one that fits its end."""
    fitting = [
        name for name in RULES if re.fullmatch(r"(?:.*\.)?" + re.escape(name).replace(r"\*", r"[^.]*"), path)
    ]
    return max(fitting, key=len, default=None)


def descriptions(values: str) -> dict[str, str]:
    """Return the ``# --`` comment of each value in values.yaml, by path."""
    found: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    comment = ""
    for line in values.splitlines():
        if match := re.match(r"\s*# -- (.*)", line):
            comment = match[1]
        elif match := re.match(r"\s*# (.*)", line):
            comment = f"{comment} {match[1]}" if comment else ""
        elif match := re.match(r"( *)([-\w./]+):", line):
            depth = len(match[1])
            stack = [entry for entry in stack if entry[0] < depth]
            stack.append((depth, match[2]))
            if comment:
                found[".".join(name for _, name in stack)] = comment
            comment = ""
        else:
            comment = ""
    return found


class ValueProblem(Exception):
    """A value that can't get an entry: it says which, and what to do."""


def entry(path: str, default: Any, described: dict[str, str]) -> Schema:  # noqa: ANN401 - whatever YAML holds
    """Return the schema of the value at ``path`` with this default.

    Raises:
        ValueProblem: It lacks a description, or its type can't be told.
    """
    name = rule_name(path)
    schema = None if name is None else RULES[name]
    if schema is None and isinstance(default, dict) and path not in described:
        prefix = f"{path}." if path else ""
        return closed({name: entry(prefix + name, value, described) for name, value in default.items()})
    if path not in described:
        raise ValueProblem(f"{path} has no description: write `# -- ...` above it in values.yaml")
    if schema is None:
        schema = _inferred(path, default)
    return {"description": described[path], **schema, "default": default}


def _inferred(path: str, default: Any) -> Schema:  # noqa: ANN401 - whatever YAML holds
    if isinstance(default, bool):
        return {"type": "boolean"}
    if isinstance(default, str):
        return {"type": "string"}
    raise ValueProblem(f"{path}: a {type(default).__name__} needs a rule in RULES of scripts/chart_schema.py")


def build(values: str) -> Schema:
    """Return the schema of a values.yaml.

    Raises:
        ValueProblem: As ``entry``.
    """
    described = descriptions(values)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of progressdb-kms",
        **entry("", yaml.safe_load(values), described),
    }


def main() -> int:
    """Write the schema; with --check only say whether it would change."""
    target = CHART / "values.schema.json"
    try:
        fresh = json.dumps(build((CHART / "values.yaml").read_text()), indent=2) + "\n"
    except ValueProblem as problem:
        print(problem)
        return 1
    if "--check" in sys.argv:
        if not target.exists() or target.read_text() != fresh:
            print("values.schema.json is not current: run make chart-docs")
            return 1
        return 0
    target.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
