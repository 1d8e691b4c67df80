"""What ``provision`` makes: one YAML file, parsed once, frozen, unknown fields refused.

Relative paths are relative to the file.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from progressdb_kms.audit.keyfile import KEY_NAME, PUBLIC_NAME
from progressdb_kms.domain.errors import SettingsInvalid
from progressdb_kms.provision.passwords import unknown_users
from progressdb_kms.transport.issuing import MAX_COMMON_NAME, Names
from progressdb_kms.yamlfile import read_yaml, typed

Namespace = Annotated[str, Meta(pattern="^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
SecretName = Annotated[str, Meta(pattern="^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
DataKey = Annotated[str, Meta(pattern="^[-._a-zA-Z0-9]{1,253}$")]
User = Annotated[str, Meta(pattern="^[a-z0-9][-_a-z0-9]{0,62}$")]
CommonName = Annotated[str, Meta(max_length=MAX_COMMON_NAME)]
DnsName = Annotated[str, Meta(pattern=r"^(\*\.)?[a-zA-Z0-9_]([a-zA-Z0-9_.-]{0,250}[a-zA-Z0-9])?$")]
Uri = Annotated[str, Meta(pattern=r"^[a-zA-Z][a-zA-Z0-9+.-]*:[!-~]{1,2000}$")]
Wait = Annotated[float, Meta(ge=0, le=3600)]
LeafDays = Annotated[int, Meta(ge=1, le=825)]
CaDays = Annotated[int, Meta(ge=1, le=36500)]


class _Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the file."""


class Source(_Section, frozen=True, kw_only=True):
    """A value in a Secret of the release's namespace."""

    secret: SecretName
    key: DataKey


class Store(_Section, frozen=True, kw_only=True):
    """The store, as the service reaches it.

    Attributes:
        config: The service's configuration; its ``store`` section is used.
        wait: Seconds for the Secrets below to exist, and for the store to answer and be durable.
        password: Read through the API in place of ``store.password_file``: this run may have to make it.
        ca: Likewise in place of ``store.tls.ca``.
        cert: In place of ``store.tls.cert``.
        key: In place of ``store.tls.key``.
    """

    config: Path
    wait: Wait = 300
    password: Source | None = None
    ca: Source | None = None
    cert: Source | None = None
    key: Source | None = None


class Kek(_Section, frozen=True, kw_only=True):
    """The Secret with the KEK file.

    Attributes:
        secret: Its name.
        key: The key in it that is the KEK file.
        store_id_key: The key in it that says which store the KEK belongs to.
        management: ``create`` makes what is missing; ``require`` only checks.
        annotations: Put on the Secret when it is made.
        escrow: Seal the KEK to the recovery keys that the service's configuration names, so that it is not
            only in the Secret until the first rotation.
    """

    secret: SecretName
    key: DataKey = "kek.yaml"
    store_id_key: DataKey = "store-id"
    management: Literal["create", "require"]
    annotations: dict[str, str] = {}
    escrow: bool = False


class Passwords(_Section, frozen=True, kw_only=True):
    """Passwords of the store's users, and the ACL file that names their digests.

    Attributes:
        secret: The Secret; each user has a key in it.
        users: Their names.
        acl: Template of the key ``users.acl``: ``#{user}`` becomes ``#`` and the SHA-256 of the password.
    """

    secret: SecretName
    users: Annotated[tuple[User, ...], Meta(min_length=1)]
    acl: str = ""


class Audit(_Section, frozen=True, kw_only=True):
    """The Secret with the audit key and, under ``audit.pub``, its public half for whoever verifies.

    Attributes:
        secret: Its name.
        key: The key in it that is the audit key's file.
    """

    secret: SecretName
    key: DataKey = KEY_NAME

    def __post_init__(self) -> None:
        if self.key == PUBLIC_NAME:
            raise ValueError(f"key can't be {PUBLIC_NAME}, which is for the public half")


