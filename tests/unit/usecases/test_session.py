"""What a connection may do, at each of its requests."""

from __future__ import annotations

import pytest

from progressdb_kms.domain.errors import CertificateExpired, TooManyRequests
from progressdb_kms.domain.identity import Identity, IdentityKind
from progressdb_kms.domain.policy import Permission, parse_policy
from progressdb_kms.usecases.session import PolicyBook, Session
from tests.unit.helpers import RULES, Clock

SERVER = Identity(IdentityKind.DNS, "server", not_after=2000.0)


def test_at_first_nobody_may_do_anything() -> None:
    """Before a policy is loaded everything is refused."""
    session = Session(SERVER, PolicyBook(), Clock())
    assert not any(session.grants().allows_some(permission) for permission in Permission)


def test_a_replaced_policy_counts_from_the_next_request_on() -> None:
    """An open connection keeps no rights that the policy no longer gives; nothing is compiled in vain."""
    book = PolicyBook(parse_policy(RULES), "one")
    session = Session(SERVER, book, Clock())
    grants = session.grants()
    assert grants.allows(Permission.ENCRYPT, "t")
    assert session.grants() is grants
    book.replace(parse_policy({"rules": []}), "two")
    assert book.generation == "two"
    assert not session.grants().allows(Permission.ENCRYPT, "t")
    book.replace(parse_policy(RULES), "three")
    assert session.grants().allows(Permission.ENCRYPT, "t")


def test_an_expired_certificate_ends_the_rights_of_its_connection() -> None:
    """A connection may outlive its certificate, its rights don't."""
    clock = Clock(2000.0)
    session = Session(SERVER, PolicyBook(parse_policy(RULES)), clock)
    assert not session.grants().allows_some(Permission.ADMIN)
    clock.at += 0.001
    with pytest.raises(CertificateExpired):
        session.grants()


def test_a_sockets_peer_has_nothing_to_expire() -> None:
    """Its name is its uid."""
    session = Session(Identity(IdentityKind.UID, "1000"), PolicyBook(), Clock(1e12))
    assert not session.grants().allows_some(Permission.ADMIN)
    assert session.name == "uid:1000"


def test_limits_are_an_identitys_own_over_all_its_connections() -> None:
    """A second connection gets no second share; another identity its own; without limits there is none."""
    limits = [{"identities": ["dns:*"], "operations_per_second": 1, "burst": 2, "concurrent": 1}]
    clock = Clock(0.0)
    book = PolicyBook(parse_policy({"rules": [], "limits": limits}), "one", clock)
    one, two = Session(SERVER, book, clock), Session(SERVER, book, clock)
    other = Session(Identity(IdentityKind.DNS, "other"), book, clock)
    with one.request():
        with pytest.raises(TooManyRequests, match="under way"), two.request():
            pass
        with other.request():
            pass
    with two.request():
        two.charge(5)
    with pytest.raises(TooManyRequests, match="1 operations a second") as refused, one.request():
        pass
    assert refused.value.retry_after == 6.0
    clock.at += 6.0
    with one.request():
        pass
    book.replace(parse_policy({"rules": []}), "two")
    for _ in range(5):
        with one.request(), two.request():
            one.charge(1000)


def test_a_request_that_fails_gives_its_place_back() -> None:
    """Errors do not eat up the cap."""
    limits = [{"identities": ["dns:server"], "concurrent": 1}]
    session = Session(SERVER, PolicyBook(parse_policy({"rules": [], "limits": limits})), Clock())
    for _ in range(3):
        with pytest.raises(KeyError), session.request():
            raise KeyError
