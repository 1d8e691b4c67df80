"""Nobody but root gets at the memory of the service, no core is left, and few copies of a KEK are in it."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.unprivileged import unprivileged_python
from tests.integration.world import Instance, World, kek_text, write_private

pytestmark = pytest.mark.slow

USER = os.geteuid() or 65534
"""Runs the service: the tests' own user, or nobody where that is root."""
COPIES = 8
"""Of a KEK's bytes, and of its text, in a service that has worked; see SECURITY.md."""
PROBE = Path(__file__).with_name("memory_probe.py")


@pytest.fixture(scope="module")
def python() -> Iterator[tuple[str, dict[str, str]]]:
    """Give an interpreter and an environment for the service's user."""
    with unprivileged_python(USER) as found:
        yield found


@pytest.fixture(scope="module")
def kek() -> bytes:
    """A KEK that stands nowhere by chance."""
    return secrets.token_bytes(32)


@pytest.fixture
def service(
    python: tuple[str, dict[str, str]], new_world: Callable[..., World], kek: bytes
) -> Iterator[Instance]:
    """Run a service that may leave cores, as far as whoever started it goes; it may be killed."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    world = new_world(owner=USER)
    world.write_keks({1: kek.hex()})
    world.store.start()
    service = world.instance("a", user=USER)
    service.python = python
    try:
        yield service.start()
    finally:
        service.kill()
        resource.setrlimit(resource.RLIMIT_CORE, before)


def run_as(
    user: int, python: tuple[str, dict[str, str]], *words: object, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run a Python as this user."""
    interpreter, environment = python
    return subprocess.run(
        [interpreter, *map(str, words)],
        user=user,
        group=user,
        extra_groups=[],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def cores(folder: Path) -> list[Path]:
    """Return cores in a folder; a pattern that leads elsewhere is as it is."""
    return [path for path in folder.iterdir() if "core" in path.name]


@pytest.mark.parametrize("end", [signal.SIGABRT, signal.SIGSEGV])
def test_no_core_is_left(service: Instance, python: tuple[str, dict[str, str]], end: signal.Signals) -> None:
    """Though whoever starts it allows one, and a process that does not refuse leaves one."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if "/" not in pattern and not pattern.startswith("|") and hard != 0:
        run_as(USER, python, "-c", f"import os; os.kill(os.getpid(), {int(end)})", cwd=service.folder)
        (core,) = cores(service.folder)
        core.unlink()
    limits = Path(f"/proc/{service.pid}/limits").read_text()
    assert limits.split("Max core file size")[1].split()[:2] == ["0", "0"]
    if os.geteuid() == 0:
        # Even where something raises the limit again, as a container's root may not: it is not dumpable.
        with contextlib.suppress(PermissionError):
            resource.prlimit(service.pid, resource.RLIMIT_CORE, (hard, hard))
    os.kill(service.pid, end)
    assert service.exit_code() == -end
    assert cores(service.folder) == []


def test_no_other_process_reads_the_memory(service: Instance, python: tuple[str, dict[str, str]]) -> None:
    """Not by /proc, not by process_vm_readv, not by ptrace: neither of the same user nor of another one."""
    # The kernel gives the files of a process that is not dumpable to root.
    assert Path(f"/proc/{service.pid}/mem").stat().st_uid == 0
    users = [USER] if os.geteuid() else [USER, USER - 1]
    probe = ("-c", PROBE.read_text())
    for user in users:
        own = run_as(user, python, *probe, cwd=Path("/"))
        assert own.stdout.split() == ["mem", "environ", "process_vm_readv", "ptrace"], own
        other = run_as(user, python, *probe, service.pid, cwd=Path("/"))
        assert (other.returncode, other.stdout) == (0, ""), other


def copies(pid: int, text: bytes) -> int:
    """Count where bytes stand in a process's memory."""
    count = 0
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in maps:
            found = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
            if found is None:
                continue
            start, end = (int(place, 16) for place in found.groups())
            try:
                memory.seek(start)
                count += memory.read(end - start).count(text)
            except OSError:
                continue  # mapped without memory behind it
    return count


def test_a_kek_is_in_few_places(service: Instance, kek: bytes) -> None:
    """However much is done with it, and however often its file is read again."""
    client = service.client("server")
    for number in range(50):
        client.encrypt(client.create(f"t:{number}")["key_id"], b"message")
    for version in range(2, 6):
        seen = service.metric("kms_reloads_total", what="kek")
        write_private(service.world.kek_file, kek_text({1: kek.hex(), version: secrets.token_hex(32)}))
        os.chown(service.world.kek_file, USER, -1)
        service.until("kms_reloads_total", lambda count: count > seen, what="kek")  # noqa: B023 - called before it changes
    if os.geteuid():
        pytest.skip("only root can look into another process's memory")
    raw, hexadecimal = copies(service.pid, kek), copies(service.pid, kek.hex().encode())
    print(f"copies of the KEK's bytes: {raw}, of its text: {hexadecimal}", file=sys.stderr)  # noqa: T201 - a figure
    # Where there is none, nothing was searched.
    assert 1 <= raw <= COPIES
    assert hexadecimal <= COPIES
