"""Finds the model in a hub's cache that came as a folder or a tarball; a tarball is unpacked once.

For `up`, and for the containers of model servers; it needs only Python.
"""

from __future__ import annotations

import fcntl
import hashlib
import posixpath
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple, cast

from gateway.models import ModelError, shown
from gateway.models.hashes import hash_of, is_oid

_TARBALL = re.compile(r".+\.(tar|tar\.gz|tgz)")
_PIECE = 1024 * 1024

Watch = Callable[[int, int], None]
"""Called with the bytes of a tarball that are read, and with its size."""


class CachedModel(NamedTuple):
    """A model's name on the hub, and the cache that contains the model."""

    name: str
    cache: Path

    def environment(self) -> dict[str, str]:
        """The variables by which vLLM finds the model there, and asks no hub."""
        return {"HF_HUB_CACHE": str(self.cache), "HF_HUB_OFFLINE": "1"}


def is_tarball(name: str) -> bool:
    """Whether the name is that of a tarball."""
    return _TARBALL.fullmatch(name) is not None


def find(path: Path, unpacked: Path, watch: Watch = lambda done, total: None) -> CachedModel | None:
    """Find the model of a tarball, which is unpacked below `unpacked`, or of a folder with a cache or a tarball.

    None for a folder with a model's own files, and for a path without any of these. Raises ModelError.
    """
    if path.is_file() and is_tarball(path.name):
        return _only_model(_unpacked(path, unpacked, watch), path)
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    if any(path.glob("models--*")) or any(path.glob("*/models--*")):
        return _only_model(path, path)
    tarballs = sorted(one for one in path.iterdir() if is_tarball(one.name) and one.is_file())
    if len(tarballs) > 1:
        raise ModelError(f"The folder {path} has {len(tarballs)} tarballs: name one of them, as {tarballs[0]}.")
    return find(tarballs[0], unpacked, watch) if tarballs else None


def _only_model(folder: Path, source: Path) -> CachedModel:
    """The only model of the cache that is this folder or one of its subfolders."""
    models = sorted({*folder.glob("models--*"), *folder.glob("*/models--*")})
    whole = [model for model in models if any(model.glob("snapshots/*/config.json"))]
    if len(whole) != 1:
        names = " and ".join(model.name for model in whole) or "none with a config.json"
        raise ModelError(f"{source} must hold one model of a hub's cache, but it holds {names}.")
    (model,) = whole
    if not (model / "refs" / "main").is_file():
        raise ModelError(f"{source} has no {model.name}/refs/main, which says what is served: download it anew.")
    return CachedModel("/".join(model.name.split("--", 2)[1:]), model.parent)


def _unpacked(tarball: Path, folder: Path, watch: Watch) -> Path:
    """The folder of the unpacked tarball; a change of its time or size means new content. Raises ModelError."""
    try:
        found = tarball.stat()
        folder.mkdir(parents=True, exist_ok=True)
        own = hashlib.sha256(str(tarball.resolve()).encode()).hexdigest()[:8]
        kept = folder / f"{own}-{found.st_size}-{found.st_mtime_ns}"
        with (folder / f"{own}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.is_dir():
                _unpack(tarball, found.st_size, kept, watch)
                for other in folder.glob(f"{own}-*"):
                    if other != kept:
                        shutil.rmtree(other, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"{tarball} cannot be unpacked into {folder}: {error.strerror or error}.") from None
    return kept


def _unpack(tarball: Path, size: int, kept: Path, watch: Watch) -> None:
    free = shutil.disk_usage(kept.parent).free
    if size > free:
        raise ModelError(
            f"{tarball} needs {shown(size)} or more on the disk of {kept.parent}, but {shown(free)} are free: "
            "make room."
        )
    part = kept.with_name(f"{kept.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        with tarball.open("rb") as file:
            watched = cast(IO[bytes], _Watched(file, size, watch))
            with tarfile.open(fileobj=watched, mode="r|*") as tar:
                _Unpacking(part, tarball).take(tar)
        part.rename(kept)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ModelError(f"{tarball} is no whole tarball ({error}): fetch it again.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _Watched:
    """A file that reports the progress of its reading."""

    def __init__(self, file: IO[bytes], size: int, watch: Watch) -> None:
        self._file = file
        self._size = size
        self._watch = watch

    def read(self, size: int) -> bytes:
        piece = self._file.read(size)
        self._watch(self._file.tell(), self._size)
        return piece


class _Unpacking:
    """Unpacks only folders, files and links within the tarball, because a tarball is untrusted."""

    def __init__(self, folder: Path, tarball: Path) -> None:
        self._folder = folder
        self._tarball = tarball
        self._links: set[str] = set()

    def take(self, tar: tarfile.TarFile) -> None:
        for entry in tar:
            name = self._inside(entry.name, entry.name)
            if name == ".":
                continue
            path = self._folder / name
            if entry.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink() or path.exists():
                raise self._refusal(entry.name, "is there twice")
            if entry.issym():
                self._inside(posixpath.join(posixpath.dirname(name), entry.linkname), entry.name)
                path.symlink_to(entry.linkname)
                self._links.add(name)
            elif entry.isreg():
                self._write(tar, entry, path)
            else:
                raise self._refusal(entry.name, "is neither a file nor a folder nor a link")
        for link in sorted(self._links):
            if not (self._folder / link).is_file():
                raise self._refusal(link, "leads to no file: it is cut short")

    def _inside(self, name: str, told: str) -> str:
        normal = posixpath.normpath(name)
        if name.startswith("/") or normal.startswith("..") or "\0" in name:
            raise self._refusal(told, "leads out of it")
        parts = normal.split("/")
        if any("/".join(parts[:end]) in self._links for end in range(1, len(parts))):
            raise self._refusal(told, "is behind a link")
        return normal

    def _write(self, tar: tarfile.TarFile, entry: tarfile.TarInfo, path: Path) -> None:
        """Write a file and check its hash: a blob of a hub's cache is named by its hash."""
        oid = path.name if path.parent.name == "blobs" and is_oid(path.name) else ""
        found = hash_of(oid, entry.size)
        source = tar.extractfile(entry)
        assert source is not None
        with path.open("xb") as file:
            while piece := source.read(_PIECE):
                file.write(piece)
                found.update(piece)
        if oid and found.hexdigest() != oid:
            raise self._refusal(entry.name, "is damaged: its bytes are not those of its hash")

    def _refusal(self, name: str, why: str) -> ModelError:
        return ModelError(f"{self._tarball}: {name!r} {why}. Nothing of it is unpacked.")
