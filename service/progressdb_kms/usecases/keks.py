"""KEK versions: what the registry says, what is loaded, and whether the two agree."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

import structlog

from progressdb_kms.domain.envelope import USES_LIMIT, USES_WARN, pack_blob, wrap_aad
from progressdb_kms.domain.errors import (
    KekFileInvalid,
    KekMismatch,
    KekUnavailable,
    KekUnreachable,
    KmsError,
    NotReady,
    RegistryLost,
)
from progressdb_kms.domain.keyring import KEPT_ELSEWHERE, KekInfo, KekState, kek_id_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from progressdb_kms.ports import KekRegistry, KekSource, Observer, RegistryView

log = structlog.get_logger(__name__)

WRAPS_BLOCK: Final = 2**16
"""Wraps of one KEK version that an instance reserves at a time, before it makes them."""


class KekBook:
    """The loaded KEKs beside the registry. A version is used only where the two agree.

    Args:
        source: Holds the KEKs.
        registry: Says which there are.
        observer: Who counts.
        look_again: Makes the source read what it has, given the check values that it must hold; called when
            the registry names a needed version that is not loaded. An instance that slept through a
            rotation learns of it here, and must not refuse requests until its next look at the file.
        store_id: Of the one store that the KEKs belong to; empty where that was never written down.

    Attributes:
        problem: Why the service must not be ready, or an empty string.
        lacking: Decrypt-only versions that are not loaded, where nothing but that is wrong; else empty.
    """

    def __init__(
        self,
        *,
        source: KekSource,
        registry: KekRegistry,
        observer: Observer,
        look_again: Callable[[Mapping[int, str]], object] = lambda _required: None,
        store_id: str = "",
    ) -> None:
        self.source = source
        self._store_id = store_id
        self._look_again = look_again
        self._registry = registry
        self._observer = observer
        self._view: RegistryView | None = None
        self._verified: dict[int, str] = {}
        self._wraps_left: dict[int, int] = {}
        self._lost = ""
        self._trouble: dict[int, str] = {}
        self._unseen: dict[int, KekUnavailable | KekUnreachable] = {}
        self._reserving = asyncio.Lock()
        # Looking at keys that are kept elsewhere takes time, in which no older view may replace a newer one.
        self._refreshing = asyncio.Lock()
        self.problem = "the KEK registry has not been read yet"
        self.lacking: tuple[int, ...] = ()

    @property
    def view(self) -> RegistryView:
        """The registry as last read.

        Raises:
            NotReady: It has not been read yet.
        """
        if self._view is None:
            raise NotReady("the KEK registry has not been read yet")
        return self._view

    @property
    def active(self) -> int:
        """The version that new wraps use."""
        return self.view.active

    @property
    def usable(self) -> tuple[int, ...]:
        """Versions that are loaded and are what the registry says."""
        return tuple(sorted(self._verified))

    def required(self) -> Mapping[int, str]:
        """Return check values of the versions that a reload must not lose or change."""
        return {} if self._view is None else _required(self._view)

    async def start(self, now: float, *, may_lack: bool = False) -> None:
        """Read the registry, or make it on an empty store with the highest loaded version as active.

        Where the KEKs belong to a store, no registry is made: an empty store is then not theirs, or has lost
        everything, and keys made in it would hide that.

        Args:
            now: Unix seconds.
            may_lack: Go on though decrypt-only versions are not loaded: for operators' commands, by which a
                version that was erased since the store's export is retired again. What needs one of them
                says so itself.

        Raises:
            KekMismatch: A loaded version is not the key that was registered, or a needed one is not loaded;
                or the KEKs belong to another store.
            NotReady: The store has no registry, and the KEKs belong to one that has. It can still be
                filled.
            RegistryLost: The store holds keys but no registry that this release can read.
            StoreUnavailable, StoreNotDurable: Not now.
            KekUnreachable: Where a version is kept does not answer.
        """
        try:
            view = await self._registry.load()
        except RegistryLost as error:
            if not self._store_id:
                raise
            # An import writes the registry last. Who waits for it on an empty store waits to its end.
            self.problem = f"{error.detail}; an import that is under way brings it when it ends"
            raise NotReady(self.problem) from None
        if view is None and self._store_id:
            self.problem = empty_store(self._store_id)
            raise NotReady(self.problem)
        if view is None:
            version = max(self.source.versions())
            value = await self.source.check_value(version)
            if not await self.source.matches(version, value):
                raise KekMismatch(
                    f"KEK version {version} does not unwrap what it has wrapped: may it decrypt?"
                )
            kek = first_kek(version, value, self.source.kind(version), self.source.source_key(version), now)
            view = await self._registry.initialise(kek)
        require_store(view, self._store_id)
        unreachable = await self._adopt(view)
        if not self.problem or (may_lack and self.lacking):
            return
        raise KekUnreachable(self.problem) if unreachable else KekMismatch(self.problem)

    async def refresh(self) -> None:
        """Read the registry and the source again; what does not agree makes ``problem``, and is not used.

        While the registry is lost, what was known of it still unwraps, but nothing is wrapped: never under a
        KEK that the store's registry does not know.

        Raises:
            RegistryLost, StoreUnavailable: As ``start``.
        """
        async with self._refreshing:
            await self._refresh()

    async def _refresh(self) -> None:
        try:
            view = await self._registry.load()
        except RegistryLost as error:
            self.problem = self._lost = error.detail
            self.lacking = ()
            raise
        self.lacking = ()
        if view is None:
            self.problem = self._lost = (
                "the KEK registry has gone from the store: restore it before anything is written"
            )
        elif self._store_id and view.store_id != self._store_id:
            self.problem = self._lost = _another_store(view.store_id, self._store_id)
        elif self._view is not None and view.store_id != self._view.store_id:
            self.problem = self._lost = (
                "this is another store than the one that the service started on: restart the service"
            )
        else:
            await self._adopt(view)

    async def _adopt(self, view: RegistryView) -> bool:
        """Take a registry over; return whether all of ``problem`` is that some version can't be looked at."""
        required = _required(view)
        if not required.keys() <= self.source.versions():
            # A source that can't be read keeps what it had, and what lacks then is told below.
            with suppress(KekFileInvalid):
                self._look_again(required)
        loaded = self.source.versions()
        keks = [kek for _, kek in sorted(view.keks.items())]
        verified: dict[int, str] = {}
        unseen: dict[int, KekUnavailable | KekUnreachable] = {}
        problems: list[str] = []
        unreachable: list[str] = []
        lacking: list[int] = []
        for kek, matches in zip(keks, await asyncio.gather(*map(self._matches, keks)), strict=True):
            if matches is True:
                verified[kek.version] = kek.kek_id
            elif matches is not False:
                unseen[kek.version] = matches
                if kek.version in required:
                    told, why = (unreachable, matches.detail) if kek.version in loaded else (problems, "")
                    told.append(_not_loaded(kek, why))
                    lacking += [kek.version] if kek.state is KekState.DECRYPT_ONLY else []
            elif kek.state is not KekState.RETIRED or self.source.kind(kek.version) not in KEPT_ELSEWHERE:
                # Even a staged or retired one: a wrong key under a known number is never to be trusted. But
                # where it is kept, a retired one may be forbidden or deleted by now.
                problems.append(
                    f"KEK version {kek.version} is not the key that this store's data is wrapped under"
                    f" (expected {kek.kek_id}): put the right key back"
                )
        if view.active not in view.keks:
            problems.append(f"the KEK registry names version {view.active} as active but does not know it")
        self._view = view
        self._verified = verified
        self._note_unseen({version: error for version, error in unseen.items() if version in loaded})
        self._lost = ""
        self.problem = "; ".join([*problems, *unreachable])
        self.lacking = tuple(lacking) if len(lacking) == len(problems) + len(unreachable) else ()
        return bool(unreachable) and not problems

    async def _matches(self, kek: KekInfo) -> bool | KekUnavailable | KekUnreachable:
        try:
            return await self.source.matches(kek.version, kek.check_value)
        except (KekUnavailable, KekUnreachable) as error:
            return error

    def _note_unseen(self, unseen: dict[int, KekUnavailable | KekUnreachable]) -> None:
        """Log, once, why a loaded version can't be looked at: of a staged one nothing else says it."""
        for version, error in unseen.items():
            before = self._unseen.get(version)
            needed = self.view.keks[version].state is not KekState.RETIRED
            if needed and (before is None or before.detail != error.detail):
                log.warning("kek_not_seen", kek_version=version, detail=error.detail)
        self._unseen = unseen

    async def _require_verified(self, version: int, problem: str) -> str:
        """Return the kek_id of a version that is loaded as registered.

        One that could only not be looked at is looked at now: what is away is not lost, and whoever takes it
        for lost puts keys aside.

        Raises:
            KekUnavailable: With ``problem``; it is not loaded, or is another key.
            KekUnreachable: Where it is kept still does not answer.
        """
        if version not in self._verified and isinstance(self._unseen.get(version), KekUnreachable):
            kek = self.view.keks[version]
            with self._told(version):
                matches = await self.source.matches(version, kek.check_value)
            if matches and self.view.keks.get(version) == kek:
                self._verified[version] = kek.kek_id
        kek_id = self._verified.get(version)
        if kek_id is None:
            raise KekUnavailable(problem)
        return kek_id

    async def wrap(
        self, deks: Sequence[bytes], names: Sequence[tuple[str, str]]
    ) -> tuple[int, str, list[bytes]]:
        """Wrap raw DEKs under the active version.

        Args:
            deks: 32 bytes each.
            names: ``(key_id, thread_id)`` of each, which the wrap binds.

        Returns:
            KEK version, its kek_id, and the blobs.

        Raises:
            KekUnavailable: The active version is not loaded as registered, or is worn out, or the registry
                is lost: a key wrapped then might be under a KEK that nobody knows of later.
            StoreUnavailable, StoreNotDurable: Its count of wraps can't be reserved.
        """
        if self._lost:
            raise KekUnavailable(self._lost)
        version = self.active
        problem = f"the active KEK version {version} is not loaded as registered"
        kek_id = await self._require_verified(version, problem)
        await self._reserve(version, len(deks))
        with self._told(version):
            bodies = await self.source.wrap(version, deks, [wrap_aad(*name) for name in names])
        return version, kek_id, [pack_blob(version, body) for body in bodies]

    async def unwrap(
        self, version: int, bodies: Sequence[bytes], aads: Sequence[bytes]
    ) -> list[bytes | KmsError]:
        """Unwrap bodies under exactly ``version``; WrappedKeyInvalid in the place of one that does not.

        Raises:
            KekUnavailable: The version is not loaded as registered.
            KekUnreachable: Where it is kept does not answer.
        """
        await self._require_verified(version, f"KEK version {version} is not loaded as registered")
        with self._told(version):
            return await self.source.unwrap(version, bodies, aads)

    @contextmanager
    def _told(self, version: int) -> Iterator[None]:
        """Log why a key is not to be had, once; callers are not told, as it names our files and addresses."""
        failure: KekUnavailable | KekUnreachable | None = None
        try:
            yield
        except (KekUnavailable, KekUnreachable) as error:
            failure = error
        if failure is not None:
            if self._trouble.get(version) != failure.detail:
                log.error("kek_not_usable", kek_version=version, detail=failure.detail)
            self._trouble[version] = failure.detail
            raise type(failure)(f"KEK version {version}: {failure.title}")
        if self._trouble.pop(version, ""):
            log.info("kek_usable_again", kek_version=version)

    async def wraps(self) -> dict[int, int]:
        """Return the wraps reserved so far by version.

        Raises:
            StoreUnavailable: Not now.
        """
        return await self._registry.wraps()

    async def _reserve(self, version: int, count: int) -> None:
        async with self._reserving:
            if self._wraps_left.get(version, 0) < count:
                block = max(WRAPS_BLOCK, count)
                total = await self._registry.reserve_wraps(version, block)
                if total - block >= USES_LIMIT:
                    raise KekUnavailable(
                        f"KEK version {version} has wrapped as many keys as is safe: rotate it"
                    )
                if total >= USES_WARN:
                    self._observer.uses_warning("kek")
                    log.warning(
                        "kek_uses_high", kek_version=version, uses=total, limit=USES_LIMIT, action="rotate it"
                    )
                self._wraps_left[version] = self._wraps_left.get(version, 0) + block
            self._wraps_left[version] -= count


