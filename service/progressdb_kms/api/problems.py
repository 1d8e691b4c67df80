"""The one map from errors to HTTP answers (RFC 9457 problem documents)."""

from __future__ import annotations

import math
from typing import Any, Final

import msgspec

from progressdb_kms.domain import errors
from progressdb_kms.domain.errors import KmsError, OperatorError

PROBLEM_JSON: Final = "application/problem+json"

STATUS: Final[dict[str, int]] = {
    "malformed_body": 400,
    "duplicate_field": 400,
    "invalid_field": 400,
    "invalid_thread_id": 400,
    "malformed_ciphertext": 400,
    "invalid_parameter": 400,
    "invalid_header": 400,
    "kek_not_accepted": 400,
    "permission_denied": 403,
    "certificate_expired": 403,
    "key_not_found": 404,
    "rotation_not_found": 404,
    "route_not_found": 404,
    "method_not_allowed": 405,
    "not_acceptable": 406,
    "request_timeout": 408,
    "key_disabled": 409,
    "key_decrypt_only": 409,
    "key_pending_destruction": 409,
    "key_destroyed": 409,
    "key_exhausted": 409,
    "invalid_transition": 409,
    "body_too_large": 413,
    "plaintext_too_large": 413,
    "batch_too_large": 413,
    "unsupported_media_type": 415,
    "authentication_failed": 422,
    "wrapped_key_invalid": 422,
    "too_many_requests": 429,
    "headers_too_large": 431,
    "internal_error": 500,
    "store_unavailable": 503,
    "store_not_durable": 503,
    "audit_unavailable": 503,
    "stale_kek": 503,
    "kek_unavailable": 503,
    "kek_unreachable": 503,
    "overloaded": 503,
    "deadline_exceeded": 503,
    "not_ready": 503,
}
"""Status of each code. Codes are part of the API: added, never changed."""

CLOSES: Final = frozenset({"body_too_large", "request_timeout"})
"""After these the rest of the request may still be on its way: the connection can't be used again."""


class Problem(msgspec.Struct, omit_defaults=True):
    """An RFC 9457 problem document. ``permission`` and ``identity`` come with permission_denied only."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    retryable: bool | None = None
    request_id: str | None = None
    permission: str | None = None
    identity: str | None = None


def status_of(error: KmsError) -> int:
    """Return the HTTP status of an error; what must never leave the process is a 500."""
    return 500 if isinstance(error, OperatorError) else STATUS[error.code]


def problem_of(error: KmsError, request_id: str) -> tuple[int, list[tuple[str, str]], bytes]:
    """Return status, headers and body of the answer to an error."""
    status = status_of(error)
    if status == 500:  # noqa: PLR2004 - what went wrong inside is in the log, not in the answer
        error = errors.InternalError()
    document = Problem(
        type=f"urn:progressdb-kms:error:{error.code}",
        title=error.title,
        status=status,
        code=error.code,
        detail=error.detail,
        retryable=error.retryable,
        request_id=request_id,
        **error.extra,
    )
    headers: list[tuple[str, str]] = [("Content-Type", PROBLEM_JSON)]
    if status in {429, 503}:
        seconds = math.ceil(error.retry_after) if isinstance(error, errors.TooManyRequests) else 1
        headers.append(("Retry-After", str(max(1, seconds))))
    if error.code in CLOSES:
        headers.append(("Connection", "close"))
    return status, headers, msgspec.json.encode(document)


def all_codes() -> dict[str, Any]:
    """Return code, status, title and retryable of every error that the API can answer with, for the docs."""
    known = errors.by_code()
    return {
        code: {"status": status, "title": known[code].title, "retryable": known[code].retryable}
        for code, status in STATUS.items()
    }
