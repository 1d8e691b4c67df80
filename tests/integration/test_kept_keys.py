"""KEKs that services only name, on a PKCS#11 token and in a transit engine: rotations there and back."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.contract.wire_client import assert_problem, b64
from tests.integration.rotating import (
    ROOT,
    Job,
    assert_readable,
    let_lock_run_out,
    make_keys,
    rotate,
    stored_versions,
)
from tests.integration.world import Instance, World, eventually, write_private
from tests.keepers.softhsm import SoftHsm, make_token
from tests.keepers.transit import Transit, serving_transit

KEYS = 150
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "service")])
MANY = 10_000 if "FAULT_RUNS" in os.environ else 2_000
PROMPT = {"PROGRESSDB_KMS_PAUSE": "1"}
"""For processes that soon ask again for a key that gave no answer; in production they pause for 10 s."""


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftHsm]:
    """A token, for the processes that are started from now on."""
    token = make_token(tmp_path_factory.mktemp("hsm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(token.conf))
        yield token


@pytest.fixture(scope="module")
def transit() -> Iterator[Transit]:
    """A transit engine."""
    with serving_transit() as engine:
        yield engine


@pytest.fixture(scope="module")
def world(new_world: Callable[..., World], hsm: SoftHsm, transit: Transit) -> World:
    """A store with two services on it that know where keys are kept."""
    made = new_world()
    made.store.start()
    token = made.root / "token"
    write_private(token, "root\n")
    kek = {
        "pkcs11": hsm.section(),
        "vault": {"address": transit.address, "token_file": str(token), "timeout": 10},
    }
    for name in ("a", "b"):
        service = made.instance(name, kek=kek)
        service.module = "tests.fault.rotate_with_faults"
        service.python = (sys.executable, {**os.environ, **PROMPT, "PYTHONPATH": PATHS})
        service.start()
    return made


def command(*words: object, code: int = 0) -> dict[str, object]:
    """Run a command and return its JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "progressdb_kms.cli", *map(str, words), "--json"],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return dict(json.loads(done.stdout)) if done.stdout else {"error": done.stderr}


def add(instance: Instance, key: str, *options: str) -> object:
    """Add a KEK and wait until both services have it loaded."""
    version = command("kek", "add", "--config", instance.config, key, *options)["version"]
    for each in instance.world.instances:
        each.until("kms_kek_versions_loaded", lambda count: count == version)
    return version


