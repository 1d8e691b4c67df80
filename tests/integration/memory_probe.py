"""Tries to read another process's memory in each way, and prints those that worked.

Without a process id it tries its own child, which shows that the ways work at all.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

PTRACE_ATTACH, PTRACE_DETACH = 16, 17


class Span(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def main(pid: int, address: int) -> None:
    """Try each way."""
    for name in ("mem", "environ"):
        try:
            with Path(f"/proc/{pid}/{name}").open("rb"):
                print(name)  # noqa: T201 - what it is for
        except OSError:
            continue
    libc = ctypes.CDLL(None, use_errno=True)
    page = ctypes.create_string_buffer(64)
    here = Span(ctypes.cast(page, ctypes.c_void_p), len(page))
    there = Span(address, len(page))
    # EPERM comes before any look at the address; EFAULT says that the process was open.
    done = libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    if done > 0 or ctypes.get_errno() == 14:  # EFAULT
        print("process_vm_readv")  # noqa: T201
    if libc.ptrace(PTRACE_ATTACH, pid, None, None) == 0:
        libc.waitpid(pid, None, 0x40000000)
        libc.ptrace(PTRACE_DETACH, pid, None, None)
        print("ptrace")  # noqa: T201


if len(sys.argv) > 1:
    main(int(sys.argv[1]), 0x1000)
else:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            main(child.pid, 0x1000)
        finally:
            child.kill()
