"""The tree of errors, their codes, and what a shared one becomes."""

from __future__ import annotations

import re

import pytest

from progressdb_kms.api.problems import STATUS
from progressdb_kms.domain import errors
from progressdb_kms.domain.errors import KmsError, OperatorError


def classes(root: type[KmsError] = KmsError) -> list[type[KmsError]]:
    """Return all error classes of the module below a root."""
    below = [cls for sub in root.__subclasses__() for cls in classes(sub)]
    return [root, *below] if root.__module__ == errors.__name__ else below


def drawn() -> dict[str, str]:
    """Return the tree in the module's docstring: class to parent."""
    tree = (errors.__doc__ or "").split("::\n\n", 1)[1].split("\n\n", 1)[0]
    parents: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in tree.splitlines():
        depth = len(re.match(r"[\s|`-]*", line)[0])  # type: ignore[index]  # the pattern matches anything
        names = re.findall(r"\b[A-Z]\w*[a-z]\w*\b", re.split(r"\s{4,}(?=[a-z])", line.strip(" |`-"))[0])
        while path and path[-1][0] >= depth:
            # A line that goes on with the list above has its depth, and so its parent.
            path.pop()
        for name in names:
            if path:
                parents[name] = path[-1][1]
        path.append((depth, names[0]))
    return parents


def test_the_drawn_tree_is_the_real_one() -> None:
    """Whoever reads the docstring knows what to catch."""
    real = {cls.__name__: cls.__base__.__name__ for cls in classes() if cls is not KmsError and cls.__base__}
    assert drawn() == real


def test_codes_are_unique_among_what_is_raised() -> None:
    """One code, one class; only an abstract parent may lend its code."""
    leaves = [cls for cls in classes() if not cls.__subclasses__()]
    assert len({cls.code for cls in leaves}) == len(leaves)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", cls.code) for cls in leaves)
    ours = {code: cls for code, cls in errors.by_code().items() if cls.__module__ == errors.__name__}
    assert ours == {cls.code: cls for cls in leaves} | {"operator_error": OperatorError}


def test_every_code_has_a_status_and_the_reverse() -> None:
    """What may reach a caller has a status; what may not has none."""
    sent = {cls.code for cls in classes() if not issubclass(cls, OperatorError)}
    assert set(STATUS) == sent


@pytest.mark.parametrize(
    "cls", [cls for cls in classes() if cls is not errors.PermissionDenied], ids=lambda c: c.__name__
)
def test_a_detail_or_the_title_is_the_message(cls: type[KmsError]) -> None:
    """An error always says something."""
    assert cls().detail == str(cls()) == cls.title
    assert cls("because").detail == str(cls("because")) == "because"
    assert cls().extra == {}


def test_permission_denied_names_both() -> None:
    """A refusal says which permission, and for whom."""
    error = errors.PermissionDenied("key:read", "dns:me")
    assert error.extra == {"permission": "key:read", "identity": "dns:me"}
    assert "key:read" in error.detail
    assert "dns:me" in error.detail


def test_only_passing_troubles_are_retryable() -> None:
    """A retry is promised to help only where waiting can mend it."""
    retryable = {cls.code for cls in classes() if cls.retryable and not cls.__subclasses__()}
    assert retryable == {
        "request_timeout",
        "too_many_requests",
        "store_unavailable",
        "store_not_durable",
        "audit_unavailable",
        "stale_kek",
        "kek_unavailable",
        "kek_unreachable",
        "overloaded",
        "deadline_exceeded",
        "not_ready",
    }


def test_a_shared_error_is_made_anew() -> None:
    """Two callers never raise one object, whose traceback would grow; what is no error stays itself."""
    shared = errors.StoreUnavailable("away")
    fresh = errors.refreshed(shared)
    assert fresh is not shared
    assert type(fresh) is errors.StoreUnavailable
    assert fresh.detail == "away"
    value = object()
    assert errors.refreshed(value) is value
