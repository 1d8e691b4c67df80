"""What a rotation does to the records of one slot, in Redis: the port ``RotationStore``.

Records travel in few long strings instead of many short ones: reading thousands of short replies would cost
more than the cryptography. A call on ``count`` records is one script, and its weight keeps batches small, so
that the server works on one while the job works on the records of another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from struct import Struct
from typing import Final

from progressdb_kms.domain.errors import Fenced, RotationRefused, StaleKek
from progressdb_kms.domain.keys import ALL_TAGS
from progressdb_kms.ports import Claim, Manifest, Quarantined, SlotPage, StoredBlob, Swap, SwapResult
from progressdb_kms.store.buckets import bucket_count
from progressdb_kms.store.redis import scripts
from progressdb_kms.store.redis.failures import Failure
from progressdb_kms.store.redis.link import Reply
from progressdb_kms.store.redis.node import Node, parse_info
from progressdb_kms.store.redis.router import Call, Router, checked, script_call
from progressdb_kms.store.redis.schema import (
    CONTROL,
    KEKS_KEY,
    bucket_prefix,
    census_key,
    census_prefix,
    control_key,
    decode_manifest,
    decode_quarantined,
    encode_quarantined,
    manifest_field,
    quarantine_key,
    record_key,
)

BYTES_A_COPY: Final = 160
"""Memory that a copy of a record is reckoned to take: 103 bytes measured, and room for the allocator."""
MOST_OF_MEMORY: Final = 0.8
_RECORDS_A_WEIGHT: Final = 2
"""Records of a script that take as long as one plain command, roughly."""
_NOTED_AT_ONCE: Final = 250
_RESULTS: Final = {ord("d"): SwapResult.DONE, ord("c"): SwapResult.CHANGED, ord("g"): SwapResult.GONE}
_LENGTH: Final = Struct(">I")
_PAGE_LENGTHS: Final = Struct(">IIII")
_BUCKET_LENGTHS: Final = Struct(">II")


class RedisRotationSlots:
    """Implements ``RotationStore``."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def take(self, claims: Sequence[Claim]) -> None:
        """Raise the slots' fences to the claims' tokens; has to come before all else.

        Raises:
            Fenced: A slot has seen a higher token.
        """
        await self._each(
            [
                script_call(claim.tag, scripts.SLOT_TAKE, (control_key(claim.tag),), claim.token)
                for claim in claims
            ]
        )

    async def set_floor(self, claims: Sequence[Claim], version: int, *, lower: bool = False) -> None:
        """Raise the least KEK version that may be written; with ``lower``, set it even below what it is."""
        await self._each(
            [
                script_call(
                    claim.tag,
                    scripts.SLOT_FLOOR,
                    (control_key(claim.tag),),
                    claim.token,
                    version,
                    int(lower),
                )
                for claim in claims
            ]
        )

    async def count(self, tag: str, version: int) -> int:
        """Return the number of records in the slot under a KEK version."""
        return int(await self._router.read_one(Call(tag, ("SCARD", census_key(tag, version)))))

    async def page(self, tag: str, version: int, cursor: int, count: int, *, backup: str = "") -> SlotPage:
        """Return some records under a KEK version, with their copies in snapshot ``backup`` if named."""
        following, lengths, data, *missing = await self._router.read_one(
            script_call(
                tag,
                scripts.SLOT_PAGE,
                (census_key(tag, version), control_key(tag)),
                cursor,
                count,
                version,
                record_key(tag, ""),
                manifest_field(backup) if backup else "",
                bucket_prefix(tag, backup),
                weight=_weight(count),
            )
        )
        records = []
        at = 0
        for name, thread, blob, copy in _PAGE_LENGTHS.iter_unpack(lengths):
            thread_at = at + name
            blob_at = thread_at + thread
            copy_at = blob_at + blob
            end = copy_at + copy
            records.append(
                StoredBlob(
                    data[at:thread_at].decode(errors="replace"),
                    # A damaged one is replaced by what can't unwrap, so that it is found and named.
                    data[thread_at:blob_at].decode(errors="replace"),
                    data[blob_at:copy_at],
                    version,
                    data[copy_at:end],
                )
            )
            at = end
        return SlotPage(
            tuple(records),
            int(following),
            tuple(key_id.decode(errors="replace") for key_id in missing),
        )

    async def begin_snapshot(self, claim: Claim, rotation_id: str, records: int) -> Manifest:
        """Make the manifest of a slot's snapshot, fit for ``records``; an existing one is returned."""
        tag = claim.tag
        reply = _allowed(
            tag,
            await self._router.write_one(
                script_call(
                    tag,
                    scripts.SNAPSHOT_BEGIN,
                    (control_key(tag),),
                    claim.token,
                    manifest_field(rotation_id),
                    f"{bucket_count(records)} -1",
                )
            ),
        )
        return decode_manifest(tag, reply[1])

    async def snapshot(self, claim: Claim, rotation_id: str, version: int, cursor: int, count: int) -> int:
        """Copy some records under a KEK version into the snapshot, never over an existing copy.

        Returns:
            The cursor to go on with, 0 at the end.

        Raises:
            RotationRefused: The snapshot has not been begun.
        """
        tag = claim.tag
        reply = _allowed(
            tag,
            await self._router.write_one(
                script_call(
                    tag,
                    scripts.SNAPSHOT_COPY,
                    (control_key(tag), census_key(tag, version)),
                    claim.token,
                    manifest_field(rotation_id),
                    cursor,
                    count,
                    record_key(tag, ""),
                    bucket_prefix(tag, rotation_id),
                    weight=_weight(count),
                )
            ),
        )
        return int(_begun(tag, reply)[1])

    async def read_bucket(self, tag: str, rotation_id: str, bucket: int) -> list[tuple[str, bytes]]:
        """Return a bucket of a slot's snapshot: key ids and blobs."""
        lengths, data = await self._router.read_one(
            script_call(tag, scripts.SNAPSHOT_BUCKET, (f"{bucket_prefix(tag, rotation_id)}{bucket}",))
        )
        entries = []
        at = 0
        for name, blob in _BUCKET_LENGTHS.iter_unpack(lengths):
            blob_at = at + name
            end = blob_at + blob
            entries.append((data[at:blob_at].decode(errors="replace"), data[blob_at:end]))
            at = end
        return entries

    async def seal_snapshot(self, claim: Claim, rotation_id: str, count: int, digest: str) -> bool:
        """Write what the verified snapshot of a slot holds into its manifest.

        Returns:
            False where it holds something else by now: a key was destroyed since it was read.

        Raises:
            RotationRefused: The snapshot has not been begun.
        """
        tag = claim.tag
        reply = await self._router.write_one(
            script_call(
                tag,
                scripts.SNAPSHOT_SEAL,
                (control_key(tag),),
                claim.token,
                manifest_field(rotation_id),
                count,
                digest,
                bucket_prefix(tag, rotation_id),
            )
        )
        return bool(_begun(tag, _allowed(tag, [reply]))[0] == b"ok")

    async def manifest(self, tag: str, rotation_id: str) -> Manifest | None:
        """Return the manifest of a slot's snapshot."""
        entry = await self._router.read_one(
            Call(tag, ("HGET", control_key(tag), manifest_field(rotation_id)))
        )
        return None if entry is None else decode_manifest(tag, entry)

    async def swap(
        self, claim: Claim, rotation_id: str, swaps: Sequence[Swap], kek_id: str, kek_version: int
    ) -> list[SwapResult]:
        """Replace blobs by compare-and-set, move the keys in the census, and copy first what has no copy.

        Raises:
            Fenced: Another worker has the slot.
            StaleKek: ``kek_version`` is below the floor.
        """
        tag = claim.tag
        parts = []
        for swap in swaps:
            name = swap.key_id.encode()
            parts += [
                _LENGTH.pack(len(name)),
                name,
                _LENGTH.pack(len(swap.old)),
                swap.old,
                _LENGTH.pack(len(swap.new)),
                swap.new,
            ]
        call = script_call(
            tag,
            scripts.SLOT_SWAP,
            (control_key(tag), census_key(tag, kek_version)),
            claim.token,
            manifest_field(rotation_id),
            kek_id,
            kek_version,
            record_key(tag, ""),
            census_prefix(tag),
            bucket_prefix(tag, rotation_id),
            b"".join(parts),
            weight=_weight(len(swaps)),
        )
        reply = _allowed(tag, await self._router.write_one(call))
        if reply[0] == b"unbegun":
            await self.begin_snapshot(claim, rotation_id, sum((await self._census([tag]))[tag]))
            reply = _begun(tag, _allowed(tag, await self._router.write_one(call)))
        return [_RESULTS[letter] for letter in reply[1]]

    async def quarantine(self, claim: Claim, rotation_id: str, records: Sequence[Quarantined]) -> None:
        """Note records that could not be dealt with; a record that was noted before gets the newer reason."""
        tag = claim.tag
        keys = (control_key(tag), quarantine_key(tag, rotation_id))
        calls = []
        for first in range(0, len(records), _NOTED_AT_ONCE):
            pairs = [
                part
                for record in records[first : first + _NOTED_AT_ONCE]
                for part in (record.key_id, encode_quarantined(record))
            ]
            calls.append(script_call(tag, scripts.SLOT_QUARANTINE, keys, claim.token, *pairs))
        await self._each(calls)

    async def quarantined(self, tag: str, rotation_id: str) -> list[Quarantined]:
        """Return what was noted for a slot."""
        reply = await self._router.read_one(Call(tag, ("HGETALL", quarantine_key(tag, rotation_id))))
        return [decode_quarantined(name, entry) for name, entry in zip(reply[::2], reply[1::2], strict=True)]

    async def headroom(self) -> str:
        """Return why a snapshot does not fit below 80 % of a node's maxmemory, or an empty string."""
        topology = self._router.topology
        await topology.ready()
        census = await self._census(ALL_TAGS)
        held: Counter[Node] = Counter()
        for tag, counts in census.items():
            if (node := topology.find(tag)) is not None:
                held[node] += sum(counts)
        reasons = []
        for node, records in held.items():
            (reply,) = await node.read([("INFO", "memory")])
            if isinstance(reply, Failure) and not reply.refused:
                raise reply.error
            facts = parse_info(reply)
            used, most = int(facts.get("used_memory", "0")), int(facts.get("maxmemory", "0"))
            needed = used + BYTES_A_COPY * records
            if most and needed > MOST_OF_MEMORY * most:
                reasons.append(
                    f"the store's node {node.endpoint} has no room for a snapshot: {used:,} bytes are used,"
                    f" the copies of {records:,} records take up to {needed - used:,}, and 80 % of its"
                    f" maxmemory of {most:,} are {int(MOST_OF_MEMORY * most):,}; raise maxmemory to at"
                    f" least {int(needed / MOST_OF_MEMORY) + 1:,}, add nodes, or purge old backups"
                )
        return "; ".join(reasons)

    async def _census(self, tags: Sequence[str]) -> dict[str, list[int]]:
        """Return the numbers of records by tag, under each version that the registry knows."""
        names = await self._router.read_one(Call(CONTROL, ("HKEYS", KEKS_KEY)))
        versions = sorted(int(name) for name in names if name.isdigit())
        counts: dict[str, list[int]] = {tag: [] for tag in tags}
        for version in versions:
            replies = await self._router.read(
                [Call(tag, ("SCARD", census_key(tag, version))) for tag in tags]
            )
            for tag, reply in zip(tags, replies, strict=True):
                counts[tag].append(int(checked(reply)))
        return counts

    async def _each(self, calls: Sequence[Call]) -> None:
        replies = [checked(reply) for reply in await self._router.write(calls)]
        for call, reply in zip(calls, replies, strict=True):
            _allowed(call.tag, [reply])


def _weight(records: int) -> int:
    return 1 + records // _RECORDS_A_WEIGHT


def _allowed(tag: str, reply: Reply) -> Reply:
    if reply[0] == b"fenced":
        raise Fenced(f"another worker has slot {tag}, or it was not taken before")
    if reply[0] == b"stale":
        raise StaleKek
    return reply


def _begun(tag: str, reply: Reply) -> Reply:
    if reply[0] == b"unbegun":
        raise RotationRefused(f"the snapshot of slot {tag} has not been begun, or was purged meanwhile")
    return reply
