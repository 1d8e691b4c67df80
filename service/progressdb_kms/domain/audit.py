"""The form of the audit log: chained records, signed checkpoints, and what is anchored of them.

A *chain* is what one process writes. Each record is one line of JSON in ASCII::

    {"audit":"key.disable","at":...,...,"chain":"<id>","seq":7,"prev":"<mac of 6>","mac":"<mac of 7>"}

``mac`` is HMAC-SHA-256 (RFC 2104) over all bytes of the line before ``,"mac":``, so that no canonical form
has to be agreed on: what was written is what is checked. It covers the chain, the sequence number and the MAC
before it; without the key no record can be changed, moved or made.

Whoever has no key checks by the *link*: ``link(n) = SHA-256(link(n-1) | line(n))``, 32 zero bytes before
the first record. Opening, closing and checkpoint records state the link before them and are signed with
Ed25519 (RFC 8032), and so are the documents in the store: the *head* of each chain (how far it has come), its
*floor* (up to where it has been trimmed), and the *roster* of all chains. MAC and signature key are derived
from one secret.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

SECRET_BYTES: Final = 32
NOTHING: Final = "0" * 64
"""MAC and link before the first record."""
OPEN: Final = "audit.open"
CLOSE: Final = "audit.close"
CHECKPOINT: Final = "audit.checkpoint"
CONTROL: Final = frozenset({OPEN, CLOSE, CHECKPOINT})
"""Actions of records that are signed."""
RECORD_START: Final = b'{"audit":'
DOCUMENT_START: Final = b'{"kind":'

_MAC_LABEL: Final = b"progressdb-kms audit mac key 1"
_SIGN_LABEL: Final = b"progressdb-kms audit signing key 1"
_SIGNED: Final = b"progressdb-kms audit signature 1\x00"
_MAC_HEAD: Final = b',"mac":"'
_MAC_TAIL: Final = len(_MAC_HEAD) + 64 + 2
_SIGNATURE_HEAD: Final = b',"signature":"'
_SIGNATURE_TAIL: Final = len(_SIGNATURE_HEAD) + 128 + 1
_HEX: Final = re.compile(rb"[0-9a-f]+")
_encode = json.JSONEncoder(separators=(",", ":")).encode
_WRITE: Final[Mapping[type, Callable[[Any], str]]] = {
    str: json.encoder.encode_basestring_ascii,
    int: int.__repr__,
    float: float.__repr__,
}


@dataclass(frozen=True, slots=True)
class VerifyKey:
    """What records are checked with.

    Attributes:
        key_id: Name of the key: ``ak_`` and the first 16 hex digits of the public key's SHA-256.
        public: Checks signatures.
        mac_key: Checks MACs; empty where only the public key is at hand.
    """

    key_id: str
    public: Ed25519PublicKey
    mac_key: bytes = field(default=b"", repr=False)

    @classmethod
    def of(cls, public: Ed25519PublicKey, mac_key: bytes = b"") -> VerifyKey:
        """Return the key by its public half."""
        raw = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
        return cls("ak_" + hashlib.sha256(raw).hexdigest()[:16], public, mac_key)

    def mac_holds(self, body: bytes, mac: str) -> bool:
        """Say whether ``mac`` is the MAC of a record's body."""
        return hmac.compare_digest(hmac.digest(self.mac_key, body, "sha256").hex(), mac)

    def signed(self, body: bytes, signature: str) -> bool:
        """Say whether ``signature`` (hex) was made over ``body`` with this key."""
        try:
            self.public.verify(bytes.fromhex(signature), _SIGNED + body)
        except (InvalidSignature, ValueError):
            return False
        return True


