"""The page for operators, put together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from progressdb_kms import __version__
from progressdb_kms.bootstrap.audit import verify_keys
from progressdb_kms.page.sources import Expiry, Sources
from progressdb_kms.page.views import add_page

if TYPE_CHECKING:
    from quart import Quart

    from progressdb_kms.api.answering import Api
    from progressdb_kms.bootstrap.service import Service
    from progressdb_kms.transport.tls import TlsHolder


def operators_page(service: Service, app: Quart, api: Api) -> None:
    """Add the page to a service's app; it is not served before.

    Raises:
        AuditKeyInvalid: A key can't be read.
    """
    settings = service.settings
    add_page(
        app,
        Sources(
            api=api,
            heartbeats=service.store.heartbeats,
            watch=service.rotations,
            expiries=lambda: expiries(service.tls),
            store=lambda: service.store.health.status,
            unready=service.unready,
            audit_keys=verify_keys(settings),
            audit_kept=settings.audit.key_file is not None and settings.audit.stream,
            instance=service.instance,
            release=__version__,
        ),
    )


def expiries(tls: TlsHolder | None) -> list[Expiry]:
    """Return what expires, as it is loaded now."""
    if tls is None:
        return []
    facts = tls.facts
    return [
        Expiry("server certificate", ", ".join(facts.names) or facts.subject, facts.not_after),
        *(Expiry("CA of clients", ca.subject, ca.not_after) for ca in facts.client_cas),
        *(
            Expiry("revocation list", crl.issuer, crl.next_update if math.isfinite(crl.next_update) else None)
            for crl in facts.crls
        ),
    ]
