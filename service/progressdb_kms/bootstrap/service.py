"""One running instance of the service: what it is made of, its start and its end."""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
from msgspec.structs import replace

from progressdb_kms import __version__
from progressdb_kms.api.admin import AdminApp
from progressdb_kms.api.answering import Api
from progressdb_kms.api.app import create_app
from progressdb_kms.api.door import ApiDoor
from progressdb_kms.api.openapi import openapi_document
from progressdb_kms.audit.chained import ChainedAuditLog
from progressdb_kms.audit.pipes import PatientStream
from progressdb_kms.bootstrap import audit as auditing
from progressdb_kms.bootstrap.events import Events
from progressdb_kms.bootstrap.gauges import add_gauges
from progressdb_kms.bootstrap.kek import kek_source
from progressdb_kms.bootstrap.page import operators_page
from progressdb_kms.bootstrap.parts import expected_store, load_policy, make_vault
from progressdb_kms.bootstrap.speaker import Speaker
from progressdb_kms.bootstrap.storing import store_settings
from progressdb_kms.domain.errors import (
    KekFileInvalid,
    KmsError,
    OperatorError,
    PolicyInvalid,
)
from progressdb_kms.domain.quota import Part
from progressdb_kms.files import Watch
from progressdb_kms.observability.logs import configure_logs
from progressdb_kms.observability.metrics import CONTENT_TYPE, Metrics
from progressdb_kms.process import allow_descriptors, harden, spare_what_is_there
from progressdb_kms.settings import Limits, Settings
from progressdb_kms.store.redis import RedisStore, open_store
from progressdb_kms.transport.board import Board, Place, Stage
from progressdb_kms.transport.server import Server
from progressdb_kms.transport.tls import TlsHolder
from progressdb_kms.usecases.context import Bounds, Kms, boottime
from progressdb_kms.usecases.encryption import Hot
from progressdb_kms.usecases.keks import KekBook
from progressdb_kms.usecases.keycache import DekCache
from progressdb_kms.usecases.loading import Loader
from progressdb_kms.usecases.rotationwatch import RotationWatch
from progressdb_kms.usecases.session import PolicyBook, Session
from progressdb_kms.usecases.upkeep import Upkeep

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from progressdb_kms.domain.identity import Identity
    from progressdb_kms.transport.listeners import Sockets

log = structlog.get_logger(__name__)

START_RETRY_SECONDS = 0.5
SPARE_DESCRIPTORS = 128
"""For the admin port's connections, the store's, files and the event loop."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the service listens once it is up."""

    tcp: tuple[str, int] | None
    admin: tuple[str, int]
    unix: Path | None


@dataclass(frozen=True, slots=True)
class Seat:
    """What a worker gets from its supervisor: its place on the board, and the sockets that all listen on."""

    place: Place
    sockets: Sockets


def openapi() -> dict[str, Any]:
    """Return the OpenAPI description under the default limits."""
    return openapi_document(Limits())


