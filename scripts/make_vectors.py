"""Makes the frozen test vectors of tests/vectors, once: a file that is there already is never written again.

Keys and nonces are SHA-256 of the labels that stand in the files, so that nothing looks like a secret. A new
format gets new files; those of older formats stay as they are for ever, as stored data does.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.domain.backup import ExportKind
from progressdb_kms.domain.envelope import NONCE_BYTES, pack_blob, seal, wrap, wrap_aad
from progressdb_kms.domain.export import FORMAT, SEAL_LABEL
from progressdb_kms.domain.keyring import KekInfo, KekState, Keyring, check_value, kek_id_of
from progressdb_kms.domain.keys import UNIQUE_BYTES, DekRecord, KeyState, derive_key_id, locate, new_key_id
from progressdb_kms.usecases.exportfile import ExportBuilder, Header, Registry

MANIFEST: Final = "MANIFEST.sha256"
THREADS: Final = ("thread-1", "room:42/é漢字😀", "x" * 256)


def labelled(label: str, size: int = 32) -> bytes:
    """Return ``size`` bytes, at most 32, of the label's SHA-256."""
    return hashlib.sha256(label.encode()).digest()[:size]


def flipped(data: bytes, at: int) -> bytes:
    """Return ``data`` with the lowest bit of byte ``at`` changed."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def wrapped_keys() -> dict[str, Any]:
    """Return wrapped DEKs of format 1: good, forged and malformed."""
    cases: list[dict[str, Any]] = []

    def case(name: str, key_id: str, thread_id: str, blob: bytes, **expect: str) -> None:
        cases.append(
            {"name": name, "key_id": key_id, "thread_id": thread_id, "blob": blob.hex(), "expect": expect}
        )

    for number, thread_id in enumerate(THREADS):
        for version in (1, 2, 2**24 - 1):
            key_id = new_key_id(thread_id, labelled(f"key id {number}", UNIQUE_BYTES))
            kek = AESGCM(labelled(f"kek {version}"))
            label = f"dek {number}"
            nonce = labelled(f"wrap nonce {number} {version}", NONCE_BYTES)
            body = wrap(kek, nonce, labelled(label), wrap_aad(key_id, thread_id))
            case(f"thread {number} kek {version}", key_id, thread_id, pack_blob(version, body), dek=label)
    good = cases[0]
    key_id, thread_id, blob = good["key_id"], good["thread_id"], bytes.fromhex(good["blob"])
    other_id = new_key_id(thread_id, labelled("another key id", UNIQUE_BYTES))
    forged = "WrappedKeyInvalid"
    case("another key_id", other_id, thread_id, blob, error=forged)
    case("another thread_id", key_id, "thread-2", blob, error=forged)
    case("key_id and thread_id joined elsewhere", key_id + "t", thread_id[1:], blob, error=forged)
    case("header names another KEK", key_id, thread_id, blob[:3] + b"\2" + blob[4:], error=forged)
    case(
        "header names a KEK that is not loaded",
        key_id,
        thread_id,
        blob[:3] + b"\7" + blob[4:],
        error="KekUnavailable",
    )
    case("header names version 0", key_id, thread_id, blob[:3] + b"\0" + blob[4:], error=forged)
    case("format 0", key_id, thread_id, b"\0" + blob[1:], error=forged)
    case("format 2", key_id, thread_id, b"\2" + blob[1:], error=forged)
    case("empty", key_id, thread_id, b"", error=forged)
    case("header only", key_id, thread_id, blob[:4], error=forged)
    case("a byte short", key_id, thread_id, blob[:-1], error=forged)
    case("a byte long", key_id, thread_id, blob + b"\0", error=forged)
    for at in (4, 16, 47, 63):
        case(f"byte {at} changed", key_id, thread_id, flipped(blob, at), error=forged)
    return {
        "about": "Wrapped DEKs of format 1. KEK of version n: SHA-256 of 'kek n'; expect.dek is a label.",
        "keks": [1, 2, 2**24 - 1],
        "cases": cases,
    }


def messages() -> dict[str, Any]:
    """Return messages under a DEK: good, forged and malformed."""
    cases: list[dict[str, Any]] = []

    def case(name: str, dek: str, aad: bytes | None, ciphertext: bytes, **expect: str) -> None:
        shown = None if aad is None else aad.hex()
        cases.append(
            {"name": name, "dek": dek, "aad": shown, "ciphertext": ciphertext.hex(), "expect": expect}
        )

    plaintexts = {
        "empty": b"",
        "short": b"hello",
        "utf-8": "Grüße 😀".encode(),
        "block": bytes(range(16)) * 20,
    }
    for name, plaintext in plaintexts.items():
        for aad in (None, b"", b"thread-1|7", bytes(range(256))):
            nonce = labelled(f"nonce {name} {aad!r}", NONCE_BYTES)
            sealed = seal(AESGCM(labelled("dek 0")), nonce, plaintext, aad)
            case(
                f"{name}, aad of {-1 if aad is None else len(aad)}",
                "dek 0",
                aad,
                sealed,
                plaintext=plaintext.hex(),
            )
    without, with_aad = bytes.fromhex(cases[4]["ciphertext"]), bytes.fromhex(cases[6]["ciphertext"])
    forged, malformed = "AuthenticationFailed", "MalformedCiphertext"
    case(
        "absent for empty AAD", "dek 0", None, bytes.fromhex(cases[5]["ciphertext"]), plaintext=b"hello".hex()
    )
    case("AAD missing", "dek 0", None, with_aad, error=forged)
    case("AAD added", "dek 0", b"thread-1|7", without, error=forged)
    case("AAD wrong", "dek 0", b"thread-1|8", with_aad, error=forged)
    case("another DEK", "dek 1", None, without, error=forged)
    case("empty ciphertext", "dek 0", None, b"", error=malformed)
    case("27 bytes", "dek 0", None, without[:27], error=malformed)
    case("28 bytes that are none", "dek 0", None, without[:28], error=forged)
    case("a byte short", "dek 0", None, without[:-1], error=forged)
    case("a byte long", "dek 0", None, without + b"\0", error=forged)
    for at in (0, 11, 12, len(without) - 1):
        case(f"byte {at} changed", "dek 0", None, flipped(without, at), error=forged)
    return {
        "about": "Messages: nonce | ciphertext | tag. A DEK is SHA-256 of its label; aad null is none.",
        "cases": cases,
    }


def key_ids() -> dict[str, Any]:
    """Return key ids, and what finds their slot."""
    derived = [
        {
            "identity": identity,
            "idempotency_key": key,
            "thread_id": thread_id,
            "key_id": derive_key_id(identity, key, thread_id),
        }
        for identity, key, thread_id in (
            ("dns:chat.default.svc", "create-1", "thread-1"),
            ("dns:chat.default.svc", "create-1", "thread-2"),
            ("dns:chat.default.svc", "create-", "1thread-1"),
            ("dns:chat.default.svcc", "reate-1", "thread-1"),
            ("uid:1000", "!" * 255, THREADS[1]),
            ("spiffe://td/ns/chat/sa/server", "~", THREADS[2]),
        )
    ]
    fresh = []
    for number, thread_id in enumerate(THREADS):
        random = labelled(f"random {number}", UNIQUE_BYTES)
        fresh.append(
            {"thread_id": thread_id, "random": random.hex(), "key_id": new_key_id(thread_id, random)}
        )
    good = fresh[0]["key_id"]
    located = [{"key_id": entry["key_id"], "expect": {"tag": entry["key_id"][2:4]}} for entry in fresh]
    for bad in (
        "",
        "k_",
        good[:-1],
        good + "A",
        good.lower(),
        good[2:],
        "k-" + good[2:],
        good[:-1] + "1",
        good + "\n",
        "k_7",
    ):
        located.append({"key_id": bad, "expect": {"error": "KeyNotFound"}})  # noqa: PERF401 - two parts, one list
    return {
        "about": "Key ids: derived from an Idempotency-Key, made from 17 random bytes,"
        " and the slot each names.",
        "derived": derived,
        "fresh": fresh,
        "located": located,
    }


def older_key_ids() -> dict[str, Any]:
    """Return ids of the older service, which was not known to the first release of these vectors."""
    good = ("k_7", "k_0", "k_007", "k_1712345678901234567", "k_" + "9" * 20)
    located = [{"key_id": key_id, "expect": {"tag": locate(key_id)}} for key_id in good]
    for bad in ("k_" + "1" * 21, "k_" + "1" * 28, "k_-7", "k_7 ", "k_7\n", "K_7", "k_\u0667", "k_1e3"):
        located.append({"key_id": bad, "expect": {"error": "KeyNotFound"}})  # noqa: PERF401 - two parts, one list
    return {
        "about": "Key ids of the older service: the slot of each is that of a thread of the id's own name."
        " What an earlier file of key ids has as unknown may be known here; nothing else may differ.",
        "located": located,
    }


def check_values() -> dict[str, Any]:
    """Return check values of KEKs and the names made from them."""
    cases = []
    for label in ("kek 1", "kek 2", "kek 16777215"):
        value = check_value(labelled(label))
        cases.append({"kek": label, "check_value": value, "kek_id": kek_id_of(value)})
    return {"about": "Check values. A KEK is SHA-256 of its label.", "cases": cases}


def exports() -> dict[str, Any]:
    """Return an export of the present format with a record of each kind, and what is in it."""
    keys = {version: labelled(f"kek {version}") for version in (1, 2)}
    values = {version: check_value(key) for version, key in keys.items()}
    names = {version: kek_id_of(value) for version, value in values.items()}
    states = {1: KekState.DECRYPT_ONLY, 2: KekState.ACTIVE}
    keks = tuple(
        KekInfo(
            version, names[version], "file", str(version), value, states[version], 1_700_000_000 + version, 9
        )
        for version, value in values.items()
    )
    records: list[DekRecord] = []

    def record(thread_id: str, kek: int, state: KeyState, **fields: Any) -> None:  # noqa: ANN401 - of a record
        number = len(records)
        key_id = new_key_id(thread_id, labelled(f"export key id {number}", UNIQUE_BYTES))
        nonce, dek = labelled(f"export nonce {number}", NONCE_BYTES), labelled(f"export dek {number}")
        blob = pack_blob(kek, wrap(AESGCM(keys[kek]), nonce, dek, wrap_aad(key_id, thread_id)))
        made: dict[str, Any] = {"wrapped": blob, "version": 1, "created_at": 1_700_000_100 + number} | fields
        who = "dns:chat.default.svc" if number % 2 else "migration"
        records.append(
            DekRecord(
                key_id=key_id,
                thread_id=thread_id,
                kek_id=names[kek],
                kek_version=kek,
                state=state,
                created_by=who,
                **made,
            )
        )

    record(THREADS[0], 2, KeyState.DECRYPT_ONLY, uses=2**32)
    record(THREADS[0], 2, KeyState.ENABLED, version=2, uses=5)
    record(THREADS[1], 1, KeyState.DISABLED, changed_at=1_700_000_500, resume_state=KeyState.DECRYPT_ONLY)
    record(THREADS[2], 1, KeyState.PENDING_DESTRUCTION, changed_at=1_700_000_600, destroy_at=1_700_900_000)
    record("room:1", 1, KeyState.DESTROYED, wrapped=b"", changed_at=1_700_000_700)
    record("room:2", 2, KeyState.ENABLED, wrapped=b"short")
    data = bytearray()
    header = Header("x_vector", ExportKind.LIVE, "0" * 32, 1_700_001_000, "0.1.0", 2, names[2])
    builder = ExportBuilder(header, data.extend)
    for one in records:
        builder.add(one, one.kek_version)
    digest = builder.close(Registry(2, keks, {1: 65_536, 2: 10}, {"2": b"sealed"}), [records[-1].key_id])
    builder.seal(Keyring(keys).seal(2, SEAL_LABEL, digest))
    return {
        "about": f"An export of format {FORMAT}. KEK of version n: SHA-256 of 'kek n'; the DEK of record n,"
        " from 0, is SHA-256 of 'export dek n'.",
        "keks": [1, 2],
        "export": data.hex(),
        "records": [asdict(one) | {"wrapped": one.wrapped.hex()} for one in records],
        "damaged": [records[-1].key_id],
    }


def main(folder: Path) -> int:
    """Write what is missing and the manifest's lines for it."""
    made = {
        "wrapped-keys-format-1.json": wrapped_keys(),
        "messages-format-1.json": messages(),
        "key-ids-1.json": key_ids(),
        "key-ids-2.json": older_key_ids(),
        "check-values-1.json": check_values(),
        f"export-format-{FORMAT}.json": exports(),
    }
    for name, document in made.items():
        path = folder / name
        if path.exists():
            print(f"{name}: is there, and never changes")
            continue
        data = (json.dumps(document, indent=1, ensure_ascii=True) + "\n").encode()
        path.write_bytes(data)
        with (folder / MANIFEST).open("a") as manifest:
            manifest.write(f"{hashlib.sha256(data).hexdigest()}  {name}\n")
        print(f"{name}: made")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent / "tests" / "vectors"))
