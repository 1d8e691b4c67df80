"""The KEK file: which ones are taken, what a refusal says, and what a reload keeps."""

from __future__ import annotations

import contextlib
import os
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.domain.envelope import BODY_BYTES, NONCE_BYTES, wrap_aad
from progressdb_kms.domain.errors import KekFileInvalid, KekUnavailable, WrappedKeyInvalid
from progressdb_kms.domain.keyring import check_value
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.kek.keyfile import KeyName, _parse

# Recognisable in any output; as a key it is as good as another.
KEY = "5ec2e7" * 10 + "5ec2"
OTHER = "0f" * 32
DIGITS = "12" * 32


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    """Write a KEK file anew, as a new inode."""
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the KEK file of a test is."""
    return tmp_path / "kek.yaml"


async def test_master_key_hex_is_version_1(path: Path) -> None:
    """The short form holds one key, which is version 1."""
    source = FileKekSource(write(path, f"master_key_hex: {KEY}\n"))
    assert source.versions() == {1}
    assert await source.check_value(1) == check_value(bytes.fromhex(KEY))


async def test_versions_are_loaded_by_number(path: Path) -> None:
    """The long form holds several, and upper-case hex is as good."""
    source = FileKekSource(write(path, f"versions:\n  2: {OTHER}\n  7: '{KEY.upper()}'\n"))
    assert source.versions() == {2, 7}
    assert source.kind(7) == "file"
    assert source.source_key(7) == "7"
    assert await source.matches(7, check_value(bytes.fromhex(KEY)))
    assert not await source.matches(2, check_value(bytes.fromhex(KEY)))
    assert not await source.matches(2, "é")


async def test_a_key_of_decimal_digits_is_still_text(path: Path) -> None:
    """YAML would read 64 decimal digits as a number; the key is what stands in the file."""
    source = FileKekSource(write(path, f"master_key_hex: {DIGITS}\n"))
    assert await source.check_value(1) == check_value(bytes.fromhex(DIGITS))


BROKEN = {
    "empty": ("", "there is no|not a YAML mapping"),
    "no versions": ("versions: {}\n", "no KEK"),
    "both forms": (f"master_key_hex: {KEY}\nversions: {{1: {KEY}}}\n", "both"),
    "only the key": (f"{KEY}\n", "not a YAML mapping"),
    "a list": (f"- {KEY}\n", "not a YAML mapping"),
    "unknown field": (f"master_key_hex: {OTHER}\n{KEY}: 1\n", "line 2: unknown field"),
    "field that is a list": (f"? [{KEY}]\n: 1\n", "unknown field"),
    "field twice": (
        f"master_key_hex: {KEY}\nmaster_key_hex: {OTHER}\n",
        "line 2: master_key_hex is given twice",
    ),
    "version twice": (f"versions:\n  1: {KEY}\n  1: {OTHER}\n", "line 3: version 1 is given twice"),
    "version 0": (f"versions: {{0: {KEY}}}\n", "whole number"),
    "version too large": (f"versions: {{16777216: {KEY}}}\n", "not between"),
    "version is a key": (f"versions: {{{KEY}: 1}}\n", "line 1: a version is a whole number"),
    "version is a list": (f"versions:\n  ? [1]\n  : {KEY}\n", "whole number"),
    "versions is a key": (f"versions: {KEY}\n", "not a mapping"),
    "versions is a list": (f"versions: [{KEY}]\n", "not a mapping"),
    "key too short": (f"master_key_hex: {KEY[:-2]}\n", "64 hex digits; this one has 62"),
    "key too long": (f"master_key_hex: {KEY}00\n", "64 hex digits; this one has 66"),
    "key not hex": (f"master_key_hex: {KEY[:-1]}g\n", "64 hex digits"),
    "key with a line break": (f"master_key_hex: '{KEY[:32]}\n  {KEY[32:]}'\n", "64 hex digits"),
    "key is a mapping": (f"master_key_hex: {{a: {KEY}}}\n", "64 hex digits"),
    "one key twice": (f"versions: {{1: {KEY}, 2: {KEY}}}\n", "same key"),
    "bad YAML": (f"master_key_hex: {KEY}\n  versions: [{KEY}\n", "not valid YAML at line 2"),
    "bad quotes": (f'master_key_hex: "{KEY}\n', "not valid YAML"),
    "unknown anchor": (f"master_key_hex: *a{KEY}\n", "not valid YAML"),
    "two documents": (f"master_key_hex: {KEY}\n---\nmaster_key_hex: {KEY}\n", "not valid YAML"),
    "control character": (f"master_key_hex: {KEY}\x01\n", "not valid YAML"),
    "nested too deep": ("[" * 5000 + KEY, "nested too deep"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_without_showing_it(path: Path, name: str) -> None:
    """Each fault is told in one line that names the file; no part of a key is in it, nor in its chain."""
    text, message = BROKEN[name]
    with pytest.raises(KekFileInvalid, match=message) as caught:
        FileKekSource(write(path, text))
    assert str(caught.value).startswith(f"{path}: ")
    everything = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    chain: BaseException | None = caught.value
    while chain is not None:
        everything += repr(chain) + str(chain)
        chain = chain.__cause__ or chain.__context__
    assert KEY[:12] not in everything.lower()
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_refused(path: Path) -> None:
    """Bytes that are no text are not valid YAML."""
    path.write_bytes(b"master_key_hex: \xff\xfe\xff" + KEY.encode())
    path.chmod(0o600)
    with pytest.raises(KekFileInvalid, match="not valid YAML"):
        FileKekSource(path)


@pytest.mark.fuzz
@given(st.one_of(st.binary(max_size=200), st.text(alphabet="versions:12 {}[]'\"\n*&!|>-ab0f", max_size=120)))
def test_any_content_is_a_keyring_or_one_error(data: bytes | str) -> None:
    """No content raises anything but KekFileInvalid, or gives a key that is not 32 bytes."""
    raw = data if isinstance(data, bytes) else data.encode()
    with contextlib.suppress(KekFileInvalid):
        assert all(isinstance(entry, KeyName) or len(entry) == 32 for entry in _parse(raw).values())


def test_a_missing_file_is_named(path: Path) -> None:
    """The message says which file."""
    with pytest.raises(KekFileInvalid, match=r"kek\.yaml"):
        FileKekSource(path)


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o666, 0o602])
def test_a_file_that_others_can_reach_is_refused(path: Path, mode: int) -> None:
    """The mode rule is enforced, and the mode is in the message."""
    with pytest.raises(KekFileInvalid, match=f"{mode:o}"):
        FileKekSource(write(path, f"master_key_hex: {KEY}\n", mode))


def test_repr_names_versions_only(path: Path) -> None:
    """Neither the source nor its keyring shows a key."""
    source = FileKekSource(write(path, f"master_key_hex: {KEY}\n"))
    assert "versions=[1]" in repr(source)
    assert KEY not in repr(vars(source))


async def test_wrap_and_unwrap_in_batches(path: Path) -> None:
    """A batch comes back in order; a body under another AAD is an error in its own place."""
    source = FileKekSource(write(path, f"versions: {{1: {KEY}, 2: {OTHER}}}\n"))
    deks = [os.urandom(32) for _ in range(5)]
    aads = [wrap_aad(f"k_{n}", "thread") for n in range(5)]
    bodies = await source.wrap(2, deks, aads)
    assert {len(body) for body in bodies} == {BODY_BYTES}
    assert await source.unwrap(2, bodies, aads) == deks
    swapped = await source.unwrap(2, bodies, [aads[1], *aads[1:]])
    assert isinstance(swapped[0], WrappedKeyInvalid)
    assert swapped[1:] == deks[1:]
    assert all(isinstance(result, WrappedKeyInvalid) for result in await source.unwrap(1, bodies, aads))


async def test_every_wrap_has_a_nonce_of_its_own(path: Path) -> None:
    """No nonce repeats within a batch or between two."""
    source = FileKekSource(write(path, f"master_key_hex: {KEY}\n"))
    bodies = [body for _ in range(4) for body in await source.wrap(1, [bytes(32)] * 256, [b""] * 256)]
    assert len({body[:NONCE_BYTES] for body in bodies}) == 1024


async def test_a_version_that_is_not_loaded_is_unavailable(path: Path) -> None:
    """Every use of an unknown version says so."""
    source = FileKekSource(write(path, f"master_key_hex: {KEY}\n"))
    with pytest.raises(KekUnavailable):
        await source.wrap(2, [bytes(32)], [b""])
    with pytest.raises(KekUnavailable):
        await source.unwrap(2, [bytes(60)], [b""])
    with pytest.raises(KekUnavailable):
        await source.check_value(2)
    with pytest.raises(KekUnavailable):
        await source.matches(2, "")


async def test_reload_takes_a_new_version(path: Path) -> None:
    """A version that was added is there after a reload; without a change the answer is False."""
    source = FileKekSource(write(path, f"master_key_hex: {KEY}\n"))
    required = {1: await source.check_value(1)}
    assert not source.reload(required)
    write(path, f"versions: {{1: {KEY}, 2: {OTHER}}}\n")
    assert source.reload(required)
    assert source.versions() == {1, 2}


@pytest.mark.parametrize(
    "text, message",
    [
        (f"versions: {{1: {KEY}, 2: [\n", "not valid YAML"),
        (f"versions: {{2: {OTHER}}}\n", "version 1.*missing"),
        (f"versions: {{1: {OTHER}, 2: {KEY}}}\n", "version 1 is another key"),
        ("", "not a YAML mapping"),
    ],
    ids=["broken", "lacks", "changes", "empty"],
)
async def test_reload_keeps_the_last_good_keyring(path: Path, text: str, message: str) -> None:
    """A broken file, or one that lacks or changes a required version, changes nothing."""
    source = FileKekSource(write(path, f"master_key_hex: {KEY}\n"))
    required = {1: await source.check_value(1)}
    bodies = await source.wrap(1, [bytes(32)], [b"a"])
    write(path, text)
    with pytest.raises(KekFileInvalid, match=message):
        source.reload(required)
    assert source.versions() == {1}
    assert await source.unwrap(1, bodies, [b"a"]) == [bytes(32)]


async def test_reload_does_not_wait_for_what_was_lost_before(path: Path) -> None:
    """A required version that was not even loaded keeps no new one out."""
    source = FileKekSource(write(path, f"versions: {{1: {KEY}}}\n"))
    required = {1: await source.check_value(1), 2: "ab" * 32}
    write(path, f"versions: {{1: {KEY}, 3: {OTHER}}}\n")
    assert source.reload(required)
    assert source.versions() == {1, 3}


async def test_reload_may_drop_what_nothing_requires(path: Path) -> None:
    """A retired version may leave the file, and an unused one may change."""
    source = FileKekSource(write(path, f"versions: {{1: {KEY}, 2: {OTHER}, 3: {DIGITS}}}\n"))
    required = {2: await source.check_value(2)}
    write(path, f"versions: {{2: {OTHER}, 3: {KEY}}}\n")
    assert source.reload(required)
    assert source.versions() == {2, 3}
    assert await source.check_value(3) == check_value(bytes.fromhex(KEY))
