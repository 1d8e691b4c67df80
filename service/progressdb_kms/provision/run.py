"""One run: passwords, authorities, trust, certificates, and then the KEK, which needs the store."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from progressdb_kms.audit.keyfile import PUBLIC_NAME, new_audit_key
from progressdb_kms.bootstrap import store_settings
from progressdb_kms.domain.errors import (
    ProvisionRefused,
    SettingsInvalid,
    StoreNotDurable,
    StoreUnavailable,
    TlsInvalid,
)
from progressdb_kms.kek.cluster import ApiRefused, connect
from progressdb_kms.kek.escrow import Recipient, load_recipients
from progressdb_kms.provision import certificates
from progressdb_kms.provision.config import (
    Audit,
    Certificate,
    Certificates,
    Copy,
    Passwords,
    Provision,
    Source,
    Store,
)
from progressdb_kms.provision.founding import provide_kek, seal_kek
from progressdb_kms.provision.passwords import ACL_KEY, missing_passwords, render_acl
from progressdb_kms.provision.secrets import Change, Found, Ref, Secrets
from progressdb_kms.settings import Settings, StoreTls, load_settings
from progressdb_kms.store.redis import RedisStore, open_store
from progressdb_kms.transport.issuing import Authority, load_certificates

if TYPE_CHECKING:
    from cryptography import x509

    from progressdb_kms.store.settings import StoreSettings

_POLL: Final = 1.0
"""Seconds between two looks at what is waited for."""


async def run(config: Provision, say: Callable[[str], None]) -> None:
    """Make what is missing and renew what is due. Run again after any interruption, and beside others.

    Args:
        config: What is wanted.
        say: Told each change and each thing that is waited for, in one line.

    Raises:
        ProvisionRefused: Kubernetes refuses; or something is lost, or not ours, or does not come in time.
        KekFileInvalid: The KEK Secret's file can't be used.
        SettingsInvalid: The service's configuration can't be used.
        StoreUnavailable, StoreNotDurable: The store does not answer, or could lose keys, for too long.
    """
    try:
        api_client = await asyncio.to_thread(connect)
    except ApiRefused as error:
        raise ProvisionRefused(error.detail) from None
    with api_client:
        job = _Run(config, Secrets(api_client, say))
        if config.passwords is not None:
            await asyncio.to_thread(job.make_passwords, config.passwords)
        if config.audit is not None:
            await asyncio.to_thread(job.make_audit_key, config.audit)
        await job.make_certificates(config.certificates)
        if config.kek is None:
            return
        ref = job.ref(config.kek.secret)
        if config.store is None:
            await provide_kek(config.kek, ref, job.secrets, None)
            return
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="provision-")))
            settings = load_settings(config.store.config)
            recipients: tuple[Recipient, ...] = ()
            if config.kek.escrow and settings.escrow != "none":
                recipients = load_recipients(settings.escrow.recipients)
            store = await job.open_store(config.store, settings, folder)
            stack.push_async_callback(store.close)
            await provide_kek(config.kek, ref, job.secrets, store.registry)
            if recipients:
                await seal_kek(config.kek, ref, job.secrets, store, recipients)


class _Run:
    """What the parts of a run share."""

    def __init__(self, config: Provision, secrets: Secrets) -> None:
        self._config = config
        self.secrets = secrets

    def ref(self, name: str, namespace: str | None = None) -> Ref:
        """Return a Secret of the release's namespace, or of another one."""
        return Ref(namespace or self._config.namespace, name)

    def make_passwords(self, wanted: Passwords) -> None:
        """Make the passwords that are missing, and the ACL file of all."""

        def change(found: Found | None) -> Change | None:
            data = {} if found is None else found.data
            fresh = missing_passwords(data, wanted.users)
            why = "passwords were missing" if fresh else "the ACL file is another one now"
            if wanted.acl:
                acl = render_acl(wanted.acl, {**data, **fresh})
                if data.get(ACL_KEY) != acl:
                    fresh[ACL_KEY] = acl
            return Change(why, fresh, labels=self._config.labels) if fresh else None

        self.secrets.ensure(self.ref(wanted.secret), change)

    def make_audit_key(self, wanted: Audit) -> None:
        """Make the audit key where there is none; one that is there is never replaced.

        Raises:
            ProvisionRefused: The Secret is there without the key. A new one would vouch for nothing that the
                old one has chained, so it is for somebody to decide.
        """
        ref = self.ref(wanted.secret)

        def change(found: Found | None) -> Change | None:
            if found is None:
                secret, public, _ = new_audit_key()
                return Change(data={wanted.key: secret, PUBLIC_NAME: public}, labels=self._config.labels)
            if not found.data.get(wanted.key, b"").strip():
                raise ProvisionRefused(
                    f"{ref} holds no audit key under {wanted.key}: put it back from its copy; to begin with a"
                    " new one (docs/audit.md), delete the Secret"
                )
            return None

        self.secrets.ensure(ref, change)

    async def make_certificates(self, wanted: Certificates) -> None:
        """Make and renew certificates; what is trusted is written before what is issued under it."""
        end = time.monotonic() + wanted.wait
        authorities = await asyncio.to_thread(self._authorities, wanted)
        for bundle in wanted.bundles:
            trusted = [cert for name in bundle.authorities for cert in authorities[name].certs]
            trusted += await self._trusted(bundle.secrets, end)
            await asyncio.to_thread(self._bundle, bundle.secret, trusted, keep=bool(bundle.secrets))
        for leaf in wanted.certificates:
            authority = authorities[leaf.authority].authority
            trust = [cert for name in leaf.trust for cert in authorities[name].certs]
            await asyncio.to_thread(self._leaf, leaf, authority, trust, wanted.renew_before)
        for copy in wanted.copies:
            await self._copy(copy, end)

    def _authorities(self, wanted: Certificates) -> Mapping[str, certificates.Trusted]:
        found = {}
        for authority in wanted.authorities:
            ref = self.ref(authority.secret)
            change = partial(certificates.authority_change, authority, labels=self._config.labels, now=_now())
            data = self.secrets.ensure(ref, change)
            found[authority.name] = trusted = certificates.read_authority(str(ref), data, _now())
            if warning := certificates.expiry_warning(str(ref), trusted.authority, _now()):
                self.secrets.say(warning)
        return found

    def _leaf(
        self, wanted: Certificate, authority: Authority, trust: Sequence[x509.Certificate], renew_before: int
    ) -> None:
        def change(found: Found | None) -> Change | None:
            return certificates.leaf_change(
                wanted, found, authority, trust, self._config.labels, now=_now(), renew_before=renew_before
            )

        self.secrets.ensure(self.ref(wanted.secret, wanted.namespace), change)

    def _bundle(self, name: str, certs: Sequence[x509.Certificate], *, keep: bool) -> None:
        until = _now() if keep else None
        self.secrets.ensure(
            self.ref(name),
            lambda found: certificates.bundle_change(found, certs, self._config.labels, keep_until=until),
        )

    async def _copy(self, wanted: Copy, end: float) -> None:
        keys = (certificates.CERT, certificates.KEY)
        cert, key = [await self._value(Source(secret=wanted.source, key=name), end) for name in keys]
        trust = await self._trusted(wanted.trust, end)
        source = dict(zip(keys, (cert, key), strict=True))
        await asyncio.to_thread(
            self.secrets.ensure,
            self.ref(wanted.secret, wanted.namespace),
            lambda found: certificates.copy_change(found, source, trust, self._config.labels),
        )

    async def _trusted(self, sources: Iterable[Source], end: float) -> list[x509.Certificate]:
        certs: list[x509.Certificate] = []
        for source in sources:
            data = await self._value(source, end)
            try:
                certs += load_certificates(data)
            except TlsInvalid as error:
                raise ProvisionRefused(f"{self.ref(source.secret)}: {source.key} {error.detail}") from None
        return certs

    async def _value(self, source: Source, end: float) -> bytes:
        """Return a value of a Secret once it is there.

        Raises:
            ProvisionRefused: It is not there in time.
        """
        ref = self.ref(source.secret)
        waiting = False
        while True:
            found = await asyncio.to_thread(self.secrets.get, ref)
            if found is not None and found.data.get(source.key):
                return found.data[source.key]
            if time.monotonic() >= end:
                what = f"{ref} has no {source.key}" if found is not None else f"there is no {ref}"
                raise ProvisionRefused(f"{what} after all the time to wait: does what makes it run?")
            if not waiting:
                self.secrets.say(f"waiting for {source.key} of {ref}")
                waiting = True
            await asyncio.sleep(_POLL)

    async def open_store(self, wanted: Store, settings: Settings, folder: Path) -> RedisStore:
        """Return the store once it answers and is durable.

        Args:
            wanted: How it is reached.
            settings: The service's configuration.
            folder: For the certificates that are read through the API.
        """
        end = time.monotonic() + wanted.wait
        store = await open_store(await self._store_settings(wanted, settings, folder, end))
        try:
            await self._until_durable(store, end)
        except BaseException:
            await store.close()
            raise
        return store

    async def _until_durable(self, store: RedisStore, end: float) -> None:
        said = ""
        while True:
            status = await store.health.check()
            if status.reachable and not status.problems:
                return
            why = "; ".join(status.problems if status.reachable else status.warnings)
            if time.monotonic() >= end:
                problem = StoreNotDurable if status.reachable else StoreUnavailable
                raise problem(f"the store can't be used after all the time to wait: {why}")
            if why != said:
                self.secrets.say(f"waiting for the store: {why}")
                said = why
            await asyncio.sleep(_POLL)

    async def _store_settings(
        self, wanted: Store, settings: Settings, folder: Path, end: float
    ) -> StoreSettings:
        files = {}
        for name in ("ca", "cert", "key"):
            source: Source | None = getattr(wanted, name)
            if source is not None:
                files[name] = folder / name
                _write(files[name], await self._value(source, end))
        section = settings.store
        if files:
            section = msgspec.structs.replace(section, tls=_tls(section.tls, files))
        if wanted.password is None:
            return store_settings(msgspec.structs.replace(settings, store=section))
        section = msgspec.structs.replace(section, password_file=None)
        password = (await self._value(wanted.password, end)).decode("utf-8", "replace").strip()
        found = store_settings(msgspec.structs.replace(settings, store=section))
        return replace(found, password=password)


def _tls(configured: StoreTls | None, files: Mapping[str, Path]) -> StoreTls:
    if configured is not None:
        return msgspec.structs.replace(configured, **files)
    if "ca" not in files:
        raise SettingsInvalid("provisioning: store needs ca, or store.tls.ca in the service's configuration")
    return StoreTls(**files)


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC).replace(microsecond=0)
