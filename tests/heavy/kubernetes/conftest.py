"""Everything that the manifests can be made into, rendered once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.heavy.kubernetes.kustomized import COMPONENTS, OVERLAYS, Object, composed, overlay

# By itself a component changes the gateway, or watches, guards and scales what `vllm` adds.
ALONE = {"keys": (), "tls": (), "vllm": ()}
EVERYTHING = ("vllm", "monitoring", "autoscaling", "network", "keys", "tls")
NAMES = [
    "base",
    *(f"components/{name}" for name in COMPONENTS),
    "everything",
    *(f"overlays/{name}" for name in OVERLAYS),
]


@pytest.fixture(scope="session")
def renderings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Object]]:
    def folder() -> Path:
        return tmp_path_factory.mktemp("kustomization")

    found = {"base": composed(folder()), "everything": composed(folder(), *EVERYTHING)}
    for name in COMPONENTS:
        found[f"components/{name}"] = composed(folder(), *ALONE.get(name, ("vllm",)), name)
    return found | {f"overlays/{name}": list(overlay(name)) for name in OVERLAYS}