class AuditKey:
    """What records are made with.

    Args:
        secret: 32 random bytes, used for nothing else.

    Raises:
        ValueError: Not 32 bytes.
    """

    __slots__ = ("_mac_key", "_private", "verify")

    def __init__(self, secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"an audit key has {SECRET_BYTES} bytes")
        self._mac_key = hmac.digest(secret, _MAC_LABEL, "sha256")
        self._private = Ed25519PrivateKey.from_private_bytes(hmac.digest(secret, _SIGN_LABEL, "sha256"))
        self.verify = VerifyKey.of(self._private.public_key(), self._mac_key)

    @property
    def key_id(self) -> str:
        """Name of the key."""
        return self.verify.key_id

    def mac(self, body: bytes) -> str:
        """Return the MAC of a record's body, in hex."""
        return hmac.digest(self._mac_key, body, "sha256").hex()

    def sign(self, body: bytes) -> str:
        """Return the signature over ``body``, in hex."""
        return self._private.sign(_SIGNED + body).hex()


class Record(NamedTuple):
    """A record of a chain.

    Attributes:
        seq: Its number, from 1.
        mac: Its MAC, in hex.
        link: The link after it, in hex.
        line: The record as it is written, without the newline.
    """

    seq: int
    mac: str
    link: str
    line: bytes


class Chain:
    """Makes the records of one chain, in order. Not for use from several threads.

    Args:
        key: The key.
        chain: Random name of the chain.
    """

    def __init__(self, key: AuditKey, chain: str) -> None:
        self._key = key
        self.name = chain
        self.last = Record(0, NOTHING, NOTHING, b"")

    def append(self, fields: Mapping[str, object]) -> Record:
        """Make the next record; ``fields`` begin with ``audit``, the action."""
        return self._close_line(self._open_line(fields))

    def control(self, fields: Mapping[str, object]) -> Record:
        """Make a signed record: an opening, a closing, a checkpoint."""
        body = self._open_line({**fields, "key": self._key.key_id, "link": self.last.link})
        return self._close_line(body + _SIGNATURE_HEAD + self._key.sign(body).encode() + b'"')

    def _open_line(self, fields: Mapping[str, object]) -> bytes:
        place = {"chain": self.name, "seq": self.last.seq + 1, "prev": self.last.mac}
        return _json({**fields, **place})[:-1]

    def _close_line(self, body: bytes) -> Record:
        mac = self._key.mac(body)
        line = body + _MAC_HEAD + mac.encode() + b'"}'
        self.last = Record(self.last.seq + 1, mac, next_link(self.last.link, line), line)
        return self.last

    def head(self, record: Record, at: float, *, closed: bool = False) -> bytes:
        """Return the signed document that says that the chain has come to ``record``."""
        members = {"chain": self.name, "seq": record.seq, "mac": record.mac, "link": record.link}
        return sign_document(self._key, "head", {**members, "at": round(at, 3), "closed": closed})


@dataclass(frozen=True, slots=True)
class Parsed:
    """A line that has the form of a record; nothing of it is proven yet.

    Attributes:
        fields: All members.
        chain: The chain that it claims.
        seq: The number that it claims.
        prev: The MAC before it, as it claims.
        mac: Its MAC.
        body: What the MAC is over.
        line: The line.
    """

    fields: Mapping[str, Any]
    chain: str
    seq: int
    prev: str
    mac: str
    body: bytes
    line: bytes

    @property
    def action(self) -> str:
        """What was done."""
        return str(self.fields.get("audit", ""))

    @property
    def is_control(self) -> bool:
        """Whether it has to be signed."""
        return self.action in CONTROL

    def signature_holds(self, key: VerifyKey) -> bool:
        """Say whether a control record is signed with this key."""
        body, signature = self.body[:-_SIGNATURE_TAIL], self.body[-_SIGNATURE_TAIL:]
        return signature.startswith(_SIGNATURE_HEAD) and key.signed(
            body, signature[len(_SIGNATURE_HEAD) : -1].decode(errors="replace")
        )


def parse_record(line: bytes) -> Parsed | None:
    """Return what a line of the log says; None for an audit record that stands in no chain.

    Args:
        line: A line that begins as ``RECORD_START``, without the newline.

    Raises:
        ValueError: It is damaged.
    """
    fields = _read_json(line)
    if "chain" not in fields:
        return None
    mac = line[-_MAC_TAIL + len(_MAC_HEAD) : -2]
    if line[-_MAC_TAIL : -_MAC_TAIL + len(_MAC_HEAD)] != _MAC_HEAD or not _HEX.fullmatch(mac):
        raise ValueError("it does not end with a MAC")
    chain, seq, prev = fields["chain"], fields.get("seq"), fields.get("prev")
    if not (isinstance(chain, str) and type(seq) is int and seq > 0 and isinstance(prev, str)):
        raise ValueError("chain, seq or prev is not of the right form")
    return Parsed(fields, chain, seq, prev, mac.decode(), line[:-_MAC_TAIL], line)


