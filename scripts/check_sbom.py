"""Checks that a CycloneDX document names every package of a lock, in its very version, with its hashes.

usage: check_sbom.py SBOM LOCK

Exit status: 0, or 1 with one line on stderr for each package that is missing or different.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?==(?P<version>[^\s;\\]+)", re.MULTILINE)


def main(sbom: str, lock: str) -> int:
    """Compare, and return the exit status."""
    document = json.loads(Path(sbom).read_text(encoding="utf-8"))
    listed = {
        (re.sub(r"[-_.]+", "-", part["name"]).lower(), part["version"])
        for part in document["components"]
        if any(reference.get("hashes") for reference in part.get("externalReferences", []))
    }
    locked = {
        (re.sub(r"[-_.]+", "-", pin["name"]).lower(), pin["version"])
        for pin in PIN.finditer(Path(lock).read_text(encoding="utf-8"))
    }
    for name, version in sorted(locked ^ listed):
        where = "the lock" if (name, version) in locked else "the SBOM"
        print(f"{name} {version} is in {where} only", file=sys.stderr)
    return int(locked != listed or not locked)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
