"""Reads lists of objects by their names, as JSON, and writes what their schemas have against them, a line each.

Run by tests/heavy/kubernetes/schemas.py with a Python of its own, which has the schemas.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor

GROUP = json.loads((Path(__file__).parents[1] / "leaderworkerset.json").read_text())
MODELS = {"PrometheusRule": PrometheusRule, "ScaledObject": ScaledObject, "ServiceMonitor": ServiceMonitor}
# The newest three, which are those that Kubernetes' people keep up.
VERSIONS = [version.rsplit(".", 1)[0] for version in kubernetes_validate.utils.all_versions()][-3:]


def problems(one: dict[str, Any]) -> Iterator[str]:
    kind = one["kind"]
    if kind in MODELS:
        yield from _of_model(one, MODELS[kind])
    elif kind == "LeaderWorkerSet":
        for error in jsonschema.Draft202012Validator(GROUP).iter_errors(one):
            yield error.message
        for part in ("leaderTemplate", "workerTemplate"):
            pod = one["spec"]["leaderWorkerTemplate"][part]
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": pod["metadata"] | {"name": "pod"},
                "spec": pod["spec"],
            }
            yield from problems(pod)
    else:
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(one, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"{version}: {error.message}"
            except kubernetes_validate.SchemaNotFoundError as error:
                yield error.message


def _of_model(one: dict[str, Any], model: Any) -> Iterator[str]:
    try:
        read = model.model_validate(one)
    except ValueError as error:
        yield str(error)
        return
    # What it does not know it leaves out in silence.
    if (back := read.model_dump(mode="json", by_alias=True, exclude_unset=True)) != one:
        yield f"of {one} is known {back}"


def main() -> None:
    sys.stdout.write(f"{' '.join(VERSIONS)}\n")
    # Most are the same in all renderings, and each reading of one takes its version's schemas anew.
    found: dict[str, list[str]] = {}
    for name, objects in json.load(sys.stdin).items():
        for one in objects:
            text = json.dumps(one, sort_keys=True)
            if text not in found:
                found[text] = list(problems(one))
            for problem in found[text]:
                sys.stdout.write(f"{name}: {one['kind']} {one['metadata']['name']}: {problem}\n")


main()
