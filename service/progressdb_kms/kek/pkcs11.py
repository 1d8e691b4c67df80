"""Keys on a PKCS#11 token (OASIS PKCS#11 2.40): an HSM, or SoftHSM2 in software.

Wraps by CKM_AES_GCM with a random nonce of ours and the AAD: the body is that of the KEK file, 60 bytes.
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pkcs11
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass
from pkcs11 import exceptions as refusals

from progressdb_kms.domain.envelope import BODY_BYTES, NONCE_BYTES, TAG_BYTES
from progressdb_kms.domain.errors import KekFileInvalid, KekUnavailable, KekUnreachable
from progressdb_kms.domain.keyring import KEK_BYTES
from progressdb_kms.files import read_private

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_T = TypeVar("_T")
_KEPT: Final[list[object]] = []
_Secret = Any
"""A key on the token; the package's types leave out what its classes get from mixins."""

_TAG_BITS: Final = 8 * TAG_BYTES
_PIN_REFUSED: Final = (
    refusals.PinIncorrect,
    refusals.PinInvalid,
    refusals.PinLenRange,
    refusals.PinExpired,
    refusals.PinLocked,
    refusals.UserPinNotInitialized,
)
_FORGED: Final = (refusals.EncryptedDataInvalid, refusals.EncryptedDataLenRange, refusals.SignatureInvalid)
# SoftHSM2 says GENERAL_ERROR to a wrong tag, others FUNCTION_FAILED; so does a token that is broken.
_PERHAPS_FORGED: Final = (refusals.GeneralError, refusals.FunctionFailed, refusals.DataInvalid)


