"""What kubectl makes of the manifests, and of whatever somebody builds upon them."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import ROOT

FOLDER = ROOT / "kubernetes"
OVERLAYS = sorted(folder.name for folder in (FOLDER / "overlays").iterdir())
COMPONENTS = sorted(folder.name for folder in (FOLDER / "components").iterdir())

Object = dict[str, Any]


def kustomize(folder: Path) -> list[Object]:
    """The objects of a folder's kustomization. Fails with kubectl's words, its warnings among them."""
    command = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return list(yaml.safe_load_all(done.stdout))


def built(folder: Path, kustomization: Mapping[str, Any]) -> list[Object]:
    """The objects of a kustomization that is written into `folder`; `ROOT/…` in it are paths of the repository."""
    text = yaml.safe_dump(dict(kustomization)).replace("ROOT/", f"{os.path.relpath(ROOT, folder)}/")
    (folder / "kustomization.yaml").write_text(text)
    return kustomize(folder)


def composed(folder: Path, *components: str) -> list[Object]:
    """The objects of the base with these components."""
    named = [component for component in components if component != "vllm"]
    resources = ["ROOT/kubernetes/base"] + ["ROOT/kubernetes/components/vllm"] * ("vllm" in components)
    return built(
        folder, {"resources": resources, "components": [f"ROOT/kubernetes/components/{name}" for name in named]}
    )


@functools.cache
def overlay(name: str) -> tuple[Object, ...]:
    """The objects of an overlay; not to be changed."""
    return tuple(kustomize(FOLDER / "overlays" / name))


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [one for one in objects if one["kind"] in kinds]


def named(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [one for one in of_kind(objects, kind) if one["metadata"]["name"] == name]
    return found


def templates(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Each pod template, with a name for messages."""
    for one in objects:
        name = one["metadata"]["name"]
        if one["kind"] == "Deployment":
            yield name, one["spec"]["template"]
        if one["kind"] == "LeaderWorkerSet":
            for part in ("leaderTemplate", "workerTemplate"):
                yield f"{name}'s {part}", one["spec"]["leaderWorkerTemplate"][part]


def containers(pod: Object) -> list[Object]:
    """A pod's containers, those that run before it among them."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def settings(objects: list[Object], container: Object) -> dict[str, str]:
    """A container's environment, without what comes from secrets; the later wins, as there."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            found |= named(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    return found | {one["name"]: one["value"] for one in container.get("env", []) if "value" in one}
