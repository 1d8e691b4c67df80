"""The page in a real browser with a client certificate, and web pages that would like to use it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import redis
import yaml
from playwright.sync_api import Browser, BrowserContext, Error, Page, Route, expect, sync_playwright

from progressdb_kms.ports import Heartbeat
from progressdb_kms.store.redis.schema import AUDIT_KEY, INSTANCES_KEY, encode_heartbeat
from tests.contract.certificates import issuer_of
from tests.contract.dev_service import DevService, start_dev
from tests.contract.wire_client import Client
from tests.fault import rotate_with_faults
from tests.page.hostile import HOSTILE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
PATIENCE = 60_000.0
"""Milliseconds to wait for what must come: a net for hung tests, never something that is measured."""
PAGES = ("/ui/", "/ui/rotations", "/ui/keys", "/ui/audit")
Files = tuple[Path, Path]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevService]:
    """Run a service with keys of several threads."""
    with running(tmp_path_factory.mktemp("dev")) as made:
        items = [{"thread_id": f"room:{n % 40}", "idempotency_key": str(n)} for n in range(400)]
        with speaking(made, "server") as server:
            server.batch("/create_dek_batch", items)
        yield made


@contextmanager
def running(root: Path, *rules: dict[str, Any]) -> Iterator[DevService]:
    """Run a service whose policy has these rules besides; its end must be in order."""
    state = root / "state"
    made = start_dev(state, root / "first.log")
    if rules:
        assert made.stop() == 0
        policy = state / "policy.yaml"
        document = yaml.safe_load(policy.read_text())
        policy.write_text(yaml.safe_dump({"rules": [*document["rules"], *rules]}))
        made = start_dev(state, root / "second.log")
    try:
        yield made
    finally:
        code = made.stop()
    assert code == 0, made.log_text()[-4000:]
    assert "Traceback" not in made.log_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run Debian's Chromium, headless."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs chromium (scripts/system-packages)")
    # Root can't have Chromium's sandbox; what is opened here is ours alone.
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watched:
    """A tab, and all that it did."""

    page: Page
    base: str
    requests: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.said.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("dialog", self._dialog)

    def _dialog(self, dialog: Any) -> None:
        self.said.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open(self, path: str) -> int:
        """Load a page of the service and return its status."""
        answer = self.page.goto(self.base + path)
        assert answer is not None
        return answer.status

    def assert_quiet(self) -> None:
        """No script ran, the browser had nothing to refuse, and nothing was asked of anybody else."""
        assert self.page.evaluate("window.pwned") is None
        assert self.said == []
        assert [url for url in self.requests if not url.startswith(f"{self.base}/ui/")] == []
        odd = "script, img, iframe, object, embed, base, style, [onload], [onerror], [onfocus], [style]"
        assert self.page.locator(odd).count() == 0


Open = Callable[..., Watched]


@pytest.fixture
def tab(browser: Browser) -> Iterator[Open]:
    """Give what opens a tab that shows a client's certificate to a service."""
    contexts: list[BrowserContext] = []

    def make(service: DevService, who: str | Files | None = "operator", **options: Any) -> Watched:
        base = f"https://{service.host}:{service.port}"
        if isinstance(who, str):
            files = service.ready["clients"][who]
            who = (Path(files["cert"]), Path(files["key"]))
        if who is not None:
            shows = {"origin": base, "certPath": str(who[0]), "keyPath": str(who[1])}
            options["client_certificates"] = [shows]
        context = browser.new_context(ignore_https_errors=True, **options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        return Watched(context.new_page(), base)

    yield make
    for context in contexts:
        context.close()


def key_of(service: DevService, thread_id: str = "room:1") -> str:
    """Return the first key of a thread."""
    with speaking(service) as operator:
        return str(operator.get("/v1/keys", {"thread_id": thread_id}).ok()["keys"][0]["key_id"])


@contextmanager
def speaking(service: DevService, name: str = "operator") -> Iterator[Client]:
    """Give a client that needs no browser."""
    client = service.client(name)
    try:
        yield client
    finally:
        client.close()


# Who gets in


def test_without_a_certificate_there_is_no_connection(service: DevService, tab: Open) -> None:
    """Not even a page that says so."""
    with pytest.raises(Error, match="ERR_"):
        tab(service, None).open("/ui/")


def test_a_certificate_without_a_grant_is_told(service: DevService, tab: Open) -> None:
    """Which permission is missing, and nothing else."""
    watched = tab(service, "stranger")
    for path in PAGES:
        assert watched.open(path) == 403
        expect(watched.page.get_by_role("heading", level=1)).to_have_text("Permission denied")
        expect(watched.page.locator("main")).to_contain_text("key:read")
        assert watched.page.locator("table, form").count() == 0


def test_an_operator_walks_through(service: DevService, tab: Open) -> None:
    """By links and forms alone: overview, a thread, its key, its history, the audit log."""
    watched = tab(service)
    page = watched.page
    assert watched.open("/ui/") == 200
    expect(page.locator("footer")).to_contain_text("dns:operator")
    page.get_by_label("Thread id").fill("room:1")
    page.get_by_role("button", name="Show its keys").click()
    expect(page.get_by_role("heading", name="Thread room:1")).to_be_visible()
    key_id = page.locator("td.id a").first.inner_text()
    page.locator("td.id a").first.click()
    expect(page.get_by_role("heading", name=f"Key {key_id}")).to_be_visible()
    expect(page.locator("dl")).to_contain_text("enabled")
    expect(page.locator("table.records")).to_contain_text("key.create")
    page.get_by_label("Key id").fill(f"  {key_of(service, 'room:2')} ")
    page.keyboard.press("Enter")
    expect(page.locator("dl")).to_contain_text("room:2")
    page.get_by_role("link", name="Audit").click()
    expect(page.locator("main")).to_contain_text("records hold")
    page.get_by_role("link", name="Older records").click()
    expect(page.locator("main")).to_contain_text("the end of the log")
    watched.assert_quiet()
    assert page.context.cookies() == []


# Hostile text


def spoiled(made: DevService) -> None:
    """Put hostile text wherever somebody could: as a caller, and with access to the store."""
    with speaking(made, "server") as server:
        for text in HOSTILE:
            server.create(text)
    record = dict.fromkeys(("audit", "outcome", "identity", "key_id", "thread_id", "detail"), HOSTILE[2])
    url = yaml.safe_load(Path(made.ready["config"]).read_text())["store"]["url"]
    with redis.Redis(unix_socket_path=urlsplit(url).path) as store:
        beat = Heartbeat("broken", time.time(), 0, "1", (1,), 1, "g")
        for name, value in (
            ("at", "x"),
            ("at", float("nan")),
            ("at", 1e999),
            ("started_at", None),
            ("instance", 7),
        ):
            entry = json.dumps({**json.loads(encode_heartbeat(beat)), name: value})
            store.hset(INSTANCES_KEY, f"broken {name} {value}", entry)
        for text in HOSTILE:
            fields = {**record, "identity": text, "detail": text, "chain": text, "seq": 1, "prev": ""}
            line = json.dumps(fields)[:-1] + ',"mac":"' + "0" * 64 + '"}'
            store.xadd(AUDIT_KEY, {"r": line})
            beat = Heartbeat(text, time.time(), 0, text, (1,), 1, text)
            store.hset(INSTANCES_KEY, text, encode_heartbeat(beat))


def test_hostile_text_is_text(tmp_path: Path, tab: Open) -> None:
    """Thread ids, names, heartbeats, forged records: no script runs, no request leaves."""
    grant = {"identities": ["cn:*"], "permissions": ["key:create", "key:read", "audit:read"]}
    with running(tmp_path, grant) as made:
        spoiled(made)
        issuer = issuer_of(made, tmp_path)
        names = [text for text in HOSTILE if len(text) <= 64 and text.isprintable()]
        assert len(names) > 15
        for name in names:
            files = issuer.issue(common=name)
            caller = Client(made.tls_with(*files), f"{made.host}:{made.port}")
            caller.create(name)
            caller.close()
            if name not in names[::4]:  # the records of the others are on the pages below
                continue
            watched = tab(made, files)
            assert watched.open("/ui/audit") == 200
            expect(watched.page.locator("footer")).to_contain_text(f"cn:{name}")
            watched.assert_quiet()
        watched = tab(made)
        for path in PAGES:
            assert watched.open(path) == 200
            watched.assert_quiet()
        assert watched.page.locator("tr.broken").count() >= len(HOSTILE)
        for text in HOSTILE:
            assert watched.open(f"/ui/keys?thread_id={quote(text, safe='')}") == 200
            watched.assert_quiet()
            expect(watched.page.get_by_label("Thread id")).to_have_value(text)
            watched.page.locator("td.id a").first.click()
            expect(watched.page.locator("dl")).to_be_visible()
            watched.assert_quiet()


# Other sites' pages


class Elsewhere(ThreadingHTTPServer):
    """A web server of somebody else's, with one page."""

    page = b""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        """Where its page is."""
        return f"http://127.0.0.1:{self.server_port}/"


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """Send the page."""
        assert isinstance(self.server, Elsewhere)
        self.server.asked.append(self.requestline)
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.server.page)

    do_POST = do_GET  # noqa: N815 - as the base class asks for

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    """Run another site."""
    server = Elsewhere()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_policy_stops_what_escaping_would_miss(
    service: DevService, tab: Open, elsewhere: Elsewhere
) -> None:
    """Were markup to get into the page all the same: no script, style, form and frame of it counts."""
    url = elsewhere.url
    markup = (
        "<script>window.pwned=1</script><img src=x onerror=window.pwned=1><style>h1{display:none}</style>"
        f"<img src={url}><script src={url}></script><iframe src=/ui/></iframe><iframe src={url}></iframe>"
        f"<link rel=stylesheet href={url}><base href={url}>"
        f"<form id=evil action={url} method=post><input name=a></form>"
    )
    watched = tab(service)

    def spoil(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, body=answer.text().replace("<main", markup + "<main"))

    watched.page.route("**/ui/", spoil)
    assert watched.open("/ui/") == 200
    assert watched.page.locator("#evil").count() == 1
    expect(watched.page.get_by_role("heading", level=1)).to_be_visible()
    assert watched.page.evaluate("document.baseURI") == watched.base + "/ui/"
    with watched.page.expect_console_message(lambda message: "form-action" in message.text):
        watched.page.evaluate("document.getElementById('evil').requestSubmit()")
    assert watched.page.evaluate("window.pwned") is None
    said = "\n".join(watched.said)
    for what in ("inline script", "inline style", "the script", "the image", "the stylesheet", "base URI"):
        assert what in said, said
    assert elsewhere.asked == []


