"""What can go wrong between us and the store, translated: nothing of the driver's leaves this package.

A failure is a value, not an exception, while it travels: one batch has many callers, and each decides for
itself whether it may try again.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from enum import Enum
from typing import Final

from redis.exceptions import AskError, AuthenticationError, MovedError, RedisError

from progressdb_kms.domain.errors import InternalError, KmsError, StoreUnavailable
from progressdb_kms.store.redis.address import Endpoint


class Again(Enum):
    """What would have to happen before the same command could succeed."""

    NEVER = "an operator has to act"
    WITH_SOURCE = "the server does not know the script: send it whole"
    SOON = "the server or the way to it is in trouble: look for it anew, wait a little"
    ELSEWHERE = "this one command belongs to another node for now (ASK)"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a command has no reply.

    Attributes:
        error: What the caller is told if nothing helps.
        again: What could help.
        endpoint: The node that an ASK names.
        refused: The server knows the caller and does not let it run this command.
    """

    error: KmsError
    again: Again = Again.NEVER
    endpoint: Endpoint | None = None
    refused: bool = False


_SOON: Final = {
    "READONLY": "the store's node is a replica now; a failover is under way",
    "NOREPLICAS": "the store has fewer replicas in step than min-replicas-to-write asks for",
    "LOADING": "the store is reading its data after a start",
    "MASTERDOWN": "the store's node has lost its primary",
    "CLUSTERDOWN": "the store's Cluster is down: a slot has no primary",
    "MOVED": "the store's Cluster has moved a slot",
    "TRYAGAIN": "the store's Cluster is moving a slot",
    "BUSY": "the store is busy with a script of somebody's",
    "UNBLOCKED": "the store's node has changed its role",
}
_NEVER: Final = {
    "MISCONF": "the store can't write to its disk; free space or mend the disk, see its log",
    "OOM": "the store is out of memory; raise its maxmemory",
    "NOAUTH": "the store wants a login; set store.username and store.password",
    "WRONGPASS": "the store refused the login; check store.username and store.password",
    "NOPERM": "the store's ACL user lacks a command or the keys kms:*; see docs/redis-acl.md",
    "WRONGTYPE": "another program's value stands under a key of the service's; give it a database of its own",
    "DENIED": "the store is in protected mode; set a password or bind it to an address of its own",
}


def translate(reply: object) -> Failure | None:
    """Return the failure that an error reply of the server means, None for any other reply."""
    if not isinstance(reply, RedisError):
        return None
    code = getattr(reply, "status_code", None) or str(reply).partition(" ")[0]
    if code == "NOSCRIPT":
        return Failure(StoreUnavailable("the store does not keep scripts"), Again.WITH_SOURCE)
    if isinstance(reply, AskError) and not isinstance(reply, MovedError):
        return Failure(
            StoreUnavailable(_SOON["TRYAGAIN"]), Again.ELSEWHERE, Endpoint(reply.host, int(reply.port))
        )
    if code in _SOON:
        return Failure(StoreUnavailable(_SOON[code]), Again.SOON)
    if code in _NEVER:
        return Failure(StoreUnavailable(_NEVER[code]), refused=code == "NOPERM")
    # Managed servers rename what they forbid, so that it is unknown. The message has the code alone: the text
    # of an unknown error may repeat an argument.
    shown = code[:32] if code.isupper() else "ERR"
    return Failure(StoreUnavailable(f"the store answered with the error {shown}"), refused=shown == "ERR")


def lost(error: BaseException, where: Endpoint) -> Failure:
    """Return the failure of everything that was under way on a connection that broke with ``error``."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, AuthenticationError):
            code = str(getattr(cause, "status_code", None))
            return Failure(StoreUnavailable(_NEVER.get(code, _NEVER["WRONGPASS"])))
        if isinstance(cause, ssl.SSLError):
            reason = getattr(cause, "verify_message", "") or (cause.reason or "handshake failed").lower()
            detail = f"TLS with the store at {where} failed: {reason}; check store.tls"
            return Failure(StoreUnavailable(detail), Again.SOON)
        if getattr(cause, "status_code", None) and (failure := translate(cause)):
            return failure
        cause = cause.__cause__ or cause.__context__
    return Failure(StoreUnavailable(f"the store at {where} does not answer"), Again.SOON)


def broken() -> Failure:
    """Return the failure of everything that was under way when this package's own code broke."""
    return Failure(InternalError("the store adapter failed"))
