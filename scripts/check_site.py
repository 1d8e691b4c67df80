"""Checks that the built documentation loads nothing from another host, and that no page needs one.

usage: scripts/check_site.py DIRECTORY

A reader of these pages runs a key service: nobody else needs to learn of it, and the pages have to work
where there is no internet. Links that somebody has to click (RFCs) are allowed; whatever a browser fetches
by itself is not.

Exit status: 0, or 1 with one line for each finding.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

_FOREIGN: Final = re.compile(r"^\s*([a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
_CSS: Final = re.compile(r"(?:url\(|@import)\s*[\"']?\s*((?:[a-z]+:)?//[^\"')\s;]+)", re.IGNORECASE)
_FETCHED: Final = ("src", "srcset", "poster", "data", "action", "formaction", "background", "ping", "content")
_CLICKED: Final = frozenset({"a", "area"})


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._style = tag == "style"
        for name, value in attrs:
            fetched = name in _FETCHED or (name in {"href", "xlink:href"} and tag not in _CLICKED)
            # Of a srcset each address counts; elsewhere a comma is a part of the one.
            addresses = (value or "").split(",") if name == "srcset" else [value or ""]
            self.found += [
                f"<{tag} {name}={one.strip()}>" for one in addresses if fetched and _FOREIGN.match(one)
            ]
            if name == "style":
                self.found += _CSS.findall(value or "")
            # The theme's script fetches the renderer of diagrams from elsewhere as soon as a page has one.
            if name == "class" and "mermaid" in (value or "").split():
                self.found.append(f"<{tag} class={value}>: the theme loads its renderer from another host")

    def handle_data(self, data: str) -> None:
        if self._style:
            self.found += _CSS.findall(data)

    def handle_endtag(self, _tag: str) -> None:
        self._style = False


def foreign(path: Path) -> list[str]:
    """Return what a page or style sheet has a browser fetch from another host."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".css":
        return _CSS.findall(text)
    page = _Page()
    page.feed(text)
    return page.found


def _findings(site: Path) -> Iterator[str]:
    pages = sorted(site.rglob("*.html"))
    if not pages:
        yield f"{site}: there are no pages"
    for path in [*pages, *sorted(site.rglob("*.css"))]:
        for found in foreign(path):
            yield f"{path.relative_to(site)}: from another host: {found}"


def main() -> int:
    """Print what is wrong with the site; return the exit status."""
    findings = list(_findings(Path(sys.argv[1])))
    for finding in findings:
        print(finding, file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
