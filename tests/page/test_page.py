"""The page over the memory store: who sees what, what it says when something is away, what it never does."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.domain.identity import Identity, IdentityKind
from progressdb_kms.domain.keys import DekRecord, StateChange
from progressdb_kms.domain.policy import parse_policy
from progressdb_kms.domain.rotation import Outcome, Rotation, Step
from progressdb_kms.page import panels
from progressdb_kms.page.render import _TEMPLATES
from progressdb_kms.page.sources import Expiry
from progressdb_kms.page.views import PAGES, REFRESH_IDLE, REFRESH_RUNNING, add_page
from progressdb_kms.ports import AuditEvent, StoreStatus
from progressdb_kms.settings import Limits
from progressdb_kms.usecases.audittail import TAIL, Entry, Proof, _parse
from progressdb_kms.usecases.creation import Wanted, create_deks
from progressdb_kms.usecases.session import PolicyBook, Session
from tests.page.conftest import Reading, Scene
from tests.page.hostile import HOSTILE
from tests.unit.helpers import RULES, Clock, World

NOBODY = "k_" + "A" * 28
RUNNING = Rotation("r_2_a", 1, 2, Step.REWRAP, 10, 20)
DONE = Rotation("r_1_b", 1, 2, Step.COMPLETE, 10, 20, finished_at=25, outcome=str(Outcome.CLEAN))


async def made(scene: Scene, thread_id: str = "room:1") -> DekRecord:
    """Make a key."""
    (record,) = await create_deks(scene.world.kms, scene.session("operator"), [Wanted(thread_id)], "r")
    assert isinstance(record, DekRecord)
    return record


async def rotate(scene: Scene, *rotations: Rotation) -> None:
    """Store rotations."""
    ledger = scene.world.store.rotation_ledger
    lock = await ledger.acquire("test", 60)
    for rotation in rotations:
        ledger._counts[rotation.rotation_id] = Counter(rotation.counts)
        await ledger.save(rotation, lock)


# Who sees what

PARTS = {"here", "census", "rotation", "instances", "expiries", "search"}


@pytest.mark.parametrize(
    "name, parts, links",
    [
        ("operator", PARTS, {"/ui/rotations", "/ui/keys", "/ui/audit"}),
        ("server", PARTS, {"/ui/rotations", "/ui/keys"}),
        ("room", {"here", "expiries", "search"}, {"/ui/keys"}),
        ("rotator", {"here", "rotation", "instances", "expiries"}, {"/ui/rotations"}),
        ("auditor", {"here", "expiries"}, {"/ui/audit"}),
    ],
)
async def test_each_sees_what_the_api_would_tell(
    scene: Scene, name: str, parts: set[str], links: set[str]
) -> None:
    """A part is there for those whom its route answers, and not even its heading for others."""
    reading = await scene.ok("/ui/", name)
    assert reading.headings() == parts
    assert {link for link in reading.links() if link.startswith("/ui/") and link != "/ui/"} == links
    assert f"dns:{name}" in reading.text
    # What a part leaves out is nobody's refusal: nothing was asked for.
    assert "refused" not in [event.action for event in scene.world.trail.events]


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("name", ["nobody", "creator", "partial"])
async def test_without_a_grant_there_is_nothing(scene: Scene, path: str, name: str) -> None:
    """403, the store is not asked, and it is audited as any refusal."""
    before = scene.world.store.calls.copy()
    answer = await scene.get(path, name)
    assert (answer.status, scene.world.store.calls) == (403, before)
    assert "key:read" in answer.reading.text
    await scene.world.kms.refusals.write()
    (event,) = [event for event in scene.world.trail.events if event.action == "refused"]
    assert (event.identity, event.detail) == (f"dns:{name}", f"key:read {path} count=1")


@pytest.mark.parametrize(
    "path, may",
    [
        ("/ui/rotations", {"operator", "server", "rotator"}),
        ("/ui/keys", {"operator", "server", "room"}),
        ("/ui/audit", {"operator", "auditor"}),
    ],
)
async def test_each_page_asks_for_its_permission(scene: Scene, path: str, may: set[str]) -> None:
    """Whoever sees a part sees no more than that."""
    for name in ("operator", "server", "room", "rotator", "auditor"):
        assert (await scene.get(path, name)).status == (200 if name in may else 403), name


async def test_keys_of_other_threads_are_refused(scene: Scene) -> None:
    """A grant for some threads shows those, by id and by thread."""
    mine, other = await made(scene, "room:1"), await made(scene, "other")
    for query, status in (
        ({"key_id": mine.key_id}, 200),
        ({"thread_id": "room:1"}, 200),
        ({"key_id": other.key_id}, 403),
        ({"thread_id": "other"}, 403),
    ):
        answer = await scene.get("/ui/keys", "room", query)
        assert answer.status == status
        assert (other.key_id in answer.body) is (query.get("key_id") == other.key_id and status == 200)


async def test_history_needs_audit_read(scene: Scene) -> None:
    """Who may read the key alone sees the key alone."""
    record = await made(scene)
    reading = await scene.ok("/ui/keys", "server", {"key_id": record.key_id})
    assert "history" not in reading.headings()
    assert "audit:read" in reading.text
    assert "history" in (await scene.ok("/ui/keys", "operator", {"key_id": record.key_id})).headings()


async def test_an_expired_certificate_shows_nothing(scene: Scene) -> None:
    """On a connection that was good before."""
    identity = Identity(IdentityKind.DNS, "operator", not_after=scene.world.now() - 1)
    session = Session(identity, scene.world.book, scene.world.now)
    answer = await scene.get("/ui/", session=session)
    assert answer.status == 403
    assert "certificate_expired" in answer.body


async def test_limits_of_an_identity_hold(scene: Scene) -> None:
    """A page is an operation like others."""
    limits = [{"identities": ["dns:operator"], "operations_per_second": 2}]
    book = PolicyBook(parse_policy({**RULES, "limits": limits}), "g2", Clock())
    session = Session(Identity(IdentityKind.DNS, "operator"), book, scene.world.now)
    answers = [await scene.get("/ui/keys", session=session) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert int(answers[2].headers["Retry-After"]) >= 1


async def test_switched_off_there_is_no_page(page_world: World) -> None:
    """Nothing under /ui answers, not even the style."""
    scene = Scene(page_world, page=False)
    for path in (*PAGES, "/ui", "/ui/style.css", "/ui/icon.svg"):
        assert (await scene.get(path)).status == 404


# What a request may be


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", [*PAGES, "/ui", "/ui/style.css"])
async def test_only_reads_are_answered(scene: Scene, path: str, method: str) -> None:
    """Every other method is 405, and it says so."""
    answer = await scene.get(path, method=method)
    assert answer.status == 405
    assert answer.headers["Allow"] == "GET, HEAD"


async def test_no_address_redirects(scene: Scene) -> None:
    """A redirect would go to whatever the Host header says."""
    for path in ("/ui", "/ui/", "/ui//", "/ui/keys/", "//ui/", "/ui/../ui/"):
        answer = await scene.get(path, headers={"Host": "evil.example"})
        assert answer.status in {200, 404}
        assert "evil.example" not in answer.body


@pytest.mark.parametrize(
    "path, query",
    [
        ("/ui/", "x=1"),
        ("/ui/audit", "before=x"),
        ("/ui/audit", "before=1-1&before=1-2"),
        ("/ui/audit", "limit=100000"),
        ("/ui/keys", "key_id=a&thread_id=b"),
        ("/ui/keys", "thread_id=%ff"),
        ("/ui/keys", "thread_id=%00"),
        ("/ui/keys", "thread_id=" + "a" * 257),
        ("/ui/keys", "thread_id=a&cursor=nonsense"),
        ("/ui/keys", "&".join(f"a{n}=1" for n in range(40))),
    ],
)
async def test_bad_parameters_are_told(scene: Scene, path: str, query: str) -> None:
    """400, in HTML, and what was given is not repeated."""
    answer = await scene.get(f"{path}?{query}")
    assert answer.status == 400
    assert "nonsense" not in answer.body


@pytest.mark.parametrize("key_id", ["x", NOBODY, "k_" + "a" * 28, "<b>"])
async def test_an_unknown_key_is_told(scene: Scene, key_id: str) -> None:
    """404."""
    assert (await scene.get("/ui/keys", query={"key_id": key_id})).status == 404


async def test_a_body_is_refused(scene: Scene) -> None:
    """A read has none."""
    assert (await scene.get("/ui/", data=b"x")).status == 400
    assert (await scene.get("/ui/", data=b"x" * 5000)).status == 413


@pytest.mark.parametrize(
    "site, mode, dest, status",
    [
        (None, None, None, 200),
        ("none", "navigate", "document", 200),
        ("same-origin", "navigate", "document", 200),
        ("same-origin", "no-cors", "style", 200),
        ("cross-site", "navigate", "document", 200),
        ("cross-site", "navigate", "iframe", 400),
        ("cross-site", "no-cors", "image", 400),
        ("cross-site", "cors", "empty", 400),
        ("same-site", "no-cors", "script", 400),
        ("cross-site", None, None, 400),
    ],
)
async def test_other_sites_may_link_and_not_load(
    scene: Scene, site: str | None, mode: str | None, dest: str | None, status: int
) -> None:
    """A link in a runbook works; a page that embeds or fetches ours gets nothing to measure."""
    named = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}
    fields = {name: value for name, value in named.items() if value}
    for path in (*PAGES, "/ui/style.css"):
        assert (await scene.get(path, headers=fields)).status == status


# What it says


async def test_overview_tells_the_state(scene: Scene) -> None:
    """Census, rotation, instances and expiries, with what is wrong in words."""
    for number in range(3):
        await made(scene, f"room:{number}")
    await rotate(scene, DONE)
    await scene.beat("alive", 1)
    await scene.beat("gone", 3600)
    now = scene.world.now()
    scene.expiries += [
        Expiry("CA of clients", "old", now - 1),
        Expiry("CA of clients", "tired", now + 86_400 * 3),
    ]
    scene.expiries.append(Expiry("revocation list", "endless", None))
    scene.unready.append("kek: version 2 is missing")
    assert "not been counted yet" in (await scene.ok("/ui/")).text
    await scene.watch.look()
    text = " ".join((await scene.ok("/ui/")).text.split())
    for words in (
        "Not ready",
        "kek: version 2 is missing",
        "3 live data keys",
        "r_1_b to version 2, ended at 1970-01-01T00:00:25Z: clean",
        "1 s ago",
        "silent for 60 minutes",
        "your certificate",
        "old 2023-11-14T22:13:19Z expired",
        "3 days: soon",
        "endless never -",
    ):
        assert words in text
    assert text.count("soon") == 2  # the caller's own certificate is good for a day


async def test_rotation_loads_itself_again(scene: Scene) -> None:
    """That page alone, faster while one runs, and not for those who ask it to stand still."""
    for path in PAGES:
        refresh = [
            attrs["content"] for tag, attrs in (await scene.ok(path)).elements if "http-equiv" in attrs
        ]
        assert refresh == ([str(REFRESH_IDLE)] if path == "/ui/rotations" else [])
    await rotate(scene, dataclasses.replace(RUNNING, counts={"snapshot": 1200, "rewrapped": 7}))
    answer = await scene.get("/ui/rotations")
    assert f'<meta http-equiv="refresh" content="{REFRESH_RUNNING}">' in answer.body
    assert "http-equiv" not in (await scene.get("/ui/rotations?refresh=off")).body
    text = " ".join(answer.reading.text.split())
    assert "snapshot done rewrap now verify to come" in text
    assert "rewrapped 7, snapshot 1,200" in text


@pytest.mark.parametrize("step", Step)
async def test_every_step_can_be_shown(scene: Scene, step: Step) -> None:
    """Whatever a rotation is at, the page shows it."""
    await rotate(scene, dataclasses.replace(RUNNING, step=step))
    for path in ("/ui/", "/ui/rotations"):
        assert str(step) in (await scene.ok(path)).text


async def test_a_key_and_its_history(scene: Scene) -> None:
    """State and times, and what the audit log says, by a link from the thread."""
    record = await made(scene)
    log = scene.audited()
    names = {"identity": "dns:operator", "request_id": "r", "key_id": record.key_id, "thread_id": "room:1"}
    await log.record([AuditEvent("key.disable", "intent", **names), AuditEvent("key.disable", "ok", **names)])
    await scene.world.store.change_state(record.key_id, StateChange.DISABLE, now=5)
    reading = await scene.ok("/ui/keys", query={"thread_id": "room:1"})
    (link,) = [link for link in reading.links() if record.key_id in link]
    text = " ".join((await scene.ok(link)).text.split())
    for words in ("State disabled", "1970-01-01T00:00:05Z", "key.disable intent dns:operator", "MAC holds"):
        assert words in text
    await log.close()


async def test_nothing_wrapped_is_ever_shown(scene: Scene) -> None:
    """Not the wrapped DEK in any form, on no page, for nobody."""
    record = await made(scene)
    forms = [record.wrapped.hex(), base64.b64encode(record.wrapped).decode(), repr(record.wrapped)[2:-1]]
    for path in ("/ui/", f"/ui/keys?key_id={record.key_id}", "/ui/keys?thread_id=room:1", "/ui/audit"):
        body = (await scene.get(path)).body
        assert not [form for form in forms if form[:24] in body]


async def test_pages_are_bounded(scene: Scene) -> None:
    """Keys of a thread and records come page by page, each once."""
    await asyncio.gather(*(made(scene, "room:1") for _ in range(panels.KEYS + 5)))
    log = scene.audited()
    for number in range(TAIL + 5):
        await log.record([AuditEvent("key.create", "ok", "dns:a", f"r{number}", NOBODY)])
    await log.close()
    for path, query, size in (("/ui/keys", {"thread_id": "room:1"}, panels.KEYS), ("/ui/audit", {}, TAIL)):
        reading = await scene.ok(path, query=query)
        assert sum(tag == "tr" for tag, _ in reading.elements) == size + 1
        (following,) = [attrs["href"] for _, attrs in reading.elements if attrs.get("rel") == "next"]
        rest = await scene.ok(str(following))
        assert 5 < sum(tag == "tr" for tag, _ in rest.elements) < size
        assert not [attrs for _, attrs in rest.elements if attrs.get("rel") == "next"]


async def test_audit_says_what_was_verified(scene: Scene) -> None:
    """All holds; one record was changed; there is no key: three different things."""
    log = scene.audited()
    await log.record([AuditEvent("key.create", "ok", "dns:a", "r", NOBODY)])
    await log.close()
    store = scene.world.store.audit
    assert f"All {len(store.stream)} records hold" in (await scene.ok("/ui/audit")).text
    place = list(store.stream)[1]
    store.stream[place] = store.stream[place].replace(b"dns:a", b"dns:b")
    reading = await scene.ok("/ui/audit")
    assert "does not hold" in reading.text
    assert reading.text.count("DOES NOT HOLD") == 1
    keyless = Scene(scene.world, page=False)
    keyless.sources = dataclasses.replace(keyless.sources, audit_keys=(), audit_kept=False)
    add_page(keyless.app, keyless.sources)
    text = (await keyless.ok("/ui/audit")).text
    assert "Not verified" in text
    assert "not kept in the store" in text
    assert "MAC holds" not in text


# When something is away


async def test_a_store_that_is_away_leaves_what_is_known(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The overview stands, with what is in memory; parts that need the store say why they are not there."""
    await made(scene)
    await scene.watch.look()
    scene.status = StoreStatus(False)

    async def away(*_: object, **__: object) -> Any:
        raise StoreUnavailable("the store at redis:6379 does not answer")

    store = scene.world.store
    monkeypatch.setattr(store.rotation_ledger, "list_rotations", away)
    monkeypatch.setattr(store, "live", away)
    monkeypatch.setattr(store.audit, "tail", away)
    store.down = True
    reading = await scene.ok("/ui/")
    assert reading.headings() == PARTS
    assert "does not answer" in reading.text
    assert reading.text.count("Not to be had now") == 2
    assert "1 live data keys" in reading.text
    for path in ("/ui/rotations", "/ui/audit", f"/ui/keys?key_id={NOBODY}"):
        answer = await scene.get(path)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    store.down = False
    monkeypatch.undo()
    monkeypatch.setattr(store.audit, "tail", away)
    record = await made(scene)
    reading = await scene.ok("/ui/keys", query={"key_id": record.key_id})
    assert "Not to be had now" in reading.text
    assert "State" in reading.text


