"""The hash by which a hub identifies a file: SHA-256 for a large file, Git's own SHA-1 for a small one."""

from __future__ import annotations

import hashlib
import queue
import re
import threading
from pathlib import Path
from typing import Any

_OID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_PIECE = 1024 * 1024
# The most pieces that wait to be hashed.
_AHEAD = 8


def is_oid(name: str) -> bool:
    """Whether the name is a hash of one of the two kinds, in hexadecimal."""
    return _OID.fullmatch(name) is not None


def hash_of(oid: str, size: int) -> Any:
    """A new hash of the same kind as `oid`, for a file of `size` bytes."""
    # Git hashes a header with the size before the file's bytes.
    return hashlib.sha1(b"blob %d\0" % size) if len(oid) == 40 else hashlib.sha256()


class FileHash:
    """Hashes pieces in a separate thread, while the next are fetched: hashing a piece takes as long as fetching it.

    `close` ends the thread, after which `matches` is final.
    """

    def __init__(self, oid: str, size: int) -> None:
        self._oid = oid
        self._hash = hash_of(oid, size)
        self._pieces: queue.Queue[bytes | None] = queue.Queue(_AHEAD)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._hash.update(piece)

    def update(self, piece: bytes) -> None:
        """Add the next piece; blocks while too many pieces wait."""
        self._pieces.put(piece)

    def close(self) -> None:
        """Wait until all pieces are hashed."""
        if self._thread.is_alive():
            self._pieces.put(None)
            self._thread.join()

    def matches(self) -> bool:
        """Whether all pieces together have the file's hash."""
        return bool(self._hash.hexdigest() == self._oid)


def is_whole(file: Path, oid: str, size: int) -> bool:
    """Whether the file has this size and this hash. Raises OSError."""
    if file.stat().st_size != size:
        return False
    found = hash_of(oid, size)
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE):
            found.update(piece)
    return bool(found.hexdigest() == oid)
