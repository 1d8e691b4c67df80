"""The gauges of an instance, read off its parts at each scrape.

What becomes of them where there are several workers stands in ``observability.merging``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from progressdb_kms.audit.chained import ChainedAuditLog
from progressdb_kms.transport.board import Stage

if TYPE_CHECKING:
    from progressdb_kms.bootstrap.service import Service
    from progressdb_kms.usecases.keycache import DekCache


def add_gauges(service: Service, cache: DekCache) -> None:
    """Add the gauges of a running instance to its metrics."""
    metrics = service.metrics
    unready = service.speaker.unready if service.speaker else service.unready
    metrics.gauge("kms_ready", "1 while the service is ready.", lambda: float(not unready()))
    board = service.place.board
    metrics.gauge(
        "kms_workers",
        "Worker processes that serve.",
        lambda: sum(place.stage is Stage.SERVING and not place.hung for place in board.places),
    )
    metrics.read_counter(
        "kms_worker_restarts", "Worker processes that were started again.", lambda: board.restarts
    )
    metrics.gauge("kms_connections", "Open API connections.", lambda: service.server.connections)
    metrics.gauge("kms_key_cache_keys", "Unwrapped keys in memory.", lambda: len(cache))
    metrics.gauge(
        "kms_kek_versions_loaded", "KEK versions that are loaded.", lambda: len(service.source.versions())
    )
    metrics.gauge(
        "kms_kek_versions_usable",
        "KEK versions that are loaded and match the registry.",
        lambda: len(service.keks.usable),
    )
    metrics.gauge(
        "kms_store_reachable",
        "1 while the store answers.",
        lambda: float(service.store.health.status.reachable),
    )
    metrics.gauge(
        "kms_store_problems",
        "Ways in which the store could lose keys.",
        lambda: len(service.store.health.status.problems),
    )
    audit = service.audit
    metrics.gauge(
        "kms_audit_chained",
        "1 where audit records are chained and anchored.",
        lambda: float(isinstance(audit, ChainedAuditLog)),
    )
    metrics.gauge(
        "kms_audit_waiting",
        "Audit records that are not durable yet.",
        lambda: audit.waiting if isinstance(audit, ChainedAuditLog) else 0,
    )
    metrics.facts(lambda: service.rotations.facts(time.time()))
    if service.tls is not None:
        tls = service.tls
        expiry = metrics.labelled_gauge(
            "kms_certificate_expiry_timestamp_seconds",
            "When a certificate expires, in Unix seconds.",
            "certificate",
        )
        expiry.labels("server").set_function(lambda: tls.facts.not_after)
        expiry.labels("client_ca").set_function(lambda: min(ca.not_after for ca in tls.facts.client_cas))
        if service.settings.tls is not None and service.settings.tls.client_crl is not None:
            next_update = expiry.labels("client_crl")
            next_update.set_function(lambda: min(crl.next_update for crl in tls.facts.crls))
            metrics.gauge(
                "kms_revoked_certificates",
                "Client certificates that the loaded revocation lists name.",
                lambda: sum(crl.revoked for crl in tls.facts.crls),
            )
