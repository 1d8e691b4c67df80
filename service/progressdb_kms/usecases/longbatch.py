"""Long batches, worked off in slices, so that nobody else waits for the whole of one.

Each slice is a batch of its own: it looks at grants, key states and what is in memory anew, so that the rules
of ``keycache`` hold however long the batch takes. The reading of a JSON body and the writing of the answer
are not cut: each is mostly one call of a parser in C.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from progressdb_kms.usecases.messages import BatchReader, Results, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from msgspec import Struct

    from progressdb_kms.domain.errors import KmsError
    from progressdb_kms.usecases.encryption import Loaded, Miss
    from progressdb_kms.usecases.loading import Loader
    from progressdb_kms.usecases.session import Session

LONG_BYTES: Final = 2**16
"""Bodies above this are cut; those below hold about a thousand items at most, or little to encrypt."""
SLICE_ITEMS: Final = 256
SLICE_BYTES: Final = 2**18

Item = TypeVar("Item", bound="Struct")


async def answer_in_slices(
    loader: Loader,
    session: Session,
    reader: BatchReader[Item],
    work: Callable[[Session, Sequence[Item | KmsError], Loaded], Sequence[object] | Miss],
    weigh: Callable[[Item], int],
    call: tuple[str, str, bytes, int],
) -> bytes:
    """Answer a batch in slices; between two of them others get their turn.

    Args:
        loader: Fetches what is not in memory.
        session: The caller.
        reader: Reads the body.
        work: Does the items of a slice.
        weigh: Gives the bytes of an item that ``work`` has to get through.
        call: Content type, accepted type, body, and the most items that it may have.

    Raises:
        KmsError: As the reader does, or ``Loader.complete``; what was done until then is given up.
    """
    content_type, accept, body, limit = call
    items = reader.begin(content_type, body, limit)
    results: list[object] = []
    begin = 0
    while begin < len(items):
        await asyncio.sleep(0)
        part: list[Item | KmsError] = []
        weight = 0
        while begin + len(part) < len(items) and len(part) < SLICE_ITEMS and weight < SLICE_BYTES:
            item = reader.item(content_type, items[begin + len(part)])
            weight += 0 if isinstance(item, Exception) else weigh(item)
            part.append(item)
        results += await loader.complete(partial(work, session, part))
        begin += len(part)
    session.charge(len(items) - 1)
    await asyncio.sleep(0)
    return encode(accept, Results(results))
