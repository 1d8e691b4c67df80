"""A Python that a user without rights may run, even where the tests' own is below a home folder of root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import progressdb_kms

_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"


def _works(python: str, environment: Mapping[str, str], user: int) -> bool:
    with contextlib.suppress(OSError):
        probe = subprocess.run(
            [python, "-c", "import progressdb_kms.bootstrap"],
            user=user,
            group=user,
            extra_groups=[],
            env=environment,
            cwd="/",
            capture_output=True,
            check=False,
        )
        return probe.returncode == 0
    return False


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _second_home(root: Path) -> Path:
    """Make the standard library and the interpreter known under a second path that everyone may enter."""
    home = Path(sys.base_prefix)
    root.chmod(0o755)
    for folder in ("bin", "lib"):
        (root / folder).mkdir()
    shutil.copytree(
        home / "lib" / _VERSION,
        root / "lib" / _VERSION,
        copy_function=_link,
        ignore=shutil.ignore_patterns("site-packages", "test", "idlelib", "config-*", "ensurepip"),
    )
    for library in (home / "lib").glob("libpython*"):
        _link(str(library), str(root / "lib" / library.name))
    _link(str(home / "bin" / _VERSION), str(root / "bin" / _VERSION))
    return root / "bin" / _VERSION


def _environment() -> dict[str, str]:
    """Return an environment in which another Python finds the project and what it needs.

    There is no coverage in it: the user may not write where its data is kept.
    """
    packages = [entry for entry in sys.path if "site-packages" in entry]
    path = os.pathsep.join([str(Path(progressdb_kms.__file__).parents[1]), *packages])
    return {"PATH": os.environ["PATH"], "PYTHONPATH": path}


@contextlib.contextmanager
def unprivileged_python(user: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Give an interpreter that this user may run, and its environment."""
    environment = _environment()
    if _works(sys.executable, environment, user):
        yield sys.executable, environment
        return
    with tempfile.TemporaryDirectory(prefix="kms-py-") as root:
        python = _second_home(Path(root))
        environment = {**environment, "PYTHONHOME": root, "LD_LIBRARY_PATH": f"{root}/lib"}
        if not _works(str(python), environment, user):
            pytest.skip(f"user {user} may not read this checkout or its packages")
        yield str(python), environment