def metric(service: DevService, route: str, code: str) -> float:
    """Return how many requests were answered so."""
    with speaking(service, "admin") as admin:
        text = admin.get("/metrics").body.decode()
    lines = [
        line
        for line in text.splitlines()
        if line.startswith("kms_requests_total") and f'route="{route}"' in line and f'code="{code}"' in line
    ]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_other_pages_cannot_use_the_certificate(service: DevService, tab: Open, elsewhere: Elsewhere) -> None:
    """A page that an operator opens sends requests with the operator's certificate: none does anything."""
    key_id = key_of(service)
    base = f"https://{service.host}:{service.port}"
    disable, create = f"/v1/keys/{key_id}/disable", "/create_dek_for_thread"
    elsewhere.page = f"""<!doctype html><body><script>
      const ask = (path, body) => fetch("{base}" + path,
        {{method: "POST", mode: "no-cors", credentials: "include", body}}).catch(() => 0);
      const untyped = text => new Blob([text]);
      (async () => {{
        await ask("{disable}");
        await ask("{disable}", untyped("{{}}"));
        await ask("{create}", untyped('{{"thread_id":"planted"}}'));
        await ask("{create}", '{{"thread_id":"planted"}}');
        await fetch("{base}/v1/keys", {{mode: "no-cors", credentials: "include"}}).catch(() => 0);
        document.title = "done";
      }})();
    </script>
    <img src="{base}/ui/icon.svg"><iframe src="{base}/ui/"></iframe>
    <link rel=stylesheet href="{base}/ui/style.css">
    <form id=f method=post action="{base}{disable}"></form></body>""".encode()
    watched = tab(service)
    statuses: list[tuple[str, int]] = []
    watched.page.on("response", lambda answer: statuses.append((urlsplit(answer.url).path, answer.status)))
    watched.page.goto(elsewhere.url)
    expect(watched.page).to_have_title("done")
    watched.page.evaluate("document.getElementById('f').submit()")
    watched.page.wait_for_url(base + disable)
    assert metric(service, "/v1/keys/<key_id>/disable", "invalid_header") == 3
    assert metric(service, create, "invalid_header") == 1
    assert metric(service, create, "unsupported_media_type") == 1
    assert metric(service, "/v1/keys", "invalid_header") == 1
    assert {status for path, status in statuses if path != "/"} == {400, 415}
    with speaking(service) as operator:
        assert operator.get(f"/v1/keys/{key_id}").ok()["state"] == "enabled"
        assert operator.get("/v1/keys", {"thread_id": "planted"}).ok()["keys"] == []
    assert "web_page_refused" in service.log_text()


