"""What an event says in the log."""

from __future__ import annotations

from progressdb_kms.ports import AuditEvent


def fields_of(event: AuditEvent, at: float, instance: str) -> dict[str, object]:
    """Return a record's members, in order; those that are empty and optional are left out.

    Args:
        event: What to say.
        at: When, in Unix seconds.
        instance: Who says it.
    """
    record: dict[str, object] = {
        "audit": event.action,
        "at": round(at, 6),
        "instance": instance,
        "outcome": event.outcome,
        "identity": event.identity,
        "request_id": event.request_id,
    }
    if event.key_id:
        record["key_id"] = event.key_id
    if event.thread_id:
        record["thread_id"] = event.thread_id
    if event.detail:
        record["detail"] = event.detail
    return record
