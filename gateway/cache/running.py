"""Records each running `up` of this machine in a file, which is locked as long as that `up` runs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from gateway.modelserver.preflight import CannotStart


class Running(NamedTuple):
    """A running `up`: its process id, the URLs of its gateway and model server, the model's name and the log's path."""

    pid: int
    gateway: str
    upstream: str
    model: str
    log: str


def folder_in(cache: Path) -> Path:
    """The folder of these files."""
    return cache / "up"


@contextlib.contextmanager
def announced(folder: Path, running: Running) -> Iterator[None]:
    """Record `running` in `folder` while the context is open, for this user's other commands. Raises CannotStart."""
    file = folder / f"{running.pid}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_left(folder)
        held = _write(folder / f".{running.pid}", file, running)
    except OSError as error:
        raise CannotStart(
            f"{file} cannot be written ({error.strerror}): name another folder with XDG_CACHE_HOME."
        ) from None
    with held:
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _write(hidden: Path, file: Path, running: Running) -> IO[str]:
    """Write the file and lock it before it gets its name, so that no other process takes it for a leftover."""
    held = os.fdopen(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8")
    fcntl.flock(held, fcntl.LOCK_EX)
    json.dump(running._asdict(), held)
    held.flush()
    hidden.rename(file)
    return held


def _remove_left(folder: Path) -> None:
    """Remove the files that a kill -9 left."""
    for file in folder.glob("*.json"):
        with contextlib.suppress(OSError), file.open("rb") as opened:
            if not _is_held(opened):
                file.unlink()


def found(folder: Path) -> list[Running]:
    """Each `up` that runs now, sorted by process id."""
    running = []
    for file in folder.glob("*.json"):
        # Skip a file that was removed meanwhile, or that another version of ours wrote.
        with contextlib.suppress(OSError, ValueError, TypeError), file.open("rb") as opened:
            if _is_held(opened):
                running.append(Running(**json.load(opened)))
    return sorted(running)


def _is_held(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