async def test_a_hanging_store_is_a_deadline(page_world: World) -> None:
    """The page does not wait for ever, nor does the caller's place."""
    page_world.store.gate = asyncio.Event()
    scene = Scene(page_world, limits=Limits(request_timeout=0.1))
    assert (await scene.get("/ui/keys", query={"key_id": NOBODY})).status == 503


async def test_our_mistake_shows_nothing_of_itself(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """500, in HTML, without the exception's text."""

    def broken(*_: object) -> Any:
        raise ValueError("s3cret")

    monkeypatch.setattr(panels, "expiries", broken)
    answer = await scene.get("/ui/")
    assert answer.status == 500
    assert "s3cret" not in answer.body
    assert scene.counted[-1] == ("/ui/", 500, "internal_error")


async def test_pages_change_nothing(scene: Scene) -> None:
    """Every page is read, and of the store only reading methods are called."""
    record = await made(scene)
    await scene.watch.look()
    called: set[str] = set()

    class Recorder:
        def __init__(self, of: object) -> None:
            self.of = of

        def __getattr__(self, name: str) -> Any:
            called.add(name)
            return getattr(self.of, name)

    def recorded(of: object) -> Any:
        return Recorder(of)

    world = scene.world
    kms = dataclasses.replace(
        world.kms,
        store=recorded(world.kms.store),
        ledger=recorded(world.kms.ledger),
        backups=recorded(world.kms.backups),
        audit=recorded(world.kms.audit),
        cache=recorded(world.kms.cache),
    )
    watched = Scene(world, page=False)
    api = dataclasses.replace(
        watched.sources.api,
        kms=kms,
        rotations=recorded(world.store.rotation_ledger),
        audit=recorded(world.store.audit),
    )
    watched.sources = dataclasses.replace(
        watched.sources, api=api, heartbeats=recorded(world.store.heartbeats), watch=scene.watch
    )
    add_page(watched.app, watched.sources)
    for path in (*PAGES, f"/ui/keys?key_id={record.key_id}", "/ui/keys?thread_id=room:1"):
        await watched.ok(path)
    assert called == {"get", "list_keys", "live", "list_rotations", "tail", "anchor"}


async def test_answers_are_counted_by_page(scene: Scene) -> None:
    """Under the path of the page, never under what was asked for."""
    await scene.get("/ui/keys", query={"thread_id": "secret-name"})
    await scene.get("/ui")
    await scene.get("/ui/style.css")
    assert scene.counted == [("/ui/keys", 200, "ok"), ("/ui/", 200, "ok"), ("/ui/style.css", 200, "ok")]


# Hostile text


@pytest.mark.parametrize("text", HOSTILE)
async def test_hostile_thread_ids_are_text(scene: Scene, text: str) -> None:
    """In the form, the headings, the links and the tables; the links lead back to the very same thread."""
    record = await made(scene, text)
    reading = await scene.ok("/ui/keys", query={"thread_id": text})
    assert record.key_id in reading.text
    assert {attrs.get("value") for tag, attrs in reading.elements if tag == "input"} >= {text}
    key = await scene.ok("/ui/keys", query={"key_id": record.key_id})
    (link,) = [link for link in key.links() if "thread_id" in link]
    assert record.key_id in (await scene.ok(link)).text


@pytest.mark.parametrize("text", HOSTILE)
async def test_hostile_names_are_text(scene: Scene, text: str) -> None:
    """Of callers, instances, certificates, rotations and warnings."""
    scene.expiries.append(Expiry("CA of clients", text, 1.0))
    scene.unready.append(text)
    scene.status = StoreStatus(True, warnings=(text,))
    await scene.beat(text, 1, release=text)
    await rotate(scene, dataclasses.replace(DONE, rotation_id=text, outcome=text, counts={text: 1}))
    rule = {"identities": ["cn:*"], "permissions": ["key:read", "audit:read"]}
    scene.world.book.replace(parse_policy({"rules": [rule]}), "g2")
    session = Session(Identity(IdentityKind.CN, text), scene.world.book, scene.world.now)
    for path in PAGES:
        assert (await scene.get(path, session=session)).status == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(HOSTILE),
    lambda deeper: st.lists(deeper, max_size=3) | st.dictionaries(st.text(), deeper, max_size=3),
    max_leaves=5,
)
MEMBERS = ("at", "audit", "outcome", "identity", "key_id", "thread_id", "detail", "instance", "chain")


def entries(records: Sequence[dict[str, Any]]) -> Iterator[Entry]:
    """Return records as somebody with access to the store could have put them there."""
    for fields in records:
        line = json.dumps({"audit": "", **fields, "seq": 1, "prev": ""})[:-1] + ',"mac":"' + "0" * 64 + '"}'
        yield Entry("1-1", _parse(line.encode()), Proof.BROKEN)


@given(st.lists(st.fixed_dictionaries(dict.fromkeys(MEMBERS, JSON)), min_size=1, max_size=3))
def test_hostile_records_are_text(records: list[dict[str, Any]]) -> None:
    """Whatever members a record has, of whatever type, it is shown as text."""
    found = [*entries([{**record, "chain": str(record["chain"])} for record in records])]
    macros: Any = _TEMPLATES.get_template("macros.html").module
    text = str(macros.records(panels.audit_rows(found), "caption")).encode().decode()
    Reading(text).assert_tame()
