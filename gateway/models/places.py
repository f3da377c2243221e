"""The places for a model's files: huggingface_hub's cache, or a folder with the files under their own names."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name

from gateway.models import ModelError
from gateway.models.hashes import is_whole
from gateway.models.selection import RemoteFile

CONFIG = "config.json"
"""The file by which programs recognize a model's folder, so it is written last."""


class Place(Protocol):
    """A place for files. Each file is fetched into `partial` under the lock `lock`, and then moved to `target`."""

    folder: Path

    def target(self, file: RemoteFile) -> Path: ...

    def partial(self, file: RemoteFile) -> Path: ...

    def lock(self, file: RemoteFile) -> Path: ...

    def has(self, file: RemoteFile) -> bool:
        """Whether the file exists with the right hash. Raises ModelError if a foreign file is in its place."""
        ...

    def begin(self, files: Iterable[RemoteFile]) -> None:
        """Called if files are missing: until all exist, the place must not look like a model. Raises OSError."""
        ...

    def placed(self, file: RemoteFile) -> None:
        """Called when the file is at its target. Raises OSError."""
        ...

    def complete(self, files: Iterable[RemoteFile]) -> None:
        """Called when all files exist: now the place may look like a model. Raises OSError."""
        ...


class HubCache:
    """The cache of huggingface_hub: files named by their hashes, and links with the files' own names."""

    def __init__(self, model: str, commit: str, revision: str) -> None:
        root = Path(HF_HUB_CACHE).expanduser()
        name = repo_folder_name(repo_id=model, repo_type="model")
        self._model = root / name
        self._locks = root / ".locks" / name
        self._commit = commit
        self._revision = revision
        self.folder = self._model / "snapshots" / commit

    def target(self, file: RemoteFile) -> Path:
        return self._model / "blobs" / file.oid

    def partial(self, file: RemoteFile) -> Path:
        return self._model / "blobs" / f"{file.oid}.incomplete"

    def lock(self, file: RemoteFile) -> Path:
        return self._locks / f"{file.oid}.lock"

    def has(self, file: RemoteFile) -> bool:
        target = self.target(file)
        return target.is_file() and is_whole(target, file.oid, file.size)

    def begin(self, files: Iterable[RemoteFile]) -> None:
        if any(file.path == CONFIG for file in files):
            (self.folder / CONFIG).unlink(missing_ok=True)

    def placed(self, file: RemoteFile) -> None:
        pass

    def complete(self, files: Iterable[RemoteFile]) -> None:
        for file in sorted(files, key=lambda file: file.path == CONFIG):
            link = self.folder / file.path
            link.parent.mkdir(parents=True, exist_ok=True)
            _replace_by_link(link, Path(os.path.relpath(self.target(file), link.parent)))
        if self._revision != self._commit:
            reference = self._model / "refs" / self._revision
            reference.parent.mkdir(parents=True, exist_ok=True)
            _replace(reference, self._commit)


class Folder:
    """A separate folder, with the metadata that huggingface_hub keeps in such a folder."""

    def __init__(self, folder: Path, commit: str) -> None:
        self.folder = folder
        self._commit = commit
        self._notes = folder / ".cache" / "huggingface" / "download"

    def target(self, file: RemoteFile) -> Path:
        # config.json gets its name last: without it no program takes the folder for a model.
        return self._notes / f"{file.oid}.last" if file.path == CONFIG else self.folder / file.path

    def partial(self, file: RemoteFile) -> Path:
        name = hashlib.sha256(file.path.encode()).hexdigest()[:16]
        return self._notes / f"{name}.{file.oid}.incomplete"

    def lock(self, file: RemoteFile) -> Path:
        return self.partial(file).with_suffix(".lock")

    def has(self, file: RemoteFile) -> bool:
        there = self.folder / file.path
        if not there.exists():
            return self.target(file).is_file() and is_whole(self.target(file), file.oid, file.size)
        if there.is_file() and is_whole(there, file.oid, file.size):
            return True
        if not there.is_file() or not self._note(file).is_file():
            raise ModelError(f"{there} exists, and no hub has it: remove it, or name another folder.")
        # The file is of another revision, or damaged.
        return False

    def begin(self, files: Iterable[RemoteFile]) -> None:
        for file in files:
            if file.path == CONFIG and (self.folder / CONFIG).exists():
                self._notes.mkdir(parents=True, exist_ok=True)
                os.replace(self.folder / CONFIG, self.target(file))

    def placed(self, file: RemoteFile) -> None:
        note = self._note(file)
        note.parent.mkdir(parents=True, exist_ok=True)
        # The format of huggingface_hub: the commit, the hash, and the time.
        _replace(note, f"{self._commit}\n{file.oid}\n{time.time()}\n")

    def complete(self, files: Iterable[RemoteFile]) -> None:
        for file in sorted(files, key=lambda file: file.path == CONFIG):
            if file.path == CONFIG and self.target(file).exists():
                os.replace(self.target(file), self.folder / CONFIG)
            self.placed(file)

    def _note(self, file: RemoteFile) -> Path:
        return self._notes / f"{file.path}.metadata"


def commit_of(folder: Path) -> str | None:
    """The commit of a folder of either kind, None if it is not recorded."""
    note = folder / ".cache" / "huggingface" / "download" / f"{CONFIG}.metadata"
    found = folder.resolve().name if folder.resolve().parent.name == "snapshots" else ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = note.read_text().split("\n")[0]
    return found if re.fullmatch(r"[0-9a-f]{40}", found) else None


def _replace(file: Path, text: str) -> None:
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    beside.write_text(text)
    os.replace(beside, file)


def _replace_by_link(link: Path, to: Path) -> None:
    beside = link.with_name(f"{link.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(to)
    os.replace(beside, link)
