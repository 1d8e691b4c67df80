"""Keys of AWS KMS: symmetric ones, by their ARN.

One call wraps or unwraps one DEK, as AWS KMS has no batches: some run at once. The AAD goes along as its
SHA-256 in the encryption context, which AWS writes into its logs: the names of threads are not for those.
"""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING, Any, Final

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from progressdb_kms.domain.errors import KekUnavailable, KekUnreachable
from progressdb_kms.domain.keys import DEK_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

_CONTEXT: Final = "progressdb-kms"
_FORGED: Final = frozenset({"InvalidCiphertextException", "IncorrectKeyException"})
_DENIED: Final = "AccessDeniedException"
_MAX_CIPHERTEXT: Final = 6144
"""Bytes of a ciphertext that AWS KMS takes."""
# Not KMSInvalidStateException: so is called a custom key store that is disconnected for a while, too.
_NO_SUCH_KEY: Final = frozenset({"NotFoundException", "DisabledException", "InvalidKeyUsageException"})
_REGION: Final = 3


class AwsKeeper:
    """A ``Keeper`` over AWS KMS, with the credentials that the AWS SDK finds.

    Args:
        endpoint: Address to call instead of that of the key's region; empty for that one.
        timeout: Seconds to connect, and for an answer.
    """

    kind = "aws"
    threads = 8
    chunk = 16

    def __init__(self, endpoint: str, timeout: float) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._clients: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"AwsKeeper(endpoint={self._endpoint!r})"

    def wrap(self, key: str, deks: Sequence[bytes], aads: Sequence[bytes]) -> list[bytes]:
        """Wrap DEKs, one call each; a body is AWS KMS's ``CiphertextBlob``.

        Raises:
            KekUnavailable, KekUnreachable: As ``Keeper.wrap``.
        """
        bodies = []
        for dek, aad in zip(deks, aads, strict=True):
            answer, refusal = self._call("encrypt", key, Plaintext=dek, EncryptionContext=_context(aad))
            if refusal:
                raise KekUnreachable(f"AWS KMS refuses to encrypt under {key}: {refusal}")
            bodies.append(bytes(answer["CiphertextBlob"]))
        return bodies

    def unwrap(self, key: str, bodies: Sequence[bytes], aads: Sequence[bytes]) -> list[bytes | None]:
        """Unwrap DEKs, one call each.

        Raises:
            KekUnavailable, KekUnreachable: As ``Keeper.unwrap``.
        """
        return [self._open(key, body, aad) for body, aad in zip(bodies, aads, strict=True)]

    def _open(self, key: str, body: bytes, aad: bytes) -> bytes | None:
        if not 1 <= len(body) <= _MAX_CIPHERTEXT:
            return None
        answer, refusal = self._call("decrypt", key, CiphertextBlob=body, EncryptionContext=_context(aad))
        if refusal == _DENIED:
            # Said of a ciphertext that names a key of somebody else, too. May this service decrypt at all?
            context = _context(b"")
            probe, refusal = self._call("encrypt", key, Plaintext=bytes(DEK_BYTES), EncryptionContext=context)
            if not refusal:
                _, refusal = self._call(
                    "decrypt", key, CiphertextBlob=probe["CiphertextBlob"], EncryptionContext=context
                )
            if refusal:
                raise KekUnreachable(f"AWS KMS does not let this service use {key}: {refusal}")
            return None
        dek = None if refusal else bytes(answer["Plaintext"])
        return dek if dek is not None and len(dek) == DEK_BYTES else None

    def _call(self, verb: str, key: str, **parameters: object) -> tuple[dict[str, Any], str]:
        """Return the answer, or an empty one and the code that says no."""
        failure = ""
        try:
            return getattr(self._client(key), verb)(KeyId=key, **parameters), ""
        except ClientError as error:
            failure = str(error.response.get("Error", {}).get("Code", "unknown"))
        except BotoCoreError as error:
            failure = type(error).__name__
        # Outside the handler: an error of the SDK may hold the request.
        if failure == _DENIED or failure in _FORGED:
            return {}, failure
        if failure in _NO_SUCH_KEY:
            raise KekUnavailable(f"AWS KMS can't use {key}: {failure}")
        raise KekUnreachable(f"AWS KMS, {verb} under {key}: {failure}")

    def _client(self, key: str) -> Any:  # noqa: ANN401 - the SDK makes its classes at run time
        region = key.split(":")[_REGION]
        with self._lock:
            if region not in self._clients:
                config = Config(
                    connect_timeout=self._timeout,
                    read_timeout=self._timeout,
                    max_pool_connections=self.threads,
                    retries={"mode": "standard", "total_max_attempts": 3},
                )
                # A session of its own: the default one may not be used by several threads.
                self._clients[region] = boto3.session.Session().client(
                    "kms", region_name=region, endpoint_url=self._endpoint or None, config=config
                )
            return self._clients[region]


def _context(aad: bytes) -> dict[str, str]:
    return {_CONTEXT: hashlib.sha256(aad).hexdigest()}
