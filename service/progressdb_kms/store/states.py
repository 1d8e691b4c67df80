"""The state machine of ``domain.keys.TRANSITIONS`` applied to a record, for a store that runs it in Python.

The Redis store runs the same rules in ``change_state.lua``, where nobody can come between look and change;
the contract tests hold the two together.
"""

from __future__ import annotations

from dataclasses import replace

from progressdb_kms.domain.errors import InvalidTransition, KeyDestroyed
from progressdb_kms.domain.keys import TRANSITIONS, DekRecord, KeyState, StateChange

_USABLE = frozenset({KeyState.ENABLED, KeyState.DECRYPT_ONLY})


def require_rewrappable(record: DekRecord) -> None:
    """Return if the record has a blob.

    Raises:
        KeyDestroyed: It has none any more.
    """
    if record.state is KeyState.DESTROYED:
        raise KeyDestroyed


def invalid_transition(state: KeyState, change: StateChange) -> InvalidTransition:
    """Return the error that names the present state and what was asked."""
    return InvalidTransition(f"the key is {state}, which {change} does not allow")


def settled_states(change: StateChange) -> frozenset[KeyState]:
    """Return the states in which ``change`` has nothing to do.

    ``enable`` may have led back to decrypt_only; repeating it there must not be an error.
    """
    return _USABLE if change is StateChange.ENABLE else frozenset({TRANSITIONS[change].to})


def apply_change(record: DekRecord, change: StateChange, now: int, destroy_at: int | None) -> DekRecord:
    """Return the record after ``change``; the record itself where there is nothing to do.

    Raises:
        KeyDestroyed: It has been destroyed.
        InvalidTransition: The present state does not allow it.
    """
    require_rewrappable(record)
    if record.state in settled_states(change):
        return record
    transition = TRANSITIONS[change]
    if record.state not in transition.sources:
        raise invalid_transition(record.state, change)
    if change is StateChange.ENABLE:
        state, resume = record.resume_state, KeyState.ENABLED
    else:
        state, resume = transition.to, record.state if record.state in _USABLE else record.resume_state
    return replace(
        record,
        state=state,
        resume_state=resume,
        changed_at=now,
        destroy_at=destroy_at if change is StateChange.SCHEDULE_DESTRUCTION else None,
    )
