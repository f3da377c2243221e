"""The template's inner specification is KServe's, as its own SDK has it.

Not among the tests that `make test` finds; `make test-models` runs it.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.arms import environment
from tests.models.test_serving_template import filled, rendered

LOCK = Path(__file__).parent / "kserve.lock"
SCRIPT = Path(__file__).parent / "scripts" / "inference_service.py"


def problems(*services: dict[str, Any]) -> list[str]:
    python = environment("kserve", LOCK, sys.executable) / "python"
    done = subprocess.run(
        [python, SCRIPT], input=json.dumps(services), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_the_platform_makes_of_it_is_an_inference_service() -> None:
    assert problems(filled(rendered()), filled(rendered(artifact="textmodel"), portNumber="8080", gpu="4")) == []


def test_what_is_misspelt_or_of_another_kind_is_found() -> None:
    good = filled(rendered())
    misspelt, text, port = (copy.deepcopy(good) for _ in range(3))
    misspelt["spec"]["predictor"]["minReplica"] = misspelt["spec"]["predictor"].pop("minReplicas")
    text["spec"]["predictor"]["maxReplicas"] = "1"
    port["spec"]["predictor"]["containers"][0]["ports"][0]["containerPorts"] = 9000
    found = [line for one in (misspelt, text, port) for line in problems(one)]
    assert any("minReplica" in line for line in found)
    assert any("maxReplicas" in line for line in found)
    assert any("containerPorts" in line for line in found)
