"""``helm template`` for the chart's tests: rendered once for the same values, then remembered."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "progressdb-kms"
MODES = Path(__file__).parent / "values"
RELEASE, NAMESPACE = "kms", "kms"
FULLNAME = "kms-progressdb-kms"
HELM = shutil.which("helm")

Values = dict[str, Any]
Object = dict[str, Any]


@functools.cache
def _helm(values: str, release: str, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    assert HELM is not None
    # A home of its own: nothing of the user's plugins and repositories takes part.
    return subprocess.run(
        [HELM, "template", release, str(CHART), "--namespace", NAMESPACE, "--values", "-", *arguments],
        input=values,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
    )


def template(values: Values | None = None, *arguments: str, release: str = RELEASE) -> str:
    """Return the rendered manifests."""
    done = _helm(json.dumps(values or {}), release, arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(values: Values) -> str:
    """Return the message with which the values are refused."""
    done = _helm(json.dumps(values), RELEASE, ())
    assert done.returncode != 0, "the values were accepted"
    return done.stderr


@functools.cache
def _parsed(text: str) -> list[Object]:
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def objects(values: Values | None = None, *arguments: str, release: str = RELEASE) -> list[Object]:
    """Return the rendered objects."""
    return _parsed(template(values, *arguments, release=release))


def mode(name: str) -> Values:
    """Return the values of ``values/<name>.yaml``."""
    return yaml.load((MODES / f"{name}.yaml").read_text(), yaml.CSafeLoader)


def every_mode() -> list[Values]:
    """Return the defaults and the values of each mode."""
    return [{}, *(mode(path.stem) for path in sorted(MODES.glob("*.yaml")))]


def one(kind: str, suffix: str, rendered: list[Object], namespace: str = NAMESPACE) -> Object:
    """Return the one object of this kind whose name is the full name with ``suffix``."""
    found = [
        item
        for item in rendered
        if item["kind"] == kind
        and item["metadata"]["name"] == FULLNAME + suffix
        and item["metadata"].get("namespace") == namespace
    ]
    assert len(found) == 1, f"{len(found)} objects {kind} {FULLNAME}{suffix}"
    return found[0]


def pod_templates(rendered: list[Object]) -> dict[str, Object]:
    """Return what pods are made from, by kind and name: the template, or the pod itself."""
    found = {}
    for item in rendered:
        name = f"{item['kind']} {item['metadata']['name']}"
        match item["kind"]:
            case "Pod":
                found[name] = item
            case "Deployment" | "StatefulSet" | "Job":
                found[name] = item["spec"]["template"]
            case "CronJob":
                found[name] = item["spec"]["jobTemplate"]["spec"]["template"]
    return found


def containers(rendered: list[Object]) -> list[tuple[str, Object]]:
    """Return every container with the name of what it belongs to."""
    return [
        (f"{owner}: {container['name']}", container)
        for owner, pod in pod_templates(rendered).items()
        for container in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]
    ]


def document(rendered: list[Object], suffix: str, key: str) -> Any:
    """Return a YAML file of a ConfigMap, parsed."""
    return yaml.load(one("ConfigMap", suffix, rendered)["data"][key], yaml.CSafeLoader)


def at(values: Values, path: str, value: Any) -> Values:
    """Return a copy of ``values`` with one more value at a dotted path."""
    copy = json.loads(json.dumps(values))
    *parents, last = path.split(".")
    target = copy
    for name in parents:
        target = target.setdefault(name, {})
    target[last] = value
    return copy
