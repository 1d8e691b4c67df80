"""Checks a container image's archive (of Docker's form), without running it.

usage: check_image.py ARCHIVE [ANOTHER]

Size above the base, user, entry point, signal and labels; that neither pip nor a compiler is in it, and
nothing that is left from the build. With ANOTHER, a second build of the same sources: that its layers are
the same.

Exit status: 0, or 1 with one line on stderr for each thing that is wrong.
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOME = "opt/progressdb-kms"
MOST_BYTES = 150 * 10**6
"""What the image may be larger than its base, uncompressed."""
LABELS = {
    f"org.opencontainers.image.{name}" for name in ("title", "description", "licenses", "version", "revision")
}
TOOLS = re.compile(
    r"(^|/)(pip[0-9.]*|easy_install[^/]*|wheel|gcc[^/]*|g\+\+[^/]*|cc|c\+\+|clang[^/]*|make|ld|as|go|rustc|cargo)$"
)
MODULES = re.compile(r"/(site-packages|dist-packages)/(pip|setuptools|wheel|pkg_resources)(/|$)|/ensurepip/")

LEFT = re.compile(r"(src|build|wheel)/|.*/\.git/")


@dataclass
class Image:
    """An image as it is in its archive.

    Attributes:
        config: Its configuration.
        layers: Names of its layers, which are their digests.
        files: Path to size and mode of all files, the base's included.
        added: Bytes of the layers above the base.
    """

    config: dict[str, Any]
    layers: list[str]
    files: dict[str, tuple[int, int]]
    added: int


def read_image(path: Path) -> Image:
    """Read an archive."""
    with tarfile.open(path) as archive:
        manifest = json.loads(_content(archive, "manifest.json"))[0]
        document = json.loads(_content(archive, manifest["Config"]))
        files: dict[str, tuple[int, int]] = {}
        added = 0
        for name in manifest["Layers"]:
            layer = list(_members(archive, name))
            if added or any(member.name.removeprefix("./").startswith(HOME) for member in layer):
                added += sum(member.size for member in layer)
            for member in layer:
                _apply(files, member)
    return Image(document["config"], document["rootfs"]["diff_ids"], files, added)


def _content(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise SystemExit(f"{name} is no file of the archive")
    return file.read()


def _members(archive: tarfile.TarFile, name: str) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(fileobj=archive.extractfile(name)) as layer:
        yield from layer


def _apply(files: dict[str, tuple[int, int]], member: tarfile.TarInfo) -> None:
    path = member.name.removeprefix("./")
    folder, _, name = path.rpartition("/")
    if name.startswith(".wh."):
        # A whiteout: what a lower layer has under this name is gone.
        gone = f"{folder}/{name.removeprefix('.wh.')}".lstrip("/")
        for known in [known for known in files if known == gone or known.startswith(f"{gone}/")]:
            del files[known]
    elif not member.isdir():
        # Links have no mode of their own.
        files[path] = (member.size, member.mode if member.isreg() else 0)


def problems(image: Image) -> Iterator[str]:
    """Yield what is wrong with an image."""
    if image.added > MOST_BYTES:
        yield f"{image.added / 1e6:.0f} MB above its base; {MOST_BYTES / 1e6:.0f} MB at most"
    yield from _config_problems(image.config)
    for path, (_, mode) in image.files.items():
        if TOOLS.search(path) and mode & 0o111:
            yield f"/{path} is in it: nothing may be installed or compiled in a service"
    yield from (f"/{path} is in it" for path in [path for path in image.files if MODULES.search(path)][:3])
    left = [path for path in image.files if LEFT.match(path)]
    yield from (f"/{path} is left from the build" for path in left[:3])
    yield from _package_problems(
        {path: mode for path, (_, mode) in image.files.items() if path.startswith(HOME)}
    )


def _config_problems(config: dict[str, Any]) -> Iterator[str]:
    user, _, group = config.get("User", "").partition(":")
    if not (user.isdigit() and group.isdigit() and int(user) and int(group)):
        yield f"the user {config.get('User')!r} is no number above 0 with a group, so that runAsNonRoot fails"
    wanted = {
        "Entrypoint": [f"/{HOME}/bin/progressdb-kms"],
        "Cmd": ["serve", "--config", "/etc/progressdb-kms/config.yaml"],
        "StopSignal": "SIGTERM",
    }
    for name, value in wanted.items():
        if config.get(name) != value:
            yield f"{name} is {config.get(name)!r}, not {value!r}"
    if set(config.get("ExposedPorts") or ()) != {"8443/tcp", "9090/tcp"}:
        yield f"the ports are {config.get('ExposedPorts')}"
    if missing := sorted(LABELS - {name for name, value in (config.get("Labels") or {}).items() if value}):
        yield f"no label {', '.join(missing)}"


def _package_problems(ours: dict[str, int]) -> Iterator[str]:
    for path, mode in ours.items():
        if mode & 0o7022:
            yield f"/{path} has mode {mode:04o}"
    if not any(path.endswith("/progressdb_kms/cli/__init__.py") for path in ours):
        yield "the package is not in it"
    if not any("/progressdb_kms/" in path and path.endswith(".pyc") for path in ours):
        yield "the package's byte code is not in it, and a read-only root can't keep any"


def main(paths: list[str]) -> int:
    """Print what is wrong; return the exit status."""
    image = read_image(Path(paths[0]))
    found = list(problems(image))
    if len(paths) > 1 and (other := read_image(Path(paths[1]))).layers != image.layers:
        same = sum(one == two for one, two in zip(image.layers, other.layers, strict=False))
        found.append(f"two builds differ: {same} of {len(image.layers)} layers are the same")
    for problem in found:
        print(problem, file=sys.stderr)
    if not found:
        print(f"{paths[0]}: in order, {image.added / 1e6:.0f} MB above its base")
    return 1 if found else 0


if __name__ == "__main__":
    if len(sys.argv) not in {2, 3}:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
