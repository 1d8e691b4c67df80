"""One contract for every place that keeps KEKs: the file, a PKCS#11 token, a transit engine, AWS KMS."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from progressdb_kms.domain.envelope import wrap_aad
from progressdb_kms.domain.errors import KekFileInvalid, KekUnavailable, WrappedKeyInvalid
from progressdb_kms.domain.keyring import KekInfo, KekState
from progressdb_kms.kek.aws import AwsKeeper
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.kek.hidden import HiddenKeks, Keeper
from progressdb_kms.kek.keyfile import Entry, KeyName, render_entries
from progressdb_kms.kek.pkcs11 import Pkcs11Keeper
from progressdb_kms.kek.vault import VaultKeeper
from progressdb_kms.settings.kek import Vault
from tests.keepers.softhsm import TOKEN

KINDS = ("file", "pkcs11", "vault", "aws")


@dataclass
class Place:
    """Where two keys are, versions 1 and 2 of a KEK file."""

    kind: str
    path: Path
    make_keeper: Callable[[], Keeper] | None

    def open(self) -> FileKekSource:
        """Open the source as another process would."""
        keeper = self.make_keeper() if self.make_keeper else None
        return FileKekSource(self.path, {keeper.kind: HiddenKeks(keeper, 10)} if keeper else {})


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Give each kind of place in turn."""
    kind: str = request.param
    entries: dict[int, Entry]
    make: Callable[[], Keeper] | None = None
    name = f"kek-{os.urandom(6).hex()}"
    if kind == "file":
        entries = {1: os.urandom(32), 2: os.urandom(32)}
    elif kind == "pkcs11":
        hsm = request.getfixturevalue("hsm")
        make = lambda: Pkcs11Keeper(hsm.module, TOKEN, hsm.pin_file)  # noqa: E731 - one of four
        for number in (1, 2):
            Pkcs11Keeper(hsm.module, TOKEN, hsm.pin_file).generate(f"{name} {number}")
        entries = {number: KeyName(kind, f"{name} {number}") for number in (1, 2)}
    elif kind == "vault":
        transit = request.getfixturevalue("transit")
        token = tmp_path / "token"
        token.touch(0o600)
        token.write_text("root\n")
        transit.add_key(name)
        transit.add_key(name)
        make = lambda: VaultKeeper(Vault(address=transit.address, token_file=token))  # noqa: E731 - one of four
        entries = {number: KeyName(kind, f"{name}@{number}") for number in (1, 2)}
    else:
        aws = request.getfixturevalue("aws")
        make = lambda: AwsKeeper(aws.address, 10)  # noqa: E731 - one of four
        entries = {number: KeyName(kind, aws.make_key()) for number in (1, 2)}
    path = tmp_path / "kek.yaml"
    path.touch(0o600)
    path.write_bytes(render_entries(entries))
    return Place(kind, path, make)


def registered(version: int, value: str) -> KekInfo:
    """Return a KEK as it stands in a registry."""
    return KekInfo(version, "kek_x", "x", "x", value, KekState.ACTIVE, 0, 0)


def some(count: int) -> tuple[list[bytes], list[bytes]]:
    """Return DEKs, and the AAD of each."""
    return [os.urandom(32) for _ in range(count)], [wrap_aad(f"k_{n}", f"thread {n}") for n in range(count)]


async def test_it_says_what_it_has(place: Place) -> None:
    """Versions, their kind and their names; and neither of them shows a key."""
    source = place.open()
    assert source.versions() == {1, 2}
    assert source.kind(1) == place.kind
    assert (
        source.source_key(2) == "2"
        if place.kind == "file"
        else source.source_key(2) in place.path.read_text()
    )
    assert source.exportable() == ({1, 2} if place.kind == "file" else set())
    assert "versions=[1, 2]" in repr(source)


