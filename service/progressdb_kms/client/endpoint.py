"""Where the service is: from a URL or from the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from progressdb_kms.client.errors import EndpointInvalid

ENV_ENDPOINT: Final = "PROGRESSDB_KMS_ENDPOINT"
ENV_MODE: Final = "PROGRESSDB_KMS_MODE"
ENV_CA: Final = "PROGRESSDB_KMS_CA"
ENV_CERT: Final = "PROGRESSDB_KMS_CERT"
ENV_KEY: Final = "PROGRESSDB_KMS_KEY"

EMBEDDED: Final = "embedded:"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. Without ``ca`` the system's CAs are trusted; ``key`` may stand in ``cert``'s file."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A parsed address.

    Attributes:
        url: ``scheme://host:port`` to send to; for a Unix socket ``http://localhost``.
        uds: Path of the Unix socket, if it is one.
        tls: Certificate files, for ``https`` only.
        embedded: The in-process provider instead of a service.
    """

    url: str = ""
    uds: str | None = None
    tls: TlsFiles | None = None
    embedded: bool = False

    def __str__(self) -> str:
        if self.embedded:
            return EMBEDDED
        return f"unix://{self.uds}" if self.uds else self.url


def resolve(
    url: str | None,
    tls: TlsFiles,
    environ: Mapping[str, str],
    *,
    allow_plain_http: bool = False,
) -> Endpoint:
    """Return the endpoint that the arguments, or else the environment, name.

    Args:
        url: ``https://host:port``, ``unix:///path``, ``embedded:``; None reads ``PROGRESSDB_KMS_MODE`` and
            ``PROGRESSDB_KMS_ENDPOINT``.
        tls: Certificate files; each that is None is taken from the environment.
        environ: The environment.
        allow_plain_http: Accept ``http://``, for an older service on a loopback address.

    Raises:
        EndpointInvalid: Says what to set.
    """
    found = TlsFiles(
        ca=tls.ca or _path(environ, ENV_CA),
        cert=tls.cert or _path(environ, ENV_CERT),
        key=tls.key or _path(environ, ENV_KEY),
    )
    return parse(
        url if url is not None else _from_environment(environ), found, allow_plain_http=allow_plain_http
    )


def parse(url: str, tls: TlsFiles, *, allow_plain_http: bool = False) -> Endpoint:
    """Return the endpoint that ``url`` names; see ``resolve``."""
    if url in {EMBEDDED, "embedded"}:
        return Endpoint(embedded=True)
    if url.startswith("/"):
        return Endpoint("http://localhost", uds=url)
    if url.startswith("unix:"):
        return Endpoint("http://localhost", uds=_socket_path(url))
    if "://" not in url:
        url = f"https://{url}"
    scheme, origin = _origin(url)
    if scheme == "https":
        if tls.key is not None and tls.cert is None:
            raise EndpointInvalid(f"a key without a certificate: give cert as well, or set {ENV_CERT}")
        return Endpoint(origin, tls=tls)
    if not allow_plain_http:
        raise EndpointInvalid(
            "http:// would send keys and messages in the clear: use https:// with certificates, or unix://"
            " (allow_plain_http=True is there for an older service on a loopback address)"
        )
    return Endpoint(origin)


def _path(environ: Mapping[str, str], name: str) -> Path | None:
    value = environ.get(name)
    return Path(value) if value else None


def _from_environment(environ: Mapping[str, str]) -> str:
    mode = environ.get(ENV_MODE, "")
    if mode not in {"", "external", "embedded"}:
        raise EndpointInvalid(f"{ENV_MODE} must be external or embedded")
    if mode == "embedded":
        return EMBEDDED
    endpoint = environ.get(ENV_ENDPOINT, "")
    if not endpoint:
        raise EndpointInvalid(
            f"no address: give a URL, or set {ENV_ENDPOINT} to https://host:port or a socket's path"
            f" (or {ENV_MODE}=embedded for development)"
        )
    return endpoint


def _socket_path(url: str) -> str:
    path = url.removeprefix("unix:").removeprefix("//")
    if not path.startswith("/"):
        raise EndpointInvalid("a Unix socket is written unix:///absolute/path")
    return path


def _origin(url: str) -> tuple[str, str]:
    """Split ``url`` into scheme and origin. Its text is not repeated in errors: it may hold a password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise EndpointInvalid("the address is not a valid URL") from None
    if parts.scheme not in {"https", "http"} or not parts.hostname:
        raise EndpointInvalid("the address must be https://host:port, unix:///path, host:port or embedded:")
    if parts.username is not None or parts.path not in {"", "/"} or parts.query or parts.fragment:
        raise EndpointInvalid(
            "the address is scheme, host and port alone; callers are known by their certificate"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return parts.scheme, f"{parts.scheme}://{host}" + (f":{port}" if port is not None else "")
