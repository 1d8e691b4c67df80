"""Kubernetes Events about what a job did, regarding its own pod: ``kubectl describe`` and ``kubectl events``.

They are for people who look at the cluster. Nothing depends on them: one that can't be written is a line in
the log. Needs the verb create on events (events.k8s.io) in the pod's namespace, and the extra ``kubernetes``.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import structlog

from progressdb_kms.domain.rotation import Rotation
from progressdb_kms.rotation.progress import Reporter
from progressdb_kms.rotation.summary import summary

log = structlog.get_logger(__name__)

_TIMEOUT: Final = (2, 3)
"""Seconds for a connection, and for an answer: the end of a job must not wait long for this."""
_LONGEST_NOTE: Final = 1024
_VARIABLES: Final = ("POD_NAME", "POD_NAMESPACE", "POD_UID")
_REASONS: Final = {
    "clean": ("RotationCompleted", False),
    "incomplete": ("RotationIncomplete", True),
    "stopped": ("RotationStopped", False),
    "another_leads": ("RotationFailed", True),
    "failed": ("RotationFailed", True),
    "rolled_back": ("RotationRolledBack", False),
}
"""Reasons by a run's outcome, and whether they are warnings."""
_OF_WORKERS: Final = frozenset({"failed"})
"""Outcomes that a worker tells of; for all others its leader does."""


class Events(Protocol):
    """Where events go."""

    def write(self, reason: str, note: str, *, warning: bool = False) -> None:
        """Write an event, soon and in order; never raises.

        Args:
            reason: A word in CamelCase.
            note: A sentence, with nothing secret in it.
            warning: Whether somebody should look at it.
        """

    def close(self) -> None:
        """Return when all are written, or can't be."""


class NoEvents:
    """Writes none."""

    def write(self, reason: str, note: str, *, warning: bool = False) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class Pod:
    """The pod that this runs in, as the downward API tells it."""

    name: str
    namespace: str
    uid: str


class PodEvents:
    """Writes events regarding a pod, in a thread of its own: the job's lease must not run out meanwhile.

    Args:
        pod: The pod.
        action: What its job does, in CamelCase.
    """

    def __init__(self, pod: Pod, action: str) -> None:
        self._pod = pod
        self._action = action
        self._broken = False
        self._writer = ThreadPoolExecutor(1, "events")

    def write(self, reason: str, note: str, *, warning: bool = False) -> None:
        """Hand an event to the thread."""
        body = self._body(reason, note, "Warning" if warning else "Normal")
        self._writer.submit(self._write, body)

    def close(self) -> None:
        """Wait for the thread: some seconds at most."""
        self._writer.shutdown()

    def _write(self, body: Any) -> None:  # noqa: ANN401 - the client takes a mapping too, which its types hide
        if self._broken:
            return
        try:
            # Only here: it takes half a second, and needs an extra of its own.
            from kubernetes import client  # noqa: PLC0415 - see above

            from progressdb_kms.kek.cluster import called, connect  # noqa: PLC0415 - see above

            with connect() as api_client:
                api = client.EventsV1Api(api_client)
                called(
                    f"events in {self._pod.namespace}",
                    "create",
                    lambda: api.create_namespaced_event(self._pod.namespace, body, _request_timeout=_TIMEOUT),
                )
        except Exception as error:  # noqa: BLE001 - whatever it is, it is not worth a rotation
            self._broken = True
            detail = str(error) if type(error).__name__ == "ApiRefused" else type(error).__name__
            log.warning("event_not_written", reason=body["reason"], detail=detail)

    def _body(self, reason: str, note: str, kind: str) -> dict[str, Any]:
        pod, now = self._pod, datetime.now(UTC)
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            # Named as others name theirs; generateName can't end with a dot.
            "metadata": {"name": f"{pod.name[:200]}.{secrets.token_hex(8)}", "namespace": pod.namespace},
            # The API server wants a fraction of six digits, and the client leaves out one of zero.
            "eventTime": now.replace(microsecond=now.microsecond or 1).isoformat(),
            "reportingController": "progressdb-kms.io/job",
            "reportingInstance": pod.name[:128],
            "action": self._action,
            "reason": reason,
            "type": kind,
            "note": note if len(note) <= _LONGEST_NOTE else f"{note[: _LONGEST_NOTE - 3]}...",
            "regarding": {
                "apiVersion": "v1",
                "kind": "Pod",
                "name": pod.name,
                "namespace": pod.namespace,
                "uid": pod.uid,
            },
        }


def pod_events(action: str, *, wanted: bool, environ: Mapping[str, str] = os.environ) -> Events:
    """Return where a job's events go.

    Args:
        action: What the job does, in CamelCase.
        wanted: ``rotation.events`` of the configuration.
        environ: Where POD_NAME, POD_NAMESPACE and POD_UID stand.
    """
    if not wanted:
        return NoEvents()
    missing = [name for name in _VARIABLES if not environ.get(name)]
    if missing:
        log.warning(
            "events_not_written", detail=f"rotation.events needs {', '.join(missing)} in the environment"
        )
        return NoEvents()
    name, namespace, uid = (environ[variable] for variable in _VARIABLES)
    return PodEvents(Pod(name, namespace, uid), action)


class Herald:
    """A reporter that also writes events, and remembers how the run ended.

    Args:
        reporter: Gets everything.
        events: Gets what people in the cluster should see.

    Attributes:
        result: The fields of the last ``result``, None before.
    """

    def __init__(self, reporter: Reporter, events: Events) -> None:
        self._reporter = reporter
        self._events = events
        self._worker = self._begun = False
        self.result: Mapping[str, Any] | None = None

    @property
    def slots(self) -> int:
        """Slots that this process has dealt with."""
        return self._reporter.slots

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Pass it on; a result becomes an event."""
        self._reporter.event(name, fields)
        if name == "start":
            self._worker = fields.get("role") == "worker"
        if name != "result":
            return
        self.result = fields
        outcome = str(fields.get("outcome"))
        if outcome in _REASONS and (not self._worker or outcome in _OF_WORKERS):
            reason, warning = _REASONS[outcome]
            if outcome == "rolled_back":
                warning = bool(fields.get("still_under_target"))
            self._events.write(reason, summary(fields), warning=warning)

    def step(self, rotation: Rotation, total: int) -> None:
        """Pass it on; the first one tells that a rotation has begun, or goes on."""
        if not self._begun:
            self._begun = True
            self._events.write(
                "RotationStarted",
                f"rotation {rotation.rotation_id}, from KEK version {rotation.source_version} to"
                f" {rotation.target_version}, is at {rotation.step}",
            )
        self._reporter.step(rotation, total)

    def slot(self, counts: Mapping[str, int]) -> None:
        """Pass it on."""
        self._reporter.slot(counts)

    def waiting(self, missing: Sequence[str], gone: Sequence[str]) -> None:
        """Pass it on."""
        self._reporter.waiting(missing, gone)

    def warning(self, text: str) -> None:
        """Pass it on."""
        self._reporter.warning(text)

    def close(self) -> None:
        """Close both."""
        self._reporter.close()
        self._events.close()
