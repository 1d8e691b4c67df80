"""Secrets of the cluster: read, made if they are missing, changed only if nobody else did meanwhile.

Needs the verbs create on Secrets, and get and patch on those that are named; no list and no watch.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from kubernetes import client

from progressdb_kms.domain.errors import ProvisionRefused
from progressdb_kms.kek.cluster import CONFLICT, NOT_FOUND, TIMEOUT, ApiRefused, called
from progressdb_kms.kek.kubernetes import MADE_BY, keeper_of

OPAQUE: Final = "Opaque"
TLS: Final = "kubernetes.io/tls"
_MAKER: Final = "provision"
_TRIES: Final = 8


@dataclass(frozen=True, slots=True)
class Ref:
    """Which Secret."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"Secret {self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Found:
    """A Secret as it was read.

    Attributes:
        data: What it holds.
        annotations: Its annotations.
        revision: Its resourceVersion.
        uid: Tells it from another of its name that comes later.
        keeper: Who else keeps it (GitOps, an operator); empty for nobody.
    """

    data: Mapping[str, bytes] = field(repr=False)
    annotations: Mapping[str, str]
    revision: str
    uid: str
    keeper: str

    @property
    def ours(self) -> bool:
        """Whether a run of this made it."""
        return self.annotations.get(MADE_BY) == _MAKER


@dataclass(frozen=True, slots=True)
class Change:
    """What to write.

    Attributes:
        why: For people; empty for a Secret that is made.
        data: Keys to set; others stay.
        kind: Type of a Secret that is made.
        annotations: To set.
        labels: Of a Secret that is made.
        theirs: May be done to a Secret that somebody else made.
    """

    why: str = ""
    data: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    kind: str = OPAQUE
    annotations: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    theirs: bool = False


class Secrets:
    """The Secrets that the API shows.

    Args:
        api_client: Open.
        say: Told each change in one line, which names Secrets only.
    """

    def __init__(self, api_client: client.ApiClient, say: Callable[[str], None]) -> None:
        self._api = client.CoreV1Api(api_client)
        self.say = say

    def get(self, ref: Ref) -> Found | None:
        """Return a Secret, None where there is none.

        Raises:
            ProvisionRefused: Kubernetes refuses, or does not answer.
        """
        try:
            secret = called(
                str(ref),
                "get",
                lambda: self._api.read_namespaced_secret(ref.name, ref.namespace, _request_timeout=TIMEOUT),
            )
        except ApiRefused as error:
            if error.status == NOT_FOUND:
                return None
            raise _refused(error) from None
        metadata = secret.metadata
        return Found(
            _decoded(ref, secret.data or {}),
            metadata.annotations or {},
            metadata.resource_version,
            metadata.uid or "",
            keeper_of(metadata),
        )

    def ensure(self, ref: Ref, wanted: Callable[[Found | None], Change | None]) -> Mapping[str, bytes]:
        """Bring a Secret to what is wanted; return what it holds then.

        Args:
            ref: The Secret.
            wanted: Given what is there, says what to write, None for nothing. Called again when somebody else
                was quicker, so that of two runs one writes and the other takes over what it finds.

        Raises:
            ProvisionRefused: As ``get``; or it was made by somebody else, or changes all the time.
        """
        for _ in range(_TRIES):
            found = self.get(ref)
            change = wanted(found)
            if change is None:
                return {} if found is None else found.data
            if found is None:
                if self.create(ref, change):
                    return change.data
            elif self.patch(ref, found, change):
                return {**found.data, **change.data}
        raise ProvisionRefused(f"{ref} changes faster than it can be written; run again")

    def create(self, ref: Ref, change: Change) -> bool:
        """Make a Secret; False where there is one by now.

        Raises:
            ProvisionRefused: As ``get``.
        """
        body: Any = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": ref.name,
                "namespace": ref.namespace,
                "labels": dict(change.labels),
                "annotations": {**change.annotations, MADE_BY: _MAKER},
            },
            "type": change.kind,
            "data": _encoded(change.data),
        }
        done = self._written(
            ref,
            "create",
            lambda: self._api.create_namespaced_secret(ref.namespace, body, _request_timeout=TIMEOUT),
        )
        if done:
            self.say(f"made {ref}")
        return done

    def patch(self, ref: Ref, found: Found, change: Change) -> bool:
        """Change a Secret; False where it is not any more what was found.

        Raises:
            ProvisionRefused: As ``get``; or it was made by somebody else and the change is not for such.
        """
        if found.keeper or not (found.ours or change.theirs):
            whose = f"is kept by {found.keeper}" if found.keeper else "was not made by provision"
            raise ProvisionRefused(
                f"{ref} {whose} and is never changed here ({change.why}): choose another name, or remove it"
            )
        body = {
            "metadata": {"resourceVersion": found.revision, "annotations": dict(change.annotations)},
            "data": _encoded(change.data),
        }
        done = self._written(
            ref,
            "patch",
            lambda: self._api.patch_namespaced_secret(
                ref.name, ref.namespace, body, _request_timeout=TIMEOUT
            ),
        )
        if done:
            self.say(f"changed {ref}: {change.why}")
        return done

    @staticmethod
    def _written(ref: Ref, verb: str, call: Callable[[], Any]) -> bool:
        try:
            called(str(ref), verb, call)
        except ApiRefused as error:
            # A Secret that is gone by the time of the patch is read again too.
            if error.status == CONFLICT or (verb == "patch" and error.status == NOT_FOUND):
                return False
            raise _refused(error) from None
        return True


def _refused(error: ApiRefused) -> ProvisionRefused:
    role = "; the role of provision needs get, patch and create" if error.status else ""
    return ProvisionRefused(error.detail + role)


def _encoded(data: Mapping[str, bytes]) -> dict[str, str]:
    return {name: base64.b64encode(value).decode() for name, value in data.items()}


def _decoded(ref: Ref, data: Mapping[str, str]) -> dict[str, bytes]:
    try:
        return {name: base64.b64decode(value, validate=True) for name, value in data.items()}
    except binascii.Error:
        raise ProvisionRefused(f"{ref} holds what is not base64") from None
