"""A cluster in small, one for all tests, and what is applied to it."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.heavy.cluster.cluster import Cluster
from tests.heavy.kubernetes.kustomized import Object, built
from tests.support.paths import ROOT

IMAGE = "vllm-gateway:test-cluster"
OVERLAY = "ROOT/tests/heavy/cluster/overlay"

Play = Callable[[Coroutine[Any, Any, None]], None]
Rendered = Callable[..., list[Object]]


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def play(runner: asyncio.Runner) -> Play:
    """Runs what a test does, in the loop that the cluster is in."""
    return runner.run


@pytest.fixture(scope="session")
def cluster(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An empty one, with the gateway's image of this checkout and the demo model in what becomes the claim's volume."""
    command = ["docker", "build", "--quiet", "--file", "compose/Dockerfile", "--tag", IMAGE, "."]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    model = tmp_path_factory.mktemp("model") / "demo-model"
    subprocess.run([ROOT / ".venv/bin/vllm-gateway", "demo-model", model], check=True, timeout=300)
    folder = tmp_path_factory.mktemp("cluster")
    for path in [folder, *folder.parents[:2]]:
        path.chmod(0o755)
    running = Cluster.running(folder)
    cluster = runner.run(running.__aenter__())
    try:
        shutil.copytree(model, runner.run(cluster.engine.volume("claim-model-cache")) / "demo-model")
        yield cluster
    finally:
        runner.run(running.__aexit__(None, None, None))


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """What the tests' overlay makes, with whatever else a kustomization may say."""

    def render(**more: Any) -> list[Object]:
        return built(tmp_path_factory.mktemp("kustomization"), {"resources": [OVERLAY], **more})

    return render


def settings(name: str, *literals: str) -> dict[str, Any]:
    """Other settings, for a kustomization."""
    return {"configMapGenerator": [{"name": name, "behavior": "merge", "literals": [*literals]}]}


def secret(name: str, **data: str) -> Object:
    """As `kubectl create secret generic` makes it."""
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data}


def log_of(folder: Path, pod: str) -> str:
    """What the containers of a pod that have ended wrote."""
    return "".join(file.read_text() for file in sorted(folder.glob(f"{pod}-*.log")))
