"""Runs tilt/Tiltfile in a Starlark interpreter; stand-ins for Tilt's built-ins note what they are asked."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import starlark

ROOT = Path(__file__).resolve().parents[2]
TILT = ROOT / "tilt"
CONTEXT = "kind-dev"

# The arguments that Tilt's own built-ins take (its API reference), positional ones first.
PARAMETERS = {
    "version_settings": ["constraint", "check_updates"],
    "docker_build": [
        *("ref", "context", "build_args", "dockerfile", "dockerfile_contents", "live_update"),
        *("match_in_env_vars", "ignore", "only", "entrypoint", "target", "extra_tag", "pull", "platform"),
    ],
    "fall_back_on": ["files"],
    "sync": ["local_path", "remote_path"],
    "run": ["cmd", "trigger", "echo_off"],
    "helm": ["pathToChartDir", "name", "namespace", "values", "set", "kube_version", "skip_crds"],
    "k8s_yaml": ["yaml", "allow_duplicates"],
    "k8s_resource": [
        *("workload", "new_name", "port_forwards", "extra_pod_selectors", "trigger_mode", "resource_deps"),
        *("objects", "auto_init", "pod_readiness", "links", "labels", "discovery_strategy"),
    ],
    "port_forward": ["local_port", "container_port", "name", "link_path", "host"],
    "local_resource": [
        *("name", "cmd", "deps", "trigger_mode", "resource_deps", "ignore", "auto_init", "serve_cmd"),
        *("labels", "links", "allow_parallel", "env", "dir"),
    ],
    "blob": ["contents"],
    "k8s_context": [],
}
ANSWERS: dict[str, Callable[[dict[str, Any]], Any]] = {"k8s_context": lambda _: CONTEXT}

PRELUDE = """
TRIGGER_MODE_AUTO = "auto"
TRIGGER_MODE_MANUAL = "manual"
shlex = struct(quote = _quote)

def workload_to_resource_function(function):
    for workload in _workloads():
        _renamed(workload["name"], function(struct(kind = workload["kind"], name = workload["name"])))
"""


@dataclass
class Recording:
    """What the Tiltfile asked for.

    Attributes:
        calls: Name of the built-in and its arguments by name, in order.
        resources: Tilt's name of each workload of the chart.
    """

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    resources: dict[str, str] = field(default_factory=dict)

    def all(self, name: str) -> list[dict[str, Any]]:
        """Return the arguments of each call of a built-in."""
        return [arguments for called, arguments in self.calls if called == name]

    def one(self, built_in: str, **given: Any) -> dict[str, Any]:
        """Return the arguments of the one call that was given these."""
        (found,) = [a for a in self.all(built_in) if all(a.get(key) == value for key, value in given.items())]
        return found


def load(workloads: Iterable[tuple[str, str]], text: str | None = None) -> Recording:
    """Run the Tiltfile.

    Args:
        workloads: Kind and name of each workload that the chart renders.
        text: Instead of the file's.

    Raises:
        starlark.StarlarkError: It is no Starlark, or asks for what Tilt does not have.
    """
    recording = Recording()
    module = starlark.Module()

    def stand_in(name: str) -> Callable[..., Any]:
        def called(*positional: Any, **named: Any) -> Any:
            names = PARAMETERS[name]
            if len(positional) > len(names) or (unknown := set(named) - set(names)):
                raise TypeError(f"{name}: Tilt takes no such argument: {unknown or positional}")
            arguments = dict(zip(names, positional, strict=False)) | named
            recording.calls.append((name, arguments))
            answer = ANSWERS.get(name)
            return answer(arguments) if answer else {"built-in": name, **arguments}

        return called

    for name in PARAMETERS:
        module.add_callable(name, stand_in(name))
    module.add_callable("_quote", shlex.quote)
    module.add_callable("_workloads", lambda: [{"kind": kind, "name": name} for kind, name in workloads])
    module.add_callable("_renamed", recording.resources.__setitem__)
    standard = starlark.Globals.extended_by([starlark.LibraryExtension.StructType])
    dialect = starlark.Dialect.extended()
    # Tilt's own dialect has no f-strings and no type annotations.
    dialect.enable_f_strings = False
    dialect.enable_types = starlark.DialectTypes.DISABLE
    source = (TILT / "Tiltfile").read_text() if text is None else text
    starlark.eval(module, starlark.parse("prelude", PRELUDE, dialect), standard)
    starlark.eval(module, starlark.parse("Tiltfile", source, dialect), standard)
    return recording
