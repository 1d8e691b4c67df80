"""The service's configuration: one YAML file, parsed once, frozen, unknown fields refused.

Relative paths are relative to the configuration file. Times are seconds, sizes are bytes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from progressdb_kms.domain.errors import SettingsInvalid
from progressdb_kms.settings.kek import Kek, check_kek
from progressdb_kms.settings.section import Count, Port, Seconds, SecondsOrZero, Section
from progressdb_kms.yamlfile import read_yaml, typed


class UnixListen(Section, frozen=True, kw_only=True):
    """A Unix socket beside the TCP port. A peer is let in by SO_PEERCRED, its identity is ``uid:<n>``.

    Attributes:
        path: Where the socket is made, beside TCP or instead of it.
        mode: Octal file mode, as a string.
        group: Name or number of the socket's group; none leaves the process's own.
        allow_uids: Peers by user id.
        allow_gids: Peers by (primary) group id.
    """

    path: Path
    mode: Annotated[str, Meta(pattern="^0?[0-7]{3}$")] = "0660"
    group: str | None = None
    allow_uids: tuple[int, ...] = ()
    allow_gids: tuple[int, ...] = ()


class Listen(Section, frozen=True, kw_only=True):
    """Where the API is served.

    Attributes:
        host: Address of the API; ``null`` serves the Unix socket only.
        port: Its port; 0 for any free one.
        unix: The Unix socket; without this section there is none.
    """

    host: str | None = "0.0.0.0"  # noqa: S104 - a pod's address is not known before it runs; callers need a certificate
    port: Port = 8443
    unix: UnixListen | None = None


class Admin(Section, frozen=True, kw_only=True):
    """Plain HTTP for probes and metrics only: ``/livez``, ``/readyz``, ``/metrics``.

    Attributes:
        host: Its address.
        port: Its port; 0 for any free one.
    """

    host: str = "0.0.0.0"  # noqa: S104 - the kubelet and Prometheus call from outside the pod; nothing secret is served
    port: Port = 9090


class Tls(Section, frozen=True, kw_only=True):
    """Certificates of the API, in PEM files. Needed for TCP, which is never served without them.

    Attributes:
        cert: The server's certificate, with its chain.
        key: Its key. The file must be private like the KEK file.
        client_ca: Bundle of the CAs that client certificates may come from, and no others.
        client_crl: The revocation lists of these CAs, one after the other. Without it nothing is checked for
            revocation.
        require_current_crl: ``true``: past a list's next update nobody gets in until a newer one is there.
            ``false``: the last list goes on counting.
    """

    cert: Path
    key: Path
    client_ca: Path
    client_crl: Path | None = None
    require_current_crl: bool = False


class StoreTls(Section, frozen=True, kw_only=True):
    """TLS towards the store.

    Attributes:
        ca: CA bundle of the store's certificate.
        cert: Client certificate, where the store asks for one.
        key: Its key.
    """

    ca: Path
    cert: Path | None = None
    key: Path | None = None


class Store(Section, frozen=True, kw_only=True):
    """The Redis or Valkey that holds the keys.

    Attributes:
        url: ``redis://``, ``rediss://`` (TLS), ``unix:///path?db=0``, ``redis+sentinel://h1:p,h2:p/name``,
            ``redis+cluster://h1:p,h2:p``, and with ``rediss+`` the last two over TLS.
        username: ACL user.
        password_file: File with the password, so that it stands in no configuration.
        id_file: File with the id of the store that the KEK belongs to (``provision`` writes it beside the
            KEK). With it a service makes no registry in an empty store: it stays unready until the data is
            back. A store with another id is refused, by every command too.
        tls: Needed with TLS.
        durability: ``checked`` asks the store; ``attested`` takes your word for what a managed store does not
            let us ask.
        attested_reason: Why that word can be taken; needed with ``attested``, and written to the audit log.
        allow_data_loss: Serve on a store that can lose acknowledged keys. For trying things out only; warns
            at every start.
        min_replicas: Replicas that must confirm each write; at least 1 wherever one can be promoted.
        connect_timeout: To open a connection.
        command_timeout: For one round trip.
    """

    url: str
    username: str | None = None
    password_file: Path | None = None
    id_file: Path | None = None
    tls: StoreTls | None = None
    durability: Literal["checked", "attested"] = "checked"
    attested_reason: str = ""
    allow_data_loss: bool = False
    min_replicas: Annotated[int, Meta(ge=0, le=5)] = 0
    connect_timeout: Seconds = 1.0
    command_timeout: Seconds = 2.0

    def __repr__(self) -> str:
        return f"Store(url={redact_url(self.url)!r}, durability={self.durability!r})"


class Limits(Section, frozen=True, kw_only=True):
    """Bounds on what a caller can make the service do.

    Attributes:
        max_connections: Established connections; further ones are closed at once.
        max_handshakes: TLS handshakes under way; the oldest gives way to a new one.
        handshake_timeout: To finish a TLS handshake.
        header_timeout: From a request's first byte to the end of its headers.
        body_timeout: From the end of the headers to the end of the body.
        request_timeout: From the end of the body to the answer.
        write_timeout: For the peer to take an answer.
        idle_timeout: A connection without a request.
        max_connection_age: After it, give or take 20 %, the next answer closes the connection, so that
            clients spread to new replicas.
        header_bytes: All of a request's headers.
        body_bytes: A single request's body.
        batch_body_bytes: A batch's body.
        plaintext_bytes: One plaintext.
        batch_items: Items of a batch.
    """

    max_connections: Count = 4096
    max_handshakes: Count = 256
    handshake_timeout: Seconds = 5
    header_timeout: Seconds = 10
    body_timeout: Seconds = 20
    request_timeout: Seconds = 10
    write_timeout: Seconds = 20
    idle_timeout: Seconds = 75
    max_connection_age: Seconds = 600
    header_bytes: Annotated[int, Meta(ge=1024, le=65536)] = 16384
    body_bytes: Annotated[int, Meta(ge=1024, le=64 * 2**20)] = 2 * 2**20
    batch_body_bytes: Annotated[int, Meta(ge=1024, le=64 * 2**20)] = 16 * 2**20
    plaintext_bytes: Annotated[int, Meta(ge=1, le=16 * 2**20)] = 2**20
    batch_items: Annotated[int, Meta(ge=1, le=100_000)] = 10_000


class Cache(Section, frozen=True, kw_only=True):
    """Unwrapped keys in memory.

    Attributes:
        max_keys: At most so many; the least recently used go first.
        ttl: A key is read again after this time even if nothing changed.
        max_stale: While the store does not answer at all, go on with cached keys for so long; 0 is never.
    """

    max_keys: Count = 100_000
    ttl: Seconds = 300
    max_stale: SecondsOrZero = 30


class Drain(Section, frozen=True, kw_only=True):
    """How the service ends at SIGTERM: it is unready at once.

    Attributes:
        delay: Serve for so long while the cluster takes notice.
        timeout: Then finish what is under way within this.
    """

    delay: SecondsOrZero = 5
    timeout: Seconds = 20


class Destruction(Section, frozen=True, kw_only=True):
    """Destruction of data keys.

    Attributes:
        waiting_days: Days that a scheduled destruction waits where the caller names none.
    """

    waiting_days: Annotated[int, Meta(ge=7, le=30)] = 30


class KubernetesSecret(Section, frozen=True, kw_only=True):
    """The one Secret that the KEK file is mounted from.

    Attributes:
        namespace: Its namespace.
        secret: Its name.
        key: The key in it that is the KEK file.
    """

    namespace: Annotated[str, Meta(pattern="^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
    secret: Annotated[str, Meta(pattern="^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
    key: Annotated[str, Meta(pattern="^[-._a-zA-Z0-9]{1,253}$")] = "kek.yaml"


class Rotation(Section, frozen=True, kw_only=True):
    """How the rotation job goes about its work; options of the command override it.

    Attributes:
        distribute: ``patch``: the rotation adds the new KEK version at its source. ``external``: it never
            writes, and takes the version that you add.
        kubernetes: The Secret, for ``kek.management: kubernetes``.
        wait: For all live instances, and the job's own KEK file, to show the new version.
        batch: Records in one call of the store: more make a rotation no faster, and live requests that need
            the store wait longer behind it.
        max_rate: Records a second, 0 for as many as will go.
        events: Write Kubernetes Events about rotations and backups, regarding the job's pod: needs
            ``POD_NAME``, ``POD_NAMESPACE``, ``POD_UID`` in the environment, and the right to create events.
    """

    distribute: Literal["patch", "external"] = "patch"
    kubernetes: KubernetesSecret | None = None
    wait: SecondsOrZero = 120
    batch: Annotated[int, Meta(ge=1, le=1000)] = 128
    max_rate: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    events: bool = False


class Escrow(Section, frozen=True, kw_only=True):
    """Copies of the KEK for recovery. With ``escrow: none``, the default, every rotation warns.

    Attributes:
        recipients: Recovery public keys (X25519, PEM; ``kek escrow keygen``) that each KEK version is sealed
            to.
    """

    recipients: Annotated[tuple[Path, ...], Meta(min_length=1)]


class Audit(Section, frozen=True, kw_only=True):
    """What is written down of decisions on keys, and where.

    Attributes:
        key_file: The audit key (``audit keygen``): records are chained and anchored. Without it they are only
            printed, and nothing vouches for them. Read at the start.
        previous_keys: Public halves of keys that were used before this one, while the store holds their
            chains.
        stdout: Print records on standard output; commands on standard error.
        stream: With a key, keep records in the store's stream too: a change is refused if that can't be done.
        stream_records: About so many stay there, 490 bytes of its memory each; older ones are trimmed behind
            a signed checkpoint.
        directory: With a key, write records to files here too, fsynced: a change is refused if that can't be
            done.
        file_bytes: Size after which the next file is begun.
        data_plane: Encryptions and decryptions: not at all, counted per caller, or each.
        data_plane_interval: For how long they are counted.
    """

    key_file: Path | None = None
    previous_keys: tuple[Path, ...] = ()
    stdout: bool = True
    stream: bool = True
    stream_records: Annotated[int, Meta(ge=1000, le=100_000_000)] = 100_000
    directory: Path | None = None
    file_bytes: Annotated[int, Meta(ge=4096, le=2**40)] = 64 * 2**20
    data_plane: Literal["off", "counted", "each"] = "off"
    data_plane_interval: Seconds = 60


class Log(Section, frozen=True, kw_only=True):
    """The log, on standard error.

    Attributes:
        level: ``debug`` logs each request, never its content.
        format: ``json``, one object a line, or ``text``, coloured for people.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "json"


