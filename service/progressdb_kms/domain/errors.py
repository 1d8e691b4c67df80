"""Every error that the service answers with, and that the client raises.

The tree, by whose fault it is::

    KmsError
    |-- RequestError            the caller can mend it
    |   |-- MalformedBody, DuplicateField, InvalidField, InvalidThreadId, MalformedCiphertext,
    |   |   InvalidParameter, InvalidHeader, KekNotAccepted
    |   |-- PermissionDenied, CertificateExpired
    |   |-- KeyNotFound, RotationNotFound, RouteNotFound, MethodNotAllowed, NotAcceptable,
    |   |   RequestTimeout
    |   |-- StateConflict
    |   |   `-- KeyDisabled, KeyDecryptOnly, KeyPendingDestruction, KeyDestroyed, KeyExhausted,
    |   |       InvalidTransition
    |   |-- BodyTooLarge, PlaintextTooLarge, BatchTooLarge, UnsupportedMediaType, HeadersTooLarge
    |   |-- TooManyRequests
    |   `-- AuthenticationFailed
    |-- WrappedKeyInvalid       a stored blob is forged, damaged or under another KEK
    |-- ServiceError            the service can't answer now; most of these are worth a retry
    |   |-- StoreUnavailable, StoreNotDurable, AuditUnavailable, StaleKek, KekUnavailable, KekUnreachable,
    |   |   Overloaded, DeadlineExceeded, NotReady
    |   `-- InternalError
    `-- OperatorError           refused at start or in a command: never sent over HTTP
        `-- KekMismatch, KekFileInvalid, RegistryLost, SettingsInvalid, PolicyInvalid, TlsInvalid,
            RotationRunning, RotationRefused, InstancesMissing, Fenced, BackupInvalid, ProvisionRefused,
            AuditKeyInvalid

"Wrong key or forged" (``AuthenticationFailed``), "malformed" (``MalformedCiphertext``), "not found",
"disabled" and "store unavailable" are different classes by contract: a caller does something else about
each. ``code`` is stable and part of the HTTP API; messages may change and never hold anything secret.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar, cast

_T = TypeVar("_T")


class KmsError(Exception):
    """Root of all errors of this package.

    Args:
        detail: What happened and what to do, in one line, safe to show to the caller.
    """

    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"
    retryable: ClassVar[bool] = False
    request_id: str = ""
    """Finds the request in the service's log; set by the client on what the service answered."""

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail or self.title)
        self.detail = detail or self.title

    @property
    def extra(self) -> dict[str, str]:
        """Further members of the problem document; none by default."""
        return {}


class RequestError(KmsError):
    """The request can't be granted as it is; the caller has to change something."""

    code = "invalid_field"
    title = "Invalid request"


class MalformedBody(RequestError):
    code = "malformed_body"
    title = "The body is not well-formed"


class DuplicateField(RequestError):
    code = "duplicate_field"
    title = "A field is given twice"


class InvalidField(RequestError):
    code = "invalid_field"
    title = "A field is missing, unknown or of the wrong form"


class InvalidThreadId(RequestError):
    code = "invalid_thread_id"
    title = "The thread_id is not valid"


class MalformedCiphertext(RequestError):
    code = "malformed_ciphertext"
    title = "The ciphertext is not of the right form"


class InvalidParameter(RequestError):
    code = "invalid_parameter"
    title = "A query parameter is missing or not valid"


class InvalidHeader(RequestError):
    code = "invalid_header"
    title = "A request header is not valid"


class KekNotAccepted(RequestError):
    code = "kek_not_accepted"
    title = "A key-encryption key is never taken over the network"


class PermissionDenied(RequestError):
    """The identity lacks a permission, or has it for other threads only."""

    code = "permission_denied"
    title = "Permission denied"

    def __init__(self, permission: str, identity: str, detail: str = "") -> None:
        super().__init__(
            detail or f"{identity} has no grant of {permission} here; ask for it in the policy file"
        )
        self.permission = permission
        self.identity = identity

    @property
    def extra(self) -> dict[str, str]:
        """The permission and the identity."""
        return {"permission": self.permission, "identity": self.identity}


class CertificateExpired(RequestError):
    code = "certificate_expired"
    title = "The client certificate of this connection has expired"


class KeyNotFound(RequestError):
    code = "key_not_found"
    title = "No key has this id"


class RotationNotFound(RequestError):
    code = "rotation_not_found"
    title = "No rotation has this id"


class RouteNotFound(RequestError):
    code = "route_not_found"
    title = "No such route"


class MethodNotAllowed(RequestError):
    code = "method_not_allowed"
    title = "This route does not take this method"


class NotAcceptable(RequestError):
    code = "not_acceptable"
    title = "Answers are application/json or application/msgpack"


class RequestTimeout(RequestError):
    code = "request_timeout"
    title = "The request did not arrive in time"
    retryable = True


class StateConflict(RequestError):
    """The key's state does not allow this."""

    code = "invalid_transition"
    title = "The key's state does not allow this"


class KeyDisabled(StateConflict):
    code = "key_disabled"
    title = "The key is disabled"


class KeyDecryptOnly(StateConflict):
    code = "key_decrypt_only"
    title = "The key only decrypts: its thread has a newer one"


class KeyPendingDestruction(StateConflict):
    code = "key_pending_destruction"
    title = "The key is waiting for its destruction"


