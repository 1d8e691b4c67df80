"""Frozen vectors: stored data and sent ciphertexts are read for ever as they are read today."""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from base64 import b32encode
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.domain import errors
from progressdb_kms.domain.envelope import open_sealed, parse_blob, unwrap, wrap_aad
from progressdb_kms.domain.keyring import Keyring, check_value, kek_id_of
from progressdb_kms.domain.keys import DekRecord, KeyState, derive_key_id, locate, new_key_id
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.usecases.backup import records_of, verify_export
from tests.unit.helpers import labelled

FOLDER = Path(__file__).parents[2] / "vectors"
TAGS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"


def document(name: str) -> Any:
    """Return a file of vectors."""
    return json.loads((FOLDER / name).read_text())


WRAPPED = document("wrapped-keys-format-1.json")
MESSAGES = document("messages-format-1.json")
KEY_IDS = document("key-ids-1.json")
OLDER_IDS = document("key-ids-2.json")
LEARNT = {case["key_id"] for case in OLDER_IDS["located"] if "tag" in case["expect"]}
CHECKS = document("check-values-1.json")
EXPORTS = [document(path.name) for path in sorted(FOLDER.glob("export-format-*.json"))]


def name_of(case: dict[str, Any]) -> str:
    """Return a case's name."""
    return str(case["name"])


def test_no_file_has_changed() -> None:
    """The manifest names every file, and each has the digest that it was made with."""
    lines = (FOLDER / "MANIFEST.sha256").read_text().splitlines()
    manifest = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert set(manifest) == {path.name for path in FOLDER.glob("*.json")}
    for name, digest in manifest.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name


def test_the_manifest_has_not_changed() -> None:
    """Nor has the manifest's first part: a new format adds lines, the old ones stay."""
    lines = (FOLDER / "MANIFEST.sha256").read_bytes().splitlines(keepends=True)
    digest = hashlib.sha256(b"".join(lines[:4])).hexdigest()
    assert digest == "a083ac0638862465d79417477012cf9cf02eb34e7be4ebf599a1fd03845016f7"


@pytest.mark.parametrize("case", WRAPPED["cases"], ids=name_of)
def test_wrapped_keys(case: dict[str, Any]) -> None:
    """A stored blob unwraps to its DEK, or fails with its error."""
    keyring = Keyring({version: labelled(f"kek {version}") for version in WRAPPED["keks"]})

    def opened() -> bytes:
        blob = parse_blob(bytes.fromhex(case["blob"]))
        return unwrap(
            keyring.cipher(blob.kek_version), blob.body, wrap_aad(case["key_id"], case["thread_id"])
        )

    if "dek" in case["expect"]:
        assert opened() == labelled(case["expect"]["dek"])
    else:
        with pytest.raises(getattr(errors, case["expect"]["error"])):
            opened()


@pytest.mark.parametrize("case", MESSAGES["cases"], ids=name_of)
def test_messages(case: dict[str, Any]) -> None:
    """A ciphertext decrypts to its plaintext, or fails with its error."""
    aad = None if case["aad"] is None else bytes.fromhex(case["aad"])
    cipher, sealed = AESGCM(labelled(case["dek"])), bytes.fromhex(case["ciphertext"])
    if "plaintext" in case["expect"]:
        assert open_sealed(cipher, sealed, aad) == bytes.fromhex(case["expect"]["plaintext"])
    else:
        with pytest.raises(getattr(errors, case["expect"]["error"])):
            open_sealed(cipher, sealed, aad)


@pytest.mark.parametrize("case", KEY_IDS["derived"], ids=lambda case: case["key_id"])
def test_derived_key_ids(case: dict[str, Any]) -> None:
    """An Idempotency-Key of years ago still finds its key."""
    assert derive_key_id(case["identity"], case["idempotency_key"], case["thread_id"]) == case["key_id"]


@pytest.mark.parametrize("case", KEY_IDS["fresh"], ids=lambda case: case["key_id"])
def test_fresh_key_ids(case: dict[str, Any]) -> None:
    """The id made from these random bytes stays the same."""
    assert new_key_id(case["thread_id"], bytes.fromhex(case["random"])) == case["key_id"]