@pytest.mark.parametrize("count", [0, 1, 300])
async def test_batches_come_back_in_order(place: Place, count: int) -> None:
    """As many as there are, also more than go into one call; another instance opens what one has wrapped."""
    deks, aads = some(count)
    bodies = await place.open().wrap(1, deks, aads)
    assert len(set(bodies)) == count
    assert not [dek for dek in deks if any(dek in body for body in bodies)]
    assert await place.open().unwrap(1, bodies, aads) == deks


async def test_a_body_opens_only_as_it_was_wrapped(place: Place) -> None:
    """Not with another AAD, under another key, changed, cut, longer or as nothing; its neighbours do."""
    source = place.open()
    (dek, *_), (aad, other, *_) = some(2)
    good, under_two = (await source.wrap(1, [dek], [aad]))[0], (await source.wrap(2, [dek], [aad]))[0]
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    bad = [good, under_two, flipped, good[:-1], good + b"\0", good[:20], b""]
    results = await source.unwrap(1, [good, *bad, good], [aad, other, *[aad] * (len(bad) - 1), aad])
    assert results[0] == results[-1] == dek
    assert [type(result) for result in results[1:-1]] == [WrappedKeyInvalid] * len(bad)


async def test_a_check_value_names_one_key(place: Place) -> None:
    """It is known again by another process, and taken for no other key; rubbish is no key's."""
    source, later = place.open(), place.open()
    values = [await source.check_value(version) for version in (1, 2)]
    assert values == [await source.check_value(version) for version in (1, 2)]
    assert values[0][:16] != values[1][:16]
    assert bytes.fromhex(values[0][:16])
    for version in (1, 2):
        assert [await later.matches(version, value) for value in values] == [version == 1, version == 2]
    for rubbish in ("", "é", "00" * 32, values[0][:-2], values[0] + "00"):
        assert not await later.matches(1, rubbish)


async def test_a_seal_is_that_of_its_key_and_label(place: Place) -> None:
    """Another process seals alike; another label, digest or key does not."""
    source, later = place.open(), place.open()
    one, two = [registered(version, await source.check_value(version)) for version in (1, 2)]
    seal = await source.seal(one, b"label", b"digest")
    assert len(seal) == 32
    assert await later.seal(one, b"label", b"digest") == seal
    others = [
        await later.seal(one, b"labe", b"ldigest"),
        await later.seal(one, b"label", b"digesT"),
        await later.seal(two, b"label", b"digest"),
    ]
    assert len({seal, *others}) == 4


async def test_a_version_that_is_not_there(place: Place) -> None:
    """Every use of it says so."""
    source = place.open()
    for use in (
        source.wrap(3, [bytes(32)], [b""]),
        source.unwrap(3, [bytes(60)], [b""]),
        source.check_value(3),
        source.matches(3, ""),
        source.seal(registered(3, ""), b"", b""),
    ):
        with pytest.raises(KekUnavailable):
            await use


async def test_many_callers_at_once(place: Place) -> None:
    """Each gets its own."""
    source = place.open()

    async def one(version: int) -> None:
        # A place that takes one key a call gets 20 times as many, and all have to be done within its timeout.
        deks, aads = some(4)
        bodies = await source.wrap(version, deks, aads)
        assert await source.unwrap(version, bodies, aads) == deks

    await asyncio.gather(*(one(1 + number % 2) for number in range(20)))


async def test_a_reload_keeps_what_is_needed(place: Place) -> None:
    """Neither a missing version nor another key under its number is taken over; an unused one may go."""
    source = place.open()
    content = place.path.read_text()
    lines = content.splitlines(keepends=True)
    required = {1: await source.check_value(1)}
    assert not source.reload(required)
    swapped = content.replace("  1: ", "  X: ").replace("  2: ", "  1: ").replace("  X: ", "  2: ")
    for broken in ("".join(line for line in lines if "  1: " not in line), swapped):
        place.path.write_text(broken)
        with pytest.raises(KekFileInvalid, match="KEK version 1"):
            source.reload(required)
        assert source.versions() == {1, 2}
    place.path.write_text("".join(line for line in lines if "  2: " not in line))
    assert source.reload(required)
    assert source.versions() == {1}
    assert await source.matches(1, required[1])
