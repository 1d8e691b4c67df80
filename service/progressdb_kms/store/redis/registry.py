"""The KEK registry in Redis: the port ``KekRegistry``."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from progressdb_kms.domain.errors import Fenced, RegistryLost
from progressdb_kms.domain.keyring import KekInfo, KekState
from progressdb_kms.domain.rotation import instances_missing
from progressdb_kms.ports import Lock, RegistryView
from progressdb_kms.store.kek_states import RegistryChange, activated, retired, staged
from progressdb_kms.store.redis import scripts
from progressdb_kms.store.redis.link import Reply
from progressdb_kms.store.redis.listing import any_record
from progressdb_kms.store.redis.router import Call, Router, script_call
from progressdb_kms.store.redis.schema import (
    CONTROL,
    IMPORT_KEY,
    INSTANCES_KEY,
    KEKS_KEY,
    LOCK_KEY,
    SCHEMA_KEY,
    SCHEMA_VERSION,
    WRAPS_KEY,
    decode_kek,
    encode_kek,
)

_BEING_FILLED: Final = 2
"""Answer of ``initialise.lua``."""


class RedisRegistry:
    """Implements ``KekRegistry``."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def load(self) -> RegistryView | None:
        """Return the registry, None where the store holds neither registry nor keys.

        Raises:
            RegistryLost: There are keys but no registry, or it can't be read by this release.
        """
        view = await self._read()
        if view is None and await any_record(self._router):
            # Another instance may have made the registry and the first keys since: look again.
            view = await self._read()
            if view is None:
                raise RegistryLost(
                    "the store holds keys but not the registry of the KEKs that wrap them: restore the whole "
                    "store from a backup, or point store.url at the right one"
                )
        return view

    async def initialise(self, kek: KekInfo, store_id: str = "") -> RegistryView:
        """Make the registry with one active version, unless there is one; see ``KekRegistry.initialise``."""
        await self.load()
        entry = encode_kek(replace(kek, state=KekState.ACTIVE, activated_at=kek.created_at))
        made = await self._router.write_one(
            script_call(
                CONTROL,
                scripts.INITIALISE,
                (SCHEMA_KEY, KEKS_KEY, IMPORT_KEY),
                SCHEMA_VERSION,
                store_id or secrets.token_hex(16),
                kek.created_at,
                kek.version,
                entry,
            )
        )
        if made == _BEING_FILLED:
            raise RegistryLost("the store is being filled by an import: let it end, or run it again")
        view = await self.load()
        if view is None:
            raise RegistryLost("the registry of KEKs vanished while it was read")
        return view

    async def stage(self, kek: KekInfo) -> RegistryView:
        """Register a version as staged; see ``KekRegistry.stage``."""
        return await self._change(lambda view: staged(view, kek))

    async def activate(
        self, version: int, *, now: int, lock: Lock, live_since: float | None = None
    ) -> RegistryView:
        """Make a version the active one; see ``KekRegistry.activate``."""
        return await self._change(
            lambda view: activated(view, version, now),
            str(lock.token),
            "" if live_since is None else repr(live_since),
        )

    async def retire(self, version: int, *, lock: Lock) -> RegistryView:
        """Mark a decrypt-only version as retired; see ``KekRegistry.retire``."""
        return await self._change(lambda view: retired(view, version), str(lock.token))

    async def _change(
        self, decide: Callable[[RegistryView], RegistryChange], token: str = "", live_since: str = ""
    ) -> RegistryView:
        """Decide on what is there, and write if nobody changed it in between."""
        while True:
            schema, keks = await self._entries()
            if not schema and not keks:
                raise RegistryLost("the store has no registry of KEKs: point store.url at the right one")
            view = _view(schema, keks)
            change = decide(view)
            pairs: list[str | int] = []
            for version, kek in change.keks.items():
                pairs += [version, encode_kek(kek, keks.get(str(version).encode(), b"{}"))]
            reply = await self._router.write_one(
                script_call(
                    CONTROL,
                    scripts.CHANGE_REGISTRY,
                    (KEKS_KEY, LOCK_KEY, INSTANCES_KEY),
                    view.revision,
                    token,
                    change.active,
                    # What is active already has been checked: an instance that came since is not ready.
                    "" if view.active == change.active else live_since,
                    *pairs,
                )
            )
            if reply == b"fenced":
                raise Fenced("another command has taken the lock of rotations meanwhile: run this one again")
            if isinstance(reply, list):
                raise instances_missing(change.active, [name.decode() for name in reply[1:]])
            if reply == b"ok":
                return _view(*await self._entries())

    async def _read(self) -> RegistryView | None:
        schema, keks = await self._entries()
        return _view(schema, keks) if schema or keks else None

    async def _entries(self) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
        call = script_call(CONTROL, scripts.READ_REGISTRY, (SCHEMA_KEY, KEKS_KEY))
        schema, keks = await self._router.read_one(call)
        return _mapping(schema), _mapping(keks)

    async def reserve_wraps(self, version: int, count: int) -> int:
        """Add to the wrap count of a KEK version and return the new total.

        A retry inside may count a block twice: too many is safe, too few is not.
        """
        return int(await self._router.write_one(Call(CONTROL, ("HINCRBY", WRAPS_KEY, version, count))))

    async def wraps(self) -> dict[int, int]:
        """Return the wrap counts reserved so far, by version."""
        counts = _mapping(await self._router.read_one(Call(CONTROL, ("HGETALL", WRAPS_KEY))))
        return {int(version): int(count) for version, count in counts.items()}


def _mapping(reply: Reply) -> dict[bytes, bytes]:
    return dict(zip(reply[::2], reply[1::2], strict=True))


def _view(schema: dict[bytes, bytes], keks: dict[bytes, bytes]) -> RegistryView:
    try:
        version = int(schema[b"version"])
        if version <= SCHEMA_VERSION:
            known = {int(name): decode_kek(entry) for name, entry in keks.items() if name.isdigit()}
            return RegistryView(schema[b"store_id"].decode(), known, int(keks[b"active"]), int(keks[b"rev"]))
    except (ValueError, KeyError, TypeError):
        raise RegistryLost(
            "the registry of KEKs is damaged: restore the whole store from a backup, or point store.url at "
            "the right one"
        ) from None
    raise RegistryLost(
        f"the store has schema {version}, of a newer release; this one reads up to {SCHEMA_VERSION}: upgrade"
    )