@pytest.mark.parametrize(
    "case", [*KEY_IDS["located"], *OLDER_IDS["located"]], ids=lambda case: repr(case["key_id"])
)
def test_located(case: dict[str, Any]) -> None:
    """An id finds its slot, or is none. Ids that were none may be learnt later; a slot never changes."""
    if "error" in case["expect"] and case["key_id"] in LEARNT:
        assert case in KEY_IDS["located"]
    elif "tag" in case["expect"]:
        assert locate(case["key_id"]) == case["expect"]["tag"]
    else:
        with pytest.raises(getattr(errors, case["expect"]["error"])):
            locate(case["key_id"])


@pytest.mark.parametrize("case", CHECKS["cases"], ids=lambda case: case["kek"])
def test_check_values(case: dict[str, Any]) -> None:
    """A registered check value still recognises its KEK."""
    assert check_value(labelled(case["kek"])) == case["check_value"]
    assert kek_id_of(case["check_value"]) == case["kek_id"]


@pytest.mark.parametrize("case", EXPORTS, ids=lambda case: case["about"].partition(".")[0])
async def test_exports(case: dict[str, Any], tmp_path: Path) -> None:
    """An export of any format passes all checks, and gives back every field of every record."""
    path = tmp_path / "kek.yaml"
    path.write_text("versions:\n" + "".join(f"  {n}: {labelled(f'kek {n}').hex()}\n" for n in case["keks"]))
    path.chmod(0o600)
    chunks = [bytes.fromhex(case["export"])]
    found, bad = await verify_export(FileKekSource(path), lambda: chunks)
    records = [record for batch in records_of(lambda: chunks, found) for record in batch]
    assert records == [
        DekRecord(
            **fields
            | {
                "wrapped": bytes.fromhex(fields["wrapped"]),
                "state": KeyState(fields["state"]),
                "resume_state": KeyState(fields["resume_state"]),
            }
        )
        for fields in case["records"]
    ]
    assert bad == list(found.counts.damaged) == case["damaged"]
    assert (found.registry.wraps, found.registry.escrow) == ({1: 65_536, 2: 10}, {"2": b"sealed"})


def test_each_kind_agrees_with_an_independent_computation() -> None:
    """One vector of each kind, computed here from the written format alone."""
    case = WRAPPED["cases"][1]
    blob = bytes.fromhex(case["blob"])
    form, high, low = struct.unpack(">BBH", blob[:4])
    assert (form, high, low) == (1, 0, 2)
    parts = [b"progressdb-kms/wrap", b"\x01", case["key_id"].encode(), case["thread_id"].encode()]
    aad = b"".join(struct.pack(">I", len(part)) + part for part in parts)
    opened = AESGCM(hashlib.sha256(b"kek 2").digest()).decrypt(blob[4:16], blob[16:], aad)
    assert opened == hashlib.sha256(case["expect"]["dek"].encode()).digest()

    case = MESSAGES["cases"][6]
    sealed = bytes.fromhex(case["ciphertext"])
    dek = AESGCM(hashlib.sha256(case["dek"].encode()).digest())
    assert (
        dek.decrypt(sealed[:12], sealed[12:], bytes.fromhex(case["aad"])).hex() == case["expect"]["plaintext"]
    )

    case = KEY_IDS["derived"][0]
    parts = [case[name].encode() for name in ("identity", "idempotency_key", "thread_id")]
    hashed = b"progressdb-kms/key-id/v1" + b"".join(struct.pack(">I", len(part)) + part for part in parts)
    unique = b32encode(hashlib.sha256(hashed).digest()).decode()[:26]
    bits = int.from_bytes(hashlib.sha256(case["thread_id"].encode()).digest()[:2], "big") >> 6
    assert case["key_id"] == f"k_{TAGS[bits >> 5]}{TAGS[bits & 31]}{unique}"

    case = OLDER_IDS["located"][3]
    bits = int.from_bytes(hashlib.sha256(case["key_id"].encode()).digest()[:2], "big") >> 6
    assert case["expect"]["tag"] == TAGS[bits >> 5] + TAGS[bits & 31]

    case = CHECKS["cases"][0]
    key = hashlib.sha256(case["kek"].encode()).digest()
    assert case["check_value"] == hmac.digest(key, b"progressdb-kms/kek-check/v1", "sha256").hex()
