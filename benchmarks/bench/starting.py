"""From the start of the process until the service is ready, beside an instance on the same store."""

from __future__ import annotations

import compileall
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import yaml

import progressdb_kms

from .cases import Case, Key, Scene, Values
from .machine import SERVER_CORE, cpu_seconds, pin, resident_mib, two_cores
from .servers import REFERENCE_ENVIRONMENT, reference_command

POLL = 0.005
LIMIT = 60.0
"""Seconds until a service that does not become ready ends the benchmark."""


def starting_cases(scene: Scene) -> list[Case]:
    """Return the cases of a start: ``serve`` until ``/readyz`` says 200; the reference until it listens."""
    command = reference_command(scene.ready)
    # As in the image and in an installed wheel: a checkout may have no bytecode, and the environment may
    # forbid to write it, which makes every start compile all modules.
    compileall.compile_dir(progressdb_kms.__path__[0], quiet=1)
    return [
        Case(Key("start", "cold start to ready", "service", 1), partial(start_service, scene.ready)),
        Case(Key("start", "cold start to ready", "reference", 1), partial(_start_reference, command)),
    ]


def start_service(ready: dict[str, Any]) -> Values:
    """Start a second service on the store of the first, wait until it is ready, and end it.

    Returns:
        Milliseconds until it was ready, its CPU milliseconds and MiB of memory by then, and whether it failed
        to end in order.
    """
    config, admin_port = _config(Path(ready["config"]))
    command = [sys.executable, "-m", "progressdb_kms.cli", "serve", "--config", str(config)]
    if two_cores():
        command = ["taskset", "-c", str(SERVER_CORE), *command]
    with config.with_suffix(".log").open("w") as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while not _is_ready(admin_port):
            if process.poll() is not None or time.perf_counter() > began + LIMIT:
                sys.exit(config.with_suffix(".log").read_text())
            time.sleep(POLL)
        took, spent = time.perf_counter() - began, cpu_seconds(process.pid)
        rss = resident_mib(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    return {"ms": took * 1e3, "cpu_ms": spent * 1e3, "rss_mib": rss, "failed": int(code != 0)}


def _config(first: Path) -> tuple[Path, int]:
    """Write a configuration with ports of its own beside the first service's; gives it and its admin port."""
    document = yaml.safe_load(first.read_text())
    ports = []
    for section in ("listen", "admin"):
        with socket.create_server(("127.0.0.1", 0)) as free:
            document[section]["port"] = free.getsockname()[1]
        ports.append(document[section]["port"])
    del document["listen"]["unix"]
    config = first.with_name("second.yaml")
    config.write_text(yaml.safe_dump(document))
    return config, ports[1]


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1) as answer:
            return bool(answer.status == HTTPStatus.OK)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _start_reference(command: list[str]) -> Values:
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **REFERENCE_ENVIRONMENT}
    )
    try:
        pin(process.pid, SERVER_CORE)
        if process.stdout is None or not process.stdout.readline():
            sys.exit("the reference did not start")
        took, spent = time.perf_counter() - began, cpu_seconds(process.pid)
        return {"ms": took * 1e3, "cpu_ms": spent * 1e3, "rss_mib": resident_mib(process.pid)}
    finally:
        process.kill()
        process.wait()
