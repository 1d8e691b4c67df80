"""Who may do what: nobody anything, but for what a rule grants."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.domain.errors import PermissionDenied, PolicyInvalid
from progressdb_kms.domain.identity import Identity, IdentityKind
from progressdb_kms.domain.policy import Grants, Permission, Policy, parse_policy
from progressdb_kms.domain.quota import Limit

PIN = "ab" * 32
names = st.text("abc.-*/:", min_size=1, max_size=20)


def rule(**fields: Any) -> dict[str, Any]:
    """Return a rule that grants dns:a key:read, changed as asked."""
    return {"identities": ["dns:a"], "permissions": ["key:read"]} | fields


def policy(*rules: dict[str, Any]) -> Policy:
    """Parse rules."""
    return parse_policy({"rules": list(rules)})


def may(identity: str, *rules: dict[str, Any], spki: str = "") -> bool:
    """Say whether rules grant an identity key:read on thread t."""
    kind, _, name = identity.partition(":")
    return policy(*rules).grants(Identity(IdentityKind(kind), name, spki)).allows(Permission.READ, "t")


@given(st.sampled_from(IdentityKind), names, st.sampled_from(Permission))
def test_nobody_may_do_anything_by_default(kind: IdentityKind, name: str, permission: Permission) -> None:
    """Without rules, and under rules for others, everything is refused."""
    for rules in ((), (rule(identities=["cn:somebody else"]),)):
        grants = policy(*rules).grants(Identity(kind, name))
        assert not grants.allows(permission, "t")
        assert not grants.allows_some(permission)
        with pytest.raises(PermissionDenied) as refused:
            grants.require(permission, "t")
        assert refused.value.extra == {"permission": permission, "identity": f"{kind}:{name}"}


@given(st.sampled_from(IdentityKind), st.sampled_from(IdentityKind))
def test_a_glob_matches_one_kind_only(granted: IdentityKind, asked: IdentityKind) -> None:
    """A CN of ``uid:0``, or one that looks like a DNS name, is nobody."""
    assert may(f"{asked}:0", rule(identities=[f"{granted}:**"])) == (granted is asked)
    assert not may("cn:uid:0", rule(identities=["uid:0"]))


@pytest.mark.parametrize(
    "glob, identity, matches",
    [
        ("dns:a", "dns:a", True),
        ("dns:a", "dns:ab", False),
        ("dns:A.B", "dns:a.b", True),
        ("dns:*.svc", "dns:a.svc", True),
        ("dns:*.svc", "dns:a.b.svc", False),
        ("dns:**.svc", "dns:a.b.svc", True),
        ("dns:chat-*", "dns:chat-7", True),
        ("dns:chat-*", "dns:chat-7.evil", False),
        ("dns:a.svc", "dns:aXsvc", False),
        ("dns:a+", "dns:aa", False),
        ("spiffe://td/ns/*/sa/chat", "spiffe://td/ns/chat/sa/chat", True),
        ("spiffe://td/ns/*/sa/chat", "spiffe://td/ns/evil/x/sa/chat", False),
        ("spiffe://td/ns/**", "spiffe://td/ns/evil/x/sa/chat", True),
        ("spiffe://td/*", "spiffe://td/a\nb", True),
        ("spiffe://*/ns/a", "spiffe://td/ns/a", True),
        ("cn:*", "cn:anything at/all.really", True),
        ("uid:10*", "uid:1000", True),
        ("uid:10", "uid:100", False),
    ],
)
def test_globs(glob: str, identity: str, matches: bool) -> None:
    """``*`` stays within a label or segment, ``**`` crosses, all else is literal, the whole name counts."""
    assert may(identity, rule(identities=[glob])) is matches


@given(names, names)
def test_a_name_without_stars_matches_itself_alone(granted: str, asked: str) -> None:
    """No other character is special."""
    granted = granted.replace("*", "")
    if granted:
        assert may(f"cn:{asked}", rule(identities=[f"cn:{granted}"])) == (asked == granted)


def test_a_pin_narrows_a_rule() -> None:
    """With a pin the name alone is not enough, nor the pin; a socket's peer has no key to pin."""
    pinned = rule(spki_sha256=[PIN])
    assert may("dns:a", pinned, spki=PIN)
    assert not may("dns:a", pinned, spki="cd" * 32)
    assert not may("dns:a", pinned)
    assert not may("dns:b", pinned, spki=PIN)


