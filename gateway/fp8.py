"""The command that makes an FP8 checkpoint: llm-compressor, kept beside the torch of the model server's Python."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gateway import environment, preflight, vllmargs
from gateway.preflight import GIB, CannotStart
from gateway.progress import Display

_HERE = Path(__file__).parent
_LOCK = _HERE / "quantize.lock"
_SCRIPT = _HERE / "quantize.py"
_SIZE = "about 120 MB to download and 450 MB on disk"
_NEEDED = GIB


class Quantizing(NamedTuple):
    """What is to be made: of which model, where, and with which data."""

    model: str
    folder: Path
    dataset: Path | None
    samples: int
    length: int
    revision: str | None


def ensure_llm_compressor(environ: Mapping[str, str], python: Path, display: Display | None = None) -> Path:
    """The folder of llm-compressor and what it needs but for torch, installed first. Raises CannotStart."""
    cache, display = environment.cache_folder(environ), display or Display()
    kind = hashlib.sha256(_LOCK.read_bytes() + _tag(python).encode()).hexdigest()[:16]
    folder = cache / f"quantize-{kind}"
    environment.make_folder(cache)
    with environment.alone(cache / "quantize.lock", display):
        if not (folder / environment.MARKER).is_file():
            preflight.check_disk(shutil.disk_usage(cache).free, _NEEDED, cache)
            display.say(f"Installing llm-compressor, once: {_SIZE}.")
            run = environment.Runner(environ, cache / "quantize.log")
            with display.task("Installing llm-compressor") as update:
                environment.install_beside(folder, python, run, _LOCK, update)
            environment.remove_others(folder, "quantize-*")
    return folder


def _tag(python: Path) -> str:
    """What packages for this Python go by. Raises CannotStart if it is none, or has no torch."""
    program = "import sys, torch; print(sys.implementation.cache_tag)"
    try:
        done = subprocess.run([str(python), "-I", "-c", program], capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotStart(f"{python} cannot be run: {error.strerror}.") from None
    if done.returncode:
        raise CannotStart(f"{python} has no torch: name the Python of a vLLM with --vllm-python.")
    return done.stdout.strip()


def command(
    wanted: Quantizing, python: Path, packages: Path, environ: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The program and the whole environment that make it so."""
    argv = [str(python), "-P", str(_SCRIPT), wanted.model, str(wanted.folder)]
    if wanted.dataset is not None:
        argv += ["--dataset", str(wanted.dataset), "--samples", str(wanted.samples), "--length", str(wanted.length)]
    if wanted.revision is not None:
        argv += ["--revision", wanted.revision]
    # PYTHONPATH and its like are for our Python, not for that one.
    clean = {name: value for name, value in vllmargs.environment(environ).items() if not name.startswith("PYTHON")}
    return argv, clean | {"PYTHONPATH": str(packages)}


def quantize(wanted: Quantizing, environ: Mapping[str, str], python: Path | None = None) -> None:
    """Become the program that makes the checkpoint. Raises CannotStart."""
    if wanted.folder.exists():
        raise CannotStart(f"{wanted.folder} exists already: remove it, or name another folder.")
    if wanted.dataset is not None and not wanted.dataset.is_file():
        raise CannotStart(f"There is no dataset {wanted.dataset}.")
    python = python or environment.ensure_environment(environ)
    packages = ensure_llm_compressor(environ, python)
    argv, variables = command(wanted, python, packages, environ)
    sys.stdout.flush()
    os.execve(argv[0], argv, variables)
