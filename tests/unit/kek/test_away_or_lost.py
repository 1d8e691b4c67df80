"""A key that is away for a while is never taken for one that is lost, nor what it wrapped for forged."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from structlog.testing import capture_logs

from progressdb_kms.domain.envelope import parse_blob, wrap_aad
from progressdb_kms.domain.errors import KekUnavailable, KekUnreachable, WrappedKeyInvalid
from progressdb_kms.domain.keyring import KekInfo, KekState
from progressdb_kms.kek import hidden
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.kek.hidden import HiddenKeks
from progressdb_kms.kek.keyfile import KeyName, render_entries
from progressdb_kms.kek.pkcs11 import Pkcs11Keeper
from progressdb_kms.kek.threads import Threads
from progressdb_kms.kek.vault import VaultKeeper
from progressdb_kms.settings.kek import Vault
from progressdb_kms.store.memory import MemoryStore
from progressdb_kms.usecases.keks import KekBook
from progressdb_kms.usecases.slotwork import SlotWork
from tests.keepers.softhsm import PIN, TOKEN, SoftHsm
from tests.keepers.transit import Transit
from tests.unit.helpers import Watcher

NAMES = [("k_A", "t")]
AAD = wrap_aad(*NAMES[0])
DEK = os.urandom(32)


@pytest.fixture
def engine(transit: Transit, monkeypatch: pytest.MonkeyPatch) -> Iterator[Transit]:
    """An engine in order with two versions of the key ``k``, which is asked again without a pause."""
    monkeypatch.setattr(hidden, "PAUSE", 0.0)
    before = dict(transit.keys)
    transit.sealed, transit.binds_aad, transit.garbled, transit.tokens = False, True, None, {"root"}
    transit.keys["k"] = [os.urandom(32), os.urandom(32)]
    yield transit
    transit.sealed = False
    transit.min_decryption.clear()
    transit.keys.clear()
    transit.keys.update(before)


@pytest.fixture
def keeper(engine: Transit, tmp_path: Path) -> VaultKeeper:
    """Its keeper."""
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("root")
    return VaultKeeper(Vault(address=engine.address, token_file=token))


def book(keeper: VaultKeeper, folder: Path, store: MemoryStore, *versions: int) -> KekBook:
    """Return a process's KEK book whose file names these versions of ``k``."""
    path = folder / "kek.yaml"
    path.touch(0o600)
    path.write_bytes(render_entries({number: KeyName("vault", f"k@{number}") for number in versions}))
    source = FileKekSource(path, {"vault": HiddenKeks(keeper, 10)})
    return KekBook(source=source, registry=store.registry, observer=Watcher())


async def register(store: MemoryStore, keks: KekBook, version: int, state: KekState) -> None:
    """Put a version into the registry; where it is the active one, the other is retired."""
    view = store._view
    assert view is not None
    value = await keks.source.check_value(version)
    info = KekInfo(version, f"kek_{version}", "vault", f"k@{version}", value, state, 0)
    active, others = view.active, dict(view.keks)
    if state is KekState.ACTIVE:
        active, others = version, {n: replace(k, state=KekState.RETIRED) for n, k in others.items()}
    store._view = replace(view, keks={**others, version: info}, active=active, revision=view.revision + 1)


async def test_a_run_that_begins_while_the_engine_is_away(
    engine: Transit, keeper: VaultKeeper, tmp_path: Path
) -> None:
    """A resumed rotation waits for the keys, and puts none aside; no restart is needed when it is back."""
    store = MemoryStore()
    first = book(keeper, tmp_path, store, 1)
    await first.start(0)
    _, _, (blob,) = await first.wrap([DEK], NAMES)
    engine.sealed = True
    later = book(keeper, tmp_path, store, 1)
    await later.refresh()
    assert "503" in later.problem
    body = parse_blob(blob).body
    with pytest.raises(KekUnreachable):
        await later.unwrap(1, [body], [AAD])
    with pytest.raises(KekUnreachable):
        await later.wrap([DEK], NAMES)
    with pytest.raises(KekUnreachable):
        await SlotWork(cast("object", None), later, 1, 0)._unwrap([blob], [AAD])  # type: ignore[arg-type]
    engine.sealed = False
    assert await later.unwrap(1, [body], [AAD]) == [DEK]
    assert later.usable == (1,)


