"""Downloads a model's files from a hub: finds the missing ones, checks the disk, and fetches several at once."""

from __future__ import annotations

import contextlib
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub.utils import WeakFileLock

from gateway.models import ModelError, shown
from gateway.models.fetching import Fetcher
from gateway.models.hub import Hub, Snapshot
from gateway.models.places import CONFIG, Place
from gateway.models.selection import RemoteFile

_TICK = 0.2

Watch = Callable[[int, int], None]
"""Called a few times a second with the bytes on the disk and the total bytes."""


class Plan(NamedTuple):
    """The files of a download: all of them, and the missing ones."""

    model: str
    commit: str
    files: list[RemoteFile]
    missing: list[RemoteFile]
    place: Place

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def plan(model: str, snapshot: Snapshot, files: Sequence[RemoteFile], place: Place, watch: Watch) -> Plan:
    """Find the missing files; hashes each existing file and reports the progress to `watch`. Raises ModelError."""
    total, looked, missing = sum(file.size for file in files), 0, []
    for file in files:
        try:
            if not place.has(file):
                missing.append(file)
            elif file.size:
                watch(looked + file.size, total)
        except OSError as error:
            raise ModelError(f"{place.target(file)} cannot be read: {error.strerror or error}.") from None
        looked += file.size
    return Plan(model, snapshot.commit, list(files), missing, place)


def needed(found: Plan) -> int:
    """Free bytes that the disk must have for the missing files."""
    # Two names with the same content are one file in the cache, which is fetched once.
    sizes = {found.place.target(file): file.size - _there(found.place.partial(file)) for file in found.missing}
    return sum(max(0, size) for size in sizes.values())


def _there(partial: Path) -> int:
    return partial.stat().st_size if partial.exists() else 0


def check_disk(wants: Sequence[tuple[Path, int]]) -> None:
    """Check that each folder's disk has that many bytes free; folders on one disk are summed. Raises ModelError."""
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in wants:
        there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        device = there.stat().st_dev
        disks[device] = (folder, size + disks.get(device, (folder, 0))[1])
    for folder, size in disks.values():
        there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        free = shutil.disk_usage(there).free
        if size > free:
            raise ModelError(
                f"{shown(size)} are needed on the disk of {folder}, but {shown(free)} are free: make room, or choose "
                "another disk (HF_HUB_CACHE, --local-dir)."
            )


def fetch(hub: Hub, found: Plan, workers: int, watch: Watch) -> None:
    """Fetch the missing files, and complete the place. Raises ModelError for the first file that fails.

    The threads are daemons, so that a program that is stopped while a hub is silent ends at once. The received bytes
    are on the disk.
    """
    with _writing(found.place):
        if found.missing:
            found.place.begin(found.files)
    total, stop, lock = found.size, threading.Event(), threading.Lock()
    there = total - sum(file.size for file in found.missing)

    def moved(size: int) -> None:
        nonlocal there
        with lock:
            there += size

    fetcher = Fetcher(hub, found.model, found.commit, moved, stop)
    waiting: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    # The largest first, because at the end only one thread is still busy with the last file.
    for file in sorted(found.missing, key=lambda file: -file.size):
        waiting.put(file)

    def work() -> None:
        while not stop.is_set():
            try:
                file = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                _fetch_one(fetcher, file, found.place, moved)
            except BaseException as error:
                ended.put(error)
                return
            ended.put(None)

    for _ in range(min(workers, len(found.missing))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in found.missing:
            _await(ended, lambda: watch(there, total))
    finally:
        stop.set()
    with _writing(found.place):
        found.place.complete(found.files)
    watch(total, total)


@contextlib.contextmanager
def _writing(place: Place) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"{place.folder} cannot be written: {error.strerror or error}.") from None


def _await(ended: queue.SimpleQueue[BaseException | None], tell: Callable[[], None]) -> None:
    while True:
        tell()
        try:
            error = ended.get(timeout=_TICK)
        except queue.Empty:
            continue
        if error is not None:
            raise error
        return


def _fetch_one(fetcher: Fetcher, file: RemoteFile, place: Place, moved: Callable[[int], None]) -> None:
    with _writing(place):
        for path in (place.partial(file), place.lock(file)):
            path.parent.mkdir(parents=True, exist_ok=True)
        # Another download of the same file may hold the lock, and may have fetched the file meanwhile.
        with WeakFileLock(place.lock(file)):
            if place.has(file):
                moved(file.size)
            else:
                fetcher.fetch(file, place.partial(file), place.target(file))
            if file.path != CONFIG:
                place.placed(file)
