"""The machine: which core a process runs on, what it has spent, and the conditions of a measurement."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .tools import generator_version

SCHEDULED = 2
"""Kind of a clock of CPU time that counts what the scheduler gave: CPUCLOCK_SCHED of Linux."""
CORES = sorted(os.sched_getaffinity(0))
"""Those that this process may use: a container need not have the first ones."""
SERVER_CORE = CORES[0]
GENERATOR_CORE = CORES[1 % len(CORES)]
PACKAGES = ("cryptography", "hypercorn", "msgspec", "redis", "uvloop")


def two_cores() -> bool:
    """Return whether server and generator can have a core each."""
    return len(CORES) > 1


def pin(pid: int, core: int) -> None:
    """Keep all threads of a process on one core, where there are two."""
    if two_cores():
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process so far, in seconds.

    From the process's own clock, which counts nanoseconds where ``/proc`` counts ticks of 10 ms. Its number
    is made as clock_getcpuclockid(3) does in the C library; Python has that for threads alone.
    """
    return time.clock_gettime((~pid << 3) | SCHEDULED)


def resident_mib(pid: int) -> float:
    """Return the memory that a process has resident, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def conditions() -> dict[str, Any]:
    """Return what the figures depend on: processor, load beside the benchmark, and versions."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _said(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]),
        "cpu": _cpu_model(),
        "cores": len(CORES),
        "pinned": two_cores(),
        "load_average_before": list(os.getloadavg()),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "store": _said([shutil.which("redis-server") or "valkey-server", "--version"]),
        "go": _said(["go", "version"]),
        "generator": generator_version(),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"model name", "Model"}:
            return value.strip()
    return platform.processor() or "unknown"


def _said(command: list[str]) -> str:
    """Return the output of a command, "unknown" where it is not there or can't tell."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
