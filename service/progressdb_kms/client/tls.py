"""The client's side of mutual TLS: contexts, renewal of the files under them, and what a refusal means."""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final

from progressdb_kms.client.endpoint import ENV_CA, ENV_CERT, ENV_KEY, TlsFiles
from progressdb_kms.client.errors import EndpointInvalid, TlsFailed

CHECK_EVERY: Final = 1.0
"""Seconds between two looks at the files."""

_log: Final = logging.getLogger("progressdb_kms.client")

_Stamp = tuple[tuple[int, int, int, int], ...]


def build_context(files: TlsFiles) -> ssl.SSLContext:
    """Return a context that trusts ``files.ca`` alone, checks host names, and shows ``files.cert``.

    TLS 1.3 and nothing older. Made from bare flags rather than by ``create_default_context``, whose choice
    of verification flags differs between Python releases.

    Raises:
        EndpointInvalid: A file can't be read or used; says which.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # RFC 9525: a name is a SAN; the common name is for people.
    context.hostname_checks_common_name = False
    if files.ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        try:
            context.load_verify_locations(cafile=files.ca)
        except ssl.SSLError:
            raise EndpointInvalid(f"the CA file {files.ca} ({ENV_CA}) holds no PEM certificate") from None
        except OSError as error:
            raise EndpointInvalid(
                f"the CA file {files.ca} ({ENV_CA}) can't be read: {error.strerror}"
            ) from None
    if files.cert is not None:
        _load_certificate(context, files.cert, files.key)
    return context


def _load_certificate(context: ssl.SSLContext, cert: Path, key: Path | None) -> None:
    where = f"the certificate {cert} ({ENV_CERT}) and its key {key or cert} ({ENV_KEY})"

    def no_password() -> str:
        # Without this OpenSSL asks on the terminal, and a server has none.
        raise EndpointInvalid(f"the key {key or cert} ({ENV_KEY}) is encrypted; give one that is not")

    try:
        context.load_cert_chain(cert, key, password=no_password)
    except ssl.SSLError as error:
        why = "do not belong together" if error.reason == "KEY_VALUES_MISMATCH" else "are not valid PEM"
        raise EndpointInvalid(f"{where} {why}") from None
    except OSError as error:
        raise EndpointInvalid(f"{where} can't be read: {error.strerror}") from None


class ClientTls:
    """The context of this moment: looks at the files at most once a second, on use, and never in between.

    A renewed set that can't be used (half written, certificate before key) leaves the last good one in
    force and is tried again at the next look.

    Args:
        files: The files.
        now: A clock that never goes back, in seconds.

    Raises:
        EndpointInvalid: The first set can't be used.
    """

    def __init__(self, files: TlsFiles, now: Callable[[], float]) -> None:
        self._files = files
        self._now = now
        self._checked = now()
        # The stamp is taken before the files are read: a change in between is seen at the next look.
        self._stamp = self._look()
        self._context = build_context(files)
        self._refused: _Stamp | None = None

    def context(self) -> ssl.SSLContext:
        """Return the context to use; another object once the files have changed."""
        now = self._now()
        if now - self._checked >= CHECK_EVERY:
            self._checked = now
            self._reload(self._look())
        return self._context

    def _reload(self, stamp: _Stamp) -> None:
        if stamp == self._stamp:
            return
        try:
            self._context = build_context(self._files)
        except EndpointInvalid as error:
            if stamp != self._refused:
                _log.warning("renewed certificate files are not used: %s", error)
            self._refused = stamp
        else:
            self._stamp, self._refused = stamp, None

    def _look(self) -> _Stamp:
        """Return the content identity of the files; following links, since a Secret volume swaps one."""
        found = []
        for path in (self._files.ca, self._files.cert, self._files.key):
            try:
                stat = os.stat(path) if path is not None else None  # noqa: PTH116 - Path.stat is slower
            except OSError:
                stat = None
            found.append((stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size) if stat else (0, 0, 0, 0))
        return tuple(found)


NO_CERTIFICATE: Final = (
    f"the service asks for a client certificate: give cert and key ({ENV_CERT}, {ENV_KEY})"
)

_REMEDIES: Final = (
    ("CERTIFICATE_REQUIRED", NO_CERTIFICATE),
    ("HANDSHAKE_FAILURE", f"the service refused: give it a client certificate ({ENV_CERT}, {ENV_KEY})"),
    ("CERTIFICATE_EXPIRED", "the service says that the client certificate has expired: renew it"),
    (
        "CERTIFICATE_REVOKED",
        "the service says that the client certificate is revoked: have another one issued",
    ),
    (
        "ALERT_UNKNOWN_CA",
        "the service does not trust the CA of the client certificate: use one of its client CA",
    ),
    ("BAD_CERTIFICATE", "the service does not accept the client certificate: see its log for the reason"),
    (
        "UNSUPPORTED_CERTIFICATE",
        "the client certificate is not for client authentication (extended key usage)",
    ),
    ("CERTIFICATE_UNKNOWN", "the service does not accept the client certificate: see its log for the reason"),
    ("ACCESS_DENIED", "the service does not accept the client certificate: see its log for the reason"),
    ("PROTOCOL_VERSION", "the other end does not speak TLS 1.3"),
    ("UNSUPPORTED_PROTOCOL", "the other end does not speak TLS 1.3"),
    ("WRONG_VERSION_NUMBER", "the other end does not speak TLS: is this the service's port?"),
    ("RECORD_LAYER_FAILURE", "the other end does not speak TLS: is this the service's port?"),
)


def tls_failure(error: BaseException | None, endpoint: str) -> TlsFailed | None:
    """Return the error to raise if ``error`` comes from a refusal in TLS, None for a mere broken connection.

    In TLS 1.3 the service judges the client's certificate after the client has finished, so that a
    refusal is seen only in the first read.
    """
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return TlsFailed(
                f"the certificate of {endpoint} is not accepted: {error.verify_message};"
                f" does {ENV_CA} hold its CA, and is it issued for this host name?"
            )
        # An end without a farewell and a farewell without an answer are broken connections.
        if isinstance(error, ssl.SSLError) and not isinstance(
            error, ssl.SSLEOFError | ssl.SSLZeroReturnError
        ):
            reason = error.reason or "no reason"
            remedy = next((remedy for name, remedy in _REMEDIES if name in reason), reason)
            return TlsFailed(f"TLS with {endpoint} failed: {remedy}")
        error = error.__cause__
    return None
