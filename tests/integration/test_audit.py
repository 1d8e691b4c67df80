"""The audit log of real services: kept through crashes, checked by command, spoilt and found out."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.contract.wire_client import Client, assert_problem
from tests.integration.world import Instance, World, eventually, launch_all

STREAM, HEADS = "kms:{ctl}:audit", "kms:{ctl}:audit:heads"


def command(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command of the package."""
    line = [sys.executable, "-m", "progressdb_kms.cli", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=100, check=False)


def verify(*words: object) -> dict[str, Any]:
    """Run ``audit verify`` and return its report; the exit code agrees with it."""
    done = command("audit", "verify", *words, "--json")
    assert done.returncode in {0, 3}, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["intact"] == (done.returncode == 0)
    return report


@pytest.fixture(scope="module")
def world(new_world: Callable[..., World]) -> World:
    """A store and an audit key."""
    made = new_world()
    made.store.start()
    assert command("audit", "keygen", "--out", made.root / "key").returncode == 0
    return made


@pytest.fixture(scope="module")
def pair(world: World) -> list[Instance]:
    """Two instances: one that keeps files too, and counts calls; one that writes each call."""
    files = world.root / "files"
    files.mkdir()
    key = str(world.root / "key" / "audit.yaml")
    first = {"key_file": key, "directory": str(files), "data_plane": "counted", "data_plane_interval": 1}
    one = world.instance("one", audit=first)
    two = world.instance("two", audit={"key_file": key, "data_plane": "each"})
    launch_all([one, two])
    return [one, two]


@pytest.fixture
def public(world: World) -> Path:
    """What an auditor has."""
    return world.root / "key" / "audit.pub"


def work(client: Client, thread_id: str) -> str:
    """Make a key and change its state."""
    key_id = client.create(thread_id)["key_id"]
    client.post(f"/v1/keys/{key_id}/disable").ok()
    return str(key_id)


def records(instance: Instance, **query: str) -> list[dict[str, Any]]:
    """Return what the API says, all pages."""
    client, found, cursor = instance.client("operator"), [], None
    while True:
        page = client.get("/v1/audit", {**query, **({"cursor": cursor} if cursor else {})}).ok()
        found += [json.loads(line) for line in page["records"]]
        cursor = page["cursor"]
        if cursor is None:
            return found


def test_changes_are_announced_and_told(world: World, pair: list[Instance], public: Path) -> None:
    """Of both instances, in the stream, on the standard output, in files; an auditor needs no secret."""
    for number, instance in enumerate(pair):
        key_id = work(instance.client("operator"), f"room:{number}")
        told = [(each["audit"], each["outcome"]) for each in records(instance, key_id=key_id)]
        assert told == [
            ("key.create", "intent"),
            ("key.create", "ok"),
            ("key.disable", "intent"),
            ("key.disable", "ok"),
        ]
    report = verify("--config", pair[0].config)
    assert (report["problems"], len(report["chains"])) == (0, 2)
    assert verify("--config", pair[0].config, "--public-key", public)["problems"] == 0
    assert verify(world.root / "files", "--config", pair[0].config, "--partial")["problems"] == 0
    # Another instance's chain is not in these files.
    assert verify(world.root / "files", "--config", pair[0].config)["found"][0]["kind"] == "missing_chain"
    outputs = [instance.out for instance in pair]
    eventually(lambda: verify(*outputs, "--config", pair[0].config)["problems"] == 0)
    with pair[0].out.open() as lines:
        assert json.loads(next(lines))["audit"] == "audit.open"


def test_only_auditors_may_read(pair: list[Instance]) -> None:
    """A server may not, and that it tried is recorded; bad questions are named."""
    one = pair[0]
    answer = one.client("server").get("/v1/audit")
    assert assert_problem(answer, 403, "permission_denied")["permission"] == "audit:read"
    eventually(lambda: [each for each in records(one, action="refused") if "audit:read" in each["detail"]])
    operator = one.client("operator")
    for query in ({"cursor": "x"}, {"since": "yesterday"}, {"limit": "0"}, {"colour": "red"}):
        assert_problem(operator.get("/v1/audit", query), 400, "invalid_parameter")
    assert records(one, since="2100-01-01T00:00:00Z") == []
    assert len(records(one, since="2020-01-01T00:00:00Z", limit="1")) == len(records(one)) >= 2


