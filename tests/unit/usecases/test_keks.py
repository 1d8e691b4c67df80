"""The registry beside what is loaded: a version is used only where the two agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from progressdb_kms.domain.envelope import USES_LIMIT, USES_WARN
from progressdb_kms.domain.errors import KekMismatch, KekUnavailable, NotReady
from progressdb_kms.domain.keyring import KekInfo, KekState, check_value, kek_id_of
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.store.memory import MemoryStore
from progressdb_kms.usecases.keks import WRAPS_BLOCK, KekBook, first_kek
from tests.unit.helpers import Watcher, World, labelled, write_keks

NAMES = [("k_A", "t")]


def book(path: Path, store: MemoryStore) -> KekBook:
    """Return a KEK book over a file and a store."""
    return KekBook(source=FileKekSource(path), registry=store.registry, observer=Watcher())


def register(
    store: MemoryStore, version: int, label: str, state: KekState, *, active: int | None = None
) -> None:
    """Put a version into the registry, as a rotation does."""
    view = store._view
    assert view is not None
    value = check_value(labelled(label))
    info = KekInfo(version, kek_id_of(value), "file", str(version), value, state, 0)
    keks = {**view.keks, version: info}
    if active is not None:
        keks[view.active] = replace(view.keks[view.active], state=KekState.DECRYPT_ONLY)
    store._view = replace(view, keks=keks, active=active or view.active, revision=view.revision + 1)


async def test_an_empty_store_gets_a_registry_with_the_highest_version(tmp_path: Path) -> None:
    """The first instance registers what it has; a loaded version that nobody registered is unused."""
    store = MemoryStore()
    keks = book(write_keks(tmp_path / "kek", v1="kek 1", v3="kek 3"), store)
    with pytest.raises(NotReady):
        _ = keks.active
    assert keks.required() == {}
    assert keks.problem
    await keks.start(7)
    assert keks.problem == ""
    assert (keks.active, keks.usable) == (3, (3,))
    kek = keks.view.keks[3]
    assert (kek.kek_id, kek.state, kek.created_at) == (
        kek_id_of(check_value(labelled("kek 3"))),
        KekState.ACTIVE,
        7,
    )
    assert keks.required() == {3: check_value(labelled("kek 3"))}
    with pytest.raises(KekUnavailable):
        await keks.unwrap(1, [b""], [b""])


async def test_an_empty_store_is_not_founded_by_a_kek_of_another(tmp_path: Path) -> None:
    """KEKs that belong to a store make no registry in an empty one; once it is filled, all is well."""
    store, name = MemoryStore(), "ab" * 16
    path = write_keks(tmp_path / "kek", v1="kek 1")
    keks = KekBook(source=FileKekSource(path), registry=store.registry, observer=Watcher(), store_id=name)
    with pytest.raises(NotReady, match=f"the store is empty, but this KEK belongs to store {name}.*import"):
        await keks.start(0)
    assert await store.registry.load() is None
    assert "the store is empty" in keks.problem
    value = check_value(labelled("kek 1"))
    await store.registry.initialise(first_kek(1, value, "file", "1", 5), name)
    await keks.start(0)
    assert (keks.problem, keks.view.store_id, keks.view.keks[1].created_at) == ("", name, 5)


async def test_another_store_is_refused(tmp_path: Path) -> None:
    """Even one whose keys are under the same KEK: at start, and where the registry is only read."""
    store, name = MemoryStore(), "ab" * 16
    path = write_keks(tmp_path / "kek", v1="kek 1")
    await book(path, store).start(0)
    other = KekBook(source=FileKekSource(path), registry=store.registry, observer=Watcher(), store_id=name)
    with pytest.raises(KekMismatch, match=f"belongs to store {name}"):
        await other.start(0)
    await other.refresh()
    assert f"belongs to store {name}" in other.problem
    with pytest.raises(KekUnavailable, match="belongs to store"):
        await other.wrap([bytes(32)], NAMES)


async def test_the_wrong_key_refuses_to_start(tmp_path: Path) -> None:
    """And says which version is wrong, and by name which is expected."""
    store = MemoryStore()
    await book(write_keks(tmp_path / "kek", v1="kek 1"), store).start(0)
    wrong = book(write_keks(tmp_path / "wrong", v1="kek 2"), store)
    with pytest.raises(KekMismatch, match=r"version 1 is not the key .* put the right key back") as raised:
        await wrong.start(0)
    assert kek_id_of(check_value(labelled("kek 1"))) in raised.value.detail
    assert wrong.usable == ()
    with pytest.raises(KekUnavailable):
        await wrong.wrap([bytes(32)], NAMES)


@pytest.mark.parametrize(
    "state, starts", [(KekState.DECRYPT_ONLY, False), (KekState.STAGED, True), (KekState.RETIRED, True)]
)
async def test_a_missing_version_matters_where_data_needs_it(
    tmp_path: Path, state: KekState, starts: bool
) -> None:
    """Active and decrypt_only versions must be loaded; staged and retired ones need not."""
    store = MemoryStore()
    path = write_keks(tmp_path / "kek", v1="kek 1")
    await book(path, store).start(0)
    register(store, 2, "kek 2", state)
    keks = book(path, store)
    if starts:
        await keks.start(0)
        assert keks.usable == (1,)
    else:
        with pytest.raises(KekMismatch, match=r"version 2 \(decrypt_only\) is not loaded"):
            await keks.start(0)


@pytest.mark.parametrize("state", list(KekState))
async def test_a_wrong_version_matters_in_every_state(tmp_path: Path, state: KekState) -> None:
    """A wrong key under a known number must never wrap or be trusted, staged or retired as it may be."""
    store = MemoryStore()
    await book(write_keks(tmp_path / "kek", v1="kek 1"), store).start(0)
    register(store, 2, "kek 2", state)
    with pytest.raises(KekMismatch, match="version 2 is not the key"):
        await book(write_keks(tmp_path / "kek", v1="kek 1", v2="other"), store).start(0)


async def test_an_active_version_that_is_not_listed_is_a_problem(tmp_path: Path) -> None:
    """A damaged registry is said to be one."""
    store = MemoryStore()
    path = write_keks(tmp_path / "kek", v1="kek 1")
    await book(path, store).start(0)
    assert store._view is not None
    store._view = replace(store._view, active=5)
    with pytest.raises(KekMismatch, match="names version 5 as active"):
        await book(path, store).start(0)


async def test_a_rotation_is_followed(world: World) -> None:
    """A new active version, once loaded and registered, wraps from the next refresh on."""
    register(world.store, 2, "kek 2", KekState.ACTIVE, active=2)
    await world.keks.refresh()
    assert "version 2 (active) is not loaded" in world.keks.problem
    with pytest.raises(KekUnavailable):
        await world.keks.wrap([bytes(32)], NAMES)
    write_keks(world.kek_path, v1="kek 1", v2="kek 2")
    world.source.reload(world.keks.required())
    await world.keks.refresh()
    assert world.keks.problem == ""
    version, kek_id, (blob,) = await world.keks.wrap([bytes(32)], NAMES)
    assert (version, kek_id) == (2, kek_id_of(check_value(labelled("kek 2"))))
    assert blob[:4] == b"\x01\x00\x00\x02"
    assert world.keks.usable == (1, 2)


async def test_a_registry_that_is_gone_stops_all_wraps(world: World) -> None:
    """Keys must not be written beside no registry: no later start could tell what they are under."""
    view, world.store._view = world.store._view, None
    await world.keks.refresh()
    assert "has gone" in world.keks.problem
    with pytest.raises(KekUnavailable):
        await world.keks.wrap([bytes(32)], NAMES)
    world.store._view = view
    await world.keks.refresh()
    assert world.keks.problem == ""
    assert await world.keks.wrap([bytes(32)], NAMES)


async def test_another_store_is_not_adopted(world: World) -> None:
    """A store with other data needs a restart, and gets no key meanwhile."""
    assert world.store._view is not None
    world.store._view = replace(world.store._view, store_id="another")
    await world.keks.refresh()
    assert "another store" in world.keks.problem
    assert world.keks.view.store_id != "another"
    with pytest.raises(KekUnavailable):
        await world.keks.wrap([bytes(32)], NAMES)


async def test_wraps_are_reserved_before_they_are_made(world: World) -> None:
    """In blocks, once for many; a larger batch reserves its own size."""
    await world.keks.wrap([bytes(32)], NAMES)
    await world.keks.wrap([bytes(32)] * 10, NAMES * 10)
    assert await world.keks.wraps() == {1: WRAPS_BLOCK}
    await world.keks.wrap([bytes(32)] * (WRAPS_BLOCK - 10), NAMES * (WRAPS_BLOCK - 10))
    assert await world.keks.wraps() == {1: 2 * WRAPS_BLOCK}


async def test_a_worn_kek_warns_and_then_wraps_no_more(world: World) -> None:
    """At the threshold operators hear of it; at the limit wrapping is refused."""
    world.store._wraps[1] = USES_WARN
    await world.keks.wrap([bytes(32)], NAMES)
    assert world.watcher.counts["warning kek"] == 1
    world.store._wraps[1] = USES_LIMIT
    world.keks._wraps_left.clear()
    with pytest.raises(KekUnavailable, match="as many keys as is safe: rotate it"):
        await world.keks.wrap([bytes(32)], NAMES)


async def test_a_needed_version_that_is_not_loaded_is_looked_for(tmp_path: Path) -> None:
    """An instance that slept through a rotation reads its KEK file when it learns of the new version."""
    store = MemoryStore()
    path = write_keks(tmp_path / "kek", v1="kek 1")
    source = FileKekSource(path)
    keks = KekBook(source=source, registry=store.registry, observer=Watcher(), look_again=source.reload)
    await keks.start(7)
    register(store, 2, "kek 2", KekState.ACTIVE, active=2)
    await keks.refresh()
    assert "version 2" in keks.problem
    write_keks(path, v1="kek 1", v2="another")
    await keks.refresh()
    assert "version 2" in keks.problem
    assert keks.usable == (1,)
    write_keks(path, v1="kek 1", v2="kek 2")
    await keks.refresh()
    assert keks.problem == ""
    assert (await keks.wrap([bytes(32)], NAMES))[0] == 2
