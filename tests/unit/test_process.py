"""What the process asks of the kernel, in processes of their own: it can't be taken back."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
from progressdb_kms.process import allow_descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 256))
print(repr(allow_descriptors(200)), repr(allow_descriptors(300)), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_the_limit_of_open_files_is_raised():
    """The soft limit follows the hard one; too low a hard one is said, with what to do."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    quiet, _, rest = done.stdout.partition(" ")
    assert quiet == "''"
    assert "256 open files are allowed, and limits.max_connections can need 300" in rest
    assert rest.strip().endswith("256 256")


SPARED = """
import gc
from progressdb_kms import process
before = len(gc.get_objects())
process.spare_what_is_there()
print(before > 1000, len(gc.get_objects()) < 100)
"""


def test_the_garbage_collector_spares_what_is_there():
    """It looks at what came later only."""
    done = subprocess.run([sys.executable, "-c", SPARED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


ORPHAN = """
import os, signal, sys
from progressdb_kms.process import end_with_parent
parent = os.getpid()
reading, writing = os.pipe()
if os.fork() == 0:
    os.close(reading)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if LATE:
        os.close(writing)
        while os.getppid() == parent:
            pass
        end_with_parent(parent)
    else:
        end_with_parent(parent)
        os.close(writing)
    print(signal.sigtimedwait({signal.SIGTERM}, 30).si_signo == signal.SIGTERM)
    os._exit(0)
os.close(writing)
os.read(reading, 1)
os.kill(parent, signal.SIGKILL)
"""


@pytest.mark.parametrize("late", [False, True])
def test_a_process_ends_with_its_parent(late):
    """SIGTERM comes when the parent is killed, and at once where it was killed before anybody asked."""
    script = ORPHAN.replace("LATE", str(late))
    # The output ends when the orphan has, too.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-9, "True\n"), done.stderr
