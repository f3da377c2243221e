"""Reads a batch's input twice, once to check it and once to send it, and never holds it in memory."""

from __future__ import annotations

import codecs
import contextlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO

from gateway.batch.request import BadLine, Request, digest_of, to_request

# The gateway's default limit for a request body.
_LONGEST = 16 * 1024 * 1024
_PIPE = "-"


class BadInput(Exception):
    """Nothing can be sent; the text is a sentence that says why."""


class InputFile:
    """A seekable file of JSON lines."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self.name = "standard input" if name == _PIPE else name
        self._file = file

    @property
    def status(self) -> os.stat_result:
        """The file's status, which identifies it."""
        return os.fstat(self._file.fileno())

    def check(self, model: str | None) -> dict[bytes, int]:
        """The digests of all ids, with their line numbers. Raises BadInput, which names the first wrong line."""
        lines: dict[bytes, int] = {}
        for number, request in self.requests(model):
            first = lines.setdefault(digest_of(request.custom_id), number)
            if first != number:
                raise BadInput(f"{self._line(number)} has the custom_id of line {first}: each needs its own.")
        if not lines:
            raise BadInput(f"{self.name} has no requests: it is empty.")
        return lines

    def requests(self, model: str | None) -> Iterator[tuple[int, Request]]:
        """The request for each line, with the line's number. Raises BadInput."""
        for number, line in self._lines():
            try:
                request = to_request(line, model)
            except BadLine as error:
                raise BadInput(f"{self._line(number)} {error}.") from None
            yield number, request

    def unchanged(self, model: str | None, lines: Mapping[bytes, int]) -> Iterator[tuple[bytes, Request]]:
        """The requests once more after the check, with their digests. Raises BadInput if a line's id has changed."""
        for number, request in self.requests(model):
            digest = digest_of(request.custom_id)
            if lines.get(digest) != number:
                raise BadInput(f"{self._line(number)} has changed since it was checked: run it again.")
            yield digest, request

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """The lines that are not blank, without the byte order mark that some editors write first."""
        number = 0
        try:
            self._file.seek(0)
            while line := self._file.readline(_LONGEST + 1):
                number += 1
                if len(line) > _LONGEST and not line.endswith(b"\n"):
                    raise BadInput(
                        f"{self._line(number)} is longer than {_LONGEST} bytes, the most that a gateway takes."
                    )
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line := line.strip():
                    yield number, line
        except OSError as error:
            raise BadInput(f"{self.name} cannot be read ({error.strerror}).") from None

    def _line(self, number: int) -> str:
        return f"{self.name}: line {number}"


@contextlib.contextmanager
def opened(name: str) -> Iterator[InputFile]:
    """Open the file of this name; a pipe, such as -, is first copied to a temporary file. Raises BadInput."""
    with contextlib.ExitStack() as closing:
        try:
            file = _standard_input() if name == _PIPE else closing.enter_context(open(name, "rb"))
        except (OSError, ValueError) as error:
            raise BadInput(f"{name} cannot be read ({_reason(error)}): name a file of requests.") from None
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            try:
                copy = closing.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(file, copy)
                copy.flush()
            except OSError as error:
                raise BadInput(
                    f"What is piped in cannot be kept in {tempfile.gettempdir()} ({error.strerror}): name another "
                    "folder with TMPDIR, or a file in place of the pipe."
                ) from None
            file = copy
        yield InputFile(name, file)


def _standard_input() -> IO[bytes]:
    if sys.stdin is None:
        raise BadInput("Standard input is closed: name a file.")
    return sys.stdin.buffer


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