def next_link(link: str, line: bytes) -> str:
    """Return the link after a line."""
    return hashlib.sha256(bytes.fromhex(link) + line).hexdigest()


@dataclass(frozen=True, slots=True)
class Document:
    """A signed document of the anchor.

    Attributes:
        kind: ``head``, ``floor`` or ``roster``.
        members: What it says.
        key_id: The key that it says it is signed with.
        body: What the signature is over.
        signature: In hex.
    """

    kind: str
    members: Mapping[str, Any]
    key_id: str
    body: bytes
    signature: str

    def signed_by(self, key: VerifyKey | None) -> bool:
        """Say whether it is signed with this key."""
        return key is not None and key.signed(self.body, self.signature)


def sign_document(key: AuditKey, kind: str, members: Mapping[str, object]) -> bytes:
    """Return a signed document, one line of JSON."""
    body = _json({"kind": kind, **members, "key": key.key_id})[:-1]
    return body + _SIGNATURE_HEAD + key.sign(body).encode() + b'"}'


def parse_document(text: bytes) -> Document:
    """Return what a signed document says; its signature has not been checked.

    Raises:
        ValueError: It is damaged.
    """
    members = _read_json(text)
    tail = text[-_SIGNATURE_TAIL - 1 : -2]
    if not isinstance(members, dict) or not tail.startswith(_SIGNATURE_HEAD):
        raise ValueError("it is no signed document")
    kind, key_id = members.get("kind"), members.get("key")
    if not isinstance(kind, str) or not isinstance(key_id, str):
        raise ValueError("it is no signed document")  # noqa: TRY004 - what is wrong is a text's form
    signature = tail[len(_SIGNATURE_HEAD) :].decode(errors="replace")
    return Document(kind, members, key_id, text[: -_SIGNATURE_TAIL - 1], signature)


@dataclass(frozen=True, slots=True)
class Roster:
    """All chains that are not forgotten, in a document that is signed anew whenever one comes or goes.

    Attributes:
        generation: Grows by one with each change: who rolls it back is found out by what chains say of it.
        trims: How often the log has been trimmed.
        chains: By chain, up to which number a later chain's opening record vouches for it.
        key_id: The key that it is signed with; empty for one that is not there.
    """

    generation: int = 0
    trims: int = 0
    chains: Mapping[str, int] = field(default_factory=dict)
    key_id: str = ""

    @classmethod
    def read(cls, text: bytes) -> Roster:
        """Return the roster in a document; the empty one where there is none.

        Raises:
            ValueError: It is damaged.
        """
        if not text:
            return cls()
        document = parse_document(text)
        try:
            chains = {str(chain): int(seq) for chain, seq in document.members["chains"].items()}
            return cls(
                int(document.members["generation"]), int(document.members["trims"]), chains, document.key_id
            )
        except (KeyError, AttributeError, TypeError):
            raise ValueError("it is no roster") from None

    def write(self, key: AuditKey) -> bytes:
        """Return it signed."""
        members = {"generation": self.generation, "trims": self.trims, "chains": dict(self.chains)}
        return sign_document(key, "roster", members)


def _read_json(text: bytes) -> Any:  # noqa: ANN401 - whatever JSON may hold
    try:
        return json.loads(text)
    except RecursionError:
        # Whoever can write one line into the log must not be able to end the verification of all others.
        raise ValueError("it is nested too deeply") from None


def _json(fields: Mapping[str, object]) -> bytes:
    # What ``json`` makes of it, which sets up an encoder anew for each line. Names are ours and plain.
    members = [f'"{name}":{_WRITE.get(type(value), _encode)(value)}' for name, value in fields.items()]
    return f"{{{','.join(members)}}}".encode("ascii")
