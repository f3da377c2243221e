"""Installs the model server's own Python environment, once, into the user's cache folder."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import json
import platform
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from gateway.modelserver import preflight
from gateway.modelserver.child_process import Child, last_lines
from gateway.modelserver.preflight import GIB, CannotStart
from gateway.progress import Display, Update

_LOCKS = Path(__file__).with_name("locks")
_TORCH_LOCK = _LOCKS / "modelserver-torch-cpu.lock"
_LOCK = _LOCKS / "modelserver-cpu.lock"
_CUDA_LOCK = _LOCKS / "modelserver-cpu-cuda-libs.lock"
_STREAMER_LOCK = _LOCKS / "streamer.lock"

# Measured, with the CPU build of torch and with the package index's build, which adds CUDA's libraries.
_SIZES = "about 0.5 GB to download and 3 GB on disk; 3 GB and 6 GB where pip finds only CUDA's build of torch"
_CUDA_SIZES = "about 2 GB to download and 3 GB on disk"
_NEEDED, _CUDA_NEEDED = 4 * GIB, 4 * GIB
_STREAMER_SIZES, _STREAMER_NEEDED = "about 25 MB to download and 55 MB on disk", GIB // 4

MARKER = "complete.json"
"""The file that marks a complete installation."""

# If another program uses a core, torch with threads that spin while they wait takes six times as long.
_QUIET = {"OMP_WAIT_POLICY": "passive"}
_TICK = 0.5


def cache_folder(environ: Mapping[str, str]) -> Path:
    """The folder of all that `up` keeps: `vllm-gateway` in XDG_CACHE_HOME or ~/.cache."""
    base = Path(environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "vllm-gateway"


def ensure_environment(environ: Mapping[str, str], display: Display | None = None) -> Path:
    """The Python of the model server's environment, which is installed first if it is missing.

    Raises CannotStart.
    """
    cache, display = cache_folder(environ), display or Display()
    folder = environment_folder(cache)
    python = folder / "bin" / "python"
    make_folder(cache)
    with alone(cache / "install.lock", display):
        if not (folder / MARKER).is_file() or not python.exists():
            _check_can_install(cache)
            _install(folder, python, Runner(environ, cache / "install.log"), display)
            remove_others(folder, "env-*")
    return python


def environment_folder(cache: Path) -> Path:
    """The environment's folder, named by a hash of its locks, Python and machine type: any change makes a new one."""
    found = hashlib.sha256(f"{sys.implementation.cache_tag} {platform.machine()}".encode())
    for lock in (_TORCH_LOCK, _LOCK, _CUDA_LOCK):
        found.update(lock.read_bytes())
    return cache / f"env-{found.hexdigest()[:16]}"


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotStart(
            f"The cache folder {folder} cannot be made ({error.strerror}): name another with XDG_CACHE_HOME."
        ) from None


@contextlib.contextmanager
def alone(lock: Path, display: Display) -> Iterator[None]:
    """Hold the lock: a second `up` waits here until the first has installed."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            display.say("Waiting for another vllm-gateway that is installing …")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_can_install(cache: Path) -> None:
    machine = platform.machine()
    preflight.check_python(sys.version_info[:3])
    preflight.check_venv(importlib.util.find_spec("ensurepip") is not None)
    preflight.check_wheel(platform.system(), machine, platform.libc_ver())
    preflight.check_cpu(machine, Path("/proc/cpuinfo").read_text())
    preflight.check_libraries(ctypes.CDLL)
    preflight.check_disk(shutil.disk_usage(cache).free, _NEEDED, cache)


def _install(folder: Path, python: Path, run: Runner, display: Display) -> None:
    display.say(f"Installing the model server, vLLM for the CPU, once: {_SIZES}.")
    shutil.rmtree(folder, ignore_errors=True)  # the rest of an interrupted installation
    with display.task("Installing vLLM") as update:
        run([sys.executable, "-I", "-m", "venv", str(folder)], "The virtual environment cannot be made")
        # The CPU build of torch may be in no index; then the torch of the main lock is installed.
        with contextlib.suppress(CannotStart):
            _pip(python, run, _TORCH_LOCK)
        _pip(python, run, _LOCK, update)
        _add_cuda_libraries(folder, python, run, display)
    _complete(folder)


def _add_cuda_libraries(folder: Path, python: Path, run: Runner, display: Display) -> None:
    """Install CUDA's libraries if torch needs them.

    The package index's torch for Linux is built with CUDA and loads CUDA's libraries even on the CPU.
    """
    check = [str(python), "-I", "-c", "import torch"]
    try:
        run(check, "torch cannot be imported")
    except CannotStart as error:
        if not re.search(r"lib\w+\.so[.\d]*: cannot open shared object", str(error)):
            raise
        display.say(f"This torch is built with CUDA and loads its libraries even on the CPU: {_CUDA_SIZES}.")
        preflight.check_disk(shutil.disk_usage(folder).free, _CUDA_NEEDED, folder)
        _pip(python, run, _CUDA_LOCK)
        run(check, "torch cannot be imported")


def install_beside(packages: Path, python: Path, run: Runner, lock: Path, update: Update) -> None:
    """Install the lock's packages into the folder `packages`, which goes into PYTHONPATH. Raises CannotStart."""
    shutil.rmtree(packages, ignore_errors=True)  # the rest of an interrupted installation
    _pip(python, run, lock, update, "--target", str(packages))
    _complete(packages)


