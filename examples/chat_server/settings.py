"""Settings from the environment. Where the KMS is, the client reads by itself (``PROGRESSDB_KMS_*``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """How this server runs.

    Attributes:
        bind: Address and port to listen on.
        database: The SQLite file.
        encryption: Off stores plaintext, and refuses threads that are encrypted.
        kms_prefix: Put before a thread's id to make the KMS's: a policy grants us this prefix and no more.
        admin_token: Bearer token of the admin routes; without one nobody may use them.
    """

    bind: str = "127.0.0.1:8000"
    database: Path = Path("chat.db")
    encryption: bool = True
    kms_prefix: str = "chat:"
    admin_token: str = field(default="", repr=False)


def from_environment(environ: Mapping[str, str]) -> Settings:
    """Return the settings.

    Raises:
        ValueError: CHAT_ENCRYPTION is neither on nor off: a typo must not switch encryption off.
    """
    encryption = environ.get("CHAT_ENCRYPTION", "on")
    if encryption not in {"on", "off"}:
        raise ValueError("CHAT_ENCRYPTION must be on or off")
    return Settings(
        bind=environ.get("CHAT_BIND", Settings.bind),
        database=Path(environ.get("CHAT_DATABASE", Settings.database)),
        encryption=encryption == "on",
        kms_prefix=environ.get("CHAT_KMS_PREFIX", Settings.kms_prefix),
        admin_token=environ.get("CHAT_ADMIN_TOKEN", ""),
    )
