"""Who may do what: deny by default.

A rule grants permissions to identities, optionally for some threads only::

    rules:
      - identities: ["dns:chat-*.default.svc", "spiffe://cluster.local/ns/chat/sa/*"]
        spki_sha256: ["9f86d081884c7d65..."]        # optional further pin
        permissions: [key:create, key:encrypt, key:decrypt]
        thread_prefixes: ["room:"]                  # optional; must end in a delimiter

    limits:                                         # optional; the first that names an identity counts
      - identities: ["dns:*.batch.svc"]
        operations_per_second: 500                  # each item of a batch is one
        burst: 1000                                 # optional; what may come at once, else one second's worth
        concurrent: 32                              # requests under way

A glob matches within one kind of identity. ``*`` stays within one label of a DNS name or one segment of a
SPIFFE path; ``**`` crosses them. So ``spiffe://td/ns/*/sa/chat`` can't be reached from
``spiffe://td/ns/evil/x/sa/chat``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from progressdb_kms.domain.errors import PermissionDenied, PolicyInvalid
from progressdb_kms.domain.identity import Identity, IdentityKind
from progressdb_kms.domain.quota import Limit


class Permission(StrEnum):
    """What can be granted."""

    CREATE = "key:create"
    ENCRYPT = "key:encrypt"
    DECRYPT = "key:decrypt"
    READ = "key:read"
    DESTROY = "key:destroy"
    ADMIN = "key:admin"
    ROTATE = "rotation:run"
    AUDIT = "audit:read"


_SEPARATORS: Final = {
    IdentityKind.DNS: r"[^.]",
    IdentityKind.SPIFFE: r"[^/]",
    IdentityKind.CN: ".",
    IdentityKind.UID: ".",
}
_SPKI: Final = re.compile(r"[0-9a-f]{64}")
_RULE_FIELDS: Final = frozenset({"identities", "spki_sha256", "permissions", "thread_prefixes"})
_LIMIT_FIELDS: Final = frozenset({"identities", "operations_per_second", "burst", "concurrent"})
_NUMBER_MAX: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Grants:
    """The compiled permissions of one identity: per permission None (all threads) or thread-id prefixes."""

    identity: str
    allowed: dict[Permission, tuple[str, ...] | None]

    def allows(self, permission: Permission, thread_id: str | None = None) -> bool:
        """Say whether the permission is granted; without a thread, whether it is granted for all threads."""
        try:
            prefixes = self.allowed[permission]
        except KeyError:
            return False
        if prefixes is None:
            return True
        return thread_id is not None and thread_id.startswith(prefixes)

    def allows_some(self, permission: Permission) -> bool:
        """Say whether the permission is granted for any thread at all."""
        return permission in self.allowed

    def require(self, permission: Permission, thread_id: str | None = None) -> None:
        """Return if granted.

        Raises:
            PermissionDenied: Names the permission and the identity.
        """
        if not self.allows(permission, thread_id):
            detail = ""
            if permission in self.allowed:
                detail = f"{self.identity} has {permission} for other threads only: see thread_prefixes"
            raise PermissionDenied(permission, self.identity, detail)


@dataclass(frozen=True, slots=True)
class _Pattern:
    kind: IdentityKind
    regex: re.Pattern[str]

    def matches(self, identity: Identity) -> bool:
        return identity.kind is self.kind and self.regex.fullmatch(identity.name) is not None


@dataclass(frozen=True, slots=True)
class Rule:
    """One parsed rule."""

    patterns: tuple[_Pattern, ...]
    pins: frozenset[str]
    permissions: frozenset[Permission]
    prefixes: tuple[str, ...] | None

    def matches(self, identity: Identity) -> bool:
        """Say whether the rule speaks of ``identity``: any of its names, and of its pins if it has some."""
        if self.pins and identity.spki_sha256 not in self.pins:
            return False
        return not self.patterns or any(pattern.matches(identity) for pattern in self.patterns)


@dataclass(frozen=True, slots=True)
class Policy:
    """All rules. An identity has the union of what the matching rules grant, and nothing else."""

    rules: tuple[Rule, ...]
    limits: tuple[tuple[tuple[_Pattern, ...], Limit], ...] = ()

    def limit(self, identity: Identity) -> Limit | None:
        """Return the limit of ``identity``, None where it has none."""
        for patterns, limit in self.limits:
            if any(pattern.matches(identity) for pattern in patterns):
                return limit
        return None

    def grants(self, identity: Identity) -> Grants:
        """Compile what ``identity`` may do."""
        allowed: dict[Permission, tuple[str, ...] | None] = {}
        for rule in self.rules:
            if not rule.matches(identity):
                continue
            for permission in rule.permissions:
                known = allowed.get(permission, ())
                allowed[permission] = (
                    None if known is None or rule.prefixes is None else (*known, *rule.prefixes)
                )
        return Grants(str(identity), allowed)


def parse_policy(document: Any) -> Policy:  # noqa: ANN401 - whatever a YAML file may hold
    """Check a policy document, as YAML gave it, and compile it.

    Raises:
        PolicyInvalid: Says which rule and what to change.
    """
    if (
        not isinstance(document, dict)
        or not {"rules"} <= set(document) <= {"rules", "limits"}
        or not all(isinstance(part, list) for part in document.values())
    ):
        raise PolicyInvalid(
            "the policy must be a mapping with the key rules, and perhaps limits; each holds a list"
        )
    return Policy(
        tuple(_rule(number, rule) for number, rule in enumerate(document["rules"], 1)),
        tuple(_limit(number, limit) for number, limit in enumerate(document.get("limits", []), 1)),
    )


def _limit(number: int, limit: Any) -> tuple[tuple[_Pattern, ...], Limit]:  # noqa: ANN401 - as in parse_policy
    where = f"policy limit {number}"
    _require_fields(where, limit, _LIMIT_FIELDS)
    identities = _strings(where, limit, "identities")
    if not identities:
        raise PolicyInvalid(f"{where}: names nobody; give identities")
    rate = _number(where, limit, "operations_per_second")
    concurrent = _number(where, limit, "concurrent")
    if not rate and not concurrent:
        raise PolicyInvalid(f"{where}: limits nothing; give operations_per_second or concurrent")
    if "burst" in limit and not rate:
        raise PolicyInvalid(f"{where}: burst goes with operations_per_second")
    burst = _number(where, limit, "burst") or rate
    return tuple(_pattern(where, glob) for glob in identities), Limit(rate, burst, concurrent)


def _number(where: str, limit: dict[str, Any], name: str) -> int:
    value = limit.get(name)
    if value is None and name not in limit:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _NUMBER_MAX:
        raise PolicyInvalid(f"{where}: {name} must be a whole number above 0; leave it out for no limit")
    return value


def _require_fields(where: str, part: Any, known: frozenset[str]) -> None:  # noqa: ANN401 - as in parse_policy
    if not isinstance(part, dict):
        raise PolicyInvalid(f"{where}: must be a mapping")
    if unknown := sorted(str(name) for name in set(part) - known):
        raise PolicyInvalid(f"{where}: unknown field {unknown[0]}; known are {', '.join(sorted(known))}")


def _rule(number: int, rule: Any) -> Rule:  # noqa: ANN401 - whatever a YAML file may hold
    where = f"policy rule {number}"
    _require_fields(where, rule, _RULE_FIELDS)
    identities = _strings(where, rule, "identities")
    pins = _strings(where, rule, "spki_sha256")
    if not identities and not pins:
        raise PolicyInvalid(f"{where}: names nobody; give identities or spki_sha256")
    for pin in pins:
        if not _SPKI.fullmatch(pin):
            raise PolicyInvalid(f"{where}: spki_sha256 is 64 lower-case hex digits")
    return Rule(
        tuple(_pattern(where, glob) for glob in identities),
        frozenset(pins),
        _permissions(where, rule),
        _prefixes(where, rule),
    )


def _permissions(where: str, rule: dict[str, Any]) -> frozenset[Permission]:
    permissions = _strings(where, rule, "permissions")
    if not permissions:
        raise PolicyInvalid(f"{where}: grants nothing; give permissions")
    known = {str(permission) for permission in Permission}
    for name in permissions:
        if name not in known:
            raise PolicyInvalid(f"{where}: unknown permission {name}; known are {', '.join(sorted(known))}")
    return frozenset(Permission(name) for name in permissions)


def _prefixes(where: str, rule: dict[str, Any]) -> tuple[str, ...] | None:
    if "thread_prefixes" not in rule:
        return None
    prefixes = _strings(where, rule, "thread_prefixes")
    if not prefixes:
        raise PolicyInvalid(f"{where}: thread_prefixes is empty; leave it out to allow all threads")
    for prefix in prefixes:
        # "room:1" would also open "room:10": a prefix has to end where a name ends.
        if not prefix or prefix[-1].isalnum():
            raise PolicyInvalid(f"{where}: a thread prefix must end in a delimiter such as ':' or '/'")
    return tuple(prefixes)


def _strings(where: str, rule: dict[str, Any], name: str) -> list[str]:
    value = rule.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise PolicyInvalid(f"{where}: {name} must be a list of strings")
    return value


def _pattern(where: str, glob: str) -> _Pattern:
    kind, colon, name = glob.partition(":")
    if not colon or kind not in set(IdentityKind) or not name:
        kinds = ", ".join(f"{kind}:" for kind in IdentityKind)
        raise PolicyInvalid(f"{where}: an identity starts with one of {kinds}")
    one = _SEPARATORS[IdentityKind(kind)]
    if kind == IdentityKind.DNS:
        name = name.lower()
    parts = re.split(r"(\*\*|\*)", name)
    regex = "".join({"**": ".*", "*": f"{one}*"}.get(part) or re.escape(part) for part in parts)
    return _Pattern(IdentityKind(kind), re.compile(regex, re.DOTALL))
