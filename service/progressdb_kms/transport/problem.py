"""Answers that the transport gives by itself, as problem documents (RFC 9457)."""

from __future__ import annotations

import secrets
from http import HTTPStatus

import msgspec

from progressdb_kms.domain.errors import KmsError

Headers = list[tuple[bytes, bytes]]


def problem(status: int, error: KmsError) -> tuple[Headers, bytes]:
    """Return headers and body of an error answer, after which the connection closes.

    It gets a request id of its own: what the caller sent as one was not, or not safely, understood.
    """
    request_id = secrets.token_hex(16)
    body = msgspec.json.encode(
        {
            "type": f"urn:progressdb-kms:error:{error.code}",
            "title": error.title,
            "status": status,
            "code": error.code,
            "detail": error.detail,
            "retryable": error.retryable,
            "request_id": request_id,
        }
    )
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id.encode()),
        (b"connection", b"close"),
    ]
    return headers, body


def raw_problem(status: int, error: KmsError) -> bytes:
    """Return an error answer as the bytes of an HTTP/1.1 response."""
    headers, body = problem(status, error)
    lines = [b"HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase.encode())]
    lines += [b"%s: %s" % header for header in headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