class KeyDestroyed(StateConflict):
    code = "key_destroyed"
    title = "The key has been destroyed"


class KeyExhausted(StateConflict):
    """The key has been used as often as random nonces allow (SP 800-38D 8.3)."""

    code = "key_exhausted"
    title = "The key has encrypted as often as is safe: rotate the thread's key"


class InvalidTransition(StateConflict):
    code = "invalid_transition"


class BodyTooLarge(RequestError):
    code = "body_too_large"
    title = "The body is too large"


class PlaintextTooLarge(RequestError):
    code = "plaintext_too_large"
    title = "The plaintext is too large"


class BatchTooLarge(RequestError):
    code = "batch_too_large"
    title = "The batch has too many items"


class UnsupportedMediaType(RequestError):
    code = "unsupported_media_type"
    title = "Bodies are application/json or application/msgpack"


class HeadersTooLarge(RequestError):
    code = "headers_too_large"
    title = "The request's headers are too large"


class TooManyRequests(RequestError):
    """The caller's own limit in the policy.

    Attributes:
        retry_after: Seconds until it is worth asking again.
    """

    code = "too_many_requests"
    title = "Too many requests"
    retryable = True

    def __init__(self, detail: str = "", retry_after: float = 1.0) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class AuthenticationFailed(RequestError):
    """Wrong key, wrong AAD or a forged ciphertext: AES-GCM can't tell which, and neither can we."""

    code = "authentication_failed"
    title = "The ciphertext does not belong to this key and AAD"


class WrappedKeyInvalid(KmsError):
    """A wrapped DEK does not unwrap: forged, damaged, copied from another record, or under another KEK."""

    code = "wrapped_key_invalid"
    title = "The stored key does not unwrap: restore its record from a backup"


class ServiceError(KmsError):
    """The service can't answer now."""

    retryable = True


class StoreUnavailable(ServiceError):
    code = "store_unavailable"
    title = "The store does not answer"


class StoreNotDurable(ServiceError):
    code = "store_not_durable"
    title = "The store could lose acknowledged keys, so nothing is written to it"


class AuditUnavailable(ServiceError):
    code = "audit_unavailable"
    title = "The audit log can't be written, so nothing is changed"


class StaleKek(ServiceError):
    """A wrap under a KEK version below the store's floor: refresh the registry and wrap again."""

    code = "stale_kek"
    title = "The key-encryption key has been rotated meanwhile"


class KekUnavailable(ServiceError):
    code = "kek_unavailable"
    title = "The key-encryption key of this version is not loaded"


class KekUnreachable(ServiceError):
    """Where the key is kept can't be asked now; nothing is known of the key."""

    code = "kek_unreachable"
    title = "What keeps the key-encryption key does not answer"


class Overloaded(ServiceError):
    code = "overloaded"
    title = "The service is at its limit"


class DeadlineExceeded(ServiceError):
    code = "deadline_exceeded"
    title = "The request took too long"


class NotReady(ServiceError):
    code = "not_ready"
    title = "The service is not ready"


class InternalError(ServiceError):
    """A bug. The detail never holds the exception's text: that could name what was processed."""

    code = "internal_error"
    title = "Internal error; the request id finds it in the service's log"
    retryable = False


class OperatorError(KmsError):
    """Something that an operator has to mend before the service can start or the command can run."""

    code = "operator_error"
    title = "Not possible as configured"


class KekMismatch(OperatorError):
    """The KEK of a version is not the one that the store's keys were wrapped under."""

    code = "kek_mismatch"


class KekFileInvalid(OperatorError):
    code = "kek_file_invalid"


class RegistryLost(OperatorError):
    """The store holds keys but no KEK registry, or one that can't be read."""

    code = "registry_lost"


class SettingsInvalid(OperatorError):
    code = "settings_invalid"


class PolicyInvalid(OperatorError):
    code = "policy_invalid"


class TlsInvalid(OperatorError):
    code = "tls_invalid"


class RotationRunning(OperatorError):
    """Another run leads a rotation now."""

    code = "rotation_running"


class RotationRefused(OperatorError):
    """A rotation, restore or retirement that would endanger data, or that nothing is there for."""

    code = "rotation_refused"


class InstancesMissing(OperatorError):
    """Live instances have not loaded the new KEK version in time; running again goes on waiting."""

    code = "instances_missing"


class Fenced(OperatorError):
    """Another run has taken over what this one worked on: it must stop, and has done no harm."""

    code = "fenced"


class BackupInvalid(OperatorError):
    """A backup is damaged, or not of this store or these KEKs."""

    code = "backup_invalid"


class ProvisionRefused(OperatorError):
    """Something that a first start needs is missing or lost, and can't be made without endangering data."""

    code = "provision_refused"


class AuditKeyInvalid(OperatorError):
    code = "audit_key_invalid"


def _walk(cls: type[KmsError]) -> list[type[KmsError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _walk(sub))]


def by_code() -> dict[str, type[KmsError]]:
    """Map each code to its most specific class; the client raises by it."""
    found: dict[str, type[KmsError]] = {}
    for cls in _walk(KmsError):
        found[cls.code] = cls
    return found


def refreshed(result: _T) -> _T:
    """Return ``result``, or a new error like it: one that several callers share must not be raised twice."""
    if isinstance(result, KmsError) and not isinstance(result, PermissionDenied):
        return cast("_T", type(result)(result.detail))
    return result