def ensure_streamer(environ: Mapping[str, str], python: Path, display: Display | None = None) -> Path:
    """The folder of the streamer, by which our environment's vLLM reads buckets; installs it if it is missing.

    Raises CannotStart.
    """
    cache, display = cache_folder(environ), display or Display()
    folder = cache / f"streamer-{hashlib.sha256(_STREAMER_LOCK.read_bytes()).hexdigest()[:16]}-{python.parents[1].name}"
    make_folder(cache)
    with alone(cache / "streamer.lock", display):
        if not (folder / MARKER).is_file():
            preflight.check_disk(shutil.disk_usage(cache).free, _STREAMER_NEEDED, cache)
            display.say(f"Installing Run:ai's Model Streamer, which reads models in buckets, once: {_STREAMER_SIZES}.")
            with display.task("Installing the streamer") as update:
                install_beside(folder, python, Runner(environ, cache / "streamer.log"), _STREAMER_LOCK, update)
            remove_others(folder, "streamer-*")
    return folder


def _complete(folder: Path) -> None:
    (folder / MARKER).write_text(json.dumps({"python": platform.python_version()}) + "\n", encoding="utf-8")


def _pip(python: Path, run: Runner, lock: Path, update: Update | None = None, *options: str) -> None:
    # --no-deps: the lock is complete, and leaves out torch's CUDA libraries and other packages on purpose.
    # --no-compile: compiling everything takes longer than compiling at the first start what vLLM imports.
    argv = [str(python), "-I", "-m", "pip", "install", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    argv += [
        "--no-compile",
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar",
        "off",
        "--requirement",
        str(lock),
    ]
    argv += options
    run(argv, "It cannot be installed", _PipProgress(lock, python.parent.parent, update))


class _PipProgress:
    """Tracks the progress of pip: by its lines during the download, by the folder during the installation."""

    def __init__(self, lock: Path, folder: Path, update: Update | None) -> None:
        self._total = len(re.findall(r"^[\w.-]+==", lock.read_text(), re.MULTILINE))
        self._folder = folder
        self._update = update
        self._found = 0
        self._installing = False

    def __call__(self, line: str) -> None:
        """Handle a line of pip; an empty line stands for a tick without output."""
        note = ""
        if line.startswith("Ignoring "):
            self._total -= 1
        elif line.startswith(("Collecting ", "Requirement already satisfied")):
            self._found += 1
        elif line.startswith("  Downloading "):
            note = line.strip()
        elif line.startswith("Installing collected packages"):
            self._installing = True
        elif line:
            return
        if self._update:
            self._update(self._share(), note)

    def _share(self) -> float:
        if not self._installing:
            return min(0.5, 0.5 * self._found / self._total)
        installed = sum(1 for _ in self._folder.glob("lib/python*/site-packages/*.dist-info"))
        return min(1.0, 0.5 + 0.5 * installed / self._total)


class Runner:
    """Runs programs to their end, and writes their output to one new log."""

    def __init__(self, environ: Mapping[str, str], log: Path) -> None:
        # PYTHONPATH and the other PYTHON variables are for our Python, not for the Python of the new environment.
        clean = {name: value for name, value in environ.items() if not name.startswith("PYTHON")}
        self._environment = {**_QUIET, **clean, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        self._log = log
        log.unlink(missing_ok=True)

    def __call__(self, argv: Sequence[str], failure: str, watch: Callable[[str], None] | None = None) -> None:
        """Run one program and pass each of its lines to `watch`. Any exception here ends it. Raises CannotStart."""
        child = Child(argv, self._environment, piped=True, grace=0)
        with child, self._log.open("a", encoding="utf-8", buffering=1) as file:
            for line in child.lines(_TICK):
                if line:
                    file.write(line + "\n")
                if watch:
                    watch(line)
            code = child.wait()
        if code < 0:
            raise CannotStart(f"{failure}: it was ended by {signal.Signals(-code).name}; start again.")
        if code:
            raise CannotStart(f"{failure}: {_reason(last_lines(self._log, 30))} All that was said is in {self._log}.")


def _reason(output: str) -> str:
    """The line that explains a failure: pip's first error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing."]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors[0] if errors else lines[-1]).removeprefix("ERROR: ").rstrip(".") + "."


def remove_others(kept: Path, pattern: str) -> None:
    """Remove the folders of older versions. A server that still runs from such a folder keeps its open files."""
    for other in kept.parent.glob(pattern):
        if other != kept and other.is_dir():
            shutil.rmtree(other, ignore_errors=True)