class Authority(_Section, frozen=True, kw_only=True):
    """A CA of this release: a Secret with ``tls.crt`` and ``tls.key``."""

    name: Annotated[str, Meta(min_length=1)]
    secret: SecretName
    common_name: Annotated[str, Meta(min_length=1, max_length=MAX_COMMON_NAME)]
    days: CaDays = 3650


class Bundle(_Section, frozen=True, kw_only=True):
    """Trust without a key: a Secret with ``ca.crt``.

    Attributes:
        secret: Its name.
        authorities: CAs of this release.
        secrets: CA certificates in Secrets of others. A bundle of such keeps what it held until that expires.
    """

    secret: SecretName
    authorities: tuple[str, ...] = ()
    secrets: tuple[Source, ...] = ()


class Certificate(_Section, frozen=True, kw_only=True):
    """A certificate under a CA of this release: a Secret with ``tls.crt`` and ``tls.key``.

    Attributes:
        secret: Its name.
        namespace: Where; none for the release's own.
        authority: The CA's name.
        usage: For a server or for a client.
        common_name: Of the subject.
        dns: DNS names.
        ip: IP addresses.
        uri: URIs.
        days: How long it is valid.
        keep_key: Renewals keep the private key, for clients whose public key is pinned.
        trust: CAs whose certificates go into ``ca.crt`` of the Secret.
    """

    secret: SecretName
    namespace: Namespace | None = None
    authority: str
    usage: Literal["server", "client"]
    common_name: CommonName = ""
    dns: tuple[DnsName, ...] = ()
    ip: tuple[str, ...] = ()
    uri: tuple[Uri, ...] = ()
    days: LeafDays = 90
    keep_key: bool = False
    trust: tuple[str, ...] = ()

    @property
    def names(self) -> Names:
        """Whom it is for."""
        return Names(self.usage, self.common_name, self.dns, self.ip, self.uri)


class Copy(_Section, frozen=True, kw_only=True):
    """A certificate that something else issues, handed to another namespace.

    Attributes:
        source: Its Secret in the release's namespace; ``from`` in the file.
        secret: The Secret to keep the same.
        namespace: Where.
        trust: CA certificates for ``ca.crt``.
    """

    source: SecretName = msgspec.field(name="from")
    secret: SecretName
    namespace: Namespace
    trust: tuple[Source, ...] = ()


class Certificates(_Section, frozen=True, kw_only=True):
    """Certificates and trust.

    Attributes:
        renew_before: Days before its end at which a certificate is renewed.
        wait: Seconds for Secrets of others to exist.
        authorities: CAs.
        bundles: Trust.
        certificates: Certificates under these CAs.
        copies: Certificates of others for other namespaces.
    """

    renew_before: Annotated[int, Meta(ge=0, le=365)] = 30
    wait: Wait = 300
    authorities: tuple[Authority, ...] = ()
    bundles: tuple[Bundle, ...] = ()
    certificates: tuple[Certificate, ...] = ()
    copies: tuple[Copy, ...] = ()


class Provision(_Section, frozen=True, kw_only=True):
    """The whole file.

    Attributes:
        namespace: Of the release.
        labels: Put on the Secrets that are made, but on the KEK's, which no tool may take for its own.
    """

    namespace: Namespace
    labels: dict[str, str] = {}
    store: Store | None = None
    kek: Kek | None = None
    audit: Audit | None = None
    passwords: Passwords | None = None
    certificates: Certificates = msgspec.field(default_factory=Certificates)


def load_config(path: Path) -> Provision:
    """Read and check a file.

    Raises:
        SettingsInvalid: Says what is wrong, where, and what to change.
    """
    return parse_config(read_yaml(path, SettingsInvalid, "the provisioning file"), path.parent)


def parse_config(document: Any, base: Path) -> Provision:  # noqa: ANN401 - whatever a YAML file may hold
    """Check a document; relative paths become relative to ``base``.

    Raises:
        SettingsInvalid: Says what is wrong, where, and what to change.
    """
    config = typed(document, Provision, base, SettingsInvalid, "provisioning")
    for problem in _problems(config):
        raise SettingsInvalid(f"provisioning: {problem}")
    return config


