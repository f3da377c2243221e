"""The demo model: built once by the model server's Python, and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from gateway.modelserver.install import Runner, alone, cache_folder, ensure_environment, make_folder, remove_others
from gateway.modelserver.preflight import CannotStart
from gateway.progress import Display

_DEMO_SCRIPT = Path(__file__).with_name("scripts") / "demo_model.py"


_STAMP = "demo-model.json"


def ensure_demo_model(environ: Mapping[str, str], python: Path | None = None, display: Display | None = None) -> Path:
    """The demo model's folder; `python`, the model server's, first builds the model if this recipe has none yet.

    Raises CannotStart.
    """
    cache, display = cache_folder(environ), display or Display()
    folder = cache / f"demo-model-{hashlib.sha256(_DEMO_SCRIPT.read_bytes()).hexdigest()[:16]}"
    make_folder(cache)
    with alone(cache / "demo-model.lock", display):
        if not (folder / _STAMP).is_file():
            python = python or ensure_environment(environ, display)
            shutil.rmtree(folder, ignore_errors=True)  # an incomplete model
            _build_demo_model(folder, python, Runner(environ, cache / "demo-model.log"), display)
            remove_others(folder, "demo-model-*")
    return folder


def write_demo_model(
    folder: Path, environ: Mapping[str, str], *, python: Path | None = None, display: Display | None = None
) -> None:
    """Put a copy of the demo model at `folder`, readable by all. Raises CannotStart."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CannotStart(f"{folder} exists and is not an empty folder: name a new one.")
    source = ensure_demo_model(environ, python, display)
    try:
        # copytree() also copies the modes, which let everybody read.
        shutil.copytree(source, folder, dirs_exist_ok=True)
    except OSError as error:
        raise CannotStart(f"The demo model cannot be written to {folder}: {error.strerror or error}.") from None


def _build_demo_model(folder: Path, python: Path, run: Runner, display: Display) -> None:
    display.say("Building the demo model, once: 3 MB on disk, one to two minutes on two cores.")
    with display.task("Building the demo model") as update:

        def watch(line: str) -> None:
            found = re.match(r"step (\d+) of (\d+) (.*)", line)
            if found:
                update(int(found[1]) / int(found[2]), found[3])

        # -P: the script's folder has modules whose names other packages use too.
        argv = [str(python), "-P", str(_DEMO_SCRIPT), str(folder)]
        run(argv, "The demo model cannot be built", watch)
