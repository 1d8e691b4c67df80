"""Bar charts as SVG, by a small writer of our own: nothing has to be installed to draw them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from .cases import Figures, Key

WIDTH = 760
LABELS = 210
VALUES = 190
BAR = 16
GAP = 3
BETWEEN = 12
TOP = 62
BOTTOM = 14
COLOURS = {
    "service": "#2563a8",
    "coalesced": "#2563a8",
    "reference": "#8a8f98",
    "store": "#b7791f",
    "floor": "#8a8f98",
    "alone": "#8a8f98",
    "beside json batches": "#2563a8",
    "beside msgpack batches": "#1f8a70",
}
OTHER = "#7a4fa3"
NAMES = {
    "service": "the service",
    "reference": "bare Go server",
    "store": "redis-benchmark, same script",
    "floor": "crypto loop, one process",
    "alone": "alone",
    "coalesced": "coalesced",
}


@dataclass(frozen=True)
class Bar:
    """A bar: whose it is, its length, and where its runs lay."""

    who: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Group:
    """Bars beside one label."""

    label: str
    bars: Sequence[Bar]


def draw_charts(figures: Figures, folder: Path) -> list[Path]:
    """Draw a chart of each kind that was measured.

    Returns:
        The files that were written.
    """
    drawn = []
    for file, title, groups in (
        ("requests.svg", "Single requests: requests a second", _groups(figures, "single", "per_second", _at)),
        ("cpu.svg", "Single requests: CPU time a request, us", _groups(figures, "single", "cpu_us", _at)),
        ("batches.svg", "Batches: CPU time an item, us", _groups(figures, "batches", "cpu_us", _items)),
        (
            "coalescing.svg",
            "64 tasks on one client: calls a second",
            _groups(figures, "coalesced", "per_second", _what),
        ),
        (
            "fairness.svg",
            "A client beside batches of 10,000: p99, us",
            _groups(figures, "fairness", "p99_us", _what),
        ),
        ("memory.svg", "Memory and size of a key, bytes", _memory(figures)),
    ):
        if groups:
            path = folder / file
            path.write_text(bar_chart(title, groups))
            drawn.append(path)
    return drawn


def bar_chart(title: str, groups: Sequence[Group]) -> str:
    """Return an SVG with horizontal bars from zero; the line on a bar goes from lowest to highest run.

    Args:
        title: Says what is drawn, with the unit.
        groups: At least one, with at least one bar.
    """
    longest = max(bar.high for group in groups for bar in group.bars) or 1.0
    scale = (WIDTH - LABELS - VALUES) / longest
    height = TOP + sum(len(group.bars) * (BAR + GAP) + BETWEEN for group in groups) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"',
        f' height="{height}" font-family="sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        # White, so that the text can be read on a dark page too.
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="24" font-size="15" font-weight="bold" fill="#1a1a1a">{escape(title)}</text>',
    ]
    parts += _legend(dict.fromkeys(bar.who for group in groups for bar in group.bars))
    y = TOP
    for group in groups:
        middle = y + (len(group.bars) * (BAR + GAP) - GAP) / 2 + 4
        parts.append(
            f'<text x="{LABELS - 10}" y="{middle:.1f}" text-anchor="end" fill="#1a1a1a">'
            f"{escape(group.label)}</text>"
        )
        for bar in group.bars:
            parts += _bar(bar, y, scale)
            y += BAR + GAP
        y += BETWEEN
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(owners: dict[str, None]) -> list[str]:
    parts = []
    x = 12
    for who in owners:
        name = NAMES.get(who, who)
        parts.append(f'<rect x="{x}" y="36" width="11" height="11" fill="{COLOURS.get(who, OTHER)}"/>')
        parts.append(f'<text x="{x + 16}" y="46" fill="#444444">{escape(name)}</text>')
        x += 16 + 7 * len(name) + 16
    return parts


def _bar(bar: Bar, y: float, scale: float) -> list[str]:
    colour = COLOURS.get(bar.who, OTHER)
    length, low, high = (value * scale for value in (bar.value, bar.low, bar.high))
    middle = y + BAR / 2
    text = f"{bar.value:,.0f}" if bar.value >= 100 else f"{bar.value:.3g}"  # noqa: PLR2004 - three digits
    if bar.high > bar.low:
        text += f" ({_short(bar.low)} to {_short(bar.high)})"
    return [
        f'<rect x="{LABELS}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>',
        f'<line x1="{LABELS + low:.1f}" x2="{LABELS + high:.1f}" y1="{middle}" y2="{middle}" stroke="#000"/>',
        f'<text x="{LABELS + max(length, high) + 6:.1f}" y="{y + BAR - 4}" fill="#1a1a1a">{text}</text>',
    ]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"  # noqa: PLR2004 - two digits


def _groups(figures: Figures, part: str, name: str, label: Callable[[Key], str]) -> list[Group]:
    found: dict[str, list[Bar]] = {}
    for key in sorted((key for key in figures.runs if key.part == part), key=lambda key: key.what):
        value = figures.median(key, name)
        if value is not None:
            found.setdefault(label(key), []).append(Bar(key.who, value, *figures.spread(key, name)))
    return [Group(text, bars) for text, bars in found.items()]


def _memory(figures: Figures) -> list[Group]:
    names = {"redis_bytes_per_key": "in Redis", "backup_bytes_per_key": "in a packed backup"}
    return [
        Group(f"{text}, {key.size:,} keys", [Bar(key.who, value, value, value)])
        for name, text in names.items()
        for key in figures.runs
        if (value := figures.median(key, name)) is not None
    ]


def _at(key: Key) -> str:
    return f"{key.what}, {key.size} connection{'s' * (key.size > 1)}"


def _items(key: Key) -> str:
    return f"{key.what}, {key.size:,} items"


def _what(key: Key) -> str:
    return key.what
