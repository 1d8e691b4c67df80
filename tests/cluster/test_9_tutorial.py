"""The tutorial's part on a cluster, run as written; its part on one machine is run by tests/docs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.cluster.conftest import NAMESPACES
from tests.cluster.kube import Kube
from tests.docs.checkout import make_checkout, reader
from tests.docs.test_tutorial import TUTORIAL
from tests.docs.walkthrough import Terminals, steps

pytestmark = pytest.mark.cluster

# Stand-ins for what this cluster has no need of: the images under test are built from the same Dockerfiles,
# and the nodes have them. They take the tutorial's commands and no others.
CHAT: Final = "deploy/examples/chat-server/Dockerfile"
TOOLS: Final = {
    "docker": f"""
case $* in
    "build -t $IMAGE .") [ -f Dockerfile ] ;;
    "build -t $CHAT_IMAGE -f {CHAT} --build-arg BASE=$IMAGE examples") [ -f {CHAT} ] && [ -d examples ] ;;
    *) false ;;
esac
""",
    "kind": '[ "$*" = "load docker-image $IMAGE" ] || [ "$*" = "load docker-image $CHAT_IMAGE" ]',
}


@pytest.fixture
def namespaces() -> Iterator[list[Kube]]:
    """Return the tutorial's namespaces, which must not be there yet, and go again."""
    found = [Kube("kms"), Kube("chat")]
    for kube in found:
        assert not kube.exists("namespace", kube.namespace), f"namespace {kube.namespace} is in use"
    NAMESPACES.extend(kube.namespace for kube in found)
    yield found
    for kube in found:
        kube.run("delete", "namespace", kube.namespace, "--ignore-not-found", "--timeout=180s")


def test_tutorial(
    image: str,
    chat_image: str,
    namespaces: list[Kube],
    tmp_path: Path,
    saw: Callable[[str], None],
    stopwatch: Callable[[], float],
) -> None:
    """Every command of the part `cluster` does what the page says, from the image to the clean-up.

    With it the chat server's promises: its own certificate, messages that outlive all pods, none of them
    readable where they are stored, and the rotation of a thread's key.
    """
    checkout, tools, scratch = (tmp_path / name for name in ("checkout", "tools", "scratch"))
    for folder in (checkout, tools, scratch):
        folder.mkdir()
    make_checkout(checkout)
    before = {path.name for path in checkout.iterdir()}
    for name, command in TOOLS.items():
        (tools / name).write_text(f"#!/bin/bash\n{command}\n")
        (tools / name).chmod(0o755)
    environment = reader(IMAGE=image, CHAT_IMAGE=chat_image)
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    todo = steps(TUTORIAL.read_text())["cluster"]
    terminals = Terminals(checkout, scratch, environment, deadline=900)
    try:
        terminals.run(todo)
    finally:
        terminals.close()
    assert {path.name for path in checkout.iterdir()} == before
    assert not any(kube.exists("namespace", kube.namespace) for kube in namespaces)
    saw(f"{len(todo)} blocks in {stopwatch():.0f} s")
