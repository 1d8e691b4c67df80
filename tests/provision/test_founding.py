"""The KEK of a release: made once, for an empty store, and never a second one while there is data."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from progressdb_kms.domain.errors import KekFileInvalid, ProvisionRefused, StoreUnavailable
from progressdb_kms.domain.keyring import KekInfo, KekState, check_value
from progressdb_kms.kek.escrow import recover
from progressdb_kms.kek.keyfile import KeyName, parse_entries, raw_keys, render_entries
from progressdb_kms.kek.kubernetes import MADE_BY
from progressdb_kms.provision.kek import FOUNDED, PENDING
from progressdb_kms.store.redis import open_store
from progressdb_kms.store.redis.schema import KEKS_KEY, SCHEMA_KEY
from progressdb_kms.store.settings import StoreSettings
from progressdb_kms.usecases.keks import first_kek
from tests.integration.world import eventually
from tests.provision.conftest import Site

KEK = bytes(range(32))
OTHER = bytes(range(1, 33))


async def registered(site: Site) -> dict[int, str]:
    """Return the check values in the store's registry."""
    store = await open_store(StoreSettings(site.server.url))
    try:
        view = await store.registry.load()
    finally:
        await store.close()
    assert view is not None
    return {version: kek.check_value for version, kek in view.keks.items()}


async def assert_pair(site: Site) -> None:
    """Secret and store belong together, and the Secret says so."""
    data = site.cluster.data("r-kek")
    assert data["store-id"].decode() == site.store_id()
    assert site.cluster.metadata("r-kek")["annotations"][FOUNDED] == site.store_id()
    keys = raw_keys(parse_entries(data["kek.yaml"], "x"))
    assert await registered(site) == {version: check_value(key) for version, key in keys.items()}


async def test_first_start(site: Site) -> None:
    """A KEK and an id are made, the store gets its registry with them; a second run changes nothing."""
    said = await site.run(**site.kek())
    await assert_pair(site)
    metadata = site.cluster.metadata("r-kek")
    assert metadata["labels"] == {}
    assert (
        metadata["annotations"].items() >= {"helm.sh/resource-policy": "keep", MADE_BY: "provision"}.items()
    )
    assert "ownerReferences" not in metadata
    assert [line.partition(":")[0] for line in said] == [
        "made Secret kms/r-kek",
        f"made the registry of store {site.store_id()} under the KEK in Secret kms/r-kek",
        "changed Secret kms/r-kek",
    ]
    key = raw_keys(parse_entries(site.cluster.data("r-kek")["kek.yaml"], "x"))[1]
    assert key.hex() not in " ".join(said)
    before, keys = site.cluster.revisions(), site.server.ask("HGETALL", KEKS_KEY)
    assert await site.run(**site.kek()) == []
    assert (site.cluster.revisions(), site.server.ask("HGETALL", KEKS_KEY)) == (before, keys)


@pytest.mark.parametrize("writes", range(3))
async def test_killed_after_any_write_and_run_again(site: Site, writes: int) -> None:
    """Wherever a run ends, the next one brings the same KEK to its end; none is made twice."""
    made = {}
    if writes:
        site.cluster.writes_left = writes
        with contextlib.suppress(ProvisionRefused):
            await site.run(**site.kek())
        made = site.cluster.data("r-kek")
        site.cluster.writes_left = None
    else:
        # Killed between the Secret and the store: the API answers, the store does not take it.
        await kill_before_founding(site)
        made = site.cluster.data("r-kek")
        assert site.store_id() is None
    await site.run(**site.kek())
    assert site.cluster.data("r-kek") == made
    await assert_pair(site)


async def kill_before_founding(site: Site) -> None:
    """Cancel a run once the Secret is made, before the store is written."""
    made = asyncio.Event()
    loop = asyncio.get_running_loop()

    def notice(method: str, _name: object) -> None:
        if method == "POST":
            loop.call_soon_threadsafe(made.set)

    site.cluster.before = notice
    task = asyncio.create_task(site.run(**site.kek()))
    await made.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    site.cluster.before = lambda _method, _name: None
    await asyncio.to_thread(eventually, lambda: ("kms", "r-kek") in site.cluster.secrets)


async def test_two_at_once_make_one_kek(site: Site) -> None:
    """Of runs at the same time one makes the Secret, and all agree with it."""
    for _ in range(3):
        site.cluster.secrets.clear()
        site.server.ask("FLUSHALL")
        await asyncio.gather(*(site.run(**site.kek()) for _ in range(4)))
        assert sum(line == "made Secret kms/r-kek" for line in site.said) == 1
        site.said.clear()
        await assert_pair(site)


