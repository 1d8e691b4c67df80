"""The one map from errors to answers."""

from __future__ import annotations

import msgspec
import pytest

from progressdb_kms.api.problems import CLOSES, STATUS, all_codes, problem_of, status_of
from progressdb_kms.domain import errors


@pytest.mark.parametrize("code", STATUS)
def test_every_code_makes_a_problem(code: str) -> None:
    """RFC 9457 members, a stable type, Retry-After where a retry is invited."""
    cls = errors.by_code()[code]
    error = cls("key:read", "dns:x") if cls is errors.PermissionDenied else cls()
    status, headers, body = problem_of(error, "r1")
    problem = msgspec.json.decode(body)
    assert status == STATUS[code] == problem["status"]
    assert problem["type"] == f"urn:progressdb-kms:error:{code}"
    assert (problem["code"], problem["request_id"]) == (code, "r1")
    assert problem["retryable"] is cls.retryable
    assert problem["title"] == cls.title
    assert dict(headers)["Content-Type"] == "application/problem+json"
    assert ("Retry-After" in dict(headers)) == (status in {429, 503})
    assert ("Connection" in dict(headers)) == (code in CLOSES)
    assert ("permission" in problem) == ("identity" in problem) == (code == "permission_denied")
    assert status in {429, 503, 408} or not problem["retryable"]


@pytest.mark.parametrize(
    "error", [errors.KekMismatch("secret"), errors.InternalError("secret"), errors.OperatorError("secret")]
)
def test_what_is_wrong_inside_is_not_told(error: errors.KmsError) -> None:
    """Operators' errors and bugs become one sentence."""
    status, _, body = problem_of(error, "r1")
    assert status == status_of(error) == 500
    assert b"secret" not in body
    assert msgspec.json.decode(body)["code"] == "internal_error"


def test_the_documentations_table_is_whole() -> None:
    """Each code that can be answered, with what a client needs to know of it."""
    table = all_codes()
    assert set(table) == set(STATUS)
    assert table["store_unavailable"] == {
        "status": 503,
        "title": "The store does not answer",
        "retryable": True,
    }