def test_a_pin_alone_is_an_identity() -> None:
    """A rule may name nothing but keys; whoever has one is meant."""
    by_key = {"spki_sha256": [PIN], "permissions": ["key:read"]}
    assert may("cn:whoever", by_key, spki=PIN)
    assert not may("cn:whoever", by_key)


def test_rules_add_up() -> None:
    """An identity has the union of the matching rules; a rule without prefixes opens all threads."""
    grants = policy(
        rule(thread_prefixes=["room:"]),
        rule(thread_prefixes=["dm/"], permissions=["key:read", "key:create"]),
        rule(identities=["dns:*"], permissions=["key:encrypt"]),
    ).grants(Identity(IdentityKind.DNS, "a"))
    assert grants.allows(Permission.READ, "room:1")
    assert grants.allows(Permission.READ, "dm/1")
    assert not grants.allows(Permission.READ, "other")
    assert not grants.allows(Permission.CREATE, "room:1")
    assert grants.allows(Permission.ENCRYPT, "other")
    assert grants.allows(Permission.ENCRYPT)
    wider = policy(rule(thread_prefixes=["room:"]), rule()).grants(Identity(IdentityKind.DNS, "a"))
    assert wider.allows(Permission.READ, "other")
    narrower = policy(rule(), rule(thread_prefixes=["room:"])).grants(Identity(IdentityKind.DNS, "a"))
    assert narrower.allows(Permission.READ, "other")


def test_a_narrowed_grant_is_none_for_all_threads() -> None:
    """What speaks of no thread needs the whole permission; the refusal says that there is a narrower one."""
    grants = policy(rule(thread_prefixes=["room:"])).grants(Identity(IdentityKind.DNS, "a"))
    assert grants.allows_some(Permission.READ)
    assert not grants.allows(Permission.READ)
    assert not grants.allows(Permission.READ, "roo")
    with pytest.raises(PermissionDenied, match="for other threads only"):
        grants.require(Permission.READ, "mail:1")
    assert Grants("dns:a", {}).allows(Permission.READ) is False


@pytest.mark.parametrize("prefix", ["", "room", "room:1", "é", "room:a"])
def test_a_prefix_ends_in_a_delimiter(prefix: str) -> None:
    """``room:1`` would open ``room:10`` as well."""
    with pytest.raises(PolicyInvalid, match=r"policy rule 1: a thread prefix must end in a delimiter"):
        policy(rule(thread_prefixes=[prefix]))


