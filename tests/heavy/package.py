"""The packages that a release has: built without a warning, and installed where nothing else of this repository is.

Not among the tests that `make test` finds; `make test-package` runs it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import httpx
import pytest

from bench.arms import environment
from tests.support.fake_vllm import FakeVllm
from tests.support.paths import ROOT
from tests.support.ports import free_port

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]
# Of the room's own tests those that ask for no process of the gateway's, and no machine's file.
UNIT_TESTS = ("admission", "dialects", "pool", "relay", "wire")


def run(command: Sequence[str | Path], folder: Path, **environ: str) -> str:
    """Both outputs; fails with them."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def tools() -> Path:
    """The folder of an environment's programs: build, pipx, and what the package is built with."""
    return environment("package", ROOT / "requirements" / "package.lock", sys.executable)


class Built(NamedTuple):
    """What a build made, and what it said."""

    wheel: Path
    source: Path
    said: str


@pytest.fixture(scope="session")
def built(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """From the files that are committed, or would be."""
    folder, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("made")
    listed = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in run(listed, ROOT).rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    said = run([tools / "python", "-m", "build", "--no-isolation", "--outdir", made], folder)
    wheel, source = made / f"vllm_gateway-{VERSION}-py3-none-any.whl", made / f"vllm_gateway-{VERSION}.tar.gz"
    assert sorted(made.iterdir()) == [wheel, source]
    return Built(wheel, source, said)


@pytest.fixture(scope="session")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command, in an environment that has the wheel and what is locked."""
    folder = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "venv", folder], folder)
    pip: list[str | Path] = [
        folder / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
    ]
    run([*pip, "--require-hashes", "-r", ROOT / "requirements" / "image.lock"], folder)
    run([*pip, built.wheel], folder)
    return folder / "bin" / "vllm-gateway"


def test_a_build_warns_of_nothing(built: Built) -> None:
    warnings = [line for line in built.said.splitlines() if re.search("warn|deprecat", line, re.IGNORECASE)]
    # Where the environment says so (PYTHONDONTWRITEBYTECODE), and no fault.
    assert [line for line in warnings if "byte-compiling is disabled" not in line] == []


def test_the_wheel_says_what_it_is(built: Built) -> None:
    with ZipFile(built.wheel) as archive:
        names = archive.namelist()
        told = archive.read(f"vllm_gateway-{VERSION}.dist-info/METADATA").decode()
    assert {name.partition("/")[0] for name in names} == {"gateway", f"vllm_gateway-{VERSION}.dist-info"}
    for line in ("License-Expression: Apache-2.0", "Requires-Python: >=3.11", "Classifier: Typing :: Typed"):
        assert f"\n{line}\n" in told
    for python in re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"])):
        assert python in (ROOT / "RELEASING.md").read_text()


def test_the_source_distribution_passes_its_own_tests_and_holds_no_secret(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.source) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    assert not [file for file in folder.glob("docker/*/files/*") if file.name != ".gitignore"]
    assert "passed" in run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{room}" for room in UNIT_TESTS)],
        folder,
    )
    where = run([sys.executable, "-c", "import gateway; print(gateway.__file__)"], folder)
    assert where.startswith(str(folder))


def test_what_is_installed_serves(installed: Path, fake: FakeVllm, tmp_path: Path) -> None:
    assert run([installed, "--version"], tmp_path) == f"vllm-gateway, version {VERSION}\n"
    port = free_port()
    options = ["serve", "--upstream", fake.url, "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen([installed, *options], cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 60
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
                while True:
                    try:
                        if client.get("/v1/health_check").status_code == 200:
                            break
                    except httpx.TransportError:
                        assert process.poll() is None
                    assert time.monotonic() < until
                    time.sleep(0.1)
                answer = client.post("/v1/chat/completions", json={"messages": {"user": "Hi"}, "streaming": False})
                assert answer.json()["text"]
                assert client.get("/").status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 0


def test_pipx_runs_the_wheel(tools: Path, built: Built, tmp_path: Path) -> None:
    command: list[str | Path] = [tools / "pipx", "run", "--spec", built.wheel, "vllm-gateway", "--version"]
    own = {
        "PIPX_HOME": str(tmp_path / "home"),
        "PIPX_BIN_DIR": str(tmp_path / "bin"),
        "PIPX_DEFAULT_PYTHON": sys.executable,
    }
    assert f"vllm-gateway, version {VERSION}" in run(command, tmp_path, **own)