async def test_another_run_between_two_looks_is_no_loss(site: Site) -> None:
    """No Secret, and then a store that another run has founded meanwhile, is not taken for a lost KEK."""
    await site.run(**site.kek())
    saved, store = dict(site.cluster.secrets), site.server.ask("HGETALL", SCHEMA_KEY)
    site.cluster.secrets.clear()
    seen = 0

    def appear(method: str, _name: object) -> None:
        nonlocal seen
        seen += method == "GET"
        if seen == 2:
            site.cluster.secrets.update(saved)

    site.cluster.before = appear
    assert await site.run(**site.kek()) == []
    assert site.server.ask("HGETALL", SCHEMA_KEY) == store


async def test_a_lost_kek_is_not_replaced(site: Site) -> None:
    """With data and no Secret nothing is made, and the message says how to bring the KEK back."""
    await site.run(**site.kek())
    lost = site.cluster.secrets.pop(("kms", "r-kek"))
    with pytest.raises(ProvisionRefused, match="put the Secret back from its copy, or recover"):
        await site.run(**site.kek())
    assert not site.cluster.secrets
    # Put back from a copy with all its metadata, or from the bare data.
    site.cluster.secrets["kms", "r-kek"] = lost
    assert await site.run(**site.kek()) == []
    site.cluster.put("r-kek", site.cluster.data("r-kek"))
    await site.run(**site.kek())
    await assert_pair(site)


async def test_a_lost_store_is_not_founded_anew(site: Site) -> None:
    """An empty store under a used KEK is refused, also where the Secret was put back from the bare data."""
    await site.run(**site.kek())
    site.server.ask("FLUSHALL")
    with pytest.raises(ProvisionRefused, match=r"the store is empty, but the KEK in .* was in use"):
        await site.run(**site.kek())
    site.cluster.put("r-kek", site.cluster.data("r-kek"))
    with pytest.raises(ProvisionRefused, match="the store is empty"):
        await site.run(**site.kek())
    assert site.store_id() is None
    # To begin anew on purpose.
    site.cluster.secrets.clear()
    await site.run(**site.kek())
    await assert_pair(site)


async def test_a_secret_of_another_store_is_refused(site: Site) -> None:
    """Also where KEK and registry would fit."""
    await site.run(**site.kek())
    site.cluster.set("r-kek", "kms", **{"store-id": b"ab" * 16})
    with pytest.raises(ProvisionRefused, match=f"belongs to store {'ab' * 16}, but this is store"):
        await site.run(**site.kek())


async def test_a_kek_of_an_operators_own_is_named_and_founded(site: Site) -> None:
    """A Secret with a KEK and no id gets an id before the store is founded with it; its KEK stays."""
    content = render_entries({1: KEK, 2: OTHER})
    site.cluster.put("r-kek", {"kek.yaml": content, "note": b"x"})
    await site.run(**site.kek())
    data = site.cluster.data("r-kek")
    assert (data["kek.yaml"], data["note"]) == (content, b"x")
    assert data["store-id"].decode() == site.store_id()
    assert await registered(site) == {2: check_value(OTHER)}


async def test_a_store_that_was_in_use_is_pinned(site: Site) -> None:
    """A Secret without an id gets that of the store whose keys are under its KEK; with another KEK not."""
    await site.run(**site.kek())
    content = site.cluster.data("r-kek")["kek.yaml"]
    site.cluster.put("r-kek", {"kek.yaml": content})
    await site.run(**site.kek())
    await assert_pair(site)
    site.cluster.put("r-kek", {"kek.yaml": render_entries({1: OTHER})})
    with pytest.raises(ProvisionRefused, match="KEK version 1, which the store's keys need, is another key"):
        await site.run(**site.kek())
    assert "store-id" not in site.cluster.data("r-kek")


@pytest.mark.parametrize(
    "data, error, says",
    [
        ({}, ProvisionRefused, "holds no KEK file"),
        ({"kek.yaml": b""}, ProvisionRefused, "holds no KEK file"),
        ({"kek.yaml": b"versions: {1: 00}"}, KekFileInvalid, "put it back from its copy"),
    ],
)
async def test_a_secret_without_a_kek_gets_none(
    site: Site, data: dict[str, bytes], error: type[Exception], says: str
) -> None:
    """Whatever became of it, it held a KEK once."""
    site.cluster.put("r-kek", data)
    for management in ("create", "require"):
        with pytest.raises(error, match=says):
            await site.run(**site.kek(management))
    assert site.cluster.writes == 0


