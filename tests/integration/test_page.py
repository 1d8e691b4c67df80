"""The operators' page of running services: where it is served, and where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.integration.world import World, eventually, launch_all, write_private

PATHS = ("/ui", "/ui/", "/ui/rotations", "/ui/keys", "/ui/audit", "/ui/style.css", "/ui/icon.svg")


@pytest.fixture(scope="module")
def world(new_world: Callable[..., World]) -> World:
    """Run a service as it is by default, and one with the page and revocation lists, on one store."""
    made = new_world()
    made.store.start()
    write_private(made.root / "crl.pem", made.ca.crl())
    tls = {**made.tls, "client_crl": str(made.root / "crl.pem")}
    launch_all([made.instance("plain"), made.instance("page", ui=True, tls=tls)])
    return made


@pytest.mark.parametrize("path", PATHS)
def test_it_is_off_unless_asked_for(world: World, path: str) -> None:
    """Without `ui: true` there is no such route."""
    plain, page = world.instances
    assert plain.client("operator").get(path).status == 404
    assert page.client("operator").get(path).status == 200


@pytest.mark.parametrize("path", PATHS)
def test_the_plain_port_never_serves_it(world: World, path: str) -> None:
    """Whoever has no certificate sees nothing of it."""
    for instance in world.instances:
        assert instance.admin(path).status == 404


def test_head_has_the_headers_alone(world: World) -> None:
    """And the connection goes on."""
    client = world.instances[1].client("operator")
    answer = client.request("HEAD", "/ui/")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert client.get("/ui/").status == 200


def test_all_instances_and_expiries_are_there(world: World) -> None:
    """Both instances, and each kind of thing that expires."""
    client = world.instances[1].client("operator")

    def page() -> str:
        return client.get("/ui/").body.decode()

    eventually(lambda: page().count('<th scope="row"><code>') == 2, "both have been heard of")
    text = page()
    for what in ("your certificate", "server certificate", "CA of clients", "revocation list"):
        assert f'<th scope="row">{what}</th>' in text
