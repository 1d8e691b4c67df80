"""What auditors read of the audit log over the API."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.errors import InvalidParameter
from progressdb_kms.domain.policy import Permission

if TYPE_CHECKING:
    from collections.abc import Mapping

    from progressdb_kms.ports.audit import AuditStore
    from progressdb_kms.usecases.session import Session

FILTERS: Final = ("action", "identity", "key_id", "thread_id")
_MEMBERS: Final = {"action": "audit"}
_LAST_NUMBER: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class AuditPage:
    """Lines of the log; ``cursor`` is None at the end."""

    lines: list[str]
    cursor: str | None


async def audit_page(
    store: AuditStore,
    session: Session,
    *,
    since: str | None,
    cursor: str | None,
    limit: int,
    filters: Mapping[str, str],
) -> AuditPage:
    """Return the records among the next ``limit`` ones that the filters let through; it may be none of them.

    Args:
        store: Where they are.
        session: Who asks; needs ``audit:read`` for all threads.
        since: Begin with the records of this time, RFC 3339.
        cursor: Go on behind an earlier page; ``since`` means nothing then.
        limit: How many records to look at, 1 to 1,000.
        filters: Values by name in ``FILTERS``.

    Raises:
        PermissionDenied: The caller may not.
        InvalidParameter: ``since`` or the cursor is not valid.
        StoreUnavailable: Not now.
    """
    session.grants().require(Permission.AUDIT)
    after = cursor or ("0-0" if since is None else _just_before(since))
    page = await store.page(after, limit)
    lines = [line.decode("ascii", errors="replace") for _, line in page if _matches(line, filters)]
    return AuditPage(lines, page[-1][0] if len(page) == limit else None)


def _just_before(since: str) -> str:
    try:
        at = datetime.fromisoformat(since)
        milliseconds = int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise InvalidParameter("since is a time of RFC 3339, 2026-01-31T12:00:00Z say") from None
    return f"{milliseconds - 1}-{_LAST_NUMBER}" if milliseconds > 0 else "0-0"


def _matches(line: bytes, filters: Mapping[str, str]) -> bool:
    if not filters:
        return True
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return True  # damaged: the auditor should see it
    return not isinstance(fields, dict) or all(
        fields.get(_MEMBERS.get(name, name)) == value for name, value in filters.items()
    )
