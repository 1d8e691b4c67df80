"""The only package that wires adapters to use cases.

``parts`` makes what the service and the commands share, ``audit`` their audit log: these are given here.
``service`` is one running instance, ``supervisor`` runs several of them as the workers of one service: who
serves imports them by name, since Quart and Hypercorn take as long to load as all that a command needs.
"""

from progressdb_kms.bootstrap.audit import export_audit, read_anchor, verify_audit, verify_keys
from progressdb_kms.bootstrap.kek import add_kek, kek_source
from progressdb_kms.bootstrap.parts import (
    STORE_ID,
    expected_store,
    exported_escrow,
    load_policy,
    make_vault,
    open_vault,
    read_escrow,
    rotation_parts,
)
from progressdb_kms.bootstrap.storing import store_settings

__all__ = [
    "STORE_ID",
    "add_kek",
    "expected_store",
    "export_audit",
    "exported_escrow",
    "kek_source",
    "load_policy",
    "make_vault",
    "open_vault",
    "read_anchor",
    "read_escrow",
    "rotation_parts",
    "store_settings",
    "verify_audit",
    "verify_keys",
]