def first_kek(version: int, value: str, source: str, source_key: str, now: float) -> KekInfo:
    """Return what the registry of an empty store begins with.

    Args:
        version: The KEK version.
        value: Its check value.
        source: Kind of source that holds it.
        source_key: The source's own name for it.
        now: Unix seconds.
    """
    at = int(now)
    return KekInfo(version, kek_id_of(value), source, source_key, value, KekState.ACTIVE, at, at)


def require_store(view: RegistryView, store_id: str) -> None:
    """Return if this is the store that the KEKs belong to, or if nobody wrote down which that is.

    Raises:
        KekMismatch: It is another one.
    """
    if store_id and view.store_id != store_id:
        raise KekMismatch(_another_store(view.store_id, store_id))


def empty_store(store_id: str) -> str:
    """Return why an empty store is refused, and what to do."""
    return (
        f"the store is empty, but this KEK belongs to store {store_id}: point store.url at that store, bring"
        " its volume back, or import a backup of it (progressdb-kms backup import)"
    )


def _another_store(found: str, store_id: str) -> str:
    return (
        f"this is store {found}, but this KEK belongs to store {store_id} (store.id_file): point store.url at"
        " that store, or use the KEK and the id of this one"
    )


def _not_loaded(kek: KekInfo, why: str) -> str:
    otherwise = ", or retire it if nothing needs it" if kek.state is KekState.DECRYPT_ONLY else ""
    because = f" ({why})" if why else ""
    return f"KEK version {kek.version} ({kek.state}) is not loaded{because}: add it{otherwise}"


def _required(view: RegistryView) -> dict[int, str]:
    """Return the check values of the versions that stored keys may need."""
    return {
        version: kek.check_value
        for version, kek in view.keks.items()
        if kek.state in {KekState.ACTIVE, KekState.DECRYPT_ONLY}
    }
