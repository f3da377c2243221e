"""Packs a hub's cache of a model into a tarball for a bucket, with the same bytes at any time on any machine."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import io
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from gateway.models import ModelError
from gateway.models.selection import RemoteFile

SUFFIXES = (".tar", ".tar.gz")
# The fastest level, because weights hardly get smaller at any level.
_LEVEL = 1


class Content(NamedTuple):
    """The content of a tarball: a model at a commit, its files, and the local path of each."""

    model: str
    commit: str
    files: Sequence[tuple[RemoteFile, Path]]

    @property
    def size(self) -> int:
        """Bytes of all files, each counted once; the tarball is some kilobytes larger."""
        return sum({file.oid: file.size for file, _ in self.files}.values())


def target_of(name: str, *, zipped: bool) -> Path:
    """The path of the new file: NAME.tar or NAME.tar.gz in this folder. Raises ModelError for a bad or taken name."""
    if "/" in name or "\\" in name or name in ("", ".", "..") or not name.isprintable() or name.startswith("-"):
        raise ModelError(f"--tarfile-name must be a plain name, without a path, but it is {name!r}.")
    target = Path(f"{name}{SUFFIXES[zipped]}")
    if target.exists() or target.is_symlink():
        raise ModelError(f"{target} exists: remove it, or choose another name with --tarfile-name.")
    return target


def write(target: Path, content: Content, *, zipped: bool, watch: Callable[[int, int], None]) -> None:
    """Write the tarball as NAME.part, and rename it when it is complete. Raises ModelError.

    An error or an interrupt leaves no file. A kill leaves NAME.part, which the next run overwrites.
    """
    part = target.with_name(f"{target.name}.part")
    try:
        with _alone(part) as file:
            try:
                with contextlib.ExitStack() as stack:
                    out: IO[bytes] = stack.enter_context(_zipped(file)) if zipped else file
                    _write(out, target.name.removesuffix(SUFFIXES[zipped]), content, watch)
                file.flush()
                os.fsync(file.fileno())
                if target.exists():
                    raise ModelError(f"{target} has been made meanwhile: remove it, or choose another name.")
                part.rename(target)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise ModelError(f"{target} cannot be written: {error.strerror or error}.") from None


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[IO[bytes]]:
    with part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ModelError(f"{part} is being written by another vllm-gateway: wait for it.") from None
        file.truncate(0)
        yield file


def _zipped(file: IO[bytes]) -> Any:
    # No name and no time, which would change the bytes each time.
    return gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=file, mtime=0)


def _write(out: IO[bytes], name: str, content: Content, watch: Callable[[int, int], None]) -> None:
    top = f"{name}/models--{content.model.replace('/', '--')}"
    snapshot = f"{top}/snapshots/{content.commit}"
    links = {f"{snapshot}/{file.path}": file for file, _ in content.files}
    blobs = {file.oid: (file, path) for file, path in content.files}
    folders = {name, top, f"{top}/blobs", f"{top}/refs", f"{top}/snapshots"}
    for link in links:
        while (link := posixpath.dirname(link)) != f"{top}/snapshots":
            folders.add(link)
    done, total = 0, content.size
    # "w|": write without seeking, because a gzip stream cannot seek.
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1024 * 1024) as tar:
        for folder in sorted(folders):
            tar.addfile(_entry(folder, tarfile.DIRTYPE, 0o755))
        _add_text(tar, f"{name}/version.txt", f"{content.model} {content.commit}\n")
        # Without a newline, as the hub's own tools write and read it.
        _add_text(tar, f"{top}/refs/main", content.commit)
        for link, file in sorted(links.items()):
            entry = _entry(link, tarfile.SYMTYPE, 0o777)
            entry.linkname = posixpath.relpath(f"{top}/blobs/{file.oid}", posixpath.dirname(link))
            tar.addfile(entry)
        for oid, (file, path) in sorted(blobs.items()):
            entry = _entry(f"{top}/blobs/{oid}", tarfile.REGTYPE, 0o644)
            entry.size = file.size
            with path.open("rb") as opened:
                tar.addfile(entry, _Watched(opened, done, total, watch))
            done += file.size


def _entry(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    """An entry without owner and time, because these differ from machine to machine."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.mtime = kind, mode, 0
    return entry


def _add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    entry = _entry(name, tarfile.REGTYPE, 0o644)
    entry.size = len(text.encode())
    tar.addfile(entry, io.BytesIO(text.encode()))


class _Watched(io.RawIOBase):
    """A file that reports the progress of its reading."""

    def __init__(self, file: IO[bytes], done: int, total: int, watch: Callable[[int, int], None]) -> None:
        self._file = file
        self._done = done
        self._total = total
        self._watch = watch

    def read(self, size: int = -1) -> bytes:
        piece = self._file.read(size)
        self._done += len(piece)
        self._watch(self._done, self._total)
        return piece
