"""One run of the rotation job."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from msgspec import structs

from progressdb_kms.bootstrap import rotation_parts
from progressdb_kms.domain.errors import Fenced, KmsError, RotationRunning
from progressdb_kms.domain.keys import ALL_TAGS
from progressdb_kms.domain.rotation import Outcome, Rotation, Step
from progressdb_kms.rotation.progress import Reporter
from progressdb_kms.settings import Settings
from progressdb_kms.usecases.rollback import Rollback
from progressdb_kms.usecases.rotation import Conduct, Interrupted, Parts, Plan, Rotator, Unled

CLEAN: Final = 0
INCOMPLETE: Final = 3
ANOTHER_LEADS: Final = 4
RESUMABLE: Final = 75
"""EX_TEMPFAIL of sysexits.h: run again."""
_GRACE: Final = 10.0
"""Seconds that work under way has after SIGTERM; what is cut then is done again by the next run."""
_NAMED: Final = 100
"""Keys that a result names; the rest is a number."""

_Reached = Callable[[str], None]


def _nothing(_name: str) -> None:
    """Do nothing at a named transition."""


REACHED: _Reached = _nothing
"""Called at each named transition. Nothing in the package ever sets it: tests start the job from a program of
their own that does, so that no environment and no option of a production build can end a run there."""


@dataclass(frozen=True, slots=True)
class Options:
    """How this run differs from the configuration; None takes what is configured.

    Attributes:
        resume_only: Do nothing where no rotation is under way.
        worker: Share the work of a rotation that another run leads.
        rollback: Turn the latest rotation back.
        dry_run: Say what a run would do.
        batch: Records in one call of the store.
        max_rate: Records a second.
        verify_sample: Records to verify, 0 for all.
        wait: Seconds to wait for live instances.
        join_wait: For a worker, seconds to wait for a rotation to begin and for somebody to lead it.
    """

    resume_only: bool = False
    worker: bool = False
    rollback: bool = False
    dry_run: bool = False
    batch: int | None = None
    max_rate: int | None = None
    verify_sample: int = 0
    wait: float | None = None
    join_wait: float = 0


async def run(settings: Settings, options: Options, reporter: Reporter) -> int:
    """Run the job once, until it is finished or SIGTERM or SIGINT comes.

    Args:
        settings: The service's configuration.
        options: What is asked for.
        reporter: Who is told.

    Returns:
        The process's exit code: 0 clean, 3 incomplete, 4 another run leads, 75 stopped and to be run again.

    Raises:
        KmsError: It failed; running it again goes on.
    """
    if options.wait is not None:
        settings = structs.replace(settings, rotation=structs.replace(settings.rotation, wait=options.wait))
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    work = asyncio.create_task(_run(settings, options, reporter, stopping))
    signalled = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({work, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            await asyncio.wait({work}, timeout=_GRACE)
        if not work.done():
            work.cancel()
        return await work
    except (Interrupted, asyncio.CancelledError):
        reporter.event("result", {"outcome": "stopped", "detail": "what was done is kept; run rotate again"})
        return RESUMABLE
    except Unled as error:
        reporter.event("result", {"outcome": "stopped", "detail": str(error)})
        return RESUMABLE
    except (RotationRunning, Fenced) as error:
        reporter.event("result", {"outcome": "another_leads", "code": error.code, "detail": error.detail})
        return ANOTHER_LEADS
    except KmsError as error:
        reporter.event("result", {"outcome": "failed", "code": error.code, "detail": error.detail})
        raise
    finally:
        signalled.cancel()
        reporter.close()


async def _run(settings: Settings, options: Options, reporter: Reporter, stopping: asyncio.Event) -> int:
    rotation = settings.rotation
    conduct = Conduct(
        wait=rotation.wait,
        page=options.batch or rotation.batch,
        max_rate=rotation.max_rate if options.max_rate is None else options.max_rate,
        verify_sample=options.verify_sample,
    )
    worker = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(3)}"
    async with rotation_parts(settings, reporter) as given:
        parts = replace(given, reached=REACHED, stopping=stopping.is_set, identity=f"uid:{os.getuid()}")
        began = time.monotonic()
        if options.rollback:
            return await _roll_back(Rollback(parts, conduct, worker), parts, reporter, began)
        rotator = Rotator(parts, conduct, worker)
        plan = await rotator.plan()
        if options.dry_run:
            reporter.event("plan", plan_fields(plan))
            return CLEAN
        reporter.event(
            "start", {"worker": worker, "role": "worker" if options.worker else "leader"} | plan_fields(plan)
        )
        if options.worker:
            ended = await rotator.work(options.join_wait)
        else:
            if settings.escrow == "none" and plan.under_way and plan.under_way.step is not Step.DISTRIBUTE:
                # A run that distributes says so itself.
                reporter.warning("escrow is none: without the KEK source no key can be read")
            await parts.stager.escrow(parts.keks.active)
            ended = await rotator.run(resume_only=options.resume_only)
        if ended is None:
            reporter.event("result", {"outcome": "nothing_to_do"})
            return CLEAN
        return await _report(ended, parts, reporter, began)


async def _report(rotation: Rotation, parts: Parts, reporter: Reporter, began: float) -> int:
    census = await parts.census()
    left = {
        version: count for version, count in census.items() if version < rotation.target_version and count
    }
    bad: list[dict[str, Any]] = []
    if rotation.outcome != Outcome.CLEAN or left:
        for tag in ALL_TAGS:
            bad += [asdict(record) for record in await parts.slots.quarantined(tag, rotation.rotation_id)]
    outcome = rotation.outcome
    if outcome == Outcome.CLEAN and left:
        outcome = str(Outcome.INCOMPLETE)
    reporter.event(
        "result",
        {
            "outcome": outcome,
            "rotation_id": rotation.rotation_id,
            "target_version": rotation.target_version,
            "counts": dict(rotation.counts),
            "census": _texts(census),
            "left_behind": _texts(left),
            "quarantined": bad[:_NAMED],
            "quarantined_total": len(bad),
            "slots_here": reporter.slots,
            "seconds": round(time.monotonic() - began, 3),
        },
    )
    return CLEAN if outcome == Outcome.CLEAN else INCOMPLETE


async def _roll_back(rollback: Rollback, parts: Parts, reporter: Reporter, began: float) -> int:
    rotation = await rollback.run()
    census = await parts.census()
    still = census.get(rotation.target_version, 0)
    reporter.event(
        "result",
        {
            "outcome": rotation.outcome,
            "rotation_id": rotation.rotation_id,
            "active_version": rotation.source_version,
            "counts": dict(rotation.counts),
            "census": _texts(census),
            "needs_target": rollback.leftovers.made_since,
            "bad_copy": rollback.leftovers.bad_copy,
            "still_under_target": still,
            "seconds": round(time.monotonic() - began, 3),
        },
    )
    return INCOMPLETE if still else CLEAN


def plan_fields(plan: Plan) -> dict[str, Any]:
    """Return what a plan says, for a report."""
    under_way = plan.under_way
    return {
        "source_version": plan.source_version,
        "target_version": plan.target_version,
        "census": _texts(plan.census),
        "records": sum(count for version, count in plan.census.items() if version < plan.target_version),
        "live": list(plan.live),
        "no_headroom": plan.headroom,
        "resumes": under_way.rotation_id if under_way else None,
        "resumes_at": str(under_way.step) if under_way else None,
    }


def _texts(census: Any) -> dict[str, int]:  # noqa: ANN401 - a mapping of int to int
    return {str(version): count for version, count in sorted(census.items())}