class Settings(Section, frozen=True, kw_only=True):
    """The whole configuration file.

    Attributes:
        listen: Where the API is served.
        fast_door: Answer ordinary requests for hot routes on the spot; off, all go through the framework, in
            some ten times the CPU time and with the same answers.
        workers: Processes that serve, each able to use a core. Limits count for all of them together.
        ui: Serve the page for operators, under ``/ui/`` of the API.
        admin: Probes and metrics.
        tls: Certificates of the API.
        policy: The policy file: who may do what.
        kek: Where key-encryption keys come from.
        store: Where data keys are kept.
        limits: Bounds on callers.
        cache: Unwrapped keys in memory.
        drain: The end of the process.
        destruction: Destruction of data keys.
        rotation: Rotations of the KEK.
        escrow: Copies of the KEK for recovery, or ``none``.
        audit: The audit log.
        log: The log.
    """

    workers: Annotated[int, Meta(ge=1, le=64)] = 1
    listen: Listen = msgspec.field(default_factory=Listen)
    fast_door: bool = True
    ui: bool = False
    admin: Admin = msgspec.field(default_factory=Admin)
    tls: Tls | None = None
    policy: Path
    kek: Kek
    store: Store
    limits: Limits = msgspec.field(default_factory=Limits)
    cache: Cache = msgspec.field(default_factory=Cache)
    drain: Drain = msgspec.field(default_factory=Drain)
    destruction: Destruction = msgspec.field(default_factory=Destruction)
    rotation: Rotation = msgspec.field(default_factory=Rotation)
    escrow: Escrow | Literal["none"] = "none"
    audit: Audit = msgspec.field(default_factory=Audit)
    log: Log = msgspec.field(default_factory=Log)


