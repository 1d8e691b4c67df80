"""What is fuzzed: functions that take any bytes, and raise only if a promise is broken."""

from __future__ import annotations

import asyncio
import functools
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from unittest import mock

import h11
import msgspec
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.events import Closed, RawData
from hypercorn.typing import ConnectionState

from progressdb_kms.bootstrap.parts import load_policy
from progressdb_kms.domain.audit import RECORD_START, parse_record
from progressdb_kms.domain.envelope import BODY_BYTES, pack_blob, parse_blob
from progressdb_kms.domain.errors import (
    BackupInvalid,
    KekFileInvalid,
    KmsError,
    PolicyInvalid,
    SettingsInvalid,
    WrappedKeyInvalid,
)
from progressdb_kms.domain.export import ExportReader, Frame
from progressdb_kms.kek.keyfile import parse_entries, render_entries
from progressdb_kms.settings import Limits, load_settings
from progressdb_kms.transport.connection import Connection
from progressdb_kms.transport.http1 import Http1, http_config
from progressdb_kms.transport.inbox import ConnectionTasks
from progressdb_kms.transport.ordinary import parse_head
from progressdb_kms.usecases import batches
from progressdb_kms.usecases.batches import BatchReader
from progressdb_kms.usecases.exportrecords import BATCH, pack_records, read_records
from progressdb_kms.usecases.messages import MSGPACK, EncryptItem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Seen(NamedTuple):
    """A request as the app got it."""

    method: str
    path: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


def blob(data: bytes) -> None:
    """A blob is refused, or its parts are exactly its bytes."""
    try:
        parsed = parse_blob(data)
    except WrappedKeyInvalid:
        return
    assert pack_blob(parsed.kek_version, parsed.body) == data
    assert len(data) < BODY_BYTES or parsed.body.hex() not in repr(parsed)


def policy(data: bytes) -> None:
    """A policy is refused by its own error alone, or loads."""
    try:
        load_policy(_file(data))
    except PolicyInvalid:
        return


def config(data: bytes) -> None:
    """A configuration is refused by its own error alone, or loads."""
    try:
        load_settings(_file(data))
    except SettingsInvalid:
        return


def kek(data: bytes) -> None:
    """A KEK file is refused, or its keys survive being written and read."""
    try:
        keys = parse_entries(data, "the file")
    except KekFileInvalid:
        return
    assert parse_entries(render_entries(keys), "the file") == keys


def export(data: bytes) -> None:
    """An export reads the same however it is cut, and one that is damaged says so by BackupInvalid alone."""
    assert _read_export([data]) == _read_export(data[i : i + 1] for i in range(len(data)))


def records(data: bytes) -> None:
    """Records of an export are refused by BackupInvalid alone, or are the same once packed and read again."""
    inside = msgspec.msgpack.encode([[bytes(64)], zlib.compress(data)])
    for payload, export_format in ((data, 1), (data, 2), (inside, 2)):
        try:
            found = read_records(payload, export_format)
        except BackupInvalid:
            continue
        for start in range(0, len(found), BATCH):
            part = found[start : start + BATCH]
            assert read_records(pack_records(part), 2) == part


def audit(data: bytes) -> None:
    """A record is refused by ValueError alone, or its body and MAC are its line."""
    data = RECORD_START + data  # what callers look for before they ask
    try:
        record = parse_record(data)
    except ValueError:
        return
    if record is not None:
        assert record.line == data
        assert data.startswith(record.body)
        assert record.mac.encode() in data


def http(data: bytes) -> None:
    """Requests are read the same however their bytes arrive, and never with two framings."""
    whole, statuses = asyncio.run(serve([data]))
    cut, cut_statuses = asyncio.run(serve(data[i : i + 1] for i in range(len(data))))
    assert whole == cut
    assert statuses == cut_statuses
    for request in whole:
        names = [name for name, _ in request.headers]
        assert names.count(b"content-length") <= 1
        assert names.count(b"transfer-encoding") <= 1
        assert not {b"content-length", b"transfer-encoding"} <= set(names)
        assert names.count(b"host") <= 1
        for name, value in request.headers:
            assert not set(b"\r\n\0 :") & set(name)
            assert not set(b"\r\n\0") & set(value)


