"""What ``doctor`` checks: everything that an operator gets wrong, each with what to do about it."""

from __future__ import annotations

import http.client
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from progressdb_kms.bootstrap import expected_store, kek_source, load_policy, store_settings
from progressdb_kms.cli.auditchecks import check_anchor, check_audit
from progressdb_kms.cli.check import Check, Result
from progressdb_kms.cli.kekchecks import check_kept_keys
from progressdb_kms.domain.errors import (
    KekFileInvalid,
    KmsError,
    OperatorError,
    PolicyInvalid,
    SettingsInvalid,
    TlsInvalid,
)
from progressdb_kms.files import read_private
from progressdb_kms.observability.metrics import Metrics
from progressdb_kms.ports import KekSource, StoreStatus
from progressdb_kms.settings import Settings, Tls, load_settings, redact_url
from progressdb_kms.store.redis import RedisStore, open_store
from progressdb_kms.transport.listeners import MAX_UNIX_PATH, listen_tcp
from progressdb_kms.transport.tls import TlsFacts, build_context
from progressdb_kms.usecases.keks import KekBook, empty_store

_EXPIRES_SOON: Final = 14 * 86400
_WILDCARDS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - looked up, not listened on


async def run_checks(config: Path) -> AsyncIterator[Check]:
    """Check a configuration and everything that it names; changes nothing anywhere.

    Args:
        config: The configuration file.

    Yields:
        One result at a time, in an order in which a cause comes before what it causes.
    """
    try:
        settings = load_settings(config)
    except SettingsInvalid as error:
        yield Check(
            "configuration", Result.FAIL, error.detail, f"mend {config}; nothing else can be checked before"
        )
        return
    yield Check("configuration", Result.OK, f"{config} is complete and has no unknown field")
    source: KekSource | None = None
    try:
        source = kek_source(settings)
    except (KekFileInvalid, SettingsInvalid) as error:
        yield Check("kek file", Result.FAIL, error.detail, "mend the file, or restore it from its copy")
    else:
        numbers = ", ".join(map(str, sorted(source.versions())))
        yield Check(
            "kek file", Result.OK, f"{settings.kek.path}: versions {numbers}, readable by its owner only"
        )
        async for check in check_kept_keys(source):
            yield check
    for check in (*_tls(settings), *_policy(settings), *_addresses(settings), *check_audit(settings)):
        yield check
    async for check in _store(settings, source):
        yield check


def _tls(settings: Settings) -> Iterator[Check]:
    tls = settings.tls
    if tls is None:
        yield Check("tls", Result.OK, "not configured: the API is served on the Unix socket only")
        return
    try:
        _, facts, _ = build_context(tls)
    except TlsInvalid as error:
        yield Check("tls", Result.FAIL, error.detail, "mend the file; those of tls belong together")
        return
    yield Check("tls", Result.OK, "certificate, key and client CA can be read, belong together and are valid")
    yield _expiry("server certificate", tls.cert, facts.not_after)
    if not facts.names:
        yield Check(
            "server certificate names",
            Result.FAIL,
            f"{tls.cert} has neither a DNS name nor an IP address (SAN), so no client accepts it",
            "issue it anew with the names that clients call the service by",
        )
    else:
        yield Check("server certificate names", Result.OK, ", ".join(facts.names))
    if not _has_server_usage(tls):
        yield Check(
            "server certificate usage",
            Result.FAIL,
            f"{tls.cert} has no extended key usage serverAuth",
            "issue it anew for servers; some clients refuse it as it is",
        )
    for ca in facts.client_cas:
        yield _expiry(f"client CA {ca.subject}", tls.client_ca, ca.not_after)
    yield from _revocation(tls, facts)


def _revocation(tls: Tls, facts: TlsFacts) -> Iterator[Check]:
    if tls.client_crl is None:
        return
    for crl in facts.crls:
        yield _current(f"revocation list of {crl.issuer}", tls.client_crl, crl.next_update)
    listed = {crl.issuer for crl in facts.crls}
    for ca in facts.client_cas:
        if ca.subject not in listed:
            yield Check(
                f"revocation list of {ca.subject}",
                Result.WARN,
                f"{tls.client_crl} has none, so that none of its certificates can be revoked",
                "add that CA's list to the file",
            )


def _current(check: str, path: Path, next_update: float) -> Check:
    if next_update <= time.time():
        return Check(check, Result.WARN, f"in {path}, past its next update", "fetch the CA's present list")
    return Check(check, Result.OK, f"{path} is current")


def _has_server_usage(tls: Tls) -> bool:
    certificate = x509.load_pem_x509_certificates(tls.cert.read_bytes())[0]
    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return ExtendedKeyUsageOID.SERVER_AUTH in usages


def _expiry(check: str, path: Path, not_after: float) -> Check:
    left = not_after - time.time()
    day = time.strftime("%Y-%m-%d", time.gmtime(not_after))
    if left <= 0:
        return Check(check, Result.WARN, f"in {path}, expired on {day}", "take it out of the file")
    if left < _EXPIRES_SOON:
        return Check(
            check, Result.WARN, f"{path} expires on {day}", "renew it; the service takes it up by itself"
        )
    return Check(check, Result.OK, f"{path} is valid until {day}")


