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
from progressdb_kms.usecases.batches import ResultsWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from progressdb_kms.api.call import Call
    from progressdb_kms.usecases.batches import BatchReader
    from progressdb_kms.usecases.encryption import Loaded, Miss
    from progressdb_kms.usecases.session import Session

LONG_BYTES: Final = 2**16
"""Bodies above this are cut; those below hold about a thousand items at most, or little to encrypt."""
SLICE_ITEMS: Final = 256
CLOSE_ITEMS: Final = 128
"""Items of a slice, where some are wrong or have yet to be read one by one: that takes some 10 us each."""
SLICE_BYTES: Final = 2**18

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
