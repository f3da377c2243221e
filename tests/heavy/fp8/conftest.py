"""The Python and the packages that make FP8, installed once."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from gateway.modelserver import demo_model, install, quantizing
from tests.support.paths import ROOT

SCRIPTS = ROOT / "gateway/modelserver/scripts"
DATASETS = Path(__file__).parent.parent / "datasets"


class Kit(NamedTuple):
    """A Python with torch, the folder of llm-compressor beside it, and the demo model."""

    python: Path
    packages: Path
    model: Path

    def run(self, *argv: str | Path) -> subprocess.CompletedProcess[str]:
        """With nothing but what it needs of the environment."""
        variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(self.packages), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [str(self.python), "-P", *map(str, argv)], env=variables, capture_output=True, text=True, check=False
        )

    def read(self, dataset: Path, folder: Path, samples: int = 10) -> tuple[str, set[tuple[str, str]]]:
        """What dataset.py says, and the rows that it writes."""
        target = folder / "text.jsonl"
        done = self.run(SCRIPTS / "dataset.py", dataset, target, "--samples", str(samples))
        if done.returncode:
            assert not target.exists()
            return done.stderr, set()
        rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
        return done.stdout, {(row["question"], row["system_prompt"]) for row in rows}


@pytest.fixture(scope="session")
def kit() -> Kit:
    python = install.ensure_environment(os.environ)
    packages = quantizing.ensure_llm_compressor(os.environ, python)
    return Kit(python, packages, demo_model.ensure_demo_model(os.environ, python))
