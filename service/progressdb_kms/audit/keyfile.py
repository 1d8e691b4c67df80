"""The audit key's file, and the public key that auditors get."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from progressdb_kms.domain.audit import SECRET_BYTES, AuditKey, VerifyKey
from progressdb_kms.domain.errors import AuditKeyInvalid
from progressdb_kms.files import read_private

KEY_NAME: Final = "audit.yaml"
PUBLIC_NAME: Final = "audit.pub"
_FORM: Final = re.compile(rb"\s*(?:#[^\n]*\n\s*)*audit_key_hex:[ \t]*[\"']?([0-9a-fA-F]{64})[\"']?\s*")


def load_audit_key(path: Path) -> AuditKey:
    """Read the audit key, which only the service may be able to read.

    Raises:
        AuditKeyInvalid: It can't be read, others can read it, or it is not of the right form.
    """
    found = _FORM.fullmatch(read_private(path, error=AuditKeyInvalid))
    if found is None:
        raise AuditKeyInvalid(f"{path} does not hold audit_key_hex with 64 hex digits (see audit keygen)")
    return AuditKey(bytes.fromhex(found[1].decode()))


def load_public_key(path: Path) -> VerifyKey:
    """Read the public half of an audit key.

    Raises:
        AuditKeyInvalid: It can't be read, or is no Ed25519 public key in PEM.
    """
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise AuditKeyInvalid(f"can't read {path}: {error.strerror}") from None
    except ValueError:
        # Perhaps the secret one, given by mistake: nothing of it may be shown.
        raise AuditKeyInvalid(f"{path} is not a public key in PEM (see audit keygen)") from None
    if not isinstance(key, Ed25519PublicKey):
        raise AuditKeyInvalid(f"{path} is not an Ed25519 public key")
    return VerifyKey.of(key)


def new_audit_key() -> tuple[bytes, bytes, str]:
    """Return the text of a new key's file, its public half in PEM, and its name."""
    secret = os.urandom(SECRET_BYTES)
    key = AuditKey(secret).verify
    public = key.public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return f"audit_key_hex: {secret.hex()}\n".encode(), public, key.key_id