async def test_another_key_is_not_taken_for_one_that_was_away(
    engine: Transit, keeper: VaultKeeper, tmp_path: Path
) -> None:
    """The engine comes back with another key of the same name: nothing is wrapped under it."""
    store = MemoryStore()
    await book(keeper, tmp_path, store, 1).start(0)
    engine.sealed = True
    later = book(keeper, tmp_path, store, 1)
    await later.refresh()
    engine.sealed = False
    engine.keys["k"] = [os.urandom(32)]
    with pytest.raises(KekUnavailable, match="not loaded as registered"):
        await later.wrap([DEK], NAMES)


async def test_disorder_where_a_seen_key_is_kept_puts_no_key_aside(
    engine: Transit, keeper: VaultKeeper, tmp_path: Path
) -> None:
    """Also where the engine says that there is no such key: it was there a moment ago."""
    store = MemoryStore()
    keks = book(keeper, tmp_path, store, 1)
    await keks.start(0)
    _, _, (blob,) = await keks.wrap([DEK], NAMES)
    work = SlotWork(cast("object", None), keks, 1, 0)  # type: ignore[arg-type]
    kept = engine.keys.pop("k")
    with pytest.raises(KekUnreachable):
        await work._unwrap([blob], [AAD])
    engine.keys["k"] = kept
    assert await work._unwrap([blob], [AAD]) == [DEK]


@pytest.mark.parametrize("trouble", ["replaced", "forbidden"])
async def test_what_a_changed_key_does_not_open_is_not_forged(
    engine: Transit, keeper: VaultKeeper, trouble: str
) -> None:
    """It is found out when a body does not open, and not a minute later; the right key serves again."""
    keks, name = HiddenKeks(keeper, 10), KeyName("vault", "k@1")
    value = await keks.check_value(name)
    assert await keks.matches(name, value)
    (body,) = await keks.wrap(name, [DEK], [AAD])
    kept = engine.keys["k"]
    if trouble == "replaced":
        engine.keys["k"] = [os.urandom(32)]
    else:
        engine.min_decryption["k"] = 2
    for _ in range(2):
        with pytest.raises(KekUnreachable, match="does not open any more"):
            await keks.unwrap(name, [body], [AAD])
        assert not await keks.matches(name, value)
    engine.keys["k"] = kept
    engine.min_decryption.clear()
    assert await keks.unwrap(name, [body], [AAD]) == [DEK]
    (forged,) = await keks.unwrap(name, [body], [b"other"])
    assert isinstance(forged, WrappedKeyInvalid)


async def test_nothing_is_wrapped_under_a_key_that_was_put_in_the_place_of_another(
    engine: Transit, keeper: VaultKeeper, tmp_path: Path
) -> None:
    """Not in the minute between two looks either: it would be lost once the right one is back."""
    store = MemoryStore()
    keks = book(keeper, tmp_path, store, 1)
    await keks.start(0)
    engine.keys["k"] = [os.urandom(32)]
    with pytest.raises(KekUnreachable):
        await keks.wrap([DEK], NAMES)
    await keks.refresh()
    assert "put the right key back" in keks.problem


