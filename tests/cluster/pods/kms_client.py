"""Calls the service from a pod, with the project's own client; address and certificates from the environment.

    seed N         make N keys, encrypt a message under each, add them to the ledger
    traffic        create, encrypt and decrypt until standard input ends
    check          decrypt everything in the ledger
    key            the id of a key in the ledger
    census         KEK versions, keys under each, the newest rotation
    may [KEY]      try one call of each kind, and say which are refused
    dial HOST PORT open a TCP connection
    naked HOST PORT [CA]  open a TLS connection without a certificate and ask something
    serial HOST PORT      the serial number of the server's certificate

Each prints one JSON object. The ledger, a file in the pod, holds what was acknowledged: key ids and
ciphertexts, with the messages that they must decrypt to.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import ssl
import sys
import time
import uuid
from base64 import b64decode, b64encode
from collections import Counter
from pathlib import Path

from progressdb_kms.client import (
    AdminClient,
    KmsError,
    KmsProvider,
    open_provider,
)

LEDGER = Path("/tmp/ledger.jsonl")  # noqa: S108 - the pod's own
WORKERS = 4
BATCH = 500
RUN = uuid.uuid4().hex[:8]

Entry = dict[str, str]


def ledger() -> list[Entry]:
    """Return what was acknowledged so far."""
    return [json.loads(line) for line in LEDGER.read_text().splitlines()] if LEDGER.exists() else []


def note(entries: list[Entry]) -> None:
    """Add to the ledger."""
    with LEDGER.open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def say(line: str) -> None:
    """Write a line for the test that reads it."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def code_of(error: KmsError) -> str:
    """Return the name that failures are counted under."""
    return str(error.code)


async def seed(number: int) -> dict[str, object]:
    """Make keys in batches."""
    async with open_provider(deadline=60, retries=10) as kms:
        for start in range(0, number, BATCH):
            count = min(BATCH, number - start)
            threads = [f"room:{RUN}-{start + n}" for n in range(count)]
            texts = [f"message of {thread}" for thread in threads]
            deks = await kms.create_deks_for_threads(threads)
            keys = [dek.key_id for dek in deks if not isinstance(dek, KmsError)]
            items = [(key, text.encode(), None) for key, text in zip(keys, texts, strict=True)]
            sealed = await kms.encrypt_many(items)
            note(
                [
                    {"key": key, "text": text, "sealed": b64encode(one.ciphertext).decode()}
                    for key, text, one in zip(keys, texts, sealed, strict=True)
                    if not isinstance(one, KmsError)
                ]
            )
    return {"keys": len(ledger())}


class Traffic:
    """Workers that call, and what became of it."""

    def __init__(self) -> None:
        self.ok = 0
        self.made = 0
        self.failed: Counter[str] = Counter()
        self.details: list[str] = []
        self.wrong = 0
        self.slowest = 0.0
        self.entries = ledger()
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()

    async def work(self, kms: KmsProvider) -> None:
        """Call until the end; a failed call is counted, and the next one made."""
        while not self.ended.is_set():
            began = time.monotonic()
            try:
                if not self.entries or random.random() < 0.2:
                    await self.create(kms)
                else:
                    await self.decrypt(kms)
            except KmsError as error:
                self.failed[code_of(error)] += 1
                self.details = [*self.details, f"{code_of(error)}: {error}"][-5:]
            self.begun.set()
            self.slowest = max(self.slowest, time.monotonic() - began)
            await asyncio.sleep(0.01)

    async def create(self, kms: KmsProvider) -> None:
        """Make a key, and a message under it."""
        thread = f"room:{uuid.uuid4()}"
        dek = await kms.create_dek_for_thread(thread)
        self.ok += 1
        self.made += 1
        sealed = await kms.encrypt_with_dek(dek.key_id, thread.encode())
        self.ok += 1
        entry = {"key": dek.key_id, "text": thread, "sealed": b64encode(sealed.ciphertext).decode()}
        self.entries.append(entry)
        note([entry])

    async def decrypt(self, kms: KmsProvider) -> None:
        """Decrypt some earlier message."""
        entry = random.choice(self.entries)
        text = await kms.decrypt_with_dek(entry["key"], b64decode(entry["sealed"]))
        self.ok += 1
        self.wrong += text.decode() != entry["text"]

    async def run(self) -> dict[str, object]:
        """Work until standard input ends."""
        async with open_provider() as kms:
            workers = [asyncio.create_task(self.work(kms)) for _ in range(WORKERS)]
            await self.begun.wait()
            say("running")
            await asyncio.to_thread(sys.stdin.read)
            self.ended.set()
            await asyncio.gather(*workers)
        return {
            "ok": self.ok,
            "made": self.made,
            "failed": dict(self.failed),
            "wrong": self.wrong,
            "slowest": round(self.slowest, 2),
            "details": self.details,
        }


