"""The only package that wires adapters to use cases.

``parts`` makes what the service and the commands share, ``audit`` their audit log, ``service`` is one running
instance, ``supervisor`` runs several of them as the workers of one service.
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
from progressdb_kms.bootstrap.service import Addresses, Service, openapi, serve
from progressdb_kms.bootstrap.storing import store_settings
from progressdb_kms.bootstrap.supervisor import serve_with_workers

__all__ = [
    "STORE_ID",
    "Addresses",
    "Service",
    "add_kek",
    "expected_store",
    "export_audit",
    "exported_escrow",
    "kek_source",
    "load_policy",
    "make_vault",
    "open_vault",
    "openapi",
    "read_anchor",
    "read_escrow",
    "rotation_parts",
    "serve",
    "serve_with_workers",
    "store_settings",
    "verify_audit",
    "verify_keys",
]
