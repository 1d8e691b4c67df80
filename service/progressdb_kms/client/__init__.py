"""What a server imports to use the service.

::

    async with open_provider("https://kms:8443", ca="ca.crt", cert="chat.crt", key="chat.key") as kms:
        dek = await kms.create_dek_for_thread("thread-1")
        sealed = await kms.encrypt_with_dek(dek.key_id, b"hello", aad=b"message-1")
        assert await kms.decrypt_with_dek(dek.key_id, sealed.ciphertext, aad=b"message-1") == b"hello"

Needs none of the server's packages.
"""

from progressdb_kms.client.admin import AdminClient
from progressdb_kms.client.errors import (
    ClientError,
    ConnectionFailed,
    EndpointInvalid,
    ProtocolViolation,
    ProviderClosed,
    RemoteError,
    TlsFailed,
    TransportError,
    request_id_of,
)
from progressdb_kms.client.opening import open_provider, open_sync_provider
from progressdb_kms.client.plans import DecryptItem, EncryptItem
from progressdb_kms.client.provider import KmsProvider, SyncKmsProvider
from progressdb_kms.client.types import (
    CreatedDek,
    Encrypted,
    Health,
    KekCensus,
    KekStatus,
    KeyInfo,
    Rewrapped,
    RotationInfo,
    Wrapped,
)
from progressdb_kms.domain.errors import KmsError

__all__ = [
    "AdminClient",
    "ClientError",
    "ConnectionFailed",
    "CreatedDek",
    "DecryptItem",
    "EncryptItem",
    "Encrypted",
    "EndpointInvalid",
    "Health",
    "KekCensus",
    "KekStatus",
    "KeyInfo",
    "KmsError",
    "KmsProvider",
    "ProtocolViolation",
    "ProviderClosed",
    "RemoteError",
    "Rewrapped",
    "RotationInfo",
    "SyncKmsProvider",
    "TlsFailed",
    "TransportError",
    "Wrapped",
    "open_provider",
    "open_sync_provider",
    "request_id_of",
]