def test_calls_are_counted_or_written_each(pair: list[Instance]) -> None:
    """By setting; never what was encrypted."""
    for instance in pair:
        client = instance.client("operator")
        key_id = client.create("room:calls")["key_id"]
        for _ in range(5):
            client.encrypt(key_id, b"a secret message")
        items = [{"key_id": key_id, "plaintext": ""}] * 3
        client.post("/encrypt_batch", {"items": items}).ok()
    one, two = pair

    def counted() -> int:
        mine = records(one, action="key.encrypt", identity="dns:operator")
        told = [each for each in mine if "count=" in each.get("detail", "")]
        return sum(int(each["detail"].split()[0].removeprefix("count=")) for each in told)

    eventually(lambda: counted() == 8, "five and three are counted")
    eventually(lambda: len(records(two, action="key.encrypt", key_id=key_id)) == 8)
    assert "secret message" not in json.dumps(records(two))


def test_while_the_store_is_away_nothing_is_changed(world: World, pair: list[Instance]) -> None:
    """Changes are refused with 503; cached keys go on serving; after it the log is whole."""
    one = pair[0]
    key_id = one.client("server").create("room:away")["key_id"]
    client = one.warm(key_id)
    operator = one.client("operator")
    world.store.pause()
    try:
        answer = operator.post(f"/v1/keys/{key_id}/disable")
        assert (answer.status, answer.json()["retryable"]) == (503, True)
        client.encrypt(key_id, b"goes on")
    finally:
        world.store.resume()
    eventually(lambda: operator.post(f"/v1/keys/{key_id}/disable").status == 200)
    assert verify("--config", one.config)["problems"] == 0


def test_a_kill_loses_nothing_that_was_told(world: World, pair: list[Instance], public: Path) -> None:
    """Killed amid traffic, again and again: every acknowledged change is in the log, in files and stream."""
    files = world.root / "files"
    one, two = pair
    acknowledged: list[str] = []
    for _ in range(3):
        stop = threading.Event()

        def make(number: int, done: threading.Event) -> None:
            client = one.client("operator")
            try:
                client.get("/healthz").ok()
                client.connect_no_more()
                while not done.is_set():
                    acknowledged.append(client.create(f"room:kill:{number}")["key_id"])
            except (OSError, http.client.HTTPException, AssertionError):
                return
            finally:
                client.close()

        before = len(acknowledged)
        threads = [threading.Thread(target=make, args=(number, stop)) for number in range(4)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(acknowledged) >= before + 30)  # noqa: B023 - called before it changes
        one.kill()
        stop.set()
        for thread in threads:
            thread.join()
        one.start()
    report = verify("--config", two.config)
    assert report["problems"] == 0, report["found"]
    assert sum(not chain["closed"] for chain in report["chains"]) >= 3
    made = {each["key_id"] for each in records(two, action="key.create") if each["outcome"] == "ok"}
    assert set(acknowledged) <= made
    report = verify(files, "--config", one.config, "--partial", "--public-key", public)
    assert report["problems"] == 0, report["found"]