@pytest.mark.parametrize(
    "document, says",
    [
        (None, "a mapping with the key rules"),
        ([], "a mapping with the key rules"),
        ({}, "a mapping with the key rules"),
        ({"rules": {}}, "each holds a list"),
        ({"rules": [], "more": 1}, "with the key rules"),
        ({"rules": ["x"]}, "rule 1: must be a mapping"),
        ({"rules": [rule(), rule(who="x")]}, "rule 2: unknown field who; known are identities"),
        ({"rules": [rule(identities=[])]}, "names nobody"),
        ({"rules": [{"permissions": ["key:read"]}]}, "names nobody"),
        ({"rules": [rule(identities="dns:a")]}, "identities must be a list of strings"),
        ({"rules": [rule(identities=[7])]}, "identities must be a list of strings"),
        ({"rules": [rule(identities=["a"])]}, "an identity starts with one of spiffe:, dns:, cn:, uid:"),
        ({"rules": [rule(identities=["ip:1"])]}, "an identity starts with one of"),
        ({"rules": [rule(identities=["dns:"])]}, "an identity starts with one of"),
        ({"rules": [rule(spki_sha256=["AB" * 32])]}, "64 lower-case hex digits"),
        ({"rules": [rule(spki_sha256=["ab"])]}, "64 lower-case hex digits"),
        ({"rules": [rule(spki_sha256=[PIN + "\n"])]}, "64 lower-case hex digits"),
        ({"rules": [rule(permissions=[])]}, "grants nothing"),
        ({"rules": [{"identities": ["dns:a"]}]}, "grants nothing"),
        ({"rules": [rule(permissions=["key:*"])]}, r"unknown permission key:\*; known are audit:read"),
        ({"rules": [rule(thread_prefixes=[])]}, "thread_prefixes is empty"),
        ({"rules": [rule(thread_prefixes=None)]}, "thread_prefixes must be a list"),
        ({"rules": [{1: 2}]}, "unknown field 1"),
    ],
)
def test_what_is_no_policy(document: Any, says: str) -> None:
    """Each mistake is refused whole, and the message says which rule and what to change."""
    with pytest.raises(PolicyInvalid, match=says):
        parse_policy(document)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)


@given(st.one_of(json_like, st.fixed_dictionaries({"rules": st.lists(json_like, max_size=3)})))
def test_no_document_breaks_the_parser(document: Any) -> None:
    """Whatever a YAML file holds: a policy, or PolicyInvalid."""
    with contextlib.suppress(PolicyInvalid):
        assert isinstance(parse_policy(document), Policy)


def test_an_identity_is_typed_in_text() -> None:
    """Its text carries its kind, so that two kinds never look alike in a log or an id."""
    assert str(Identity(IdentityKind.SPIFFE, "//td/x")) == "spiffe://td/x"
    assert str(Identity(IdentityKind.CN, "uid:0")) == "cn:uid:0"
    assert str(Identity(IdentityKind.UID, "0")) == "uid:0"


@pytest.mark.parametrize(
    "says, limit",
    [
        ("must be a mapping", []),
        ("unknown field rate", {"identities": ["dns:a"], "rate": 1}),
        ("names nobody", {"operations_per_second": 1}),
        ("limits nothing", {"identities": ["dns:a"]}),
        ("burst goes with", {"identities": ["dns:a"], "concurrent": 1, "burst": 1}),
        ("concurrent must be a whole number", {"identities": ["dns:a"], "concurrent": 0}),
        (
            "burst must be a whole number",
            {"identities": ["dns:a"], "operations_per_second": 1, "burst": None},
        ),
        ("operations_per_second must be", {"identities": ["dns:a"], "operations_per_second": True}),
        ("operations_per_second must be", {"identities": ["dns:a"], "operations_per_second": 1.5}),
        ("an identity starts with", {"identities": ["a"], "concurrent": 1}),
    ],
)
def test_limits_that_say_nothing_clear(says: str, limit: Any) -> None:
    """A limit that is no limit is refused, with its number and what to write."""
    with pytest.raises(PolicyInvalid, match=f"policy limit 1: .*{says}"):
        parse_policy({"rules": [], "limits": [limit]})


def test_the_first_limit_that_names_an_identity_counts() -> None:
    """Without one there is no limit; burst is a second's worth where it is not given."""
    limits = [
        {"identities": ["dns:a", "cn:a"], "operations_per_second": 5},
        {"identities": ["dns:*"], "operations_per_second": 7, "burst": 20, "concurrent": 3},
    ]
    parsed = parse_policy({"rules": [], "limits": limits})
    assert parsed.limit(Identity(IdentityKind.DNS, "a")) == Limit(5, 5, 0)
    assert parsed.limit(Identity(IdentityKind.DNS, "b")) == Limit(7, 20, 3)
    assert parsed.limit(Identity(IdentityKind.CN, "b")) is None
