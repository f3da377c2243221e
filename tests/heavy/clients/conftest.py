"""The clients' own environment, and a stack whose vLLM stores responses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.arms import environment
from tests.support.paths import ROOT
from tests.support.stack import Stack, started

EXAMPLES = ROOT / "examples"
SCRIPTS = Path(__file__).parent / "scripts"


class Clients:
    """The Python that has the clients, and programs run by it."""

    def __init__(self, python: Path, home: Path) -> None:
        self.python = python
        # Nothing of the machine's own: no proxy, key or file of settings may reach a client.
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }

    def start(self, *argv: str | Path, **variables: str) -> subprocess.Popen[str]:
        """A program, with pipes to all of it."""
        return subprocess.Popen(
            [str(part) for part in argv],
            env=self.environment | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *argv: str | Path, told: str = "", **variables: str) -> str:
        """What a program prints that must end well."""
        with self.start(*argv, **variables) as process:
            try:
                printed, complained = process.communicate(told, timeout=120)
            finally:
                process.kill()
        assert process.returncode == 0, f"{printed}\n{complained}"
        return printed


@pytest.fixture(scope="session")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Clients:
    python = environment("clients", EXAMPLES / "requirements.lock", sys.executable) / "python"
    return Clients(python, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    with started(VLLM_ENABLE_RESPONSES_API_STORE="1") as everything:
        yield everything


@pytest.fixture(params=["shortcut", "app"])
def url(request: pytest.FixtureRequest, stack: Stack) -> str:
    """The gateway, by each way in."""
    return stack.gateway_url if request.param == "shortcut" else stack.early.url
