"""Long batches, worked off in slices, so that nobody else waits for the whole of one.

Each slice is a batch of its own: it looks at grants, key states and what is in memory anew, so that the rules
of ``keycache`` hold however long the batch takes. The reading of a JSON body and the writing of the answer
are not cut: each is mostly one call of a parser in C.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from progressdb_kms.usecases.messages import Results

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from msgspec import Struct

    from progressdb_kms.api.call import Call
    from progressdb_kms.domain.errors import KmsError
    from progressdb_kms.usecases.encryption import Loaded, Miss
    from progressdb_kms.usecases.messages import BatchReader
    from progressdb_kms.usecases.session import Session

LONG_BYTES: Final = 2**16
"""Bodies above this are cut; those below hold about a thousand items at most, or little to encrypt."""
SLICE_ITEMS: Final = 256
SLICE_BYTES: Final = 2**18

Item = TypeVar("Item", bound="Struct")


async def answer_in_slices(
    call: Call,
    reader: BatchReader[Item],
    work: Callable[[Session, Sequence[Item | KmsError], Loaded], Sequence[object] | Miss],
    weigh: Callable[[Item], int],
) -> bytes:
    """Answer a batch in slices; between two of them others get their turn.

    Args:
        call: The request.
        reader: Reads its body.
        work: Does the items of a slice.
        weigh: Gives the bytes of an item that ``work`` has to get through.

    Raises:
        KmsError: As the reader does, or ``Loader.complete``; what was done until then is given up.
    """
    items = reader.begin(call.content_type, call.body, call.kms.bounds.batch_items)
    results: list[object] = []
    begin = 0
    while begin < len(items):
        await asyncio.sleep(0)
        part: list[Item | KmsError] = []
        weight = 0
        while begin + len(part) < len(items) and len(part) < SLICE_ITEMS and weight < SLICE_BYTES:
            item = reader.item(call.content_type, items[begin + len(part)])
            weight += 0 if isinstance(item, Exception) else weigh(item)
            part.append(item)
        results += await call.loader.complete(partial(work, call.session, part))
        begin += len(part)
    call.session.charge(len(items) - 1)
    await asyncio.sleep(0)
    return call.answer(Results(results))
