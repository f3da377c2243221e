"""The model server's own Python environment, installed once into the user's cache folder."""

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

# Measured: with the CPU build of torch, and with the package index's, which brings CUDA's libraries.
_SIZES = "about 0.5 GB to download and 3 GB on disk; 3 GB and 6 GB where pip finds only CUDA's build of torch"
_CUDA_SIZES = "about 2 GB to download and 3 GB on disk"
_NEEDED, _CUDA_NEEDED = 4 * GIB, 4 * GIB
_STREAMER_SIZES, _STREAMER_NEEDED = "about 25 MB to download and 55 MB on disk", GIB // 4

MARKER = "complete.json"
"""The file that marks what was installed to its end."""

# Threads of torch that spin while they wait take six times as long where another program has a core.
_QUIET = {"OMP_WAIT_POLICY": "passive"}
_TICK = 0.5


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where all that `up` keeps lies: `vllm-gateway` in XDG_CACHE_HOME or ~/.cache."""
    base = Path(environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "vllm-gateway"


def ensure_environment(environ: Mapping[str, str], display: Display | None = None) -> Path:
    """The Python of the model server's environment, which is installed first if there is none.

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
    """Its folder, named after all that decides what is in it: another lock or Python is another environment."""
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
    """One process at a time; another `up` waits here until the first has installed."""
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
    shutil.rmtree(folder, ignore_errors=True)  # an install that was interrupted
    with display.task("Installing vLLM") as update:
        run([sys.executable, "-I", "-m", "venv", str(folder)], "The virtual environment cannot be made")
        # No index may have the CPU build of torch; then the lock's own torch is taken.
        with contextlib.suppress(CannotStart):
            _pip(python, run, _TORCH_LOCK)
        _pip(python, run, _LOCK, update)
        _add_cuda_libraries(folder, python, run, display)
    _complete(folder)


def _add_cuda_libraries(folder: Path, python: Path, run: Runner, display: Display) -> None:
    """The package index's torch for Linux is built with CUDA and loads CUDA's libraries even on the CPU."""
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
    """Put what `lock` names into the folder `packages`, for `python` to find by PYTHONPATH. Raises CannotStart."""
    shutil.rmtree(packages, ignore_errors=True)  # an install that was interrupted
    _pip(python, run, lock, update, "--target", str(packages))
    _complete(packages)


def ensure_streamer(environ: Mapping[str, str], python: Path, display: Display | None = None) -> Path:
    """The folder of what our environment's vLLM reads buckets by, which is installed first. Raises CannotStart."""
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
    # The lock is complete, so no dependency is asked for: neither torch's of CUDA nor the packages it leaves out.
    # Compiling everything takes longer than what vLLM imports of it takes at its first start.
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
    """Reads how far pip is: from its lines while it downloads, from the folder while it installs."""

    def __init__(self, lock: Path, folder: Path, update: Update | None) -> None:
        self._total = len(re.findall(r"^[\w.-]+==", lock.read_text(), re.MULTILINE))
        self._folder = folder
        self._update = update
        self._found = 0
        self._installing = False

    def __call__(self, line: str) -> None:
        """Take a line, or an empty one for the passing of time."""
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
    """Runs programs to their end, what they say into one log, which begins anew."""

    def __init__(self, environ: Mapping[str, str], log: Path) -> None:
        # PYTHONPATH and its like are for our Python, not for the one of the new environment.
        clean = {name: value for name, value in environ.items() if not name.startswith("PYTHON")}
        self._environment = {**_QUIET, **clean, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        self._log = log
        log.unlink(missing_ok=True)

    def __call__(self, argv: Sequence[str], failure: str, watch: Callable[[str], None] | None = None) -> None:
        """Run one, each of its lines shown to `watch`; whatever interrupts us ends it too. Raises CannotStart."""
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
    """The line that says why: pip's own, else the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing."]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors[0] if errors else lines[-1]).removeprefix("ERROR: ").rstrip(".") + "."


def remove_others(kept: Path, pattern: str) -> None:
    """What an older version of us made. A server that still runs from it keeps the files it has open."""
    for other in kept.parent.glob(pattern):
        if other != kept and other.is_dir():
            shutil.rmtree(other, ignore_errors=True)