async def check() -> dict[str, object]:
    """Decrypt the ledger."""
    entries = ledger()
    lost = []
    async with open_provider(deadline=60, retries=10) as kms:
        for start in range(0, len(entries), BATCH):
            part = entries[start : start + BATCH]
            items = [(entry["key"], b64decode(entry["sealed"]), None) for entry in part]
            for entry, text in zip(part, await kms.decrypt_many(items), strict=True):
                if isinstance(text, KmsError):
                    lost.append(code_of(text))
                elif text.decode() != entry["text"]:
                    lost.append("another text")
    return {"keys": len(entries), "lost": dict(Counter(lost))}


async def may(key: str = "") -> dict[str, object]:
    """Try one call of each kind; ``key`` is used where none can be made."""
    answers: dict[str, object] = {}

    async def attempt(name: str, call: object) -> object:
        try:
            result = await call  # type: ignore[misc]
        except KmsError as error:
            answers[name] = code_of(error)
            return None
        answers[name] = "ok"
        return result

    async with open_provider() as kms:
        await attempt("create elsewhere", kms.create_dek_for_thread(f"vault:{RUN}"))
        dek = await attempt("create", kms.create_dek_for_thread(f"room:{RUN}-may"))
        key = getattr(dek, "key_id", key)
        sealed = await attempt("encrypt", kms.encrypt_with_dek(key, b"text"))
        if sealed is not None:
            await attempt("decrypt", kms.decrypt_with_dek(key, sealed.ciphertext))  # type: ignore[attr-defined]
    with AdminClient() as admin:
        for name, ask in (("census", admin.keks), ("rotations", admin.rotations)):
            try:
                ask()
            except KmsError as error:
                answers[name] = code_of(error)
            else:
                answers[name] = "ok"
    return answers


def any_key() -> dict[str, object]:
    """Return a key's id."""
    return {"key": ledger()[0]["key"]}


def census() -> dict[str, object]:
    """Return the KEK versions and the newest rotation as the service tells them."""
    with AdminClient(deadline=20, retries=5) as admin:
        keks = admin.keks()
        newest = next(iter(admin.rotations(1)), None)
    return {
        "active": keks.active,
        "deks": {str(kek.version): kek.deks for kek in keks.keks},
        "rotation": newest and {"id": newest.rotation_id, "step": newest.step, "outcome": newest.outcome},
    }


def dial(host: str, port: str) -> dict[str, object]:
    """Open a TCP connection."""
    try:
        socket.create_connection((host, int(port)), 3).close()
    except OSError as error:
        return {"connected": False, "error": type(error).__name__}
    return {"connected": True}


def _anonymous() -> ssl.SSLContext:
    """Return TLS without a certificate that accepts any server: the server's refusal is under test."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def naked(host: str, port: str) -> dict[str, object]:
    """Ask without a certificate."""
    try:
        with (
            socket.create_connection((host, int(port)), 5) as raw,
            _anonymous().wrap_socket(raw, server_hostname=host) as tls,
        ):
            tls.sendall(b"GET /health HTTP/1.1\r\nHost: kms\r\nConnection: close\r\n\r\n")
            answer = tls.recv(100)
    except ssl.SSLError as error:
        return {"refused": True, "reason": error.reason}
    except OSError as error:
        return {"refused": False, "reason": type(error).__name__}
    return {"refused": False, "reason": answer[:15].decode("latin-1")}


def serial(host: str, port: str) -> dict[str, object]:
    """Return the serial number of the certificate that the server shows."""
    from cryptography import x509  # noqa: PLC0415 - only here

    with (
        socket.create_connection((host, int(port)), 5) as raw,
        _anonymous().wrap_socket(raw, server_hostname=host) as tls,
    ):
        shown = tls.getpeercert(binary_form=True) or b""
    return {"serial": f"{x509.load_der_x509_certificate(shown).serial_number:x}"}


def main(command: str, *arguments: str) -> None:
    """Run one command and print what it found."""
    if command == "seed":
        result = asyncio.run(seed(int(arguments[0])))
    elif command == "traffic":
        result = asyncio.run(Traffic().run())
    elif command == "check":
        result = asyncio.run(check())
    elif command == "may":
        result = asyncio.run(may(*arguments))
    else:
        plain = {"census": census, "key": any_key, "dial": dial, "naked": naked, "serial": serial}
        result = plain[command](*arguments)  # type: ignore[operator]
    say(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
