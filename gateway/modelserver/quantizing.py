"""Makes an FP8 checkpoint with llm-compressor, which is installed beside the torch of the model server's Python."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gateway.modelserver import install, preflight, vllm_args
from gateway.modelserver.preflight import GIB, CannotStart
from gateway.progress import Display

_LOCK = Path(__file__).with_name("locks") / "quantize.lock"
_SCRIPT = Path(__file__).with_name("scripts") / "quantize.py"
_SIZE = "about 120 MB to download and 450 MB on disk"
_NEEDED = GIB


class Quantizing(NamedTuple):
    """The options: the model, the folder of the checkpoint, and the calibration data."""

    model: str
    folder: Path
    dataset: Path | None
    samples: int
    length: int
    revision: str | None


def ensure_llm_compressor(environ: Mapping[str, str], python: Path, display: Display | None = None) -> Path:
    """The folder of llm-compressor and its dependencies without torch; installs it if it is missing.

    Raises CannotStart.
    """
    cache, display = install.cache_folder(environ), display or Display()
    kind = hashlib.sha256(_LOCK.read_bytes() + _tag(python).encode()).hexdigest()[:16]
    folder = cache / f"quantize-{kind}"
    install.make_folder(cache)
    with install.alone(cache / "quantize.lock", display):
        if not (folder / install.MARKER).is_file():
            preflight.check_disk(shutil.disk_usage(cache).free, _NEEDED, cache)
            display.say(f"Installing llm-compressor, once: {_SIZE}.")
            run = install.Runner(environ, cache / "quantize.log")
            with display.task("Installing llm-compressor") as update:
                install.install_beside(folder, python, run, _LOCK, update)
            install.remove_others(folder, "quantize-*")
    return folder


def _tag(python: Path) -> str:
    """The cache tag of this Python, which names its packages. Raises CannotStart if it cannot run or has no torch."""
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
    """The command line and the whole environment of the program that makes the checkpoint."""
    argv = [str(python), "-P", str(_SCRIPT), wanted.model, str(wanted.folder)]
    if wanted.dataset is not None:
        argv += ["--dataset", str(wanted.dataset), "--samples", str(wanted.samples), "--length", str(wanted.length)]
    if wanted.revision is not None:
        argv += ["--revision", wanted.revision]
    # PYTHONPATH and the other PYTHON variables are for our Python, not for the model server's.
    clean = {
        name: value for name, value in vllm_args.vllm_environment(environ).items() if not name.startswith("PYTHON")
    }
    return argv, clean | {"PYTHONPATH": str(packages)}


def quantize(wanted: Quantizing, environ: Mapping[str, str], python: Path | None = None) -> None:
    """Become the program that makes the checkpoint. Raises CannotStart."""
    if wanted.folder.exists():
        raise CannotStart(f"{wanted.folder} exists already: remove it, or name another folder.")
    if wanted.dataset is not None and not wanted.dataset.is_file():
        raise CannotStart(f"There is no dataset {wanted.dataset}.")
    python = python or install.ensure_environment(environ)
    packages = ensure_llm_compressor(environ, python)
    argv, variables = command(wanted, python, packages, environ)
    sys.stdout.flush()
    os.execve(argv[0], argv, variables)
