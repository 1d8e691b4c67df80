"""From what was found to HTML: every text is escaped, and shown so that nothing in it can hide."""

from __future__ import annotations

import asyncio
import math
from datetime import UTC, datetime
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined

_LONGEST: Final = 300
"""Characters of a text that somebody else chose; names and thread ids are shorter."""
_SLICE: Final = 200
"""Pieces of a page, of a few bytes each, after which others have their turn."""
SOON: Final = 14 * 86_400.0
"""Seconds before its end from which an expiry is pointed out."""


def shown(value: object) -> str:
    """Return a text that others chose, to be read by people.

    What can't be seen is written out: control and format characters could turn a name around or hide a part
    of it, and a lone surrogate is no UTF-8.
    """
    text = str(value)
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "…"
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else f"\\u{{{ord(one):x}}}" for one in text)


def when(at: object) -> str:
    """Return Unix seconds as RFC 3339 in UTC; ``?`` for what is no time."""
    if isinstance(at, bool) or not isinstance(at, (int, float)) or not math.isfinite(at):
        return "?"
    try:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return "?"


def span(seconds: float) -> str:
    """Return how long that is, in the largest unit of which it is two or more."""
    seconds = max(0.0, seconds)
    for name, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {name}"
    return f"{int(seconds)} s"


def counted(number: int) -> str:
    """Return a number with its thousands apart."""
    return f"{number:,}"


def share(part: float, whole: float) -> float:
    """Return the share in percent, 0 of nothing, to a tenth and never rounded up to all."""
    if whole <= 0:
        return 0.0
    return min(100.0, math.floor(1000 * part / whole) / 10)


def _environment() -> Environment:
    # Everything is escaped, whatever a template's name ends in; a name that is not there is an error.
    environment = Environment(
        loader=PackageLoader("progressdb_kms.page"),
        autoescape=True,
        undefined=StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "when": when, "span": span, "counted": counted}
    environment.globals |= {"share": share}
    return environment


_TEMPLATES: Final = _environment()


def render(name: str, values: dict[str, object]) -> bytes:
    """Return a short page."""
    return _TEMPLATES.get_template(name).render(values).encode(errors="replace")


async def render_in_turns(name: str, values: dict[str, object]) -> bytes:
    """Return a page; a long one is made in slices, so that nobody waits for the whole of it."""
    parts: list[str] = []
    for number, part in enumerate(_TEMPLATES.get_template(name).generate(values), 1):
        parts.append(part)
        if number % _SLICE == 0:
            await asyncio.sleep(0)
    return "".join(parts).encode(errors="replace")
