"""Long batches, worked off in pieces, so that nobody else waits for the whole of one.

Each slice of items is a batch of its own: it looks at grants, key states and what is in memory anew, so that
the rules of ``keycache`` hold however long the batch takes. Reading the body and writing the answer are cut
too (``usecases.batches``). What is never cut is one item: up to 1 MiB of plaintext takes some 3 ms, and more
than that, which can only be refused, or additional data of many MiB, as long as it takes.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from msgspec import Raw, Struct

from progressdb_kms.domain.errors import KmsError
from progressdb_kms.domain.keys import DekRecord
from progressdb_kms.usecases.batches import ResultsWriter
from progressdb_kms.usecases.lifecycle import create_deks

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from progressdb_kms.api.call import Call
    from progressdb_kms.usecases.batches import BatchReader
    from progressdb_kms.usecases.encryption import Loaded, Miss
    from progressdb_kms.usecases.lifecycle import Wanted
    from progressdb_kms.usecases.session import Session

LONG_BYTES: Final = 2**16
"""Bodies above this are cut; those below hold about a thousand items at most, or little to encrypt."""
SLICE_ITEMS: Final = 256
CLOSE_ITEMS: Final = 128
"""Items of a slice, where some are wrong or have yet to be read one by one: that takes some 10 us each."""
SLICE_BYTES: Final = 2**18

CREATES: Final = 128
"""DEKs that are made at a time: naming, wrapping, sending and auditing take up to 20 us each."""

Item = TypeVar("Item", bound=Struct)
T = TypeVar("T")


async def with_turns(work: Generator[None, None, T]) -> T:
    """Do work that yields for others to have their turn; returns what it returns."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]  # a StopIteration does not say of what
        await asyncio.sleep(0)


async def answer_in_slices(
    call: Call,
    reader: BatchReader[Item],
    work: Callable[[Session, Sequence[Item | KmsError], Loaded], Sequence[object] | Miss],
    weigh: Callable[[Iterable[Item]], int],
) -> list[bytes]:
    """Answer a batch in slices; between two of them others get their turn.

    Args:
        call: The request.
        reader: Reads its body.
        work: Does the items of a slice.
        weigh: Gives the bytes of items that ``work`` has to get through.

    Returns:
        The answer, in pieces.

    Raises:
        KmsError: As the reader does, or ``Loader.complete``; what was done until then is given up.
    """
    items = await with_turns(reader.begin(call.content_type, call.body, call.kms.bounds.batch_items))
    answer = ResultsWriter(call.accept)
    count = len(items)
    while items:
        await asyncio.sleep(0)
        part: Sequence[Item | KmsError] = _slice(items[:SLICE_ITEMS], call.content_type, reader, weigh)
        # Let go of a slice at a time: freeing many MiB in one go takes milliseconds.
        del items[: len(part)]
        answer.add(await call.loader.complete(partial(work, call.session, part)))
    call.session.charge(count - 1)
    return answer.finish()


def _slice(
    items: list[Item | KmsError | Raw],
    content_type: str,
    reader: BatchReader[Item],
    weigh: Callable[[Iterable[Item]], int],
) -> Sequence[Item | KmsError]:
    """Read items until they weigh enough."""
    if reader.has_read(items) and weigh(items) <= SLICE_BYTES:
        return items
    part: list[Item | KmsError] = []
    weight = 0
    for raw in items[:CLOSE_ITEMS]:
        item = reader.item(content_type, raw)
        # What is read only now takes its length to read, whatever comes of it.
        weight += len(memoryview(raw)) if isinstance(raw, Raw) else 0
        weight += 0 if isinstance(item, Exception) else weigh((item,))
        part.append(item)
        if weight >= SLICE_BYTES:
            break
    return part


async def create_in_slices(call: Call, wanted: Sequence[Wanted | KmsError]) -> list[DekRecord | KmsError]:
    """Make DEKs as ``lifecycle.create_deks`` does, a slice at a time.

    Args:
        call: The request.
        wanted: What for; an error stays in its place.

    Returns:
        One result each, in order. Where a slice fails of which earlier ones have made something, it and those
        that come after it, which are not tried, have its error for each item.

    Raises:
        KmsError: As ``create_deks`` does, if nothing has been made.
    """
    results: list[DekRecord | KmsError] = []
    for begin in range(0, len(wanted) or 1, CREATES):
        part = wanted[begin : begin + CREATES]
        try:
            results += await create_deks(call.kms, call.session, part, call.request_id)
        except KmsError as error:
            if not any(isinstance(result, DekRecord) for result in results):
                raise
            return results + [each if isinstance(each, KmsError) else error for each in wanted[begin:]]
    return results
