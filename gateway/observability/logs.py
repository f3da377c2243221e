"""The program's own log lines, as JSON or text, and the thread that writes all log lines."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from queue import SimpleQueue

from gateway.observability.request_log import Format, iso

# Past this many unwritten lines new lines are dropped and counted: a stuck reader must not exhaust the memory.
_PENDING = 50_000
# Lines of so many seconds are written together.
_TOGETHER = 0.1
_LOST = b'{"level":"WARNING","message":"%d log lines were lost: %b"}'


class LineWriter:
    """Writes lines to a file descriptor from its own thread, so that a slow disk or pipe delays no request."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.set_blocking(fd, True)
        self._pending: deque[tuple[bytes, int]] = deque()
        # Each counter has one writing thread: the callers' for taken and dropped, the log thread for the others.
        self._taken = 0
        self._dropped = 0
        self._written = 0
        self._failed = 0
        self._dropped_told = 0
        self._failed_told = 0
        self._closing = False
        self._woken = False
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, lines: bytes, count: int = 1) -> None:
        """Queue `count` lines for writing; the last has no newline."""
        if self._taken - self._written >= _PENDING:
            self._dropped += count
            return
        self._taken += count
        self._pending.append((lines, count))
        if not self._woken:
            self._woken = True
            self._wake.put(None)

    def close(self) -> None:
        """Write the remaining lines; wait at most 5 s for that."""
        self._closing = True
        self._wake.put(None)
        self._thread.join(5)

    def _run(self) -> None:
        while not self._closing:
            self._wake.get()
            time.sleep(_TOGETHER)
            self._woken = False
            self._flush()
        self._flush()

    @property
    def lost(self) -> int:
        """How many lines were dropped or could not be written since the start."""
        return self._dropped + self._failed

    def _flush(self) -> None:
        taken = [self._pending.popleft() for _ in range(len(self._pending))]
        lines = [block for block, _ in taken]
        self._written += sum(count for _, count in taken)
        told = self._dropped
        if told > self._dropped_told:
            lines.append(_LOST % (told - self._dropped_told, b"their reader is too slow"))
            self._dropped_told = told
        if lines:
            self._write(b"\n".join([*lines, b""]))

    def _write(self, data: bytes) -> None:
        failed = self._failed - self._failed_told
        if failed:
            data = _LOST % (failed, b"they could not be written") + b"\n" + data
        lines = data.count(b"\n")
        left = data
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
            # A full disk or a closed pipe must not end the process: the gateway serves on without its log.
            self._failed += min(left.count(b"\n"), lines - bool(failed))
        if failed and left.count(b"\n") < lines:
            self._failed_told += failed


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": iso(int(record.created * 1000)),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # Not orjson, which refuses the lone surrogates of an environment that is not UTF-8.
        return json.dumps(line)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # A message may hold text from an upstream, which must not start a new line.
        message = record.getMessage().replace("\n", "\\n")
        text = f"{iso(int(record.created * 1000))} {record.levelname:<7} {message}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _Handler(logging.Handler):
    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        self._writer.write(self.format(record).encode(errors="backslashreplace"))


def configure(writer: LineWriter, log_format: Format, log_level: str) -> None:
    """Send every logger of the process through `writer`."""
    handler = _Handler(writer)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    logging.basicConfig(level=log_level, handlers=[handler], force=True)
    # httpx logs every probe, urllib3 every batch of spans, and uvicorn its own start and stop.
    for name in ("httpx", "httpcore", "urllib3", "uvicorn"):
        logging.getLogger(name).setLevel("WARNING")
