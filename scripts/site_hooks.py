"""Hooks of mkdocs: pages of the site that lie outside docs/, and links that lead to them.

Pages are written to be read in a checkout too, so their links name files of the repository. Whatever they
name outside docs/ becomes a part of the site under ``repository/``, Markdown as a page and anything else as
it is, and the README is the site's first page. So no link leads to another host, and ``mkdocs build
--strict`` checks all of them.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
OUTSIDE: Final = "repository/"
START: Final = "index.md"
DECISIONS: Final = "adr/"
_LINK: Final = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")
_FENCE: Final = re.compile(r"^ *(```|~~~)")


def source_of(uri: str) -> str:
    """Return the file in the repository that a page or file of the site is made from."""
    if uri == START:
        return "README.md"
    return uri.removeprefix(OUTSIDE) if uri.startswith(OUTSIDE) else f"docs/{uri}"


def uri_of(source: str) -> str:
    """Return where the site has a file of the repository; a folder, for its README.md or a list."""
    if (ROOT / source).is_dir():
        source = posixpath.join(source, "README.md")
    if source == "README.md":
        return START
    return source.removeprefix("docs/") if source.startswith("docs/") else OUTSIDE + source


def _resolve(target: str, uri: str) -> str | None:
    """Return the file of the repository that a link on a page means, None where there is none."""
    source = posixpath.normpath(posixpath.join(posixpath.dirname(source_of(uri)), target))
    return source if not source.startswith("../") and (ROOT / source).exists() else None


def _outside_code(markdown: str) -> Iterator[tuple[str, bool]]:
    """Give a page's lines, and whether each is text rather than a code block."""
    code = False
    for line in markdown.splitlines(keepends=True):
        fence = _FENCE.match(line) is not None
        yield line, not (code or fence)
        code ^= fence


def targets(markdown: str, uri: str) -> set[str]:
    """Return where the site has what a page's links name."""
    found = {
        _resolve(match[1], uri)
        for line, text in _outside_code(markdown)
        if text
        for match in _LINK.finditer(line)
    }
    return {uri_of(source) for source in found if source is not None}


def rewrite(markdown: str, uri: str) -> str:
    """Return a page with its links as they are in the site; one that leads nowhere stays as it is."""

    def link(match: re.Match[str]) -> str:
        source = _resolve(match[1], uri)
        if source is None:
            return match[0]
        relative = posixpath.relpath(uri_of(source), posixpath.dirname(uri) or ".")
        return f"]({relative}{match[2] or ''})"

    return "".join(_LINK.sub(link, line) if text else line for line, text in _outside_code(markdown))


def folder_page(folder: Path) -> str:
    """Return the page of a folder that has no README.md: its files."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return "\n".join([f"# {folder.name}", "", *(f"- [{name}]({name})" for name in names), ""])


def _nav_pages(nav: Any) -> Iterator[str]:  # noqa: ANN401 - what YAML holds
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from _nav_pages(entry)


def _spread(nav: Any) -> Any:  # noqa: ANN401 - likewise
    """Put the decisions in where the navigation names their folder, so that a new one need not be listed."""
    if nav == DECISIONS:
        decisions = sorted((ROOT / "docs" / DECISIONS).glob("[0-9]*.md"))
        return [f"{DECISIONS}README.md", *(f"{DECISIONS}{path.name}" for path in decisions)]
    if isinstance(nav, dict):
        return {title: _spread(entry) for title, entry in nav.items()}
    return [_spread(entry) for entry in nav] if isinstance(nav, list) else nav


def on_config(config: Any) -> Any:  # noqa: ANN401 - mkdocs' types are in its own environment alone
    """List the decisions in the navigation."""
    config.nav = _spread(config.nav)
    return config


def on_files(files: Any, config: Any) -> Any:  # noqa: ANN401 - likewise
    """Add what the pages and the navigation name outside docs/."""
    from mkdocs.structure.files import File  # noqa: PLC0415 - tests of this module have no mkdocs

    present = {file.src_uri for file in files}
    waiting = set(_nav_pages(config.nav))
    seen: set[str] = set()
    waiting |= {uri for uri in present if uri.endswith(".md")}
    while waiting:
        uri = waiting.pop()
        seen.add(uri)
        path = ROOT / source_of(uri)
        listed = path.name == "README.md" and not path.is_file() and path.parent.is_dir()
        if not listed and not path.is_file():
            continue
        if uri not in present:
            origin = {"content": folder_page(path.parent)} if listed else {"abs_src_path": str(path)}
            files.append(File.generated(config, uri, **origin))
            present.add(uri)
        if uri.endswith(".md"):
            text = folder_page(path.parent) if listed else path.read_text(encoding="utf-8")
            waiting |= targets(text, uri) - seen
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:  # noqa: ANN401 - likewise
    """Turn a page's links into those of the site."""
    return rewrite(markdown, page.file.src_uri)
