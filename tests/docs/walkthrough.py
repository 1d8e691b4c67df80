"""Runs what docs/tutorial.md shows, block by block, in one shell, as its reader does.

The marks, which no reader sees, are comments on a line of their own:

    <!-- test: part NAME -->     what follows, up to the next part, is run together
    <!-- test: background -->    the next block goes on while the reader does other things in another terminal
    <!-- test: ctrl-c -->        here the reader presses Ctrl-C in that terminal

Blocks in ``sh`` are run; one that ends with a status other than 0 fails, in a pipe too. A block in ``text``
behind one is what it prints, standard error included. ``...`` stands for anything within a line, and on a
line of its own for any number of lines; blanks at the ends of lines don't count, nor how many there are.
What runs in the background is waited for until it has printed its block.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

_LINE: Final = re.compile(r"^```(?P<fence>\w*)$|^<!-- test: (?P<mark>.*) -->$")
LANGUAGES: Final = frozenset({"sh", "text", "python", "yaml"})


@dataclass(frozen=True)
class Step:
    """One thing that the reader does.

    Attributes:
        line: Where it stands in the page.
        command: The block; empty for Ctrl-C.
        expected: What it prints, None where the page does not say.
        background: It goes on running.
    """

    line: int
    command: str = ""
    expected: str | None = None
    background: bool = False


class _Reader:
    """What has been read of a page so far."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Step]] = {}
        self._part: list[Step] | None = None
        self._background = False
        self._follows = False
        """Nothing but blank lines stands between a block of commands and this line."""

    def mark(self, number: int, mark: str) -> None:
        """Take a mark."""
        word, _, name = mark.partition(" ")
        if word == "part" and name:
            self._part = self.parts.setdefault(name, [])
        elif mark == "background":
            self._background = True
        elif mark == "ctrl-c" and self._part is not None:
            self._part.append(Step(number))
        else:
            raise ValueError(f"line {number}: unknown mark: {mark}")
        self._follows = False

    def block(self, number: int, language: str, text: str) -> None:
        """Take a block."""
        if language in {"python", "yaml"}:
            self._follows = False
        elif language not in LANGUAGES or self._part is None:
            raise ValueError(f"line {number}: a block of no known kind, or outside of any part")
        elif language == "sh":
            self._part.append(Step(number, text, background=self._background))
            self._background, self._follows = False, True
        elif self._follows:
            self._part.append(replace(self._part.pop(), expected=text))
            self._follows = False
        else:
            raise ValueError(f"line {number}: whose output is this? It has to follow its command")

    def other(self, number: int, line: str) -> None:
        """Take a line of text."""
        if line.startswith(("~~~", "    ", "\t", "<!-- test")) or line.lstrip().startswith("```"):
            raise ValueError(f"line {number}: a block that nobody runs, or an unknown mark: {line}")
        self._follows = self._follows and not line.strip()


def steps(page: str) -> dict[str, list[Step]]:
    """Return what a page has its reader do, by part.

    Raises:
        ValueError: A block or a mark that would not be run, with its line.
    """
    reader = _Reader()
    lines = iter(enumerate(page.splitlines(), 1))
    for number, line in lines:
        match = _LINE.match(line)
        if match is None:
            reader.other(number, line)
        elif match["mark"]:
            reader.mark(number, match["mark"])
        else:
            inner = itertools.takewhile(lambda numbered: numbered[1] != "```", lines)
            reader.block(number, match["fence"], "".join(f"{text}\n" for _, text in inner))
    return reader.parts


def _line_pattern(line: str) -> str:
    if line.strip() == "...":
        return r"(?:[^\n]*\n)*?"
    words = (".*?".join(map(re.escape, word.split("..."))) for word in line.split())
    return r"[^\S\n]*" + r"[^\S\n]+".join(words) + r"[^\S\n]*\n"


def shows(expected: str, output: str, *, so_far: bool = False) -> bool:
    """Tell whether a command printed what the page shows; ``so_far`` lets more stand behind it."""
    if output and not output.endswith("\n"):
        output += "\n"
    pattern = "".join(map(_line_pattern, expected.splitlines()))
    match = re.match if so_far else re.fullmatch
    return match(pattern, output) is not None


class Terminals:
    """The reader's terminals: one shell, and what runs beside it.

    Args:
        directory: Where the checkout is.
        scratch: For scripts and outputs.
        environment: Of all commands.
        deadline: Seconds that one step may take; only a failure meets it.
    """

    def __init__(self, directory: Path, scratch: Path, environment: dict[str, str], deadline: float) -> None:
        self._directory = directory
        self._scratch = scratch
        self._environment = environment
        self._deadline = deadline
        self._beside: list[subprocess.Popen[bytes]] = []
        self._shell: subprocess.Popen[bytes] = subprocess.Popen(
            ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail"],
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )

    def run(self, todo: Iterable[Step]) -> None:
        """Do what the page says; the first step that does not go as it says fails the test."""
        for step in todo:
            if not step.command:
                self._interrupt()
            elif step.background:
                self._begin(step)
            else:
                self._do(step)

    def close(self) -> None:
        """End whatever runs."""
        self._interrupt()
        self._end(self._shell, signal.SIGKILL)
        assert self._shell.stdin is not None
        self._shell.stdin.close()

    def _files(self, step: Step) -> tuple[Path, Path]:
        script = self._scratch / f"{step.line}.sh"
        script.write_text(step.command)
        return script, script.with_suffix(".out")

    def _do(self, step: Step) -> None:
        script, output = self._files(step)
        done = script.with_suffix(".done")
        assert self._shell.stdin is not None
        # Sourced, so that variables stay; a failure ends the shell before it can say that it is done.
        self._shell.stdin.write(f". {script} > {output} 2>&1 < /dev/null\n: > {done}\n".encode())
        self._wait(step, output, self._shell, done.exists)
        printed = output.read_text()
        assert step.expected is None or shows(step.expected, printed), (
            f"line {step.line} printed:\n{printed}\nand the page shows:\n{step.expected}"
        )

    def _begin(self, step: Step) -> None:
        script, output = self._files(step)
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-e", str(script)],
                cwd=self._directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._beside.append(process)
        self._wait(step, output, process, lambda: shows(step.expected or "", output.read_text(), so_far=True))

    def _wait(
        self, step: Step, output: Path, process: subprocess.Popen[bytes], done: Callable[[], bool]
    ) -> None:
        end = time.monotonic() + self._deadline
        while not done():
            # Once more after the end: it may have come between the two questions.
            ended = process.poll() is not None and not done()
            if ended or time.monotonic() > end:
                why = "ended" if ended else "has not come to its end"
                printed = output.read_text() if output.exists() else ""
                raise AssertionError(f"line {step.line} {why}:\n{step.command}\n{printed[-4000:]}")
            time.sleep(0.05)

    def _interrupt(self) -> None:
        for process in self._beside:
            self._end(process, signal.SIGINT)
        self._beside = []

    def _end(self, process: subprocess.Popen[bytes], number: int) -> None:
        if process.poll() is None:
            # The whole group, as a terminal does: what make started gets it from the terminal too.
            os.killpg(process.pid, number)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