@pytest.mark.parametrize("trouble", ["forbidden", "deleted"])
async def test_a_retired_key_may_go_where_it_is_kept(
    engine: Transit, keeper: VaultKeeper, tmp_path: Path, trouble: str
) -> None:
    """Retired here, then forbidden there as the documents say: no service is taken out for that."""
    store = MemoryStore()
    keks = book(keeper, tmp_path, store, 1, 2)
    path = tmp_path / "kek.yaml"
    both = path.read_bytes()
    path.write_bytes(render_entries({1: KeyName("vault", "k@1")}))
    await book(keeper, tmp_path, store, 1).start(0)
    path.write_bytes(both)
    await register(store, keks, 2, KekState.ACTIVE)
    if trouble == "forbidden":
        engine.min_decryption["k"] = 2
    else:
        engine.keys["k"][0] = os.urandom(32)
    later = book(keeper, tmp_path, store, 1, 2)
    await later.refresh()
    assert (later.problem, later.usable) == ("", (2,))


async def test_why_a_staged_key_is_not_loaded_is_logged(
    engine: Transit, keeper: VaultKeeper, tmp_path: Path
) -> None:
    """Once: a rotation waits for this instance, which is ready, and nothing else says why."""
    store = MemoryStore()
    await book(keeper, tmp_path, store, 1).start(0)
    keks = book(keeper, tmp_path, store, 1, 2)
    await register(store, keks, 2, KekState.STAGED)
    await keks.refresh()
    later = book(keeper, tmp_path, store, 1, 2)
    engine.sealed = True
    with capture_logs() as logs:
        await later.refresh()
        await later.refresh()
    seen = [line for line in logs if line["event"] == "kek_not_seen" and line["kek_version"] == 2]
    assert len(seen) == 1
    assert "503" in seen[0]["detail"]


async def test_a_huge_body_is_not_sent(engine: Transit, keeper: VaultKeeper) -> None:
    """Whoever can write to the store could stop a whole batch with one."""
    keks, name = HiddenKeks(keeper, 10), KeyName("vault", "k@1")
    (body,) = await keks.wrap(name, [DEK], [AAD])
    before = len(engine.calls)
    (forged,) = await keks.unwrap(name, [bytes(2**20)], [AAD])
    assert isinstance(forged, WrappedKeyInvalid)
    assert len(engine.calls) == before
    forged, good = await keks.unwrap(name, [bytes(2**20), body], [AAD, AAD])
    assert isinstance(forged, WrappedKeyInvalid)
    assert good == DEK


async def test_check_values_from_the_store_do_not_pile_up(engine: Transit, keeper: VaultKeeper) -> None:
    """Whoever can write to the store can put another one there each second."""
    keks, name = HiddenKeks(keeper, 10), KeyName("vault", "k@1")
    value = await keks.check_value(name)
    assert await keks.matches(name, value)
    for _ in range(20):
        assert not await keks.matches(name, os.urandom(68).hex())
    assert len(keks._verdicts) <= 2
    assert await keks.matches(name, value)


async def test_calls_that_are_given_up_do_not_pile_up() -> None:
    """While the only thread hangs, each would keep a key in memory."""
    threads, go_on = Threads("test", 1), threading.Event()
    hanging = asyncio.create_task(threads.call(go_on.wait, 30))
    await asyncio.sleep(0)
    for _ in range(5):
        with pytest.raises(TimeoutError):
            await threads.call(lambda: None, 0.01)
    assert not threads._calls
    go_on.set()
    assert await hanging
    assert await threads.call(lambda: "works", 30) == "works"


def test_a_pin_that_was_refused_is_tried_again_once_it_is_written_again(
    hsm: SoftHsm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token was set to it meanwhile, or was unlocked: no restart is needed."""
    pin = tmp_path / "pin"
    pin.touch(0o600)
    pin.write_text("")
    keeper = Pkcs11Keeper(hsm.module, TOKEN, pin)
    with pytest.raises(KekUnreachable, match="is empty"):
        keeper.wrap("any", [DEK], [AAD])
    pin.write_text(PIN)
    keeper._refused = PIN.encode(), pin.stat().st_mtime_ns
    with pytest.raises(KekUnreachable, match="once that file is written again"):
        keeper.wrap("any", [DEK], [AAD])
    os.utime(pin, ns=(1, 1))
    with pytest.raises(KekUnavailable, match="no secret key 'any'"):
        keeper.wrap("any", [DEK], [AAD])
