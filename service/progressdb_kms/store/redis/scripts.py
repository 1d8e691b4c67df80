"""The Lua scripts, one file each in ``lua/``. What each takes and returns is said at its top."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Final


@dataclass(frozen=True, slots=True)
class Script:
    """A script and the name that the server keeps it under: the SHA-1 of its text."""

    source: str
    sha: str


def _load(name: str) -> Script:
    source = files(__package__).joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")
    return Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


CREATE: Final = _load("create")
CREATE_OLDER: Final = _load("create_older")
INDEX_OLDER: Final = _load("index_older")
SUPERSEDE_OLDER: Final = _load("supersede_older")
CHANGE_STATE: Final = _load("change_state")
REWRAP: Final = _load("rewrap")
RESERVE_USES: Final = _load("reserve_uses")
NOTICE: Final = _load("notice")
READ_NOTICES: Final = _load("read_notices")
READ_REGISTRY: Final = _load("read_registry")
INITIALISE: Final = _load("initialise")
CHANGE_REGISTRY: Final = _load("change_registry")
LOCK_ACQUIRE: Final = _load("lock_acquire")
LOCK_RENEW: Final = _load("lock_renew")
LOCK_RELEASE: Final = _load("lock_release")
ROTATION_SAVE: Final = _load("rotation_save")
WORK_OPEN: Final = _load("work_open")
WORK_CLAIM: Final = _load("work_claim")
WORK_EXTEND: Final = _load("work_extend")
WORK_FINISH: Final = _load("work_finish")
SLOT_TAKE: Final = _load("slot_take")
SLOT_FLOOR: Final = _load("slot_floor")
SLOT_PAGE: Final = _load("slot_page")
SLOT_SWAP: Final = _load("slot_swap")
SLOT_QUARANTINE: Final = _load("slot_quarantine")
SNAPSHOT_BEGIN: Final = _load("snapshot_begin")
SNAPSHOT_COPY: Final = _load("snapshot_copy")
SNAPSHOT_BUCKET: Final = _load("snapshot_bucket")
SNAPSHOT_SEAL: Final = _load("snapshot_seal")
IMPORT_RECORD: Final = _load("import_record")
IMPORT_BEGIN: Final = _load("import_begin")
IMPORT_FINISH: Final = _load("import_finish")
RAISE_FLOOR: Final = _load("raise_floor")
PURGE: Final = _load("purge")
DESTROY: Final = _load("destroy")
DESTRUCTION_LEASE: Final = _load("destruction_lease")
ROTATE_DEK: Final = _load("rotate_dek")
SUPERSEDE: Final = _load("supersede")
THREAD_ENABLED: Final = _load("thread_enabled")
AUDIT_COMMIT: Final = _load("audit_commit")
AUDIT_ANCHOR: Final = _load("audit_anchor")
AUDIT_TRIM: Final = _load("audit_trim")
