"""Writes a batch's results, one line each in OpenAI's form, to a new file or to that of an interrupted batch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Container, Iterator
from typing import IO, Any
from uuid import uuid4

import orjson

from gateway.batch.request import digest_of

_PIPE = "-"
# The beginning of each line, by which a cut line is recognized as ours.
BEGINNING = b'{"id":"batch_req_'


class BadOutput(Exception):
    """Results cannot be written there; the text is a sentence that says why."""


class Unwritable(Exception):
    """A result could not be written; the cause says why. The results before it are complete."""


class OutputFile:
    """The output; `answered` has the digests of the ids that have an answer and need no request."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = "standard output" if name == _PIPE else name
        self.answered: set[bytes] = set()
        self._path = os.path.realpath(name)
        self._descriptor = descriptor
        self._is_file = name != _PIPE and stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._is_terminal = os.isatty(descriptor)
        self._size = 0

    def go_on(self, known: Container[bytes]) -> None:
        """Find the `known` ids that have an answer, and remove all else from the file: a cut line, and failures.

        Raises BadOutput if the file is not one of this batch's results, and then leaves it unchanged.
        """
        if not self._is_file:
            return
        try:
            if self._examine(known):
                os.ftruncate(self._descriptor, self._size)
            else:
                self._rewrite()
        except OSError as error:
            raise BadOutput(f"{self.name} cannot be gone on with ({error.strerror}): name another output.") from None

    def write(self, result: bytes) -> None:
        """Write one result, unbuffered. Raises Unwritable; a file then has only the results before."""
        if self._is_terminal:  # escape control characters, as a model's text must not control the terminal
            result = json.dumps(orjson.loads(result)).encode()
        rest = memoryview(result + b"\n")
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            if self._is_file:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, self._size)
            raise Unwritable from error
        self._size += len(result) + 1

    def _examine(self, known: Container[bytes]) -> bool:
        """Whether each line has an answer, except perhaps a cut line at the end."""
        tidy = True
        for number, line in enumerate(self._lines(), 1):
            read = _read(line)
            if read is None:
                if line.endswith(b"\n") or not (BEGINNING.startswith(line[: len(BEGINNING)]) or not line.strip(b"\0")):
                    raise BadOutput(
                        f"{self.name} is not this batch's: its line {number} is no result. Name another output."
                    )
                continue
            digest, is_answer = read
            if digest not in known:
                raise BadOutput(
                    f"{self.name} is not this batch's: its line {number} has a custom_id that the input has not. Name "
                    "another output."
                )
            tidy = tidy and is_answer and digest not in self.answered and line.endswith(b"\n")
            if is_answer:
                self.answered.add(digest)
                self._size += len(line)
        return tidy

    def _rewrite(self) -> None:
        """Replace the file by one with the answers alone, which is locked before it takes the file's place."""
        # In the same folder, because a rename works only within a file system.
        with tempfile.NamedTemporaryFile("wb", dir=os.path.dirname(self._path), delete=False) as file:
            try:
                shutil.copymode(self._path, file.name)
                self._copy_answers(file)
                descriptor = os.open(file.name, os.O_RDWR | os.O_APPEND)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.replace(file.name, self._path)
            except BaseException:
                os.unlink(file.name)
                raise
        os.dup2(descriptor, self._descriptor)
        os.close(descriptor)

    def _copy_answers(self, file: IO[bytes]) -> None:
        kept: set[bytes] = set()
        for line in self._lines():
            read = _read(line)
            if read is not None and read[1] and read[0] not in kept:
                kept.add(read[0])
                file.write(line.rstrip(b"\n") + b"\n")
        file.flush()
        os.fsync(file.fileno())
        self._size = file.tell()

    def _lines(self) -> Iterator[bytes]:
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            file.seek(0)
            yield from file


@contextlib.contextmanager
def opened(name: str, other_than: os.stat_result) -> Iterator[OutputFile]:
    """Open the file of this name, for one `batch` at a time; create it if it is missing. Raises BadOutput.

    `other_than` is the status of the input, which must be another file.
    """
    with contextlib.ExitStack() as closing:
        descriptor = _standard_output() if name == _PIPE else _opened(name, closing)
        status = os.fstat(descriptor)
        if os.path.samestat(status, other_than):
            raise BadOutput("The input and the output are one file: name another output.")
        if name != _PIPE and stat.S_ISREG(status.st_mode):
            _lock(name, descriptor)
        yield OutputFile(name, descriptor)


def _standard_output() -> int:
    if sys.stdout is None:
        raise BadOutput("Standard output is closed: name a file.")
    return sys.stdout.fileno()


def _opened(name: str, closing: contextlib.ExitStack) -> int:
    try:
        is_file = not os.path.exists(name) or os.path.isfile(name)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND if is_file else os.O_WRONLY
        descriptor = os.open(name, flags, 0o666)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadOutput(f"{name} cannot be written ({reason}): name another output.") from None
    closing.callback(os.close, descriptor)
    return descriptor


def _lock(name: str, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another `batch` may have replaced the file after this one had opened it.
        if os.path.samestat(os.fstat(descriptor), os.stat(name)):
            return
    except BlockingIOError:
        pass
    except OSError as error:
        raise BadOutput(f"{name} cannot be locked ({error.strerror}): name one on another file system.") from None
    raise BadOutput(f"{name} is being written by another `batch`: wait for its end, or name another output.")


def result_of(custom_id: str, *, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    """The line for this id: the `response` of any status, or the `error` that explains why there is none."""
    told = orjson.dumps({"custom_id": custom_id, "response": response, "error": error})
    return BEGINNING + uuid4().hex.encode() + b'",' + told[1:]


def _read(line: bytes) -> tuple[bytes, bool] | None:
    """The digest of a result's id, and whether the result is an answer; None if the line is no result."""
    try:
        told = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(told, dict) or not isinstance(told.get("custom_id"), str) or "response" not in told:
        return None
    response = told["response"]
    status = response.get("status_code") if isinstance(response, dict) else None
    return digest_of(told["custom_id"]), told.get("error") is None and isinstance(status, int) and status // 100 == 2
