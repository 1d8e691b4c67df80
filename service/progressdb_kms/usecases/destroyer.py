"""Destroying one key in the store and in every snapshot of its slot, so that the snapshots stay sealed.

A snapshot that is what was sealed gets its new seal in the same script that takes the copy out of it: whoever
dies does so before or after, never in between. One that is not what was sealed keeps no seal: a change that
nobody made on purpose must not get one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.domain.keys import locate
from progressdb_kms.domain.rotation import bucket_digest, slot_digest
from progressdb_kms.ports import Destroyed, Resealed

if TYPE_CHECKING:
    from progressdb_kms.domain.backup import Destruction
    from progressdb_kms.ports import Manifest
    from progressdb_kms.usecases.vault import Vault

_TRIES: Final = 8
"""A rotation changes a slot's snapshot in few steps; between two of them its copies stay as they are."""


@dataclass(slots=True)
class _Held:
    """One snapshot of a slot: its manifest, and its entries by bucket."""

    manifest: Manifest
    buckets: list[dict[str, bytes]] = field(repr=False)

    def without(self, key_id: str) -> _Held:
        buckets = [{name: blob for name, blob in each.items() if name != key_id} for each in self.buckets]
        if buckets == self.buckets:
            return self
        if self.manifest.count < 0 or self._seal() != (self.manifest.count, self.manifest.digest):
            return _Held(replace(self.manifest, count=-1, digest=""), buckets)
        fresh = _Held(self.manifest, buckets)
        count, digest = fresh._seal()
        fresh.manifest = replace(self.manifest, count=count, digest=digest)
        return fresh

    def _seal(self) -> tuple[int, str]:
        digests = [bucket_digest(bucket.items()) for bucket in self.buckets]
        return sum(len(bucket) for bucket in self.buckets), slot_digest(digests)


class Destroyer:
    """Destroys keys, and remembers what the snapshots of their slots hold.

    Args:
        vault: The store.
    """

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._tag = ""
        self._held: dict[str, _Held] = {}

    async def destroy(self, destruction: Destruction, *, merged: bool = False) -> bool:
        """Destroy a key; see ``DestructionStore.destroy``.

        Returns:
            False where the key is not due.

        Raises:
            StoreUnavailable, StoreNotDurable: Not now, or the slot's snapshots change all the time.
        """
        tag = locate(destruction.key_id)
        for _ in range(_TRIES):
            if tag != self._tag:
                await self._read(tag)
            held = {name: each.without(destruction.key_id) for name, each in self._held.items()}
            resealed = [
                Resealed(name, each.manifest, held[name].manifest) for name, each in self._held.items()
            ]
            result = await self._vault.destruction.destroy(destruction, resealed, merged=merged)
            if result is Destroyed.CHANGED:
                self._tag = ""
                continue
            if result is Destroyed.DONE:
                self._held = held
            return result is Destroyed.DONE
        raise StoreUnavailable(f"the snapshots of slot {tag} change all the time: it is tried again")

    async def _read(self, tag: str) -> None:
        vault = self._vault
        self._held = {}
        for name, manifest in (await vault.backups.manifests(tag)).items():
            buckets = [
                dict(await vault.slots.read_bucket(tag, name, bucket)) for bucket in range(manifest.buckets)
            ]
            self._held[name] = _Held(manifest, buckets)
        self._tag = tag