def engine_key(transit: Transit) -> str:
    """Make a key there; return the name of its first version."""
    name = f"kms-{secrets.token_hex(4)}"
    transit.add_key(name)
    return f"vault:{name}@1"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_there_and_back_again(world: World, transit: Transit, tmp_path: Path) -> None:
    """From the file to the token, to the engine and back: no key is lost, and a restart finds all."""
    one, two = world.instances
    sealed = make_keys(one.client("server"), KEYS)
    names = ["pkcs11:kek one", engine_key(transit)]
    for key in names:
        version = add(one, key, *(["--generate"] if key.startswith("pkcs11") else []))
        assert rotate(one)["target_version"] == version
        assert stored_versions(world).keys() == {str(version)}
        sealed += make_keys(one.client("server"), 3)
        for each in world.instances:
            assert_readable(each.client("server"), sealed)
    listed = one.client("operator").get("/v1/keks").ok()["keks"]
    assert listed[0]["source"] == "file"
    assert [kek["source"] for kek in listed[-2:]] == ["pkcs11", "vault"]
    # A heartbeat of one that is killed would be waited for by the next rotation.
    two.stop()
    two.start()
    assert_readable(two.client("server"), sealed)
    doctor = subprocess.run(
        [sys.executable, "-m", "progressdb_kms.cli", "doctor", "--config", one.config],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    for name in names:
        assert f"{name} wraps and unwraps" in doctor
    assert "every version that keys need is loaded" in doctor
    # An export is sealed under the token's key: another process checks it.
    export = tmp_path / "export"
    command("backup", "create", "--config", one.config, "--out", export)
    assert command("backup", "verify", export, "--config", one.config)["seal"] == "good"
    back = rotate(one)
    assert back["quarantined_total"] == 0
    assert one.client("operator").get("/v1/keks").ok()["keks"][-1]["source"] == "file"
    for each in world.instances:
        assert_readable(each.client("server"), sealed)


def test_a_job_that_dies_goes_on_with_the_same_key(world: World) -> None:
    """A token gives another check value each time it is asked: the registered one counts."""
    one = world.instances[0]
    sealed = make_keys(one.client("server"), KEYS)
    version = add(one, f"pkcs11:{secrets.token_hex(4)}", "--generate")
    for point in ("registered", "rewrap:slot:200"):
        assert Job(one, fault=point, lease=1).exit_code() == -signal.SIGKILL
        let_lock_run_out(world)
    assert rotate(one, lease=1)["target_version"] == version
    assert_readable(one.client("server"), sealed)


def test_while_the_engine_is_away(world: World, transit: Transit) -> None:
    """What is in memory serves; the rest is 503, without a word of where it is; all comes back by itself."""
    one, two = world.instances
    known, unknown = make_keys(one.client("server"), 2)
    add(one, engine_key(transit))
    rotate(one)
    assert_readable(one.client("server"), [known])
    transit.sealed = True
    assert_readable(one.client("server"), [known])
    refused = two.client("server").post("/decrypt", {"key_id": unknown[0], "ciphertext": b64(unknown[2])})
    problem = assert_problem(refused, 503, "kek_unreachable")
    assert problem["retryable"]
    assert int(refused.headers["retry-after"]) > 0
    assert "127.0.0.1" not in refused.body.decode()
    assert_problem(
        two.client("server").post("/create_dek_for_thread", {"thread_id": "t"}), 503, "kek_unreachable"
    )
    two.wait_logged("kek_not_usable")
    assert transit.address in two.logged("kek_not_usable")[0]["detail"]
    # Known to be the right one before, so neither is taken out of service; who starts now has to wait.
    assert [each.probe("/readyz") for each in world.instances] == [200, 200]
    two.stop()
    two.launch()
    eventually(lambda: two.probe("/readyz") == 503 and "503 to decrypt" in two.reasons(), "it waits")
    transit.sealed = False
    two.wait_ready()
    assert_readable(two.client("server"), [known, unknown])
    assert_readable(one.client("server"), [known, unknown])


def test_a_rotation_waits_for_the_engine(world: World, transit: Transit) -> None:
    """Nothing is put aside that could only not be looked at."""
    one = world.instances[0]
    sealed = make_keys(one.client("server"), KEYS)
    add(one, engine_key(transit))
    job = Job(one, freeze="rewrap:slot:200", environment=PROMPT)
    job.wait_frozen()
    transit.sealed = True
    job.process.send_signal(signal.SIGCONT)
    eventually(lambda: "kek_not_usable" in job.text, "it has noticed")
    transit.sealed = False
    result = job.result()
    assert result["quarantined_total"] == 0
    assert_readable(one.client("server"), sealed)


def test_a_key_that_will_not_do_is_not_added(world: World, transit: Transit) -> None:
    """Not there, of no place that is configured, not to be made here, or there already."""
    one = world.instances[0]
    key = engine_key(transit)
    before = world.kek_file.read_text()
    for name, options, message in [
        ("vault:none@1", [], "is there such a key"),
        ("pkcs11:none", [], "has no secret key 'none'"),
        ("aws:arn:aws:kms:eu-central-1:123456789012:key/1", [], "add kek.aws"),
        (key, ["--generate"], "make it where it is kept"),
        ("gcp:x", [], "pkcs11:LABEL, vault:KEY@VERSION or aws:ARN"),
    ]:
        refused = command("kek", "add", "--config", one.config, name, *options, code=1)["error"]
        assert message in str(refused), refused
    transit.binds_aad = False
    refused = command("kek", "add", "--config", one.config, key, code=1)["error"]
    assert "does not bind" in str(refused)
    assert world.kek_file.read_text() == before
    transit.binds_aad = True
    add(one, key)
    refused = command("kek", "add", "--config", one.config, key, code=1)["error"]
    assert "names this key already" in str(refused)
    # A rotation would take the first of two.
    other = engine_key(transit)
    refused = command("kek", "add", "--config", one.config, other, code=1)["error"]
    assert "not in use yet: run rotate first" in str(refused)
    rotate(one)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_thousands_of_keys_to_the_token_and_back(world: World) -> None:
    """Each is rewrapped, verified, and readable at every instance; with FAULT_RUNS set there are 10,000."""
    one, two = world.instances
    with ThreadPoolExecutor(2) as pool:
        sealed = [
            key
            for part in pool.map(lambda each: make_keys(each.client("server"), MANY // 2), world.instances)
            for key in part
        ]
    version = add(one, f"pkcs11:{secrets.token_hex(4)}", "--generate")
    there = rotate(one)
    assert there["target_version"] == version
    assert there["counts"]["rewrapped"] >= MANY
    assert_readable(two.client("server"), sealed)
    back = rotate(one)
    assert back["counts"]["rewrapped"] >= MANY
    assert_readable(two.client("server"), sealed)
    assert stored_versions(world).keys() == {str(back["target_version"])}
    print(f"{MANY} keys: to the token {there['seconds']} s, back {back['seconds']} s", file=sys.stderr)  # noqa: T201 - a figure
