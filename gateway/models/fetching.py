"""Fetches one file of a hub's model, from where an earlier try has ended, and checks its hash."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import httpx2
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from gateway.models import ModelError, shown
from gateway.models.hashes import FileHash
from gateway.models.hub import Hub
from gateway.models.selection import RemoteFile

_PIECE = 1024 * 1024
_FAILURES = (HfHubHTTPError, OfflineModeIsEnabled, httpx2.HTTPError, httpx2.InvalidURL)
# A number, because the library warns about its old name for this status.
_NO_SUCH_RANGE = 416
_PART = re.compile(r"bytes (\d+)-\d+/(\d+)")


class Stopped(Exception):
    """Another file has failed, or the user has stopped the download."""


class Fetcher:
    """Fetches files of one model at one commit; calls `moved` with received bytes, or with -N for N discarded bytes."""

    def __init__(self, hub: Hub, model: str, commit: str, moved: Callable[[int], None], stop: threading.Event) -> None:
        self._hub = hub
        self._model = model
        self._commit = commit
        self._moved = moved
        self._stop = stop

    def fetch(self, file: RemoteFile, partial: Path, target: Path) -> None:
        """Fetch the file into `partial`, whose bytes are not fetched again, and then move it to `target`.

        A kill at any moment leaves the received bytes in `partial`, because each is written as it comes. Raises
        ModelError, after which nothing of a file with a wrong hash is left. Raises Stopped.
        """
        try:
            # Unbuffered, so that no received byte is lost.
            with open(partial, "a+b", buffering=0) as opened:
                whole = self._fill(file, opened)
            if not whole:
                partial.unlink()
                raise ModelError(
                    f"{file.path} of {self._model} is damaged: it came with other bytes than the hub says "
                    f"({file.oid}). It is removed; download again."
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial, target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ModelError(
                    f"The disk of {partial.parent} is full while {file.path} ({shown(file.size)}) is fetched: make "
                    "room, and download again, which goes on where it has ended."
                ) from None
            raise ModelError(f"{file.path} cannot be written to {target}: {error.strerror or error}.") from None

    def _fill(self, file: RemoteFile, opened: BinaryIO) -> bool:
        """Fetch the missing bytes; returns whether the whole file has the hash that the hub lists."""
        if os.fstat(opened.fileno()).st_size > file.size:
            opened.truncate(0)
        one = _Part(file, opened, self._moved, self._stop)
        try:
            one.read_again()
            tries, most = 0, one.done
            while one.done < file.size:
                try:
                    with self._hub.open(self._model, self._commit, file.path, one.done) as response:
                        self._take(response, one)
                        if one.done < file.size:
                            raise httpx2.RemoteProtocolError("the file ends early", request=response.request)
                except _FAILURES as error:
                    # If a hub does not support ranges, bytes that are received again are no progress.
                    tries = 1 if one.done > most else tries + 1
                    most = max(most, one.done)
                    wait = self._hub.wait_after(error, tries)
                    if wait is None:
                        raise self._failure(error, file) from None
                    if self._stop.wait(wait):
                        raise Stopped from None
        finally:
            one.hash.close()
        return one.hash.matches()

    def _take(self, response: httpx2.Response, one: _Part) -> None:
        if one.done and response.status_code in (httpx2.codes.OK, _NO_SUCH_RANGE):
            # The hub does not support ranges: fetch the whole file again.
            one.start_anew()
            if response.status_code != httpx2.codes.OK:
                return
        if response.status_code >= 400:
            response.read()
        self._hub.judge(response)
        if (total := _total(response, one.done)) not in (None, one.file.size):
            raise ModelError(
                f"{one.file.path} of {self._model} has {one.file.size} bytes by the hub's list, but it is sent as "
                f"{total}: download again."
            )
        for piece in response.iter_raw():
            one.take(piece)

    def _failure(self, error: Exception, file: RemoteFile) -> ModelError:
        if isinstance(error, httpx2.TransportError):
            return ModelError(
                f"The hub {self._hub.url} breaks off while {file.path} of {self._model} is fetched "
                f"({type(error).__name__}): download again, which goes on where it has ended."
            )
        return self._hub.refusal(error, self._model, self._commit)


def _total(response: httpx2.Response, start: int) -> int | None:
    """The size of the whole file by the headers of a response that begins at `start`; None if they do not say it."""
    if response.status_code == httpx2.codes.PARTIAL_CONTENT:
        said = _PART.fullmatch(response.headers.get("content-range", ""))
        if said is None or int(said[1]) != start:
            raise httpx2.RemoteProtocolError("another part than the one asked for", request=response.request)
        return int(said[2])
    length = response.headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdecimal() else None


class _Part:
    """The received bytes of a file, and their hash."""

    def __init__(self, file: RemoteFile, opened: BinaryIO, moved: Callable[[int], None], stop: threading.Event) -> None:
        self.file = file
        self.done = 0
        self.hash = FileHash(file.oid, file.size)
        self._opened = opened
        self._moved = moved
        self._stop = stop

    def read_again(self) -> None:
        """Hash the bytes that an earlier try has left."""
        self._opened.seek(0)
        while piece := self._opened.read(_PIECE):
            self._count(piece)

    def start_anew(self) -> None:
        self._moved(-self.done)
        self._opened.truncate(0)
        self.done = 0
        self.hash.close()
        self.hash = FileHash(self.file.oid, self.file.size)

    def take(self, piece: bytes) -> None:
        if self.done + len(piece) > self.file.size:
            raise ModelError(f"{self.file.path} is longer than the {self.file.size} bytes of the hub's list.")
        written = self._opened.write(piece)
        while written < len(piece):
            written += self._opened.write(piece[written:])
        self._count(piece)

    def _count(self, piece: bytes) -> None:
        if self._stop.is_set():
            raise Stopped
        self.hash.update(piece)
        self.done += len(piece)
        self._moved(len(piece))