class Pkcs11Keeper:
    """A ``Keeper`` over one token.

    One session in one thread: not every library takes calls of several threads.

    Args:
        module: The token's library.
        token: The token's label.
        pin_file: File with the user's PIN, which only the service may read.
    """

    kind = "pkcs11"
    threads = 1
    chunk = 64

    def __init__(self, module: Path, token: str, pin_file: Path) -> None:
        self._module = module
        self._token = token
        self._pin_file = pin_file
        self._session: pkcs11.Session | None = None
        self._keys: dict[str, _Secret] = {}
        self._refused: tuple[bytes, int] | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Pkcs11Keeper(module={str(self._module)!r}, token={self._token!r})"

    def wrap(self, key: str, deks: Sequence[bytes], aads: Sequence[bytes]) -> list[bytes]:
        """Wrap DEKs: ``nonce(12) | ciphertext(32) | tag(16)`` each.

        Raises:
            KekUnavailable, KekUnreachable: As ``Keeper.wrap``.
        """
        nonces = os.urandom(NONCE_BYTES * len(deks))

        def work(secret: _Secret) -> list[bytes]:
            bodies = []
            for number, (dek, aad) in enumerate(zip(deks, aads, strict=True)):
                nonce = nonces[number * NONCE_BYTES : (number + 1) * NONCE_BYTES]
                parameters = pkcs11.GCMParams(nonce, aad, _TAG_BITS)
                bodies.append(
                    nonce + secret.encrypt(dek, mechanism=Mechanism.AES_GCM, mechanism_param=parameters)
                )
            return bodies

        return self._with_key(key, work)

    def unwrap(self, key: str, bodies: Sequence[bytes], aads: Sequence[bytes]) -> list[bytes | None]:
        """Return DEKs, None for what does not unwrap.

        Raises:
            KekUnavailable, KekUnreachable: As ``Keeper.unwrap``.
        """
        return self._with_key(
            key, lambda secret: [_open(secret, body, aad) for body, aad in zip(bodies, aads, strict=True)]
        )

    def generate(self, key: str) -> None:
        """Make a key on the token: AES-256, never to be read out, for encryption and decryption.

        Raises:
            KekFileInvalid: There is a key of this name.
            KekUnavailable, KekUnreachable: As ``Keeper.wrap``.
        """
        with self._lock:
            try:
                session = self._open_session(rw=True)
                try:
                    if any(session.get_objects(_named(key))):
                        raise KekFileInvalid(
                            f"the token has a key {key!r} already: add it without --generate, or"
                            " choose another label"
                        )
                    session.generate_key(
                        KeyType.AES,
                        8 * KEK_BYTES,
                        label=key,
                        store=True,
                        template={
                            Attribute.SENSITIVE: True,
                            Attribute.EXTRACTABLE: False,
                            Attribute.ENCRYPT: True,
                            Attribute.DECRYPT: True,
                            Attribute.WRAP: False,
                            Attribute.UNWRAP: False,
                        },
                    )
                finally:
                    session.close()
            except refusals.PKCS11Error as error:
                raise KekUnreachable(f"the token refuses: {type(error).__name__}") from None

    def _with_key(self, key: str, work: Callable[[_Secret], _T]) -> _T:
        """Do ``work``, once more in a new session if the present one has ended."""
        with self._lock:
            fresh = self._session is None
            while True:
                failure = ""
                try:
                    return work(self._key(key))
                except refusals.PKCS11Error as error:
                    failure = type(error).__name__
                except KekUnavailable:
                    # A session that a token has logged out sees no keys, and says so without an error.
                    if fresh:
                        raise
                self._forget_session()
                if fresh:
                    # Outside the handler: an error of the library may hold what it was given.
                    raise KekUnreachable(f"the PKCS#11 token {self._token!r} fails: {failure}")
                fresh = True

    def _key(self, key: str) -> _Secret:
        if self._session is None:
            self._session = self._open_session()
        if key not in self._keys:
            try:
                secret = self._session.get_key(object_class=ObjectClass.SECRET_KEY, label=key)
            except refusals.NoSuchKey:
                raise KekUnavailable(f"the PKCS#11 token {self._token!r} has no secret key {key!r}") from None
            except refusals.MultipleObjectsReturned:
                raise KekUnavailable(
                    f"the PKCS#11 token {self._token!r} has several secret keys {key!r}: give each a label of"
                    " its own"
                ) from None
            if secret.key_type is not KeyType.AES or secret.key_length != 8 * KEK_BYTES:
                raise KekUnavailable(
                    f"{key!r} on the PKCS#11 token {self._token!r} is no AES key of 256 bits"
                )
            self._keys[key] = secret
        return self._keys[key]

    def _open_session(self, *, rw: bool = False) -> pkcs11.Session:
        try:
            pin = read_private(self._pin_file, error=KekFileInvalid).strip()
            written = self._pin_file.stat().st_mtime_ns
        except KekFileInvalid as error:
            raise KekUnreachable(f"the PKCS#11 token's PIN: {error.detail}") from None
        except FileNotFoundError:
            raise KekUnreachable(f"the PKCS#11 token's PIN: {self._pin_file} is being replaced") from None
        if not pin:
            raise KekUnreachable(f"the PKCS#11 token's PIN: {self._pin_file} is empty")
        if (pin, written) == self._refused:
            # A token locks itself after a few wrong PINs: each is tried once.
            raise KekUnreachable(
                f"the PKCS#11 token {self._token!r} refused the PIN in {self._pin_file}: it is tried again"
                " once that file is written again"
            )
        try:
            library = pkcs11.lib(str(self._module))
        except RuntimeError as error:
            raise KekUnreachable(
                f"the PKCS#11 library {self._module} can't be used: {type(error).__name__}: {error}"
            ) from None
        _keep_for_ever(library)
        try:
            token = library.get_token(token_label=self._token)
            try:
                return token.open(user_pin=pin.decode("utf-8", "replace"), rw=rw)
            except refusals.UserAlreadyLoggedIn:
                return token.open(rw=rw)  # by another session of this process, for all of them
        except _PIN_REFUSED as error:
            self._refused = pin, written
            raise KekUnreachable(
                f"the PKCS#11 token {self._token!r} refuses the PIN in {self._pin_file}:"
                f" {type(error).__name__}"
            ) from None
        except refusals.NoSuchToken:
            raise KekUnreachable(f"no PKCS#11 token has the label {self._token!r}") from None

    def _forget_session(self) -> None:
        self._keys.clear()
        session, self._session = self._session, None
        if session is not None:
            try:
                session.close()
            except refusals.PKCS11Error:
                return  # it has ended already


def _keep_for_ever(library: object) -> None:
    """Never let go of a library, not at the process's end either.

    It would be unloaded under a call that hangs in it, and the process would crash instead of ending.
    """
    if not _KEPT:
        _KEPT.append(library)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(library))


def _named(key: str) -> dict[Attribute, object]:
    return {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.LABEL: key}


def _open(secret: _Secret, body: bytes, aad: bytes) -> bytes | None:
    if len(body) != BODY_BYTES:
        return None
    try:
        return _decrypt(secret, body, aad)
    except _FORGED:
        return None
    except _PERHAPS_FORGED:
        # Does the token do its work at all? If it does, it was the body.
        nonce = os.urandom(NONCE_BYTES)
        parameters = pkcs11.GCMParams(nonce, b"", _TAG_BITS)
        probe = nonce + secret.encrypt(nonce, mechanism=Mechanism.AES_GCM, mechanism_param=parameters)
        if _decrypt(secret, probe, b"") != nonce:
            raise
        return None


def _decrypt(secret: _Secret, body: bytes, aad: bytes) -> bytes:
    parameters = pkcs11.GCMParams(body[:NONCE_BYTES], aad, _TAG_BITS)
    opened: bytes = secret.decrypt(
        body[NONCE_BYTES:], mechanism=Mechanism.AES_GCM, mechanism_param=parameters
    )
    return opened