async def test_required_and_never_written(site: Site) -> None:
    """With `require` the Secret has to be there and to fit, and nothing is written anywhere."""
    with pytest.raises(ProvisionRefused, match="there is no Secret kms/r-kek: make it"):
        await site.run(**site.kek("require"))
    site.cluster.put("r-kek", {"kek.yaml": render_entries({1: KEK})})
    assert await site.run(**site.kek("require")) == []
    assert await site.run(kek=site.kek("require")["kek"]) == []
    assert (site.cluster.writes, site.server.ask("KEYS", "*")) == (0, [])


@pytest.mark.parametrize("management", ["create", "require"])
async def test_sealed_to_recovery_keys_from_the_start(site: Site, management: str) -> None:
    """With `escrow` the first KEK can be recovered from the store before any rotation, and is sealed once."""
    wanted = site.kek(management)
    private = site.recovery_key()
    wanted["kek"]["escrow"] = True
    if management == "require":
        site.cluster.put("r-kek", {"kek.yaml": render_entries({1: KEK, 2: OTHER})})
        assert await site.run(**wanted) == []  # an empty store is the service's to found
        store = await open_store(StoreSettings(site.server.url))
        await store.registry.initialise(first_kek(1, check_value(KEK), "file", "1", 0))
        await store.close()
    said = await site.run(**wanted)
    assert said[-1] == "sealed the KEK in Secret kms/r-kek to 1 recovery keys"
    assert await site.run(**wanted) == []
    store = await open_store(StoreSettings(site.server.url))
    kept, view = await store.escrow.load(), await store.registry.load()
    await store.close()
    assert view is not None
    keys = parse_entries(site.cluster.data("r-kek")["kek.yaml"], "x")
    assert recover(kept, view, private) == {1: keys[1]}


async def test_what_something_else_keeps_is_not_written(site: Site) -> None:
    """A Secret of GitOps in the mode that writes is refused, saying who keeps it."""
    labels = {"kustomize.toolkit.fluxcd.io/name": "x"}
    site.cluster.put("r-kek", {"kek.yaml": render_entries({1: KEK})}, labels=labels)
    with pytest.raises(ProvisionRefused, match="kept by Flux"):
        await site.run(**site.kek())


@pytest.mark.parametrize("method, status", [("GET", 403), ("POST", 403), ("POST", 422), ("GET", 500)])
async def test_refusals_show_nothing_that_was_sent(site: Site, method: str, status: int) -> None:
    """What Kubernetes refuses names verb, Secret and status; servers quote the request, we do not."""
    site.cluster.refuse[method] = status
    verb = {"GET": "get", "POST": "create"}[method]
    with pytest.raises(
        ProvisionRefused, match=f"does not let us {verb} Secret kms/r-kek: {status}"
    ) as raised:
        await site.run(**site.kek())
    assert "kek.yaml" not in str(raised.value)
    assert raised.value.__context__ is None or "kek.yaml" not in str(raised.value.__context__)


async def test_a_store_that_is_away_or_could_lose_keys(site: Site) -> None:
    """No KEK is made before the store has answered; the message says what is wrong."""
    wrong: dict[str, Any] = site.kek()
    site.point_at("unix:///nowhere.sock")
    with pytest.raises(StoreUnavailable, match="the store can't be used"):
        await site.run(**wrong)
    assert not site.cluster.secrets


async def test_keys_that_are_kept_elsewhere(site: Site) -> None:
    """They found no store, as nobody here can use them; a store that knows them knows them by name."""
    secret = {"kek.yaml": render_entries({1: KeyName("vault", "kms@1")}), "store-id": b"0" * 32}
    site.cluster.put("r-kek", secret, annotations={FOUNDED: PENDING})
    with pytest.raises(ProvisionRefused, match="kept by vault, where provisioning has no access"):
        await site.run(**site.kek())
    assert site.store_id() is None
    store = await open_store(StoreSettings(site.server.url))
    try:
        kek = KekInfo(1, "kek_x", "vault", "kms@1", "00" * 68, KekState.ACTIVE, 1, 1)
        await store.registry.initialise(kek, "0" * 32)
    finally:
        await store.close()
    await site.run(**site.kek())
    assert site.cluster.metadata("r-kek")["annotations"][FOUNDED] == "0" * 32
    for entry in (KeyName("vault", "kms@2"), OTHER):
        site.cluster.set("r-kek", kek_yaml=render_entries({1: entry}))
        with pytest.raises(ProvisionRefused, match="KEK version 1, which the store's keys need, is another"):
            await site.run(**site.kek())
