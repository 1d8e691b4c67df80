"""A new KEK version in a Kubernetes Secret, through the official client against a stand-in API server."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.domain.errors import KekFileInvalid, RotationRefused
from progressdb_kms.domain.keyring import check_value
from progressdb_kms.kek.escrow import Escrow
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.kek.keyfile import parse_entries, render_entries
from progressdb_kms.kek.kubernetes import MADE_BY, KubernetesKekStager, SecretRef
from progressdb_kms.store.memory import MemoryStore
from progressdb_kms.store.memory_escrow import MemoryEscrowBox
from tests.unit.kek.secrets_api import SecretsApi

KEY = bytes(range(32))
OTHER = bytes(range(1, 33))
CONTENT = render_entries({1: KEY})


def required() -> Mapping[int, str]:
    """Return what stored keys need."""
    return {1: check_value(KEY)}


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SecretsApi]]:
    """Give what starts an API server with a Secret, to which the kubeconfig leads."""
    running: list[SecretsApi] = []

    def start(content: bytes = CONTENT, **metadata: Any) -> SecretsApi:
        api = SecretsApi({"kek.yaml": content}, **metadata)
        running.append(api)
        api.write_kubeconfig(tmp_path / "kubeconfig")
        return api

    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    yield start
    for api in running:
        api.close()


@pytest.fixture
def source(tmp_path: Path) -> FileKekSource:
    """Give the mounted file."""
    path = tmp_path / "kek.yaml"
    path.write_bytes(CONTENT)
    path.chmod(0o600)
    return FileKekSource(path)


def stager(
    source: FileKekSource, key: str = "kek.yaml", wait: float = 30, name: str = "kek"
) -> KubernetesKekStager:
    """Return a stager."""
    escrow = Escrow(MemoryEscrowBox(), MemoryStore(), source, ())
    return KubernetesKekStager(SecretRef("kms", name, key), source, required, escrow, wait)


def mounts(api: SecretsApi, source: FileKekSource) -> None:
    """Bring the Secret into the file after each patch, as a kubelet does."""
    api.patched = lambda: void(source.path.write_bytes(api.content()))


def void(_: object) -> None:
    """Return nothing."""


async def test_adds_and_waits_for_the_mount(serve: Callable[..., SecretsApi], source: FileKekSource) -> None:
    """The version is added by one patch, other keys of the Secret stay, and the mounted file has shown it."""
    api = serve()
    api.write({"other": b"x"})
    mounts(api, source)
    made = stager(source)
    await made.stage(2)
    assert source.versions() == {1, 2}
    assert parse_entries(api.content(), "x")[1] == KEY
    assert api.content("other") == b"x"
    assert api.requests == ["GET", "PATCH"]
    assert await made.escrow(2) == 0
    await made.stage(2)
    assert api.requests == ["GET", "PATCH"]


async def test_a_conflict_is_read_again(serve: Callable[..., SecretsApi], source: FileKekSource) -> None:
    """A Secret that changes between read and patch is not overwritten: the change is kept, or adopted."""
    api = serve()
    mounts(api, source)
    writes = iter([{"other": b"1"}, {"kek.yaml": render_entries({1: KEY, 2: OTHER})}])

    def interfere() -> None:
        for data in writes:
            api.write(data)
            source.path.write_bytes(api.content())
            return

    api.before_patch = interfere
    await stager(source).stage(2)
    assert api.content("other") == b"1"
    assert parse_entries(api.content(), "x")[2] == OTHER
    assert api.requests == ["GET", "PATCH", "GET", "PATCH", "GET"]


async def test_endless_conflicts_end(serve: Callable[..., SecretsApi], source: FileKekSource) -> None:
    """A Secret that changes all the time is given up after a few tries."""
    api = serve()
    api.before_patch = lambda: api.write({"other": b"1"})
    with pytest.raises(RotationRefused, match="changes faster"):
        await stager(source).stage(2)


async def test_adopts_what_is_there(serve: Callable[..., SecretsApi], source: FileKekSource) -> None:
    """A version that the Secret holds already, also one that GitOps keeps, is waited for and not patched."""
    content = render_entries({1: KEY, 2: OTHER})
    api = serve(content, labels={"app.kubernetes.io/managed-by": "external-secrets"})
    with pytest.raises(RotationRefused, match="does not show it after 0 s"):
        await stager(source, wait=0).stage(2)
    source.path.write_bytes(content)
    await stager(source).stage(2)
    assert "PATCH" not in api.requests


@pytest.mark.parametrize(
    "metadata, keeper",
    [
        (
            {"ownerReferences": [{"apiVersion": "v1", "kind": "ExternalSecret", "name": "kek", "uid": "1"}]},
            "ExternalSecret kek",
        ),
        ({"annotations": {"argocd.argoproj.io/tracking-id": "x"}}, "Argo CD"),
        ({"labels": {"argocd.argoproj.io/instance": "x"}}, "Argo CD"),
        ({"labels": {"kustomize.toolkit.fluxcd.io/name": "x"}}, "Flux"),
        ({"labels": {"app.kubernetes.io/managed-by": "external-secrets"}}, "External Secrets"),
        ({"labels": {"reconcile.external-secrets.io/created-by": "x"}}, "External Secrets"),
        ({"annotations": {"reconcile.external-secrets.io/data-hash": "x"}}, "External Secrets"),
        ({"annotations": {"argocd.argoproj.io/sync-options": "Prune=false"}}, "Argo CD"),
        ({"annotations": {MADE_BY: "provision", "argocd.argoproj.io/tracking-id": "x"}}, "Argo CD"),
    ],
)
async def test_what_something_else_keeps_is_never_patched(
    serve: Callable[..., SecretsApi], source: FileKekSource, metadata: dict[str, Any], keeper: str
) -> None:
    """A Secret of GitOps or an external secrets operator is refused, saying where to add the version."""
    api = serve(**metadata)
    with pytest.raises(RotationRefused, match=f"kept by {keeper}.*add KEK version 2 at its source"):
        await stager(source).stage(2)
    assert api.requests == ["GET"]
    assert api.content() == CONTENT


async def test_a_secret_of_our_own_that_argo_cd_leaves_alone_is_patched(
    serve: Callable[..., SecretsApi], source: FileKekSource
) -> None:
    """What tells Argo CD not to prune a Secret of `provision` does not mean that Argo CD keeps it."""
    options = {f"argocd.argoproj.io/{name}-options": "x" for name in ("sync", "compare")}
    api = serve(annotations={MADE_BY: "provision", **options})
    mounts(api, source)
    await stager(source).stage(2)
    assert api.requests == ["GET", "PATCH"]


async def test_a_secret_that_is_not_the_mounted_one_is_refused(
    serve: Callable[..., SecretsApi], source: FileKekSource
) -> None:
    """Other keys than the loaded ones, no such entry, and an entry that is no KEK file are refused."""
    api = serve(render_entries({1: OTHER}))
    with pytest.raises(KekFileInvalid, match="is it the Secret"):
        await stager(source).stage(2)
    with pytest.raises(KekFileInvalid, match="has no key"):
        await stager(source, key="kek.yml").stage(2)
    api.write({"kek.yaml": b"versions: {1: " + KEY.hex().encode()})
    with pytest.raises(KekFileInvalid) as raised:
        await stager(source).stage(2)
    assert KEY.hex() not in "".join(traceback.format_exception(raised.value))
    api.secret["data"]["kek.yaml"] = "%"
    with pytest.raises(KekFileInvalid, match="not base64"):
        await stager(source).stage(2)
    assert "PATCH" not in api.requests


@pytest.mark.parametrize("method, status", [("GET", 403), ("PATCH", 403), ("PATCH", 422), ("GET", 500)])
async def test_refusals_are_told_without_the_body(
    serve: Callable[..., SecretsApi], source: FileKekSource, method: str, status: int
) -> None:
    """What Kubernetes refuses names verb and status, nothing of the Secret, though the server quotes it."""
    api = serve()
    api.refuse[method] = status
    with pytest.raises(RotationRefused, match=f"{method.lower()} Secret kms/kek: {status}") as raised:
        await stager(source).stage(2)
    shown = "".join(traceback.format_exception(raised.value))
    assert api.secret["data"]["kek.yaml"] not in shown
    assert "data" not in str(raised.value)


async def test_no_cluster_and_no_config(
    serve: Callable[..., SecretsApi], source: FileKekSource, tmp_path: Path
) -> None:
    """An API server that does not answer, and a missing kubeconfig, are refusals and no tracebacks."""
    serve().close()
    with pytest.raises(RotationRefused, match="does not let us get"):
        await stager(source).stage(2)
    (tmp_path / "kubeconfig").unlink()
    with pytest.raises(RotationRefused, match="no access to Kubernetes"):
        await stager(source).stage(2)
