"""Kubernetes Events of a job, through the official client against a stand-in API server over TLS."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.domain.rotation import Rotation, Step
from progressdb_kms.rotation.kubernetes_events import Herald, NoEvents, pod_events
from progressdb_kms.rotation.progress import JsonLines
from progressdb_kms.rotation.summary import summary
from tests.unit.rotation.events_api import POD, EventsApi

ROTATION = Rotation("r_2_aa", 1, 2, Step.DISTRIBUTE, 100, 100)
CLEAN = {
    "outcome": "clean",
    "rotation_id": "r_2_aa",
    "target_version": 2,
    "counts": {"rewrapped": 5},
    "seconds": 1.0,
}
BAD = [{"key_id": f"k_{n}", "reason": "wrapped_key_invalid", "kek_version": 1} for n in range(5)]
INCOMPLETE = CLEAN | {
    "outcome": "incomplete",
    "quarantined": BAD,
    "quarantined_total": 5,
    "left_behind": {"1": 5},
}
FAILED = {"outcome": "failed", "code": "store_unavailable", "detail": "the store does not answer"}


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EventsApi]:
    """Give an API server to which the environment leads."""
    made = EventsApi(tmp_path)
    for name, value in made.environment().items():
        monkeypatch.setenv(name, value)
    yield made
    made.close()


class Lines:
    """A stream that keeps what is written."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        """Keep it."""
        self.text += text

    def flush(self) -> None:
        """Do nothing."""


def told(role: str, result: Mapping[str, Any] | None, *, steps: bool = True) -> str:
    """Let a herald tell of a run and return the lines of its reporter."""
    stream = Lines()
    herald = Herald(JsonLines(stream), pod_events("Rotate", wanted=True))  # type: ignore[arg-type] # all that it uses
    herald.event("start", {"role": role})
    if steps:
        herald.step(ROTATION, 0)
        herald.step(ROTATION, 0)
    if result is not None:
        herald.event("result", result)
        assert herald.result == result
    herald.close()
    return stream.text


def test_a_rotation_is_told_of(api: EventsApi) -> None:
    """Beginning and end are events regarding the job's pod; the reporter hears everything as before."""
    text = told("leader", CLEAN)
    assert [json.loads(line)["event"] for line in text.splitlines()] == ["start", "step", "step", "result"]
    assert api.reasons == ["RotationStarted", "RotationCompleted"]
    begun, ended = api.events
    assert "from KEK version 1 to 2" in begun["note"]
    assert "every key is under KEK version 2" in ended["note"]
    assert ended["type"] == "Normal"
    assert begun["metadata"]["name"] != ended["metadata"]["name"]
    assert ended["action"] == "Rotate"
    assert ended["regarding"] == {
        "apiVersion": "v1",
        "kind": "Pod",
        "name": POD["POD_NAME"],
        "namespace": "kms",
        "uid": POD["POD_UID"],
    }


@pytest.mark.parametrize(
    "result, reason, kind, said",
    [
        (INCOMPLETE, "RotationIncomplete", "Warning", "5 keys could not be dealt with: k_0 (wrapped"),
        (FAILED, "RotationFailed", "Warning", "the store does not answer"),
        ({"outcome": "stopped", "detail": "run rotate again"}, "RotationStopped", "Normal", "run rotate"),
        ({"outcome": "another_leads", "detail": "host/1"}, "RotationFailed", "Warning", "another run leads"),
        (
            {
                "outcome": "rolled_back",
                "rotation_id": "r_2_aa",
                "active_version": 1,
                "needs_target": ["k_1"],
                "still_under_target": 1,
            },
            "RotationRolledBack",
            "Warning",
            "1 keys need the version",
        ),
    ],
)
def test_every_end_has_its_reason(
    api: EventsApi, result: dict[str, Any], reason: str, kind: str, said: str
) -> None:
    """What somebody should look at is a warning, and each note says what there is to know."""
    told("leader", result, steps=False)
    (event,) = api.events
    assert (event["reason"], event["type"]) == (reason, kind)
    assert said in event["note"]


def test_workers_leave_the_telling_to_their_leader(api: EventsApi) -> None:
    """Of a worker only a failure is an event; where there was nothing to do nobody tells."""
    told("worker", CLEAN, steps=False)
    told("leader", {"outcome": "nothing_to_do"}, steps=False)
    assert api.events == []
    told("worker", FAILED, steps=False)
    assert api.reasons == ["RotationFailed"]


def test_a_long_note_is_cut(api: EventsApi) -> None:
    """The API takes 1,024 characters."""
    told("leader", FAILED | {"detail": "x" * 3000}, steps=False)
    assert len(api.events[0]["note"]) == 1024


@pytest.mark.parametrize("status", [403, 404, 500])
def test_what_can_not_be_written_is_logged_once(
    api: EventsApi, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """A refusal ends nothing: it is a line in the log that quotes nothing, and no further try is made."""
    api.refuse = status
    told("leader", CLEAN)
    assert api.requests == 1
    logged = "".join(capfd.readouterr())
    assert logged.count("event_not_written") == 1
    assert "Kubernetes does not let us create events in kms" in logged
    assert "refused:" not in logged


def test_no_api_at_all(api: EventsApi, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A job outside a cluster goes on without events."""
    (tmp_path / "kubeconfig").unlink()
    told("leader", CLEAN)
    assert "event_not_written" in "".join(capfd.readouterr())


def test_only_where_they_are_wanted(
    api: EventsApi, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without the setting nothing is written; with it, but without the pod's name, that is said."""
    assert isinstance(pod_events("Rotate", wanted=False), NoEvents)
    monkeypatch.delenv("POD_UID")
    silent = pod_events("Rotate", wanted=True)
    silent.write("RotationStarted", "x")
    silent.close()
    assert api.requests == 0
    assert "rotation.events needs POD_UID" in "".join(capfd.readouterr())


def test_a_summary_says_what_to_do() -> None:
    """A run that was not clean ends in words that say what to do next."""
    assert "run rotate again" in summary(INCOMPLETE)
    assert "and 2 more" in summary(INCOMPLETE)
    left = INCOMPLETE | {"quarantined": [], "quarantined_total": 0}
    assert "5 keys are under older KEK versions still; run rotate again" in summary(left)
    assert summary({"outcome": "nothing_to_do"}) == "there was no rotation to work on"
