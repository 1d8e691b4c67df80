"""Does what ``kek`` decides: the Secret through the API, the registry in the store."""

from __future__ import annotations

import asyncio
import os
import secrets as random
import time
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from progressdb_kms.domain.errors import KekFileInvalid, ProvisionRefused, RegistryLost
from progressdb_kms.domain.keyring import KEK_BYTES, KEPT_ELSEWHERE, KekInfo, KekState, check_value
from progressdb_kms.kek.escrow import Escrow, Recipient
from progressdb_kms.kek.keyfile import Entry, KeyName, parse_entries, raw_keys, render_entries
from progressdb_kms.ports import KekRegistry
from progressdb_kms.ports.escrow import EscrowBox
from progressdb_kms.provision.config import Kek
from progressdb_kms.provision.kek import FOUNDED, PENDING, Kept, Step, Stored, next_step
from progressdb_kms.provision.secrets import Change, Found, Ref, Secrets
from progressdb_kms.usecases.keks import first_kek

_STEPS: Final = 20
"""Far more than a run has, other runs at the same time included."""


async def provide_kek(wanted: Kek, ref: Ref, secrets: Secrets, registry: KekRegistry | None) -> None:
    """Go on until Secret and store are a pair.

    Safe to be killed at any point and to run beside others: the Secret is written before the store, the
    store's registry is made once, and each step looks at both again.

    Args:
        wanted: The Secret, and whether it is made.
        ref: Where it is.
        secrets: The API.
        registry: Of the store; None to look at the Secret alone.

    Raises:
        ProvisionRefused: Something is lost; see ``kek.next_step``.
        KekFileInvalid: The Secret's KEK file can't be used.
        StoreUnavailable, StoreNotDurable: Run again.
    """
    create = wanted.management == "create"
    for _ in range(_STEPS):
        found, stored = await _look(ref, secrets, registry)
        kept = None if found is None else _kept(wanted, ref, found)
        step = next_step(str(ref), kept, stored, create=create)
        if step is Step.NOTHING:
            return
        if step is Step.FOUND:
            if registry is None or kept is None or found is None:  # FOUND is for a Secret over a store
                raise AssertionError(step)
            await _found(wanted, ref, found, registry)
            secrets.say(f"made the registry of store {kept.store_id} under the KEK in {ref}")
        elif found is None:
            await asyncio.to_thread(secrets.create, ref, _new(wanted))
        else:
            change = _noted(step, wanted, stored)
            await asyncio.to_thread(secrets.patch, ref, found, change)
    raise ProvisionRefused(f"{ref} or the store changes all the time; run again")


async def seal_kek(
    wanted: Kek, ref: Ref, secrets: Secrets, store: EscrowStore, recipients: Sequence[Recipient]
) -> None:
    """Seal the Secret's KEK versions to recovery keys, where they are not yet.

    Raises:
        KekFileInvalid: The Secret's KEK file can't be used.
        BackupInvalid: What the store keeps of it can't be read.
        StoreUnavailable, StoreNotDurable: Run again.
    """
    found = await asyncio.to_thread(secrets.get, ref)
    view = await store.registry.load()
    if found is None or view is None:
        return  # an empty store, which the service makes the registry of
    keys = {
        version: key
        for version, key in raw_keys(_entries(wanted, ref, found.data)).items()
        if version in view.keks and check_value(key) == view.keks[version].check_value
    }
    before = await store.escrow.load()
    count = await Escrow(store.escrow, store.registry, _InMemory(keys), recipients).complete()
    if await store.escrow.load() != before:
        secrets.say(f"sealed the KEK in {ref} to {count} recovery keys")


class EscrowStore(Protocol):
    """What of a store is needed to seal KEKs."""

    @property
    def registry(self) -> KekRegistry:
        """Which versions there are."""

    @property
    def escrow(self) -> EscrowBox:
        """Where they are kept sealed."""


class _InMemory:
    """Raw keys as ``kek.escrow`` takes them."""

    def __init__(self, keys: Mapping[int, bytes]) -> None:
        self._keys = keys

    def exportable(self) -> frozenset[int]:
        return frozenset(self._keys)

    def export(self, version: int) -> bytes:
        return self._keys[version]