def ordinary(data: bytes) -> None:
    """Of a head that the fast door takes, h11 makes the same request, with the same fields and body."""
    found = parse_head(data)
    if found is None:
        return
    # A long body would prove no more than a short one, and would cost the time of many inputs.
    body = b"x" * min(found.length, 1000)
    reader = h11.Connection(h11.SERVER)
    reader.receive_data(data + body + (b"GET" if len(body) == found.length else b""))
    request = reader.next_event()
    assert isinstance(request, h11.Request)
    assert request.method == found.method.encode()
    target = found.path + (f"?{found.query}" if found.query else "")
    assert request.target.rstrip(b"?") == target.encode()
    assert request.http_version == b"1.1"
    assert [(n.decode(), v.decode()) for n, v in request.headers] == list(found.fields.items())
    read = b""
    while isinstance(event := reader.next_event(), h11.Data):
        read += bytes(event.data)
    assert read == body
    if len(body) == found.length:
        assert isinstance(event, h11.EndOfMessage)
        assert reader.trailing_data == (b"GET", False)
    else:
        assert event is h11.NEED_DATA


def batch(data: bytes) -> None:
    """A batch in msgpack is read in one pass, or in pieces, as it is item by item."""
    wanted = _outcome(_one_by_one, data)
    assert _outcome(_BATCH.read, data) == wanted
    assert _outcome(_in_pieces, data) == wanted


_BATCH: Final = BatchReader(EncryptItem)


def _in_pieces(form: str, data: bytes, limit: int) -> list[EncryptItem | KmsError]:
    with mock.patch.multiple(batches, WHOLE_ITEMS=2, PIECE_ITEMS=3):
        work = _BATCH.begin(form, data, limit)
        while True:
            try:
                next(work)
            except StopIteration as done:
                return [_BATCH.item(form, item) for item in done.value]


def _one_by_one(form: str, data: bytes, limit: int) -> list[EncryptItem | KmsError]:
    return [_BATCH.item(form, raw) for raw in batches._raw_msgpack(data, limit)]


def _outcome(read: Callable[[str, bytes, int], list[EncryptItem | KmsError]], data: bytes) -> object:
    try:
        items = read(MSGPACK, data, 64)
    except KmsError as error:
        return type(error), error.detail
    return [(type(item), item.detail) if isinstance(item, KmsError) else item for item in items]


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (blob, policy, config, kek, export, records, audit, http, ordinary, batch)
}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _file(data: bytes) -> Path:
    path = Path(_folder().name) / "input"
    path.write_bytes(data)
    return path


def _read_export(pieces: Iterable[bytes]) -> tuple[list[tuple[Frame, bytes]], str]:
    reader = ExportReader()
    frames: list[tuple[Frame, bytes]] = []
    try:
        for piece in pieces:
            frames.extend(reader.feed(piece))
        reader.finish()
    except BackupInvalid as error:
        return [], error.detail
    return frames, reader.file_digest


class _Transport:
    """Where a connection's answers would go."""

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        """Nothing is open."""

    close = abort


async def serve(pieces: Iterable[bytes]) -> tuple[list[Seen], list[bytes]]:
    """Drive the HTTP seam of the service as a connection does; return requests and statuses."""
    seen: list[Seen] = []
    out = bytearray()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = bytearray()
        while True:
            event = await receive()
            if event["type"] != "http.request":
                return
            body += event["body"]
            if not event["more_body"]:
                break
        seen.append(Seen(scope["method"], scope["raw_path"], tuple(scope["headers"]), bytes(body)))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send(event: Any) -> None:
        if isinstance(event, RawData):
            out.extend(event.data)
        elif isinstance(event, Closed):
            connection.finish("done", answered=True)

    loop = asyncio.get_running_loop()
    connection = Connection("tls", "peer", None, limits=Limits(), max_age=600, now=loop.time)
    connection.attach(_Transport(), lambda: None)  # type: ignore[arg-type] # the part of a transport that is used
    async with ConnectionTasks(loop) as tasks:
        seam = Http1(
            ASGIWrapper(app),
            http_config(16384),
            WorkerContext(None),
            tasks,
            ConnectionState({}),
            True,
            None,
            None,
            send,
            connection=connection,
        )
        for piece in pieces:
            await seam.handle(RawData(piece))
        for _ in range(3):
            await asyncio.sleep(0)
        await seam.handle(Closed())
    statuses = [line.split(b" ")[1] for line in bytes(out).split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    return seen, statuses
