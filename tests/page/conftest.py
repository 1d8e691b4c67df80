"""The page over the memory store, by Quart's test client; and a browser for the tests that need one."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.api.answering import Api
from progressdb_kms.api.app import create_app
from progressdb_kms.audit.chained import ChainedAuditLog, Sinks
from progressdb_kms.domain.audit import AuditKey
from progressdb_kms.domain.identity import Identity, IdentityKind
from progressdb_kms.domain.policy import parse_policy
from progressdb_kms.page.sources import Expiry, Sources
from progressdb_kms.page.views import HEADERS, add_page
from progressdb_kms.ports import Heartbeat, StoreStatus
from progressdb_kms.settings import Limits
from progressdb_kms.usecases.encryption import Hot
from progressdb_kms.usecases.rotationwatch import RotationWatch
from progressdb_kms.usecases.session import Session
from tests.unit.audit.scene import Counts
from tests.unit.helpers import RULES, World, make_world

KEY = AuditKey(b"\x01" * 32)
PEOPLE = {
    "auditor": {"permissions": ["audit:read"]},
    "rotator": {"permissions": ["rotation:run"]},
    "creator": {"permissions": ["key:create", "key:encrypt", "key:decrypt", "key:admin", "key:destroy"]},
    "partial": {"permissions": ["audit:read", "rotation:run"], "thread_prefixes": ["room:"]},
}
TAGS = frozenset(
    (
        "html",
        "head",
        "meta",
        "title",
        "link",
        "body",
        "a",
        "header",
        "p",
        "nav",
        "ul",
        "li",
        "main",
        "h1",
        "h2",
        "section",
        "strong",
        "span",
        "div",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "time",
        "svg",
        "rect",
        "bdi",
        "code",
        "form",
        "label",
        "input",
        "button",
        "footer",
        "ol",
        "progress",
        "br",
        "dl",
        "dt",
        "dd",
    )
)
ATTRIBUTES = frozenset(
    (
        "lang",
        "charset",
        "name",
        "content",
        "rel",
        "href",
        "class",
        "id",
        "aria-label",
        "aria-labelledby",
        "aria-current",
        "tabindex",
        "role",
        "scope",
        "datetime",
        "width",
        "height",
        "viewbox",
        "preserveaspectratio",
        "action",
        "method",
        "for",
        "value",
        "maxlength",
        "autocomplete",
        "spellcheck",
        "required",
        "max",
        "colspan",
        "http-equiv",
    )
)


class Reading(HTMLParser):
    """What a page has: its elements and its text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep an element."""
        self.elements.append((tag, dict(attrs)))
        if tag in {"dt", "dd", "td", "th", "li"}:
            self.text += " "

    def handle_data(self, data: str) -> None:
        """Keep text."""
        self.text += data

    def headings(self) -> set[str]:
        """Return the ids of second headings: the parts of the page."""
        return {attrs["id"] or "" for tag, attrs in self.elements if tag == "h2"}

    def links(self) -> set[str]:
        """Return where links lead."""
        return {attrs["href"] or "" for tag, attrs in self.elements if tag == "a"}

    def assert_tame(self) -> None:
        """Nothing is here that the templates do not have: no element, attribute or scheme of a guest's."""
        assert {tag for tag, _ in self.elements} <= TAGS
        for tag, attrs in self.elements:
            assert set(attrs) <= ATTRIBUTES, (tag, attrs)
            for name in ("href", "action"):
                assert re.match(r"/ui/|#main$", attrs.get(name) or "/ui/"), (tag, attrs)


@dataclass
class Answer:
    """An answer of the page."""

    status: int
    headers: Any
    body: str
    reading: Reading = field(init=False)

    def __post_init__(self) -> None:
        self.reading = Reading(self.body)


class Scene:
    """A service with its page, and who asks."""

    def __init__(self, world: World, *, page: bool = True, limits: Limits | None = None) -> None:
        self.world = world
        self.counted: list[tuple[str, int, str]] = []
        self.expiries = [Expiry("server certificate", "kms.example", world.now() + 90 * 86_400)]
        self.status = StoreStatus(True)
        self.unready: list[str] = []
        self.watch = RotationWatch(world.keks, world.store.keys, world.store.rotation_ledger, world.now)
        api = Api(
            world.kms,
            world.loader,
            limits or Limits(),
            lambda route, status, code, _kind, _seconds: self.counted.append((route, status, code)),
            world.store.rotation_ledger,
            world.store.audit,
        )
        self.sources = Sources(
            api=api,
            heartbeats=world.store.heartbeats,
            watch=self.watch,
            expiries=lambda: self.expiries,
            store=lambda: self.status,
            unready=lambda: self.unready,
            audit_keys=(KEY.verify,),
            audit_kept=True,
            instance="i1",
            release="1.0",
        )
        self.app = create_app(api, Hot(world.kms))
        if page:
            add_page(self.app, self.sources)

    def session(self, name: str) -> Session:
        """Return the session of ``dns:<name>``, with a certificate that is good for a day."""
        identity = Identity(IdentityKind.DNS, name, not_after=self.world.now() + 86_400)
        return Session(identity, self.world.book, self.world.now)

    async def get(
        self, path: str, name: str = "operator", query: dict[str, str] | None = None, **more: Any
    ) -> Answer:
        """Ask for a page and check what every answer of it must have."""
        scope = {"state": {"kms.session": more.pop("session", None) or self.session(name)}}
        client = self.app.test_client()
        method = more.pop("method", "GET")
        response = await client.open(path, method=method, query_string=query, scope_base=scope, **more)
        raw = await response.get_data(as_text=False)
        assert isinstance(raw, bytes)
        body = raw.decode("utf-8")
        answer = Answer(response.status_code, response.headers, body)
        assert response.headers["Cache-Control"] == "no-store"
        assert "Set-Cookie" not in response.headers
        if response.headers["Content-Type"].startswith("text/html"):
            assert {name: response.headers[name] for name in HEADERS} == HEADERS
            answer.reading.assert_tame()
        return answer

    async def ok(self, path: str, name: str = "operator", query: dict[str, str] | None = None) -> Reading:
        """Ask for a page and expect it."""
        answer = await self.get(path, name, query)
        assert answer.status == 200, answer.body
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        return answer.reading

    async def beat(self, instance: str, ago: float, **more: Any) -> None:
        """Let an instance have said that it lives."""
        now = self.world.now()
        fields: dict[str, Any] = {"release": "1.0", "kek_versions": (1,), "active": 1} | more
        await self.world.store.heartbeats.beat(
            Heartbeat(instance, now - ago, now - 3600, policy_generation="g1", **fields)
        )

    def audited(self) -> ChainedAuditLog:
        """Return a chained audit log on the store, for a test to write and close."""
        return ChainedAuditLog(KEY, "i1", self.world.store.audit, Sinks(), Counts(), "1.0")


@pytest.fixture
async def page_world(tmp_path: Path) -> World:
    """A service over memory whose policy knows some more people."""
    world = await make_world(tmp_path)
    rules = [{"identities": [f"dns:{name}"], **grants} for name, grants in PEOPLE.items()]
    world.book.replace(parse_policy({"rules": [*RULES["rules"], *rules]}), "g1")
    return world


@pytest.fixture
async def scene(page_world: World) -> AsyncIterator[Scene]:
    """The page in this process."""
    scene = Scene(page_world)
    async with scene.app.test_app():
        yield scene