def redact_url(url: str) -> str:
    """Return a store URL without the password and the parameters that it may hold."""
    head, _, query = url.partition("?")
    scheme, separator, rest = head.partition("://")
    # The last @: a password may hold one itself.
    secret, at, hosts = rest.rpartition("@")
    user, colon, _ = secret.partition(":")
    return scheme + separator + user + (":***" if colon else "") + at + hosts + ("?***" if query else "")


def load_settings(path: Path) -> Settings:
    """Read and check a configuration file.

    Raises:
        SettingsInvalid: Says what is wrong, where, and what to change.
    """
    return parse_settings(read_yaml(path, SettingsInvalid, "the configuration"), path.parent)


def parse_settings(document: Any, base: Path) -> Settings:  # noqa: ANN401 - whatever a YAML file may hold
    """Check a configuration document; relative paths become relative to ``base``.

    Raises:
        SettingsInvalid: Says what is wrong, where, and what to change.
    """
    settings = typed(document, Settings, base, SettingsInvalid, "configuration")
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    check_kek(settings.kek)
    _check_shares(settings)
    listen, store, limits = settings.listen, settings.store, settings.limits
    if limits.body_bytes < limits.plaintext_bytes * 4 // 3 + 1024:
        raise SettingsInvalid(
            "configuration: limits.body_bytes is too small for limits.plaintext_bytes in base64: "
            "give it a third more and 1024"
        )
    if listen.host is None and listen.unix is None:
        raise SettingsInvalid("configuration: listen needs a host, or a unix socket, or both")
    if listen.host is not None and settings.tls is None:
        raise SettingsInvalid(
            "configuration: tls is missing; the API is never served over TCP without certificates"
        )
    if listen.unix is not None and not (listen.unix.allow_uids or listen.unix.allow_gids):
        raise SettingsInvalid("configuration: listen.unix lets nobody in; give allow_uids or allow_gids")
    if not re.match(r"(rediss?(\+sentinel|\+cluster)?|unix)://", store.url):
        raise SettingsInvalid(
            "configuration: store.url must begin with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"
        )
    if store.durability == "attested" and not store.attested_reason.strip():
        raise SettingsInvalid(
            "configuration: store.durability attested needs store.attested_reason: why is it durable?"
        )
    if store.tls is not None and (store.tls.cert is None) != (store.tls.key is None):
        raise SettingsInvalid("configuration: store.tls needs cert and key together, or neither")
    if settings.audit.directory is not None and settings.audit.key_file is None:
        raise SettingsInvalid(
            "configuration: audit.directory needs audit.key_file: without it nothing vouches for the files"
            " (audit keygen makes one)"
        )
    rotation = settings.rotation
    if (
        settings.kek.management == "kubernetes"
        and rotation.distribute == "patch"
        and rotation.kubernetes is None
    ):
        raise SettingsInvalid(
            "configuration: kek.management kubernetes needs rotation.kubernetes: which Secret holds the"
            " KEK file?"
        )


def _check_shares(settings: Settings) -> None:
    limits, cache = settings.limits, settings.cache
    for name, total in (
        ("limits.max_connections", limits.max_connections),
        ("limits.max_handshakes", limits.max_handshakes),
        ("cache.max_keys", cache.max_keys),
    ):
        if total < settings.workers:
            raise SettingsInvalid(
                f"configuration: {name} is for all {settings.workers} workers together: at least one each"
            )