def _problems(config: Provision) -> Iterator[str]:
    """Yield what no single field shows."""
    store, kek, passwords = config.store, config.kek, config.passwords
    if kek is not None:
        if kek.management == "create" and store is None:
            yield "kek.management create needs store: a KEK is made only for a store that is empty"
        if kek.escrow and store is None:
            yield "kek.escrow needs store: what is sealed is kept there"
        if kek.key == kek.store_id_key:
            yield "kek.key and kek.store_id_key are the same"
    if store is not None and (store.cert is None) != (store.key is None):
        yield "store needs cert and key together, or neither"
    if passwords is not None:
        for user in unknown_users(passwords.acl, passwords.users):
            yield f"passwords.acl names the user {user}, which is not in passwords.users"
    yield from _certificate_problems(config.certificates)
    seen: set[tuple[str, str]] = set()
    for target in _targets(config):
        if target in seen:
            yield f"two things are to be written to the Secret {'/'.join(target)}"
        seen.add(target)


def _targets(config: Provision) -> Iterator[tuple[str, str]]:
    """Yield namespace and name of each Secret that may be written."""
    wanted = config.certificates
    if config.kek is not None:
        yield config.namespace, config.kek.secret
    if config.audit is not None:
        yield config.namespace, config.audit.secret
    if config.passwords is not None:
        yield config.namespace, config.passwords.secret
    for authority in wanted.authorities:
        yield config.namespace, authority.secret
    for bundle in wanted.bundles:
        yield config.namespace, bundle.secret
    for certificate in wanted.certificates:
        yield certificate.namespace or config.namespace, certificate.secret
    for copy in wanted.copies:
        yield copy.namespace, copy.secret


def _certificate_problems(wanted: Certificates) -> Iterator[str]:
    known = [authority.name for authority in wanted.authorities]
    if len(known) != len(set(known)):
        yield "two authorities have one name"
    for bundle in wanted.bundles:
        if not bundle.authorities and not bundle.secrets:
            yield f"the bundle {bundle.secret} trusts nobody; give authorities or secrets"
        yield from _unknown(bundle.secret, bundle.authorities, known)
    for certificate in wanted.certificates:
        yield from _unknown(certificate.secret, (certificate.authority, *certificate.trust), known)
        if certificate.days <= wanted.renew_before:
            yield (
                f"{certificate.secret} is valid for {certificate.days} days and would be renewed"
                f" {wanted.renew_before} days before its end: days must be more than renew_before"
            )
        yield from _name_problems(certificate)


def _unknown(secret: str, names: tuple[str, ...], known: list[str]) -> Iterator[str]:
    for name in names:
        if name not in known:
            yield f"{secret} names the authority {name}, which there is none of"


def _name_problems(certificate: Certificate) -> Iterator[str]:
    secret = certificate.secret
    for entry in certificate.ip:
        try:
            ipaddress.ip_address(entry)
        except ValueError:
            yield f"{secret}: {entry} is not an IP address"
    if certificate.usage == "server":
        if not certificate.dns and not certificate.ip:
            yield f"{secret} is for a server and has neither a DNS name nor an IP address"
        return
    # What the service takes as a client's name (docs/configuration.md): one, or it refuses the client.
    spiffe = any(re.match("spiffe:", uri, re.IGNORECASE) for uri in certificate.uri)
    if spiffe and len(certificate.uri) > 1:
        yield f"{secret}: a client with a SPIFFE URI has that one and no other"
    elif not spiffe and len(certificate.dns) > 1:
        yield f"{secret}: a client has one DNS name, which is its identity"
    elif not spiffe and not certificate.dns and not certificate.common_name:
        yield f"{secret} is for a client and has no name: give a SPIFFE URI, a DNS name or a common name"
