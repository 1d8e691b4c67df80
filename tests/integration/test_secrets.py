"""Nothing secret leaves the process but in the answers that carry it; nobody gets at its memory."""

from __future__ import annotations

import base64
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.api.problems import STATUS
from progressdb_kms.api.routes import ROUTES
from progressdb_kms.cli.app import run
from tests.integration.exposure import LIMITS, Exposure
from tests.integration.leaks import forms, leaks
from tests.integration.unprivileged import unprivileged_python
from tests.integration.world import Instance, World, launch_all

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

USER = os.geteuid() or 65534
"""Runs the service: the tests' own user, or nobody where that is root."""


@pytest.fixture(scope="module")
def python() -> Iterator[tuple[str, dict[str, str]]]:
    """Give an interpreter and an environment for the service's user."""
    with unprivileged_python(USER) as found:
        yield found


@pytest.fixture(scope="module")
def service(python: tuple[str, dict[str, str]], new_world: Callable[..., World]) -> Instance:
    """Run a service without any privilege, that logs and audits all it ever does, and may leave any core."""
    world = new_world(owner=USER)
    world.store.start()
    assert run(["audit", "keygen", "--out", str(world.root / "key")]) == 0
    files = world.root / "audit"
    files.mkdir()
    audit = {
        "key_file": str(world.root / "key" / "audit.yaml"),
        "directory": str(files),
        "data_plane": "each",
    }
    store = {"command_timeout": 3.0}
    service = world.instance("a", user=USER, log={"level": "debug"}, limits=LIMITS, audit=audit, store=store)
    plain = world.instance("plain", user=USER, log={"level": "debug"}, store=store)
    for each in (service, plain):
        each.python = python
    launch_all([service, plain])
    return service


def command(service: Instance, *words: object) -> subprocess.CompletedProcess[bytes]:
    """Run a command of the package as the service's user, with tracebacks."""
    assert service.python
    python, environment = service.python
    return subprocess.run(
        [python, "-m", "progressdb_kms.cli", *map(str, words)],
        user=USER,
        group=USER,
        extra_groups=[],
        env={**environment, "PROGRESSDB_KMS_TRACEBACK": "1"},
        cwd="/",
        capture_output=True,
        check=False,
    )


def test_the_search_finds_a_secret_in_each_form() -> None:
    """Were one there, it would be found: the test of the test."""
    secret = AESGCM.generate_key(256)
    encodings = (base64.b64encode, base64.urlsafe_b64encode)
    texts = [secret, secret.hex().encode(), secret.hex().upper().encode(), repr(secret).encode()]
    texts += [encode(bytes(shift) + secret + b"c") for shift in range(4) for encode in encodings]
    for text in texts:
        found = leaks({"it": secret}, {"here": b"before " + text + b" after"})
        assert found
        assert not any(form in " ".join(found).encode() for form in forms(secret).values())
    assert leaks({"it": secret}, {"here": AESGCM.generate_key(256) * 10}) == []


NOT_PROVOKED = {
    "overloaded": "no part of the service raises it: what is too much is refused before it is a request",
    "certificate_expired": "the connection is cut at that moment; it is for whoever is quicker than that",
    "kek_unreachable": "needs a KEK that is kept elsewhere; tests/integration/test_kept_keys.py",
    "not_ready": "a service that has never read the registry does not listen yet",
}
"""Codes that no request meets here, and why."""


@pytest.fixture(scope="module")
def exposure(service: Instance) -> Exposure:
    """Every route was used and every error was met, at log level debug."""
    _, plain = service.world.instances
    made = Exposure(service, plain, lambda *words: command(service, *words, "--config", service.config))
    done = command(service, "rotate", "--config", service.config)
    assert done.returncode == 0, done.stderr
    (rotation,) = service.client("operator").get("/v1/rotations").ok()["rotations"]
    made.add_keks()
    made.use_every_route(rotation["rotation_id"])
    made.provoke_bad_requests()
    made.provoke_states()
    made.provoke_limits()
    made.provoke_reloads()
    made.provoke_outages()
    return made


def test_every_route_and_every_error_was_met(exposure: Exposure) -> None:
    """The search is worth what was driven: a new route or code makes this fail until it is driven too."""
    assert exposure.routes == {f"{route.method} {route.path}" for route in ROUTES}
    assert exposure.codes >= set(STATUS) - set(NOT_PROVOKED), set(STATUS) - exposure.codes
    assert set(NOT_PROVOKED) <= set(STATUS) - exposure.codes, "it was met: take it off the list"


def test_nothing_secret_is_in_what_the_process_shows(service: Instance, exposure: Exposure) -> None:
    """No KEK, DEK, wrapped DEK, plaintext or AAD in logs, metrics, audit, errors, command line, environ."""
    places = outside(service) | {
        f"error {number}": answer.body + repr(answer.headers).encode()
        for number, answer in enumerate(exposure.answers)
    }
    plain = service.world.instances[1]
    places |= {f"{place} of the other": content for place, content in outside(plain).items()}
    stream = service.world.store.ask("XRANGE", "kms:{ctl}:audit", "-", "+")
    places["audit stream"] = b"".join(fields[1] for _, fields in stream)
    for path in (service.world.root / "audit").iterdir():
        places[f"audit file {path.name}"] = path.read_bytes()
    for text in (b'"level": "debug"', b"wrapped_key_invalid", b"internal_error"):
        assert text in places["stderr"]
    for place in ("stdout", "audit stream"):
        assert b'"audit":"key.create"' in places[place]
        assert b'"audit":"key.encrypt"' in places[place]
    assert any(place.startswith("audit file") for place in places)
    assert leaks(exposure.secrets, places) == []


def outside(service: Instance) -> dict[str, bytes]:
    """Return what others see of the process."""
    places = {
        "stdout": service.out.read_bytes(),
        "stderr": service.err.read_bytes(),
        "metrics": service.admin("/metrics").body,
        "readyz": service.admin("/readyz").body,
        "livez": service.admin("/livez").body,
        "cmdline": Path(f"/proc/{service.pid}/cmdline").read_bytes(),
        "status": Path(f"/proc/{service.pid}/status").read_bytes(),
    }
    if os.geteuid() == 0:  # others may not even read it, since the process is not dumpable
        places["environ"] = Path(f"/proc/{service.pid}/environ").read_bytes()
    return places


def test_the_service_needs_no_privilege(service: Instance) -> None:
    """It serves without root and without a capability; certificates are loaded, keys are made."""
    status = Path(f"/proc/{service.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert set(fields["Uid"].split()) == {str(USER)}
    assert int(fields["CapEff"], 16) == 0
    client = service.client("server")
    client.encrypt(client.create("t:1")["key_id"], b"message")
