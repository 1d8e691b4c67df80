"""Runs a program that ends when its parent does, however that ends: ``launch.py PARENT_PID PROGRAM ARG...``.

A process of its own instead of a ``preexec_fn``: Python code between fork and exec can deadlock in a process
with threads, and the service has some by the time it starts its store again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Ask the kernel for SIGKILL at the parent's death, then become the program."""
    parent, *command = arguments
    # SIGKILL and not SIGTERM: the parent's successor waits for the store's end and need not wait long.
    # Nothing is lost, since the store fsyncs before it answers.
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit("prctl(PR_SET_PDEATHSIG) is not possible here")
    # A parent that died before the call sends no signal any more.
    if os.getppid() != int(parent):
        sys.exit("the parent has ended")
    os.execv(command[0], command)  # noqa: S606 - the very purpose; no shell is wanted


if __name__ == "__main__":
    main(sys.argv[1:])
