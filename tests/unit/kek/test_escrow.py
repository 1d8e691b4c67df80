"""Escrow: what is sealed opens with the recovery key alone, for its store and version alone."""

from __future__ import annotations

import traceback
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from progressdb_kms.domain.errors import BackupInvalid, KekFileInvalid, RegistryLost
from progressdb_kms.domain.keyring import KekInfo, KekState, check_value, kek_id_of
from progressdb_kms.kek.escrow import (
    PRIVATE_NAME,
    PUBLIC_NAME,
    Escrow,
    Recipient,
    fingerprint,
    load_recipients,
    load_recovery_key,
    make_recovery_key,
    recover,
)
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.kek.keyfile import render_entries
from progressdb_kms.ports import RegistryView
from progressdb_kms.ports.escrow import SealedKek
from progressdb_kms.store.escrow_entries import decode_entry, encode_entry
from progressdb_kms.store.memory import MemoryStore
from progressdb_kms.store.memory_escrow import MemoryEscrowBox

KEYS = {version: bytes([version]) * 32 for version in (1, 2, 3)}


def kek(version: int, state: KekState) -> KekInfo:
    """Return a registry entry."""
    value = check_value(KEYS[version])
    return KekInfo(version, kek_id_of(value), "file", str(version), value, state, 1)


@pytest.fixture
def source(tmp_path: Path) -> FileKekSource:
    """Give a KEK file with versions 1 and 2."""
    path = tmp_path / "kek.yaml"
    path.write_bytes(render_entries({version: KEYS[version] for version in (1, 2)}))
    path.chmod(0o600)
    return FileKekSource(path)


@pytest.fixture
async def registry() -> MemoryStore:
    """Give a registry with version 1."""
    store = MemoryStore()
    await store.initialise(kek(1, KekState.ACTIVE))
    return store


async def view_of(store: MemoryStore) -> RegistryView:
    """Return the registry, version 2 staged."""
    return await store.stage(kek(2, KekState.STAGED))


def recipient() -> tuple[X25519PrivateKey, Recipient]:
    """Return a recovery key."""
    private = X25519PrivateKey.generate()
    return private, Recipient(fingerprint(private.public_key()), private.public_key())


async def test_all_versions_open_with_each_recovery_key(source: FileKekSource, registry: MemoryStore) -> None:
    """The version asked for and the one before are sealed to both keys, each of which gives both back."""
    box = MemoryEscrowBox()
    pairs = [recipient() for _ in range(2)]
    escrow = Escrow(box, registry, source, [one for _, one in pairs])
    assert await escrow.complete(2) == 2
    view = await view_of(registry)
    for private, _ in pairs:
        assert recover(await box.load(), view, private) == {1: KEYS[1], 2: KEYS[2]}


async def test_a_new_recovery_key_gets_what_there_is(source: FileKekSource, registry: MemoryStore) -> None:
    """Sealing is completed for a key that was added later, and what was sealed stays as it is."""
    box = MemoryEscrowBox()
    first, second = recipient(), recipient()
    await Escrow(box, registry, source, [first[1]]).complete()
    before = (await box.load())[1]
    await Escrow(box, registry, source, [first[1], second[1]]).complete()
    await Escrow(box, registry, source, [first[1], second[1]]).complete()
    after = (await box.load())[1]
    assert after[0] == before[0]
    assert len(after) == 2
    assert recover(await box.load(), await view_of(registry), second[0]) == {1: KEYS[1]}


async def test_off_seals_nothing(source: FileKekSource, registry: MemoryStore) -> None:
    """Without recovery keys nothing is written."""
    box = MemoryEscrowBox()
    assert await Escrow(box, registry, source, ()).complete(2) == 0
    assert await box.load() == {}


async def test_needs_a_registry(source: FileKekSource) -> None:
    """On a store without registry there is nothing to bind to."""
    with pytest.raises(RegistryLost):
        await Escrow(MemoryEscrowBox(), MemoryStore(), source, [recipient()[1]]).complete()