def _policy(settings: Settings) -> Iterator[Check]:
    try:
        policy, _ = load_policy(settings.policy)
    except PolicyInvalid as error:
        yield Check("policy", Result.FAIL, error.detail, "mend the file")
        return
    if not policy.rules:
        yield Check(
            "policy",
            Result.FAIL,
            f"{settings.policy} has no rule, so everyone is refused",
            "grant someone something",
        )
        return
    yield Check("policy", Result.OK, f"{settings.policy}: {len(policy.rules)} rules")


def _addresses(settings: Settings) -> Iterator[Check]:
    listen, admin = settings.listen, settings.admin
    running = _is_running(admin.host, admin.port)
    if listen.host is not None:
        yield _port("listen", listen.host, listen.port, running=running)
    yield _port("admin", admin.host, admin.port, running=running)
    if listen.unix is None:
        return
    path = listen.unix.path
    if len(os.fsencode(path)) > MAX_UNIX_PATH:
        detail, action = (
            f"{path} is over {MAX_UNIX_PATH} bytes, more than a socket may have",
            "choose a shorter path",
        )
    elif not path.parent.is_dir():
        detail, action = f"the directory {path.parent} does not exist", f"make it: mkdir -p {path.parent}"
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        detail, action = (
            f"this user can't make a socket in {path.parent}",
            "give it the right, or choose another path",
        )
    else:
        yield Check("listen.unix", Result.OK, f"{path} can be made")
        return
    yield Check("listen.unix", Result.FAIL, detail, action)


def _port(what: str, host: str, port: int, *, running: bool) -> Check:
    try:
        listen_tcp(host, port, what).close()
    except SettingsInvalid as error:
        if running:
            return Check(what, Result.OK, f"{host} port {port} is in use; the service runs")
        return Check(what, Result.FAIL, error.detail, "stop what has it, or choose another port")
    return Check(what, Result.OK, f"{host} port {port} is free" if port else f"{host}, any free port")


def _is_running(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(_WILDCARDS.get(host, host), port, timeout=1)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


async def _store(settings: Settings, source: KekSource | None) -> AsyncIterator[Check]:
    password_file = settings.store.password_file
    if password_file is not None:
        try:
            read_private(password_file, error=SettingsInvalid)
        except SettingsInvalid as error:
            yield Check("store.password_file", Result.WARN, error.detail, "let only the service read it")
    try:
        store = await open_store(store_settings(settings))
    except OperatorError as error:
        yield Check("store", Result.FAIL, error.detail, "mend the store's settings")
        return
    try:
        status = await store.health.check()
        for check in _health(settings, status):
            yield check
        if status.reachable and source is not None:
            yield await _registry(settings, store, source)
        if status.reachable and settings.audit.key_file is not None:
            async for check in check_anchor(settings, store):
                yield check
    finally:
        await store.close()


def _health(settings: Settings, status: StoreStatus) -> Iterator[Check]:
    url = redact_url(settings.store.url)
    if not status.reachable:
        why = "; ".join(status.warnings) or "no answer"
        yield Check("store", Result.FAIL, f"{url}: {why}", "start it, or mend store.url and its credentials")
        return
    yield Check(
        "store", Result.OK, f"{url} answers: {', '.join(f'{k} {v}' for k, v in status.facts.items())}"
    )
    for problem in status.problems:
        yield Check("store durability", Result.FAIL, problem, "nothing is written to it until this is mended")
    for warning in status.warnings:
        yield Check("store", Result.WARN, warning)
    if not status.problems and not settings.store.allow_data_loss:
        yield Check(
            "store durability", Result.OK, "an acknowledged key survives a power cut, and is never evicted"
        )


async def _registry(settings: Settings, store: RedisStore, source: KekSource) -> Check:
    """Compare the loaded KEKs with those that the store's keys are wrapped under."""
    name = "kek registry"
    try:
        store_id = expected_store(settings)
    except SettingsInvalid as error:
        return Check(name, Result.FAIL, error.detail, "write the store's id there, or leave it out")
    book = KekBook(source=source, registry=store.registry, observer=Metrics(), store_id=store_id)
    try:
        if await store.registry.load() is None:
            if store_id:
                return Check(name, Result.FAIL, empty_store(store_id), "bring the store's data back")
            return Check(
                name, Result.OK, f"the store is empty; version {max(source.versions())} will be its first"
            )
        await book.refresh()
    except KmsError as error:
        return Check(name, Result.FAIL, error.detail, "restore the store's data")
    if book.problem:
        action = "use the KEK file that belongs to this store, or the store that belongs to this file"
        return Check(name, Result.FAIL, book.problem, action)
    return Check(name, Result.OK, f"active version {book.active}; every version that keys need is loaded")
