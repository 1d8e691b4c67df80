"""The tutorial's part on one machine, run as written; its part on a cluster is run by tests/cluster."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.checkout import ROOT, make_checkout, reader
from tests.docs.walkthrough import Step, Terminals, shows, steps

TUTORIAL = ROOT / "docs" / "tutorial.md"


@pytest.fixture
def directory() -> Iterator[Path]:
    """Return a folder with a short name: the store's Unix socket lies below it."""
    path = Path(tempfile.mkdtemp(prefix="kms-"))
    yield path
    shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_on_one_machine(directory: Path, tmp_path: Path) -> None:
    """Every command of the part `local` does what the page says, from a checkout, on real processes."""
    make_checkout(directory)
    # The page's ports may be in use where tests run.
    terminals = Terminals(directory, tmp_path, reader(ARGS="--port 0 --admin-port 0"), deadline=120)
    try:
        terminals.run(steps(TUTORIAL.read_text())["local"])
    finally:
        terminals.close()
    assert {path.name for path in directory.iterdir()} - {path.name for path in ROOT.iterdir()} <= {
        ".dev",
        ".venv",
    }


def test_every_part_is_run() -> None:
    """Each block of commands belongs to a part that a test runs."""
    parts = steps(TUTORIAL.read_text())
    assert set(parts) == {"local", "cluster"}
    assert 'steps(TUTORIAL.read_text())["cluster"]' in (ROOT / "tests/cluster/test_9_tutorial.py").read_text()


PAGE = """
<!-- test: part one -->
<!-- test: background -->
```sh
serve
```

```text
ready
```

```sh
cat <<END
```

<!-- test: ctrl-c -->
"""


def test_page_is_read() -> None:
    """Blocks, what they print and marks come out in the page's order."""
    assert steps(PAGE) == {
        "one": [Step(4, "serve\n", "ready\n", background=True), Step(12, "cat <<END\n"), Step(16)]
    }


@pytest.mark.parametrize(
    "page",
    [
        "```sh\nls\n```\n",  # outside of any part
        "<!-- test: part a -->\n```bash\nls\n```\n",
        "<!-- test: part a -->\n```\nls\n```\n",
        "<!-- test: part a -->\n- item\n  ```sh\n  ls\n  ```\n",
        "<!-- test: part a -->\n```sh title=x\nls\n```\n",
        "<!-- test: part a -->\n    ls\n",
        "<!-- test: part a -->\n~~~sh\nls\n~~~\n",
        "<!-- test: part a -->\n```sh\nls\n```\nwords\n\n```text\nfile\n```\n",
        "<!-- test: part a -->\n<!-- test: skip -->\n",
    ],
)
def test_what_would_not_be_run_is_refused(page: str) -> None:
    """A block that no test would run, or output of no command, is an error and not passed over."""
    with pytest.raises(ValueError, match=r"line \d"):
        steps(page)


@pytest.mark.parametrize(
    "expected, output, same",
    [
        ("a\n", "a\n", True),
        ("a  b\n", "  a b  \n", True),
        ("a\n", "a\nb\n", False),
        ("a\n", "", False),
        ("a\n...\n", "a\nb\nc\n", True),
        ("...\nc\n", "a\nb\nc\n", True),
        ("...\nc\n", "a\nb\n", False),
        ("k_...\n", "k_AB\n", True),
        ("k_...\n", "k_AB\nk_CD\n", False),
        ("k ... b\n", "k x y b\n", True),
        ("a.c\n", "abc\n", False),
    ],
)
def test_output_is_compared(expected: str, output: str, same: bool) -> None:
    """Dots stand for anything in a line, or for lines; everything else has to be there."""
    assert shows(expected, output) is same


def test_a_command_that_fails_ends_it(tmp_path: Path) -> None:
    """A status other than 0 fails, within a pipe too, and another output than the page's."""
    for command, expected in (("false | cat\n", None), ("echo no\n", "yes\n"), ("exit 0\n", None)):
        terminals = Terminals(tmp_path, tmp_path, reader(), deadline=30)
        with pytest.raises(AssertionError, match="line 7"):
            terminals.run([Step(7, command, expected)])
        terminals.close()
        for path in tmp_path.iterdir():
            path.unlink()