async def test_bound_to_store_version_and_key(source: FileKekSource, registry: MemoryStore) -> None:
    """Sealed for one store or version, it opens for no other, and to no other key than the registered."""
    box = MemoryEscrowBox()
    private, one = recipient()
    await Escrow(box, registry, source, [one]).complete(2)
    view = await view_of(registry)
    kept = await box.load()
    with pytest.raises(BackupInvalid, match="does not open"):
        recover(kept, replace(view, store_id="another"), private)
    with pytest.raises(BackupInvalid, match="does not open"):
        recover({1: kept[2]}, view, private)
    other = replace(view.keks[1], check_value=check_value(KEYS[3]))
    with pytest.raises(BackupInvalid, match="does not open"):
        recover(kept, replace(view, keks={1: other}), private)


async def test_damage_is_found(source: FileKekSource, registry: MemoryStore) -> None:
    """A changed or cut entry does not open."""
    box = MemoryEscrowBox()
    private, one = recipient()
    await Escrow(box, registry, source, [one]).complete()
    view = await view_of(registry)
    (item,) = (await box.load())[1]
    for sealed in (item.sealed[:-1] + bytes([item.sealed[-1] ^ 1]), item.sealed[:40], b""):
        with pytest.raises(BackupInvalid):
            recover({1: [SealedKek(item.recipient, sealed)]}, view, private)


async def test_nothing_for_a_stranger(source: FileKekSource, registry: MemoryStore) -> None:
    """A recovery key that nothing is sealed to is told so."""
    box = MemoryEscrowBox()
    await Escrow(box, registry, source, [recipient()[1]]).complete()
    with pytest.raises(BackupInvalid, match="nothing is escrowed to this recovery key"):
        recover(await box.load(), await view_of(registry), recipient()[0])


def test_key_pair_is_private_and_never_overwritten(tmp_path: Path) -> None:
    """The private half is 0600, both load, and a second call refuses."""
    directory = tmp_path / "recovery"
    name = make_recovery_key(directory)
    assert (directory / PRIVATE_NAME).stat().st_mode & 0o777 == 0o600
    (loaded,) = load_recipients([directory / PUBLIC_NAME])
    assert loaded.fingerprint == name
    assert fingerprint(load_recovery_key(directory / PRIVATE_NAME).public_key()) == name
    before = (directory / PRIVATE_NAME).read_bytes()
    with pytest.raises(KekFileInvalid, match="never overwritten"):
        make_recovery_key(directory)
    assert (directory / PRIVATE_NAME).read_bytes() == before


def test_bad_recovery_keys_are_refused_without_showing_them(tmp_path: Path) -> None:
    """A missing file, a private key, another kind of key and a key given twice are refused."""
    directory = tmp_path / "r"
    make_recovery_key(directory)
    public, private = directory / PUBLIC_NAME, directory / PRIVATE_NAME
    secret = private.read_text().splitlines()[1]
    other = tmp_path / "other.pem"
    other.write_bytes(
        Ed25519PrivateKey.generate()
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    for paths in ([tmp_path / "none"], [private], [other], [public, public]):
        with pytest.raises(KekFileInvalid) as raised:
            load_recipients(paths)
        assert secret not in "".join(traceback.format_exception(raised.value))
    for path in (tmp_path / "none", public, other):
        path.chmod(0o600) if path.exists() else None
        with pytest.raises(KekFileInvalid):
            load_recovery_key(path)
    private.chmod(0o644)
    with pytest.raises(KekFileInvalid, match="mode 0644"):
        load_recovery_key(private)


def test_export_is_the_loaded_key_only(source: FileKekSource) -> None:
    """A key that has changed in the file since it was loaded is not given out."""
    assert source.export(1) == KEYS[1]
    source.path.write_bytes(render_entries({1: KEYS[3], 2: KEYS[2]}))
    with pytest.raises(KekFileInvalid, match="not the key that is loaded"):
        source.export(1)


def test_sealed_keks_are_not_shown() -> None:
    """The repr of an entry names the recipient alone; an entry reads back as it was."""
    item = SealedKek("ab" * 32, b"secret-bytes")
    assert "secret" not in repr(item)
    assert decode_entry(encode_entry([item])) == (item,)
    for bad in (b"", b"[1]", b'[{"recipient": "x", "sealed": "%"}]', b"{}x"):
        with pytest.raises(BackupInvalid):
            decode_entry(bad)
