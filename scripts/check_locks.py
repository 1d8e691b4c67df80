"""Checks that the locks in requirements/ are what pyproject.toml asks for.

Every direct dependency is locked at a version that its range allows, the locks agree with each other,
each line is one exact version with hashes, and no index address is in them. What only
an index can tell (is there something newer?) is left to `scripts/lock`.

Exit status: 0, or 1 with one line on stderr for each disagreement.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
IMAGE_EXTRAS = ["server", "kubernetes", "s3"]
PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?==(?P<version>[^\s;]+)(?P<rest>.*)$")


def wanted(project: dict[str, object], extras: list[str]) -> list[Requirement]:
    """Return the direct requirements of the base package and `extras`, self-references followed."""
    optional = project["optional-dependencies"]
    base = project["dependencies"]
    assert isinstance(optional, dict)  # noqa: S101 - narrows the TOML value for the type checker
    assert isinstance(base, list)  # noqa: S101 - likewise
    found = [Requirement(line) for line in base]
    for extra in extras:
        for requirement in map(Requirement, optional[extra]):
            if canonicalize_name(requirement.name) == project["name"]:
                found += wanted(project, sorted(requirement.extras))
            else:
                found.append(requirement)
    return found


def read_lock(path: Path) -> tuple[dict[str, Version], list[str]]:
    """Return the pinned versions of the lock at `path`, and what is wrong with its lines."""
    pins: dict[str, Version] = {}
    problems: list[str] = []
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if "://" in line:
            problems.append(f"{path.name}: holds an address: {line.strip()[:60]}")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = PIN.match(line)
        if match is None:
            problems.append(f"{path.name}: not an exact version: {line.strip()[:60]}")
            continue
        name = canonicalize_name(match["name"])
        if "--hash=sha256:" not in match["rest"]:
            problems.append(f"{path.name}: {name} has no hash")
        if name in pins:
            problems.append(f"{path.name}: {name} is locked twice")
        pins[name] = Version(match["version"])
    return pins, problems


def main() -> int:
    """Print what disagrees; return the exit status."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = document["project"]
    wants = {
        # First: what is tested, which the others have to agree with.
        "dev.txt": wanted(project, list(project["optional-dependencies"])),
        "server.txt": wanted(project, ["server"]),
        "client.txt": wanted(project, []),
        "image.txt": wanted(project, IMAGE_EXTRAS),
        "build.txt": [Requirement(line) for line in document["build-system"]["requires"]],
    }
    problems = [
        problem
        for tool_box in ("audit.txt", "docs.txt", "fuzz.txt")
        for problem in read_lock(ROOT / "requirements" / tool_box)[1]
    ]
    tested: dict[str, Version] = {}
    for lock, requirements in wants.items():
        pins, bad_lines = read_lock(ROOT / "requirements" / lock)
        problems += bad_lines
        for requirement in requirements:
            name = canonicalize_name(requirement.name)
            if name not in pins:
                problems.append(f"{lock}: {name} is in pyproject.toml and not locked")
            elif not requirement.specifier.contains(pins[name], prereleases=True):
                problems.append(f"{lock}: {name} {pins[name]} is outside {requirement.specifier}")
        tested = tested or pins
        problems += [
            f"{lock}: {name} {version} differs from dev.txt ({tested.get(name)})"
            for name, version in pins.items()
            if tested.get(name) != version
        ]
    for problem in dict.fromkeys(problems):
        print(problem, file=sys.stderr)
    if problems:
        print("run `make lock`", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
