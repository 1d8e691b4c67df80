"""From an address to a provider."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from progressdb_kms.client.aio import AsyncHttpSender
from progressdb_kms.client.aio_coalescing import CoalescingSender
from progressdb_kms.client.blocking import SyncHttpSender
from progressdb_kms.client.blocking_coalescing import SyncCoalescingSender
from progressdb_kms.client.endpoint import Endpoint, TlsFiles, resolve
from progressdb_kms.client.errors import EndpointInvalid
from progressdb_kms.client.exchange import Rules
from progressdb_kms.client.network import CONNECT_TIMEOUT, MAX_CONNECTIONS
from progressdb_kms.client.protocol import Encoding
from progressdb_kms.client.provider import KmsProvider, SyncKmsProvider
from progressdb_kms.client.retry import RetryPolicy
from progressdb_kms.client.senders import SenderProvider, SyncSenderProvider

if TYPE_CHECKING:
    from progressdb_kms.client.embedded import EmbeddedProvider, SyncEmbeddedProvider

AnyPath = str | os.PathLike[str]


class ConnectOptions(TypedDict, total=False):
    """How to reach the service. All have defaults; the embedded provider needs none.

    Attributes:
        ca: PEM file of the CA that the service's certificate comes from; else ``PROGRESSDB_KMS_CA``, else the
            system's.
        cert: PEM file of this caller's certificate and chain; else ``PROGRESSDB_KMS_CERT``.
        key: PEM file of its key, not encrypted; else ``PROGRESSDB_KMS_KEY``, else in ``cert``. When the files
            are renewed, calls use the new ones within a second or so.
        deadline: Seconds for a call over all its tries (5).
        connect_timeout: Seconds for a connection (1).
        retries: Further tries after a failed connection, or an answer 429, 502, 503 or 504 (2).
        max_connections: At most so many at a time (32); further calls wait.
        encoding: ``json`` (default), which every release of the service speaks, or ``msgpack``, which is
            smaller.
        coalesce: Let calls of the same moment travel as one batch (True): ``encrypt_with_dek``,
            ``decrypt_with_dek`` and ``create_dek_for_thread`` of many tasks or threads on one provider.
        allow_plain_http: Accept ``http://``, for an older service on a loopback address.
    """

    ca: AnyPath | None
    cert: AnyPath | None
    key: AnyPath | None
    deadline: float
    connect_timeout: float
    retries: int
    max_connections: int
    encoding: Encoding
    coalesce: bool
    allow_plain_http: bool


def open_provider(url: str | None = None, **options: Unpack[ConnectOptions]) -> KmsProvider:
    """Return a provider; nothing is sent before its first call.

    Args:
        url: ``https://host:port``, ``unix:///path`` (the caller is known by its user id), or ``embedded:``
            for the in-process provider of development and tests. None takes ``PROGRESSDB_KMS_ENDPOINT``
            (also a socket's path, or host:port meaning https) and ``PROGRESSDB_KMS_MODE`` (``external``,
            ``embedded``) from the environment.
        options: See ``ConnectOptions``.

    Raises:
        EndpointInvalid: The address or the files can't be used; says what to set.
    """
    endpoint = _endpoint(url, options)
    if endpoint.embedded:
        provider, _ = _embedded()
        return provider()
    rules = _rules(options)
    sender = AsyncHttpSender(
        endpoint,
        rules,
        connect_timeout=options.get("connect_timeout", CONNECT_TIMEOUT),
        max_connections=options.get("max_connections", MAX_CONNECTIONS),
    )
    together = options.get("coalesce", True)
    return SenderProvider(CoalescingSender(sender, rules) if together else sender, rules.encoding)


def open_sync_provider(url: str | None = None, **options: Unpack[ConnectOptions]) -> SyncKmsProvider:
    """Return a provider for code without an event loop; arguments and errors as for ``open_provider``."""
    endpoint = _endpoint(url, options)
    if endpoint.embedded:
        _, provider = _embedded()
        return provider()
    rules = _rules(options)
    sender = _sync_sender(endpoint, options)
    together = options.get("coalesce", True)
    return SyncSenderProvider(SyncCoalescingSender(sender, rules) if together else sender, rules.encoding)


def open_sync_sender(url: str | None = None, **options: Unpack[ConnectOptions]) -> SyncHttpSender | None:
    """Return the transport of a sync provider, None for the embedded one; arguments as ``open_provider``."""
    endpoint = _endpoint(url, options)
    return None if endpoint.embedded else _sync_sender(endpoint, options)


def _embedded() -> tuple[type[EmbeddedProvider], type[SyncEmbeddedProvider]]:
    """Import the embedded providers: they need packages that the client otherwise does without.

    Raises:
        EndpointInvalid: One is not installed.
    """
    try:
        from progressdb_kms.client.embedded import (  # noqa: PLC0415 - as said above
            EmbeddedProvider,
            SyncEmbeddedProvider,
        )
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise EndpointInvalid(
            f"embedded: needs the package {package}; install progressdb-kms[embedded]"
        ) from error
    return EmbeddedProvider, SyncEmbeddedProvider


def _sync_sender(endpoint: Endpoint, options: ConnectOptions) -> SyncHttpSender:
    return SyncHttpSender(
        endpoint,
        _rules(options),
        connect_timeout=options.get("connect_timeout", CONNECT_TIMEOUT),
        max_connections=options.get("max_connections", MAX_CONNECTIONS),
    )


def _rules(options: ConnectOptions) -> Rules:
    usual = Rules()
    return Rules(
        deadline=options.get("deadline", usual.deadline),
        retry=RetryPolicy(options.get("retries", usual.retry.retries)),
        encoding=options.get("encoding", usual.encoding),
    )


def _endpoint(url: str | None, options: ConnectOptions) -> Endpoint:
    # At run time a TypedDict takes anything, and a misspelt option would be ignored without a word.
    for name in options.keys() - ConnectOptions.__optional_keys__:
        raise TypeError(
            f"unknown option {name}; known are {', '.join(sorted(ConnectOptions.__optional_keys__))}"
        )
    if options.get("encoding", "json") not in {"json", "msgpack"}:
        raise ValueError("encoding is json or msgpack")
    ca, cert, key = options.get("ca"), options.get("cert"), options.get("key")
    files = TlsFiles(*(Path(path) if path is not None else None for path in (ca, cert, key)))
    return resolve(url, files, os.environ, allow_plain_http=options.get("allow_plain_http", False))
