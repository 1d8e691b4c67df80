"""Passwords of the store's users, and the ACL file with their digests."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Final

ACL_KEY: Final = "users.acl"
_PLACE: Final = re.compile(r"#\{([^{}]*)\}")
_BYTES: Final = 32


def missing_passwords(data: Mapping[str, bytes], users: Iterable[str]) -> dict[str, bytes]:
    """Return a new password for each user that has none: 43 characters of base64url, 256 bits.

    Args:
        data: What the Secret holds.
        users: Names.
    """
    return {user: secrets.token_urlsafe(_BYTES).encode() for user in users if not data.get(user, b"").strip()}


def render_acl(template: str, passwords: Mapping[str, bytes]) -> bytes:
    """Return the ACL file: each ``#{user}`` replaced by ``#`` and the SHA-256 of that user's password in hex.

    A digest of 256 random bits says nothing about them, so that the file need not be secret.
    """

    def digest(place: re.Match[str]) -> str:
        return "#" + hashlib.sha256(passwords[place[1]].strip()).hexdigest()

    text = _PLACE.sub(digest, template)
    # An ACL file's last line is read only if it ends.
    return (text if text.endswith("\n") else text + "\n").encode()


def unknown_users(template: str, users: Iterable[str]) -> list[str]:
    """Return the names in a template that are not among ``users``."""
    known = set(users)
    return sorted({name for name in _PLACE.findall(template) if name not in known})