class Service:
    """One running instance: everything that ``serve`` puts together.

    Args:
        settings: The configuration.
        seat: What a worker has been given; None for a service of one process.

    Raises:
        OperatorError: A file that it needs can't be used.
    """

    def __init__(self, settings: Settings, seat: Seat | None = None) -> None:
        self.settings = settings
        self.seat = seat
        self.place = seat.place if seat else Board(1).places[0]
        self.part = Part(self.place.number, self.place.board.workers)
        self.metrics = Metrics()
        self.events = Events(self.metrics)
        self._watches = [
            Watch([settings.kek.path], self._reload_kek),
            Watch([settings.policy], self._reload_policy),
        ]
        if settings.tls is not None:
            paths = [settings.tls.cert, settings.tls.key, settings.tls.client_ca]
            if settings.tls.client_crl is not None:
                paths.append(settings.tls.client_crl)
            self._watches.append(Watch(paths, self._reload_tls))
        # Watches are made before the files are read, so that a change in between is not missed.
        self.source = kek_source(settings)
        self.policies = PolicyBook(*load_policy(settings.policy), part=self.part)
        self.tls = TlsHolder(settings.tls, self.events) if settings.tls is not None else None
        self.store_settings = store_settings(settings)
        self.store_id = expected_store(settings)
        auditing.verify_keys(settings)  # a broken key file is told now, before anything is served
        self._started = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Serve. The API answers from now on; ``/readyz`` says when it can do its work.

        Raises:
            OperatorError: KEK and store do not belong together, or an address can't be had.
        """
        settings = self.settings
        self.store: RedisStore = await open_store(self.store_settings, observer=self.metrics)
        self.keks = KekBook(
            source=self.source,
            registry=self.store.registry,
            observer=self.metrics,
            look_again=self.source.reload,
            store_id=self.store_id,
        )
        cache = DekCache(
            max_keys=self.part.of(settings.cache.max_keys),
            ttl=settings.cache.ttl,
            max_stale=settings.cache.max_stale,
            clock=boottime,
        )
        self.instance = instance = secrets.token_hex(8)
        self.output = PatientStream(sys.stdout, self.metrics)
        self.audit = auditing.make_audit(settings, self.store.audit, instance, self.metrics, self.output)
        self.kms = kms = Kms(
            store=self.store.keys,
            keks=self.keks,
            cache=cache,
            audit=self.audit,
            observer=self.metrics,
            backups=self.store.backups,
            ledger=self.store.rotation_ledger,
            policies=self.policies,
            bounds=Bounds(
                plaintext_bytes=settings.limits.plaintext_bytes,
                batch_items=settings.limits.batch_items,
                waiting_days=settings.destruction.waiting_days,
                audited_calls=settings.audit.data_plane,
                audit_interval=settings.audit.data_plane_interval,
            ),
        )
        loader = Loader(kms)
        self.upkeep = Upkeep(
            kms=kms,
            loader=loader,
            health=self.store.health,
            heartbeats=self.store.heartbeats,
            release=__version__,
            instance=instance,
            vault=make_vault(self.store, self.source, kms.audit, f"service {instance}", self.store_id),
        )
        self.rotations = RotationWatch(self.keks, self.store.keys, self.store.rotation_ledger)
        hot = Hot(kms)
        api = Api(
            kms,
            loader,
            settings.limits,
            self.metrics.request,
            self.store.rotation_ledger,
            self.store.audit,
        )
        app = create_app(api, hot)
        if settings.ui:
            operators_page(self, app, api)
        debug = settings.log.level == "debug"
        self.server = Server(
            app=app,
            door=ApiDoor(api, hot, self.metrics.request_at_door, debug=debug) if settings.fast_door else None,
            admin_app=self._admin_app(),
            listen=settings.listen,
            admin=settings.admin,
            limits=replace(settings.limits, max_handshakes=self.part.of(settings.limits.max_handshakes)),
            drain=settings.drain,
            tls=self.tls,
            session_for=self.session_for,
            events=self.events,
            sockets=self.seat.sockets if self.seat else None,
            place=self.place,
        )
        add_gauges(self, cache)
        await self.server.start()
        if self.speaker is not None:
            self._tasks.append(asyncio.create_task(self.speaker.run()))
        await self._meet_store()
        await auditing.begin(settings, self.audit, instance)
        self._started = True
        if self.speaker is not None:
            # Before it is asked: what it said while it started is not true any more.
            self.speaker.say()
        self.place.enter(Stage.SERVING)
        self.upkeep.start()
        self._tasks += [asyncio.create_task(watch.run()) for watch in self._watches]
        self._tasks.append(asyncio.create_task(self.rotations.run()))
        keeping = auditing.keep_up(settings, self.audit, self.store.audit, self.metrics)
        self._tasks.append(asyncio.create_task(keeping))

    async def _meet_store(self) -> None:
        """Wait until the store answers, then check that it is fit and that its keys are under our KEKs."""
        said = ""
        while not self.server.draining:
            status = await self.store.health.check()
            reason = "the store does not answer" if not status.reachable else "; ".join(status.problems)
            try:
                if not reason:
                    for warning in status.warnings:
                        log.warning("store_warning", detail=warning)
                    await self.keks.start(time.time())
                    return
            except OperatorError:
                raise
            except KmsError as error:
                reason = error.detail
            if reason != said:
                log.error("store_not_usable", detail=reason)
                said = reason
            await asyncio.sleep(START_RETRY_SECONDS)

    def _admin_app(self) -> AdminApp:
        if self.seat is None:
            self.speaker = None
            return AdminApp(list, self.unready, self.metrics.render, CONTENT_TYPE)
        self.speaker = Speaker(self.place, self.metrics, self.unready)
        return AdminApp(self.speaker.dead, self.speaker.unready, self.speaker.metrics, CONTENT_TYPE)

    def session_for(self, identity: Identity) -> Session:
        """Return what a connection of ``identity`` may do."""
        return Session(identity, self.policies, time.time)

    def unready(self) -> list[str]:
        """Return why the service is not ready, one line each.

        A store that was reached once and is away is no reason: callers get 503 with Retry-After or an answer
        from memory, and taking every instance out of a Service would turn that into refused connections.
        """
        reasons = []
        if self.server.draining:
            reasons.append("draining")
        status = self.store.health.status
        if not self._started and not status.reachable:
            reasons.append("the store does not answer")
        reasons += [f"store: {problem}" for problem in status.problems]
        if self.keks.problem and (status.reachable or self._started):
            reasons.append(f"kek: {self.keks.problem}")
        if self.tls is not None and self.tls.facts.not_after <= time.time():
            reasons.append("tls: the server certificate has expired")
        return reasons

    async def stop(self) -> None:
        """End in order: drain, then leave the store."""
        self.place.enter(Stage.LEAVING)
        await self.server.drain()
        # Of whoever was cut off meanwhile: what was begun is ended, and its outcome written down.
        await self.kms.creation.settle()
        await self._end_tasks()
        if self._started:
            await self.upkeep.stop()
        await self._close_audit()
        await self.store.close()

    async def abort(self) -> None:
        """End after a failed start."""
        await self.server.abort()
        await self._end_tasks()
        await self._close_audit()
        await self.store.close()

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _close_audit(self) -> None:
        if isinstance(self.audit, ChainedAuditLog):
            await self.audit.close()
        await asyncio.to_thread(self.output.close)

    async def _reload_kek(self) -> None:
        try:
            self.source.reload(self.keks.required())
        except KekFileInvalid as error:
            self.events.reloaded("kek", ok=False, detail=error.detail)
            return
        self.events.reloaded("kek", ok=True, detail="")
        with suppress(KmsError):  # the registry is read again each second anyway
            await self.keks.refresh()

    async def _reload_policy(self) -> None:
        try:
            policy, generation = load_policy(self.settings.policy)
        except PolicyInvalid as error:
            self.events.reloaded("policy", ok=False, detail=error.detail)
            return
        self.policies.replace(policy, generation)
        self.events.reloaded("policy", ok=True, detail="")

    async def _reload_tls(self) -> None:
        if self.tls is not None:
            await self.tls.reload()


async def serve(
    settings: Settings, *, on_ready: Callable[[Addresses], None] | None = None, seat: Seat | None = None
) -> int:
    """Run the service, in this process alone or as one of its workers, until SIGTERM or SIGINT.

    Args:
        settings: The configuration.
        on_ready: Called once when ``/readyz`` would say yes.
        seat: What a worker has been given. It comes with both signals blocked.

    Returns:
        The process's exit code.

    Raises:
        OperatorError: The service can't start as configured.
    """
    configure_logs(settings.log.level, settings.log.format)
    limits = settings.limits
    for line in [
        *harden(),
        allow_descriptors(limits.max_connections + limits.max_handshakes + SPARE_DESCRIPTORS),
    ]:
        if line:
            log.warning("process", detail=line)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if seat is not None:
        # Not before: until there is a handler they would end the process instead of draining it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        structlog.contextvars.bind_contextvars(worker=seat.place.number)
    service = Service(settings, seat)
    starting = asyncio.create_task(service.start())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
    try:
        await starting
    except asyncio.CancelledError:
        stopped.cancel()
        await service.abort()
        return 0
    except OperatorError:
        stopped.cancel()
        await service.abort()
        raise
    spare_what_is_there()
    addresses = Addresses(service.server.tcp_address, service.server.admin_address, service.server.unix_path)
    log.info(
        "serving",
        tcp=addresses.tcp,
        admin=addresses.admin,
        unix=str(addresses.unix or ""),
        release=__version__,
    )
    if on_ready is not None:
        on_ready(addresses)
    await stopped
    log.info("draining", delay=settings.drain.delay)
    await service.stop()
    log.info("stopped")
    return 0
