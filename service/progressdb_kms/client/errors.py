"""Errors that arise on the caller's side of the wire; those of the service are in ``domain.errors``.

::

    KmsError
    |-- ClientError
    |   |-- TransportError         nothing that can be used came back
    |   |   |-- ConnectionFailed   no connection, or it broke; worth another try later
    |   |   |-- TlsFailed          the two ends do not accept each other: someone has to change something
    |   |   `-- ProtocolViolation  an answer that this client does not understand
    |   |-- RemoteError            an error with a code that this release does not know
    |   |-- EndpointInvalid        the URL, the environment or the certificate files can't be used
    |   `-- ProviderClosed         used after ``close``
    `-- (domain.errors)            among them DeadlineExceeded, also where the client's own deadline passed

Whatever a provider raises is a ``KmsError``, but for ``TypeError`` and ``ValueError`` on wrong use and, from
the async one, ``asyncio.CancelledError``.
"""

from __future__ import annotations

from typing import Final

from progressdb_kms.domain import errors as domain
from progressdb_kms.domain.errors import KmsError, OperatorError


class ClientError(KmsError):
    """Root of what the client itself finds wrong."""

    code = "client_error"
    title = "The client could not do it"


class TransportError(ClientError):
    """No answer that can be used came back."""

    code = "transport_error"
    title = "The service could not be reached"


class ConnectionFailed(TransportError):
    """No connection, or it broke before the answer was complete.

    The request may have been carried out. All of them may be sent again: creates carry an Idempotency-Key.
    """

    code = "connection_failed"
    title = "The connection to the service failed"
    retryable = True


class TlsFailed(TransportError):
    """One of the two ends does not accept the other's certificate; the detail says what to do."""

    code = "tls_failed"
    title = "The service and this client do not accept each other's certificates"


class ProtocolViolation(TransportError):
    """The answer is not one of this service, or of a release too far from this one."""

    code = "protocol_violation"
    title = "The answer is not one that this client understands"


class EndpointInvalid(ClientError):
    """The URL, the environment variables or the certificate files can't be used as they are."""

    code = "endpoint_invalid"
    title = "The service's address is missing or not valid"


class ProviderClosed(ClientError):
    """The provider was used after ``close``."""

    code = "provider_closed"
    title = "This provider has been closed"


class RemoteError(ClientError):
    """An error answer with a code that this release does not know, or with a status alone.

    Args:
        code: The service's code, or ``http_<status>`` where there was none.
        detail: The service's own words.
    """

    code = "remote_error"
    title = "The service answered with an error"

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(detail)
        self.remote_code = code
        # `code` is a class attribute of errors whose class is known; here only the service knows it.
        vars(self)["code"] = code


def _remote_classes() -> dict[str, type[KmsError]]:
    """Classes by code that may come over the wire: neither the client's own nor an operator's."""
    return {
        code: cls
        for code, cls in domain.by_code().items()
        if cls.__module__ == domain.__name__ and not issubclass(cls, OperatorError)
    }


REMOTE_CLASSES: Final = _remote_classes()
"""Computed before anything of the client can have a code of the same name."""


def error_from(
    code: str,
    detail: str,
    *,
    retryable: bool | None = None,
    request_id: str = "",
    permission: str = "",
    identity: str = "",
) -> KmsError:
    """Return the typed error of a problem document or of a batch item's error.

    Args:
        code: The stable code; an unknown one gives RemoteError.
        detail: The service's words.
        retryable: Whether the service says that a retry may help; None leaves the class's own answer.
        request_id: Name of the request in the service's log.
        permission: For ``permission_denied``.
        identity: For ``permission_denied``.
    """
    cls = REMOTE_CLASSES.get(code)
    error: KmsError
    if cls is None:
        error = RemoteError(code, detail)
    elif issubclass(cls, domain.PermissionDenied):
        error = cls(permission, identity, detail)
    else:
        error = cls(detail)
    if retryable is not None:
        vars(error)["retryable"] = retryable
    if request_id:
        vars(error)["request_id"] = request_id
    return error


def request_id_of(error: KmsError) -> str:
    """Return the id by which the service's log knows the failed request; empty where it has none."""
    return str(vars(error).get("request_id", ""))
