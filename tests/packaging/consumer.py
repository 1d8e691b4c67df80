"""A server of someone else's: type-checked and run where nothing but the client is installed.

usage: consumer.py URL CA CERT KEY; prints "ok".
"""

import asyncio
import sys

from progressdb_kms.client import KmsError, KmsProvider, SyncKmsProvider, open_provider, open_sync_provider
from progressdb_kms.domain.errors import AuthenticationFailed

url, ca, cert, key = sys.argv[1:]


def synchronous(kms: SyncKmsProvider) -> str:
    """Make a key and use it; return its id."""
    dek = kms.create_dek_for_thread("consumer:1")
    sealed = kms.encrypt_with_dek(dek.key_id, b"hello", aad=b"1")
    plaintext: bytes = kms.decrypt_with_dek(dek.key_id, sealed.ciphertext, aad=b"1")
    assert plaintext == b"hello"
    try:
        kms.decrypt_with_dek(dek.key_id, sealed.ciphertext, aad=b"2")
    except AuthenticationFailed as error:
        assert not error.retryable  # noqa: PT017 - no pytest where this runs
    else:
        raise AssertionError
    return dek.key_id


async def asynchronous(kms: KmsProvider, key_id: str) -> None:
    """Use it from the other provider, for many messages at once."""
    sealed = await kms.encrypt_many([(key_id, b"%d" % n, None) for n in range(100)])
    ciphertexts = [each.ciphertext for each in sealed if not isinstance(each, KmsError)]
    opened = await kms.decrypt_many([(key_id, ciphertext, None) for ciphertext in ciphertexts])
    assert opened == [b"%d" % n for n in range(100)]


async def main(key_id: str) -> None:
    """Open the asynchronous provider."""
    async with open_provider(url, ca=ca, cert=cert, key=key, deadline=20) as kms:
        await asynchronous(kms, key_id)


with open_sync_provider(url, ca=ca, cert=cert, key=key, deadline=20) as sync_kms:
    made = synchronous(sync_kms)
asyncio.run(main(made))
sys.stdout.write("ok\n")
