"""What the process asks of the kernel, in processes of their own: it can't be taken back."""

import subprocess
import sys

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