def test_an_export_can_be_verified_by_its_own(world: World, pair: list[Instance], public: Path) -> None:
    """With the public key and the file alone; and any line taken out is named."""
    work(pair[0].client("operator"), "room:export")
    export = world.root / "export"
    done = command("audit", "export", "--config", pair[0].config, "--out", export, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["records"] >= 7
    assert export.stat().st_mode & 0o777 == 0o600
    report = verify(export, "--public-key", public)
    assert report["problems"] == 0, report["found"]
    lines = export.read_bytes().splitlines(keepends=True)
    place = next(number for number, line in enumerate(lines) if b"key.disable" in line)
    spoilt = world.root / "spoilt"
    spoilt.write_bytes(b"".join(lines[:place] + lines[place + 1 :]))
    (found,) = verify(spoilt, "--public-key", public)["found"]
    assert (found["kind"], found["first"]) == ("removed", json.loads(lines[place])["seq"])
    assert command("audit", "export", "--config", pair[0].config, "--out", export).returncode == 1
    told = [each["outcome"] for each in records(pair[0], action="audit.export")]
    assert told[:2] == ["intent", "ok"]


def test_who_writes_to_the_store_is_found_out(world: World, pair: list[Instance]) -> None:
    """A record taken out of the stream, and a whole chain with its head."""
    work(pair[0].client("operator"), "room:spoilt")
    # Each chain's opening names those before it.
    assert command("kek", "escrow", "list", "--config", pair[0].config).returncode == 0
    entries = world.store.ask("XRANGE", STREAM, "-", "+")
    place, fields = next((key, value) for key, value in entries if b"key.disable" in value[1])
    world.store.ask("XDEL", STREAM, place)
    report = verify("--config", pair[0].config)
    seq = json.loads(fields[1])["seq"]
    assert [(each["kind"], each["first"]) for each in report["found"]] == [("removed", seq)]
    with pair[1].out.open() as lines:
        spared = json.loads(next(lines))["chain"]  # a later test looks how this one ends
    chains = [json.loads(value[1])["chain"] for _, value in entries]
    chain = next(each for each in chains if each != spared)
    for (key, _), each in zip(entries, chains, strict=True):
        if each == chain:
            world.store.ask("XDEL", STREAM, key)
    world.store.ask("HDEL", HEADS, chain)
    kinds = {(each["kind"], each["chain"]) for each in verify("--config", pair[0].config)["found"]}
    assert ("missing_chain", chain) in kinds


def test_commands_are_audited(world: World, pair: list[Instance], tmp_path: Path) -> None:
    """Backups and readings of the escrow, each process in a chain of its own."""
    config = pair[1].config
    assert command("backup", "create", "--config", config, "--out", tmp_path / "b").returncode == 0
    assert command("kek", "escrow", "list", "--config", config).returncode == 0
    told = [
        (each["audit"], each["outcome"]) for each in records(pair[0]) if "uid:" in each.get("identity", "")
    ]
    for action in ("backup.export", "kek.escrow-read"):
        assert (action, "intent") in told
        assert (action, "ok") in told


def test_records_are_shown(world: World, pair: list[Instance]) -> None:
    """By command, as a table or as they are; the latter can be verified."""
    one = pair[0]
    key_id = work(one.client("operator"), "room:shown")
    cert, key = world.certificate("operator")
    where = ["--url", f"https://localhost:{one.port}", "--ca", world.ca_file, "--cert", cert, "--key", key]
    table = command("audit", "show", *where, "--key-id", key_id)
    assert table.returncode == 0, table.stderr
    assert [line.split()[1:4] for line in table.stdout.splitlines()[1:]] == [
        ["key.create", "intent", "dns:operator"],
        ["key.create", "ok", "dns:operator"],
        ["key.disable", "intent", "dns:operator"],
        ["key.disable", "ok", "dns:operator"],
    ]
    shown = command("audit", "show", *where, "--thread-id", "room:shown", "--json")
    lines = world.root / "shown.jsonl"
    lines.write_text(shown.stdout)
    report = verify(lines, "--key", world.root / "key" / "audit.yaml", "--partial")
    assert report["records"] == 4
    assert {each["kind"] for each in report["found"]} <= {"removed"}  # what others did in between


def test_a_rotation_is_audited(world: World, pair: list[Instance]) -> None:
    """Its steps are in the stream, in a chain of the job's own that is closed."""
    done = command("rotate", "--config", pair[1].config)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    steps = [each for each in records(pair[0]) if each["audit"].startswith(("rotation.", "kek.activate"))]
    told = [(each["audit"], each["outcome"]) for each in steps]
    assert told[0] == ("rotation.begin", "intent")
    assert told[-1] == ("rotation.finish", "ok")
    assert ("kek.activate", "intent") in told
    chains = {chain["chain"]: chain["closed"] for chain in verify("--config", pair[1].config)["chains"]}
    assert chains[steps[0]["chain"]]


def test_an_end_in_order_closes_the_chain(world: World, pair: list[Instance]) -> None:
    """SIGTERM leaves no open end."""
    two = pair[1]
    two.stop()
    last = [line for line in two.out.read_bytes().splitlines() if line.startswith(b'{"audit"')][-1]
    assert b'"audit.close"' in last


def test_unchained_is_said(world: World, new_world: Callable[..., World]) -> None:
    """Without a key it works as before, and says at the start that nothing vouches for the log."""
    plain = world.instance("plain")
    plain.start()
    work(plain.client("operator"), "room:plain")
    plain.stop()
    assert plain.logged("audit_unchained")
    assert all(b'"chain"' not in line for line in plain.out.read_bytes().splitlines())
