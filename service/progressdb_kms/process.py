"""What a process that holds keys asks of the kernel, and of the interpreter."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4


def harden() -> list[str]:
    """Switch core dumps off, make the process not dumpable, and lock its memory against swapping.

    Returns:
        What was not possible, one line each, for the log.
    """
    refused = []
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    # Neither a debugger of the same user nor a core handler gets at the memory.
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        refused.append(f"the process stays dumpable: {os.strerror(ctypes.get_errno())}")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and os.geteuid() != 0:
        # Locking within a small limit would succeed now and fail an allocation later.
        refused.append(
            "memory is not locked, so keys could reach swap: allow it with CAP_IPC_LOCK or a memlock limit"
        )
    elif libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        refused.append(f"memory is not locked, so keys could reach swap: {os.strerror(ctypes.get_errno())}")
    return refused


def spare_what_is_there() -> None:
    """Let the garbage collector look at nothing any more that exists now.

    Modules, routes and models live as long as the process. Looking at all of them, as is done now and then
    in a busy service, holds the event loop for some 60 ms.
    """
    gc.collect()
    gc.freeze()


def allow_descriptors(wanted: int) -> str:
    """Raise the soft limit of open files to the hard one: many systems start a process with 1,024.

    Args:
        wanted: Descriptors that the configured limits can need.

    Returns:
        What the operator should know, or an empty string.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < wanted:
        return (
            f"{hard} open files are allowed, and limits.max_connections can need {wanted}: raise the limit of"
            " open files (ulimit -n, LimitNOFILE) or lower it"
        )
    return ""


def end_with_parent(parent: int) -> None:
    """Have the kernel send SIGTERM to this process when its parent ends, however that ends.

    Args:
        parent: Process id of the parent. If it has ended already, the signal comes at once.

    Raises:
        OSError: The kernel does not do that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) is refused")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
