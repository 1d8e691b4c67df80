"""The only package that wires adapters to use cases.

``parts`` makes what the service and the commands share, ``service`` is one running instance.
"""

from progressdb_kms.bootstrap.parts import (
    STORE_ID,
    expected_store,
    exported_escrow,
    kek_source,
    load_policy,
    make_vault,
    open_vault,
    read_escrow,
    rotation_parts,
    store_settings,
)
from progressdb_kms.bootstrap.service import Addresses, Service, openapi, serve

__all__ = [
    "STORE_ID",
    "Addresses",
    "Service",
    "expected_store",
    "exported_escrow",
    "kek_source",
    "load_policy",
    "make_vault",
    "open_vault",
    "openapi",
    "read_escrow",
    "rotation_parts",
    "serve",
    "store_settings",
]