async def _look(
    ref: Ref, secrets: Secrets, registry: KekRegistry | None
) -> tuple[Found | None, Stored | None]:
    """Return Secret and store as they were at one moment.

    Another run goes from one to the other too: read one after the other they could look like a lost KEK or a
    lost store. A Secret that is the same before and after the store was read, was so at that moment.
    """
    found = await asyncio.to_thread(secrets.get, ref)
    while True:
        stored = None if registry is None else await _stored(registry)
        again = await asyncio.to_thread(secrets.get, ref)
        if _same(found, again):
            return found, stored
        found = again


def _same(one: Found | None, other: Found | None) -> bool:
    if one is None or other is None:
        return one is other
    return (one.uid, one.revision) == (other.uid, other.revision)


async def _stored(registry: KekRegistry) -> Stored:
    try:
        view = await registry.load()
    except RegistryLost as error:
        return Stored(empty=False, lost=error.detail)
    if view is None:
        return Stored(empty=True)
    needed = {KekState.ACTIVE, KekState.DECRYPT_ONLY}
    keks = {version: _registered(kek) for version, kek in view.keks.items() if kek.state in needed}
    return Stored(empty=False, store_id=view.store_id, keks=keks)


def _kept(wanted: Kek, ref: Ref, found: Found) -> Kept:
    store_id = found.data.get(wanted.store_id_key, b"").decode("ascii", "replace").strip()
    entries = _entries(wanted, ref, found.data)
    keks = {version: _identity(entry) for version, entry in entries.items()}
    return Kept(str(ref), keks, store_id, found.annotations.get(FOUNDED, ""))


def _identity(entry: Entry) -> str:
    return str(entry) if isinstance(entry, KeyName) else check_value(entry)


def _registered(kek: KekInfo) -> str:
    # A canary can be compared by nobody but who may unwrap.
    return f"{kek.source}:{kek.source_key}" if kek.source in KEPT_ELSEWHERE else kek.check_value


def _entries(wanted: Kek, ref: Ref, data: Mapping[str, bytes]) -> dict[int, Entry]:
    if not data.get(wanted.key):
        return {}
    try:
        return parse_entries(data[wanted.key], f"{ref}: {wanted.key}")
    except KekFileInvalid as error:
        raise KekFileInvalid(f"{error.detail}; put it back from its copy") from None


def _new(wanted: Kek) -> Change:
    return Change(
        data={
            wanted.key: render_entries({1: os.urandom(KEK_BYTES)}),
            wanted.store_id_key: _new_id().encode(),
        },
        annotations={**wanted.annotations, FOUNDED: PENDING},
    )


def _noted(step: Step, wanted: Kek, stored: Stored | None) -> Change:
    if step is Step.NAME:
        data = {wanted.store_id_key: _new_id().encode()}
        return Change("it names its store now", data, annotations={FOUNDED: PENDING}, theirs=True)
    store_id = "" if stored is None else stored.store_id
    mark = {FOUNDED: store_id}
    if step is Step.PIN:
        data = {wanted.store_id_key: store_id.encode()}
        return Change(f"it belongs to store {store_id}", data, annotations=mark, theirs=True)
    return Change(f"store {store_id} has its registry", annotations=mark, theirs=True)


def _new_id() -> str:
    return random.token_hex(16)


async def _found(wanted: Kek, ref: Ref, found: Found, registry: KekRegistry) -> None:
    entries = _entries(wanted, ref, found.data)
    version = max(entries)
    entry = entries[version]
    if isinstance(entry, KeyName):
        raise ProvisionRefused(
            f"the highest KEK version in {ref}, {version}, is kept by {entry.kind}, where provisioning has no"
            " access: begin with a key in the file, and rotate to that one"
        )
    kek = first_kek(version, check_value(entry), "file", str(version), time.time())
    await registry.initialise(kek, found.data[wanted.store_id_key].decode("ascii").strip())
