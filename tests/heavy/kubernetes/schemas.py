"""Every rendered object is one by the schemas of the newest three Kubernetes, of KEDA, Prometheus's operator and LWS.

Not among the tests that `make test` finds; `make test-kubernetes` runs it.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

from bench.arms import environment
from tests.heavy.kubernetes.conftest import NAMES
from tests.heavy.kubernetes.kustomized import Object, named

LOCK = Path(__file__).parent / "schemas.lock"
SCRIPT = Path(__file__).parent / "scripts" / "schemas.py"


def problems(renderings: dict[str, list[Object]]) -> list[str]:
    python = environment("kubernetes-schemas", LOCK, sys.executable) / "python"
    done = subprocess.run(
        [python, SCRIPT], input=json.dumps(renderings), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    versions, *found = done.stdout.splitlines()
    assert len(re.findall(r"\b1\.\d+\b", versions)) == 3
    return found


def test_every_object_is_what_its_schema_says(renderings: dict[str, list[Object]]) -> None:
    assert renderings.keys() == set(NAMES)
    kinds = {one["kind"] for objects in renderings.values() for one in objects}
    assert kinds == {
        "ConfigMap",
        "Deployment",
        "LeaderWorkerSet",
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "PodDisruptionBudget",
        "PrometheusRule",
        "ScaledObject",
        "Service",
        "ServiceMonitor",
    }
    assert problems(renderings) == []


def test_what_is_misspelt_is_found(renderings: dict[str, list[Object]]) -> None:
    everything, group = (copy.deepcopy(renderings[name]) for name in ("everything", "overlays/multi-node"))
    pod = named(everything, "Deployment", "vllm-gateway")["spec"]["template"]["spec"]
    pod["containers"][0]["startupProbez"] = pod["containers"][0].pop("startupProbe")
    named(everything, "ScaledObject", "model-server")["spec"]["triggers"][0]["metadatas"] = {}
    named(everything, "ServiceMonitor", "vllm-gateway")["spec"]["endpoints"][0]["ports"] = "metrics"
    named(everything, "PrometheusRule", "vllm-gateway")["spec"]["groups"][0]["rules"][0]["fors"] = "1m"
    lws = named(group, "LeaderWorkerSet", "model-server")["spec"]["leaderWorkerTemplate"]
    lws["sizes"] = lws.pop("size")
    lws["workerTemplate"]["spec"]["containers"][0]["envs"] = []
    found = "\n".join(problems({"everything": everything, "group": group}))
    for misspelt in ("startupProbez", "metadatas", "'ports'", "'fors'", "'sizes'", "'envs'"):
        assert misspelt in found, misspelt
