"""Batches of several sizes in JSON and msgpack, and the floor under them: the same work in a bare loop.

The floor decodes the same body, does AES-256-GCM under one key with a fresh random nonce for each item (NIST
SP 800-38D, 8.2.2), and encodes the same answer, in one Python process. No TLS, HTTP, policy, key states,
limits, metrics or audit.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.domain.envelope import NONCE_BYTES

from .cases import Case, Key, Scene, Values
from .load import MESSAGE, Request, fire
from .machine import GENERATOR_CORE, SERVER_CORE, pin
from .servers import client

ENCODINGS = ("json", "msgpack")
CONNECTIONS = 4


class Plain(msgspec.Struct):
    """An item to encrypt, as the floor reads it."""

    key_id: str
    plaintext: bytes


class Sealed(msgspec.Struct):
    """An item to decrypt."""

    key_id: str
    ciphertext: bytes


class PlainBatch(msgspec.Struct):
    """A body of ``/encrypt_batch``."""

    items: list[Plain]


class SealedBatch(msgspec.Struct):
    """A body of ``/decrypt_batch``."""

    items: list[Sealed]


class Encrypted(msgspec.Struct):
    """An item's answer, with the fields that the service's has."""

    ciphertext: bytes
    key_version: str


class Decrypted(msgspec.Struct):
    """Likewise of a decryption."""

    plaintext: bytes


class Results(msgspec.Struct):
    """An answer."""

    results: list[Any]


def batch_cases(scene: Scene) -> list[Case]:
    """Return the cases of batches, service and floor side by side."""
    with client(scene.ready) as kms:
        key_id = kms.create_dek_for_thread("bench:batches").key_id
        sealed = kms.encrypt_with_dek(key_id, MESSAGE).ciphertext
    aead = AESGCM(AESGCM.generate_key(256))
    nonce = os.urandom(NONCE_BYTES)
    floor_sealed = nonce + aead.encrypt(nonce, MESSAGE, None)
    cases = []
    for size in scene.batch_sizes:
        for encoding in ENCODINGS:
            plain = PlainBatch([Plain(key_id, MESSAGE)] * size)
            pairs: list[tuple[str, PlainBatch | SealedBatch, bytes]] = [
                ("encrypt", plain, _encoded(encoding, plain)),
                (
                    "decrypt",
                    SealedBatch([Sealed(key_id, sealed)] * size),
                    _encoded(encoding, SealedBatch([Sealed(key_id, floor_sealed)] * size)),
                ),
            ]
            for operation, batch, floor_body in pairs:
                what = f"{operation}, {encoding}"
                request = batch_request(scene, operation, encoding, batch)
                cases += [
                    Case(Key("batches", what, "service", size), partial(_fire, scene, request, size)),
                    Case(
                        Key("batches", what, "floor", size),
                        partial(floor, aead, operation, encoding, floor_body, scene.seconds),
                    ),
                ]
    return cases


def batch_request(
    scene: Scene, operation: str, encoding: str, batch: PlainBatch | SealedBatch, who: str = "server"
) -> Request:
    """Write a batch into a file and return the request that sends it."""
    file: Path = scene.folder / f"{operation}-{len(batch.items)}-{who}.{encoding}"
    file.write_bytes(_encoded(encoding, batch))
    url = f"{scene.ready['url']}/{operation}_batch"
    return Request(url, scene.ready["pid"], file, f"application/{encoding}", client=who)


def floor(aead: AESGCM, operation: str, encoding: str, body: bytes, seconds: float) -> Values:
    """Decode, encrypt or decrypt, and encode again and again in this process, on the service's core.

    Returns:
        Items a second and CPU time an item.
    """
    coder = msgspec.json if encoding == "json" else msgspec.msgpack
    model = PlainBatch if operation == "encrypt" else SealedBatch
    decode, encode = coder.Decoder(model).decode, coder.Encoder().encode
    work = _encrypt_all if operation == "encrypt" else _decrypt_all
    pin(os.getpid(), SERVER_CORE)
    try:
        done, began, spent = 0, time.perf_counter(), time.process_time()
        # A third of a run's length: there is no other process to wait for, so it is steady.
        while time.perf_counter() < began + seconds / 3 or not done:
            results = work(aead, decode(body).items)
            encode(Results(results))
            done += len(results)
        return {
            "per_second": done / (time.perf_counter() - began),
            "cpu_us": (time.process_time() - spent) / done * 1e6,
        }
    finally:
        pin(os.getpid(), GENERATOR_CORE)


def _encrypt_all(aead: AESGCM, items: list[Plain]) -> list[Any]:
    results: list[Any] = []
    for item in items:
        nonce = os.urandom(NONCE_BYTES)
        results.append(Encrypted(nonce + aead.encrypt(nonce, item.plaintext, None), "1"))
    return results


def _decrypt_all(aead: AESGCM, items: list[Sealed]) -> list[Any]:
    return [
        Decrypted(aead.decrypt(item.ciphertext[:NONCE_BYTES], item.ciphertext[NONCE_BYTES:], None))
        for item in items
    ]


def _fire(scene: Scene, request: Request, size: int) -> Values:
    """Run the generator; counts items where it counts requests. The latencies are of whole batches."""
    values = dict(fire(scene, request, CONNECTIONS))
    values["per_second"] *= size
    values["cpu_us"] /= size
    return values


def _encoded(encoding: str, batch: PlainBatch | SealedBatch) -> bytes:
    return msgspec.json.encode(batch) if encoding == "json" else msgspec.msgpack.encode(batch)
