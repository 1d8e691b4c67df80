"""What tilt/Tiltfile asks of Tilt, checked against the chart, the Dockerfile and the files that it names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import pytest
import starlark
import yaml

from tests.tilt.tiltfile import CONTEXT, ROOT, TILT, Recording, load

pytestmark = pytest.mark.chart

WORKLOADS = {"Deployment", "StatefulSet", "Job", "CronJob"}
Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def asked() -> Recording:
    """Return what the Tiltfile asks for, before the chart is rendered."""
    return load([])


@pytest.fixture(scope="module")
def rendered(asked: Recording) -> list[Manifest]:
    """Return the objects that the chart renders with what the Tiltfile gives it, as Tilt's `helm` does."""
    if shutil.which("helm") is None:
        pytest.skip("helm is not on PATH")
    helm = asked.one("helm")
    command = ["helm", "template", helm["name"], helm["pathToChartDir"], "--namespace", helm["namespace"]]
    command += [word for file in helm["values"] for word in ("--values", file)]
    done = subprocess.run(
        [*command, "--no-hooks", "--skip-tests"], cwd=TILT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    objects = [one for one in yaml.safe_load_all(done.stdout) if one]
    return [one for one in objects if "helm.sh/hook" not in one["metadata"].get("annotations", {})]


@pytest.fixture(scope="module")
def tilted(rendered: list[Manifest]) -> Recording:
    """Return what the Tiltfile asks for, given the chart's workloads."""
    return load([(one["kind"], one["metadata"]["name"]) for one in rendered if one["kind"] in WORKLOADS])


def containers(one: Manifest) -> list[Manifest]:
    """Return a workload's containers."""
    spec = one["spec"]
    template = spec["jobTemplate"]["spec"]["template"] if one["kind"] == "CronJob" else spec["template"]
    return list(template["spec"]["containers"])


def named(rendered: list[Manifest], kind: str, name: str) -> Manifest:
    """Return an object."""
    (found,) = [one for one in rendered if one["kind"] == kind and one["metadata"]["name"] == name]
    return found


def test_image_is_the_charts(tilted: Recording, rendered: list[Manifest]) -> None:
    """The image that Tilt builds is the one that the chart's workloads run, so that Tilt puts its own in."""
    build = tilted.one("docker_build")
    images = {
        c["image"].rpartition(":")[0] or c["image"]
        for one in rendered
        if one["kind"] in WORKLOADS
        for c in containers(one)
    }
    assert build["ref"] in images
    assert (TILT / build["context"]).resolve() == ROOT
    assert (TILT / build["dockerfile"]).is_file()


def test_resources_exist(tilted: Recording) -> None:
    """Each resource that the Tiltfile sets up is a workload of the chart or of its own files."""
    own = {one["metadata"]["name"] for one in yaml.safe_load_all((TILT / "seed.yaml").read_text()) if one}
    known = set(tilted.resources.values()) | own
    asked_for = {call["workload"] for call in tilted.all("k8s_resource")}
    assert asked_for <= known
    assert not [
        dep
        for call in tilted.all("k8s_resource")
        for dep in call.get("resource_deps", [])
        if dep not in known
    ]


def test_every_workload_is_set_up(tilted: Recording) -> None:
    """Only the service follows each change of the code: the store and the jobs wait for their button."""
    modes = {call["workload"]: call.get("trigger_mode", "auto") for call in tilted.all("k8s_resource")}
    automatic = {name for name in tilted.resources.values() if modes.get(name, "auto") == "auto"}
    assert automatic == {"progressdb-kms"}


def test_job_names_have_no_hash(tilted: Recording) -> None:
    """The bootstrap's resource keeps its name when its spec changes."""
    (job,) = [name for name in tilted.resources if name.startswith("progressdb-kms-provision-")]
    assert tilted.resources[job] == "progressdb-kms-provision"


def test_ports_are_the_containers(tilted: Recording, rendered: list[Manifest]) -> None:
    """Each port-forward leads to a port that a container of that workload names."""
    service = named(rendered, "Deployment", "progressdb-kms")
    ports = {port["containerPort"] for c in containers(service) for port in c.get("ports", [])}
    forwards = tilted.one("k8s_resource", workload="progressdb-kms")["port_forwards"]
    assert {forward["container_port"] for forward in forwards} == ports
    store = named(rendered, "StatefulSet", "progressdb-kms-redis")
    ports = {port["containerPort"] for c in containers(store) for port in c.get("ports", [])}
    forwards = tilted.one("k8s_resource", workload="progressdb-kms-redis")["port_forwards"]
    assert {forward["container_port"] for forward in forwards} <= ports


def test_live_update_reaches_the_running_code(tilted: Recording, rendered: list[Manifest]) -> None:
    """Changed code is put where Python looks first: a writable volume that outlives the process."""
    full, copy, restart = tilted.one("docker_build")["live_update"]
    assert (
        TILT / copy["local_path"] / "__init__.py"
    ).resolve() == ROOT / "service/progressdb_kms/__init__.py"
    assert not [file for file in full["files"] if not (TILT / file).is_file()]
    (container,) = containers(named(rendered, "Deployment", "progressdb-kms"))
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    environment = {one["name"]: one.get("value") for one in container["env"]}
    folder, _, package = copy["remote_path"].rpartition("/")
    assert package == "progressdb_kms"
    assert environment["PYTHONPATH"] == folder
    assert not mounts[folder].get("readOnly")
    volumes = named(rendered, "Deployment", "progressdb-kms")["spec"]["template"]["spec"]["volumes"]
    assert [volume for volume in volumes if volume["name"] == mounts[folder]["name"] and "emptyDir" in volume]
    assert restart["cmd"].endswith("&& kill 1")


def test_rotate_button(tilted: Recording, rendered: list[Manifest]) -> None:
    """The button that rotates makes a Job from a CronJob of the chart, in its namespace."""
    button = tilted.one("local_resource", name="rotate-now")
    (cron_job,) = re.findall(r"--from=cronjob/(\S+)", button["cmd"])
    named(rendered, "CronJob", cron_job)
    assert f"--context {CONTEXT} --namespace {tilted.one('helm')['namespace']} " in button["cmd"]
    assert button["auto_init"] is False
    assert button["trigger_mode"] == "manual"


def test_seed_button(tilted: Recording, rendered: list[Manifest]) -> None:
    """The button that seeds keys runs a Job with a certificate that the chart makes."""
    button = tilted.one("k8s_resource", workload="seed")
    assert (button["auto_init"], button["trigger_mode"]) == (False, "manual")
    (job,) = [one for one in yaml.safe_load_all((TILT / "seed.yaml").read_text()) if one["kind"] == "Job"]
    secrets = [v["secret"]["secretName"] for v in job["spec"]["template"]["spec"]["volumes"] if "secret" in v]
    values = yaml.safe_load((TILT / "values.yaml").read_text())
    (client,) = values["clients"]
    assert "key:create" in client["permissions"]
    assert job["metadata"]["namespace"] == tilted.one("helm")["namespace"]
    made = json.dumps([one for one in rendered if one["kind"] in {"ConfigMap", "Certificate"}])
    assert all(secret in made for secret in secrets)
    assert containers(job)[0]["image"] == tilted.one("docker_build")["ref"]


def test_what_tilt_lacks_is_refused() -> None:
    """The stand-ins refuse an argument that Tilt does not have: the checks above rest on that."""
    with pytest.raises(starlark.StarlarkError, match="no such argument"):
        load([], 'docker_build("a", ".", livee_update=[])')
