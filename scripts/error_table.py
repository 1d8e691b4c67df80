"""Write the table of error codes into docs/errors.md, or check with --check that it is current."""

from __future__ import annotations

import sys
from pathlib import Path

from progressdb_kms.api.problems import all_codes

DOC = Path(__file__).parent.parent / "docs" / "errors.md"
BEGIN, END = "<!-- codes: begin -->", "<!-- codes: end -->"


def table() -> str:
    """Return the table in Markdown."""
    rows = ["| status | code | meaning | retry |", "|---|---|---|---|"]
    for code, facts in all_codes().items():
        retry = "yes" if facts["retryable"] else ""
        rows.append(f"| {facts['status']} | `{code}` | {facts['title']} | {retry} |")
    return "\n".join(rows)


def main() -> int:
    """Rewrite the part between the marks; with --check only say whether it would change."""
    text = DOC.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    fresh = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
    if "--check" in sys.argv:
        if fresh != text:
            print("docs/errors.md is not current: run make openapi")
            return 1
        return 0
    DOC.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
