"""Rotations in Redis: their lock, their records and the sharing of their work; the port ``RotationLedger``.

All times are the server's own (TIME), so that the clocks of the workers do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from progressdb_kms.domain.errors import Fenced, RotationRunning
from progressdb_kms.domain.rotation import FINISHED, Rotation, Step
from progressdb_kms.ports import Claim, Lock
from progressdb_kms.store.redis import scripts
from progressdb_kms.store.redis.link import Reply
from progressdb_kms.store.redis.router import Call, Router, checked, script_call
from progressdb_kms.store.redis.schema import (
    CONTROL,
    CURRENT_KEY,
    FENCE_KEY,
    LOCK_KEY,
    ROTATIONS_KEY,
    claims_key,
    decode_rotation,
    encode_rotation,
    rotation_key,
    work_key,
)

_COUNT: Final = b"n:"


class RedisRotationLedger:
    """Implements ``RotationLedger``."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def acquire(self, owner: str, lease: float) -> Lock:
        """Take the lock, with a new token; its present owner may take it again.

        Raises:
            RotationRunning: Another holds it; the detail names it and its age.
        """
        reply = await self._router.write_one(
            script_call(CONTROL, scripts.LOCK_ACQUIRE, (LOCK_KEY, FENCE_KEY), owner, _ms(lease))
        )
        if reply[0] == b"ok":
            return Lock(owner, int(reply[1]))
        raise RotationRunning(
            f"{reply[1].decode(errors='replace')} has been leading a rotation for {int(reply[2]) // 1000} s:"
            " wait for it, or join it as a worker"
        )

    async def renew(self, lock: Lock, lease: float) -> None:
        """Go on holding the lock.

        Raises:
            Fenced: Another has taken it.
        """
        _lock_held(
            await self._router.write_one(
                script_call(CONTROL, scripts.LOCK_RENEW, (LOCK_KEY,), lock.token, _ms(lease))
            )
        )

    async def release(self, lock: Lock) -> None:
        """Give the lock back; nothing happens if another has it."""
        await self._router.write_one(script_call(CONTROL, scripts.LOCK_RELEASE, (LOCK_KEY,), lock.token))

    async def pulse(self) -> str:
        """Return what changes whenever the lock is taken or renewed, and stands still when nobody does."""
        token, until = await self._router.read_one(Call(CONTROL, ("HMGET", LOCK_KEY, "token", "until")))
        return f"{(token or b'').decode()}:{(until or b'').decode()}"

    async def save(self, rotation: Rotation, lock: Lock) -> None:
        """Persist a rotation, and whether it is the one under way. Its counts are those of ``finish``.

        Raises:
            Fenced: The lock is another's.
        """
        rotation_id = rotation.rotation_id
        shared = [
            key for step in Step for key in (work_key(rotation_id, step), claims_key(rotation_id, step))
        ]
        _lock_held(
            await self._router.write_one(
                script_call(
                    CONTROL,
                    scripts.ROTATION_SAVE,
                    (LOCK_KEY, rotation_key(rotation_id), ROTATIONS_KEY, CURRENT_KEY, *shared),
                    lock.token,
                    rotation_id,
                    encode_rotation(rotation),
                    rotation.started_at,
                    int(rotation.step in FINISHED),
                )
            )
        )

    async def current(self) -> Rotation | None:
        """Return the unfinished rotation with its counts, if there is one."""
        name = await self._router.read_one(Call(CONTROL, ("GET", CURRENT_KEY)))
        rotation = await self.get(name.decode()) if name else None
        # It may have been finished between the two reads.
        return None if rotation is None or rotation.step in FINISHED else rotation

    async def get(self, rotation_id: str) -> Rotation | None:
        """Return a rotation with its counts."""
        return _rotation(await self._router.read_one(Call(CONTROL, ("HGETALL", rotation_key(rotation_id)))))

    async def list_rotations(self, limit: int) -> list[Rotation]:
        """Return the latest rotations, newest first."""
        names = await self._router.read_one(
            Call(CONTROL, ("ZRANGE", ROTATIONS_KEY, 0, limit - 1, "REV")),
        )
        replies = await self._router.read(
            [Call(CONTROL, ("HGETALL", rotation_key(name.decode()))) for name in names]
        )
        found = [_rotation(checked(reply)) for reply in replies]
        return [rotation for rotation in found if rotation is not None]

    async def open_work(self, rotation_id: str, step: Step, tags: Sequence[str], lock: Lock) -> None:
        """Offer slots for a step, once: what was offered for this step before is left as it is.

        Raises:
            Fenced: The lock is another's.
        """
        _lock_held(
            await self._router.write_one(
                script_call(
                    CONTROL,
                    scripts.WORK_OPEN,
                    (LOCK_KEY, rotation_key(rotation_id), work_key(rotation_id, step)),
                    lock.token,
                    step,
                    *tags,
                )
            )
        )

    async def claim(self, rotation_id: str, step: Step, worker: str, count: int, lease: float) -> list[Claim]:
        """Claim up to ``count`` slots that nobody works on, or whose worker's lease ran out, with new tokens.

        What was claimed by a call whose answer was lost is free again when its lease has run out.
        """
        reply = await self._router.write_one(
            script_call(
                CONTROL,
                scripts.WORK_CLAIM,
                (work_key(rotation_id, step), claims_key(rotation_id, step), FENCE_KEY),
                worker,
                count,
                _ms(lease),
            )
        )
        return [Claim(tag.decode(), int(token)) for tag, token in zip(reply[::2], reply[1::2], strict=True)]

    async def extend(self, rotation_id: str, step: Step, claims: Sequence[Claim], lease: float) -> None:
        """Go on holding claims; one that another has taken is left to it."""
        pairs = [part for claim in claims for part in (claim.tag, claim.token)]
        await self._router.write_one(
            script_call(
                CONTROL,
                scripts.WORK_EXTEND,
                (work_key(rotation_id, step), claims_key(rotation_id, step)),
                _ms(lease),
                *pairs,
            )
        )

    async def finish(self, rotation_id: str, step: Step, claim: Claim, counts: Mapping[str, int]) -> None:
        """Mark a slot's part of a step as done, and add to the rotation's counts, both once.

        Raises:
            Fenced: Another has claimed the slot since.
        """
        pairs = [part for pair in counts.items() for part in pair]
        reply = await self._router.write_one(
            script_call(
                CONTROL,
                scripts.WORK_FINISH,
                (work_key(rotation_id, step), claims_key(rotation_id, step), rotation_key(rotation_id)),
                claim.tag,
                claim.token,
                *pairs,
            )
        )
        if reply == b"fenced":
            raise Fenced(f"another worker has claimed slot {claim.tag} since")

    async def outstanding(self, rotation_id: str, step: Step) -> int:
        """Return the number of slots whose part of a step is not done."""
        return int(await self._router.read_one(Call(CONTROL, ("ZCARD", work_key(rotation_id, step)))))


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _lock_held(reply: Reply) -> None:
    if reply == b"fenced":
        raise Fenced("another run has taken the lock of rotations")


def _rotation(reply: Reply) -> Rotation | None:
    values: dict[bytes, bytes] = dict(zip(reply[::2], reply[1::2], strict=True))
    if b"record" not in values:
        return None
    counts = {
        name.removeprefix(_COUNT).decode(): int(value)
        for name, value in values.items()
        if name.startswith(_COUNT)
    }
    return decode_rotation(values[b"record"], counts)
