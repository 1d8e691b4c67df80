"""How the Redis store is reached and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Settings of ``store.redis.open_store``.

    Attributes:
        url: Where the store is; the forms are in ``store.redis.address``. May hold user and password.
        username: ACL user, if it is not in the URL.
        password: Its password, if it is not in the URL.
        sentinel_username: ACL user of the Sentinels themselves, where they have one.
        sentinel_password: Its password.
        tls_ca: PEM file of the CA that signed the store's certificate; empty for the system's CAs.
        tls_cert: PEM file of the client certificate that the store asks for, if it does.
        tls_key: PEM file of its key.
        connect_timeout: Seconds for a connection, handshake and login included.
        command_timeout: Seconds for an operation, waiting, retries and confirmations included.
        durability: ``checked`` asks the server for its settings; ``attested`` takes the operator's word for
            what a managed server hides.
        attested_reason: Why the operator can give that word; goes into the facts of every check.
        allow_data_loss: Serve on a store that can lose acknowledged keys; problems become warnings.
        min_replicas: Replicas that must confirm a write before it is acknowledged.
        wait_timeout: Seconds that the confirmation by replicas and disk may take.
    """

    url: str = field(repr=False)
    username: str = ""
    password: str = field(default="", repr=False)
    sentinel_username: str = ""
    sentinel_password: str = field(default="", repr=False)
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    connect_timeout: float = 1.0
    command_timeout: float = 2.0
    durability: Literal["checked", "attested"] = "checked"
    attested_reason: str = ""
    allow_data_loss: bool = False
    min_replicas: int = 0
    wait_timeout: float = 1.0
