"""Adds a KEK version to the Kubernetes Secret that the KEK file is mounted from; the port ``KekStager``.

One Secret by its name, which needs the verbs get and patch on it alone. The change is a compare-and-set by
``resourceVersion`` and only ever adds a version. A Secret that something else keeps (GitOps, External
Secrets) is never changed: the next reconciliation would take the new KEK away, and with it all that was
wrapped under it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kubernetes import client

from progressdb_kms.domain.errors import KekFileInvalid, RotationRefused
from progressdb_kms.domain.keyring import KEK_BYTES
from progressdb_kms.kek.cluster import CONFLICT, TIMEOUT, ApiRefused, called, connect
from progressdb_kms.kek.escrow import Escrow
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.kek.keyfile import Entry, parse_entries, read_entries, render_entries, same_entry
from progressdb_kms.kek.staging import appears

_TRIES: Final = 5
MADE_BY: Final = "progressdb-kms.io/made-by"
"""Annotation of Secrets that ``provision`` made; its value is ``provision``."""
_INSTRUCTIONS: Final = {"argocd.argoproj.io/sync-options", "argocd.argoproj.io/compare-options"}
"""Annotations that tell Argo CD to leave a Secret alone."""
_KEEPERS: Final = {
    "argocd.argoproj.io/": "Argo CD",
    "kustomize.toolkit.fluxcd.io/": "Flux",
    "helm.toolkit.fluxcd.io/": "Flux",
    "reconcile.external-secrets.io/": "External Secrets",
}
_MANAGERS: Final = {
    "external-secrets": "External Secrets",
    "fluxcd": "Flux",
    "flux": "Flux",
    "argocd": "Argo CD",
}


@dataclass(frozen=True, slots=True)
class SecretRef:
    """Which Secret, and which key in it holds the KEK file."""

    namespace: str
    secret: str
    key: str

    def __str__(self) -> str:
        return f"Secret {self.namespace}/{self.secret}"


class KubernetesKekStager:
    """Adds the version to the Secret, then waits until the mounted file shows it.

    Args:
        ref: The Secret.
        source: The KEK source over the mounted file.
        required: Gives the check values of the versions that a reload must not lose or change.
        escrow: Seals versions.
        wait: Seconds that the mounted file has to show the version.
    """

    def __init__(
        self,
        ref: SecretRef,
        source: FileKekSource,
        required: Callable[[], Mapping[int, str]],
        escrow: Escrow,
        wait: float,
    ) -> None:
        self._ref = ref
        self._source = source
        self._required = required
        self._escrow = escrow
        self._wait = wait

    async def stage(self, version: int) -> None:
        """Make sure that the Secret holds ``version`` and that it is loaded here.

        Raises:
            RotationRefused: Something else keeps the Secret; or Kubernetes refused; or the mounted file
                does not show the version in time.
            KekFileInvalid: What the Secret or the file holds can't be used.
        """
        self._source.reload(self._required())
        if version in self._source.versions():
            return
        loaded = read_entries(self._source.path)
        await asyncio.to_thread(add_to_secret, self._ref, version, loaded)
        if not await appears(self._source, self._required, version, self._wait):
            raise RotationRefused(
                f"{self._ref} holds KEK version {version}, but {self._source.path} does not show it after"
                f" {self._wait:.0f} s: is that file mounted from it (and not by subPath)? Run again"
            )

    async def escrow(self, version: int) -> int:
        """Seal the version and those that are not sealed yet; return the number of recovery keys."""
        return await self._escrow.complete(version)


def add_to_secret(ref: SecretRef, version: int, loaded: Mapping[int, Entry], entry: Entry = b"") -> None:
    """Add a version to the KEK file in a Secret; one that is there is adopted.

    Args:
        ref: The Secret.
        version: The version to add.
        loaded: What the mounted file holds. The Secret must hold the same: if not, the file is not mounted
        from
            it.
        entry: What it holds for the version; without it a fresh random key.

    Raises:
        RotationRefused, KekFileInvalid: As ``KubernetesKekStager.stage``.
    """
    try:
        _add(ref, version, loaded, entry or os.urandom(KEK_BYTES))
    except ApiRefused as error:
        role = "; the job's role needs get and patch on it" if error.status else ""
        raise RotationRefused(error.detail + role) from None


def _add(ref: SecretRef, version: int, loaded: Mapping[int, Entry], entry: Entry) -> None:
    with connect() as api_client:
        api = client.CoreV1Api(api_client)
        for _ in range(_TRIES):
            secret = called(
                str(ref),
                "get",
                lambda: api.read_namespaced_secret(ref.secret, ref.namespace, _request_timeout=TIMEOUT),
            )
            entries = _entries(ref, secret.data or {})
            _require_same(ref, entries, loaded)
            if version in entries:
                return
            if keeper := keeper_of(secret.metadata):
                raise RotationRefused(
                    f"{ref} is kept by {keeper}, which would take a version away again: add KEK"
                    f" version {version} at its source, and set rotation.distribute: external"
                )
            entries[version] = entry
            body = {
                "metadata": {"resourceVersion": secret.metadata.resource_version},
                "data": {ref.key: base64.b64encode(render_entries(entries)).decode()},
            }
            try:
                called(
                    str(ref),
                    "patch",
                    lambda body=body: api.patch_namespaced_secret(  # type: ignore[misc]
                        ref.secret, ref.namespace, body, _request_timeout=TIMEOUT
                    ),
                )
            except ApiRefused as error:
                if error.status != CONFLICT:
                    raise
                continue  # someone changed it meanwhile; perhaps by adding this very version
            return
    raise RotationRefused(f"{ref} changes faster than KEK version {version} can be added; run again")


def keeper_of(metadata: Any) -> str:  # noqa: ANN401 - the kubernetes client has no types
    """Return who keeps an object by its metadata, or an empty string."""
    for owner in metadata.owner_references or []:
        return f"{owner.kind} {owner.name}"
    labels, annotations = metadata.labels or {}, metadata.annotations or {}
    # On a Secret of our own they keep Argo CD away; on another one they come from a repository.
    harmless = _INSTRUCTIONS if MADE_BY in annotations else set()
    for name in (*labels, *annotations.keys() - harmless):
        for prefix, keeper in _KEEPERS.items():
            if name.startswith(prefix):
                return keeper
    return _MANAGERS.get(labels.get("app.kubernetes.io/managed-by", "").lower(), "")


def _entries(ref: SecretRef, data: Mapping[str, str]) -> dict[int, Entry]:
    if ref.key not in data:
        raise KekFileInvalid(f"{ref} has no key {ref.key}; see rotation.kubernetes.key")
    try:
        content = base64.b64decode(data[ref.key], validate=True)
    except binascii.Error:
        raise KekFileInvalid(f"{ref}: {ref.key} is not base64") from None
    return parse_entries(content, f"{ref}: {ref.key}")


def _require_same(ref: SecretRef, entries: Mapping[int, Entry], loaded: Mapping[int, Entry]) -> None:
    for version in sorted(loaded):
        if not same_entry(entries.get(version), loaded[version]):
            raise KekFileInvalid(
                f"{ref} does not hold the KEK version {version} that is loaded: is it the Secret that the"
                " KEK file is mounted from?"
            )
