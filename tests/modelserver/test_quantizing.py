"""The command that quantizes: what is installed beside which Python, and what is started there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gateway.modelserver import install, quantizing
from gateway.modelserver.preflight import CannotStart
from tests.modelserver.test_install import at, quiet, stand_in

# A Python with torch whose pip makes the folder after --target, and says so.
WITH_TORCH = """case "$*" in
  *"import sys, torch"*) echo "${TAG:-cpython-311}" ;;
  *"-m pip install"*) echo "$@" >> "$PIP_LOG"; for last; do :; done; mkdir -p "$last" && touch "$last/llmcompressor" ;;
  *) echo "$PYTHONPATH" "$HF_TOKEN" "${PYTHONHOME-none}" "$@" ;;
esac"""


def wanted(folder: Path, dataset: Path | None = None, revision: str | None = None) -> quantizing.Quantizing:
    return quantizing.Quantizing("org/model", folder, dataset, 5, 64, revision)


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIP_LOG", str(tmp_path / "pip.log"))
    return stand_in(tmp_path, WITH_TORCH)


def test_llm_compressor_is_installed_once_beside_a_python(tmp_path: Path, python: Path) -> None:
    cache = install.cache_folder(at(tmp_path))
    (cache / "quantize-older").mkdir(parents=True)
    packages = quantizing.ensure_llm_compressor(at(tmp_path), python, quiet())
    assert quantizing.ensure_llm_compressor(at(tmp_path), python, quiet()) == packages
    assert sorted(entry.name for entry in packages.iterdir()) == ["complete.json", "llmcompressor"]
    assert not (cache / "quantize-older").exists()
    (said,) = (tmp_path / "pip.log").read_text().splitlines()
    assert "--no-deps --require-hashes" in said
    assert said.endswith(
        f"--requirement {Path(quantizing.__file__).parent / 'locks/quantize.lock'} --target {packages}"
    )


def test_another_python_or_an_interrupted_install_is_installed_for(
    tmp_path: Path, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = quantizing.ensure_llm_compressor(at(tmp_path), python, quiet())
    (packages / "complete.json").unlink()
    (packages / "half").touch()
    assert quantizing.ensure_llm_compressor(at(tmp_path), python, quiet()) == packages
    assert not (packages / "half").exists()
    monkeypatch.setenv("TAG", "cpython-312")
    assert quantizing.ensure_llm_compressor(at(tmp_path), python, quiet()) != packages


def test_an_install_that_fails_is_told(tmp_path: Path) -> None:
    python = stand_in(tmp_path, 'case "$*" in *torch*) echo cpython-311 ;; *) echo "ERROR: no space"; exit 1 ;; esac')
    with pytest.raises(CannotStart, match=r"It cannot be installed: no space\. .*quantize\.log"):
        quantizing.ensure_llm_compressor(at(tmp_path), python, quiet())


@pytest.mark.parametrize(
    ("script", "expected"),
    [("exit 1", "has no torch: name the Python of a vLLM with --vllm-python"), (None, "cannot be run: No such file")],
)
def test_a_python_that_will_not_do_is_told(tmp_path: Path, script: str | None, expected: str) -> None:
    python = stand_in(tmp_path, script) if script else tmp_path / "none"
    with pytest.raises(CannotStart, match=expected):
        quantizing.ensure_llm_compressor(at(tmp_path), python, quiet())


def test_what_is_started_has_its_packages_and_nothing_of_our_python(tmp_path: Path) -> None:
    environ = {"PYTHONHOME": "/ours", "PATH": "/bin", "HUGGING_FACE_HUB_TOKEN": "hf_x"}
    python, packages = Path("/its/python"), Path("/packages")
    argv, variables = quantizing.command(wanted(tmp_path / "made"), python, packages, environ)
    script = Path(quantizing.__file__).parent / "scripts/quantize.py"
    assert argv == ["/its/python", "-P", str(script), "org/model", str(tmp_path / "made")]
    assert variables == {
        "PATH": "/bin",
        "PYTHONPATH": "/packages",
        "HUGGING_FACE_HUB_TOKEN": "hf_x",
        "HF_TOKEN": "hf_x",
    }
    argv, _ = quantizing.command(wanted(tmp_path / "made", Path("d.csv"), "v2"), python, packages, environ)
    assert argv[5:] == ["--dataset", "d.csv", "--samples", "5", "--length", "64", "--revision", "v2"]


def quantize(tmp_path: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environ = at(tmp_path) | {"HF_TOKEN": "hf_x"}
    command = [sys.executable, "-m", "gateway", "quantize", *argv]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def test_the_command_becomes_the_program(tmp_path: Path, python: Path) -> None:
    done = quantize(tmp_path, "org/model", str(tmp_path / "made"), "--vllm-python", str(python))
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    packages = quantizing.ensure_llm_compressor(at(tmp_path), python, quiet())
    script = Path(quantizing.__file__).parent / "scripts/quantize.py"
    assert last == f"{packages} hf_x none -P {script} org/model {tmp_path / 'made'}"


def test_what_is_wrong_is_said_before_anything_is_installed(tmp_path: Path, python: Path) -> None:
    done = quantize(tmp_path, "org/model", str(tmp_path), "--vllm-python", str(python))
    assert done.returncode == 1
    assert done.stderr == f"vllm-gateway: {tmp_path} exists already: remove it, or name another folder.\n"
    made, dataset = str(tmp_path / "made"), str(tmp_path / "none.csv")
    done = quantize(tmp_path, "org/model", made, "--dataset", dataset, "--vllm-python", str(python))
    assert done.returncode == 1
    assert done.stderr == f"vllm-gateway: There is no dataset {dataset}.\n"
    assert not (tmp_path / "pip.log").exists()
    assert "--samples" in quantize(tmp_path, "org/model", made, "--samples", "0").stderr


def test_the_lock_has_neither_torch_nor_what_torch_brings() -> None:
    lock = (Path(quantizing.__file__).parent / "locks/quantize.lock").read_text()
    names = {line.partition("==")[0] for line in lock.splitlines() if "==" in line}
    assert "llmcompressor" in names
    assert not {name for name in names if name.startswith(("torch", "triton", "nvidia-cu", "cuda"))}
