"""The `progressdb-kms` command with bugs seeded on purpose, to see that the checker finds them.

`PROGRESSDB_KMS_SEEDS` names them, by commas. They are put in from here, before the command begins: nothing in
the package knows of them.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from progressdb_kms.domain.keys import UNIQUE_BYTES, new_key_id
from progressdb_kms.store.redis import scripts
from progressdb_kms.store.redis.notices import Notices
from progressdb_kms.store.redis.rotation_slots import RedisRotationSlots
from progressdb_kms.store.redis.scripts import Script
from progressdb_kms.usecases import creation, dekrotation, upkeep
from tests.fault import rotate_with_faults

SEEDS = "PROGRESSDB_KMS_SEEDS"
PAUSE_AT = "PROGRESSDB_KMS_PAUSE_AT"
"""A key before whose rewrap the job waits, and a folder: it makes ``paused`` there and waits for ``go``."""


def _patch(name: str, old: str, new: str) -> None:
    """Change a script's text, which must have what is to be changed exactly once."""
    source: str = getattr(scripts, name).source
    if source.count(old) != 1:
        raise SystemExit(f"{name} has changed: the seed does not fit any more")
    source = source.replace(old, new)
    setattr(scripts, name, Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()))


def no_compare() -> None:
    """Rewrap without comparing: whatever has become of the record, the new blob is written."""
    _patch("SLOT_SWAP", "if not found[1] then", "if false then")
    _patch("SLOT_SWAP", "elseif found[1] == old then", "else")


def no_floor() -> None:
    """Creates that do not ask for the floor."""
    for name in ("CREATE", "ROTATE_DEK"):
        _patch(name, "if tonumber(ARGV[5]) < floor then", "if false then")


def no_census() -> None:
    """A rewrap that forgets to count the record under its new version."""
    _patch("SLOT_SWAP", "redis.call('SADD', KEYS[2], unpack(moved))", "redis.call('PING')")


def no_copy() -> None:
    """A snapshot that skips the records."""
    _patch("SNAPSHOT_COPY", "if blob then", "if false then")
    _patch("SLOT_SWAP", "added = added + redis.call('HSETNX', ARGV[7] .. bucket, id, old)", "")


def no_notice() -> None:
    """State changes of which the other instances hear nothing."""

    async def put(self: Notices, *key_ids: str) -> None:
        return

    setattr(Notices, "put", put)  # noqa: B010 - mypy forbids to assign a method


def new_id_each_time() -> None:
    """Retries that make another key."""

    def derive(_identity: str, _once: str, thread_id: str) -> str:
        return new_key_id(thread_id, secrets.token_bytes(UNIQUE_BYTES))

    for module in (creation, dekrotation):
        module.derive_key_id = derive  # type: ignore[attr-defined]


def deaf() -> None:
    """No bug but a bad day: an instance that does not hear of a new version until a script tells it."""
    upkeep.REGISTRY_EVERY = 3600.0  # type: ignore[misc] # Final for everyone else


def pause() -> None:
    """Wait before the rewrap of one key."""
    key_id, _, folder = os.environ[PAUSE_AT].partition("@")
    swap = RedisRotationSlots.swap

    async def waiting(
        self: RedisRotationSlots, claim: Any, rotation_id: str, swaps: Sequence[Any], *rest: Any
    ) -> Any:
        if any(each.key_id == key_id for each in swaps):
            (Path(folder) / "paused").touch()
            while not (Path(folder) / "go").exists():  # noqa: ASYNC110 - another process says it, by a file
                await asyncio.sleep(0.05)
        return await swap(self, claim, rotation_id, swaps, *rest)

    setattr(RedisRotationSlots, "swap", waiting)  # noqa: B010 - mypy forbids to assign a method


ALL = {
    "no-compare": no_compare,
    "no-floor": no_floor,
    "no-census": no_census,
    "no-copy": no_copy,
    "no-notice": no_notice,
    "new-id-each-time": new_id_each_time,
    "deaf": deaf,
    "pause": pause,
}

if __name__ == "__main__":
    for seed in filter(None, os.environ.get(SEEDS, "").split(",")):
        ALL[seed]()
    sys.exit(rotate_with_faults.main())
