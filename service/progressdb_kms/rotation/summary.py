"""What a run of the job came to, in one sentence: for a pod's last line of log, and for its Events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_NAMED: Final = 3


def summary(result: Mapping[str, Any]) -> str:
    """Return the sentence, which also says what to do.

    Args:
        result: The fields of the event ``result`` (docs/rotation.md).
    """
    outcome = result.get("outcome")
    name = f"rotation {result.get('rotation_id')}"
    match outcome:
        case "clean":
            return (
                f"{name} is complete: every key is under KEK version {result['target_version']}"
                f" ({result['counts'].get('rewrapped', 0)} rewrapped, {result['seconds']:.0f} s)"
            )
        case "incomplete":
            return f"{name} ended incomplete: {_left(result)}"
        case "rolled_back":
            return (
                f"{name} was rolled back: KEK version {result['active_version']} is active{_needing(result)}"
            )
        case "nothing_to_do":
            return "there was no rotation to work on"
        case "another_leads":
            return f"another run leads: {result['detail']}"
        case _:
            return f"{outcome}: {result.get('detail', '')}"


def _left(result: Mapping[str, Any]) -> str:
    bad, total = result["quarantined"], result["quarantined_total"]
    if not total:
        left = sum(result["left_behind"].values())
        return f"{left} keys are under older KEK versions still; run rotate again"
    names = ", ".join(f"{record['key_id']} ({record['reason']})" for record in bad[:_NAMED])
    more = f" and {total - _NAMED} more" if total > _NAMED else ""
    return (
        f"{total} keys could not be dealt with: {names}{more}; keep the older KEK version, put the keys back"
        " by progressdb-kms restore, then run rotate again"
    )


def _needing(result: Mapping[str, Any]) -> str:
    count = len(result["needs_target"])
    if not result["still_under_target"]:
        return ""
    return (
        f", but {result['still_under_target']} keys need the version that was turned back ({count} of them"
        " made under it since): keep it, or recover it from escrow; the result's needs_target names them"
    )
