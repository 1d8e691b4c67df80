"""The store in Redis or Valkey, 7.0 or later, with an append-only file.

How it hangs together: ``keys``, ``registry``, ``heartbeats``, ``health``, ``rotation_ledger``,
``rotation_slots``, ``audit`` implement the ports; they hand calls to ``router``, which finds the ``node`` by
the ``topology`` and puts them into one of its two ``lane``s; a lane gathers them into batches over one
``link``. ``durability`` judges whether a node may be written to.
"""

from __future__ import annotations

from progressdb_kms.store.redis.address import parse_url
from progressdb_kms.store.redis.audit import RedisAudit
from progressdb_kms.store.redis.backups import RedisBackups
from progressdb_kms.store.redis.destruction import RedisDestruction
from progressdb_kms.store.redis.escrow import RedisEscrowBox
from progressdb_kms.store.redis.health import RedisHealth
from progressdb_kms.store.redis.heartbeats import RedisHeartbeats
from progressdb_kms.store.redis.keys import RedisKeys
from progressdb_kms.store.redis.lane import Silent, StoreObserver
from progressdb_kms.store.redis.registry import RedisRegistry
from progressdb_kms.store.redis.rotation_ledger import RedisRotationLedger
from progressdb_kms.store.redis.rotation_slots import RedisRotationSlots
from progressdb_kms.store.redis.router import Router
from progressdb_kms.store.redis.topology import make_topology
from progressdb_kms.store.settings import StoreSettings

__all__ = ["RedisStore", "StoreObserver", "StoreSettings", "open_store"]


class RedisStore:
    """The ports over one store.

    Attributes:
        keys: ``KeyStore``.
        registry: ``KekRegistry``.
        heartbeats: ``Heartbeats``.
        health: ``StoreHealth``.
        escrow: ``EscrowBox``.
        rotation_ledger: ``RotationLedger``.
        rotation_slots: ``RotationStore``.
        backups: ``BackupStore``.
        destruction: ``DestructionStore``.
        audit: ``AuditStore``.
    """

    def __init__(self, settings: StoreSettings, observer: StoreObserver) -> None:
        address = parse_url(settings.url)
        self._topology = make_topology(address, settings, observer)
        router = Router(self._topology, settings)
        self.keys = RedisKeys(router, settings)
        self.registry = RedisRegistry(router)
        self.heartbeats = RedisHeartbeats(router)
        self.escrow = RedisEscrowBox(router)
        self.health = RedisHealth(self._topology, address, settings)
        self.rotation_ledger = RedisRotationLedger(router)
        self.rotation_slots = RedisRotationSlots(router)
        self.backups = RedisBackups(router)
        self.destruction = RedisDestruction(router, settings)
        self.audit = RedisAudit(router)

    async def close(self) -> None:
        """Close all connections; what is under way fails with StoreUnavailable."""
        await self._topology.close()


async def open_store(settings: StoreSettings, *, observer: StoreObserver | None = None) -> RedisStore:
    """Return the store that the settings name, after one check of it; belongs to the running event loop.

    A store that is away is no error: calls raise StoreUnavailable until it is back, and the status says so.

    Raises:
        SettingsInvalid: The URL can't be parsed.
    """
    store = RedisStore(settings, observer or Silent())
    await store.health.check()
    return store
