"""Exports in S3-compatible storage: put there and read back, fetched, removed. Needs the extra ``s3``."""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
)

from progressdb_kms.cli.exportnames import PREFIX, SUFFIX
from progressdb_kms.domain.errors import BackupInvalid, OperatorError, SettingsInvalid

# The libraries tell where they found credentials, and at `debug` what they sign.
for _name in ("boto3", "botocore", "s3transfer"):
    logging.getLogger(_name).setLevel(logging.WARNING)

_URL: Final = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<path>[^?#]*))?")
_PART: Final = 64 * 2**20
_CREDENTIALS: Final = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what gives the role its token"
_REGION: Final = "set AWS_REGION to the bucket's region"
_REMEDIES: Final = {
    "NoSuchBucket": "there is no such bucket",
    "NoSuchKey": "there is no such object",
    "404": "there is no such object",
    "AccessDenied": (
        "the credentials need s3:PutObject, s3:GetObject, s3:ListBucket, and s3:DeleteObject for --keep"
    ),
    "403": "the credentials may not",
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "ExpiredToken": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "RequestTimeTooSkewed": "the clock here is wrong",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
}


class Bucket:
    """Exports under one prefix of a bucket.

    Args:
        url: ``s3://bucket`` or ``s3://bucket/prefix``; of a single export, with its name.
        endpoint: Address of S3-compatible storage; None takes ``AWS_ENDPOINT_URL_S3`` or AWS itself.
        allow_http: Accept an ``http://`` endpoint that is not on this machine.
        part: Bytes from which, and by which, a file is uploaded in parts.

    Raises:
        SettingsInvalid: Something of it can't be used; the message does not repeat what may hold a password.
    """

    def __init__(
        self, url: str, endpoint: str | None = None, *, allow_http: bool = False, part: int = _PART
    ) -> None:
        found = _URL.fullmatch(url)
        if found is None:
            raise SettingsInvalid("write --s3 s3://bucket/prefix; credentials come from the environment")
        self._bucket = found["bucket"]
        path = (found["path"] or "").strip("/")
        self.name = ""
        """The export that the URL names; empty where it names a prefix."""
        if path.endswith(SUFFIX):
            path, _, self.name = path.rpartition("/")
        self._prefix = f"{path}/" if path else ""
        self._client = _client(endpoint, allow_http=allow_http)
        # Sizes of parts are raised by the library where a file would need over 10,000 of them.
        self._transfer = TransferConfig(multipart_threshold=part, multipart_chunksize=part, max_concurrency=4)

    def url(self, name: str = "") -> str:
        """Return the URL of an export, or of the prefix."""
        return f"s3://{self._bucket}/{self._prefix}{name}"

    @contextmanager
    def workplace(self) -> Iterator[Path]:
        """Give a folder for an export while it is made; on ``TMPDIR``, and gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="progressdb-kms-") as folder:
            yield Path(folder)

    def deliver(self, file: Path, sha256: str) -> str:
        """Upload an export, and read back what has arrived.

        Args:
            file: The export, under its own name.
            sha256: Its digest in hex.

        Returns:
            Its URL.

        Raises:
            OperatorError: It could not be put there, or read back. What was put there has been removed again.
            BackupInvalid: Likewise, since it is not what was sent; or it could not even be removed.
        """
        url = self.url(file.name)
        uploaded = False
        try:
            self._upload(file, sha256)
            uploaded = True
            self._read_back(file.name, sha256)
        except OperatorError as error:
            # What nobody has read back must not count as an export that is kept.
            if uploaded:
                try:
                    self.remove(file.name)
                except OperatorError as left:
                    raise BackupInvalid(f"{error.detail}; it is left there: {left.detail}") from None
            raise
        except BaseException:
            # Stopped: likewise, for the upload may have come to its end all the same.
            with suppress(OperatorError):
                self.remove(file.name)
            raise
        return url

    def fetch(self, name: str, write: Any) -> None:  # noqa: ANN401 - whatever takes bytes
        """Read an export, in order.

        Raises:
            OperatorError: It is not there, or can't be read.
        """
        self._download(name, write)

    def names(self) -> list[str]:
        """Return the names of what lies directly under the prefix and begins like an export.

        Raises:
            OperatorError: It can't be listed.
        """
        start = self._key(PREFIX)
        with _told("list", self.url()):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=start, Delimiter="/"
            )
            return [
                item["Key"].removeprefix(self._prefix) for page in pages for item in page.get("Contents", ())
            ]

    def remove(self, name: str) -> None:
        """Remove an export.

        Raises:
            OperatorError: It can't be removed.
        """
        with _told("remove", self.url(name)):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(name))

    def _upload(self, file: Path, sha256: str) -> None:
        with _told("upload", self.url(file.name)):
            self._client.upload_file(
                str(file),
                self._bucket,
                self._key(file.name),
                ExtraArgs={"ContentType": "application/octet-stream", "Metadata": {"sha256": sha256}},
                Config=self._transfer,
            )

    def _read_back(self, name: str, sha256: str) -> None:
        arrived = hashlib.sha256()
        self._download(name, arrived.update)
        if arrived.hexdigest() != sha256:
            raise BackupInvalid(
                f"what was read back from {self.url(name)} is not what was uploaded: run it again; older"
                " exports are as they were"
            )

    def _download(self, name: str, write: Any) -> None:  # noqa: ANN401 - whatever takes bytes
        # Without threads it is written in order; a broken connection is taken up where it broke.
        config = TransferConfig(use_threads=False)
        with _told("read", self.url(name)):
            self._client.download_fileobj(self._bucket, self._key(name), _Writer(write), Config=config)

    def _key(self, name: str) -> str:
        return f"{self._prefix}{name}"


class _Writer:
    """What the library writes to: it can't seek, so that bytes come in order."""

    def __init__(self, write: Any) -> None:  # noqa: ANN401 - whatever takes bytes
        self._write = write

    def write(self, data: bytes) -> int:
        """Pass some bytes on."""
        self._write(data)
        return len(data)


def _client(endpoint: str | None, *, allow_http: bool) -> Any:  # noqa: ANN401 - boto3 has no types
    if endpoint is not None:
        _check_endpoint(endpoint)
    other = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        connect_timeout=10,
        read_timeout=60,
        retries={"mode": "standard", "max_attempts": 5},
        # Other makers' storage is rarely found by the bucket's name in the host, and older releases of it do
        # not know the newer checksums. Ours is compared anyway.
        s3={"addressing_style": "path" if other else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        client = boto3.client("s3", endpoint_url=endpoint, config=config)
    except (BotoCoreError, ValueError) as error:
        raise SettingsInvalid(f"the settings for S3 can't be used: {type(error).__name__}") from None
    parts = urlsplit(client.meta.endpoint_url)
    if parts.scheme != "https" and not allow_http and not _is_local(parts.hostname or ""):
        raise SettingsInvalid(
            "the endpoint of S3 is http://, over which anybody can see thread ids: use https://"
            " (AWS_CA_BUNDLE names a CA of your own), or --s3-allow-http where the network is encrypted"
        )
    return client


def _check_endpoint(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in {"http", "https"} and parts.hostname and parts.username is None
        good = good and not (parts.query or parts.fragment) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good:
        raise SettingsInvalid("write --s3-endpoint https://host:port, without credentials")


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def _told(verb: str, where: str) -> Iterator[None]:
    """Translate the library's errors. Of a server's words only its code is shown: it may quote anything."""
    try:
        yield
    except S3UploadFailedError as error:
        raise _failure(verb, where, error.__context__ or error) from None
    except (ClientError, BotoCoreError) as error:
        raise _failure(verb, where, error) from None


def _failure(verb: str, where: str, error: BaseException) -> OperatorError:
    if isinstance(error, ClientError):
        code = re.sub(r"[^A-Za-z0-9.]", "", str(error.response.get("Error", {}).get("Code", "")))[:40]
        remedy = _REMEDIES.get(code, "see its log")
        return OperatorError(f"S3 does not let us {verb} {where}: {code or 'no reason'}; {remedy}")
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return OperatorError(
            f"no credentials to {verb} {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the"
            " job a role"
        )
    if isinstance(error, SSLError):
        return OperatorError(
            f"can't {verb} {where}: the certificate of S3 is not accepted; AWS_CA_BUNDLE names its CA"
        )
    if isinstance(error, EndpointConnectionError):
        return OperatorError(f"can't {verb} {where}: S3 does not answer; check --s3-endpoint and the network")
    return OperatorError(f"can't {verb} {where}: {type(error).__name__}; run it again")
