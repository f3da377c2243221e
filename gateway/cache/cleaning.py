"""Lists and removes the files that `up`, `quantize` and the benchmark keep in the user's cache folder."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gateway.cache.running import folder_in, found

# Our files and folders in the cache folder, by patterns of their names. Any other entry is not ours, and stays.
_KEPT = {
    "env-*": "vLLM for the CPU, installed by `up`",
    "quantize-*": "llm-compressor, installed by `quantize`",
    "streamer-*": "what reads a model from a bucket, installed by `up`",
    "models": "models that `up` unpacked of tarballs",
    "demo-model-*": "the demo model, built by `up`",
    "bench": "the benchmark's peers",
    "logs": "vLLM's logs",
    "up": "which `up` runs on this machine",
    "*.log": "logs of the installation",
    "*.lock": "locks of the installation",
}
_LOCKS = "*.lock"
_UNIT = 1000


class CannotClean(Exception):
    """Nothing, or not everything, was removed; the text is a sentence that says why."""


class Entry(NamedTuple):
    """A file or folder of the cache: its size on disk in bytes, and what it is."""

    path: Path
    size: int
    what: str


def entries(cache: Path) -> list[Entry]:
    """Our entries of the cache folder, the largest first; empty if there is no such folder."""
    paths = {path: what for pattern, what in _KEPT.items() for path in cache.glob(pattern)}
    return sorted((Entry(path, _size(path), what) for path, what in paths.items()), key=lambda entry: -entry.size)


def lines(listed: list[Entry]) -> list[str]:
    """One line per entry with its size and name, and one line with the sum."""
    rows = [(_shown(entry.size), f"{entry.path.name}  {entry.what}") for entry in listed]
    return [f"{size:>9}  {what}" for size, what in [*rows, (_shown(sum(entry.size for entry in listed)), "in all")]]


def remove(cache: Path, listed: list[Entry]) -> None:
    """Remove the entries, and the folder if nothing else is in it.

    Raises CannotClean; nothing is removed if `up` runs or another command is installing.
    """
    for running in found(folder_in(cache)):
        raise CannotClean(f"`up` runs here as process {running.pid}, on {running.gateway}: stop it first.")
    with _nothing_is_installed(cache):
        for entry in listed:
            try:
                if _is_folder(entry.path):
                    shutil.rmtree(entry.path)
                else:
                    entry.path.unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise CannotClean(f"{error.filename} cannot be removed ({error.strerror}).") from None
    with contextlib.suppress(OSError):
        cache.rmdir()


@contextlib.contextmanager
def _nothing_is_installed(cache: Path) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        for lock in cache.glob(_LOCKS):
            file = held.enter_context(lock.open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CannotClean(
                    f"Another vllm-gateway is installing ({lock} is locked): wait until it has."
                ) from None
        yield


def _is_folder(path: Path) -> bool:
    """Whether the path is a folder; a link to a folder is not, so only the link is removed."""
    return path.is_dir() and not path.is_symlink()


def _size(path: Path) -> int:
    """Bytes on disk of a file, or of all files in a folder. A file with two names counts once."""
    seen: dict[tuple[int, int], int] = {}
    for file in path.rglob("*") if _is_folder(path) else [path]:
        with contextlib.suppress(OSError):
            state = file.lstat()
            seen[state.st_dev, state.st_ino] = state.st_blocks * 512
    return sum(seen.values())


def _shown(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < _UNIT:
            return f"{size:.0f} {unit}"
        size /= _UNIT
    return f"{size:.1f} GB"
