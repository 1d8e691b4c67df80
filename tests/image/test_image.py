"""The container image: what is in it, and that it serves from a read-only root as a user that is nobody.

The archive's path stands in ``IMAGE_ARCHIVE`` (`make test-image` builds one). Runs as root: it enters the
image's files by ``chroot`` in a mount namespace of its own, so that no container engine is needed.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.client import open_sync_provider
from tests.integration.world import KEK_1, eventually, kek_text
from tests.store.servers import ALWAYS, Server, free_port
from tests.transport.pki import Ca

ROOT = Path(__file__).resolve().parents[2]
USER = 65532
CONFIG = "etc/progressdb-kms"
ENTER = f"""
root=$1; shift
mount --bind "$root" "$root"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -o remount,ro,bind "$root"
exec chroot --userspec={USER}:{USER} "$root" "$@"
"""

pytestmark = [pytest.mark.image, pytest.mark.slow]


@pytest.fixture(scope="session")
def archive() -> Path:
    """Give the image's archive."""
    assert os.environ.get("IMAGE_ARCHIVE"), "set IMAGE_ARCHIVE to an archive that scripts/image has made"
    return Path(os.environ["IMAGE_ARCHIVE"]).resolve()


@pytest.fixture(scope="session")
def config(archive: Path) -> dict[str, object]:
    """Give the image's configuration."""
    with tarfile.open(archive) as outer:
        manifest = json.loads(_read(outer, "manifest.json"))[0]
        found: dict[str, object] = json.loads(_read(outer, manifest["Config"]))["config"]
        return found


@pytest.fixture(scope="session")
def files(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the image's files as a container sees them."""
    root = tmp_path_factory.mktemp("image")
    with tarfile.open(archive) as outer:
        for name in json.loads(_read(outer, "manifest.json"))[0]["Layers"]:
            with tarfile.open(fileobj=outer.extractfile(name)) as layer:
                for member in layer:
                    folder, _, base = member.name.rpartition("/")
                    if base.startswith(".wh."):
                        gone = root / folder / base.removeprefix(".wh.")
                        subprocess.run(["rm", "-rf", gone], check=True)
                    else:
                        layer.extract(member, root, filter="fully_trusted")
    for folder in ("dev", "proc", "tmp", CONFIG):
        (root / folder).mkdir(parents=True, exist_ok=True)
    return root


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None
    return file.read()


def enter(files: Path, config: dict[str, object], *words: str) -> list[str]:
    """Return the words that run a command in the image, with its environment alone."""
    environment = config["Env"]
    assert isinstance(environment, list)
    return ["unshare", "--mount", "sh", "-ec", ENTER, "sh", str(files), "env", "-i", *environment, *words]


def run(files: Path, config: dict[str, object], *words: str) -> subprocess.CompletedProcess[str]:
    """Run the image's entry point with these words."""
    entry = config["Entrypoint"]
    assert isinstance(entry, list)
    command = enter(files, config, *entry, *words)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_archive_is_in_order(archive: Path) -> None:
    """Size, user, entry point, signal, labels, no pip, no compiler, nothing left from the build."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "check_image.py", archive],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_commands_run(files: Path, config: dict[str, object]) -> None:
    """Every command can be loaded: no extra that one needs is missing; what writes nothing needs no disk."""
    done = run(files, config, "version", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["progressdb-kms"]
    listed = run(files, config, "--help").stdout.split("Commands:")[1]
    names = [line.split()[0] for line in listed.splitlines() if line[:2] == "  " and line[2:3].isalpha()]
    assert {"serve", "rotate", "backup", "provision"} <= set(names)
    for name in names:
        done = run(files, config, name, "--help")
        assert done.returncode == 0, (name, done.stderr)
    done = run(files, config, "provision", "--config", "/nowhere")
    assert "can't read the provisioning file /nowhere" in done.stderr
    for code in (
        "import progressdb_kms.kek.aws, progressdb_kms.kek.pkcs11, progressdb_kms.kek.vault",
        "import progressdb_kms.provision.run, progressdb_kms.rotation.kubernetes_events",
        "import boto3; [boto3.client(name, region_name='eu-west-1') for name in ('s3', 'kms', 'sts')]",
    ):
        done = subprocess.run(
            enter(files, config, "python", "-c", code), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_nothing_can_be_installed_or_written(files: Path, config: dict[str, object]) -> None:
    """There is no pip to run; the root is read-only for this user, /tmp is not."""
    for code, says in (
        ("import pip", "No module named 'pip'"),
        ("import ensurepip", "No module named 'ensurepip'"),
        ("open('/opt/progressdb-kms/x', 'w')", "Read-only file system"),
        ("import os; assert os.getuid() == os.getgid() == 65532; open('/tmp/x', 'w').close(); 1/0", "Zero"),
    ):
        done = subprocess.run(
            enter(files, config, "python", "-c", code), capture_output=True, text=True, check=False
        )
        assert says in done.stderr, code


@pytest.fixture
def served(files: Path, tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Give API and admin port of a configuration in the image's place, over a store on loopback."""
    store = Server("redis", tmp_path / "store", ALWAYS, port=free_port()).start()
    ca = Ca()
    folder = files / CONFIG
    ca.server().write(folder, "tls")
    ca.client("chat").write(tmp_path, "chat")
    (tmp_path / "ca.crt").write_bytes(ca.pem)
    (folder / "ca.crt").write_bytes(ca.pem)
    (folder / "kek.yaml").write_text(kek_text({1: KEK_1}))
    rules = [{"identities": ["dns:chat"], "permissions": ["key:create", "key:encrypt", "key:decrypt"]}]
    (folder / "policy.yaml").write_text(json.dumps({"rules": rules}))
    api, admin = free_port(), free_port()
    document = {
        "listen": {"port": api},
        "admin": {"port": admin},
        "tls": {"cert": "tls.crt", "key": "tls.key", "client_ca": "ca.crt"},
        "policy": "policy.yaml",
        "kek": {"path": "kek.yaml"},
        "store": {"url": store.url},
        "drain": {"delay": 0},
    }
    (folder / "config.yaml").write_text(json.dumps(document))
    for path in folder.iterdir():
        os.chown(path, 0, USER)
        path.chmod(0o440)
    yield api, admin
    store.kill()


def ready(port: int) -> bool:
    """Say whether the service is ready."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def test_serves_and_ends_by_its_stop_signal(
    files: Path, config: dict[str, object], served: tuple[int, int], tmp_path: Path
) -> None:
    """Entry point and command as they are give a service over mTLS; SIGTERM ends it with 0."""
    entry, words = config["Entrypoint"], config["Cmd"]
    assert isinstance(entry, list)
    assert isinstance(words, list)
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(enter(files, config, *entry, *words), stdout=output, stderr=output)
    try:
        eventually(lambda: ready(served[1]) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        chat = {name: str(tmp_path / f"chat.{name}") for name in ("crt", "key")}
        with open_sync_provider(
            f"https://localhost:{served[0]}", ca=str(tmp_path / "ca.crt"), cert=chat["crt"], key=chat["key"]
        ) as kms:
            dek = kms.create_dek_for_thread("room:1")
            sealed = kms.encrypt_with_dek(dek.key_id, b"message")
            assert kms.decrypt_with_dek(dek.key_id, sealed.ciphertext) == b"message"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
