"""What `make test-image` leans on: the check of an image's archive finds each thing that is wrong."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOME = "opt/progressdb-kms"
PACKAGE = f"{HOME}/lib/python3.13/site-packages/progressdb_kms"
FILES = {
    f"{HOME}/bin/progressdb-kms": (b"x", 0o755),
    f"{PACKAGE}/cli/__init__.py": (b"x", 0o644),
    f"{PACKAGE}/cli/__pycache__/__init__.cpython-313.pyc": (b"x", 0o644),
}
BASE = {"usr/bin/pip": (b"x", 0o755), "usr/lib/libc.so": (bytes(1000), 0o755)}
CONFIG: dict[str, Any] = {
    "User": "65532:65532",
    "Entrypoint": ["/opt/progressdb-kms/bin/progressdb-kms"],
    "Cmd": ["serve", "--config", "/etc/progressdb-kms/config.yaml"],
    "StopSignal": "SIGTERM",
    "ExposedPorts": {"8443/tcp": {}, "9090/tcp": {}},
    "Labels": {
        f"org.opencontainers.image.{name}": "x"
        for name in ("title", "description", "licenses", "version", "revision")
    },
}


def tar(files: dict[str, tuple[bytes, int]]) -> bytes:
    """Return an archive of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, (content, mode) in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), mode
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Give what checks images: one of these files and this configuration, and a second one."""

    def image(name: str, files: dict[str, tuple[bytes, int]], config: dict[str, Any]) -> Path:
        layers = [tar(BASE), tar({"usr/bin/.wh.pip": (b"", 0)}), tar(files)]
        names = [f"{number}.tar" for number in range(len(layers))]
        digests = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
        document = {"config": config, "rootfs": {"diff_ids": digests}}
        manifest = [{"Config": "config.json", "Layers": names}]
        path = tmp_path / name
        path.write_bytes(
            tar(
                {
                    "manifest.json": (json.dumps(manifest).encode(), 0o644),
                    "config.json": (json.dumps(document).encode(), 0o644),
                    **{name: (layer, 0o644) for name, layer in zip(names, layers, strict=True)},
                }
            )
        )
        return path

    def run(
        files: dict[str, tuple[bytes, int]] = FILES,
        config: dict[str, Any] = CONFIG,
        other: dict[str, tuple[bytes, int]] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        paths = [image("one.tar", files, config)]
        if other is not None:
            paths.append(image("two.tar", other, config))
        command = [sys.executable, str(ROOT / "scripts" / "check_image.py"), *map(str, paths)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


Check = Callable[..., subprocess.CompletedProcess[str]]


def test_good_image_passes(check: Check) -> None:
    """An image in order passes, also beside a second build of the same layers; the base's pip is gone."""
    done = check(other=FILES)
    assert (done.returncode, done.stderr) == (0, "")
    assert "in order" in done.stdout


@pytest.mark.parametrize(
    "more, says",
    [
        ({f"{HOME}/bin/pip3": (b"", 0o755)}, "nothing may be installed"),
        ({"usr/bin/gcc-12": (b"", 0o755)}, "nothing may be installed"),
        ({"usr/lib/python3/dist-packages/pip/__init__.py": (b"", 0o644)}, "is in it"),
        ({"usr/local/lib/python3.13/ensurepip/__init__.py": (b"", 0o644)}, "is in it"),
        ({"src/service/secret": (b"", 0o644)}, "left from the build"),
        ({f"{HOME}/bin/x": (b"", 0o4755)}, "has mode 4755"),
        ({f"{HOME}/lib/x": (b"", 0o666)}, "has mode 0666"),
        ({f"{HOME}/lib/large": (bytes(151 * 10**6), 0o644)}, "151 MB above its base"),
    ],
)
def test_what_should_not_be_in_it(check: Check, more: dict[str, tuple[bytes, int]], says: str) -> None:
    """Each file that has no place in the image is named."""
    done = check({**FILES, **more})
    assert done.returncode == 1
    assert says in done.stderr


@pytest.mark.parametrize("missing, says", [("__init__.py", "package is not in it"), (".pyc", "byte code")])
def test_what_should_be_in_it(check: Check, missing: str, says: str) -> None:
    """The package and its byte code."""
    done = check({name: file for name, file in FILES.items() if not name.endswith(missing)})
    assert done.returncode == 1
    assert says in done.stderr


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"User": ""}, "runAsNonRoot"),
        ({"User": "nobody"}, "runAsNonRoot"),
        ({"User": "0:0"}, "runAsNonRoot"),
        ({"Entrypoint": ["sh", "-c", "x"]}, "Entrypoint"),
        ({"Cmd": None}, "Cmd"),
        ({"StopSignal": None}, "StopSignal"),
        ({"ExposedPorts": {}}, "ports"),
        ({"Labels": None}, "no label"),
    ],
)
def test_configuration(check: Check, wrong: dict[str, Any], says: str) -> None:
    """User, entry point, signal, ports and labels."""
    done = check(config={**CONFIG, **wrong})
    assert done.returncode == 1
    assert says in done.stderr


def test_two_builds_that_differ(check: Check) -> None:
    """A second build with another layer is told."""
    done = check(other={**FILES, f"{HOME}/lib/time": (b"12:00", 0o644)})
    assert done.returncode == 1
    assert "two builds differ: 2 of 3 layers are the same" in done.stderr
