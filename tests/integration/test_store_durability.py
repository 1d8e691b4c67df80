"""A store that could lose acknowledged keys is refused: at start, and when it changes while in use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tests.contract.wire_client import Answer, assert_problem
from tests.integration.world import Instance, World, eventually, launch_all
from tests.store.servers import EVERYSEC

UNFIT = {
    "appendonly": ("appendonly", "no", "yes"),
    "everysec": ("appendfsync", "everysec", "always"),
    "no-fsync": ("appendfsync", "no", "always"),
    "rewrite": ("no-appendfsync-on-rewrite", "yes", "no"),
    "eviction": ("maxmemory-policy", "allkeys-lru", "noeviction"),
}
"""Name: the setting, its unfit value on Redis 7.0, the value that mends it."""


def create(service: Instance) -> Answer:
    """Ask for a key and return the answer whatever it is."""
    return service.client("server").post("/create_dek_for_thread", {"thread_id": "t:1"})


@dataclass
class Seen:
    """What a service showed while its store was unfit, and when it was mended."""

    reasons: str = ""
    unready: int = 0
    refusal: Answer = field(default_factory=lambda: Answer(0, {}, b""))
    old_key: bytes = b""
    ready: int = 0
    mended: int = 0


@pytest.fixture(scope="module")
def running(new_world: Callable[..., World]) -> dict[str, Seen]:
    """Run a service on a fit store for each way of being unfit; change all stores, look, mend all, look."""
    worlds = {name: new_world() for name in UNFIT}
    for world in worlds.values():
        world.store.start()
    launch_all([world.instance("a") for world in worlds.values()])
    services = {name: world.instances[0] for name, world in worlds.items()}
    keys = {name: create(service).ok()["key_id"] for name, service in services.items()}
    for name, (setting, unfit, _) in UNFIT.items():
        worlds[name].store.ask("CONFIG", "SET", setting, unfit)
    seen = {}
    for name, service in services.items():
        reasons = eventually(service.reasons, name)
        seen[name] = Seen(
            reasons=reasons,
            unready=service.probe("/readyz"),
            refusal=create(service),
            old_key=service.client("server").encrypt(keys[name], b"message"),
        )
    for name, (setting, _, fit) in UNFIT.items():
        worlds[name].store.ask("CONFIG", "SET", setting, fit)
    for name, service in services.items():
        service.wait_ready()
        seen[name].ready = service.probe("/readyz")
        seen[name].mended = create(service).status
    return seen


@pytest.mark.parametrize("name", UNFIT)
def test_a_store_made_unfit_behind_a_running_service_is_refused(running: dict[str, Seen], name: str) -> None:
    """`/readyz` says which setting, no key is made, old ones serve; mended, no restart is needed."""
    setting, unfit, _ = UNFIT[name]
    seen = running[name]
    assert seen.unready == 503
    assert f"{setting} is {unfit}" in seen.reasons
    problem = assert_problem(seen.refusal, 503, "store_not_durable")
    assert setting in problem["detail"]
    assert int(seen.refusal.headers["retry-after"]) >= 1
    assert seen.old_key
    assert (seen.ready, seen.mended) == (200, 200)


@dataclass
class Started:
    """Services that were started on stores that hide or lack something."""

    unfit: Instance
    accepted: Instance
    hidden: Instance
    attested: Instance
    valkey: Instance


@pytest.fixture(scope="module")
def started(new_world: Callable[..., World]) -> Started:
    """Start them side by side."""
    everysec = new_world(options=EVERYSEC)
    closed = new_world()
    valkey = new_world(kind="valkey")
    for world in (everysec, closed, valkey):
        world.store.start()
    closed.store.ask("ACL", "SETUSER", "kms", "on", ">secret", "~*", "&*", "+@all", "-config")
    password = closed.root / "password"
    password.write_text("secret\n")
    login = {"url": closed.store.url, "username": "kms", "password_file": str(password)}
    word = {"durability": "attested", "attested_reason": "the provider promises appendfsync always"}
    result = Started(
        unfit=everysec.instance("unfit"),
        accepted=everysec.instance("accepted", store={"allow_data_loss": True}),
        hidden=closed.instance("hidden", store=login),
        attested=closed.instance("attested", store={**login, **word}),
        valkey=valkey.instance("valkey"),
    )
    for service in (result.unfit, result.hidden):
        service.launch()
    launch_all([result.accepted, result.attested, result.valkey])
    for service in (result.unfit, result.hidden):
        service.wait_logged("store_not_usable")
    return result


def test_a_data_loss_that_was_accepted_is_warned_of_and_served(started: Started) -> None:
    """`allow_data_loss` serves on a store that fsyncs once a second, and says so at each start."""
    assert create(started.accepted).status == 200
    warnings = [record["detail"] for record in started.accepted.logged("store_warning")]
    assert any("allow_data_loss" in line and "everysec" in line for line in warnings)


def test_valkey_serves_as_well(started: Started) -> None:
    """A fit Valkey 8 is served on without a warning."""
    assert create(started.valkey).status == 200
    assert started.valkey.logged("store_warning") == []


def test_a_store_that_hides_its_settings_needs_the_operators_word(started: Started) -> None:
    """Without CONFIG and WAITAOF nothing is promised: not ready, with what to do about it."""
    assert started.hidden.probe("/readyz") == 503
    assert "attested" in started.hidden.reasons()
    assert create(started.hidden).status == 503
    assert create(started.attested).status == 200
    assert started.attested.probe("/readyz") == 200
    warnings = [record["detail"] for record in started.attested.logged("store_warning")]
    assert any("the provider promises appendfsync always" in line for line in warnings)
    for service in (started.hidden, started.attested):
        assert "secret" not in service.err.read_text()


def test_an_unfit_store_keeps_a_new_service_unready_until_it_is_mended(started: Started) -> None:
    """It lives, makes no key, names the setting, and becomes ready by itself."""
    service = started.unfit
    assert service.probe("/livez") == 200
    assert service.probe("/readyz") == 503
    assert "appendfsync is everysec" in service.reasons()
    assert_problem(create(service), 503, "not_ready")
    service.world.store.ask("CONFIG", "SET", "appendfsync", "always")
    service.wait_ready()
    assert create(service).status == 200