def test_a_link_from_elsewhere_works(service: DevService, tab: Open, elsewhere: Elsewhere) -> None:
    """A runbook may link to the page, which then knows nothing of where it was linked from."""
    watched = tab(service)
    elsewhere.page = f'<!doctype html><a href="{watched.base}/ui/audit">audit</a>'.encode()
    watched.page.goto(elsewhere.url)
    watched.page.get_by_role("link").click()
    expect(watched.page.get_by_role("heading", level=1)).to_have_text("Audit log")
    assert watched.page.evaluate("window.opener") is None


# How it can be read

CONTRAST = """() => {
  const parse = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const linear = c => c <= 10 ? c / 255 / 12.92 : ((c / 255 + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const own = at => parse(getComputedStyle(at).backgroundColor);
  const ground = at => !at ? [255, 255, 255, 1] : own(at)[3] > 0 ? own(at) : ground(at.parentElement);
  const bad = [];
  for (const one of document.querySelectorAll('body *')) {
    const said = [...one.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!said && one.tagName !== 'INPUT') continue;
    const [a, b] = [light(parse(getComputedStyle(one).color)), light(ground(one))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) bad.push([one.tagName, one.className, one.textContent.slice(0, 30), ratio]);
  }
  return bad; }"""


def all_pages(service: DevService) -> list[str]:
    """Return pages with something on them."""
    return [*PAGES, f"/ui/keys?key_id={key_of(service)}", "/ui/keys?thread_id=room:1", "/ui/keys?key_id=none"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(service: DevService, tab: Open, scheme: str) -> None:
    """At least 4.5 to 1 (WCAG 2.2, 1.4.3), in daylight and at night."""
    watched = tab(service, color_scheme=scheme)
    grounds = set()
    for path in all_pages(service):
        watched.open(path)
        assert watched.page.evaluate(CONTRAST) == []
        grounds.add(watched.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == {"rgb(255, 255, 255)" if scheme == "light" else "rgb(18, 22, 27)"}


@pytest.mark.parametrize("width", [400, 320])
def test_it_fits_a_narrow_window(service: DevService, tab: Open, width: int) -> None:
    """Nothing but a wide table, within itself, is scrolled sideways (WCAG 2.2, 1.4.10)."""
    watched = tab(service, viewport={"width": width, "height": 800})
    for path in all_pages(service):
        watched.open(path)
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= width, path


def test_structure_tells_what_is_what(service: DevService, tab: Open) -> None:
    """One first heading; captions and scopes, labels, names of pictures; the keyboard gets in."""
    watched = tab(service)
    page = watched.page
    for path in all_pages(service):
        watched.open(path)
        assert page.locator("html[lang=en]").count() == 1
        assert page.locator("h1").count() == 1
        assert page.locator("main").count() == 1
        assert page.locator("table:not(:has(caption))").count() == 0
        assert page.locator("th:not([scope])").count() == 0
        assert page.locator("svg:not([role=img][aria-label])").count() == 0
        assert page.evaluate("[...document.querySelectorAll('input')].every(i => i.labels.length)")
        ids = page.locator("[id]").evaluate_all("found => found.map(one => one.id)")
        assert len(ids) == len(set(ids))
    watched.open("/ui/")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()


def test_it_can_be_read_without_its_style(service: DevService, tab: Open) -> None:
    """All of it is still there, and the bars of the chart stay bars."""
    watched = tab(service)
    watched.page.route("**/style.css", lambda route: route.abort())
    for path in all_pages(service):
        watched.open(path)
        expect(watched.page.get_by_role("heading", level=1)).to_be_visible()
    watched.open("/ui/")
    expect(watched.page.get_by_text("400 live data keys")).to_be_visible()
    box = watched.page.locator("svg").first.bounding_box()
    assert box is not None
    assert box["height"] == 14


def test_it_needs_no_script(service: DevService, tab: Open) -> None:
    """With JavaScript switched off it is the same page."""
    watched = tab(service, java_script_enabled=False)
    watched.open("/ui/")
    watched.page.get_by_label("Thread id").fill("room:3")
    watched.page.get_by_role("button", name="Show its keys").click()
    expect(watched.page.get_by_role("heading", name="Thread room:3")).to_be_visible()


# A rotation, and the pictures of the documents


def rotate(service: DevService, folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start a run of the rotation job."""
    command = [sys.executable, "-m", "tests.fault.rotate_with_faults", "rotate"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "service")])
    with (folder / "rotate.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--config", service.ready["config"], *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths, **environment},
        )


def test_a_rotation_is_watched(service: DevService, tab: Open, tmp_path: Path) -> None:
    """Step, progress and census of a real rotation, by the page alone.

    The pictures in docs/images are made here, and written there only where SCREENSHOTS is set.
    """
    folder = IMAGES if os.environ.get("SCREENSHOTS") else tmp_path
    folder.mkdir(exist_ok=True)
    size = {"width": 1000, "height": 700}
    watched, overview = tab(service, viewport=size), tab(service, viewport=size)
    # Up to where it is watched it goes at full speed, and after that, too.
    to_rewrap = {
        rotate_with_faults.POINT: "rewrap:opened",
        rotate_with_faults.SIGNAL: str(int(signal.SIGTERM)),
    }
    assert rotate(service, tmp_path, **to_rewrap).wait(PATIENCE / 1000) == 75
    rotating = rotate(service, tmp_path, "--max-rate", "40")
    try:
        watched.open("/ui/rotations")
        expect(watched.page.locator("[aria-current=step]")).to_contain_text("rewrap")
        first = watched.page.locator("progress").get_attribute("value")
        # The page loads itself again until the instance has counted more keys under the new version.
        expect(watched.page.locator(f"progress:not([value='{first}'])")).to_be_visible()
        overview.open("/ui/")
        expect(overview.page.get_by_role("heading", name="Rotation of the KEK")).to_be_visible()
        overview.page.screenshot(path=folder / "overview.png", full_page=True)
        watched.page.screenshot(path=folder / "rotation.png", full_page=True)
        rotating.terminate()
        assert rotating.wait(PATIENCE / 1000) == 75, (tmp_path / "rotate.log").read_text()
        rotating = rotate(service, tmp_path)
        assert rotating.wait(PATIENCE / 1000) == 0, (tmp_path / "rotate.log").read_text()
        expect(watched.page.locator("tbody")).to_contain_text("clean")
        watched.assert_quiet()
    finally:
        if rotating.poll() is None:
            rotating.terminate()
            rotating.wait(PATIENCE / 1000)
    key_id = key_of(service, "room:7")
    with speaking(service) as operator:
        operator.post(f"/v1/keys/{key_id}/disable").ok()
    watched.open(f"/ui/keys?key_id={key_id}")
    watched.page.screenshot(path=folder / "key.png", full_page=True)
    dark = tab(service, viewport={"width": 1000, "height": 620}, color_scheme="dark")
    dark.open("/ui/audit")
    dark.page.screenshot(path=folder / "audit.png")
    narrow = tab(service, viewport={"width": 400, "height": 800})
    narrow.open("/ui/")
    narrow.page.screenshot(path=folder / "narrow.png")
    names = {"overview.png", "rotation.png", "key.png", "audit.png", "narrow.png"}
    assert {path.name for path in folder.glob("*.png")} == names
    assert max(path.stat().st_size for path in folder.glob("*.png")) < 300_000
    assert {path.name for path in IMAGES.glob("*.png")} == names
