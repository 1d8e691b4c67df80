"""What an operator asks of the service: listings, state changes, KEKs. Synchronous, for commands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack
from urllib.parse import quote

import msgspec

from progressdb_kms.client import plans
from progressdb_kms.client.errors import EndpointInvalid, ProtocolViolation
from progressdb_kms.client.exchange import Options, drive
from progressdb_kms.client.opening import ConnectOptions, open_sync_sender
from progressdb_kms.client.protocol import Call, key_path
from progressdb_kms.client.types import (
    AuditRecord,
    BackupList,
    CreatedDek,
    KekCensus,
    KeyInfo,
    Rewrapped,
    RotationInfo,
    RotationInfos,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _KeyPage:
    keys: list[KeyInfo]
    cursor: str | None = None


@dataclass(frozen=True, slots=True)
class _AuditPage:
    records: list[str]
    cursor: str | None = None


class AdminClient:
    """Calls the administrative routes over the same transport, deadlines and retries as a provider.

    Use as a context manager, or call ``close``. All methods raise ``KmsError``.

    Args:
        url: ``https://host:port`` or ``unix:///path``; None takes it from the environment.
        options: As for ``open_provider``.

    Raises:
        EndpointInvalid: The address or the files can't be used, or name the embedded provider.
    """

    def __init__(self, url: str | None = None, **options: Unpack[ConnectOptions]) -> None:
        sender = open_sync_sender(url, **options)
        if sender is None:
            raise EndpointInvalid("administration needs a running service, not embedded:")
        self._sender = sender

    def list_keys(
        self, thread_id: str | None = None, state: str | None = None, limit: int | None = None
    ) -> Iterator[KeyInfo]:
        """Yield keys, page by page; one may appear twice while keys are being made.

        Args:
            thread_id: Only this thread's.
            state: Only those in this state.
            limit: Page size, 1 to 1,000; None leaves it to the service.

        Raises:
            InvalidParameter: A filter that the service does not take.
        """
        query = {"thread_id": thread_id, "state": state, "limit": None if limit is None else str(limit)}
        given = {name: value for name, value in query.items() if value is not None}
        cursor: str | None = None
        while True:
            page = self._send(
                Call("GET", "/v1/keys", _KeyPage, query=given | ({"cursor": cursor} if cursor else {}))
            )
            yield from page.keys
            if not page.cursor:
                return
            if page.cursor == cursor:
                raise ProtocolViolation("the listing's cursor does not move on")
            cursor = page.cursor

    def get_key(self, key_id: str) -> KeyInfo:
        """Return a key's metadata.

        Raises:
            KeyNotFound: No such key.
        """
        return self._send(Call("GET", key_path(key_id), KeyInfo))

    def disable(self, key_id: str) -> KeyInfo:
        """Let a key neither encrypt nor decrypt, until it is enabled again.

        Raises:
            KeyNotFound: No such key.
            InvalidTransition: Its state does not allow it.
            KeyDestroyed: It is gone.
        """
        return self._change(key_id, "disable")

    def enable(self, key_id: str) -> KeyInfo:
        """Undo ``disable``; raises likewise."""
        return self._change(key_id, "enable")

    def schedule_destruction(self, key_id: str, waiting_days: int | None = None) -> KeyInfo:
        """Destroy a key, and with it all data under it, after a waiting period.

        Args:
            key_id: The key.
            waiting_days: 7 to 30; None is the service's setting.

        Raises:
            KeyNotFound: No such key.
            KeyDestroyed: It is gone already.
            InvalidField: The waiting period is out of bounds.
        """
        body = {} if waiting_days is None else {"waiting_days": waiting_days}
        return self._change(key_id, "schedule-destruction", body)

    def cancel_destruction(self, key_id: str) -> KeyInfo:
        """Take back ``schedule_destruction``; the key is disabled then. Raises as ``disable``."""
        return self._change(key_id, "cancel-destruction")

    def rewrap(self, key_id: str) -> Rewrapped:
        """Wrap a key under the active KEK.

        Raises:
            KeyNotFound: No such key.
            WrappedKeyInvalid: The stored blob does not unwrap.
        """
        return self._send(Call("POST", "/rewrap", Rewrapped, {"key_id": key_id}))

    def rotate_dek(self, thread_id: str, idempotency_key: str | None = None) -> CreatedDek:
        """Make a thread's next DEK; see ``KmsProvider.rotate_dek``."""
        return drive(plans.rotate_dek(thread_id, idempotency_key), self._send)

    def backups(self) -> BackupList:
        """Return what the service knows of snapshots and exports."""
        return self._send(Call("GET", "/v1/backups", BackupList))

    def audit(
        self,
        *,
        since: str | None = None,
        action: str | None = None,
        identity: str | None = None,
        key_id: str | None = None,
        thread_id: str | None = None,
    ) -> Iterator[AuditRecord]:
        """Yield the audit records that the store keeps, the oldest first, page by page.

        Args:
            since: From this time on, RFC 3339.
            action: Only this action, ``key.disable`` say.
            identity: Only what this caller asked for.
            key_id: Only on this key.
            thread_id: Only on this thread's keys.

        Raises:
            PermissionDenied: The caller has no ``audit:read`` for all threads.
            InvalidParameter: ``since`` is not of the form.
        """
        query = {
            "since": since,
            "action": action,
            "identity": identity,
            "key_id": key_id,
            "thread_id": thread_id,
            "limit": "1000",
        }
        given = {name: value for name, value in query.items() if value is not None}
        cursor: str | None = None
        while True:
            more = {"cursor": cursor} if cursor else {}
            page = self._send(Call("GET", "/v1/audit", _AuditPage, query=given | more))
            for line in page.records:
                yield _audit_record(line)
            if not page.cursor:
                return
            if page.cursor == cursor:
                raise ProtocolViolation("the audit log's cursor does not move on")
            cursor = page.cursor

    def keks(self) -> KekCensus:
        """Return all KEK versions and how many keys each wraps."""
        return self._send(Call("GET", "/v1/keks", KekCensus))

    def rotations(self, limit: int = 20) -> list[RotationInfo]:
        """Return the latest rotations of the KEK, newest first.

        Args:
            limit: At most so many, up to 1,000.
        """
        call = Call("GET", "/v1/rotations", RotationInfos, query={"limit": str(limit)})
        return self._send(call).rotations

    def rotation(self, rotation_id: str) -> RotationInfo:
        """Return a rotation of the KEK.

        Raises:
            RotationNotFound: There is none of this name.
        """
        return self._send(Call("GET", f"/v1/rotations/{quote(rotation_id, safe='')}", RotationInfo))

    def openapi(self) -> dict[str, Any]:
        """Return the service's description of its own API (OpenAPI 3.1)."""
        body = self._send(Call("GET", "/openapi.json", bytes))
        try:
            return msgspec.json.decode(body, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise ProtocolViolation(f"the answer to GET /openapi.json can't be read: {error}") from None

    def close(self) -> None:
        """Close the connections."""
        self._sender.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _change(self, key_id: str, verb: str, body: dict[str, Any] | None = None) -> KeyInfo:
        return self._send(Call("POST", key_path(key_id, verb), KeyInfo, body))

    def _send(self, call: Call[T]) -> T:
        return self._sender.send(call, Options())


def _audit_record(line: str) -> AuditRecord:
    try:
        found = msgspec.json.decode(line, type=dict[str, Any])
        fields = {name: found[name] for name in AuditRecord.__dataclass_fields__ if name in found}
        return AuditRecord(**(fields | {"action": found["audit"], "line": line}))
    except (msgspec.MsgspecError, KeyError, TypeError):
        # Damaged in the store: shown as it is, so that nobody overlooks it.
        return AuditRecord("unreadable", 0.0, "", line=line)
